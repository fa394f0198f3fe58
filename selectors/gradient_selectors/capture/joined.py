"""Factors of a pool that was scored in pieces: those of the pieces, side by side, and what may be left of them.

Small ones (vectors, narrow matrices, tables by index) are put together. Those of large matrices stay where they are:
a copy would take the memory that pieces save.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from gradient_selectors.capture.factors import Factor, Lookup, LowRank, MatrixFactor, Segments, Written
from gradient_selectors.capture.head import HeadWeight

Samples = Sequence[int]


@dataclass(frozen=True)
class WrittenMatrix(Written):
    """Gradients of a large matrix written out, (N, p, d): the smaller form where samples are long."""

    def along(self, direction: LowRank) -> Tensor:
        right_Npr = self.grads_Np @ direction.right_dr
        return (right_Npr * direction.left_pr).flatten(1).sum(1)

    def at_rows(self, samples: Samples, rows: Tensor) -> Tensor:
        return self.grads_Np[list(samples)][:, rows]


@dataclass(frozen=True)
class Reduced:
    """What is left of a large matrix's factor when it is let go.

    Attributes:
        utilities_N: `<g_i, u>` along the one direction that was asked for, float32.
        rows_n: rows that K needs, sorted, int64; None where it needs all of them.
        written_Nnd: the gradients at these rows, float32.
    """

    utilities_N: Tensor
    rows_n: Tensor | None = None
    written_Nnd: Tensor | None = None

    def dot(self, _: Tensor) -> Tensor:
        """Right for the direction that was asked for, and for no other: the pool knows which one that is."""
        return self.utilities_N

    def along(self, _: LowRank) -> Tensor:
        return self.utilities_N

    def at_rows(self, samples: Samples, rows: Tensor) -> Tensor:
        assert self.rows_n is not None
        assert self.written_Nnd is not None
        return self.written_Nnd[list(samples)][:, torch.searchsorted(self.rows_n, rows)]

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        raise NotImplementedError("the factor was let go; its gradient takes another pass")

    def per_sample(self, samples: Samples, lo: int, hi: int) -> Tensor:
        raise NotImplementedError("the factor was let go; its gradient takes another pass")


@dataclass(frozen=True)
class Joined:
    """The factors of one call of a module in each of the pieces.

    Attributes:
        samples: of each piece, by their numbers in the pool.
        parts: the factor of each piece.
    """

    samples: Sequence[Samples]
    parts: Sequence[MatrixFactor]

    def dot(self, u: Tensor) -> Tensor:
        return self._scattered([part.dot(u) for part in self.parts])

    def along(self, direction: LowRank) -> Tensor:
        return self._scattered([part.along(direction) for part in self.parts])

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        for samples, part in zip(self.samples, self.parts, strict=True):
            weights_n = weights_N[list(samples)]
            if bool((weights_n != 0).any()):
                part.add_weighted(weights_n, out, begin=begin)
                begin = False
        if begin:
            out.zero_()

    def per_sample(self, samples: Samples, lo: int, hi: int) -> Tensor:
        return self._gathered(samples, lambda part, own: part.per_sample(own, lo, hi))

    def at_rows(self, samples: Samples, rows: Tensor) -> Tensor:
        return self._gathered(samples, lambda part, own: part.at_rows(own, rows))

    def _own(self, samples: Samples) -> Iterator[tuple[MatrixFactor, list[int], list[int]]]:
        """Of each piece that holds some of the samples: its factor, their places among them, and in the piece."""
        for held, part in zip(self.samples, self.parts, strict=True):
            places = [place for place, sample in enumerate(samples) if sample in held]
            if places:
                yield part, places, [held.index(samples[place]) for place in places]

    def _gathered(self, samples: Samples, ask: Callable[[MatrixFactor, list[int]], Tensor]) -> Tensor:
        found = [(ask(part, own), places) for part, places, own in self._own(samples)]
        order = _inverse([place for _, places in found for place in places])
        return torch.cat([values for values, _ in found])[order]

    def _scattered(self, found: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(found))[_inverse([sample for samples in self.samples for sample in samples])]


@dataclass(frozen=True)
class JoinedHead(Joined):
    """The same of a head that is captured on its own path."""

    def tokens(self, samples: Samples) -> Tensor:
        """Tokens that some samples predict, int64: their rows stand out in their gradients."""
        return torch.cat([cast(HeadWeight, part).tokens(own) for part, _, own in self._own(samples)])


def join_factors(samples: Sequence[Samples], parts: Sequence[Factor]) -> Factor:
    """One factor of the whole pool from those of its pieces, whose samples are `samples`."""
    order = _inverse([sample for own in samples for sample in own])
    if all(isinstance(part, Lookup) for part in parts):
        return _join_lookups(order, [cast(Lookup, part) for part in parts])
    if all(type(part) is Written for part in parts):
        return Written(torch.cat([cast(Written, part).grads_Np for part in parts])[order])
    matrices = [cast(MatrixFactor, part) for part in parts]
    is_head = all(isinstance(part, HeadWeight) for part in parts)
    return JoinedHead(samples, matrices) if is_head else Joined(samples, matrices)


def _join_lookups(order: list[int], parts: Sequence[Lookup]) -> Lookup:
    lengths = [part.segments.length(i) for part in parts for i in range(part.segments.num_samples)]
    segments = Segments((0, *accumulate(lengths)))
    ids_R, grads_Rd = torch.cat([part.ids_R for part in parts]), torch.cat([part.grads_Rd for part in parts])
    return Lookup(segments.gather(ids_R, order), segments.gather(grads_Rd, order), segments.among(order))


def without_errors(factor: HeadWeight) -> HeadWeight:
    """The same factor, whose errors are computed again when they are needed."""
    rows = factor.rows
    if rows.errors_RV is None:
        return factor
    counts_N = torch.tensor(rows.segments.offsets, device=rows.scale_R.device).diff().float()
    scale_R = (1.0 / counts_N)[rows.segments.owners_R.to(rows.scale_R.device)]
    return replace(factor, rows=replace(rows, scale_R=scale_R, errors_RV=None))


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each number from 0 on stands in a permutation."""
    places = {number: place for place, number in enumerate(order)}
    return [places[number] for number in range(len(order))]
