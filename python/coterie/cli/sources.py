"""The models that commands read."""

from __future__ import annotations

from pathlib import Path

from coterie.training import model_of_run


def model_and_tokenizer(source: Path) -> tuple[Path, Path]:
    """Where a model lies and where its tokenizer does: of a run's output_dir, or of a model, which has its own."""
    from coterie.llm import resolve_model

    if (source / "run.json").is_file():
        return model_of_run(source)
    model = resolve_model(source)
    return model, model
