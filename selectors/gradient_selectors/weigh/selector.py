"""What a selector is, and what it decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gradient_selectors.views.interaction import Interaction


@dataclass(frozen=True)
class SolverReport:
    """How a quadratic program was solved, and in what time.

    Attributes:
        status: `optimal`; `fallback_failed` or `fallback_iterations`, where the solver found no answer and a slower
            way did; `fallback_equal`, where none did and the best samples got equal coefficients.
        reason: what went wrong, where the status is `fallback_equal`.
    """

    status: str
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class Decision:
    """What a selector decided about a pool.

    Examples:
        >>> from gradient_selectors import Decision
        >>> Decision(torch.tensor([0.75, 0.0, 0.25])).selected
        [0, 2]

    Attributes:
        coefficients_N: the update's gradient is `sum_i w_i g_i`. Not negative; the sum is 1, or 0 if nothing helps.
            Only coefficients in their natural scale have another sum.
        num_positive: candidates whose update points towards the target, if that was computed.
        redundancy: share of the objective's linear term that the pairs of selected samples take away again.
        solver: how the coefficients were solved for, if they were.
        coefficients_LN: coefficients for each of `PoolGradients.layers`, which then take the place of `coefficients_N`.
        route_entropy_L: how undecided each layer's draw was, from 0 (one sample) to 1 (all alike), if layers drew.
    """

    coefficients_N: Tensor
    num_positive: int | None = None
    redundancy: float | None = None
    solver: SolverReport | None = None
    coefficients_LN: Tensor | None = None
    route_entropy_L: Tensor | None = None

    @property
    def selected(self) -> list[int]:
        """Samples that enter the update of at least one layer."""
        largest_N = self.coefficients_N if self.coefficients_LN is None else self.coefficients_LN.amax(0)
        return [i for i, coefficient in enumerate(largest_N.tolist()) if coefficient > 0]

    @cached_property
    def effective_samples(self) -> float:
        """Effective sample size of the coefficients, (sum w)^2 / sum w^2; 0 without any."""
        coefficients = self.coefficients_N.tolist()  # a few numbers: adding them here is faster than as a tensor
        total = sum(coefficients)
        return float(total**2 / sum(w * w for w in coefficients)) if total > 0 else 0.0


class Selector(Protocol):
    """Anything that turns a pool's interaction into a decision.

    One that does not read the target's gradient says so with a class attribute `needs_target = False`; one that draws
    has `state_dict` and `load_state_dict`, or a resumed run takes another course.

    Examples:
        >>> from gradient_selectors import Selector, TopK
        >>> selector: Selector = TopK(batch_size=4)
    """

    def decide(self, interaction: Interaction) -> Decision:
        """Coefficients for the pool; all zero if nothing in it helps."""


def needs_target(selector: Selector) -> bool:
    """Whether a selector reads the target's gradient: yes, unless it says otherwise."""
    return bool(getattr(selector, "needs_target", True))


def equal_coefficients(num_samples: int, selected: Sequence[int]) -> Tensor:
    """1 / k for the selected samples, 0 for the others, (N,) float32."""
    coefficients_N = torch.zeros(num_samples)
    coefficients_N[list(selected)] = 1.0 / max(1, len(selected))
    return coefficients_N
