"""What a capture pass knows: the per-sample gradients of a pool, as factors that are never written out in full."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from gradient_selectors.factors import Factor, Lookup
from gradient_selectors.geometry import Geometry

CHUNK_ELEMENTS = 16_000_000  # of written-out gradients held at once by `gram`: 64 MB in float32

Gradient = Mapping[str, Tensor]
"""A gradient by parameter name, each in its parameter's shape, float32."""


@dataclass(frozen=True)
class PoolGradients:
    """The per-sample gradients of N samples.

    Attributes:
        losses_N: mean loss of each sample before any update (nats per token): progressive validation for free.
        factors: contributions to each parameter's per-sample gradients; a parameter without any has no gradient.
        shapes: shapes of all trainable parameters.
    """

    losses_N: Tensor
    factors: Mapping[str, Sequence[Factor]]
    shapes: Mapping[str, Size]

    @property
    def num_samples(self) -> int:
        return len(self.losses_N)

    @torch.no_grad()
    def dots(self, direction: Gradient) -> dict[str, Tensor]:
        """`<u, g_i>` within each parameter, (N,) float32 each. Exact for any direction u."""
        return {
            name: torch.stack([factor.dot(direction[name]) for factor in factors]).sum(0)
            for name, factors in self.factors.items()
        }

    @torch.no_grad()
    def gram(self, samples: Sequence[int], geometry: Geometry) -> Tensor:
        """`K_ij = <g_i, P g_j>` of the given samples, (n, n) float64, exact for any element-wise P.

        Gradients are written out some rows of a parameter at a time: 2 R d p + 2 n^2 d p operations for a matrix, as
        much as the weight gradient itself. Token-pair products would cost 8 to 500 times more at usual shapes.
        """
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=self.losses_N.device)
        for name, factors in self.factors.items():
            preconditioner, num_rows = geometry(name), self.shapes[name][0]
            if all(isinstance(factor, Lookup) for factor in factors):
                factors, preconditioner, num_rows = _touched_rows(factors, preconditioner)
            row_size = len(samples) * self.shapes[name][1:].numel()
            step = max(1, CHUNK_ELEMENTS // row_size)
            for lo in range(0, num_rows, step):
                hi = min(lo + step, num_rows)
                written = sum(factor.per_sample(samples, lo, hi) for factor in factors)
                assert isinstance(written, Tensor)
                if preconditioner is not None:
                    written = written * preconditioner[lo:hi].sqrt()
                flat = written.flatten(1)
                gram += (flat @ flat.T).double()
        return gram

    @torch.no_grad()
    def weighted_gradient_of(self, name: str, weights_N: Tensor) -> Tensor:
        """`sum_i w_i g_i` for one parameter, float32; samples of weight zero are not read."""
        out = torch.zeros(self.shapes[name], dtype=torch.float32, device=self.losses_N.device)
        if bool((weights_N != 0).any()):
            for factor in self.factors.get(name, ()):
                factor.add_weighted(weights_N, out)
        return out

    def weighted_gradient(self, weights_N: Tensor) -> dict[str, Tensor]:
        """`sum_i w_i g_i`: the gradient of the weighted loss, without another backward pass."""
        return {name: self.weighted_gradient_of(name, weights_N) for name in self.shapes}


def _touched_rows(factors: Sequence[Factor], preconditioner: Tensor | None) -> tuple[list[Factor], Tensor | None, int]:
    """An embedding table reduced to the rows that the pool's tokens touch: all others have no gradient."""
    lookups = [factor for factor in factors if isinstance(factor, Lookup)]
    rows = torch.unique(torch.cat([lookup.ids_R for lookup in lookups]))
    reduced: list[Factor] = [lookup.compact(rows) for lookup in lookups]
    return reduced, None if preconditioner is None else preconditioner[rows], len(rows)
