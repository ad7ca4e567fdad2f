"""The options that `coterie generate` and `coterie chat` share, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coterie.sampling import StructuredOutputsParams

ModelArgument = Annotated[
    Path, typer.Argument(help="A Hugging Face directory, a .gguf file, or a directory with one.", show_default=False)
]
System = Annotated[str | None, typer.Option(help="What a chat's system message says.")]

MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Choose among the k likeliest; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Choose among those that together reach this probability.")]
MinP = Annotated[float, typer.Option(help="Choose among those at least so many times as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: what is in prompt or text gets less likely.")]
PresencePenalty = Annotated[float, typer.Option(help="Above 0: what is in the text gets less likely.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, with every time that it came.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal text; left out, one is drawn.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]

DType = Annotated[str, typer.Option(help="Of the weights: fp32, bf16, int8, int8a16, int4, int4_64; auto: the file's.")]
AttentionDType = Annotated[str, typer.Option(help="Of attention's projections, where it differs from --dtype.")]
HeadDType = Annotated[str, typer.Option(help="Of the head and the embedding, where it differs from --dtype.")]
WeightCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep packed weights in a file beside the model, for the next start.")
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Keep that file in this directory instead, for many models.", show_default=False)
]
Mmap = Annotated[bool, typer.Option("--mmap", help="Leave weights in that file, mapped: less memory, runs slower.")]
ExpertCacheBytes = Annotated[
    int,
    typer.Option(help="With mapped weights, memory for the experts chosen most; 0: a quarter of memory, -1: none."),
]
KvCacheBytes = Annotated[int, typer.Option(help="Of the KV cache at most; 0: a quarter of memory.")]
KvCacheDType = Annotated[
    str, typer.Option(help="Of the KV cache: auto (int8 beside int8 and int4, else bf16 or fp32), fp32, bf16 or int8.")
]
Threads = Annotated[int, typer.Option(help="0: as many as the process may use.")]
Speculation = Annotated[
    str, typer.Option(help="Guess tokens ahead: off, prompt_lookup (from the text so far) or draft (by --draft-model).")
]
DraftModel = Annotated[Path | None, typer.Option(help="A smaller model with the same vocabulary.", show_default=False)]
MaxModelLen = Annotated[int, typer.Option(help="Tokens of prompt and text together; 0: the model's own limit.")]


def structured_outputs(
    json_schema: str | None, regex: str | None, choice: list[str] | None
) -> StructuredOutputsParams | None:
    """What the text must look like; a JSON schema is given as text or as the name of a file."""
    from coterie.sampling import StructuredOutputsParams

    if json_schema is None and regex is None and not choice:
        return None
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = Path(json_schema).read_text(encoding="utf-8")
    return StructuredOutputsParams(json=json_schema, regex=regex, choice=choice or None)


def logit_biases(entries: list[str] | None) -> dict[int, float]:
    """From entries like 42=-1.5, a token id and what is added to its logit."""
    biases = {}
    for entry in entries or []:
        token_id, _, bias = entry.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise typer.BadParameter(f"{entry!r} is not ID=BIAS", param_hint="--logit-bias") from None
    return biases
