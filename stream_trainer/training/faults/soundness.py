"""Whether a model is alive: a checkpoint of one that is not would be worth nothing, and push out a good one."""

import math
from typing import Any, Protocol

import torch
from gradient_selectors import Batch, GradientCapture
from gradient_selectors.world.base import World, gathered

from stream_trainer.checkpoints.checkpoint import first_not_finite

LEARNED = 1e-3  # nats per token: below it, a gradient may round to zero


class HasState(Protocol):
    """An optimizer, whose state goes by name."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""


def why_unsound(capture: GradientCapture, optimizer: HasState, batch: Batch, world: World) -> str | None:
    """Why the model is dead: a weight, a moment, every loss on `batch` or its gradient is not finite, or that is zero.

    None if all is well. Weights may be finite and yet so large that no loss is, or that nothing moves any of them. One
    pass over memory, and two over `batch`, the target's. Whatever was in `.grad` is gone.
    """
    for kind, tensors in (("weight", capture.parameters), ("optimizer's", optimizer.state_dict())):
        # What each rank has of an optimizer's state may be its own.
        name = next(filter(None, gathered(world, first_not_finite(tensors))), None)
        if name is not None:
            return f"the {kind} {name} is not finite"
    losses_N = capture.losses(batch)
    finite = losses_N.isfinite().nonzero().squeeze(1).tolist()
    if not finite:
        return "no loss on the target set is finite"
    length = _gradient_length(capture, batch.among(finite))
    if not math.isfinite(length):
        return "the gradient on the target set is not finite"
    if length == 0 and float(losses_N[finite].max()) > LEARNED:
        return "the gradient on the target set is zero, although its loss is not"
    return None


def _gradient_length(capture: GradientCapture, batch: Batch) -> float:
    """The largest absolute value in the mean gradient."""
    parameters = capture.parameters.values()
    for parameter in parameters:
        parameter.grad = None
    capture.train(batch, torch.full((len(batch),), 1 / len(batch)))
    length = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf))
    for parameter in parameters:
        parameter.grad = None
    return length
