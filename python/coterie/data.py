"""From a corpus to packed tokens: split by document, train a tokenizer, encode, write.

The directory that `prepare` makes, and `coterie._train` reads, holds

- `tokenizer.json`, `tokenizer_config.json`: a byte-level BPE with one special token, <|endoftext|>;
- `train.bin`, `valid.bin`: token ids, little-endian uint16 (uint32 when the vocabulary exceeds
  65536), each document followed by <|endoftext|>;
- `meta.json`: counts, the type of the ids, and the sources with their licences. It is written last:
  a directory without it is not finished.

The same corpus and settings give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.corpus import Corpus, DataError, Document

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Called with what is being done, and bytes done and to do of it.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How a corpus is turned into tokens.

    vocab_size: of the tokenizer to train, at least 257 (256 bytes and <|endoftext|>).
    valid_fraction: share of the bytes that validation aims at; whole documents are moved.
    tokenizer: a directory with a tokenizer.json to use in place of training one.
    """

    vocab_size: int = 4096
    valid_fraction: float = 0.05
    tokenizer: Path | None = None

    def check(self) -> None:
        if not 257 <= self.vocab_size <= 1 << 20:
            raise DataError(f"vocab_size: must be in [257, {1 << 20}] ({self.vocab_size})")
        if not 0 < self.valid_fraction < 1:
            raise DataError(f"valid_fraction: must be in (0, 1) ({self.valid_fraction})")


def split_documents(documents: list[Document], valid_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each in the order given.

    Documents are visited in the order of their names' SHA-256, and one goes to validation when that
    brings validation's bytes closer to the fraction aimed at. Validation gets one document at least,
    the smallest if need be, and never all.
    """
    if len(documents) < 2:
        names = ", ".join(document.name for document in documents) or "none"
        raise DataError(f"documents: at least 2 are needed, one of them to validate with ({names}); see --separator")
    names = [document.name for document in documents]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"documents: two have the same name ({twice})")
    wanted = valid_fraction * sum(document.num_bytes for document in documents)
    chosen: set[str] = set()
    held = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        size = document.num_bytes
        if len(chosen) + 1 < len(documents) and abs(held + size - wanted) < abs(held - wanted):
            chosen.add(document.name)
            held += size
    if not chosen:
        chosen.add(min(documents, key=lambda document: (document.num_bytes, document.name)).name)
    train = [document for document in documents if document.name not in chosen]
    valid = [document for document in documents if document.name in chosen]
    return train, valid


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's splitting into words) over the documents; <|endoftext|> is id 0.

    A small corpus may run out of pairs to merge before vocab_size is reached.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer, length=len(documents))
    return tokenizer


def prepare(
    corpora: list[Corpus], out_dir: Path, settings: Settings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Splits, tokenizes and packs; returns what meta.json says.

    Raises
    ------
    DataError
        When there are too few documents, or the tokenizer given can't be used.
    """
    settings = settings or Settings()
    settings.check()
    progress = progress or (lambda stage, done, total: None)
    documents = [document for corpus in corpora for document in corpus.documents]
    train, valid = split_documents(documents, settings.valid_fraction)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "meta.json").unlink(missing_ok=True)

    train_bytes = sum(document.num_bytes for document in train)
    progress("tokenizer", 0, train_bytes)
    if settings.tokenizer:
        tokenizer = _existing_tokenizer(settings.tokenizer)
        for name in TOKENIZER_FILES:
            shutil.copyfile(settings.tokenizer / name, out_dir / name)
    else:
        tokenizer = train_tokenizer(train, settings.vocab_size)
        tokenizer.save(str(out_dir / "tokenizer.json"))
        _write_json(out_dir / "tokenizer_config.json", _tokenizer_config())
    progress("tokenizer", train_bytes, train_bytes)

    vocab_size = tokenizer.get_vocab_size()
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    eos_token_id = tokenizer.token_to_id(END_OF_TEXT)
    meta: dict[str, Any] = {"format": 1, "vocab_size": vocab_size, "dtype": dtype, "eos_token_id": eos_token_id}
    for name, part in (("train", train), ("valid", valid)):
        meta[name] = _pack(part, tokenizer, eos_token_id, dtype, out_dir / f"{name}.bin", name, progress)
    meta["sources"] = [corpus.record() for corpus in corpora]
    _write_json(out_dir / "meta.json", meta)
    return meta


def read_meta(data_dir: Path) -> dict[str, Any]:
    """The meta.json of a packed directory."""
    path = data_dir / "meta.json"
    if not path.is_file():
        raise DataError(f"{data_dir}: no meta.json there: make the data with `coterie data`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    for key in ("vocab_size", "eos_token_id"):
        value = meta.get(key) if isinstance(meta, dict) else None
        if not isinstance(value, int) or value < 0:
            raise DataError(f"{path}: {key}: is missing or no whole number")
    return meta


def read_tokens(data_dir: Path, split: str) -> Any:
    """The token ids of "train" or "valid", memory-mapped; their number must be what meta.json says."""
    import numpy

    meta = read_meta(data_dir)
    path = data_dir / f"{split}.bin"
    try:
        dtype, count = numpy.dtype(meta["dtype"]), meta[split]["tokens"]
    except (KeyError, TypeError):
        raise DataError(f"{data_dir / 'meta.json'}: dtype or {split}.tokens: is missing, or no such value") from None
    ids = numpy.memmap(path, dtype=dtype.newbyteorder("<"), mode="r")
    if len(ids) != count:
        raise DataError(f"{path}: holds {len(ids)} tokens, meta.json says {count}")
    return ids


def copy_tokenizer(source_dir: Path, out_dir: Path) -> None:
    """Puts the tokenizer's files of a data or model directory beside an exported model, where there are any; those of a
    .gguf file are made of what it holds."""
    if source_dir.is_file():
        from coterie.tokenizer import ChatTokenizer

        ChatTokenizer.load(source_dir).save(out_dir)
        return
    for name in (*TOKENIZER_FILES, "special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        if (source_dir / name).is_file() and source_dir.resolve() != out_dir.resolve():
            shutil.copyfile(source_dir / name, out_dir / name)


def _existing_tokenizer(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    for name in TOKENIZER_FILES:
        if not (directory / name).is_file():
            raise DataError(f"{directory}: no {name} there")
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{directory / 'tokenizer.json'}: {error}") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"{directory / 'tokenizer.json'}: has no token {END_OF_TEXT}")
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }


def _pack(
    documents: list[Document],
    tokenizer: Tokenizer,
    eos_token_id: int,
    dtype: str,
    path: Path,
    stage: str,
    progress: Progress,
) -> dict[str, int]:
    """Encodes documents and writes their ids, each followed by the end token."""
    import numpy

    total = sum(document.num_bytes for document in documents)
    done = tokens = 0
    # Text that spells <|endoftext|> stays text: an end token in the file is always a document's end.
    tokenizer.encode_special_tokens = True
    with open(path, "wb") as file:
        for batch in _batches(documents):
            progress(stage, done, total)
            for encoding in tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False):
                ids = numpy.array([*encoding.ids, eos_token_id], dtype=numpy.dtype(dtype).newbyteorder("<"))
                file.write(ids.tobytes())
                tokens += len(ids)
            done += sum(document.num_bytes for document in batch)
    progress(stage, total, total)
    return {"tokens": tokens, "bytes": total, "documents": len(documents)}


def _batches(documents: list[Document], max_bytes: int = 1 << 20) -> Iterator[list[Document]]:
    """Runs of documents of about max_bytes, which the tokenizer encodes in parallel."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= max_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_json(path: Path, value: Any) -> None:
    """Written aside and renamed, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
