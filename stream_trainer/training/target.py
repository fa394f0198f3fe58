"""Fixed sets of samples: the target, whose gradient steers the selection, and sets whose loss is watched."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient
from torch import Tensor

from stream_trainer.records import Sample
from stream_trainer.samples.collate import micro_batches

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
    """The target set and its gradient, which is refreshed every `refresh_steps` steps.

    A gradient that is some steps old points where the model has already gone: on SmolLM2 at a learning rate of 2e-5,
    samples like the target's scored 1.0 of the mean when it was new, 0.4 after 8 steps, and about 0 after 12. So many
    small refreshes serve better than a few large ones: each takes the next `refresh_samples` of the set, and the
    gradient is their moving average, the plain mean of the first ones.

    Attributes:
        samples: what the model should get better at; never trained on.
        refresh_samples: samples of a refresh, taken in turn; all of them if there are no more.
        decay: what the gradient counts for at the next refresh, if that takes fewer than all samples.
        gradient: None before the first refresh.
        age: steps that used `gradient` since its last refresh.
        refreshes: how many there were.
    """

    samples: Sequence[Sample]
    refresh_steps: int
    pad_id: int
    refresh_samples: int
    decay: float
    gradient: dict[str, Tensor] | None = None
    age: int = 0
    refreshes: int = 0

    def current(self, capture: GradientCapture) -> tuple[Gradient, bool]:
        """The gradient for the next step, and whether it was refreshed."""
        refresh = self.gradient is None or self.age >= self.refresh_steps
        if refresh or self.gradient is None:
            self.gradient, self.age = self._refreshed(capture), 0
            self.refreshes += 1
        self.age += 1
        return self.gradient, refresh

    def _refreshed(self, capture: GradientCapture) -> dict[str, Tensor]:
        count, total = self.refresh_samples, len(self.samples)
        if count >= total:
            return mean_gradient(capture, self.samples, self.pad_id)
        first = self.refreshes * count
        fresh = mean_gradient(capture, [self.samples[i % total] for i in range(first, first + count)], self.pad_id)
        if self.gradient is None:
            return fresh
        share = max(1 - self.decay, 1 / (self.refreshes + 1))
        return {name: values.lerp_(fresh[name], share) for name, values in self.gradient.items()}
