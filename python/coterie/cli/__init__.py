"""The command `coterie`: one file per subcommand, and here the one place where errors become exit codes.

0: done. 2: the input is at fault, one line on stderr says where. 3: another rank was lost, one line says which.
130: stopped by Ctrl-C. Anything else is a bug of ours, and shows its trace.
"""

from __future__ import annotations

import sys
import time

import typer

from coterie.benchmarks.worker import BenchError
from coterie.cli.bench import bench
from coterie.cli.chat import chat
from coterie.cli.data import data
from coterie.cli.distill import distill
from coterie.cli.eval import evaluate
from coterie.cli.export import export
from coterie.cli.generate import generate
from coterie.cli.inspect import inspect
from coterie.cli.quantize import quantize
from coterie.cli.train import train
from coterie.cli.verify import verify
from coterie.config import ConfigError
from coterie.corpus import DataError
from coterie.distributed import COMM_FAILED, LaunchError, this_rank
from coterie.training import Interrupted, MissingPackageError

app = typer.Typer(
    name="coterie",
    help="Trains, compresses and serves Mixture-of-Experts language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("data", data),
    ("train", train),
    ("distill", distill),
    ("export", export),
    ("eval", evaluate),
    ("inspect", inspect),
    ("quantize", quantize),
    ("generate", generate),
    ("chat", chat),
    ("verify", verify),
):
    app.command(name)(command)
app.add_typer(bench, name="bench")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        # Not app(...): that turns a closed pipe into exit code 1 before we see it.
        with typer.main.get_command(app).make_context("coterie", arguments) as context:
            return int(context.command.invoke(context) or 0)
    except typer.Exit as ended:  # after --help
        return ended.exit_code
    except Interrupted as interruption:
        _say(f"{interruption}; continue with --resume")
        return 130
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough of it; Python must not try to flush it again on exit.
        sys.stdout = None  # type: ignore[assignment]
        return 141
    except typer.TyperException as error:
        return _refuse(error.format_message())
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except _errors_of_input() as error:
        return _refuse(str(error))
    except _engine_errors("CommError") as error:
        _say(str(error))
        return COMM_FAILED


def _errors_of_input() -> tuple[type[Exception], ...]:
    """The exceptions that say what is wrong with the input."""
    ours = (BenchError, ConfigError, DataError, LaunchError, MissingPackageError)
    return (*ours, *_engine_errors("InvalidArgument", "CorruptFile", "ResourceExhausted"))


def _engine_errors(*names: str) -> tuple[type[Exception], ...]:
    """Exceptions of the engine; none before it is loaded."""
    engine = sys.modules.get("coterie._engine")
    return tuple(getattr(engine, name) for name in names if engine)


def _refuse(message: str) -> int:
    if this_rank().rank > 0:
        # The first rank mostly has the same to say, and the launcher stops us when it has ended.
        time.sleep(10)
    _say(message)
    return 2


def _say(message: str) -> None:
    """One line on stderr in one piece, since other ranks may write there too."""
    sys.stderr.write("coterie: " + " ".join(message.split()) + "\n")
