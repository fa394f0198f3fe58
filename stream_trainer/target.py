"""Fixed sets of samples: the target, whose gradient steers the selection, and sets whose loss is watched."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gradient_selectors.capture import GradientCapture
from gradient_selectors.gradients import Gradient
from torch import Tensor

from stream_trainer.batches import micro_batches
from stream_trainer.records import Sample

MICRO_BATCH = 16  # samples in one pass; bounds the memory, the result does not depend on it


def mean_gradient(capture: GradientCapture, samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Mean of the samples' gradients, by parameter name, float32.

    Each sample's gradient is that of its mean loss, so long samples do not outweigh short ones.
    """
    total: dict[str, Tensor] = {}
    for batch in micro_batches(samples, pad_id, MICRO_BATCH):
        gradients = capture.run(batch)
        weights_N = torch.full((gradients.num_samples,), 1.0 / len(samples))
        for name in gradients.factors:
            part = gradients.weighted_gradient_of(name, weights_N)
            total[name] = total[name].add_(part) if name in total else part
    return total


def mean_loss(capture: GradientCapture, samples: Sequence[Sample], pad_id: int) -> float:
    """Mean over samples of their mean loss (nats per token)."""
    losses = [capture.losses(batch) for batch in micro_batches(samples, pad_id, MICRO_BATCH)]
    return float(torch.cat(losses).double().mean())


@dataclass
class Target:
    """The target set and its gradient, which is recomputed every `refresh_steps` steps.

    Attributes:
        samples: what the model should get better at; never trained on.
        gradient: the last one computed; None before the first refresh.
        age: steps that used `gradient`.
    """

    samples: Sequence[Sample]
    refresh_steps: int
    pad_id: int
    gradient: Gradient | None = None
    age: int = 0

    def current(self, capture: GradientCapture) -> tuple[Gradient, bool]:
        """The gradient for the next step, and whether it was computed anew."""
        refresh = self.gradient is None or self.age >= self.refresh_steps
        if refresh or self.gradient is None:
            self.gradient, self.age = mean_gradient(capture, self.samples, self.pad_id), 0
        self.age += 1
        return self.gradient, refresh
