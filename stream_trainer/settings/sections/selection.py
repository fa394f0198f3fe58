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
from stream_trainer.settings.sections.advantage import AdvantageSettings


class ClusterUcbSettings(Section):
    """`draw: cluster_ucb`. Waiting samples are clustered by features that need no forward pass, and a bandit draws from
    the clusters. Within a cluster, the samples most similar to the target come first.
    """

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


FeatureName = Literal[
    "likeness", "ngrams", "fluency", "relevance", "copy", "loss_share", "length", "components", "fields"
]
OwnFunction = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class LearnedSettings(Section):
    """`draw: learned`. Most steps are plain training steps on what a predictor draws. Now and then a probe scores
    `pool_size` samples by their gradients, and the predictor learns from them.
    """

    probe_every: Count = 8
    """Steps before the first probe, and between probes. With `mask: dual_sft` the first step is one."""
    max_probe_every: Count = 64
    """Steps between probes while these hardly change what is drawn."""
    features: tuple[FeatureName | OwnFunction, ...] = get_args(FeatureName)
    """What the predictor knows of a sample: `likeness` to the target's mean embedding, `ngrams` that the target has and
    the stream lacks, `fluency`, `relevance` of an answer to its prompt, `copy` of what was trained on lately,
    `loss_share`, the share of its tokens that carry loss, `length`, principal `components` of the embeddings, `fields`
    of the record. `package.module:function` is your own: from samples to an array with a row for each."""
    fields: tuple[str, ...] = ("source", "domain")
    """Fields of the record whose values tell where it comes from. `key` is the record's key, `header:NAME` one of its
    headers. The first 31 values have a coefficient each, all others share one."""
    discount: Annotated[float, Field(gt=0, le=1)] = 0.985
    """What is left of an earlier observation after each probe."""
    prior: Positive = 16.0
    """Observations that the predictor's prior counts as: what is like the target is useful."""
    temperature: Positive = 0.25
    """Temperature of the draw, in standard deviations of what is predicted. A higher one draws more at random."""
    loss_weight: NonNegative = 1.0
    """Weight of the loss beside the utility, in the features that tell good producers from bad ones."""


class RivalSettings(Section):
    """`draw: nearest`, `near_random` and other ways to draw without a gradient."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the waiting samples, the most similar to the target, that `near_random` draws from."""
    copies: Annotated[float, Field(gt=0, le=1)] | None = 0.97
    """Cosine of two embeddings above which `near_random` takes one for a copy of what it drew lately; or `null`."""


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
    """Ridge regularisation of the quadratic program, relative to each sample's own entry of the redundancy matrix K."""
    max_coefficient: Positive | None = None
    """Upper bound on a coefficient, in units of the mean of the positive coefficients without it."""
    solver_max_iterations: Count = 100
    """Most iterations of the interior-point solver, which runs where active sets find no answer. It takes 10 to 30.
    Beyond the limit the fallback runs, which is exact too."""


class GreedySettings(Section):
    """`weigh: greedy`. Selects one candidate after the other, by utility minus what it shares with those before it."""

    keep_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """Candidates that are considered: at most this many times `batch_size`."""


DrawName = Literal[
    "all",
    "uniform",
    "learned",
    "auto",
    "cluster_ucb",
    "nearest",
    "near_random",
    "knn_kde",
    "dsir",
    "lowest_loss",
    "middle_loss",
]
PREDICTS = frozenset({"learned", "auto"})  # draw by what a predictor has learned
WAIT = PREDICTS | {"cluster_ucb", "nearest", "near_random", "knn_kde", "dsir"}  # draw from what waits
CHOOSE = frozenset({"uniform", "lowest_loss", "middle_loss"})  # draw batch_size of each pool_size

Profile = Literal["thrifty", "auto", "thorough", "plain"]
BuiltInWeigh = Literal["filter_then_weight", "greedy", "top_k", "equal"]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

# What a profile sets in place of the defaults. `thrifty` is the defaults themselves.
PROFILES: dict[Profile, dict[str, Any]] = {
    "thrifty": {},
    "auto": {"draw": "auto", "pool_size": 8},
    "thorough": {"draw": "all", "scoring": "exact", "pool_size": 16},
    "plain": {"draw": "all", "weigh": "equal", "scoring": "exact"},
}
TARGET_PROFILES: dict[Profile, dict[str, Any]] = {
    "thrifty": {},
    "auto": {},
    "thorough": {"refresh_samples": 8, "decay": 0.5},
    "plain": {},
}

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
    """Preset of several settings; each of them can still be set by itself. `thrifty` draws by what it has learned:
    most steps are plain training steps, and now and then a probe scores what is drawn. `auto` trains in the way that
    makes the most progress in a second, and plainly where nothing pays. `thorough` scores every record exactly. `plain`
    selects nothing and trains on every record."""
    draw: DrawName = "learned"
    """Which samples become candidates. `all`: every sample, in the stream's order. `uniform`: a random `batch_size` of
    each `pool_size`. `learned`: those that a predictor draws, which gradients teach. `cluster_ucb`: those that a bandit
    over clusters draws. `auto`: by what makes the most progress in a second: the learned draw, scoring each pool,
    `near_random`, or chance. Without gradients: `nearest` to the target's mean embedding; `near_random`, some of the
    quarter nearest to it; `knn_kde`, neighbours of the target's samples, copies shared; `dsir`, by importance of
    n-grams; `lowest_loss` and `middle_loss` of each `pool_size`, by a forward pass."""
    waiting: Count = 256
    """Maximum number of samples that wait to be drawn. A larger choice takes memory for tokens and features."""
    intake: Count = 128
    """Samples taken in for each step. If more than `waiting` are there, the oldest leave without being scored, as
    `not_selected`."""
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
    pool_size: Count = 6
    """Number N of candidates that are scored at each step, or with `draw: learned` and `auto` at each probe."""
    batch_size: Count = 4
    """Maximum number k of samples that enter an update."""
    scoring: Literal["exact", "rank_one", "sketched"] = "sketched"
    """How utilities and redundancy are computed. `exact` approximates nothing. `rank_one` uses a rank-one fit of Adam's
    preconditioner for the redundancy. `sketched` takes a fraction of the time. Its utilities come from the
    target's direction at low rank, its redundancy from one row in 32 of each matrix."""
    sketch_width: Annotated[int, Field(ge=2)] = 16
    """With `scoring: sketched`: rank of the target's direction in a matrix, and minimum number of rows taken of it."""
    micro_tokens: Count | None = 4096
    """Tokens that are scored at once, padding included. A pool is scored in pieces of samples of like length, so that
    memory is bounded and little is padding; a longer sample is a piece by itself. `null` scores the pool at once, as
    `scoring: rank_one` always does."""
    preconditioner_warmup_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps before Adam's second moment is trusted as preconditioner. Until then, plain inner products are
    used. Set 10 or more for a model that starts from random parameters."""
    when_none_helps: Literal["skip", "uniform"] = "skip"
    """What to do if no candidate points towards the target: `skip` the update, or take `batch_size` at random."""
    learned: LearnedSettings = LearnedSettings()
    cluster_ucb: ClusterUcbSettings = ClusterUcbSettings()
    rivals: RivalSettings = RivalSettings()
    filter_then_weight: FilterThenWeightSettings = FilterThenWeightSettings()
    greedy: GreedySettings = GreedySettings()
    gast: GastSettings = GastSettings()
    dual_sft: DualSftSettings = DualSftSettings()
    advantage: AdvantageSettings = AdvantageSettings()

    @property
    def num_drawn(self) -> int:
        """Candidates of a step: where nothing is selected after the draw, as many as are trained on."""
        return self.batch_size if self.weigh == "equal" or self.draw in CHOOSE else self.pool_size

    @property
    def learns(self) -> bool:
        """Whether the draw learns from utilities."""
        return self.draw in PREDICTS or self.draw == "cluster_ucb"

    @property
    def field_names(self) -> tuple[str, ...]:
        """Fields of a record that samples keep."""
        return self.learned.fields if self.draw in PREDICTS else ()

    @property
    def largest_take(self) -> tuple[str, int]:
        """The setting that says how many samples must fit the buffer at once, and its value."""
        if self.draw in WAIT:
            return "selection.waiting", self.waiting
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
        pools_matter = self.weigh != "equal" or self.draw in CHOOSE
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
        if self.draw not in WAIT:
            return self
        if self.intake < self.num_drawn:
            raise ValueError(
                f"intake={self.intake} is less than the {self.num_drawn} samples that each step draws; "
                f"raise it to {self.num_drawn} or more"
            )
        if self.waiting < self.intake:
            raise ValueError(f"waiting={self.waiting} is less than intake={self.intake}; raise it")
        return self

    @model_validator(mode="after")
    def _learned_is_taught(self) -> Self:
        if self.draw in PREDICTS and self.weigh == "equal":
            raise ValueError(
                f"draw={self.draw} is taught by what probes weigh, and weigh=equal weighs nothing; "
                "set draw to all, uniform or another that is not taught"
            )
        if self.learned.max_probe_every < self.learned.probe_every:
            raise ValueError(
                f"learned.max_probe_every={self.learned.max_probe_every} is less than "
                f"learned.probe_every={self.learned.probe_every}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _falls_back_where_nothing_is_taught(self) -> Self:
        if self.learns and self.advantage.when_not_paying == "uniform":
            raise ValueError(
                f"advantage.when_not_paying=uniform does not go with draw={self.draw}, which learns from what is "
                "scored; set draw=auto, which trains plainly where nothing pays, and when_not_paying=keep"
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
