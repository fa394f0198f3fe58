"""Settings of the selection: one for each of its four questions, and a section for each method that has more.

Draw, weigh, route and mask are independent of one another. Values that do not fit together are refused, with the
reason. A profile sets several at once. Its values replace the defaults, so a setting that is given overrides them.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from stream_trainer.settings.base import Count, NonNegative, Positive, Section, Share


class ClusterUcbSettings(Section):
    """`draw: cluster_ucb`. Waiting samples are clustered by features that need no forward pass, and a bandit draws from
    the clusters. Within a cluster, the samples most similar to the target come first.
    """

    waiting: Count = 256
    """Maximum number of samples that wait to be drawn. A larger choice takes memory for tokens and features."""
    intake: Count = 128
    """Samples taken in for each step. If more than `waiting` are there, the oldest leave without being scored, as
    `not_selected`."""
    clusters: Annotated[int, Field(ge=2)] = 16
    """Arms of the bandit: one for each cluster."""
    beta: NonNegative = 1.0
    """Upper confidence bound: an arm's index is the mean of its rewards plus this many standard deviations."""
    discount: Annotated[float, Field(gt=0, le=1)] = 0.93
    """Decay of an arm's earlier rewards with each step. About 1 / (1 - discount) steps are remembered."""
    explore: Share = 0.05
    """Share of the samples that are drawn uniformly at random."""
    prior: NonNegative = 2.0
    """Pseudo-count of the reward that an arm starts with: its similarity to the target."""
    thompson: bool = False
    """Thompson sampling: add noise to each arm's index, as large as its mean is uncertain."""


class GastSettings(Section):
    """`route: gast`. Each layer draws the samples that update it, from those that were selected."""

    per_layer: Count = 2
    """Samples K that each layer draws. If no more than K are selected, each of them updates every layer."""
    rule: Literal["stochastic", "random_k_per_layer", "random_k_shared", "top_k_per_layer"] = "stochastic"
    """Rule of the draw. `stochastic` is the method; the others are controls for experiments."""
    temperature: Positive = 1.0
    """Temperature of the softmax over the standardised scores. A higher one draws more at random."""


class DualSftSettings(Section):
    """`mask: dual_sft`. The parameters that may move are chosen again and again, from the gradients of recent steps."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the trainable parameters that may move. The paper uses 0.05; short runs learn faster with 0.2."""
    refresh_steps: Count = 50
    """Steps between refreshes of the mask. The first refreshes come sooner: after 1, 2, 4, 8 steps and so on."""
    granularity: Literal["weight", "row"] = "weight"
    """Unit of the mask: `weight` for single elements of a parameter matrix, `row` for whole rows."""
    absolute: bool = False
    """Rank parameters by the magnitude of their scores. This also keeps parameters that are predicted to do harm."""
    layer_quota: Share = 0.2
    """Share of the budget that is split equally over the layers."""
    module_quota: Share = 0.2
    """Share of the budget that is split equally over the kinds of projections."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the moving average of the updates' gradients."""
    lambda_new: NonNegative = 1.0
    """Factor on the target's gradient."""
    lambda_prior: NonNegative = 0.2
    """Factor on the self-distillation gradient, which keeps the model's outputs on the anchors as they were. This
    gradient is zero until the model has changed. Has an effect with `anchor_path` only."""
    lambda_anchor: NonNegative = 1.0
    """Factor on the gradient of the anchors' loss, which protects them from the first mask on. Has an effect with
    `anchor_path` only."""
    second_order: bool = True
    """Subtract the second-order term: half the learning rate times Adam's second moment times the mean gradient."""
    anchor_path: Path | None = None
    """JSONL file of anchors: samples that show what the model must not lose. Each refresh of the mask then costs two
    more training steps on the anchors. A frozen copy of the model is kept in memory, unless `lambda_prior` is 0."""
    anchors: Count = 16
    """Anchors used at a refresh, from the top of the file."""


class FilterThenWeightSettings(Section):
    """`weigh: filter_then_weight`. A filter keeps candidates that point towards the target; a quadratic program finds
    their coefficients.
    """

    keep_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """Candidates that the filter keeps for the quadratic program: at most this many times `batch_size`."""
    filter: Literal["first_order", "cosine", "nn_omp"] = "first_order"
    """Ranking of the filter: `first_order` by utility, `cosine` by direction, `nn_omp` by matching pursuit."""
    metric: Literal["p_norm", "update", "greats"] = "p_norm"
    """Metric in which the update is matched to the target's: `p_norm` (Adam's own), `update` (the updates as vectors)
    or `greats`."""
    gamma: Positive = 1.0
    """Scale of the utilities under the metric `greats`."""
    normalisation: Literal["mean_one", "natural", "simplex"] = "mean_one"
    """Length of the update: `mean_one` as in plain training, `natural` as the target asks for. `simplex` solves for
    coefficients whose sum is 1."""
    min_gain: Share = 0.0
    """Minimum share of the update's utility that a sample must add; otherwise it is not selected."""
    ridge: NonNegative = 1e-3
    """Ridge regularisation of the quadratic program, relative to the mean diagonal of the redundancy matrix K."""
    max_coefficient: Positive | None = None
    """Upper bound on a coefficient, in units of the mean of the positive coefficients without it."""
    solver_time_limit_s: Positive = 1.0
    """Time limit of the solver in seconds. If it is exceeded, the fallback runs."""


class GreedySettings(Section):
    """`weigh: greedy`. Selects one candidate after the other, by utility minus what it shares with those before it."""

    keep_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """Candidates that are considered: at most this many times `batch_size`."""


Profile = Literal["thrifty", "thorough", "plain"]
BuiltInWeigh = Literal["filter_then_weight", "greedy", "top_k", "equal"]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

# What a profile sets in place of the defaults. `thrifty` is the defaults themselves.
PROFILES: dict[Profile, dict[str, Any]] = {
    "thrifty": {},
    "thorough": {"draw": "all", "scoring": "exact", "pool_size": 16, "batch_size": 4},
    "plain": {"draw": "all", "weigh": "equal", "scoring": "exact", "batch_size": 4},
}
TARGET_PROFILES: dict[Profile, dict[str, Any]] = {"thrifty": {}, "thorough": {"refresh_samples": 8}, "plain": {}}

NO_LONGER = {
    "uniform": "selection.weigh=uniform is now selection.draw=uniform with selection.weigh=equal; set these",
    "full": "selection.weigh=full is now selection.weigh=equal, which trains on batch_size samples; set that",
}


def set_by_profile(given: Any) -> Profile:
    """The profile that raw values of this section name, or the default."""
    named = given.get("profile") if isinstance(given, Mapping) else getattr(given, "profile", None)
    return next((profile for profile in PROFILES if profile == named), "thrifty")


class SelectionSettings(Section):
    """Which candidates enter an update, with what coefficients, in which layers, and which parameters may move."""

    profile: Profile = "thrifty"
    """Preset of several settings; each of them can still be set by itself. `thrifty` draws few candidates with a bandit
    and scores them with sketches, for the shortest time to a given loss. `thorough` scores every record exactly.
    `plain` selects nothing and trains on every record."""
    draw: Literal["all", "uniform", "cluster_ucb"] = "cluster_ucb"
    """Which samples become candidates. `all`: every sample, in the stream's order. `uniform`: a random `batch_size` of
    each `pool_size`. `cluster_ucb`: those that a bandit over clusters draws."""
    weigh: BuiltInWeigh | ImportPath = "filter_then_weight"
    """Which candidates enter the update, and with what coefficients. `filter_then_weight` solves for the coefficients.
    `greedy`, `top_k` and `equal` (all that is drawn) are baselines. `package.module:Class` is your own selector."""
    weigh_options: dict[str, Any] = Field(default={})
    """Keyword arguments of your own selector."""
    route: Literal["none", "gast"] = "none"
    """Which layers a selected sample updates: all of them (`none`), or those that draw it (`gast`)."""
    mask: Literal["none", "fixed", "dual_sft"] = "none"
    """Which parameters may move: all (`none`), those of `mask_path` (`fixed`), or those that DualSFT chooses again and
    again (`dual_sft`)."""
    mask_path: Path | None = None
    """Mask to start from: the `mask.safetensors` that `stream-trainer select dual-sft` writes."""
    pool_size: Count = 4
    """Number N of candidates that are scored at each step."""
    batch_size: Count = 3
    """Maximum number k of samples that enter an update."""
    scoring: Literal["exact", "rank_one", "sketched"] = "sketched"
    """How utilities and redundancy are computed. `exact` approximates nothing. `rank_one` uses a rank-one fit of Adam's
    preconditioner for the redundancy. `sketched` takes a fraction of the time. Its utilities come from the
    target's direction at low rank, its redundancy from one row in 32 of each matrix."""
    sketch_width: Annotated[int, Field(ge=2)] = 16
    """With `scoring: sketched`: rank of the target's direction in a matrix, and minimum number of rows taken of it."""
    preconditioner_warmup_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps before Adam's second moment is trusted as preconditioner. Until then, plain inner products are
    used. Set 10 or more for a model that starts from random parameters."""
    when_none_helps: Literal["skip", "uniform"] = "skip"
    """What to do if no candidate points towards the target: `skip` the update, or take `batch_size` at random."""
    cluster_ucb: ClusterUcbSettings = ClusterUcbSettings()
    filter_then_weight: FilterThenWeightSettings = FilterThenWeightSettings()
    greedy: GreedySettings = GreedySettings()
    gast: GastSettings = GastSettings()
    dual_sft: DualSftSettings = DualSftSettings()

    @property
    def num_drawn(self) -> int:
        """Candidates of a step: where nothing is selected after the draw, as many as are trained on."""
        return self.batch_size if self.weigh == "equal" or self.draw == "uniform" else self.pool_size

    @property
    def largest_take(self) -> tuple[str, int]:
        """The setting that says how many samples must fit the buffer at once, and its value."""
        if self.draw == "cluster_ucb":
            return "selection.cluster_ucb.waiting", self.cluster_ucb.waiting
        if self.draw == "all" and self.weigh == "equal":
            return "selection.batch_size", self.batch_size
        return "selection.pool_size", self.pool_size

    @model_validator(mode="before")
    @classmethod
    def _profile_sets_the_rest(cls, given: Any) -> Any:
        return {**PROFILES[set_by_profile(given)], **given} if isinstance(given, Mapping) else given

    @field_validator("weigh", mode="before")
    @classmethod
    def _weigh_has_other_names(cls, given: Any) -> Any:
        if isinstance(given, str) and given in NO_LONGER:
            raise ValueError(NO_LONGER[given])
        known = get_args(BuiltInWeigh)
        if isinstance(given, str) and given not in known and ":" not in given:
            near = difflib.get_close_matches(given, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"set one of {', '.join(known)}, or package.module:Class"
            raise ValueError(f"selection.weigh={given} is unknown; {remedy}")
        return given

    @model_validator(mode="after")
    def _batch_comes_from_pool(self) -> Self:
        pools_matter = self.weigh != "equal" or self.draw == "uniform"
        if pools_matter and self.batch_size > self.pool_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than pool_size={self.pool_size}; "
                "lower batch_size or raise pool_size"
            )
        if self.weigh_options and ":" not in self.weigh:
            raise ValueError(
                f"weigh_options has no effect with weigh={self.weigh}; it is for a selector of your own, "
                "weigh=package.module:Class"
            )
        return self

    @model_validator(mode="after")
    def _sketches_suit(self) -> Self:
        metric = self.filter_then_weight.metric
        if self.scoring == "sketched" and self.weigh == "filter_then_weight" and metric != "p_norm":
            raise ValueError(
                f"scoring=sketched knows the metric p_norm only, not {metric}; "
                "set filter_then_weight.metric=p_norm or scoring=exact"
            )
        return self

    @model_validator(mode="after")
    def _draws_fit(self) -> Self:
        if self.draw != "cluster_ucb":
            return self
        bandit = self.cluster_ucb
        if bandit.intake < self.num_drawn:
            raise ValueError(
                f"cluster_ucb.intake={bandit.intake} is less than the {self.num_drawn} samples that each step draws; "
                f"raise it to {self.num_drawn} or more"
            )
        if bandit.waiting < bandit.intake:
            raise ValueError(
                f"cluster_ucb.waiting={bandit.waiting} is less than cluster_ucb.intake={bandit.intake}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _mask_has_an_origin(self) -> Self:
        if self.mask == "fixed" and self.mask_path is None:
            raise ValueError("mask=fixed needs mask_path; name the mask.safetensors of stream-trainer select dual-sft")
        if self.mask == "none" and self.mask_path is not None:
            raise ValueError(f"mask_path={self.mask_path} has no effect with mask=none; set mask to fixed or dual_sft")
        quotas = self.dual_sft.layer_quota + self.dual_sft.module_quota
        if quotas > 1:
            raise ValueError(f"dual_sft.layer_quota and dual_sft.module_quota add up to {quotas:g}; lower one of them")
        return self
