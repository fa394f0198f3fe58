"""Parameters that are to stay as they are, by patterns over their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from stream_trainer.errors import SettingsError


def freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the trained parameters whose names match one of `patterns`.

    Raises SettingsError if a pattern matches none, or nothing is left to train.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in patterns:
        matching = [name for name in trained if fnmatchcase(name, pattern)]
        if not matching:
            raise SettingsError(
                f"model.freeze: {pattern} matches no parameter that is trained; they have names such as {min(trained)}"
            )
        for name in matching:
            trained[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in trained.values()):
        raise SettingsError(f"model.freeze={list(patterns)} leaves nothing to train; take a pattern out")
