"""Texts that must fit a JSON schema, a regular expression, a list or a grammar: which token may come next.

The package `llguidance` does the work; it is imported when the first such request comes.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from coterie._engine import InvalidArgument
from coterie.sampling import StructuredOutputsParams

if TYPE_CHECKING:
    import llguidance

# As json.dumps writes it. Any number of blanks would let a weak model write nothing else.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class TokenConstraint:
    """The mask of one request, called as `_engine.Engine.add_request` says.

    Parameters
    ----------
    matcher
        At the start of the text; each continuation gets a copy.
    """

    def __init__(self, matcher: "llguidance.LLMatcher") -> None:
        self._start = matcher
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        self._seen: dict[int, int] = {}  # generated tokens that the matchers have consumed
        self.error: str | None = None

    def __call__(self, index: int, generated: np.ndarray, allowed: np.ndarray) -> None:
        """Fill `allowed`, uint32 words of 32 tokens each; zeros end the text."""
        matcher = self._matchers.get(index)
        if matcher is None:
            matcher = self._matchers[index] = self._start.deep_copy()
        seen = self._seen.get(index, 0)
        if len(generated) < seen:
            matcher.rollback(seen - len(generated))
        elif len(generated) > seen:
            matcher.consume_tokens(generated[seen:].tolist())
        self._seen[index] = len(generated)
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        if matcher.is_error():
            self.error = matcher.get_error().splitlines()[0]
            allowed[:] = 0


class Constraints:
    """Makes the constraints of a model's requests.

    Parameters
    ----------
    tokenizer
        The model's.
    vocab_size
        Of its logits, which may be more than the tokenizer has.
    end_token_ids
        That may come where the text may end.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._llguidance = _import_llguidance()
        plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        self._tokenizer = self._llguidance.LLTokenizer(
            plain.to_str(), n_vocab=vocab_size, eos_token=list(end_token_ids) or None
        )

    def make(self, params: StructuredOutputsParams) -> TokenConstraint:
        """InvalidArgument says what is wrong with a schema or an expression."""
        kind, grammar = self._grammar(params)
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidArgument(f"structured_outputs: {kind}: {matcher.get_error().splitlines()[0]}")
        return TokenConstraint(matcher)

    def _grammar(self, params: StructuredOutputsParams) -> tuple[str, str]:
        matcher = self._llguidance.LLMatcher
        if params.json is not None:
            return "json", matcher.grammar_from_json_schema(_schema(params.json), defaults=_JSON_STYLE)
        if params.regex is not None:
            return "regex", matcher.grammar_from_regex(params.regex)
        if params.choice is not None:
            return "choice", "start: " + " | ".join(json.dumps(text) for text in params.choice)
        return "grammar", matcher.grammar_from_lark(params.grammar)


def _schema(schema: str | dict[str, Any]) -> str:
    if not isinstance(schema, str):
        return json.dumps(schema)
    try:
        json.loads(schema)
    except ValueError as error:
        raise InvalidArgument(f"structured_outputs: json: {error}") from None
    return schema


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InvalidArgument("structured_outputs: needs the package llguidance (pip install llguidance)") from None
    return llguidance
