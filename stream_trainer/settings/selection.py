"""Settings of the selection: one for each of its four questions, and a section for each method that has more.

Draw, weigh, route and mask are independent of one another. What does not go together is refused, with the reason.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stream_trainer.settings.base import Count, NonNegative, Positive, Section, Share


class ClusterUcbSettings(Section):
    """`draw: cluster_ucb`. Samples wait, clustered by features that cost no pass; a bandit draws among them, and within
    a cluster what is most like the target comes first.
    """

    waiting: Count = 128
    """Samples that wait to be drawn. More to choose from, and memory for their tokens and features."""
    intake: Count = 16
    """Samples taken in for each step. What exceeds `waiting` leaves undrawn, the oldest first: `not_selected`."""
    clusters: Annotated[int, Field(ge=2)] = 16
    """Arms of the bandit."""
    beta: NonNegative = 1.0
    """An arm is worth the mean of its rewards plus this many standard deviations."""
    discount: Annotated[float, Field(gt=0, le=1)] = 0.93
    """What earlier rewards count for after each step; about 1 / (1 - discount) steps are remembered."""
    explore: Share = 0.05
    """Share of the draws that are uniform."""
    prior: NonNegative = 2.0
    """Rewards that an arm's likeness to the target counts for at its start."""
    thompson: bool = False
    """Draw each slot's arm from the uncertainty of the means instead of always taking the best."""


class GastSettings(Section):
    """`route: gast`. Each layer draws the samples that update it, of those that were chosen."""

    per_layer: Count = 2
    """Samples K that each layer draws; with as many as were chosen, nothing is routed."""
    rule: Literal["stochastic", "random_k_per_layer", "random_k_shared", "top_k_per_layer"] = "stochastic"
    """`stochastic` is the method; random_k_per_layer, random_k_shared and top_k_per_layer are controls."""
    temperature: Positive = 1.0
    """Divides the standardised scores: higher is more random."""


class DualSftSettings(Section):
    """`mask: dual_sft`. The weights that may move are chosen anew from the gradients of recent steps."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the trainable weights that may move. A short run learns slower with 0.05, the paper's, than with 0.2."""
    refresh_steps: Count = 50
    """Steps between refreshes of the mask. The first ones come sooner: after 1, 2, 4, 8 steps and so on."""
    granularity: Literal["weight", "row"] = "weight"
    """Mask single weights, or whole rows of a parameter."""
    absolute: bool = False
    """Rank by magnitude: that keeps weights predicted to do harm, too."""
    layer_quota: Share = 0.2
    """Share of the budget split equally over the layers."""
    module_quota: Share = 0.2
    """Share of the budget split equally over the kinds of projections."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the moving average of the steps' gradients."""
    lambda_new: NonNegative = 1.0
    """Weight of the target's gradient."""
    lambda_prior: NonNegative = 0.2
    """Weight of the gradient that keeps the anchors' answers as they were; nothing until the model has moved. With
    `anchor_path` only."""
    lambda_answers: NonNegative = 1.0
    """Weight of the gradient of the anchors' loss, which guards from the first mask on: with it the loss of a small
    model on what it guarded never rose above its start, without it by 0.001 to 0.005. With `anchor_path` only."""
    second_order: bool = True
    """Subtract the curvature's term: half the learning rate times Adam's second moment times the mean gradient."""
    anchor_path: Path | None = None
    """JSONL file of samples that show what the model must not lose. A frozen copy of the model is kept to compare with,
    unless `lambda_prior` is 0, and each refresh of the mask costs two more training steps on the anchors."""
    anchors: Count = 16
    """Anchor samples used at a refresh, from the top of the file."""


class SelectionSettings(Section):
    """Which candidates enter an update, how much each counts, where, and which weights may move."""

    draw: Literal["all", "cluster_ucb"] = "all"
    """Which samples get a gradient: `all` in the order they come, or those that a bandit over clusters draws."""
    weigh: Literal["filter_then_weight", "greedy", "top_k", "uniform", "full"] = "filter_then_weight"
    """`filter_then_weight` solves for coefficients; `greedy`, `top_k`, `uniform` and `full` are baselines."""
    route: Literal["none", "gast"] = "none"
    """Which layers a chosen sample updates: all, or those that draw it."""
    mask: Literal["none", "fixed", "dual_sft"] = "none"
    """Which weights may move: all, those of `mask_path`, or those that DualSFT chooses again and again."""
    mask_path: Path | None = None
    """Mask to start from, as `stream-trainer select dual-sft` writes it (`mask.safetensors`)."""
    pool_size: Count = 16
    """Candidates N scored at each step."""
    chosen: Count = 4
    """Samples k that enter an update at most; `full` uses all candidates."""
    survivors: Positive = 2.0
    """The filter keeps at most this many times `chosen` for the quadratic program."""
    min_gain: Share = 0.0
    """Share of an update's utility that each sample must add, or `filter_then_weight` does not train on it. At 0.05
    SmolLM2 trained on a tenth fewer samples, for a target loss 0.003 to 0.009 higher."""
    filter: Literal["first_order", "cosine", "nn_omp"] = "first_order"
    """How survivors are found: `first_order` by utility, `cosine` by direction, `nn_omp` by what is still unmatched."""
    metric: Literal["p_norm", "update", "greats"] = "p_norm"
    """What the update is matched in: `p_norm` (Adam's own), `update` (as vectors), or `greats`."""
    gamma: Positive = 1.0
    """Scale of the utilities under the metric `greats`."""
    normalisation: Literal["mean_one", "natural", "simplex"] = "mean_one"
    """`mean_one` steps as far as plain training does, `natural` as far as the target asks for; or `simplex`."""
    geometry: Literal["exact", "rank_one", "sketch"] = "exact"
    """How utilities and redundancy are computed: `exact`; `rank_one` fits Adam's geometry for the redundancy; `sketch`
    takes utilities from the target's direction at low rank and redundancy from one row in 32 of each matrix, in a
    fraction of the time."""
    sketch_width: Annotated[int, Field(ge=2)] = 16
    """Rank of the target's direction in a matrix, and fewest rows that stand for it, under `geometry: sketch`."""
    ridge: NonNegative = 1e-3
    """Regularisation of the quadratic program, relative to the mean of K's diagonal."""
    max_coefficient: Positive | None = None
    """Cap on a sample's coefficient, in units of the mean coefficient of those chosen without it."""
    settle_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps before Adam's second moment is trusted as geometry; plain inner products until then. Raise it to
    10 or more for a model that starts from random weights."""
    when_none_helps: Literal["skip", "uniform"] = "skip"
    """If no candidate points towards the target: make no update, or take `chosen` at random."""
    solver_time_limit_s: Positive = 1.0
    """Seconds the solver may take before the fallback runs."""
    cluster_ucb: ClusterUcbSettings = ClusterUcbSettings()
    gast: GastSettings = GastSettings()
    dual_sft: DualSftSettings = DualSftSettings()

    @property
    def needs_target(self) -> bool:
        """Whether any stage asks for the target's gradient."""
        steered = self.weigh in ("filter_then_weight", "greedy", "top_k")
        return steered or self.draw == "cluster_ucb" or self.route == "gast" or self.mask == "dual_sft"

    @property
    def largest_take(self) -> tuple[str, int]:
        """The setting that says how many samples must fit the buffer at once, and its value."""
        if self.draw == "cluster_ucb":
            return "selection.cluster_ucb.waiting", self.cluster_ucb.waiting
        return "selection.pool_size", self.pool_size

    @model_validator(mode="after")
    def _chosen_from_pool(self) -> Self:
        if self.chosen > self.pool_size:
            raise ValueError(
                f"chosen={self.chosen} is more than pool_size={self.pool_size}; lower chosen or raise pool_size"
            )
        if self.survivors < 1:
            raise ValueError(f"survivors={self.survivors} would leave fewer than chosen; set it to 1 or more")
        return self

    @model_validator(mode="after")
    def _sketches_suit(self) -> Self:
        if self.geometry == "sketch" and self.metric != "p_norm":
            raise ValueError(
                f"geometry=sketch knows the metric p_norm only, not {self.metric}; set metric=p_norm or geometry=exact"
            )
        return self

    @model_validator(mode="after")
    def _draws_fit(self) -> Self:
        if self.draw != "cluster_ucb":
            return self
        bandit = self.cluster_ucb
        if self.weigh == "uniform":
            raise ValueError(
                "draw=cluster_ucb and weigh=uniform both decide what gets a gradient; set weigh=full to train on all "
                "that is drawn, or draw=all"
            )
        if bandit.intake < self.pool_size:
            raise ValueError(
                f"cluster_ucb.intake={bandit.intake} is less than the pool_size={self.pool_size} that each step draws; "
                f"raise it to {self.pool_size} or more"
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
