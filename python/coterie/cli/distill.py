"""`coterie distill`: train a student with a teacher looking on (Mixture-of-Students)."""

from __future__ import annotations

from coterie import config as configuration
from coterie.cli.console import JsonOption
from coterie.cli.train import (
    ConfigArgument,
    Launched,
    LauncherOption,
    RanksOption,
    RestartsOption,
    ResumeOption,
    SetOption,
)


def distill(
    config: ConfigArgument,
    set: SetOption = None,
    resume: ResumeOption = False,
    ranks: RanksOption = None,
    launcher: LauncherOption = "auto",
    max_restarts: RestartsOption = 3,
    json: JsonOption = False,
) -> None:
    """Distill the teacher that section distill names into the model of the file.

    The loss is cross-entropy + alpha * KL(teacher, student), the KL term off from distill.stop_at on.
    """
    read = configuration.load(config, set or [])
    if not read.distill:
        raise configuration.ConfigError(f"{config}: distill: section is missing")
    Launched("distill", ranks, launcher, max_restarts).run(config, read, set or [], resume, json)
