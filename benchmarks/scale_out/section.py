"""The rows of a result as the page of benchmarks has them."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADER = ("processes", "method", "seconds on one", "seconds", "speedup", "sent", "memory")


def rows(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each method where several processes share the candidates of one."""
    seconds = {(run["kind"], run["ranks"], run["method"]): run["median_s"] for run in content["runs"]}
    for row in content["summary"]:
        if row["kind"] == "strong":
            took = seconds["one", 1, row["method"]], seconds["strong", row["ranks"], row["method"]]
            shown = (*took, row["speedup"], row["sent"], row["peak"])
            yield (f"{row['ranks']}", row["method"], *("-" if value is None else f"{value:.2f}" for value in shown))
