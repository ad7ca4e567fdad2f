"""From text to packed tokens: the split, the round trip, equal bytes, and refusals."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy
import pytest
from tokenizers import Tokenizer

from coterie.corpus import Corpus, DataError, Document, read_corpus, read_files
from coterie.data import END_OF_TEXT, Settings, prepare, read_meta, read_tokens, split_documents

TEXTS = {
    "a.txt": "The quick brown fox jumps over the lazy dog.\r\n" * 20,
    "b/c.md": "Größe, naïveté, 日本語, 🦊\n\n" * 15,
    "b/d.txt": f"A text that spells {END_OF_TEXT} is still one text.\n" * 10,
    "e.jsonl": "".join(json.dumps({"text": f"line number {n} of a file\n" * 4, "id": n}) + "\n" for n in range(5)),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "text"


def documents_of(out: Path, split: str) -> list[str]:
    """The packed ids of a split, cut at the end token and decoded."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = read_tokens(out, split)
    ends = numpy.flatnonzero(ids == read_meta(out)["eos_token_id"])
    assert ends[-1] == len(ids) - 1
    return [
        tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False)
        for part in numpy.split(ids, ends + 1)
        if len(part)
    ]


def test_packed_tokens_decode_to_the_documents(source: Path, tmp_path: Path):
    corpus = read_files(source, license="CC0")
    names = [document.name for document in corpus.documents]
    assert names == ["a.txt", "b/c.md", "b/d.txt", "e.jsonl#1", "e.jsonl#2", "e.jsonl#3", "e.jsonl#4", "e.jsonl#5"]
    meta = prepare([corpus], tmp_path / "out", Settings(vocab_size=300, valid_fraction=0.2))
    train, valid = split_documents(corpus.documents, 0.2)
    assert documents_of(tmp_path / "out", "train") == [document.text for document in train]
    assert documents_of(tmp_path / "out", "valid") == [document.text for document in valid]
    for split, documents in (("train", train), ("valid", valid)):
        assert meta[split]["documents"] == len(documents)
        assert meta[split]["bytes"] == sum(len(document.text.encode()) for document in documents)
    assert meta["sources"] == [
        {
            "name": str(source),
            "license": "CC0",
            "documents": 8,
            "bytes": meta["train"]["bytes"] + meta["valid"]["bytes"],
        }
    ]
    assert meta == read_meta(tmp_path / "out")
    assert meta["vocab_size"] == 300
    assert meta["dtype"] == "uint16"


def test_the_same_text_gives_the_same_bytes(source: Path, tmp_path: Path):
    for out in ("first", "second"):
        prepare([read_files(source)], tmp_path / out, Settings(vocab_size=320))
    names = ["tokenizer.json", "tokenizer_config.json", "train.bin", "valid.bin", "meta.json"]
    same, _, _ = filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", names, shallow=False)
    assert same == names


def test_transformers_reads_the_tokenizer(source: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    prepare([read_files(source)], tmp_path / "out", Settings(vocab_size=300))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = TEXTS["b/c.md"]
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.eos_token_id == ours.token_to_id(END_OF_TEXT)


def test_an_existing_tokenizer_is_used_as_it_is(source: Path, tmp_path: Path):
    prepare([read_files(source)], tmp_path / "first", Settings(vocab_size=300))
    prepare([read_files(source / "b")], tmp_path / "second", Settings(tokenizer=tmp_path / "first"))
    assert filecmp.cmp(tmp_path / "first" / "tokenizer.json", tmp_path / "second" / "tokenizer.json", shallow=False)
    assert len(documents_of(tmp_path / "second", "train")) == 1


def test_a_large_vocabulary_needs_uint32(source: Path, tmp_path: Path):
    prepare([read_files(source)], tmp_path / "first", Settings(vocab_size=300))
    path = tmp_path / "first" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"extra{n:05}" for n in range(1 << 16)])
    tokenizer.save(str(path))
    meta = prepare([read_files(source)], tmp_path / "second", Settings(tokenizer=tmp_path / "first"))
    assert meta["dtype"] == "uint32"
    assert (tmp_path / "second" / "train.bin").stat().st_size == 4 * meta["train"]["tokens"]
    assert TEXTS["a.txt"] in documents_of(tmp_path / "second", "train") + documents_of(tmp_path / "second", "valid")


def test_a_separator_parts_documents(tmp_path: Path):
    (tmp_path / "stories.txt").write_text("one\n<|end|>\ntwo\n<|end|>\n\nthree\n<|end|>\n")
    documents = read_corpus(str(tmp_path / "stories.txt"), separator="<|end|>").documents
    assert [(document.name, document.text) for document in documents] == [
        ("stories.txt#0", "one"),
        ("stories.txt#1", "two"),
        ("stories.txt#2", "three"),
    ]


@pytest.mark.parametrize("count", [2, 3, 10, 200])
def test_the_split_comes_close_to_the_fraction(count: int):
    documents = [Document(f"{n}.txt", "x" * (50 + 37 * n % 100)) for n in range(count)]
    train, valid = split_documents(documents, 0.05)
    assert train and valid
    assert {document.name for document in train + valid} == {document.name for document in documents}
    total, largest = sum(d.num_bytes for d in documents), max(d.num_bytes for d in documents)
    assert abs(sum(d.num_bytes for d in valid) - 0.05 * total) <= largest
    # A document keeps its side whatever order the files are found in.
    again = split_documents(documents[::-1], 0.05)
    assert {document.name for document in again[1]} == {document.name for document in valid}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", "{path}: byte 2 is not UTF-8 (0xff)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "{path}:2: not JSON: Expecting value"),
        ("a.jsonl", b'{"body": "x"}\n', '{path}:1: expected an object with a string "text"'),
        ("a.csv", b"x", "{path}: expected a .txt, .md, .jsonl file"),
    ],
)
def test_text_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_corpus(str(path))
    assert str(refused.value) == message.format(path=path)


def test_one_document_alone_is_refused(tmp_path: Path):
    corpus = Corpus("one", "CC0", [Document("a.txt", "text")])
    with pytest.raises(DataError, match=r"^documents: at least 2 are needed, one of them to validate with \(a.txt\)"):
        prepare([corpus], tmp_path / "out")


def test_equal_names_of_two_sources_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"^documents: two have the same name \(a.txt\)$"):
        prepare([read_files(source), read_files(source)], tmp_path / "out")


def test_a_truncated_split_is_refused(source: Path, tmp_path: Path):
    prepare([read_files(source)], tmp_path / "out", Settings(vocab_size=300))
    path = tmp_path / "out" / "valid.bin"
    count = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError) as refused:
        read_tokens(tmp_path / "out", "valid")
    assert str(refused.value) == f"{path}: holds {count - 1} tokens, meta.json says {count}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "vocab_size: is missing or no whole number"),
        ('{"vocab_size": 300, "eos_token_id": "0"}', "eos_token_id: is missing or no whole number"),
    ],
)
def test_a_damaged_meta_json_is_refused(tmp_path: Path, text: str, why: str):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError) as refused:
        read_meta(tmp_path)
    assert str(refused.value) == f"{tmp_path / 'meta.json'}: {why}"


@pytest.mark.parametrize("meta", [{}, {"dtype": "uint17", "valid": {"tokens": 3}}, {"dtype": "uint16", "valid": 3}])
def test_a_meta_json_without_the_split_is_refused(tmp_path: Path, meta: dict):
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 9, "eos_token_id": 0, **meta}))
    with pytest.raises(DataError, match=r"meta.json: dtype or valid.tokens: is missing, or no such value$"):
        read_tokens(tmp_path, "valid")
