"""A scored pool as the page shows it: what became of each candidate, and which of them say the same."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stream_trainer.records import Partition, Sample
from stream_trainer.training.step import StepReport

PIECE = 4  # tokens of a piece that two candidates may share
COMMON = 8  # a piece of more candidates than this is no sign of a copy
NEAR_COPY = 0.5  # share of the shorter one's pieces from which on two candidates count as alike
SHOWN_TOKENS = 60
SHOWN_CHARACTERS = 200

TextOf = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Candidate:
    """One sample of a pool, without the record that it came from, so that the page holds no bytes of the stream.

    Attributes:
        alignment: inner product of its gradient with the target's, over the largest of its pool; None if unknown.
        arm: the bandit's arm that it was drawn from, or None.
    """

    tokens: tuple[int, ...]
    partition: Partition
    offset: int
    id: str | None
    label: str | None
    loss: float
    coefficient: float
    alignment: float | None
    arm: int | None


@dataclass(frozen=True)
class ShownPool:
    """A pool and its step. `by_layer` are coefficients of each layer, where layers draw."""

    step: int
    result: str
    redundancy: float | None
    effective_samples: float
    positive: int | None
    candidates: tuple[Candidate, ...]
    by_layer: tuple[tuple[float, ...], ...] | None

    def as_json(self, text_of: TextOf | None) -> dict[str, Any]:
        """What a browser gets; texts only if there is something that makes them."""
        near = near_copies([candidate.tokens for candidate in self.candidates])
        rows = [self._row(i, near.get(i), text_of) for i in range(len(self.candidates))]
        return {
            "step": self.step,
            "result": self.result,
            "redundancy": self.redundancy,
            "effective_samples": self.effective_samples,
            "positive": self.positive,
            "candidates": rows,
            "by_layer": self.by_layer,
        }

    def _row(self, index: int, near: tuple[int, float] | None, text_of: TextOf | None) -> dict[str, Any]:
        candidate = self.candidates[index]
        row = {
            "partition": str(candidate.partition),
            "offset": candidate.offset,
            "id": candidate.id,
            "label": candidate.label,
            "tokens": len(candidate.tokens),
            "loss": candidate.loss,
            "alignment": candidate.alignment,
            "coefficient": candidate.coefficient,
            "arm": candidate.arm,
            "near": None if near is None else {"candidate": near[0], "share": near[1]},
        }
        return row if text_of is None else row | {"text": shown_text(candidate.tokens, text_of)}


def shown_pool(step: int, pool: Sequence[Sample], report: StepReport, arms: Sequence[int]) -> ShownPool:
    """A pool that was just decided; `arms` of its samples, if a bandit drew them."""
    decision, by_layer = report.decision, report.decision.coefficients_LN
    alignments = report.utilities or report.alignments
    largest = max((abs(value) for value in alignments or ()), default=0.0) or 1.0
    candidates = tuple(
        Candidate(
            tokens=sample.input_ids,
            partition=sample.partition,
            offset=sample.offset,
            id=sample.id,
            label=label_of(sample),
            loss=report.losses[i],
            coefficient=report.coefficients[i],
            alignment=alignments[i] / largest if alignments else None,
            arm=arms[i] if len(arms) == len(pool) else None,
        )
        for i, sample in enumerate(pool)
    )
    rows = None if by_layer is None else tuple(tuple(row) for row in by_layer.tolist())
    return ShownPool(
        step, report.result, decision.redundancy, decision.effective_samples, decision.num_positive, candidates, rows
    )


def label_of(sample: Sample) -> str | None:
    """Where the producer says that a sample comes from: its `domain`, or else a field named `source`, or the first."""
    if sample.domain is not None or not sample.fields:
        return sample.domain
    return dict(sample.fields).get("source", sample.fields[0][1])


def shown_text(tokens: Sequence[int], text_of: TextOf) -> str:
    """The beginning of a sample, on one line."""
    text = " ".join(text_of(tokens[:SHOWN_TOKENS]).split())
    cut = len(tokens) > SHOWN_TOKENS or len(text) > SHOWN_CHARACTERS
    return text[:SHOWN_CHARACTERS] + ("…" if cut else "")


def near_copies(pool: Sequence[Sequence[int]]) -> dict[int, tuple[int, float]]:
    """Of each candidate that has one, the candidate most like it, and what share of the shorter one's pieces is shared.

    Pieces are runs of `PIECE` tokens.
    """
    pieces = [{tuple(tokens[i : i + PIECE]) for i in range(max(1, len(tokens) - PIECE + 1))} for tokens in pool]
    owners = defaultdict[tuple[int, ...], list[int]](list)
    for i, found in enumerate(pieces):
        for piece in found:
            owners[piece].append(i)
    shared: Counter[tuple[int, int]] = Counter()
    for who in owners.values():
        if 1 < len(who) <= COMMON:
            shared.update((i, j) for i in who for j in who if i != j)
    best: dict[int, tuple[int, float]] = {}
    for (i, j), count in shared.items():
        share = count / min(len(pieces[i]), len(pieces[j]))
        if share >= NEAR_COPY and share > best.get(i, (0, 0.0))[1]:
            best[i] = (j, share)
    return best
