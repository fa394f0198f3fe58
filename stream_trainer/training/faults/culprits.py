"""A step that raises: find the samples that it fails on, give them away, and make the step with the others.

What the failing pass changed beside weights stays as it is: the target's age, a refresh. The same failure comes again
when the step is computed again, so a run that is resumed still goes the same way.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from gradient_selectors import Decision
from gradient_selectors.world.base import LostError

from stream_trainer.errors import StreamTrainerError
from stream_trainer.ingest.letter import DETAIL_CHARS
from stream_trainer.models.refusals import first_line
from stream_trainer.records import Sample
from stream_trainer.training.step import SKIPPED_FAILED, StepReport

STEP_FAILED, OUT_OF_MEMORY, KILLED = "step_failed", "out_of_memory", "killed"  # reasons of dead letters
MAX_TRIES = 3  # of one step

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a pass could not be made.

    Attributes:
        reason: that of a dead letter.
        detail: the error, in a line.
        trace: where it was raised; no frame is kept, for frames hold the memory that is short.
    """

    reason: str
    detail: str
    trace: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        detail = f"{type(error).__name__}: {first_line(error)[:DETAIL_CHARS]}"
        return cls(OUT_OF_MEMORY if _is_out_of_memory(error) else STEP_FAILED, detail, traceback.format_exc())


@dataclass(frozen=True)
class Hands:
    """What a step is made with.

    Attributes:
        step: makes the step on some samples. Nothing has changed if it raises.
        rehearse: goes through the passes of a step on some samples, for what they raise.
        accuse: takes a sample that a step fails on out of the stream, for good.
        scores: whether the step scores its pool.
        control: samples known to be good; where a rehearsal of these fails, no sample of the stream is to blame.
    """

    step: Callable[[Sequence[Sample]], StepReport]
    rehearse: Callable[[Sequence[Sample]], None]
    accuse: Callable[[Sample, Failure], None]
    scores: bool
    control: Sequence[Sample]


@dataclass(frozen=True)
class Made:
    """A step that was made.

    Attributes:
        pool: the samples that could be used.
        report: on these; None if there are none.
        whole: on all that were drawn, for what draws: those that could not be used have no finite number.
    """

    pool: Sequence[Sample]
    report: StepReport | None
    whole: StepReport


def make_step(drawn: Sequence[Sample], hands: Hands, gone: Sequence[int] = ()) -> Made | Failure:
    """Make a step on what was drawn, but for those `gone` already. A Failure, if it fails whatever the samples are.

    Raises StreamTrainerError as `step` and `accuse` do.
    """
    rest = [i for i in range(len(drawn)) if i not in gone]
    failure = None
    for attempt in range(MAX_TRIES):
        pool = [drawn[i] for i in rest]
        made = _tried(hands.step, pool) if pool else None
        if not isinstance(made, Failure):
            return Made(pool, made, _whole(len(drawn), rest, made, hands.scores))
        failure = made
        found = _culprits(pool, hands, failure, again=attempt > 0)
        if found is None:
            return failure
        for i, why in found.items():
            hands.accuse(pool[i], why)
        rest = [i for place, i in enumerate(rest) if place not in found]
    assert failure is not None
    return failure


def _culprits(pool: Sequence[Sample], hands: Hands, failure: Failure, *, again: bool) -> dict[int, Failure] | None:
    """Those to blame, by index; none if the step may simply be tried again; None if it is of no sample's making."""
    logger.warning("a step failed (%s); looking for the samples that it fails on", failure.detail)
    if _tried(hands.rehearse, hands.control) is not None:
        return None
    found = _failing(pool, list(range(len(pool))), hands.rehearse)
    if found or not again:
        return found
    if failure.reason != OUT_OF_MEMORY:
        return None
    # Each fits by itself and all together do not: the longest makes the most of that.
    return {max(range(len(pool)), key=lambda i: pool[i].num_tokens): failure}


def _failing(
    pool: Sequence[Sample], indices: list[int], rehearse: Callable[[Sequence[Sample]], None]
) -> dict[int, Failure]:
    """The samples that fail by themselves, found by halving what fails."""
    failure = _tried(rehearse, [pool[i] for i in indices])
    if failure is None:
        return {}
    if len(indices) == 1:
        return {indices[0]: failure}
    middle = len(indices) // 2
    return _failing(pool, indices[:middle], rehearse) | _failing(pool, indices[middle:], rehearse)


def _tried(function: Callable[[Sequence[Sample]], T], samples: Sequence[Sample]) -> T | Failure:
    """What a function returns, or why it failed. Whatever memory it took is free again."""
    try:
        return function(samples)
    except (StreamTrainerError, LostError):
        raise
    except Exception as error:  # of the model, a selector, a solver, the device: anything may be raised
        failure = Failure.of(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))


def _whole(count: int, places: Sequence[int], report: StepReport | None, scores: bool) -> StepReport:
    """A report on some of `count` samples as one on all of them."""
    if report is None:
        lost = (torch.nan,) * count
        nothing = Decision(torch.zeros(count))
        return StepReport(SKIPPED_FAILED, lost, (0.0,) * count, nothing, lost if scores else None)
    if len(places) == count:
        return report

    def spread(values: Sequence[float], fill: float) -> tuple[float, ...]:
        known = dict(zip(places, values, strict=True))
        return tuple(known.get(i, fill) for i in range(count))

    utilities = None if report.utilities is None else spread(report.utilities, torch.nan)
    losses, coefficients = spread(report.losses, torch.nan), spread(report.coefficients, 0.0)
    return replace(report, losses=losses, coefficients=coefficients, utilities=utilities)
