"""The engine against transformers, on random tiny checkpoints of every architecture."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie import LLM, SamplingParams, _engine

# Relative to the largest logit. fp32 sums of a few hundred terms in another order differ by 1e-6.
TOLERANCE = 1e-4
LENGTHS = (1, 150)  # of prompts; the second and its continuation fill several KV blocks
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=list(tiny_models.BUILDERS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_models.build(request.param)


@pytest.fixture(scope="module")
def directory(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(model, tmp_path_factory.mktemp("model"))


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    return model(torch.tensor([token_ids])).logits[0].numpy()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("length", LENGTHS)
def test_logits(model: PreTrainedModel, directory: Path, length: int) -> None:
    token_ids = tiny_models.prompt(length, seed=length)
    logits = LLM(directory, threads=2).logits(token_ids)
    assert logits.dtype == np.float32
    assert logits.shape == (length, tiny_models.VOCAB_SIZE)
    assert relative_error(logits, reference_logits(model, token_ids)) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_continuation(model: PreTrainedModel, directory: Path, length: int) -> None:
    """Where transformers, given the engine's text so far, would take the engine's next token at every
    step, its own greedy continuation is the same."""
    prompt = tiny_models.prompt(length, seed=length)
    output = LLM(directory, threads=2).generate([prompt], SamplingParams(max_tokens=NEW_TOKENS))[0]
    continuation = output.outputs[0].token_ids
    assert (output.prompt_token_ids, output.outputs[0].finish_reason) == (prompt, "length")
    assert len(continuation) == NEW_TOKENS

    logits = reference_logits(model, prompt + continuation)[length - 1 : -1]
    assert logits.argmax(axis=1).tolist() == continuation
    # The two likeliest tokens must lie further apart than both may be wrong.
    likeliest = np.sort(logits)[:, -2:]
    margin = (likeliest[:, 1] - likeliest[:, 0]).min() / np.abs(logits).max()
    assert margin > 2 * TOLERANCE, "a near-tie: give this model another seed in tiny_models.py"


def test_negative_log_likelihood(model: PreTrainedModel, directory: Path) -> None:
    token_ids = tiny_models.prompt(90, seed=3)
    log_p = torch.from_numpy(reference_logits(model, token_ids)).double().log_softmax(-1)
    expected = -log_p[:-1].gather(1, torch.tensor(token_ids[1:])[:, None]).sum().item()
    actual = _engine.Engine(str(directory)).negative_log_likelihood(token_ids)
    # Each term is off by at most twice the error of a logit.
    assert abs(actual - expected) < 2 * TOLERANCE * reference_scale(model, token_ids) * len(token_ids)


def reference_scale(model: PreTrainedModel, token_ids: list[int]) -> float:
    return float(np.abs(reference_logits(model, token_ids)).max())


def test_bf16_logits(model: PreTrainedModel, directory: Path) -> None:
    """The engine in bf16 is as far from fp32 as transformers is when the same things are rounded.

    Both round matrices and the inputs of products to 8 bits, in other places here and there, so their
    errors are different draws of about the same size; half as much again covers that the engine also
    rounds keys and inner activations of experts. The median over the tokens is compared, since a
    token whose rounding changes an expert is another function.
    """
    token_ids = tiny_models.prompt(150, seed=150)
    expected = reference_logits(model, token_ids)
    actual = _engine.Engine(str(directory), dtype="bf16").logits(token_ids)
    emulated = reference_logits(rounded_to_bf16(model), token_ids)
    error, allowed = (float(np.median(np.abs(x - expected).max(axis=1))) for x in (actual, emulated))
    assert error < 1.5 * allowed
    assert error > 0.5 * allowed, "too exact: is this bf16?"


def rounded_to_bf16(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in fp32 on rounded matrices (routers and mixes stay exact, as in the engine),
    and rounds what goes into linear layers and experts."""
    model = copy.deepcopy(model)
    exact = ("gate.weight", "router.weight", "mix.weight", "bias")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith(exact):
            parameter.data = parameter.data.bfloat16().float()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) or name.endswith("experts"):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(), *inputs[1:]))
        if name.endswith(("k_proj", "v_proj")):  # the KV cache
            module.register_forward_hook(lambda _, inputs, output: output.bfloat16().float())
    return model


def test_sampling_is_a_function_of_the_seed(directory: Path) -> None:
    llm = LLM(directory)
    prompts = [tiny_models.prompt(5)]
    texts = [
        llm.generate(prompts, SamplingParams(max_tokens=24, temperature=1.0, top_k=20, top_p=0.9, seed=seed))[0]
        .outputs[0]
        .token_ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_follows_the_distribution(model: PreTrainedModel, directory: Path) -> None:
    """Of 2000 seeds, a token of probability p gets 2000 p, give or take 5 standard deviations."""
    prompt = tiny_models.prompt(7, seed=7)
    llm = LLM(directory)
    temperature, top_k, n = 2.0, 5, 2000
    logits = torch.from_numpy(reference_logits(model, prompt)[-1]).double() / temperature
    kept = logits.topk(top_k)
    p = dict(zip(kept.indices.tolist(), kept.values.softmax(-1).tolist(), strict=True))
    counts = dict.fromkeys(p, 0)
    params = [SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, seed=seed) for seed in range(n)]
    for output in llm.generate([prompt] * n, params):
        counts[output.outputs[0].token_ids[0]] += 1  # KeyError: not among the top k
    for token_id, count in counts.items():
        expected = n * p[token_id]
        assert abs(count - expected) < 5 * math.sqrt(expected * (1 - p[token_id])) + 1


def test_end_tokens_stop(directory: Path) -> None:
    llm, prompt = LLM(directory), tiny_models.prompt(9, seed=9)
    whole = llm.generate([prompt], SamplingParams(max_tokens=12))[0].outputs[0].token_ids
    last = whole[5]
    params = SamplingParams(max_tokens=12, stop_token_ids=[last])
    output = llm.generate([prompt], params)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (whole[: whole.index(last) + 1], "stop")
