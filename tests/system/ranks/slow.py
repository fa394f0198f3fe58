"""A rank whose passes take longer than those of the others."""

import time
from typing import Any

import pytest

from stream_trainer.training.trainer import Trainer

SLOW = 1  # the rank


def slow_down(pass_s: float, first_s: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each forward pass of that rank is held up for so long from here on. Returns a list that grows with each."""
    begin, waits = Trainer.begin, list[float]()

    def wait(*_: object) -> None:
        waits.append(pass_s if waits else first_s)
        time.sleep(waits[-1])

    def slowed(self: Trainer) -> Any:
        model: Any = self.loaded.model
        if self.engine.world.rank == SLOW:
            model.base_model.register_forward_pre_hook(wait)
        return begin(self)

    monkeypatch.setattr(Trainer, "begin", slowed)
    return waits
