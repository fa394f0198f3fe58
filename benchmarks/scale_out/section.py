"""The rows of a result as the page of benchmarks has them."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADER = ("processes", "candidates", "method", "seconds a step", "speedup", "sent over plain", "memory over plain")


def rows(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each setting and method."""
    ratios = {(row["kind"], row["ranks"], row["method"]): row for row in content["summary"]}
    for run in content["runs"]:
        row = ratios[run["kind"], run["ranks"], run["method"]]
        shown = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("speedup", "sent", "peak"))
        yield (f"{run['ranks']}", f"{run['pool']}", run["method"], f"{run['median_s']:.2f}", *shown)
