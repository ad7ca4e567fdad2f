"""Several requests at once through LLM and AsyncEngine, and texts that must have a form."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coterie import LLM, AsyncEngine, InvalidArgument, SamplingParams, StructuredOutputsParams
from coterie.async_engine import EngineStopped
from coterie.tokenizer import ChatTokenizer

PROMPTS = [
    "Once upon a time,",
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "Emoji: 😀🎉 and",
    "red, green, blue, red, green, blue, red, green,",
]
PARAMS = [
    SamplingParams(max_tokens=20),
    SamplingParams(max_tokens=12, stop=[" Paris"]),
    SamplingParams(max_tokens=25, temperature=1.0, seed=4, n=2),
    SamplingParams(max_tokens=16, stop=["\n"], include_stop_str_in_output=True, repetition_penalty=1.1),
    SamplingParams(max_tokens=24, temperature=1.5, seed=3),
    SamplingParams(max_tokens=12),
]


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(smollm2, max_model_len=512)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list:
    return [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def texts(outputs: list) -> list:
    return [[(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in output.outputs] for output in outputs]


def test_together_as_alone(llm: LLM, alone: list) -> None:
    assert texts(llm.generate(PROMPTS, PARAMS)) == texts(alone)
    assert alone[1].outputs[0].stop_reason == " Paris"
    assert " Paris" not in alone[1].outputs[0].text
    assert alone[3].outputs[0].text.endswith("\n")
    for output in alone:
        assert output.prefill_seconds > 0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("speculation", ["prompt_lookup", "draft"])
def test_guessed_ahead_as_one_by_one(smollm2: Path, alone: list, speculation: str, adaptive: bool) -> None:
    llm = LLM(
        smollm2,
        max_model_len=512,
        speculation=speculation,
        draft_model=smollm2 if speculation == "draft" else None,
        prompt_lookup_min=1,
        adaptive_speculation=adaptive,
    )
    assert texts(llm.generate(PROMPTS, PARAMS)) == texts(alone)
    single = [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert texts(single) == texts(alone)
    assert adaptive or llm.stats["num_accepted_tokens"] > 0


def test_what_follows_a_stop_string_in_a_step_is_not_there(smollm2: Path, llm: LLM) -> None:
    guessing = LLM(
        smollm2, max_model_len=512, speculation="draft", draft_model=smollm2, adaptive_speculation=False
    )  # always right: seven tokens a step
    prompt = PROMPTS[2]
    for stop in llm.generate(prompt, SamplingParams(max_tokens=12))[0].outputs[0].text.split():
        params = SamplingParams(max_tokens=12, stop=[stop], logprobs=0)
        one, several = (engine.generate(prompt, params) for engine in (llm, guessing))
        assert texts(several) == texts(one)
        assert len(several[0].outputs[0].logprobs) == len(several[0].outputs[0].token_ids)


def test_what_ends_a_text_is_left_out(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[2], SamplingParams(max_tokens=12))[0].outputs[0]
    end = whole.token_ids[6]
    assert end not in whole.token_ids[:6]
    before = llm.tokenizer.decode(whole.token_ids[:6])
    for include in (False, True):
        params = SamplingParams(max_tokens=12, stop_token_ids=[end], include_stop_str_in_output=include)
        output = llm.generate(PROMPTS[2], params)[0].outputs[0]
        assert output.token_ids == whole.token_ids[:7] and output.stop_reason == end
        assert (output.text == before) == (not include)
    word = llm.tokenizer.decode([whole.token_ids[2]])
    params = SamplingParams(max_tokens=12, stop=[word], min_tokens=5)
    later = llm.generate(PROMPTS[2], params)[0].outputs[0]
    assert later.text.startswith(llm.tokenizer.decode(whole.token_ids[:5]))


def test_a_request_without_its_tokenizer_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise InvalidArgument("m.gguf: tokenizer.ggml.pre: 'new' is not supported")

    monkeypatch.setattr(ChatTokenizer, "load", fail)
    monkeypatch.delitem(llm.requests.__dict__, "tokenizer", raising=False)
    with pytest.raises(InvalidArgument, match="is not supported"):
        llm.generate([[1, 2, 3]], SamplingParams(stop=["x"], max_tokens=3))
    assert llm.stats["num_waiting"] == llm.stats["num_running"] == 0
    output = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].outputs[0]
    assert len(output.token_ids) == 3 and output.text == ""


def test_streams_add_up(llm: LLM, alone: list) -> None:
    pieces: dict[tuple[int, int], str] = {}
    for prompt, delta in llm.stream(PROMPTS, PARAMS):
        pieces[prompt, delta.index] = pieces.get((prompt, delta.index), "") + delta.text
    assert pieces == {(i, o.index): o.text for i, output in enumerate(alone) for o in output.outputs}


def test_a_closed_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, PARAMS)
    next(stream)
    with pytest.raises(InvalidArgument, match="a stream of this LLM is not at its end"):
        llm.generate("x")
    stream.close()
    stats = llm.stats
    assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
    assert stats["num_free_kv_blocks"] == stats["num_kv_blocks"]


def test_one_bad_prompt_stops_none_of_the_engine(llm: LLM, alone: list) -> None:
    with pytest.raises(InvalidArgument, match="prompt_token_ids: 600 tokens"):
        llm.generate([[1, 2, 3], [1] * 600], SamplingParams(max_tokens=4))
    assert llm.stats["num_waiting"] == 0
    with pytest.raises(InvalidArgument, match="sampling_params: 1 of them for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    assert texts(llm.generate(PROMPTS[:1], PARAMS[:1])) == texts(alone[:1])


def test_async_tasks_get_what_they_get_alone(llm: LLM, alone: list) -> None:
    async def run() -> list:
        async with AsyncEngine(llm) as engine:
            return await asyncio.gather(*map(engine.generate, PROMPTS * 3, PARAMS * 3))

    assert texts(asyncio.run(run())) == texts(alone * 3)


def test_async_streams_bring_every_completion_to_its_end(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=4, temperature=1.0, seed=5, ignore_eos=True)
    expected = texts(llm.generate(PROMPTS[0], params))[0]

    async def run() -> dict[int, tuple]:
        got: dict[int, tuple] = {}
        async with AsyncEngine(llm) as engine:
            async for delta in engine.stream(PROMPTS[0], params):
                text, ids, _ = got.get(delta.index, ("", [], None))
                got[delta.index] = (text + delta.text, ids + delta.token_ids, delta.finish_reason)
                await asyncio.sleep(0.05)  # steps go on meanwhile
        return got

    got = asyncio.run(run())
    assert [got[i] for i in range(3)] == [entry[:3] for entry in expected]


def test_async_cancellation_and_errors(llm: LLM, alone: list) -> None:
    long = SamplingParams(max_tokens=400, ignore_eos=True)

    async def run() -> None:
        async with AsyncEngine(llm) as engine:
            stream = engine.stream(PROMPTS[0], long)
            assert (await anext(stream)).token_ids
            await stream.aclose()
            task = asyncio.create_task(engine.generate(PROMPTS[3], long))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(InvalidArgument, match="prompt_token_ids: 600 tokens"):
                await engine.generate([1] * 600, PARAMS[0])
            assert texts([await engine.generate(PROMPTS[1], PARAMS[1])]) == texts(alone[1:2])
            for _ in range(100):
                if engine.stats["num_running"] == 0:
                    break
                await asyncio.sleep(0.05)
            assert engine.stats["num_free_kv_blocks"] == engine.stats["num_kv_blocks"]
            unfinished = asyncio.create_task(engine.generate(PROMPTS[0], long))
            await asyncio.sleep(0.1)
        with pytest.raises(EngineStopped, match="the engine was closed"):
            await unfinished
        with pytest.raises(EngineStopped, match="the engine was closed"):
            await engine.generate(PROMPTS[0])

    asyncio.run(run())


def test_the_interpreter_may_end_while_the_engine_runs(smollm2: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from coterie import AsyncEngine, SamplingParams\n"
        "engine = AsyncEngine(sys.argv[1])\n"
        "async def run():\n"
        "    return await anext(engine.stream('x', SamplingParams(max_tokens=400, ignore_eos=True)))\n"
        "print(len(asyncio.run(run()).token_ids))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(smollm2)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_fits_its_schema(llm: LLM, temperature: float) -> None:
    form = StructuredOutputsParams(json=SCHEMA)
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=1, n=3, structured_outputs=form)
    for output in llm.generate("A person as JSON:", params)[0].outputs:
        assert output.finish_reason == "stop"
        person = json.loads(output.text)
        assert set(person) == {"name", "age", "colours"}
        assert isinstance(person["name"], str) and len(person["name"]) <= 12
        assert isinstance(person["age"], int) and 0 <= person["age"] <= 120
        assert 2 <= len(person["colours"]) <= 3 and set(person["colours"]) <= {"red", "green"}


def test_other_forms_beside_free_text(llm: LLM, alone: list) -> None:
    expression = r"[0-9]{3}-[a-f]{2}(x|y)"
    forms = [
        StructuredOutputsParams(regex=expression),
        StructuredOutputsParams(choice=["yes, of course", "no, never"]),
        StructuredOutputsParams(grammar='start: "<" word ("," word)? ">"\nword: "cat" | "dog"'),
    ]
    params = [SamplingParams(max_tokens=30, temperature=2.0, seed=2, structured_outputs=form) for form in forms]
    outputs = llm.generate(["Say:"] * 3 + PROMPTS, params + PARAMS)
    assert re.fullmatch(expression, outputs[0].outputs[0].text)
    assert outputs[1].outputs[0].text in ("yes, of course", "no, never")
    assert re.fullmatch(r"<(cat|dog)(,(cat|dog))?>", outputs[2].outputs[0].text)
    assert texts(outputs[3:]) == texts(alone)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": "{"}, "structured_outputs: json: "),
        ({"json": {"type": "nonsense"}}, "structured_outputs: json: "),
        ({"regex": "("}, "structured_outputs: regex: "),
        ({}, "structured_outputs: nothing given"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs: regex and choice given"),
    ],
)
def test_bad_forms_are_named(llm: LLM, form: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(**form)))


def test_without_llguidance_one_line_says_so(smollm2: Path) -> None:
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from coterie import LLM, SamplingParams, StructuredOutputsParams\n"
        "form = StructuredOutputsParams(regex='a')\n"
        "try: LLM(sys.argv[1]).generate('x', SamplingParams(structured_outputs=form))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(smollm2)], capture_output=True, text=True, check=True)
    assert done.stdout == "structured_outputs: needs the package llguidance (pip install llguidance)\n"


def test_serving_loads_no_torch(smollm2: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from coterie import AsyncEngine, SamplingParams, StructuredOutputsParams\n"
        "params = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputsParams(regex='a+'))\n"
        "async def run():\n"
        "    async with AsyncEngine(sys.argv[1]) as engine:\n"
        "        return await engine.generate('x', params)\n"
        "print(asyncio.run(run()).outputs[0].finish_reason)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(smollm2)], check=True)
