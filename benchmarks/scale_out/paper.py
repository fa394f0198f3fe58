"""What a step would send on models and groups that are not at hand: from measured bytes and a stated bandwidth.

Of what is sent in a step, sums are of as many numbers as the model has weights, and each rank sends 2 (R - 1) / R of
it. The rows of survivors go from their rank to all others, (R - 1) / R of its own, and there are at most 256 survivors
in a group. Both are measured as a share of the weights of a small model. For a large one they are a bound: a refresh of
a sketched target sends products with some vectors, which are a smaller share of a wider matrix. What is told of single
samples grows with the other ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

MODELS = {"1B": 1.24e9, "7B": 6.74e9, "70B": 70.6e9}  # weights
RANKS = (8, 64, 256)
KEPT_A_RANK, KEPT_AT_MOST = 4, 256  # survivors
BYTES = 4  # of a number: gradients are summed in float32
AT_REST = 20  # bytes a weight, replicated: the weight, its gradient, Adam's two moments and the target's gradient


def measured(sent: Mapping[str, float], weights: int, ranks: int, kept: int) -> dict[str, float]:
    """What follows from the bytes of a step by kind.

    Returned are `sums`, in units of one all-reduce of the gradient; `rows`, of a survivor, in gradients; and `told`,
    bytes to each other rank.
    """
    share = (ranks - 1) / ranks
    return {
        "sums": sent.get("sum", 0.0) / (2 * share * BYTES * weights),
        "rows": sent.get("exchange", 0.0) / (kept / ranks * share * BYTES * weights),
        "told": (sent.get("rows", 0.0) + sent.get("control", 0.0)) / (ranks - 1),
    }


def on_paper(found: Mapping[str, Mapping[str, float]], bandwidth: float) -> list[dict[str, Any]]:
    """A row for each model, group and method; `bandwidth`: bytes a second that a rank sends."""
    rows = []
    for model, weights in MODELS.items():
        for ranks in RANKS:
            plain = 2 * (ranks - 1) / ranks * BYTES * weights
            for method, per in found.items():
                sent = per["sums"] * plain + per["told"] * (ranks - 1)
                sent += per["rows"] * min(KEPT_A_RANK, KEPT_AT_MOST / ranks) * (ranks - 1) / ranks * BYTES * weights
                row = {"model": model, "ranks": ranks, "method": method, "bytes": sent, "seconds": sent / bandwidth}
                rows.append(row | {"over_plain": sent / plain, "rest_bytes": AT_REST * weights})
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """As people read them."""
    return [
        (
            *(row["model"], f"{row['ranks']}", row["method"], f"{row['bytes'] / 1e9:.1f}"),
            *(f"{row['over_plain']:.2f}", f"{row['seconds']:.2f}", f"{row['rest_bytes'] / 1e9:.0f}"),
        )
        for row in rows
    ]
