"""What the runs of `benchmarks.learning` come to: how much each method needed for what uniform ended with.

For every seed, the level is the test loss with which uniform ended on that stream. What a method needed is the amount
at which its curve first falls to the level, between two evaluations by a straight line; the ratio is that over what
uniform itself needed, read off its curve in the same way. Of the seeds' ratios the median counts, and a seed that never
reached the level counts as infinite: if that makes the median infinite, it is None. So is a ratio without a reference,
and one to a uniform that ended no better than it began. The loss on the retention file is read at the same level, too,
and where the target's loss is what uniform's ended at: what is forgotten compares at equal loss only.

`clean_share` is the part of what a run trained on that its stream labels as clean, `clean_share_later` the same from
the middle of the run on, when a method has seen enough to know. Both are means over seeds, and None where a run's
evaluations leave nothing to count.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from benchmarks.learning.methods import REFERENCE
from benchmarks.learning.streams import CLEAN

AMOUNTS = {
    "samples_ratio": "trained",
    "gradients_ratio": "scored",
    "seconds_ratio": "seconds",
    "cpu_seconds_ratio": "cpu_seconds",
}

Curve = Mapping[str, Any]
"""A finished run: `tier`, `stream`, `target_share` (percent), `method`, `seed`, and `points`, one an evaluation."""


def needed(points: Sequence[Mapping[str, Any]], amount: str, level: float, loss: str = "test") -> float | None:
    """The `amount` at which a loss first falls to `level`; None if it never does."""
    if points[0][loss] <= level:
        return float(points[0][amount])
    for before, after in pairwise(points):
        if after[loss] <= level:
            part = (before[loss] - level) / (before[loss] - after[loss])
            return float(before[amount] + part * (after[amount] - before[amount]))
    return None


def ratio(curve: Curve, reference: Curve, amount: str) -> float:
    """What a run needed over what the reference did; infinite if it never got there, NaN if the reference needed none.

    Both are of the same stream and seed.
    """
    level = reference["points"][-1]["test"]
    own, theirs = needed(curve["points"], amount, level), needed(reference["points"], amount, level)
    if not theirs:
        return math.nan
    return math.inf if own is None else own / theirs


def clean_share(points: Sequence[Mapping[str, Any]], since: float = 0) -> float | None:
    """The part of clean samples among those trained on, repetitions counted; None if there are none.

    Samples count from the first evaluation at or after the step `since` on: an evaluation tells what was trained on
    since the one before.

    Examples:
        >>> points = [{"step": 0, "kinds": {}}, {"step": 4, "kinds": {"clean": 3, "swapped": 1}}]
        >>> clean_share(points)
        0.75
    """
    kinds: Counter[str] = Counter()
    for before, after in pairwise(points):
        if before["step"] >= since:
            kinds.update(after["kinds"])
    return kinds[CLEAN] / kinds.total() if kinds else None


def summarise(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """One row for each tier, stream, share and method, in the order in which they first appear.

    Losses are means over seeds at the end of each run; `steps` is the median of where that was, and `reached` the
    number of seeds that reached the level.
    """
    groups: dict[tuple[str, str, int, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((*case_of(curve), curve["method"]), []).append(curve)
    references = {
        (*case, curve["seed"]): curve
        for (*case, method), group in groups.items()
        if method == REFERENCE
        for curve in group
    }
    return [_row(group, references) for group in groups.values()]


def case_of(curve: Curve) -> tuple[str, str, int]:
    """Tier, stream and share of a run."""
    return curve["tier"], curve["stream"], curve["target_share"]


def _row(group: Sequence[Curve], references: Mapping[tuple[Any, ...], Curve]) -> dict[str, Any]:
    pairs = [(curve, references.get((*case_of(curve), curve["seed"]))) for curve in group]
    compared = [(curve, reference) for curve, reference in pairs if reference is not None]
    ends = [curve["points"][-1] for curve in group]
    ratios = {
        name: _median([ratio(curve, reference, amount) for curve, reference in compared])
        for name, amount in AMOUNTS.items()
    }
    reached = [ratio(curve, reference, "trained") for curve, reference in compared]
    return {
        **{name: group[0][name] for name in ("tier", "stream", "target_share", "method")},
        "seeds": len(group),
        "final_loss": fmean(end["test"] for end in ends),
        "retention_loss": fmean(end["retention"] for end in ends),
        "retention_at_level": _mean([_retention(curve, reference, "test") for curve, reference in compared]),
        "retention_at_target": _mean([_retention(curve, reference, "target") for curve, reference in compared]),
        **ratios,
        "clean_share": _mean([clean_share(curve["points"]) for curve in group]),
        "clean_share_later": _mean([_later(curve["points"]) for curve in group]),
        "steps": median(end["step"] for end in ends),
        "reached": sum(math.isfinite(value) for value in reached),
    }


def _later(points: Sequence[Mapping[str, Any]]) -> float | None:
    return clean_share(points, points[-1]["step"] / 2)


def _retention(curve: Curve, reference: Curve, loss: str) -> float | None:
    return needed(curve["points"], "retention", reference["points"][-1][loss], loss)


def _mean(values: Sequence[float | None]) -> float | None:
    """None if a seed has none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _median(values: Sequence[float]) -> float | None:
    """None where it is not a number. Seeds whose reference needed nothing do not count."""
    usable = [value for value in values if not math.isnan(value)]
    middle = median(usable) if usable else math.inf
    return middle if math.isfinite(middle) else None
