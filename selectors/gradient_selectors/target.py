"""The target set, whose gradient steers the selection; and means over any fixed set of samples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradient_selectors.capture.batch import Batch, micro_batches
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.capture.pieces import add_weighted_gradient

MICRO_BATCH = 16  # samples in one pass; bounds the memory, the result does not depend on it


def mean_gradient(
    capture: GradientCapture, batches: Iterable[Batch], micro_tokens: int | None = None
) -> dict[str, Tensor]:
    """Mean of the samples' gradients, by parameter name, float32.

    Each sample's gradient is that of its mean loss, so long samples do not outweigh short ones. `micro_tokens`: bound
    on the tokens of a pass, padding included.
    """
    parts = list(micro_batches(batches, MICRO_BATCH))
    num_samples = sum(len(batch) for batch in parts)
    total: dict[str, Tensor] = {}
    for batch in parts:
        coefficients_N = torch.full((len(batch),), 1.0 / num_samples)
        add_weighted_gradient(total, capture, batch, coefficients_N, micro_tokens)
    return total


def mean_loss(capture: GradientCapture, batches: Iterable[Batch]) -> float:
    """Mean over samples of their mean loss (nats per token)."""
    losses = [capture.losses(batch) for batch in micro_batches(batches, MICRO_BATCH)]
    return float(torch.cat(losses).double().mean())


@dataclass
class Target:
    """The target set and its gradient, which is refreshed every `refresh_steps` steps.

    A gradient that is some steps old points where the model has already gone: samples like the target's lose their
    utility within a few steps. So many small refreshes serve better than a few large ones: each takes the next
    `refresh_samples` of the set, and the gradient is their moving average, the plain mean of the first ones.

    Attributes:
        samples: what the model should get better at, one a batch; never trained on.
        refresh_samples: samples of a refresh, taken in turn; all of them if there are no more.
        decay: of the moving average of the gradient, where a refresh takes fewer samples than there are.
        gradient: None before the first refresh.
        age: steps that used `gradient` since its last refresh.
        refreshes: how many there were.
    """

    samples: Sequence[Batch]
    refresh_steps: int = 4
    refresh_samples: int = 8
    decay: float = 0.5
    gradient: dict[str, Tensor] | None = None
    age: int = 0
    refreshes: int = 0

    @classmethod
    def of(cls, batches: "Iterable[Batch | Mapping[str, Any]]", **options: Any) -> "Target":
        """The target set of some batches, as a data collator makes them. Raises ValueError if they hold no sample."""
        samples = [sample for batch in batches for sample in Batch.of(batch).samples()]
        if not samples:
            raise ValueError("the target holds no sample; give some dozens of what the model should get better at")
        return cls(samples, **options)

    def current(self, capture: GradientCapture, micro_tokens: int | None = None) -> tuple[Gradient, bool]:
        """The gradient for the next step, and whether it was refreshed: in passes of at most `micro_tokens`."""
        refresh = self.gradient is None or self.age >= self.refresh_steps
        if refresh or self.gradient is None:
            self.gradient, self.age = self._refreshed(capture, micro_tokens), 0
            self.refreshes += 1
        self.age += 1
        return self.gradient, refresh

    def _refreshed(self, capture: GradientCapture, micro_tokens: int | None) -> dict[str, Tensor]:
        count, total = self.refresh_samples, len(self.samples)
        if count >= total:
            return mean_gradient(capture, self.samples, micro_tokens)
        first = self.refreshes * count
        fresh = mean_gradient(capture, [self.samples[i % total] for i in range(first, first + count)], micro_tokens)
        if self.gradient is None:
            return fresh
        share = max(1 - self.decay, 1 / (self.refreshes + 1))
        return {name: values.lerp_(fresh[name], share) for name, values in self.gradient.items()}

    def state_dict(self) -> dict[str, Any]:
        """The gradient, which shares memory with the live one, and the counters."""
        gradient = {} if self.gradient is None else self.gradient
        return {"gradient": gradient, "age": self.age, "refreshes": self.refreshes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gradient = {name: values.clone() for name, values in state["gradient"].items()} or None
        self.age, self.refreshes = state["age"], state["refreshes"]
