"""A pool scored in pieces: of each sample only what the decision needs, and another pass for what was let go.

Factors are kept while a budget of bytes lasts, written out where that is smaller. Of the samples beyond it c and the
rows that K needs are taken as the backward pass leaves each layer, and the factors of large matrices are let go. What
else is asked of these samples takes a second pass over them, without keeping anything either: the update over those
that were chosen, and an exact K over those that are compared. So memory follows the chosen samples, not the pool.

What is small is kept of all samples: vectors, narrow matrices, tables by index, and the hidden states at a head.

The model runs as its mode says. A dropout that is on draws anew in a second pass, as plain training on the chosen
samples does. All that an update takes of a sample comes from one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Factor, Outer, Written
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.capture.head import Head, HeadBias, HeadWeight
from gradient_selectors.capture.joined import Joined, Reduced, WrittenMatrix, join_factors, without_errors
from gradient_selectors.capture.kinds import NARROW, is_written_out
from gradient_selectors.capture.pieces import pieces_of
from gradient_selectors.preconditioner import Preconditioner
from gradient_selectors.views.again import PoolInPieces, SecondPass, Spares, no_spares
from gradient_selectors.views.scoring import Scoring

Form = Literal["factors", "smaller", "reduced"]
"""What is kept of a piece's large matrices: factors, the smaller of factors and gradients, or c and K's rows."""


@dataclass(frozen=True)
class Budget:
    """What a pass may take.

    Attributes:
        micro_tokens: tokens of a piece, padding included, or None for the whole pool at once.
        factors_bytes: bytes of factors that are kept between scoring and update, or None for all. Those of experts
            count, and are kept beyond it too.
    """

    micro_tokens: int | None = None
    factors_bytes: int | None = None


@dataclass(frozen=True)
class Part:
    """A rank's part of a pool that several score.

    Attributes:
        num_tokens: of the longest sample of all.
        keeps: whether all ranks keep every factor, or none keeps those of large matrices; None where each does as its
            own part fits the budget.
        spares: passes that are made for other ranks.
    """

    num_tokens: int
    keeps: bool | None = None
    spares: Spares = no_spares


@dataclass
class _Keeper:
    """Says what is kept of each factor of a pass."""

    capture: GradientCapture
    scoring: Scoring
    target: Gradient
    preconditioner: Preconditioner
    num_tokens: int  # of the whole pool: what a factor is must not depend on the piece
    form: Form
    head: Head | None  # that of the first piece serves all: under autocast each pass converts its own

    def __call__(self, name: str, factor: Factor) -> Factor:
        if isinstance(factor, HeadWeight):
            return self._of_head(factor)
        if isinstance(factor, HeadBias):
            rows, weight = factor.weight.rows, factor.weight.head.weight
            return Written(factor.per_sample(range(rows.segments.num_samples), 0, len(weight)))
        return self._of_matrix(name, factor) if isinstance(factor, Outer) else factor

    def _of_head(self, factor: HeadWeight) -> HeadWeight:
        self.head = self.head or factor.head
        shared = HeadWeight(self.head, factor.rows)
        return shared if self.form == "factors" else without_errors(shared)

    def _of_matrix(self, name: str, factor: Outer) -> Factor:
        p, d, samples = factor.left_Rp.shape[1], factor.right_Rd.shape[1], range(factor.segments.num_samples)
        if is_written_out(p, d, self.num_tokens):
            return Written(factor.per_sample(samples, 0, p))
        if self.form == "factors" or name not in self.capture.matrices:
            return factor
        if self.form == "smaller" or min(p, d) <= NARROW:
            is_smaller = 4 * len(samples) * p * d < factor.left_Rp.nbytes + factor.right_Rd.nbytes
            return WrittenMatrix(factor.per_sample(samples, 0, p)) if is_smaller else factor
        rows_n = self.scoring.drawn_rows(name)
        written_Nnd = None if rows_n is None else factor.at_rows(samples, rows_n)
        return Reduced(self._utilities(name, factor), rows_n, written_Nnd)

    def _utilities(self, name: str, factor: Outer) -> Tensor:
        losses_N = torch.zeros(factor.segments.num_samples, device=self.capture.device)
        if name not in self.target:  # nothing is steered, so nobody reads them
            return losses_N
        alone = PoolGradients(losses_N, {name: [factor]}, {name: self.capture.parameters[name].shape})
        return self.scoring.utilities(alone, self.target, self.preconditioner)[name]


def score_pool(
    capture: GradientCapture,
    batch: Batch,
    scoring: Scoring,
    target: Gradient,
    preconditioner: Preconditioner,
    budget: Budget,
    part: Part | None = None,
) -> PoolGradients:
    """One forward and one backward pass over the pool, in pieces; `scoring` gets ready for it.

    The answers are those of the whole pool at once, but for rounding. `part`: where the batch is one of a pool.
    """
    head_direction = scoring.start(target, preconditioner, capture.head)
    pieces = pieces_of(batch.lengths, budget.micro_tokens)
    forms = _forms(capture, batch.lengths, pieces, budget.factors_bytes)
    if part is not None and part.keeps is not None:
        forms = ["factors" if part.keeps else "reduced"] * len(pieces)
    longest = batch.input_ids_NT.shape[1] if part is None else part.num_tokens
    keeper = _Keeper(capture, scoring, target, preconditioner, longest, forms[0], None)
    spares = no_spares if part is None else part.spares
    for spare in spares(len(pieces)):
        capture.run(spare, head_direction, keeper)
    if len(pieces) == 1 and forms == ["factors"]:
        return capture.run(batch, head_direction, None if part is None else keeper)
    found: list[PoolGradients] = []
    for samples, form in zip(pieces, forms, strict=True):
        keeper.form = form
        found.append(capture.run(batch.among(samples), head_direction, keeper))
    factors = _joined(pieces, [dict(pool.factors) for pool in found])
    order = torch.tensor([sample for samples in pieces for sample in samples])
    losses_N = torch.cat([pool.losses_N for pool in found])[order.argsort().to(capture.device)]
    left = {name: parts for name, calls in factors.items() if (parts := _reduced_parts(calls))}
    return PoolInPieces(
        losses_N,
        factors,
        found[0].shapes,
        reduced=frozenset(i for own, form in zip(pieces, forms, strict=True) if form == "reduced" for i in own),
        let_go=frozenset(left),
        without_rows=frozenset(name for name, parts in left.items() if parts[0].rows_n is None),
        second=SecondPass(capture, batch, budget.micro_tokens, budget.factors_bytes, spares),
        target=target,
        preconditioner=preconditioner,
    )


def padding_of(batch: Batch, pieces: Sequence[Sequence[int]]) -> float:
    """Share of padding in the tokens that passes over a pool compute."""
    if len(pieces) == 1:
        return 1 - sum(batch.lengths) / batch.input_ids_NT.numel()
    return 1 - sum(batch.lengths) / sum(len(own) * max(batch.lengths[i] for i in own) for own in pieces)


def _joined(pieces: Sequence[tuple[int, ...]], found: Sequence[dict[str, Sequence[Factor]]]) -> dict[str, list[Factor]]:
    """Factors of the whole pool. Those of the pieces are let go one parameter after the other."""
    names = list(found[0])
    joined = {}
    for name in names:
        calls = zip(*(of_piece.pop(name) for of_piece in found), strict=True)
        joined[name] = [join_factors(pieces, parts) for parts in calls]
    return joined


def _reduced_parts(calls: Sequence[Factor]) -> list[Reduced]:
    joined = [call for call in calls if isinstance(call, Joined)]
    return [part for call in joined for part in call.parts if isinstance(part, Reduced)]


def _forms(
    capture: GradientCapture, lengths: Sequence[int], pieces: Sequence[tuple[int, ...]], factors_bytes: int | None
) -> list[Form]:
    """What is kept of each piece: the factors of all if they fit, else the smaller form of as many as do.

    Factors of experts are kept of all pieces, and leave that much less to the others.
    """
    tokens = [sum(lengths[i] for i in samples) for samples in pieces]
    if factors_bytes is None or keeps_all(capture, sum(tokens), factors_bytes):
        return ["factors"] * len(pieces)
    shapes, size = _shapes(capture), _bytes_of_number(capture)
    factors_bytes = max(0, factors_bytes - sum(tokens) * _numbers_of_experts(capture) * size)
    forms: list[Form] = []
    for samples, count in zip(pieces, tokens, strict=True):
        needed = sum(min(count * (p + d) * size, 4 * len(samples) * p * d) for p, d in shapes)
        forms.append("smaller" if needed <= factors_bytes else "reduced")
        factors_bytes -= needed if needed <= factors_bytes else 0
    return forms


def keeps_all(capture: GradientCapture, tokens: int, factors_bytes: int | None) -> bool:
    """Whether all factors of samples with so many tokens fit the budget."""
    if factors_bytes is None:
        return True
    head = 0 if capture.head is None else len(capture.parameters[capture.head])
    of_token = sum(p + d for p, d in _shapes(capture)) + head + _numbers_of_experts(capture)
    return tokens * of_token * _bytes_of_number(capture) <= factors_bytes


def _shapes(capture: GradientCapture) -> list[Size]:
    return [capture.parameters[name].shape for name in sorted(capture.matrices)]


def _numbers_of_experts(capture: GradientCapture) -> int:
    """That factors of experts take for each token."""
    return sum(experts.numbers_of_token for experts in capture.experts)


def _bytes_of_number(capture: GradientCapture) -> int:
    return (capture.passes.autocast or next(iter(capture.parameters.values())).dtype).itemsize
