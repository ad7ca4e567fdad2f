"""How the engine chooses tokens, against transformers' logits processors and the formulas of the penalties."""

import dataclasses
from collections import Counter

import pytest
import tiny_models
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coterie import LLM, InvalidArgument, SamplingParams

NEW_TOKENS = 40
PROMPT = tiny_models.prompt(15, seed=3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("model")))


class OutputPenalties:
    """Presence and frequency penalty, as OpenAI's reference has them: of tokens of the output alone."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for token_id, count in Counter(token_ids[0, len(PROMPT) :].tolist()).items():
            logits[0, token_id] -= self.frequency * count + self.presence
        return logits


def end_token(llm: LLM) -> int:
    return llm.generate(PROMPT, SamplingParams(max_tokens=1))[0].outputs[0].token_ids[0]


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency", "logit_bias", "min_tokens", "everything"])
def test_greedy_choices_are_those_of_transformers_processors(llm: LLM, name: str) -> None:
    end = end_token(llm)
    bias = {5: 3.0, 9: -100.0, end: 2.0}
    cases = {
        "min_tokens": (
            {"min_tokens": 12, "stop_token_ids": [end]},
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 12, eos_token_id=end, device="cpu"),
        ),
        "logit_bias": ({"logit_bias": bias}, SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()})),
        "repetition": ({"repetition_penalty": 1.7}, RepetitionPenaltyLogitsProcessor(1.7)),
        "presence": ({"presence_penalty": 1.5}, OutputPenalties(1.5, 0)),
        "frequency": ({"frequency_penalty": -0.4}, OutputPenalties(0, -0.4)),
    }
    chosen = list(cases) if name == "everything" else [name]
    processors = LogitsProcessorList([cases[case][1] for case in chosen])
    settings = {key: value for case in chosen for key, value in cases[case][0].items()}
    output = llm.generate(PROMPT, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **settings))[0].outputs[0]
    token_ids = PROMPT + output.token_ids
    raw = torch.from_numpy(llm.logits(token_ids))
    for position in range(len(PROMPT), len(token_ids)):
        expected = processors(torch.tensor([token_ids[:position]]), raw[position - 1][None].clone())[0]
        assert int(expected.argmax()) == token_ids[position], f"token {position}"
    plain = llm.generate(PROMPT, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))[0].outputs[0]
    assert output.token_ids != plain.token_ids, "the setting does nothing here"


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 1.5, "min_p": 0.2}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.2)]),
        ({"temperature": 0.7, "top_p": 0.8}, [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.8)]),
        ({"temperature": 2.0, "top_p": 0.999}, [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.999)]),
        (
            {"temperature": 3.0, "top_k": 7, "top_p": 0.9},
            [TemperatureLogitsWarper(3.0), TopKLogitsWarper(7), TopPLogitsWarper(0.9)],
        ),
        (
            {"temperature": 2.0, "min_p": 0.1, "top_k": 9, "top_p": 0.8},
            [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.1), TopKLogitsWarper(9), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_choices_follow_transformers_distribution(llm: LLM, settings: dict, warpers: list) -> None:
    """Of 4000 seeds, a token of probability p gets 4000 p, give or take 5 standard deviations."""
    n = 4000
    raw = torch.from_numpy(llm.logits(PROMPT)[-1]).double()[None]
    p = LogitsProcessorList(warpers)(torch.tensor([PROMPT]), raw)[0].softmax(-1)
    params = [SamplingParams(max_tokens=1, seed=seed, **settings) for seed in range(n)]
    counts = Counter(output.outputs[0].token_ids[0] for output in llm.generate([PROMPT] * n, params))
    for token_id, probability in enumerate(p.tolist()):
        deviation = (n * probability * (1 - probability)) ** 0.5
        assert abs(counts[token_id] - n * probability) <= 5 * deviation + (1 if probability > 0 else 0), token_id


def test_seeds_count_in_any_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11, n=3)
    alone = llm.generate(PROMPT, params)[0]
    others = [SamplingParams(max_tokens=9 + i, temperature=1.0, seed=i) for i in range(8)]
    prompts = [tiny_models.prompt(4 + i, seed=i) for i in range(8)]
    crowd = llm.generate([*prompts, PROMPT], [*others, params])[-1]
    assert [o.token_ids for o in crowd.outputs] == [o.token_ids for o in alone.outputs]
    free = SamplingParams(max_tokens=20, temperature=1.0)
    assert llm.generate(PROMPT, free)[0].outputs[0].token_ids != llm.generate(PROMPT, free)[0].outputs[0].token_ids


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.5, seed=1, top_k=3, logprobs=2, prompt_logprobs=0)
    output = llm.generate(PROMPT, params)[0]
    completion = output.outputs[0]
    token_ids = PROMPT + completion.token_ids
    expected = torch.from_numpy(llm.logits(token_ids)).double().log_softmax(-1)
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None
    given = [*output.prompt_logprobs[1:], *completion.logprobs]
    for position, by_token in enumerate(given):
        chosen = token_ids[position + 1]
        assert next(iter(by_token)) == chosen
        for token_id, logprob in by_token.items():
            # fp32 logits of about 10 and the sum of their exponentials.
            assert abs(logprob.logprob - expected[position, token_id]) < 1e-5
            assert logprob.rank == 1 + int((expected[position] > expected[position, token_id]).sum())
        if position >= len(PROMPT) - 1:
            assert set(expected[position].topk(2).indices.tolist()) <= set(by_token)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n: 0 is below 1"),
        ({"min_p": 1.5}, "min_p: 1.5 is not in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0 is not positive"),
        ({"presence_penalty": float("nan")}, "presence_penalty: nan is not a finite number"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens: 5 exceeds max_new_tokens"),
        ({"logprobs": -1}, "logprobs: -1 is below 0"),
        ({"temperature": "hot"}, "temperature: 'hot' is not a value of its type"),
        ({"max_tokens": "many"}, "max_tokens: 'many' is not a value of its type"),
        ({"seed": 2**64}, "seed: 18446744073709551616 is not in"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SamplingParams(**settings)


def test_max_tokens_may_be_set_later() -> None:
    params = SamplingParams(max_new_tokens=7)
    assert params.max_tokens == params.for_engine().max_new_tokens == 7
    params.max_tokens = 5
    assert params.for_engine().max_new_tokens == 5
    assert dataclasses.replace(params, max_tokens=3).for_engine().max_new_tokens == 3


def test_no_max_tokens_is_as_many_as_the_model_takes(llm: LLM) -> None:
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    output = llm.generate([PROMPT], params)[0].outputs[0]
    assert output.finish_reason == "length"
    assert len(PROMPT) + len(output.token_ids) == llm.max_model_len


def test_priorities_go_first(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    begun = [i for i, _ in llm.stream([PROMPT, PROMPT[1:], PROMPT[2:]], params, priority=[1, 2, 0])]
    assert begun[:3] == [2, 0, 1]
    for given in ({"priority": [1]}, {"sampling_params": []}):
        name, values = next(iter(given.items()))
        with pytest.raises(InvalidArgument, match=f"{name}: {len(values)} of them for 2 prompts"):
            llm.generate([PROMPT, PROMPT], **given)


def test_values_that_users_of_vllm_give() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None, seed=-1, top_k=-1)
    assert (params.stop, params.stop_token_ids, params.seed, params.top_k) == ([], [], None, 0)
