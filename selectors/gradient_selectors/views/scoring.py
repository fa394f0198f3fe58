"""How the views of a pool are computed: the protocol, and the exact way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gradient_selectors.capture.factors import LowRank
from gradient_selectors.capture.gradients import Gradient, PoolGradients, squared_length
from gradient_selectors.preconditioner import Preconditioner


class Scoring(Protocol):
    """A way to compute utilities and redundancy. `Exact`, `RankOne` and `Sketched` are the three that there are."""

    def start(self, target: Gradient, preconditioner: Preconditioner, head: str | None) -> LowRank | None:
        """Get ready for a pool. Returns the direction of the head's weight that the pass is to take products along.

        `head`: name of the head's weight where it is captured on its own path.
        """

    def reset(self) -> None:
        """Forget what was kept of the target's gradient or the preconditioner: one of them is new."""

    def utilities(
        self, gradients: PoolGradients, target: Gradient, preconditioner: Preconditioner
    ) -> dict[str, Tensor]:
        """`<g_i, P G_target>` within each parameter, (N,) float32 each."""

    def gram(self, gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        """`K_ij = <g_i, P g_j>` of some samples, (n, n) float64."""

    def drawn_rows(self, name: str) -> Tensor | None:
        """The rows of a matrix that stand for it in `gram`, sorted, int64; None where `gram` needs all of them."""

    def squared_length(self, target: Gradient, preconditioner: Preconditioner) -> float:
        """`<G, P G>` of the target's gradient: its own utility."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept between pools, for a checkpoint; empty if nothing is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a copy of what `state_dict` returned."""


@dataclass(frozen=True)
class Exact:
    """Exact for every element-wise P.

    c costs as much as a forward pass, K as much as the weight gradients of its samples.

    Examples:
        >>> from gradient_selectors import Exact
        >>> Exact().state_dict()
        {}
    """

    def start(self, target: Gradient, preconditioner: Preconditioner, head: str | None) -> None:
        """There is nothing to get ready."""

    def reset(self) -> None:
        """Nothing is kept."""

    def utilities(
        self, gradients: PoolGradients, target: Gradient, preconditioner: Preconditioner
    ) -> dict[str, Tensor]:
        own = {name: gradients.utilities_of(name, target, preconditioner) for name in gradients.factors}
        return gradients.of_all(own)

    def gram(self, gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        return gradients.gram(samples, preconditioner)

    def drawn_rows(self, name: str) -> None:
        """All of them are needed."""

    def squared_length(self, target: Gradient, preconditioner: Preconditioner) -> float:
        return squared_length(target, preconditioner)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of it: another scoring was on when the checkpoint was made."""
