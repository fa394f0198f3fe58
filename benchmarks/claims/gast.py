"""GAST: each layer draws its own samples, against layers that draw at random and samples that all layers share.

arXiv 2603.09865. Twice, both with equal budgets. In the paper's setting the batch is the whole pool of 16, and each
layer draws 4 of it; the data-only rivals train every layer on the same 4, the best by first order or any. After
Filter-then-Weight, each layer draws 2 of its 4; the data-only rival selects 2 of 16 for all layers. All 4 for all
layers, which is twice the budget, stands beside it for scale.
"""

from typing import Any

from benchmarks.claims.runs import SHARE, compared, on_stream
from benchmarks.claims.table import Figure, Values
from benchmarks.learning.methods import FTW, METHODS, POOL, REFERENCE, selection_of
from benchmarks.learning.plan import Tier
from benchmarks.learning.run import Bench
from benchmarks.learning.streams import make_stream

SAYS = "A draw of samples by each layer learns more than random layers and than samples alone"
OF_POOL, OF_SELECTED = "test loss, each layer 4 of 16", "test loss, each layer 2 of the selected"
EACH, RANDOM_EACH = "gast", "random of each layer"
AFTER, AFTER_EACH, AFTER_SHARED = (f"{FTW}+gast{rule}" for rule in ("", "/random_k_per_layer", "/random_k_shared"))
DATA_ONLY = f"{FTW}, 2 selected"

FIGURES = (
    Figure(OF_POOL, EACH, (RANDOM_EACH, "top_k", REFERENCE)),
    Figure(OF_SELECTED, AFTER, (AFTER_EACH, AFTER_SHARED, DATA_ONLY), shown=(FTW,)),
)


def measure(bench: Bench, tier: Tier, seed: int) -> Values:
    """Test loss after the last update."""
    stream = make_stream("mixture", bench.data, SHARE, POOL * tier.steps, seed)

    def with_settings(selection: dict[str, Any]) -> float:
        return float(on_stream(bench, tier, stream, selection, seed)[-1]["test"])

    def with_method(name: str) -> float:
        return float(compared(bench, tier, "mixture", name, seed)[-1]["test"])

    return {
        OF_POOL: {
            EACH: with_settings(each_layer("stochastic")),
            RANDOM_EACH: with_settings(each_layer("random_k_per_layer")),
            **{name: with_method(name) for name in ("top_k", REFERENCE)},
        },
        OF_SELECTED: {
            **{name: with_method(name) for name in (AFTER, AFTER_EACH, AFTER_SHARED, FTW)},
            DATA_ONLY: with_settings(selection_of(METHODS[FTW]) | {"batch_size": 2}),
        },
    }


def each_layer(rule: str) -> dict[str, Any]:
    """Settings under which the pool is the batch, and each layer draws 4 of it."""
    return selection_of(METHODS["full"]) | {"route": "gast", "gast": {"rule": rule, "per_layer": 4}}
