"""Filter-then-Weight: coefficients of a quadratic program under Adam, against greedy and top-k on the same pools.

arXiv 2604.00001. All arms score the same 16 candidates a step exactly, under Adam's preconditioner, and train on 4 at
most. `duplicates` has samples that say the same: there redundancy counts.
"""

import math

from benchmarks.claims.runs import compared
from benchmarks.claims.table import Figure, Values
from benchmarks.learning.methods import FTW, REFERENCE
from benchmarks.learning.plan import Tier
from benchmarks.learning.run import Bench
from benchmarks.learning.summary import ratio

SAYS = "Filter-then-Weight learns more than greedy and top-k from as many samples"
STREAMS = ("mixture", "duplicates")
RIVALS = ("greedy", "top_k")
LOSS, SAMPLES = "test loss", "samples to uniform's"

FIGURES = tuple(
    Figure(f"{name}, {stream}", FTW, RIVALS, shown=(REFERENCE,)) for stream in STREAMS for name in (LOSS, SAMPLES)
)


def measure(bench: Bench, tier: Tier, seed: int) -> Values:
    """Test loss after the last update, and trained samples until uniform's last loss over what uniform needed."""
    found: dict[str, dict[str, float | None]] = {}
    for stream in STREAMS:
        points = {arm: compared(bench, tier, stream, arm, seed) for arm in (REFERENCE, FTW, *RIVALS)}
        reference = {"points": points[REFERENCE]}
        found[f"{LOSS}, {stream}"] = {arm: of_arm[-1]["test"] for arm, of_arm in points.items()}
        found[f"{SAMPLES}, {stream}"] = {
            arm: _or_none(ratio({"points": of_arm}, reference, "trained")) for arm, of_arm in points.items()
        }
    return found


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
