"""`coterie distill`: train a student with a teacher looking on (Mixture-of-Students)."""

from __future__ import annotations

from coterie import config as configuration
from coterie.cli.console import JsonOption
from coterie.cli.train import ConfigArgument, ResumeOption, SetOption, run


def distill(
    config: ConfigArgument, set: SetOption = None, resume: ResumeOption = False, json: JsonOption = False
) -> None:
    """Distill the teacher that section distill names into the model of the file.

    The loss is cross-entropy + alpha * KL(teacher, student), the KL term off from distill.stop_at on.
    """
    read = configuration.load(config, set or [])
    if not read.distill:
        raise configuration.ConfigError(f"{config}: distill: section is missing")
    run(read, resume, json)
