#!/usr/bin/env python3
"""The dependency rule of ARCHITECTURE.md, held against every `#include` line.

A file under src/ includes its own folder, folders strictly lower, and include/coterie; examples include
nothing but the latter. Nothing but src/train, src/bindings/train_module.cc and the benchmarks of training
names torch.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# What each folder may include beside itself.
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "kernels": {"base"},
    "comm": {"base"},
    "io": {"base"},
    "moe": {"base", "kernels", "comm", "io"},
    "model": {"base", "kernels", "comm", "io", "moe"},
    "engine": {"base", "kernels", "comm", "io", "moe", "model"},
    "train": {"base", "kernels", "comm", "io", "moe", "model"},
    "bindings": {"base", "kernels", "comm", "io", "moe", "model", "engine", "train"},
}
SUFFIXES = {".h", ".cc", ".inl"}
TORCH_FILE = "src/bindings/train_module.cc"
TORCH_BENCHES = "benches/train_"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
TORCH_INCLUDE = re.compile(r"^(torch|ATen|c10|caffe2)/")
TORCH_NAME = re.compile(r"\b(torch|at|c10|c10d)::")


def breaches_of(path: str, text: str) -> list[str]:
    """Breaches of one file.

    Parameters
    ----------
    path : str
        The file's path from the checkout, with forward slashes.
    text : str
        Its contents.

    Returns
    -------
    list of str
        One line per breach, beginning with `path:line:`.
    """
    parts = path.split("/")
    folder = parts[1] if parts[0] == "src" else None
    if folder is not None and folder not in ALLOWED:
        return [f"{path}:1: src/{folder} has no place in the dependency rule (scripts/check_layering.py)"]
    may_name_torch = folder == "train" or path == TORCH_FILE or path.startswith(TORCH_BENCHES)
    found = []

    def report(position: int, message: str) -> None:
        found.append(f"{path}:{text.count(chr(10), 0, position) + 1}: {message}")

    for match in INCLUDE.finditer(text):
        target = match.group(2)
        target_folder = target.split("/")[0]
        if TORCH_INCLUDE.match(target):
            if not may_name_torch:
                report(match.start(2), f"includes {target}: only src/train and {TORCH_FILE} may name torch")
        elif match.group(1) == "<" or folder is None:
            if folder is None and target_folder in ALLOWED and parts[0] in ("include", "examples"):
                report(match.start(2), f"includes {target}: {parts[0]}/ includes std and coterie/ only")
        elif target_folder in ALLOWED and target_folder != folder and target_folder not in ALLOWED[folder]:
            report(match.start(2), f"includes {target}: {folder} may include {_names(folder)}")
    if folder == "bindings" and path != TORCH_FILE and '#include "train/' in text:
        report(text.index('#include "train/'), "includes train/: only train_module.cc binds the torch half")
    if not may_name_torch:
        for match in TORCH_NAME.finditer(_without_comments(text)):
            report(match.start(), f"names {match.group(0)}: only src/train and {TORCH_FILE} may name torch")
    return found


def breaches(root: Path) -> list[str]:
    """Breaches of every C++ file below `root`'s include, src, benches and fuzz."""
    found = []
    for top in ("include", "src", "benches", "examples", "fuzz"):
        for file in sorted((root / top).rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                found += breaches_of(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8"))
    return found


def _names(folder: str) -> str:
    return ", ".join(sorted({folder} | ALLOWED[folder]))


def _without_comments(text: str) -> str:
    """The text with `//` comments blanked; positions stay."""
    return re.sub(r"//[^\n]*", lambda match: " " * len(match.group(0)), text)


def main() -> int:
    found = breaches(Path(__file__).resolve().parent.parent)
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
