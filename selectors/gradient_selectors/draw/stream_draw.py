"""What it takes to draw from a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gradient_selectors.features.traits import Traits


@dataclass(frozen=True)
class Found:
    """What a step found out about the n samples that were drawn for it.

    Attributes:
        losses_n: loss of each before the update (nats per token).
        coefficients_n: of each in the update, not negative; all 0 where there was none.
        utilities_n: `Interaction.relative_utilities_N` if they were scored, else None.
        seconds: what the step took.
    """

    losses_n: Tensor
    coefficients_n: Tensor
    utilities_n: Tensor | None = None
    seconds: float = 0.0

    @property
    def trained(self) -> list[int]:
        """Those that entered the update."""
        return [i for i, coefficient in enumerate(self.coefficients_n.tolist()) if coefficient > 0]


class StreamDraw(Protocol):
    """A way to draw among the samples that wait. All that the future depends on is in its state.

    Each sample is learned from once, when it leaves: those that wait are read again after a restart.
    """

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """Up to `count` of those that wait, as indices in ascending order."""

    def learn(self, gone: Sequence[Traits]) -> None:
        """Take note of the samples that have left, drawn or not."""
