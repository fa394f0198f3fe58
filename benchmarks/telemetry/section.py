"""The rows of a result as the page of benchmarks has them."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADER = ("", "figure")


def rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What, and how much."""
    for row in content["telemetry"]:
        model = f"{row['model']}, a step of {row['off_ms']:.0f} ms"
        cost = f"{row['share']:.1%} ({row['share_low']:.1%} to {row['share_high']:.1%})"
        if "own_share" in row:  # older results lack it
            cost += f"; its calls by themselves {row['own_share']:.2%}"
        yield f"{model}: {'everything' if row['variant'] == 'all' else 'the ledger'}", cost
    scrapes = content["scrapes"]
    times = ", ".join(f"{scrapes[name]:.0f}" for name in ("p50_ms", "p95_ms", "max_ms"))
    yield f"a scrape of {scrapes['partitions']} partitions, ms: median, 95 %, longest", times
