"""`coterie generate`: continue a prompt, or answer it as a chat message."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory, a .gguf file, or a directory with one.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among those that together reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV cache: fp32 or bf16.")] = "fp32",
    threads: Annotated[int, typer.Option(help="0: as many as the process may use.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Continue a prompt. The continuation alone goes to stdout, as it grows; the rest to stderr."""
    from coterie.llm import LLM, SamplingParams

    params = SamplingParams(
        max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or []
    )
    llm = LLM(model, dtype=dtype, threads=threads)
    on_text = None if as_json else _print_piece
    if chat:
        output = llm.chat([{"role": "user", "content": prompt}], params, on_text)[0]
    else:
        output = llm.generate(prompt, params, on_text)[0]
    completion = output.outputs[0]
    rates = {
        "prefill_tokens_per_s": _rate(len(output.prompt_token_ids), output.prefill_seconds),
        "decode_tokens_per_s": _rate(len(completion.token_ids), output.decode_seconds),
    }
    if as_json:
        result = {"prompt": prompt, "prompt_tokens": len(output.prompt_token_ids), **asdict(completion), **rates}
        print(json.dumps(result, ensure_ascii=False))
        return
    print()
    print(
        f"{len(output.prompt_token_ids)} prompt tokens ({rates['prefill_tokens_per_s']:.0f} tokens/s), "
        f"{len(completion.token_ids)} new ones ({rates['decode_tokens_per_s']:.1f} tokens/s), "
        f"ended by {completion.finish_reason}",
        file=sys.stderr,
    )


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
