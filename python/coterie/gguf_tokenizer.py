"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library.

GGUF stores a vocabulary, merges or scores, and the *name* of the way text is cut into words before
merging (`tokenizer.ggml.pre`); what a name means is fixed by llama.cpp. Two models are known here:
"gpt2" (byte-level BPE) and "llama" (SentencePiece BPE with byte fallback). A name that is not known
is refused: a guess would silently cut words elsewhere than in training.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from coterie._engine import CorruptFile, InvalidArgument

# The id of no token, as llama.cpp writes it.
_NO_TOKEN = (-1, 2**32 - 1)
# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# OpenAI's o200k: words of one case, or capitalised, with their marks and endings.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_ENDING, "").replace("{1,3}", "")
_DEEPSEEK_LLM = [
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
]
_DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]

# Each expression cuts the pieces that the ones before it left.
_WORD_PATTERNS: dict[str, list[str]] = {
    "default": [r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}"],
    "falcon": [r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9]{3}"],
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), [_GPT2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), [r"\p{N}", _GPT2]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), [_LLAMA3]),
    **dict.fromkeys(("gpt-4o", "llama4"), [_GPT4O]),
    "tekken": [_TEKKEN],
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-v3": _DEEPSEEK_V3,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), [_LLAMA3.replace("{1,3}", "")]),
}
# Here a word that is a token stays whole, and a sequence begins with the BOS token.
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def tokenizer_from_gguf(metadata: dict[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that `metadata` describes.

    Parameters
    ----------
    metadata
        The file's key-value pairs.
    source
        The file's name; it begins the messages of errors.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise InvalidArgument(f"{source}: tokenizer.ggml.model: {model!r} is not supported (gpt2, llama)")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CorruptFile(f"{source}: tokenizer.ggml.tokens: missing")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    build = _byte_level_bpe if model == "gpt2" else _sentencepiece_bpe
    tokenizer = build(metadata, vocabulary, source)
    _add_special_tokens(tokenizer, metadata, tokens)
    _set_template(tokenizer, metadata, tokens, source)
    return tokenizer


def _byte_level_bpe(metadata: dict[str, Any], vocabulary: dict[str, int], source: str) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _WORD_PATTERNS:
        known = ", ".join(_WORD_PATTERNS)
        raise InvalidArgument(f"{source}: tokenizer.ggml.pre: {name!r} is not supported ({known})")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if bad := next((merge for merge in merges if len(merge) != 2), None):
        raise CorruptFile(f"{source}: tokenizer.ggml.merges: {' '.join(bad)!r} is not a pair")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _LLAMA3_NAMES))
    splits: list[PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _WORD_PATTERNS[name]
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: dict[str, Any], vocabulary: dict[str, int], source: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocabulary):
        raise CorruptFile(f"{source}: tokenizer.ggml.scores: {len(scores)} scores for {len(vocabulary)} tokens")
    unknown = _token_id(metadata, "unknown", len(vocabulary), source)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, scores),
            unk_token=None if unknown is None else metadata["tokenizer.ggml.tokens"][unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if add_space else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if add_space else steps)
    return tokenizer


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose joint token has the highest score: merges in that order."""
    merges = []
    for token, token_id in vocabulary.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(-scores[token_id], *pair) for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    merges.sort(key=lambda merge: (merge[0], vocabulary[merge[1]], vocabulary[merge[2]]))
    return [(left, right) for _, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Control tokens are matched in text and left out of decoded text; user-defined ones only matched."""
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if token]
    special = [AddedToken(token, normalized=False) for token, kind in added if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == _USER_DEFINED])


def _set_template(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], source: str) -> None:
    """Put BOS before and EOS after a sequence where the file says so."""
    begins = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    ids = {}
    for name, default in (("bos", begins), ("eos", False)):
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            token_id = _token_id(metadata, name, len(tokens), source)
            if token_id is not None:
                ids[name] = token_id
            elif f"tokenizer.ggml.{name}_token_id" not in metadata:
                raise CorruptFile(f"{source}: tokenizer.ggml.{name}_token_id: missing")
    if not ids:
        return
    single = [*([tokens[ids["bos"]]] if "bos" in ids else []), "$A", *([tokens[ids["eos"]]] if "eos" in ids else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(tokens[token_id], token_id) for token_id in ids.values()]
    )


def _token_id(metadata: dict[str, Any], name: str, count: int, source: str) -> int | None:
    """Of one of the vocabulary's `count` tokens, where the file names one."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None or token_id in _NO_TOKEN:
        return None
    if not 0 <= token_id < count:
        raise CorruptFile(f"{source}: tokenizer.ggml.{name}_token_id: {token_id} is not a token")
    return token_id
