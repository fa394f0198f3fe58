"""The rows of a result as the page of benchmarks has them."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.claims.table import median_of

HEADER = ("claim", "figure", "the paper's arm", "the best rival", "shows")


def rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """A row for each figure of each claim: medians over the seeds, and whether the direction shows."""
    for claim in content["claims"]:
        for figure in claim["figures"]:
            best = max if figure["better"] == "higher" else min
            known = {arm: median_of(figure["values"][arm]) for arm in figure["rivals"]}
            measured = {arm: value for arm, value in known.items() if value is not None}
            rival = best(measured, key=lambda arm: measured[arm]) if measured else figure["rivals"][0]
            yield (
                f"`{claim['claim']}`",
                f"{figure['figure']}, {figure['better']} is better",
                _shown(median_of(figure["values"][figure["arm"]])),
                f"`{rival}` {_shown(known[rival])}",
                f"{figure['shows']}, {claim['seeds']} seeds",
            )


def _shown(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"
