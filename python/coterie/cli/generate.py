"""`coterie generate`: continue prompts, or answer them as chat messages."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli import generation_options as options
from coterie.cli.console import JsonOption, print_json

if TYPE_CHECKING:
    from coterie.llm import LLM
    from coterie.outputs import CompletionOutput, RequestOutput


def generate(
    model: options.ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(help="The text to continue; may be given several times. - is all of stdin.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file with a prompt on each line, - for stdin; they run together.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt as a user's message.")] = False,
    system: options.System = None,
    n: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    max_new_tokens: options.MaxNewTokens = 128,
    min_tokens: Annotated[int, typer.Option(help="No end token before so many.")] = 0,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="ID=BIAS, added to a token's logit; may be given several times.")
    ] = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End with this token; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the model's end tokens.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of the tokens and so many of the likeliest.")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="The text is JSON that fits this schema (a file, or {...}).")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The text matches this regular expression.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="The text is one of these; give it several times.")] = None,
    dtype: options.DType = "auto",
    attention_dtype: options.AttentionDType = "",
    head_dtype: options.HeadDType = "",
    weight_cache: options.WeightCache = True,
    cache_dir: options.CacheDir = None,
    mmap: options.Mmap = False,
    expert_cache_bytes: options.ExpertCacheBytes = 0,
    kv_cache_dtype: options.KvCacheDType = "auto",
    kv_cache_bytes: options.KvCacheBytes = 0,
    threads: options.Threads = 0,
    max_model_len: options.MaxModelLen = 0,
    speculation: options.Speculation = "off",
    draft_model: options.DraftModel = None,
    max_num_seqs: Annotated[int, typer.Option(help="Texts that run at once; others wait.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens that run through the model at once.")] = 2048,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts. Texts go to stdout, one as it grows, several when all are done; the rest to stderr."""
    from coterie.llm import LLM
    from coterie.sampling import SamplingParams

    texts = _texts(prompt, prompts)
    params = SamplingParams(
        n=n,
        max_tokens=max_new_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=options.logit_biases(logit_bias),
        seed=seed,
        stop=stop or [],
        stop_token_ids=stop_token_id or [],
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        structured_outputs=options.structured_outputs(json_schema, regex, choice),
    )
    llm = LLM(
        model,
        dtype=dtype,
        attention_dtype=attention_dtype,
        head_dtype=head_dtype,
        weight_cache=weight_cache,
        weight_cache_dir=cache_dir,
        mmap=mmap,
        expert_cache_bytes=expert_cache_bytes,
        threads=threads,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        speculation=speculation,
        draft_model=draft_model,
    )
    single = len(texts) == 1 and n == 1
    on_text = _print_piece if single and not as_json else None
    outputs = llm.generate(_inputs(llm, texts, chat, system), params, on_text)
    if as_json:
        results = [_result(text, output) for text, output in zip(texts, outputs, strict=True)]
        print_json(results[0] if len(results) == 1 else {"results": results, "usage": _usage(outputs)})
        return
    if single:
        print()
    else:
        for text, output in zip(texts, outputs, strict=True):
            _print_texts(text, output)
    print(_summary(outputs), file=sys.stderr)


def _texts(prompt: list[str] | None, prompts: str | None) -> list[str]:
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give --prompt or --prompts", param_hint="--prompt")
    if prompts is None:
        return [sys.stdin.read() if text == "-" else text for text in prompt or []]
    source = sys.stdin.read() if prompts == "-" else Path(prompts).read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"{prompts}: holds no prompt", param_hint="--prompts")
    return lines


def _inputs(llm: LLM, texts: list[str], chat: bool, system: str | None) -> list[Any]:
    if not chat:
        return list(texts)
    before = [] if system is None else [{"role": "system", "content": system}]
    return llm.chat_prompts([[*before, {"role": "user", "content": text}] for text in texts])


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def _print_texts(prompt: str, output: RequestOutput) -> None:
    for completion in output.outputs:
        print(f">>> {prompt}\n{completion.text}\n")


def _result(prompt: str, output: RequestOutput) -> dict[str, Any]:
    """The first continuation, the others in "outputs" where there are several, and what it took."""
    completions = [_completion(completion) for completion in output.outputs]
    return {
        "prompt": prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        **completions[0],
        **({"outputs": completions} if len(completions) > 1 else {}),
        "usage": _usage([output]),
        "timings": {
            "queue_s": output.queue_seconds,
            "prefill_s": output.prefill_seconds,
            "decode_s": output.decode_seconds,
        },
        **_rates(output),
    }


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    fields = asdict(completion)
    if completion.logprobs is None:
        del fields["logprobs"]
    return fields


def _usage(outputs: list[RequestOutput]) -> dict[str, int]:
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "cached_prompt_tokens": sum(output.num_cached_tokens for output in outputs),
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _rates(output: RequestOutput) -> dict[str, float]:
    """The first token comes with the prompt; of the others, those of the first continuation."""
    computed = len(output.prompt_token_ids) - output.num_cached_tokens
    return {
        "prefill_tokens_per_s": _rate(computed, output.prefill_seconds),
        "decode_tokens_per_s": _rate(len(output.outputs[0].token_ids) - 1, output.decode_seconds),
    }


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _summary(outputs: list[RequestOutput]) -> str:
    usage = _usage(outputs)
    if len(outputs) == 1 and len(outputs[0].outputs) == 1:
        rates = _rates(outputs[0])
        return (
            f"{usage['prompt_tokens']} prompt tokens ({rates['prefill_tokens_per_s']:.0f} tokens/s), "
            f"{usage['completion_tokens']} new ones ({rates['decode_tokens_per_s']:.1f} tokens/s), "
            f"ended by {outputs[0].outputs[0].finish_reason}"
        )
    seconds = max(output.queue_seconds + output.prefill_seconds + output.decode_seconds for output in outputs)
    rate = _rate(usage["completion_tokens"], seconds)
    return (
        f"{len(outputs)} prompts of {usage['prompt_tokens']} tokens ({usage['cached_prompt_tokens']} cached), "
        f"{usage['completion_tokens']} new ones in {seconds:.1f} s ({rate:.1f} tokens/s)"
    )
