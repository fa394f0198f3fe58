"""What `benchmarks.learning` compares: settings of the service's selection by name, with controls and ablations.

    uniform                       4 of 16 at random, before any gradient; the reference of every ratio
    full                          all 16: four times the samples in an update
    top_k                         the best 4 by first order, equal coefficients: no redundancy term
    greedy                        first order minus redundancy, sample by sample, equal coefficients
    filter_then_weight            4 of 16 by the quadratic program, scored exactly
    ...+sketched                  utilities at low rank, redundancy from one row in 32
    ...+cluster_ucb               by sketches; a bandit draws 4 of 256 that wait (128 come in a step); 3 are trained on
    ...+cluster_ucb+min_gain      the same, and a sample that adds less than 5 % of the utility is not trained on
    ...+gast                      each layer draws 2 of the selected; three controls draw at random or take the best
    ...+dual_sft                  5 % of the parameters may move
    ...+dual_sft/prior            20 % may move, chosen so that 16 anchors of what is measured as
                                  forgotten lose nothing
    everything                    filter_then_weight+cluster_ucb+gast+dual_sft
    everything/wider              the same, and 20 % may move
    ...+equal_coefficients        filter_then_weight.max_coefficient 1: of the same survivors, none counts more than the
                                  mean
    ...+plain_preconditioner      inner products of gradients, never under Adam's second moment
    shuffled_target               filter_then_weight towards random samples of the stream
    oracle                        uniform on a stream that holds records of the target's domain only: it alone knows
                                  labels
    nearest, near_random, ...     draws without a gradient, 4 of 256 that wait: what a selection has to beat
    ...+filter_then_weight        the same for 8, of which the quadratic program takes 4
    thrifty, auto, thorough       the service's profiles as they are, refreshes of the target's gradient included

All but the last three state their settings on top of the profile `thorough`, and refresh the target as their tier says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_trainer.settings.sections.selection import WAIT, SelectionSettings

POOL, BATCH = 16, 4
PROBE = 8  # scored by a probe, or by Filter-then-Weight after a draw without gradients
# Reading is cheap: enough of what is worth a gradient waits even where it is one record in ten. Most of what is drawn
# is then worth training on: a fourth sample to compare with is enough.
DRAWN, DRAWN_BATCH, WAITING, INTAKE = 4, 3, 256, 128
NEVER = 10**9  # steps

FTW = "filter_then_weight"
UNIFORM = {"draw": "uniform", "weigh": "equal"}
BANDIT = {"draw": "cluster_ucb", "scoring": "sketched"}
GAST = {"route": "gast"}
MASK = {"mask": "dual_sft"}
RIVALS = ("nearest", "near_random", "knn_kde", "dsir", "lowest_loss", "middle_loss")
WIDER = {"density": 0.2}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        selection: the service's settings of that section; a profile alone stands for itself.
        target_only: the stream holds the target's domain only.
        shuffled_target: the target is random samples of the stream.
        anchored: DualSFT guards the answers to samples of what is measured as forgotten.
    """

    selection: Mapping[str, Any] = field(default_factory=dict)
    target_only: bool = False
    shuffled_target: bool = False
    anchored: bool = False

    @property
    def is_profile(self) -> bool:
        """Whether it is one of the service's profiles as it is."""
        return set(self.selection) == {"profile"}


METHODS: dict[str, Method] = {
    "uniform": Method(UNIFORM),
    "thrifty": Method({"profile": "thrifty"}),
    "auto": Method({"profile": "auto"}),
    **{rival: Method({"draw": rival, "weigh": "equal"}) for rival in RIVALS},
    FTW: Method({"weigh": FTW}),
    f"{FTW}+cluster_ucb": Method({"weigh": FTW, **BANDIT}),
    f"{FTW}+cluster_ucb+min_gain": Method({"weigh": FTW, **BANDIT, FTW: {"min_gain": 0.05}}),
    "oracle": Method(UNIFORM, target_only=True),
    "top_k": Method({"weigh": "top_k"}),
    "everything": Method({"weigh": FTW, **BANDIT, **GAST, **MASK}),
    "everything/wider": Method({"weigh": FTW, **BANDIT, **GAST, **MASK, "dual_sft": WIDER}),
    "greedy": Method({"weigh": "greedy"}),
    "full": Method({"weigh": "equal", "batch_size": POOL}),
    f"{FTW}+sketched": Method({"weigh": FTW, "scoring": "sketched"}),
    f"{FTW}+gast": Method({"weigh": FTW, **GAST}),
    f"{FTW}+dual_sft": Method({"weigh": FTW, **MASK}),
    f"{FTW}+cluster_ucb+dual_sft/prior": Method({"weigh": FTW, **BANDIT, **MASK, "dual_sft": WIDER}, anchored=True),
    f"{FTW}+equal_coefficients": Method({"weigh": FTW, FTW: {"max_coefficient": 1.0}}),
    f"{FTW}+plain_preconditioner": Method({"weigh": FTW, "preconditioner_warmup_steps": NEVER}),
    "shuffled_target": Method({"weigh": FTW}, shuffled_target=True),
    f"{FTW}+gast/random_k_per_layer": Method({"weigh": FTW, **GAST, "gast": {"rule": "random_k_per_layer"}}),
    f"{FTW}+gast/random_k_shared": Method({"weigh": FTW, **GAST, "gast": {"rule": "random_k_shared"}}),
    f"{FTW}+gast/top_k_per_layer": Method({"weigh": FTW, **GAST, "gast": {"rule": "top_k_per_layer"}}),
    **{f"{rival}+{FTW}": Method({"draw": rival, "weigh": FTW, "scoring": "sketched"}) for rival in RIVALS},
    "thorough": Method({"profile": "thorough"}),
}
REFERENCE = "uniform"


def selection_of(method: Method) -> dict[str, Any]:
    """The section `selection` of a run."""
    if method.is_profile:
        return dict(method.selection)
    shape: dict[str, Any] = {"profile": "thorough", "draw": "all", "scoring": "exact"}
    shape |= {"waiting": WAITING, "intake": INTAKE}
    if method.selection.get("draw") == "cluster_ucb":
        shape |= {"pool_size": DRAWN, "batch_size": DRAWN_BATCH}
    elif method.selection.get("draw") in RIVALS[:4] and method.selection["weigh"] != "equal":
        shape |= {"pool_size": PROBE, "batch_size": BATCH}
    else:
        shape |= {"pool_size": POOL, "batch_size": BATCH}
    return {**shape, **method.selection}


def records_needed(method: Method, steps: int) -> int:
    """Records that a run of so many steps reads."""
    settings = SelectionSettings.model_validate(selection_of(method))
    _, taken = settings.largest_take
    if settings.draw in WAIT:
        return taken + steps * settings.intake
    return steps * taken
