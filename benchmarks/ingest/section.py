"""The rows of a result as the page of benchmarks has them."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADER = ("figure", "value")
LABELS = {
    ("poll", "records/s"): "reading, records a second",
    ("poll, parse", "records/s"): "reading and parsing",
    ("poll, parse, tokenise", "records/s"): "reading, parsing and tokenising",
    ("ingest", "records/s"): "ingest as a whole, buffer and dead letters included",
    ("share of the step spent waiting for data", "ratio"): "share of a training step spent waiting",
}


def rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What, and how much of it."""
    found = {(row["figure"], row["unit"]): row["value"] for row in content["summary"]}
    for key, label in LABELS.items():
        if key in found:
            yield label, f"{found[key]:,.0f}" if key[1] == "records/s" else f"{found[key]:.4f}"
