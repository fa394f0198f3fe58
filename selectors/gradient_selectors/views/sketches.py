"""Cheap utilities and redundancy: the target's direction at low rank, and some rows that stand for a matrix.

**c**: the direction `u = P * G_target` of a matrix is replaced by its projection on the columns that a randomised range
finder gives, `u ~ left right^T` of rank k (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). Then
`<g_i, u>` of `g_i = b^T a` costs `2 R k (p + d)` operations for R tokens where the exact one costs `2 R p d`. The
direction is known before the pass, and a low rank holds most of it: random projections, which know nothing of it, cost
more and order samples less well. The head belongs to c: without it the order would be another one. Its products are
taken while the pass has its output gradients.

**K**: of every matrix one row in 32 is drawn, the survivors' gradients are written out at these rows under the exact P,
and their products are scaled up: right in the mean whatever P is, under a mask too. Tables of tokens have rows that
stand out, those of a sample's own tokens; they are taken as they are, and only the others are stood for by some.
`benchmarks.fidelity` measures the error.

Exact in a sketch: vectors (biases, norms), LoRA's narrow matrices, tables of embeddings by themselves, a head where
nothing else is sketched, and c under a mask, whose direction has no low rank. Rows are drawn anew for every matrix, so
that errors do not add up. A draw and its P may be kept for as long as the target's gradient is: P hardly changes in a
few steps, and computing it again for a whole model can cost more than the sketches do.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor

from gradient_selectors.capture.factors import Factor, Lookup, LowRank, MatrixFactor, TokenRows
from gradient_selectors.capture.gradients import Gradient, PoolGradients, Rows, squared_length
from gradient_selectors.preconditioner import NEVER_UPDATED, Preconditioner, at_rows
from gradient_selectors.world.partial import Partial, Totals, part_of, shape_of

SHARE = 32  # one row in so many stands for a matrix
GROUP_ELEMENTS = 2**24  # of the matrices that are projected together: 64 MB


@dataclass(frozen=True, eq=False)
class RowSample:
    """Rows that stand for a matrix (p, d) in K.

    Attributes:
        rows_n: which, sorted, int64.
        root_nd: sqrt(P) there, float32.
        population: of how many rows they were drawn, () int64: those where P is not zero.
    """

    rows_n: Tensor
    root_nd: Tensor
    population: Tensor


@dataclass(frozen=True)
class Projection:
    """What stands for one parameter (p, d).

    Attributes:
        direction: `P * G_target` at rank k, or None where it has no low rank, as under a mask.
        square: `<G_target, P * G_target>` within the parameter, exact, () float32; None where it takes a sum over ranks
            that nobody has asked for yet.
        sample: the rows that stand for it in K.
    """

    direction: LowRank | None
    square: Tensor | None
    sample: RowSample


@torch.no_grad()
def project(
    target: Gradient,
    preconditioner: Preconditioner,
    generator: torch.Generator,
    width: int = 16,
    head: str | None = None,
) -> dict[str, Projection]:
    """Projections of every parameter that can be sketched; `generator` (on the CPU) gives whatever is random.

    `width`: rank of the directions, and the least number of rows. `head`: name of the head's weight, which is sketched
    only if others are.
    """
    # By name: a model laid out in another order, or restored in one, draws the same.
    names = [name for name in sorted(target) if _is_large_matrix(name, shape_of(target, name), width)]
    if all(name == head for name in names):
        return {}
    found: dict[str, Projection] = {}
    for group in _groups(names, target):
        found |= _project(target, group, preconditioner, width, generator)
    return found


def _groups(names: Sequence[str], target: Gradient) -> Iterator[list[str]]:
    """Parameters that are projected together: few exchanges, and never a copy of the whole model."""
    group: list[str] = []
    size = 0
    for name in names:
        elements = shape_of(target, name).numel()
        if group and size + elements > GROUP_ELEMENTS:
            yield group
            group, size = [], 0
        group.append(name)
        size += elements
    yield group


def _is_large_matrix(name: str, shape: Size, width: int) -> bool:
    return len(shape) == 2 and min(shape) > width and ".lora_" not in name


def _project(
    target: Gradient, names: Sequence[str], preconditioner: Preconditioner, width: int, generator: torch.Generator
) -> dict[str, Projection]:
    samples, squares, along, starts = {}, {}, {}, {}
    for name in names:
        part, diagonal = part_of(target, name), preconditioner(name)
        samples[name] = _draw_rows(part, diagonal, width, generator)
        if diagonal is not None and int(diagonal.count_nonzero()) < (1 - NEVER_UPDATED) * part.numel():
            squares[name] = _square(target[name], diagonal)
            continue
        along[name] = part if diagonal is None else diagonal * part
        starts[name] = torch.randn(max(part.shape), width, generator=generator)
        if not isinstance(target, Partial):
            squares[name] = _square(part, diagonal)
    directions = low_ranks(along, starts, target.totals if isinstance(target, Partial) else dict)
    return {name: Projection(directions.get(name), squares.get(name), samples[name]) for name in names}


def _square(values: Tensor, diagonal: Tensor | None) -> Tensor:
    return torch.sum((values if diagonal is None else diagonal * values) * values)


def _draw_rows(target: Tensor, diagonal: Tensor | None, width: int, generator: torch.Generator) -> RowSample:
    if diagonal is None:
        population = torch.arange(len(target), device=target.device)
    else:
        population = diagonal.any(1).nonzero().squeeze(1)
    drawn = torch.randperm(len(population), generator=generator)[: max(width, len(population) // SHARE)]
    rows_n = population[drawn.sort().values.to(population.device)]
    root_nd = target.new_ones(len(rows_n), target.shape[1]) if diagonal is None else diagonal[rows_n].sqrt()
    return RowSample(rows_n, root_nd, torch.tensor(len(population)))


def low_ranks(
    matrices: Mapping[str, Tensor], starts: Mapping[str, Tensor], totals: Totals = dict
) -> dict[str, LowRank]:
    """Projections of matrices on some directions of their shorter sides, found with one power iteration.

    `starts` are random, (the longer side, rank). Exact if a matrix has that rank. Where they are only parts of
    matrices, `totals` sums what the ranks have, of all matrices at once.
    """
    tall = {name: matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T for name, matrix in matrices.items()}
    along = _orthogonal(totals({name: matrix.T @ starts[name].to(matrix) for name, matrix in tall.items()}))
    # Orthogonal on either side: of small directions the square of the matrix would leave rounding errors.
    across = _orthogonal(totals({name: matrix @ along[name] for name, matrix in tall.items()}))
    along = _orthogonal(totals({name: matrix.T @ across[name] for name, matrix in tall.items()}))
    images = totals({name: matrix @ along[name] for name, matrix in tall.items()})
    # Contiguous, as it comes back from a checkpoint: with other strides the last digit of a product differs.
    found = {name: (images[name], along[name].contiguous()) for name in tall}
    return {name: LowRank(*(pair if tall[name] is matrices[name] else pair[::-1])) for name, pair in found.items()}


def _orthogonal(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.qr(matrix).Q for name, matrix in matrices.items()}


class Sketched:
    """Utilities from the target's direction at low rank, redundancy from one row in 32: a fraction of the time.

    What was projected is kept until `reset`: until the target's gradient, the mask or the kind of P is new.

    Examples:
        >>> from gradient_selectors import Sketched
        >>> scoring = Sketched(width=16)  # SelectionEngine(..., scoring=scoring)
        >>> sorted(scoring.state_dict())
        ['generator']
    """

    def __init__(self, width: int = 16, generator: torch.Generator | None = None) -> None:
        """`width`: rank of the directions, and the least number of rows.

        `generator` (on the CPU) gives whatever is random; a new one with seed 0 by default.
        """
        self.width = width
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.projections: dict[str, Projection] | None = None
        self._preconditioner: Preconditioner | None = None

    def start(self, target: Gradient, preconditioner: Preconditioner, head: str | None) -> LowRank | None:
        if self.projections is None:
            self.projections = project(target, preconditioner, self.generator, self.width, head)
        self._preconditioner = preconditioner
        of_head = self.projections.get(head or "")
        return None if of_head is None else of_head.direction

    def reset(self) -> None:
        self.projections = self._preconditioner = None

    @torch.no_grad()
    def utilities(
        self, gradients: PoolGradients, target: Gradient, preconditioner: Preconditioner
    ) -> dict[str, Tensor]:
        projections = self._checked(preconditioner)
        found = {}
        for name, factors in gradients.factors.items():
            projection, matrices = projections.get(name), _matrices(factors)
            if projection is not None and projection.direction is not None and matrices:
                found[name] = torch.stack([factor.along(projection.direction) for factor in matrices]).sum(0)
            else:
                found[name] = gradients.utilities_of(name, target, preconditioner)
        return gradients.of_all(found)

    def drawn_rows(self, name: str) -> Tensor | None:
        projection = (self.projections or {}).get(name)
        return None if projection is None else projection.sample.rows_n

    def squared_length(self, target: Gradient, preconditioner: Preconditioner) -> float:
        """Of what is projected, with P as it was then; exact if nothing is."""
        projections = self._checked(preconditioner)
        if not projections:
            return squared_length(target, preconditioner)
        return float(torch.stack([self._square(name, target, preconditioner) for name in sorted(projections)]).sum())

    def _square(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        projections = self._checked(preconditioner)
        found = projections[name].square
        if found is None:
            found = _square(target[name], preconditioner(name))
            projections[name] = replace(projections[name], square=found)
        return found

    def is_projected(self, name: str) -> bool:
        """Whether utilities within a parameter need no more of the target's gradient than its direction."""
        projection = (self.projections or {}).get(name)
        return projection is not None and projection.direction is not None

    @torch.no_grad()
    def gram(self, gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        projections = self._checked(preconditioner)
        known = {name: _matrices(factors) for name, factors in gradients.factors.items() if name in projections}
        drawn = {name: matrices for name, matrices in known.items() if matrices}
        asked = (
            rows
            for name, matrices in drawn.items()
            for rows in _rows_of(name, _own_rows(matrices, samples), projections[name].sample, preconditioner)
        )
        others = [name for name in gradients.factors if name not in drawn]
        gram = gradients.gram_at(samples, asked)
        return gradients.total(gram + gradients.gram_within(others, samples, preconditioner))

    def state_dict(self) -> dict[str, Any]:
        """The generator, and what was projected by `<part>.<parameter>`, if anything."""
        projected = None if self.projections is None else to_tensors(self.projections)
        return {"generator": self.generator.get_state()} | ({} if projected is None else {"projections": projected})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        if "generator" in state:
            self.generator.set_state(state["generator"])
        if state.get("projections"):
            self.projections = from_tensors(state["projections"])

    def _checked(self, preconditioner: Preconditioner) -> dict[str, Projection]:
        """The projections. Raises ValueError if they are not of this preconditioner, as under another metric."""
        if self.projections is None or preconditioner is not self._preconditioner:
            raise ValueError("sketches are made for one preconditioner; with Sketched scoring use metric='p_norm'")
        return self.projections


def _rows_of(name: str, own: Tensor | None, drawn: RowSample, preconditioner: Preconditioner) -> Iterator[Rows]:
    """What K takes of a matrix: the rows of own tokens as they are, those drawn of the others for all of these."""
    if own is None:
        yield Rows(name, drawn.rows_n, drawn.root_nd, int(drawn.population) / max(1, len(drawn.rows_n)))
        return
    others = ~torch.isin(drawn.rows_n, own)
    root = _root_at(preconditioner, name, own, drawn.root_nd)
    population = int(drawn.population) - int(root.any(1).sum())
    yield Rows(name, own, root)
    yield Rows(name, drawn.rows_n[others], drawn.root_nd[others], population / max(1, int(others.sum())))


def _root_at(preconditioner: Preconditioner, name: str, rows: Tensor, like: Tensor) -> Tensor:
    """sqrt(P) at some rows, float32, in the form of `like`."""
    diagonal = at_rows(preconditioner, name, rows)
    return like.new_ones(len(rows), like.shape[1]) if diagonal is None else diagonal.sqrt()


def _own_rows(factors: Sequence[MatrixFactor], samples: Sequence[int]) -> Tensor | None:
    """Rows of a table of tokens that stand out in some samples' gradients, sorted, int64; None for other matrices."""
    tokens = [factor.tokens(samples) for factor in factors if isinstance(factor, TokenRows)]
    return torch.unique(torch.cat(tokens)) if tokens else None


def _matrices(factors: Sequence[Factor]) -> list[MatrixFactor]:
    """The factors of a matrix, or none for a table of embeddings by itself, which is cheaper exact, by index."""
    if all(isinstance(factor, Lookup) for factor in factors):
        return []
    matrices = [factor for factor in factors if isinstance(factor, MatrixFactor)]
    return matrices if len(matrices) == len(factors) else []


def to_tensors(projections: Mapping[str, Projection]) -> dict[str, Tensor]:
    """Flat, by `<part>.<parameter>`, for a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, projection in projections.items():
        sample = projection.sample
        tensors |= {f"rows.{name}": sample.rows_n, f"root.{name}": sample.root_nd}
        tensors[f"population.{name}"] = sample.population
        if projection.square is not None:
            tensors[f"square.{name}"] = projection.square
        if projection.direction is not None:
            tensors[f"target_pr.{name}"] = projection.direction.left_pr
            tensors[f"target_dr.{name}"] = projection.direction.right_dr
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Projection]:
    """Inverse of `to_tensors`; empty for anything else."""
    names = [part.partition(".")[2] for part in tensors if part.startswith("rows.")]
    return {name: _projection_of(name, tensors) for name in names}


def _projection_of(name: str, tensors: Mapping[str, Tensor]) -> Projection:
    sides = tensors.get(f"target_pr.{name}"), tensors.get(f"target_dr.{name}")
    direction = None if sides[0] is None or sides[1] is None else LowRank(sides[0], sides[1])
    sample = RowSample(tensors[f"rows.{name}"], tensors[f"root.{name}"], tensors[f"population.{name}"])
    return Projection(direction, tensors.get(f"square.{name}"), sample)
