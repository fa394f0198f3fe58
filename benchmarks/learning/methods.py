"""What `benchmarks.learning` compares: settings of the service's selection by name, with controls and ablations.

    uniform                       4 of 16 at random, before any gradient; the reference of every ratio
    full                          all 16: four times the samples in an update
    top_k                         the best 4 by first order, equal weights: no redundancy term
    greedy                        first order minus redundancy, sample by sample, equal weights
    filter_then_weight            the service's default
    ...+sketch                    utilities at low rank, redundancy from one row in 32
    ...+cluster_ucb               by sketches; a bandit draws 4 of 256 that wait (128 come in a step); 3 are trained on
    ...+cluster_ucb+min_gain      the same, and a sample that adds less than 5 % of the utility is not trained on
    ...+gast                      each layer draws 2 of the chosen; three controls draw at random or take the best
    ...+dual_sft                  5 % of the weights may move
    ...+dual_sft/prior            20 % may move, chosen so that 16 anchors of role-play lose nothing
    everything                    filter_then_weight+cluster_ucb+gast+dual_sft
    everything/wider              the same, and 20 % may move
    ...+equal_weights             selection.max_coefficient 1: of the same survivors, none may count more than the mean
    ...+plain_geometry            inner products of gradients, never under Adam's second moment
    shuffled_target               filter_then_weight towards random samples of the stream
    oracle                        uniform on a stream that holds records of the target's domain only: it alone knows
                                  labels

Settings that are not named here are the service's defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POOL, CHOSEN = 16, 4
# Reading is cheap: enough of what is worth a gradient waits even where it is one record in ten. Most of what is drawn
# is then worth training on: a fourth sample to compare with is enough.
DRAWN, DRAWN_CHOSEN, WAITING, INTAKE = 4, 3, 256, 128
NEVER = 10**9  # steps

FTW = "filter_then_weight"
BANDIT = {"draw": "cluster_ucb", "geometry": "sketch"}
GAST = {"route": "gast"}
MASK = {"mask": "dual_sft"}
WIDER = {"density": 0.2}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        selection: the service's settings of that section.
        target_only: the stream holds the target's domain only.
        shuffled_target: the target is random samples of the stream.
        anchored: DualSFT guards the answers to samples of what is measured as forgotten.
    """

    selection: Mapping[str, Any] = field(default_factory=dict)
    target_only: bool = False
    shuffled_target: bool = False
    anchored: bool = False

    @property
    def by_clusters(self) -> bool:
        return self.selection.get("draw") == "cluster_ucb"


METHODS: dict[str, Method] = {
    "uniform": Method({"weigh": "uniform"}),
    FTW: Method({"weigh": FTW}),
    f"{FTW}+cluster_ucb": Method({"weigh": FTW, **BANDIT}),
    f"{FTW}+cluster_ucb+min_gain": Method({"weigh": FTW, **BANDIT, "min_gain": 0.05}),
    "oracle": Method({"weigh": "uniform"}, target_only=True),
    "top_k": Method({"weigh": "top_k"}),
    "everything": Method({"weigh": FTW, **BANDIT, **GAST, **MASK}),
    "everything/wider": Method({"weigh": FTW, **BANDIT, **GAST, **MASK, "dual_sft": WIDER}),
    "greedy": Method({"weigh": "greedy"}),
    "full": Method({"weigh": "full"}),
    f"{FTW}+sketch": Method({"weigh": FTW, "geometry": "sketch"}),
    f"{FTW}+gast": Method({"weigh": FTW, **GAST}),
    f"{FTW}+dual_sft": Method({"weigh": FTW, **MASK}),
    f"{FTW}+cluster_ucb+dual_sft/prior": Method({"weigh": FTW, **BANDIT, **MASK, "dual_sft": WIDER}, anchored=True),
    f"{FTW}+equal_weights": Method({"weigh": FTW, "max_coefficient": 1.0}),
    f"{FTW}+plain_geometry": Method({"weigh": FTW, "settle_steps": NEVER}),
    "shuffled_target": Method({"weigh": FTW}, shuffled_target=True),
    f"{FTW}+gast/random_k_per_layer": Method({"weigh": FTW, **GAST, "gast": {"rule": "random_k_per_layer"}}),
    f"{FTW}+gast/random_k_shared": Method({"weigh": FTW, **GAST, "gast": {"rule": "random_k_shared"}}),
    f"{FTW}+gast/top_k_per_layer": Method({"weigh": FTW, **GAST, "gast": {"rule": "top_k_per_layer"}}),
}
REFERENCE = "uniform"


def selection_of(method: Method) -> dict[str, Any]:
    """The section `selection` of a run."""
    if not method.by_clusters:
        return {"pool_size": POOL, "chosen": CHOSEN, **method.selection}
    bandit = {"waiting": WAITING, "intake": INTAKE}
    return {"pool_size": DRAWN, "chosen": DRAWN_CHOSEN, **method.selection, "cluster_ucb": bandit}


def records_needed(method: Method, steps: int) -> int:
    """Records that a run of so many steps reads."""
    return WAITING + steps * INTAKE if method.by_clusters else steps * POOL
