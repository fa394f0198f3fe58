"""Random projections of per-sample gradients: utilities and redundancy at a fraction of the exact cost.

A matrix's per-sample gradient `g = b^T a` is projected from both sides to `S^T g T`, from its factors, and so is the
target's direction. Both under the scales of the rank-one fit `P ~ x y^T`:

    <S^T (sqrt(x) g sqrt(y)) T, S^T (u / sqrt(x) / sqrt(y)) T>    with u = P * G_target and random signs S and T

is unbiased for the *exact* `c = <g, P G_target>`, for the scales cancel: the fit only keeps the error small. For K it
stands in for P, so K carries the error of the fit as well. A width of k costs `2 R k (p + d)` operations for R tokens
where the exact c costs `2 R p d`, and the exact K of n samples `2 R d p + 2 n^2 d p`. The order of c needs the width of
64: `benchmarks.fidelity` has the figures.

The head is left out of c and K, and with it a table that is tied to it. It is one large matrix, whose error no others
average out: with it sketched, the order of c was lost (rank correlation 0 to 0.3 on SmolLM2), while it makes up 4 % of
c. Its output gradients would have to be computed again, too, a tenth of the step at a vocabulary of 8,192. It is kept,
and exact, where nothing else can be sketched.

Exact in a sketch: vectors (biases, norms), LoRA's narrow matrices, tables of embeddings by themselves, parameters
under a mask. Signs are drawn anew for every matrix, so that errors do not add up. Projections may be kept for as long
as the target's gradient is: P hardly changes in some steps, and computing it anew for 135 million weights takes longer
than sketching six samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradient_selectors.factors import Factor, Outer, Segments
from gradient_selectors.geometry import Geometry, rank_one
from gradient_selectors.gradients import Gradient, PoolGradients, preconditioned


@dataclass(frozen=True)
class Projection:
    """How one parameter (p, d) is projected.

    Attributes:
        left_pk: signs times sqrt(x), over the root of the width.
        right_dk: signs times sqrt(y), over the root of the width.
        target_kk: the projected direction u / sqrt(x) / sqrt(y).
    """

    left_pk: Tensor
    right_dk: Tensor
    target_kk: Tensor


@torch.no_grad()
def project(
    target: Gradient, geometry: Geometry, generator: torch.Generator, width: int = 64, head: str | None = None
) -> dict[str, Projection]:
    """Projections of every parameter that can be sketched; `generator` (on the CPU) gives the signs.

    `head`: name of the weight to leave out.
    """
    projections = {}
    for name, values in target.items():
        if values.ndim == 2 and min(values.shape) > width and ".lora_" not in name and name != head:
            projection = _project(values, geometry(name), width, generator)
            if projection is not None:
                projections[name] = projection
    return projections


class Sketches:
    """One pool's gradients under projections; what has none is exact under the geometry."""

    def __init__(self, projections: Mapping[str, Projection], geometry: Geometry, head: str | None = None) -> None:
        """`head`: name of the weight that was left out."""
        self._projections, self._geometry = projections, geometry
        self._sketches: dict[str, Tensor] | None = None
        self._left_out = {head} if projections else set()

    @torch.no_grad()
    def rows(self, gradients: PoolGradients, target: Gradient, geometry: Geometry) -> dict[str, Tensor]:
        """`c_i` within each parameter, (N,) float32 each."""
        assert geometry is self._geometry, "sketches belong to one geometry"
        rows = {}
        for name in self._covered(gradients):
            flat_NK = self._of_pool(gradients).get(name)
            if flat_NK is None:
                rows[name] = gradients.dots_of(name, preconditioned(target, geometry, name))
            else:
                rows[name] = flat_NK @ self._projections[name].target_kk.flatten()
        return rows

    @torch.no_grad()
    def gram(self, gradients: PoolGradients, samples: Sequence[int], geometry: Geometry) -> Tensor:
        """K of some samples, (n, n) float64."""
        assert geometry is self._geometry, "sketches belong to one geometry"
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=gradients.losses_N.device)
        for name in self._covered(gradients):
            flat_NK = self._of_pool(gradients).get(name)
            if flat_NK is None:
                gram += gradients.gram_of(name, samples, geometry(name))
            else:
                flat_nK = flat_NK[list(samples)]
                gram += (flat_nK @ flat_nK.T).double()
        return gram

    def _covered(self, gradients: PoolGradients) -> list[str]:
        return [name for name in gradients.factors if name not in self._left_out]

    def _of_pool(self, gradients: PoolGradients) -> dict[str, Tensor]:
        """Each sample's sketch of every parameter that has one, (N, k k) float32; computed once."""
        if self._sketches is None:
            self._sketches = {
                name: _sketch(factors, self._projections[name]).flatten(1)
                for name, factors in gradients.factors.items()
                if name in self._projections and _can_be_sketched(factors)
            }
        return self._sketches


def _project(
    target: Tensor, preconditioner: Tensor | None, width: int, generator: torch.Generator
) -> Projection | None:
    """The projection of a parameter, or None where P has no rank-one fit, as under a mask."""
    left_pk, right_dk = (_signs(size, width, generator).to(target.device) for size in target.shape)
    if preconditioner is None:
        return Projection(left_pk, right_dk, left_pk.T @ target @ right_dk)
    scales = rank_one(preconditioner)
    if scales is None:
        return None
    x_p1, y_d1 = (scale.sqrt_().unsqueeze(1) for scale in scales)
    target_kk = (left_pk / x_p1).T @ (preconditioner * target) @ (right_dk / y_d1)
    return Projection(left_pk * x_p1, right_dk * y_d1, target_kk)


def _can_be_sketched(factors: Sequence[Factor]) -> bool:
    """A table of embeddings by itself is cheaper exact, by index."""
    return all(isinstance(factor, Outer) for factor in factors)


def _sketch(factors: Sequence[Factor], projection: Projection) -> Tensor:
    """`S^T g_i T` of each sample, summed over the contributions to a parameter, (N, k, k) float32."""
    parts = [_contract(*_projected(factor, projection)) for factor in factors]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _projected(factor: Factor, projection: Projection) -> tuple[Tensor, Tensor, Segments]:
    """Both sides of a contribution, (R, k) each."""
    assert isinstance(factor, Outer)
    left_Rp, right_Rd = factor.left_Rp, factor.right_Rd
    left_pk, right_dk = projection.left_pk.to(left_Rp.dtype), projection.right_dk.to(right_Rd.dtype)
    return left_Rp @ left_pk, right_Rd @ right_dk, factor.segments


def _contract(left_Rk: Tensor, right_Rk: Tensor, segments: Segments) -> Tensor:
    """Sums of outer products within each sample, (N, k, k) float32."""
    left_Rk, right_Rk = left_Rk.float(), right_Rk.float()
    lengths = {segments.length(i) for i in range(segments.num_samples)}
    if len(lengths) == 1:
        shape = (segments.num_samples, lengths.pop(), -1)
        return left_Rk.view(shape).mT @ right_Rk.view(shape)
    spans = [segments.span(i) for i in range(segments.num_samples)]
    return torch.stack([left_Rk[span].T @ right_Rk[span] for span in spans])


def _signs(size: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size, width), generator=generator).float().mul_(2).sub_(1).div_(width**0.5)
