"""The gradient interaction matrix of a pool, as lazy views.

`M[i, p] = u[p] g_i[p]` has a row for each sample and a column for each weight, where `u = P * G_target` is the
preconditioned target gradient. It is never formed. Selectors read its views and return a `Decision`; none of them
touches the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gradient_selectors.capture.gradients import (
    Gradient,
    GramMode,
    PoolGradients,
    RowsMode,
    SquareMode,
    exact_rows,
    layer_of,
    preconditioned,
    squared_length,
)
from gradient_selectors.preconditioner import Geometry

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Interaction:
    """A pool's gradients, seen from a target under an optimizer's geometry.

    Attributes:
        gradients: the pool's per-sample gradients.
        target: mean gradient of the target samples, by parameter name.
        geometry: the preconditioner P by parameter name.
        gram_mode: how `gram` is computed; exact unless told otherwise.
        rows_mode: how the rows are computed; exact unless told otherwise.
        square_mode: how the target's own utility is computed; exact unless told otherwise.
    """

    gradients: PoolGradients
    target: Gradient
    geometry: Geometry
    gram_mode: GramMode = PoolGradients.gram
    rows_mode: RowsMode = exact_rows
    square_mode: SquareMode = squared_length

    @property
    def num_samples(self) -> int:
        return self.gradients.num_samples

    @cached_property
    def rows_by_parameter(self) -> dict[str, Tensor]:
        """Row sums of M within each parameter: `<u, g_i>`, (N,) float32 each."""
        return self.rows_mode(self.gradients, self.target, self.geometry)

    @cached_property
    def rows_N(self) -> Tensor:
        """Row sums of M, `c_i = <g_i, P G_target>`: the first-order utility of each sample, (N,) float32."""
        return torch.stack(list(self.rows_by_parameter.values())).sum(0)

    @cached_property
    def relative_rows_N(self) -> Tensor:
        """`c_i / <G, P G>`: what share of the target's own utility each sample has, (N,) float64.

        Unlike `c_i` it does not fall as P and the target's gradient do. 0 for a target without any gradient.
        """
        return self.rows_N.double() / max(self.square_mode(self.target, self.geometry), TINY)

    @cached_property
    def rows_by_layer_LN(self) -> Tensor:
        """Row sums of M within each of `gradients.layers`, (L, N) float32; their sum over layers is `rows_N`."""
        index = {layer: row for row, layer in enumerate(self.gradients.layers)}
        rows_LN = torch.zeros(len(index), self.num_samples, device=self.gradients.losses_N.device)
        for name, rows_N in self.rows_by_parameter.items():
            rows_LN[index[layer_of(name)]] += rows_N
        return rows_LN

    def columns(self, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Column sums of M with the samples weighted, `u * sum_i w_i g_i`, by parameter name.

        One parameter at a time, float32 in its shape: all of them are as large as the model. `weights` are (N,) or
        (L, N). The sum over everything is `rows_N @ weights`.
        """
        for name in self.gradients.factors:
            yield name, self.gradients.weighted_gradient_of(name, weights).mul_(self.direction(name))

    def direction(self, name: str) -> Tensor:
        """`u = P * G_target` of one parameter."""
        return preconditioned(self.target, self.geometry, name)

    def gram(self, samples: Sequence[int]) -> Tensor:
        """`K_ij = <g_i, P g_j>` of the given samples, (n, n) float64: how much of their utility is the same."""
        return self.gram_mode(self.gradients, samples, self.geometry)


@dataclass(frozen=True)
class SolverReport:
    """How a quadratic program was solved: `optimal`, `fallback_failed` or `fallback_timeout`, and in what time."""

    status: str
    seconds: float


@dataclass(frozen=True)
class Decision:
    """What a selector decided about a pool.

    Attributes:
        weights_N: the update's gradient is `sum_i w_i g_i`. Not negative; the sum is 1, or 0 if nothing helps. Only
            coefficients in their natural scale have another sum.
        num_positive: candidates whose update points towards the target, if that was computed.
        redundancy: share of the objective's linear term that the pairs of chosen samples take away again.
        solver: how the coefficients were solved for, if they were.
        layer_weights_LN: coefficients for each of `PoolGradients.layers`, which then take the place of `weights_N`.
        route_entropy_L: how undecided each layer's draw was, from 0 (one sample) to 1 (all alike), if layers drew.
    """

    weights_N: Tensor
    num_positive: int | None = None
    redundancy: float | None = None
    solver: SolverReport | None = None
    layer_weights_LN: Tensor | None = None
    route_entropy_L: Tensor | None = None

    @property
    def chosen(self) -> list[int]:
        """Samples that enter the update of at least one layer."""
        largest_N = self.weights_N if self.layer_weights_LN is None else self.layer_weights_LN.amax(0)
        return [i for i, weight in enumerate(largest_N.tolist()) if weight > 0]

    @property
    def effective_samples(self) -> float:
        """Effective sample size of the coefficients, (sum w)^2 / sum w^2; 0 without any."""
        total = float(self.weights_N.sum())
        return total**2 / float((self.weights_N**2).sum()) if total > 0 else 0.0


class Selector(Protocol):
    """Anything that turns a pool's interaction into a decision."""

    def decide(self, interaction: Interaction) -> Decision:
        """Coefficients for the pool; all zero if nothing in it helps."""


def equal_weights(num_samples: int, chosen: Sequence[int]) -> Tensor:
    """1 / k for the chosen samples, 0 for the others, (N,) float32."""
    weights_N = torch.zeros(num_samples)
    weights_N[list(chosen)] = 1.0 / max(1, len(chosen))
    return weights_N
