"""Text to tokens and back. The oracles: transformers' tokenizer of the same GGUF file, and decoding
everything at once."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coterie import CorruptFile, InvalidArgument
from coterie.gguf_tokenizer import tokenizer_from_gguf
from coterie.tokenizer import ChatTokenizer, StopStrings, StreamDecoder

TEXTS = [
    "Once upon a time, in a village by the sea,",
    "  two   spaces,\ttabs\t\tand\n\n\nnewlines \n \n at   the end   ",
    "It's 3.14159, isn't it? We'll pay $1,234,567.89 for 100% of 42km² by 2024-12-31.",
    "naïve façade — “quotes” … ¿qué? ßtraße ŒUVRE İstanbul",
    "日本語のテキストと中文字符，以及한국어 문장.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🤦🏽‍♂️ e\u0301 \u200b\ufeff 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f600",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text<|endoftext|> <|im_end|>x<|not_a_token|>",
    "\x00\x01\x7f\r\n\r",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "x",
    "",
]

MESSAGES = [
    [{"role": "user", "content": "Who are you?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a <b>colour</b>."},
    ],
]


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> ChatTokenizer:
    return ChatTokenizer.load(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_tokenizer_equals_transformers(ours: ChatTokenizer, theirs: PreTrainedTokenizerBase, text: str) -> None:
    token_ids = ours.encode(text)
    assert token_ids == theirs(text)["input_ids"]
    assert ours.decode(token_ids, skip_special_tokens=False) == text
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", MESSAGES)
def test_chat_template_equals_transformers(
    ours: ChatTokenizer, theirs: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> None:
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == expected
    assert ours.encode_chat(messages) == theirs(expected, add_special_tokens=False)["input_ids"]


def test_a_directory_gives_the_same_tokenizer(
    ours: ChatTokenizer, theirs: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    from_directory = ChatTokenizer.load(tmp_path)
    assert from_directory.special_tokens["eos_token"] == ours.special_tokens["eos_token"] == "<|im_end|>"
    for text in TEXTS:
        assert from_directory.encode(text) == ours.encode(text)
    for messages in MESSAGES:
        assert from_directory.render_chat(messages) == ours.render_chat(messages)


def test_template_errors_name_the_source(ours: ChatTokenizer) -> None:
    for template in ("{{ raise_exception('no system role') }}", "{% if %}"):
        broken = ChatTokenizer(ours.backend, "model.gguf", template, {})
        with pytest.raises(InvalidArgument, match="^model.gguf: chat_template: "):
            broken.render_chat(MESSAGES[0])
    with pytest.raises(InvalidArgument, match="the model has none"):
        ChatTokenizer(ours.backend, "model.gguf", None, {}).render_chat(MESSAGES[0])


def test_templates_write_json_as_transformers_lets_them(ours: ChatTokenizer) -> None:
    template = "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}{{ tools | tojson }}"
    chat = ChatTokenizer(ours.backend, "model.gguf", template, {})
    tools = [{"b": "<é>", "a": 1}]
    assert chat.render_chat(MESSAGES[0], tools=tools) == '[{"a":1,"b":"<é>"}][{"b": "<é>", "a": 1}]'


def test_templates_get_what_they_ask_for(ours: ChatTokenizer) -> None:
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %} {{ tools }} {{ enable_thinking }}"
    chat = ChatTokenizer(ours.backend, "model.gguf", template, {})
    assert chat.render_chat(MESSAGES[0], tools=None, enable_thinking=False) == "Who are you? None False"
    failing = ChatTokenizer(ours.backend, "model.gguf", "{{ messages[0].content + 1 }}", {})
    with pytest.raises(InvalidArgument, match="^model.gguf: chat_template: "):
        failing.render_chat(MESSAGES[0])


def test_prompts_stay_whole_whatever_training_left_in_the_file(ours: ChatTokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    trained = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    trained.enable_truncation(4)
    trained.enable_padding(length=4)
    trained.save(str(tmp_path / "tokenizer.json"))
    chat = ChatTokenizer.load(tmp_path)
    for text in ("x", TEXTS[0]):
        assert chat.encode(text) == ours.encode(text)


@pytest.mark.parametrize("framed", [False, True])
def test_what_stands_around_a_prompt_is_tokenizer_jsons_affair(
    theirs: PreTrainedTokenizerBase, tmp_path: Path, framed: bool
) -> None:
    """As in transformers: beside tokenizer.json, add_bos_token and add_eos_token don't count."""
    theirs.save_pretrained(tmp_path)
    if framed:
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        frame = [("<|im_start|>", backend.token_to_id("<|im_start|>"))]
        backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=frame)
        backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_end|>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "add_bos_token": True, "add_eos_token": True})
    )
    expected, chat = AutoTokenizer.from_pretrained(tmp_path), ChatTokenizer.load(tmp_path)
    for text in TEXTS[:3]:
        assert chat.encode(text) == expected(text)["input_ids"]


# As tokenizer.json of the models has it.
WORDS = {
    "tekken": ["I", "'m", " HTTPServer", "'s", " user", ",", " ", *"1234567", "/\n", "  ", " x"],
    "gpt-4o": ["I'm", " HTTPServer's", " user", ",", " ", "123", "456", "7", "/\n", "  ", " x"],
    "glm4": ["I", "'m", " HTTPServer", "'s", " user", ",", " ", "123", "456", "7", "/\n", "  ", " x"],
    "deepseek-v3": ["I", "'m", " HTTPServer", "'s", " user", ",", " ", "123", "456", "7", "/\n", "  ", " x"],
    "deepseek-llm": ["I", "'", "m", " HTTPServer", "'", "s", " user", ",", " ", "1234567", "/", "\n", "  ", " x"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_newer_models(name: str) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": name}
    metadata["tokenizer.ggml.add_bos_token"] = False
    cut = tokenizer_from_gguf(metadata, "m.gguf").pre_tokenizer
    text = "I'm HTTPServer's user, 1234567/\n   x"
    assert [text[first:last] for _, (first, last) in cut.pre_tokenize_str(text)] == WORDS[name]
    assert [word for word, _ in cut.pre_tokenize_str("中文abc")][-1] == "abc" or name in ("gpt-4o", "glm4", "tekken")


def test_template_runs_in_a_sandbox(ours: ChatTokenizer) -> None:
    hostile = ChatTokenizer(ours.backend, "model.gguf", "{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidArgument, match="unsafe"):
        hostile.render_chat(MESSAGES[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer.ggml.model", "bert"), ("tokenizer.ggml.pre", "gpt-9"), ("tokenizer.ggml.model", None)],
)
def test_unknown_tokenizers_are_refused_by_name(key: str, value: str | None) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], key: value}
    with pytest.raises(InvalidArgument, match=f"^m.gguf: {key}: {value!r} is not supported"):
        tokenizer_from_gguf(metadata, "m.gguf")


def test_a_file_says_which_token_begins_a_text_or_that_none_does() -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    metadata["tokenizer.ggml.add_bos_token"] = True
    key = "tokenizer.ggml.bos_token_id"
    for token_id, expected in ((1, [1, 0]), (-1, [0]), (2**32 - 1, [0])):
        assert tokenizer_from_gguf({**metadata, key: token_id}, "m.gguf").encode("a").ids == expected
    for wrong, why in (({}, "missing"), ({key: 2}, "2 is not a token"), ({key: -2}, "-2 is not a token")):
        with pytest.raises(CorruptFile, match=f"^m.gguf: {key}: {why}$"):
            tokenizer_from_gguf({**metadata, **wrong}, "m.gguf")


def stream(tokenizer: ChatTokenizer, token_ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.step(token_id) for token_id in token_ids), decoder.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_make_up_the_text(ours: ChatTokenizer, text: str) -> None:
    token_ids = ours.encode(text)
    pieces = stream(ours, token_ids)
    assert "".join(pieces) == ours.decode(token_ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_broken_character_at_the_end_is_left_out(ours: ChatTokenizer) -> None:
    token_ids = ours.encode("ab \U0001f9ff")
    assert len(token_ids) > 3  # the emoji takes several tokens
    assert "".join(stream(ours, token_ids[:-1])) == "ab "


def sentencepiece_like() -> ChatTokenizer:
    """Words that begin with a space, and single bytes: what makes decoding depend on neighbours."""
    vocabulary = {token: i for i, token in enumerate(["▁a", "▁b", "c", *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    backend.decoder = decoders.Sequence(steps)
    return ChatTokenizer(backend, "test", None, {})


def test_sentencepiece_words_keep_their_spaces() -> None:
    tokenizer = sentencepiece_like()
    euro = [3 + byte for byte in "€".encode()]
    assert stream(tokenizer, [0, 1, 2, *euro, 0]) == ["a", " b", "c", "", "", "€", " a", ""]


def test_what_follows_a_prompt_keeps_its_space() -> None:
    tokenizer = sentencepiece_like()
    for prompt in ([0], [2] * 20):
        decoder = StreamDecoder(tokenizer, prompt=prompt)
        assert [decoder.step(token_id) for token_id in (1, 2)] == [" b", "c"]
        assert decoder.finish() == ""


def test_any_bytes_can_be_streamed() -> None:
    """Random bytes are no text, but what is given out before the first fault is never taken back."""
    tokenizer = sentencepiece_like()
    generator = random.Random(0)
    for _ in range(200):
        token_ids = [generator.choice([0, 1, 2, generator.randrange(3, 259)]) for _ in range(12)]
        text = "".join(stream(tokenizer, token_ids))
        assert not text.endswith("\ufffd")
        text.encode()  # no lone surrogate


def test_stop_strings_cut_cleanly() -> None:
    """Whatever the pieces, the text is all that lies before the first stop string."""
    generator = random.Random(1)
    for _ in range(3000):
        text = "".join(generator.choice("aab") for _ in range(generator.randrange(16)))
        stop = ["".join(generator.choice("ab") for _ in range(generator.randrange(1, 5))) for _ in range(2)]
        places = [place for place in map(text.find, stop) if place >= 0]
        stops, given = StopStrings(stop), ""
        for character in text:
            given += stops.step(character)
            if stops.found:
                break
        else:
            given += stops.finish()
        assert (stops.found is not None) == bool(places)
        # The stream stops at the string that ends first; the cut lies before the one that begins first
        # among those complete by then.
        if places:
            seen = min(text.find(s) + len(s) for s in stop if s in text)
            assert given == text[: min(place for s in stop if 0 <= (place := text[:seen].find(s)))]
        else:
            assert given == text


def test_stop_strings_hold_back_only_what_may_begin_one() -> None:
    stops = StopStrings(["\nUser:"])
    assert [stops.step(piece) for piece in ("Hello\n", "Us", "ed", " \nUser", ": x")] == [
        "Hello",
        "",
        "\nUsed",
        " ",
        "",
    ]
    assert stops.found is not None


def test_a_stop_string_may_begin_where_none_may_end() -> None:
    stops = StopStrings(["ab"])
    assert [stops.step(piece, may_stop) for piece, may_stop in (("xab", False), ("ca", False), ("b", True))] == [
        "xab",
        "c",
        "",
    ]
    assert stops.found == "ab"
