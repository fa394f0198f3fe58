"""Whether a model is good enough to be published."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from stream_trainer.settings.sections.publish import PublishSettings

TARGET = "target"


class Gate(NamedTuple):
    """Why a model is held back: one word of a closed set (`metrics.GATES`), and a sentence with figures."""

    reason: str
    detail: str


def forgetting(losses: Mapping[str, float], start: Mapping[str, float]) -> dict[str, float]:
    """How much the loss of each set but the target's has risen since the start (nats); below zero, it fell."""
    return {name: loss - start[name] for name, loss in losses.items() if name != TARGET and name in start}


def why_held_back(
    losses: Mapping[str, float],
    start: Mapping[str, float],
    before: Mapping[str, float] | None,
    settings: PublishSettings,
) -> Gate | None:
    """The first reason against a model with these losses, or None.

    `start`: losses at the start of the model. `before`: losses of the version that is current now, if there is one.
    """
    if TARGET not in losses:
        return Gate("not_evaluated", "its losses were not measured")
    if not math.isfinite(losses[TARGET]):
        return Gate("target_loss", f"the target's loss is {losses[TARGET]}")
    limit = settings.max_target_loss_rise
    if limit is not None and before is not None and TARGET in before:
        rise = losses[TARGET] - before[TARGET]
        if not rise <= limit:
            detail = f"the target's loss is {losses[TARGET]:.4f}, {rise:.4f} above that of the current version"
            return Gate("target_loss", f"{detail}; publish.max_target_loss_rise={limit:g}")
    return _forgets_too_much(losses, start, settings.max_forgetting)


def _forgets_too_much(losses: Mapping[str, float], start: Mapping[str, float], limit: float | None) -> Gate | None:
    for name, rise in forgetting(losses, start).items():
        if limit is not None and not rise <= limit:
            detail = f"the loss of {name} is {losses[name]:.4f}, {rise:.4f} above its start"
            return Gate("forgetting", f"{detail}; publish.max_forgetting={limit:g}")
    return None
