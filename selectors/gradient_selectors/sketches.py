"""Cheap utilities and redundancy: the target's direction at low rank, per-sample gradients under random projections.

**c**: the direction `u = P * G_target` of a matrix is replaced by its projection on the columns that a randomised range
finder gives, `u ~ left right^T` of rank k (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). Then
`<g_i, u>` of `g_i = b^T a` costs `2 R k (p + d)` operations for R tokens where the exact one costs `2 R p d`. At a rank
of 16 the order of c on SmolLM2 has a rank correlation of 0.97 to 1.00 with the exact one over 100 updates, at a rank of
32 one of 0.98 to 1.00; two-sided random projections of width 64, which cost several times as much, came to 0.81 to
0.97. The head belongs to c: without it the correlation was down to 0.88 after 50 updates. Its products are taken while
the pass has its output gradients.

**K**: a matrix's per-sample gradient is projected from both sides under the scales of the rank-one fit `P ~ x y^T`, to
`S^T (sqrt(x) g sqrt(y)) T` with random signs S and T, so K carries the error of the fit and of the projection. It is
computed for the survivors only. The head is left out of K, and with it a table that is tied to it: one large matrix,
whose error no others average out. `benchmarks.fidelity` has the figures.

Exact in a sketch: vectors (biases, norms), LoRA's narrow matrices, tables of embeddings by themselves, parameters
under a mask, and a head where nothing else is sketched. Signs are drawn anew for every matrix, so that errors do not
add up. Projections may be kept for as long as the target's gradient is: P hardly changes in some steps, and computing
it anew for 135 million weights takes longer than sketching six samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradient_selectors.factors import Factor, Lookup, LowRank, MatrixFactor, Outer, Segments, only_outers
from gradient_selectors.geometry import Geometry, rank_one
from gradient_selectors.gradients import Gradient, PoolGradients, preconditioned, squared_length


@dataclass(frozen=True)
class Projection:
    """What stands for one parameter (p, d).

    Attributes:
        direction: `P * G_target` at rank k.
        square: `<G_target, P * G_target>` within the parameter, exact, () float32.
        left_pk: signs times sqrt(x), over the root of the width; None for the head, which is left out of K.
        right_dk: signs times sqrt(y), over the root of the width; None likewise.
    """

    direction: LowRank
    square: Tensor
    left_pk: Tensor | None = None
    right_dk: Tensor | None = None


@torch.no_grad()
def project(
    target: Gradient, geometry: Geometry, generator: torch.Generator, width: int = 16, head: str | None = None
) -> dict[str, Projection]:
    """Projections of every parameter that can be sketched; `generator` (on the CPU) gives whatever is random.

    `width` is k of both. `head`: name of the head's weight, which has a direction only, and only if others have one.
    """
    projections = {}
    for name, values in target.items():
        if _is_large_matrix(name, values, width) and name != head:
            projection = _project(values, geometry(name), width, generator)
            if projection is not None:
                projections[name] = projection
    if projections and head is not None and head in target and _is_large_matrix(head, target[head], width):
        projections[head] = _projection(target[head], preconditioned(target, geometry, head), width, generator)
    return projections


def low_rank(matrix_pd: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """The projection of a matrix on `rank` directions of its shorter side, found with one power iteration.

    Exact if the matrix has that rank.
    """
    if matrix_pd.shape[0] < matrix_pd.shape[1]:
        turned = low_rank(matrix_pd.T, rank, generator)
        return LowRank(turned.right_dr, turned.left_pr)
    start_pr = torch.randn(len(matrix_pd), rank, generator=generator).to(matrix_pd)
    basis_dr = torch.linalg.qr(matrix_pd.T @ start_pr).Q
    basis_dr = torch.linalg.qr(matrix_pd.T @ (matrix_pd @ basis_dr)).Q
    # Contiguous, as it comes back from a checkpoint: with other strides the last digit of a product differs.
    return LowRank(matrix_pd @ basis_dr, basis_dr.contiguous())


@dataclass(frozen=True, eq=False)
class Sketches:
    """One pool's gradients under projections; what has none is exact under the geometry."""

    gradients: PoolGradients
    projections: Mapping[str, Projection]
    geometry: Geometry

    @torch.no_grad()
    def rows(self, gradients: PoolGradients, target: Gradient, geometry: Geometry) -> dict[str, Tensor]:
        """`c_i` within each parameter, (N,) float32 each."""
        self._check(gradients, geometry)
        rows = {}
        for name, factors in gradients.factors.items():
            projection, matrices = self.projections.get(name), _matrices(factors)
            if name in self._sides:
                rows[name] = torch.stack([side.utilities() for side in self._sides[name]]).sum(0)
            elif projection is not None and matrices:
                rows[name] = torch.stack([factor.along(projection.direction) for factor in matrices]).sum(0)
            else:
                rows[name] = gradients.rows_of(name, target, geometry)
        return rows

    def squared_length(self, target: Gradient, geometry: Geometry) -> float:
        """`<G_target, P * G_target>` over what is projected, P being that of when it was; exact if nothing is."""
        assert geometry is self.geometry, "sketches belong to one geometry"
        if not self.projections:
            return squared_length(target, geometry)
        return float(torch.stack([projection.square for projection in self.projections.values()]).sum())

    @torch.no_grad()
    def gram(self, gradients: PoolGradients, samples: Sequence[int], geometry: Geometry) -> Tensor:
        """K of some samples, (n, n) float64."""
        self._check(gradients, geometry)
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=gradients.losses_N.device)
        for name in gradients.factors:
            projection = self.projections.get(name)
            if name in self._sides:
                flat_nK = torch.stack([side.sketch(samples) for side in self._sides[name]]).sum(0).flatten(1)
                gram += (flat_nK @ flat_nK.T).double()
            elif projection is None or projection.left_pk is not None:  # else it is the head
                gram += gradients.gram_of(name, samples, geometry)
        return gram

    @cached_property
    def _sides(self) -> dict[str, list["_Sides"]]:
        """Of the parameters that are sketched, by name."""
        sides = {}
        for name, projection in self.projections.items():
            outers = only_outers(self.gradients.factors.get(name, ()))
            if outers and projection.left_pk is not None:
                sides[name] = [_sides(outer, projection) for outer in outers]
        return sides

    def _check(self, gradients: PoolGradients, geometry: Geometry) -> None:
        assert gradients is self.gradients, "sketches belong to one pool"
        assert geometry is self.geometry, "sketches belong to one geometry"


def _is_large_matrix(name: str, values: Tensor, width: int) -> bool:
    return values.ndim == 2 and min(values.shape) > width and ".lora_" not in name


def _matrices(factors: Sequence[Factor]) -> list[MatrixFactor]:
    """The factors of a matrix, or none for a table of embeddings by itself, which is cheaper exact, by index."""
    if all(isinstance(factor, Lookup) for factor in factors):
        return []
    matrices = [factor for factor in factors if isinstance(factor, MatrixFactor)]
    return matrices if len(matrices) == len(factors) else []


def _project(
    target: Tensor, preconditioner: Tensor | None, width: int, generator: torch.Generator
) -> Projection | None:
    """The projection of a parameter, or None where P has no rank-one fit, as under a mask."""
    left_pk, right_dk = (_signs(size, width, generator).to(target.device) for size in target.shape)
    if preconditioner is None:
        return _projection(target, target, width, generator, left_pk, right_dk)
    scales = rank_one(preconditioner)
    if scales is None:
        return None
    x_p1, y_d1 = (scale.sqrt_().unsqueeze(1) for scale in scales)
    return _projection(target, preconditioner * target, width, generator, left_pk * x_p1, right_dk * y_d1)


def _projection(
    target: Tensor, direction: Tensor, width: int, generator: torch.Generator, *sides: Tensor
) -> Projection:
    return Projection(low_rank(direction, width, generator), torch.sum(direction * target), *sides)


@dataclass(frozen=True)
class _Sides:
    """Both sides of the rows of a factor: under the target's direction in the first half of the columns, under the
    signs in the other.
    """

    left_Rk: Tensor
    right_Rk: Tensor
    segments: Segments

    def utilities(self) -> Tensor:
        """`c_i`, (N,) float32."""
        left_Rk, right_Rk = (side.chunk(2, dim=1)[0].float() for side in (self.left_Rk, self.right_Rk))
        return self.segments.sum(torch.linalg.vecdot(left_Rk, right_Rk))

    def sketch(self, samples: Sequence[int]) -> Tensor:
        """`S^T g_i T` of some samples, (n, k, k) float32."""
        sides = (side.chunk(2, dim=1)[1] for side in (self.left_Rk, self.right_Rk))
        left_Rk, right_Rk = (self.segments.gather(side, samples).float() for side in sides)
        return _contract(left_Rk, right_Rk, self.segments.among(samples))


def _sides(outer: Outer, projection: Projection) -> _Sides:
    """One product for both halves: reading the factors is what takes the time, in bfloat16 all of it.

    All rows are multiplied, and those of the survivors picked out later: copying the wide ones took longer.
    """
    assert projection.left_pk is not None
    assert projection.right_dk is not None
    left_pk = torch.cat([projection.direction.left_pr, projection.left_pk], dim=1)
    right_dk = torch.cat([projection.direction.right_dr, projection.right_dk], dim=1)
    left_Rk = outer.left_Rp @ left_pk.to(outer.left_Rp.dtype)
    return _Sides(left_Rk, outer.right_Rd @ right_dk.to(outer.right_Rd.dtype), outer.segments)


def _contract(left_Rk: Tensor, right_Rk: Tensor, segments: Segments) -> Tensor:
    """Sums of outer products within each sample, (n, k, k) float32."""
    lengths = {segments.length(i) for i in range(segments.num_samples)}
    if len(lengths) == 1:
        shape = (segments.num_samples, lengths.pop(), -1)
        return left_Rk.reshape(shape).mT @ right_Rk.reshape(shape)
    spans = [segments.span(i) for i in range(segments.num_samples)]
    return torch.stack([left_Rk[span].T @ right_Rk[span] for span in spans])


def _signs(size: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size, width), generator=generator).float().mul_(2).sub_(1).div_(width**0.5)


def to_tensors(projections: Mapping[str, Projection]) -> dict[str, Tensor]:
    """Flat, by `<part>.<parameter>`, for a checkpoint."""
    tensors = {}
    for name, projection in projections.items():
        tensors[f"target_pr.{name}"] = projection.direction.left_pr
        tensors[f"target_dr.{name}"] = projection.direction.right_dr
        tensors[f"square.{name}"] = projection.square
        if projection.left_pk is not None and projection.right_dk is not None:
            tensors[f"left_pk.{name}"], tensors[f"right_dk.{name}"] = projection.left_pk, projection.right_dk
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Projection]:
    """Inverse of `to_tensors`; empty for anything else."""
    names = [name.partition(".")[2] for name in tensors if name.startswith("square.")]
    return {
        name: Projection(
            LowRank(tensors[f"target_pr.{name}"], tensors[f"target_dr.{name}"]),
            tensors[f"square.{name}"],
            tensors.get(f"left_pk.{name}"),
            tensors.get(f"right_dk.{name}"),
        )
        for name in names
    }
