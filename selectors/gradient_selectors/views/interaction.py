"""The gradient interaction matrix of a pool, as lazy views.

`M[i, p] = u[p] g_i[p]` has a row for each sample and a column for each weight, where `u = P * G_target` is the
preconditioned target gradient. It is never formed. Selectors read its views and return a `Decision`; none of them
touches the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradient_selectors.capture.gradients import Gradient, PoolGradients, layer_of, preconditioned
from gradient_selectors.preconditioner import Preconditioner
from gradient_selectors.views.scoring import Exact, Scoring

EXACT = Exact()
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Interaction:
    """A pool's gradients, seen from a target under an optimizer's preconditioner.

    Attributes:
        gradients: the pool's per-sample gradients.
        target: mean gradient of the target samples, by parameter name.
        preconditioner: the preconditioner P by parameter name.
        scoring: how the views are computed; exact unless told otherwise.

    `SelectionEngine` makes it, and a selector reads it:

    Examples:
        >>> from gradient_selectors import Interaction
        >>> def most_useful(interaction: Interaction) -> int:
        ...     return int(interaction.utilities_N.argmax())
    """

    gradients: PoolGradients
    target: Gradient
    preconditioner: Preconditioner
    scoring: Scoring = EXACT

    @property
    def num_samples(self) -> int:
        return self.gradients.num_samples

    @cached_property
    def utilities_by_parameter(self) -> dict[str, Tensor]:
        """Row sums of M within each parameter: `<u, g_i>`, (N,) float32 each."""
        return self.scoring.utilities(self.gradients, self.target, self.preconditioner)

    @cached_property
    def utilities_N(self) -> Tensor:
        """Utilities: row sums of M, `c_i = <g_i, P G_target>`: the first-order utility of each sample, (N,) float32."""
        return torch.stack(list(self.utilities_by_parameter.values())).sum(0)

    @property
    def known_utilities_N(self) -> Tensor | None:
        """`utilities_N` if somebody has asked for them, and None otherwise: nothing is computed."""
        return self.__dict__.get("utilities_N")

    @cached_property
    def relative_utilities_N(self) -> Tensor:
        """`c_i / <G, P G>`: what share of the target's own utility each sample has, (N,) float64.

        Unlike `c_i` it does not fall as P and the target's gradient do. 0 for a target without any gradient.
        """
        return self.utilities_N.double() / max(self.scoring.squared_length(self.target, self.preconditioner), TINY)

    @cached_property
    def utilities_LN(self) -> Tensor:
        """Row sums of M within each of `gradients.layers`, (L, N) float32; their sum over layers is `utilities_N`."""
        index = {layer: row for row, layer in enumerate(self.gradients.layers)}
        rows_LN = torch.zeros(len(index), self.num_samples, device=self.gradients.losses_N.device)
        for name, utilities_N in self.utilities_by_parameter.items():
            rows_LN[index[layer_of(name)]] += utilities_N
        return rows_LN

    def columns(self, coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Column sums of M with the samples' coefficients, `u * sum_i w_i g_i`, by parameter name.

        One parameter at a time, float32 in its shape: all of them are as large as the model. `coefficients` are (N,) or
        (L, N). The sum over everything is `utilities_N @ coefficients`.
        """
        for name in self.gradients.factors:
            yield name, self.gradients.weighted_gradient_of(name, coefficients).mul_(self.direction(name))

    def direction(self, name: str) -> Tensor:
        """`u = P * G_target` of one parameter."""
        return preconditioned(self.target, self.preconditioner, name)

    def gram(self, samples: Sequence[int]) -> Tensor:
        """`K_ij = <g_i, P g_j>` of the given samples, (n, n) float64: how much of their utility is the same."""
        return self.scoring.gram(self.gradients, samples, self.preconditioner)
