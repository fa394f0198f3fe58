"""What claims come to: the figures of every arm over the seeds, and whether the paper's arm is ahead.

An arm is ahead of a rival where its figure is better on the same seed: the same stream, the same model. Figures that
differ by less than a thousandth are equal. The direction shows (`yes`) if the paper's arm is ahead of every rival on
every seed, and does not (`no`) if it is behind one of them on every seed. Anything else is `within noise`, and so is
whatever a single seed says. By luck alone, one rival is left behind on both of two seeds once in four times: read the
figures beside the word.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from benchmarks.common.reporting import table

Values = Mapping[str, Mapping[str, float | None]]
"""Of one seed: a value for each arm of each figure; None where there is none, which is worse than any."""

Shows = Literal["yes", "no", "within noise"]
EQUAL = 1e-3  # relative
HEADER = ("claim", "figure", "arm", "seeds", "median", "lowest", "highest", "shows")


@dataclass(frozen=True)
class Figure:
    """One comparison of a claim.

    Attributes:
        arm: what the paper says is ahead.
        rivals: what it says is behind; the budgets are equal.
        shown: arms of another budget, or without a method. They are for scale, and decide nothing.
        higher: whether more is better.
    """

    name: str
    arm: str
    rivals: tuple[str, ...]
    shown: tuple[str, ...] = ()
    higher: bool = False


def judge(figure: Figure, seeds: Sequence[Values]) -> Shows:
    """Whether the claim's direction shows in a figure.

    Examples:
        >>> seeds = [{"loss": {"ours": 1.8, "theirs": 1.9}}, {"loss": {"ours": 1.7, "theirs": 1.8}}]
        >>> judge(Figure("loss", "ours", ("theirs",)), seeds)
        'yes'
    """
    if len(seeds) < 2:
        return "within noise"
    leads = [[lead(figure, rival, values) for values in seeds] for rival in figure.rivals]
    if all(one > 0 for of_rival in leads for one in of_rival):
        return "yes"
    return "no" if any(all(one < 0 for one in of_rival) for of_rival in leads) else "within noise"


def lead(figure: Figure, rival: str, values: Values) -> int:
    """1 where the paper's arm is ahead of a rival on a seed, -1 where it is behind, 0 where they are equal."""
    ours, theirs = (_rank(figure, values[figure.name][arm]) for arm in (figure.arm, rival))
    if math.isclose(ours, theirs, rel_tol=EQUAL):
        return 0
    return 1 if ours > theirs else -1


def summarise(claim: str, says: str, figures: Sequence[Figure], seeds: Sequence[Values]) -> dict[str, Any]:
    """A claim with its figures, one value for each seed, for JSON."""
    return {
        "claim": claim,
        "says": says,
        "seeds": len(seeds),
        "figures": [
            {
                "figure": figure.name,
                "better": "higher" if figure.higher else "lower",
                "arm": figure.arm,
                "rivals": list(figure.rivals),
                "shows": judge(figure, seeds),
                "values": {arm: [values[figure.name][arm] for values in seeds] for arm in _arms(figure)},
                "seeds_ahead": {r: sum(lead(figure, r, values) > 0 for values in seeds) for r in figure.rivals},
            }
            for figure in figures
        ],
    }


def report(claims: Sequence[Mapping[str, Any]]) -> str:
    """Summaries as one table: a row for each arm, the paper's first."""
    return table(HEADER, [row for claim in claims for figure in claim["figures"] for row in _rows(claim, figure)])


def _rows(claim: Mapping[str, Any], figure: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for arm, values in figure["values"].items():
        ours = arm == figure["arm"]
        ahead = figure["seeds_ahead"].get(arm)
        against = "for scale" if ahead is None else f"ahead of it {ahead} of {claim['seeds']}"
        where = [claim["claim"] if ours else "", figure["figure"] if ours else "", arm, str(len(values))]
        rows.append([*where, *_median_and_range(values), figure["shows"] if ours else against])
    return rows


def median_of(values: Sequence[float | None]) -> float | None:
    """The median of the seeds; None where one has no value, which is worse than any."""
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def _median_and_range(values: Sequence[float | None]) -> list[str]:
    """A dash where the median or an end is a seed without a value."""
    middle, known = median_of(values), [value for value in values if value is not None]
    ends = (None, None) if middle is None else (min(known), max(known))
    return ["-" if value is None else f"{value:.4f}" for value in (middle, *ends)]


def _rank(figure: Figure, value: float | None) -> float:
    if value is None:
        return float("-inf")
    return value if figure.higher else -value


def _arms(figure: Figure) -> tuple[str, ...]:
    return figure.arm, *figure.rivals, *figure.shown
