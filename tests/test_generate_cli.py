"""`coterie generate` and `coterie chat` as a user meets them."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from coterie import LLM, SamplingParams
from coterie.cli.chat import Conversation


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coterie", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(smollm2)


def test_several_prompts_from_a_file_or_stdin(smollm2: Path, llm: LLM, tmp_path: Path) -> None:
    prompts = ["Once upon a time", "The capital of France is"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n\n")
    settings = ("--max-new-tokens", 8, "--json")
    from_file = run("generate", smollm2, "--prompts", file, *settings)
    from_stdin = run("generate", smollm2, "--prompts", "-", *settings, stdin=file.read_text())
    named = run("generate", smollm2, "--prompt", prompts[0], "--prompt", prompts[1], *settings)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=8))
    for done in (from_file, from_stdin, named):
        answer = json.loads(done.stdout)
        assert [result["prompt"] for result in answer["results"]] == prompts
        assert [result["text"] for result in answer["results"]] == [output.outputs[0].text for output in outputs]
        assert answer["usage"]["completion_tokens"] == 16
    shown = run("generate", smollm2, "--prompts", file, "--max-new-tokens", 8)
    assert shown.stdout == "".join(f">>> {p}\n{o.outputs[0].text}\n\n" for p, o in zip(prompts, outputs, strict=True))
    assert "2 prompts of" in shown.stderr


def test_json_says_what_it_took(smollm2: Path) -> None:
    done = run(
        *("generate", smollm2, "--prompt", "-", "--max-new-tokens", 6, "--n", 2, "--temperature", 1, "--seed", 3),
        *("--logprobs", 2, "--logit-bias", "28=-100", "--json"),
        stdin="A list: a, b, c",
    )
    answer = json.loads(done.stdout)
    assert answer["prompt"] == "A list: a, b, c"
    assert len(answer["outputs"]) == 2 and answer["outputs"][0]["text"] == answer["text"]
    assert len(answer["logprobs"]) == 6
    assert 28 not in answer["token_ids"]
    assert answer["usage"]["total_tokens"] == answer["prompt_tokens"] + 12
    assert answer["timings"]["prefill_s"] > 0 and answer["decode_tokens_per_s"] > 0


def test_forms(smollm2: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}')
    done = run("generate", smollm2, "--prompt", "Bob is 25.", "--json-schema", schema, "--max-new-tokens", 60)
    assert isinstance(json.loads(done.stdout)["age"], int)
    done = run("generate", smollm2, "--prompt", "Now", "--regex", "[0-9]{2}:[0-9]{2}")
    assert done.stdout[2] == ":" and len(done.stdout) == 6
    done = run("generate", smollm2, "--prompt", "2+2=4?", "--choice", "yes", "--choice", "no")
    assert done.stdout in ("yes\n", "no\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --prompt or --prompts"),
        (["--prompt", "x", "--prompts", "-"], "give --prompt or --prompts"),
        (["--prompts", "-"], "holds no prompt"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt: No such file or directory"),
        (["--prompt", "x", "--logit-bias", "one"], "'one' is not ID=BIAS"),
        (["--prompt", "x", "--logit-bias", "99999999=1"], "logit_bias: 99999999 is not in"),
        (["--prompt", "x", "--regex", "("], "structured_outputs: regex"),
        (["--prompt", "x", "--kv-cache-dtype", "int3"], "kv_cache_dtype: 'int3'"),
        (["--prompt", "x", "--min-p", "2"], "min_p: 2 is not in"),
    ],
)
def test_bad_arguments_are_one_line(smollm2: Path, arguments: list[str], message: str) -> None:
    done = run("generate", smollm2, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_guessing_ahead_changes_no_text(smollm2: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "one two three one two three one", "--max-new-tokens", 12)
    plain = run("generate", smollm2, *prompt)
    assert plain.stdout
    assert run("generate", smollm2, *prompt, "--speculation", "prompt_lookup").stdout == plain.stdout
    drafted = run("generate", smollm2, *prompt, "--speculation", "draft", "--draft-model", smollm2)
    assert drafted.stdout == plain.stdout
    chat = ("chat", smollm2, "--max-new-tokens", 8, "--seed", 1)
    assert run(*chat, "--speculation", "prompt_lookup", stdin="Hi\n").stdout == run(*chat, stdin="Hi\n").stdout
    refused = run("generate", smollm2, *prompt, "--speculation", "draft")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("draft_model: speculation 'draft' needs one")
    missing = run("chat", smollm2, "--speculation", "draft", "--draft-model", tmp_path / "none")
    assert missing.returncode == 2
    assert f"{tmp_path / 'none'}: no such file or directory" in missing.stderr


def test_a_chat_remembers_until_reset(smollm2: Path, llm: LLM) -> None:
    settings = ("--temperature", 0, "--max-new-tokens", 12, "--system", "Be brief.")
    script = "My name is Bob.\n\nWhat is my name?\n/help\n/reset\n/nonsense\nWhat is my name?\n/exit\nnever read\n"
    done = run("chat", smollm2, *settings, stdin=script)
    assert done.returncode == 0
    params = SamplingParams(max_tokens=12)
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "My name is Bob."}]
    one = llm.chat(first, params)[0].outputs[0].text
    question = {"role": "user", "content": "What is my name?"}
    two = llm.chat([*first, {"role": "assistant", "content": one}, question], params)[0].outputs[0].text
    three = llm.chat([system, question], params)[0].outputs[0].text
    assert done.stdout == f"{one}\n{two}\n{three}\n"
    assert "/nonsense: no such command" in done.stderr and "forgotten" in done.stderr
    assert run("chat", smollm2, *settings, stdin="").returncode == 0


class InChannels:
    """Stands for an LLM that writes in channels: pieces of its text, one answer for all questions."""

    max_model_len = 100

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.tokenizer = SimpleNamespace(backend=SimpleNamespace(token_to_id=lambda mark: 1))
        self.asked: list[list[dict]] = []

    def chat_prompts(self, messages: list[dict]) -> list[list[int]]:
        self.asked.append(messages)
        return [[0]]

    def generate(self, prompt: list[int], params: SamplingParams, on_text: Callable[[str], None]) -> None:
        for piece in self.pieces:
            on_text(piece)


def test_a_chat_shows_what_a_model_wrote_and_remembers_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = ("<|channel|", ">analysis<|message|>a:warning:b [red]<", "|end|><|start|>assistant<|channel|>final")
    llm = InChannels(*pieces, "<|message|>x:warning:y", " <")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\n/:warning:\n"))
    Conversation(llm, SamplingParams(), None).run()
    shown = capsys.readouterr()
    assert shown.out == "x:warning:y <\n" * 2
    assert shown.err.startswith("a:warning:b [red]" * 2 + "/:warning:: no such command")
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x:warning:y <"}]
    assert llm.asked[1] == [*answered, {"role": "user", "content": "Again"}]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(smollm2: Path) -> None:
    command = [sys.executable, "-m", "coterie", "chat", str(smollm2), "--max-new-tokens", "100000", "--seed", "1"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    ) as chat:
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write("Write a novel.\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        chat.stdin.write("/exit\n")
        chat.stdin.close()
        assert chat.stdout.read().endswith("\n")
        assert "(stopped)" in chat.stderr.read()
        assert chat.wait(60) == 0


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    import tiny_models
    from tokenizers import Tokenizer, models

    directory = tiny_models.save(tiny_models.build("llama"), tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    done = run("chat", directory, stdin="a\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "chat_template: the model has none" in done.stderr
