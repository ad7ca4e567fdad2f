"""The command: every refusal is exit code 2 and one line, and --json is one object on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from coterie.cli import main

CONFIG = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
num_experts = [0, 4]
residual = "sum"
[data]
path = "{data}"
sequence_length = 16
[train]
output_dir = "{out}"
tokens = 64
batch_size = 4
learning_rate = 1e-3
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for n in range(4):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{n}.txt").write_text(f"Document {n} has a few words in it.\n" * (10 + n))
    return tmp_path / "text"


@pytest.fixture
def data(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["data", str(text), "--out", str(tmp_path / "data"), "--vocab-size", "280", "--json"]) == 0
    capsys.readouterr()
    return tmp_path / "data"


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG.format(data=data, out=tmp_path / "run"))
    return path


@pytest.fixture
def model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tiny_models.save(tiny_models.build("coterie_pyramid"), tmp_path / "model")
    capsys.readouterr()
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("coterie: ")
    return captured.err.removeprefix("coterie: ").rstrip("\n")


def answered(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    """The JSON object that a command with --json prints, alone on stdout."""
    assert main([*(str(argument) for argument in arguments), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_missing_files_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, model: Path):
    missing = tmp_path / "missing"
    assert refused(capsys, "train", missing) == f"{missing}: No such file or directory"
    assert refused(capsys, "data", missing, "--out", tmp_path) == f"{missing}: No such file or directory"
    for arguments in (
        ("inspect", missing),
        ("export", missing, tmp_path / "out"),
        ("eval", missing, "--data", data),
        ("generate", missing, "--prompt", "x"),
    ):
        assert str(missing) in refused(capsys, *arguments)
    wanted = f"{missing}: no meta.json there: make the data with `coterie data`"
    assert refused(capsys, "eval", model, "--data", missing) == wanted


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]):
    assert refused(capsys, "trian") == "No such command 'trian'. Did you mean 'train'?"
    assert refused(capsys, "train") == "Missing argument 'CONFIG.toml'."
    assert "--nope" in refused(capsys, "inspect", "x", "--nope")


def test_configuration_errors(capsys: pytest.CaptureFixture[str], config: Path):
    assert refused(capsys, "train", config, "--set", "train.lr=1") == f"{config}: train.lr: unknown key (1)"
    wanted = f"{config}: model.top_k: exceeds num_experts of layer 1, 4 (5)"
    assert refused(capsys, "train", config, "--set", "model.top_k=5") == wanted
    assert refused(capsys, "distill", config) == f"{config}: distill: section is missing"
    wanted = f"{config}: distill: this section is for `coterie distill`"
    assert refused(capsys, "train", config, "--set", "distill.teacher=x") == wanted


def test_a_sequence_longer_than_the_data(capsys: pytest.CaptureFixture[str], config: Path):
    long = refused(capsys, "train", config, "--set", "data.sequence_length=5000", "--set", "train.tokens=20000")
    assert "sequence_length" in long and "5001" in long


def test_a_truncated_model(capsys: pytest.CaptureFixture[str], data: Path, model: Path, tmp_path: Path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments in (
        ("inspect", model),
        ("eval", model, "--data", data),
        ("export", model, tmp_path / "out"),
    ):
        assert str(weights) in refused(capsys, *arguments)


def test_an_impossible_model(capsys: pytest.CaptureFixture[str], model: Path):
    config = json.loads((model / "config.json").read_text())
    config["num_key_value_heads"] = 5
    (model / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "inspect", model)
    assert str(model / "config.json") in line and "num_key_value_heads" in line and "5" in line


def test_an_unknown_architecture_to_export(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path):
    line = refused(capsys, "export", model, tmp_path / "out", "--architecture", "FooForCausalLM")
    assert "FooForCausalLM" in line


def test_inspect_counts_what_is_stored(capsys: pytest.CaptureFixture[str], model: Path):
    from safetensors import safe_open

    facts = answered(capsys, "inspect", model)
    with safe_open(model / "model.safetensors", "np") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]
    assert facts["params_total"] == sum(tensor.size for tensor in tensors)
    assert facts["bytes_per_dtype"] == {"F32": sum(tensor.nbytes for tensor in tensors)}
    assert facts["tensors"] == len(tensors)
    config = json.loads((model / "config.json").read_text())
    assert [layer["num_experts"] for layer in facts["config"]["layers"]] == [
        layer["num_experts"] for layer in config["layers"]
    ]
    assert facts["params_active"] < facts["params_total"]


def test_inspect_shows_tables(capsys: pytest.CaptureFixture[str], model: Path):
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert str(model) in out and "MoE" in out and "active per token" in out


def test_inspect_reads_gguf(capsys: pytest.CaptureFixture[str], smollm2: Path):
    facts = answered(capsys, "inspect", smollm2)
    assert facts["params_total"] == facts["params_active"] == 134_515_008
    assert facts["tensors"] == 272


def test_inspect_shows_a_checkpoint(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path):
    summary = answered(capsys, "train", config)
    finished = answered(capsys, "inspect", summary["model"])
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    facts = answered(capsys, "inspect", step)
    assert facts["config"] == finished["config"]
    assert (facts["params_total"], facts["params_active"]) == (finished["params_total"], finished["params_active"])
    assert facts["bytes_per_dtype"] == {"F32": 3 * 4 * facts["params_total"]}  # masters and two moments
    assert facts["tensors"] == 3 * finished["tensors"]
    checkpoint = facts["checkpoint"]
    assert (checkpoint["step"], checkpoint["sequences"], checkpoint["dtype"]) == (1, 4, "fp32")
    assert (checkpoint["ranks"], checkpoint["pieces"]) == (1, facts["tensors"])
    assert main(["inspect", str(step)]) == 0
    assert "checkpoint of step" in capsys.readouterr().out
    # A run is its model or, until that is there, its newest checkpoint.
    assert answered(capsys, "inspect", tmp_path / "run") == finished
    (tmp_path / "run" / "model" / "config.json").unlink()
    assert answered(capsys, "inspect", tmp_path / "run") == facts
    assert answered(capsys, "inspect", tmp_path / "run" / "checkpoints") == facts
    (step / "rank-00000.safetensors").unlink()
    assert "rank-00000.safetensors" in refused(capsys, "inspect", step)


def test_a_process_ends_with_code_2_and_no_trace(tmp_path: Path):
    arguments = [sys.executable, "-m", "coterie", "train", str(tmp_path / "x.toml")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"coterie: {tmp_path / 'x.toml'}: No such file or directory\n"


def test_serving_commands_load_no_torch(model: Path):
    code = (
        "import sys; from coterie.cli import main; assert main(['inspect', sys.argv[1], '--json']) == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, stdout=subprocess.DEVNULL)


def test_importing_the_package_loads_nothing_else():
    code = "import sys, coterie; assert not {'torch', 'numpy', 'coterie._engine'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_reader_that_has_enough_ends_the_command(model: Path) -> None:
    command = f"{sys.executable} -m coterie inspect {model} --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_generation_config_names_the_end_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coterie import LLM, SamplingParams

    greedy = SamplingParams(max_tokens=8)
    free = LLM(model).generate([1, 2, 3], greedy)[0].outputs[0].token_ids
    settings = model / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [free[2]]}))
    stopped = LLM(model).generate([1, 2, 3], greedy)[0].outputs[0]
    assert stopped.token_ids == free[: free.index(free[2]) + 1]
    assert stopped.finish_reason == "stop"
    settings.write_text(json.dumps({"eos_token_id": "end"}))
    assert main(["inspect", str(model)]) == 2
    assert "generation_config.json: eos_token_id" in capsys.readouterr().err
