"""Selection once and offline: the best samples of a pool, and the parameters to train, before any training.

Both functions read a pool by index, so that it need not fit in memory: `Pool`. Batches of a data loader do as well.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch, join
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.draw.cluster_ucb_offline import OfflineOptions, select_offline
from gradient_selectors.draw.clusters import cosine_k_means
from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.mask.dual_sft import Response, adam_curvature, column_scores, direction, row_scores
from gradient_selectors.mask.rule import MaskRule, choose_mask
from gradient_selectors.mask.self_distillation import prior_gradient
from gradient_selectors.preconditioner import plain
from gradient_selectors.target import mean_gradient

Batches = Iterable[Batch | Mapping[str, Any]]
Progress = Callable[[str, int, int], None]
"""Told of a phase, what was done of it since the last time, and how much there is in all."""

BATCH = 16  # samples in one pass of DualSFT, and in one update of its warm-up
ANCHORS = 0.02  # share of the pool whose answers are to be kept
SCORED_TOGETHER = 8  # samples in one pass of ClusterUCB, and draws between two looks at the rewards
FEATURES_TOGETHER = 1024  # samples read at a time for their features
SAMPLES_PER_CLUSTER = 200  # for the default number of clusters
MAX_CLUSTERS = 500


@runtime_checkable
class Pool(Protocol):
    """Samples that are read by index.

    Attributes:
        lengths: tokens of each.
    """

    @property
    def lengths(self) -> Sequence[int]: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of the samples, in the order given."""


@dataclass(frozen=True)
class _InMemory:
    samples: Sequence[Batch]

    @property
    def lengths(self) -> Sequence[int]:
        return [sample.lengths[0] for sample in self.samples]

    def batch(self, indices: Sequence[int]) -> Batch:
        return join([self.samples[i] for i in indices])


@dataclass(frozen=True)
class DualSftSelection:
    """What `select_dual_sft` found.

    Attributes:
        mask: true where a parameter may move, bool by parameter name: `MaskedAdamW.replace_mask` takes it.
        scores_N: score of each sample, float64; NaN where its loss is not finite.
        selected: the best samples, best first.
    """

    mask: dict[str, Tensor]
    scores_N: Tensor
    selected: tuple[int, ...]


@dataclass(frozen=True)
class ClusterUcbSelection:
    """What `select_cluster_ucb` found.

    Attributes:
        drawn_n: samples that were scored, in the order they were drawn, int64.
        scores_n: their scores, float64; NaN where a sample has no usable gradient.
        selected: the best of them, best first.
    """

    drawn_n: Tensor
    scores_n: Tensor
    selected: tuple[int, ...]


def select_dual_sft(
    model: nn.Module,
    pool: Pool | Batches,
    target: Batches,
    *,
    share: float = 0.10,
    rule: MaskRule | None = None,
    learning_rate: float = 2e-5,
    warm_up: float = 0.10,
    lambda_prior: float = 0.2,
    autocast: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> DualSftSelection:
    """The one-shot use of DualSFT (arXiv 2605.06166): which parameters to train, and on which samples.

    In the order of the released code: a short warm-up on the share `warm_up` of the pool, which gives Adam's second
    moment as curvature; the target's gradient; a self-distillation gradient against the model before the warm-up, on a
    random 2 % of the pool; one pass over the pool for its mean gradient, one for the score of each sample. The model is
    as it was afterwards.

    Examples:
        >>> from gradient_selectors import MaskRule, select_dual_sft
        >>> from gradient_selectors.examples import tiny_batch, tiny_model
        >>> found = select_dual_sft(
        ...     tiny_model(), [tiny_batch(20)], [tiny_batch(seed=1)], share=0.25, rule=MaskRule(density=0.1)
        ... )
        >>> len(found.selected), len(found.scores_N)
        (5, 20)

    `rule` says how the mask is chosen; 5 % of the parameters by default. Raises UnsupportedParameterError for a
    parameter that is not covered exactly, ValueError if the pool's gradient is not finite.
    """
    samples = _as_pool(pool)
    before = copy.deepcopy(model).requires_grad_(False) if warm_up else None
    teacher = before if lambda_prior else None  # without a warm-up the prior gradient is zero
    capture = GradientCapture(model, autocast)
    passes = _Passes(capture, samples, _or_new(generator), progress or _no_progress)
    try:
        curvature = adam_curvature(_warm_up(passes, warm_up, learning_rate), capture.parameters)
        mean, usable = _pool_gradient(passes)
        new = mean_gradient(capture, [Batch.of(batch) for batch in target])
        prior = None if teacher is None else _prior(passes, teacher, usable)
        u = direction(Response(learning_rate, lambda_prior=lambda_prior), mean, new, prior, curvature)
        mask = choose_mask(column_scores(u, mean), rule or MaskRule(density=0.05))
        scores_N = _sample_scores(passes, u)
    finally:
        capture.close()
        if before is not None:
            model.load_state_dict(before.state_dict())
    count = max(1, round(share * len(scores_N)))
    return DualSftSelection(mask, scores_N, tuple(_best(scores_N, count)))


def select_cluster_ucb(
    model: nn.Module,
    pool: Pool | Batches,
    target: Batches,
    *,
    budget: float = 0.20,
    share: float = 0.05,
    clusters: int | None = None,
    beta: float = 1.0,
    autocast: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> ClusterUcbSelection:
    """The best few percent of a pool, for the gradients of a fifth of it: ClusterUCB (arXiv 2506.10288).

    The reward of a sample is the cosine between its gradient and the target set's mean gradient, at the model as it is
    given: `<g_i, G> / (||g_i|| ||G||)`, exact over all trainable parameters. The paper takes the cosine between the
    projected *Adam direction* of a sample after a warm-up and the projected gradient of each target example, and of
    those the mean within and the maximum over subtasks; there is one target set here, nothing has been trained yet, and
    nothing is projected. Both divide by the gradient's length, without which short samples win. Clusters are those of
    mean input embeddings; the paper's are of gradients, which costs one pass over the pool before the bandit saves any.

    Examples:
        >>> from gradient_selectors import select_cluster_ucb
        >>> from gradient_selectors.examples import tiny_batch, tiny_model
        >>> found = select_cluster_ucb(
        ...     tiny_model(), [tiny_batch(40)], [tiny_batch(seed=1)], budget=0.5, share=0.1, clusters=4
        ... )
        >>> len(found.drawn_n), len(found.selected)
        (20, 4)

    `clusters`: arms; one for every 200 samples by default. Raises UnsupportedParameterError for a parameter that is not
    covered exactly, ValueError if shares leave nothing to select or the target's gradient has no length.
    """
    samples = _as_pool(pool)
    total = len(samples.lengths)
    if share > budget:
        raise ValueError(f"share={share:g} is more than budget={budget:g}; raise budget")
    if math.floor(share * total + 1e-9) == 0:
        raise ValueError(f"share={share:g} of {total} samples is none; raise it")
    generator, progress = _or_new(generator), progress or _no_progress
    capture = GradientCapture(model, autocast)
    try:
        towards = _unit_gradient(mean_gradient(capture, [Batch.of(batch) for batch in target]))
        features_Nd = _features(samples, EmbeddingFeatures.of_model(model))
        num_clusters = clusters or min(MAX_CLUSTERS, max(2, total // SAMPLES_PER_CLUSTER))
        labels_N = cosine_k_means(features_Nd, num_clusters, generator).labels_N
        options = OfflineOptions(budget, share, beta, pulls=SCORED_TOGETHER)
        num_scored = math.floor(budget * total + 1e-9)

        def reward(indices_n: Tensor) -> Tensor:
            return _cosines(capture, towards, samples, indices_n.tolist(), lambda n: progress("scoring", n, num_scored))

        found = select_offline(labels_N, reward, options, generator)
    finally:
        capture.close()
    return ClusterUcbSelection(found.drawn_n, found.rewards_n, found.selected)


@dataclass(frozen=True)
class _Passes:
    """What DualSFT's passes over a pool work with."""

    capture: GradientCapture
    pool: Pool
    generator: torch.Generator
    progress: Progress

    def over(self, phase: str, indices: Sequence[int]) -> Iterator[tuple[list[int], PoolGradients]]:
        """Gradients of some samples, batch by batch."""
        for start in range(0, len(indices), BATCH):
            members = list(indices[start : start + BATCH])
            yield members, self.capture.run(self.pool.batch(members))
            self.progress(phase, len(members), len(indices))

    def draw(self, share: float, among: Sequence[int]) -> list[int]:
        """A random share of some samples, at least one."""
        count = max(1, round(share * len(among)))
        return [among[i] for i in torch.randperm(len(among), generator=self.generator)[:count].tolist()]

    @property
    def by_length(self) -> list[int]:
        """The whole pool, similar lengths together so that little is padding."""
        lengths = self.pool.lengths
        return sorted(range(len(lengths)), key=lambda index: lengths[index])


def _warm_up(passes: _Passes, share: float, learning_rate: float) -> torch.optim.Optimizer:
    """Train on a random share of the pool, for the sake of the optimizer's second moment. Changes the model."""
    parameters = passes.capture.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    drawn = passes.draw(share, range(len(passes.pool.lengths))) if share else []
    for _, gradients in passes.over("warming up", drawn):
        finite_N = torch.isfinite(gradients.losses_N).float()
        for name in gradients.factors:
            parameters[name].grad = gradients.weighted_gradient_of(name, finite_N / finite_N.sum().clamp(min=1))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _pool_gradient(passes: _Passes) -> tuple[Gradient, list[int]]:
    """Mean gradient of the samples whose loss is finite, every trainable parameter in it, and which they are."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in passes.capture.parameters.items()}
    usable: list[int] = []
    for members, gradients in passes.over("adding gradients", passes.by_length):
        finite_N = torch.isfinite(gradients.losses_N)
        usable += [index for index, finite in zip(members, finite_N.tolist(), strict=True) if finite]
        for name in gradients.factors:
            total[name].add_(gradients.weighted_gradient_of(name, finite_N.float()))
    if not usable or not all(bool(values.isfinite().all()) for values in total.values()):
        raise ValueError("the gradient of the pool is not finite; lower the learning rate, or set the warm-up to 0")
    return {name: values.div_(len(usable)) for name, values in total.items()}, usable


def _prior(passes: _Passes, teacher: nn.Module, usable: Sequence[int]) -> Gradient:
    anchors = passes.draw(ANCHORS, usable)
    starts = range(0, len(anchors), BATCH)
    return prior_gradient(passes.capture, teacher, (passes.pool.batch(anchors[i : i + BATCH]) for i in starts))


def _sample_scores(passes: _Passes, u: Gradient) -> Tensor:
    scores_N = torch.full((len(passes.pool.lengths),), math.nan, dtype=torch.float64)
    for members, gradients in passes.over("scoring samples", passes.by_length):
        found_n = torch.where(torch.isfinite(gradients.losses_N), row_scores(gradients, u), torch.nan)
        scores_N[members] = found_n.double().cpu()
    return scores_N


def _cosines(
    capture: GradientCapture, towards: Gradient, pool: Pool, indices: Sequence[int], done: Callable[[int], None]
) -> Tensor:
    """Cosine of each sample's gradient with the target's, (n,) float64; NaN where there is no gradient."""
    lengths = pool.lengths
    cosines_n = torch.empty(len(indices), dtype=torch.float64)
    by_length = sorted(range(len(indices)), key=lambda i: lengths[indices[i]])
    for start in range(0, len(by_length), SCORED_TOGETHER):
        positions = by_length[start : start + SCORED_TOGETHER]
        gradients = capture.run(pool.batch([indices[i] for i in positions]))
        dots_N = torch.stack(list(gradients.dots(towards).values())).sum(0).double()
        lengths_N = gradients.gram(range(len(positions)), plain).diagonal().sqrt()
        cosines_n[positions] = (dots_N / lengths_N).cpu()
        done(len(positions))
    return cosines_n


def _unit_gradient(gradient: Gradient) -> Gradient:
    length = math.sqrt(sum(float(values.double().square().sum()) for values in gradient.values()))
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"the target's gradient has length {length}; give samples that the model can learn from")
    return {name: values / length for name, values in gradient.items()}


def _features(pool: Pool, features: EmbeddingFeatures) -> Tensor:
    total = len(pool.lengths)
    starts = range(0, total, FEATURES_TOGETHER)
    chunks = (pool.batch(range(start, min(start + FEATURES_TOGETHER, total))) for start in starts)
    return torch.cat([features([sample.input_ids_NT[0].tolist() for sample in chunk.samples()]) for chunk in chunks])


def _best(scores_N: Tensor, count: int) -> list[int]:
    finite = [i for i in range(len(scores_N)) if math.isfinite(scores_N[i])]
    return sorted(finite, key=lambda i: -float(scores_N[i]))[:count]


def _as_pool(pool: Pool | Batches) -> Pool:
    if isinstance(pool, Pool):
        return pool
    return _InMemory([sample for batch in pool for sample in Batch.of(batch).samples()])


def _or_new(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _no_progress(phase: str, count: int, total: int) -> None:
    """Tell nobody."""
