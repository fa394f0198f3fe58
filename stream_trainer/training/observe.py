"""What a step did, as metrics."""

import time
from collections.abc import Iterable, Sequence

import torch
from gradient_selectors import SelectionEngine
from gradient_selectors.capture.gradients import layer_of
from gradient_selectors.draw.auto import AutoDraw
from gradient_selectors.features.columns import UNSEEN

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Sample
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler, RivalSampler
from stream_trainer.training.step import StepReport


def observe_step(
    metrics: Metrics,
    pool: Sequence[Sample],
    undrawn: Sequence[Sample],
    report: StepReport,
    waited: float,
    seconds: float,
) -> None:
    """Export what a step did with its pool, and with the samples that left without being scored."""
    metrics.steps.inc(1, report.result)
    metrics.step_seconds.observe(seconds)
    metrics.last_step.set(time.time())
    metrics.phase_seconds.inc(waited, "wait")
    for phase, spent in report.seconds.items():
        metrics.phase_seconds.inc(spent, phase)
    metrics.tokens_scored.inc(sum(sample.num_tokens for sample in pool))
    metrics.tokens_trained.inc(sum(pool[i].num_tokens for i in report.selected))
    metrics.loss.set(sum(report.losses) / len(report.losses))
    selected = [report.losses[i] for i in report.selected]
    if selected:
        metrics.trained_loss.set(sum(selected) / len(selected))
        metrics.gradient_norm.set(report.gradient_norm)
        metrics.learning_rate.set(report.learning_rate)
    metrics.selected_ratio.set(len(selected) / len(pool))
    metrics.unselected.inc(len(pool) - len(selected), "low_scored")
    metrics.unselected.inc(len(undrawn), "undrawn")
    if report.target_refreshed:
        metrics.target_refreshes.inc()
    if report.target_refused:
        metrics.target_refusals.inc()
    _observe_ages(metrics, (*pool, *undrawn))
    _observe_decision(metrics, report)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # unlike is_available, at no cost
        metrics.gpu_memory.labels("allocated").set(torch.cuda.memory_allocated())
        metrics.gpu_memory.labels("reserved").set(torch.cuda.memory_reserved())


def _observe_ages(metrics: Metrics, decided: Iterable[Sample]) -> None:
    now = time.time()
    metrics.sample_age.observe(max(0.0, now - sample.timestamp) for sample in decided if sample.timestamp is not None)


def _observe_decision(metrics: Metrics, report: StepReport) -> None:
    decision = report.decision
    metrics.effective_samples.set(decision.effective_samples)
    if decision.num_positive is not None:
        metrics.positive_ratio.set(decision.num_positive / len(report.losses))
    if decision.redundancy is not None:
        metrics.redundancy_ratio.set(decision.redundancy)
    if decision.solver is not None:
        metrics.solver_seconds.observe(decision.solver.seconds)
        metrics.solver_runs.labels(decision.solver.status).inc()


def observe_stages(metrics: Metrics, engine: SelectionEngine, sampler: PoolSampler, report: StepReport) -> None:
    """Export the health of the stages that draw, route and mask, where they are on."""
    _observe_passes(metrics, engine)
    _observe_draw(metrics, sampler, probed=report.utilities is not None)
    if report.decision.route_entropy_L is not None:
        for layer, entropy in zip(layers_of(engine), report.decision.route_entropy_L.tolist(), strict=True):
            metrics.route_entropy.labels(layer).set(entropy)
    if engine.mask is not None:
        metrics.mask_age.set(engine.mask.age)
    if report.mask_change is not None:
        metrics.mask_refreshes.inc()
        metrics.mask_churn.set(report.mask_change.churn)


def _observe_passes(metrics: Metrics, engine: SelectionEngine) -> None:
    found = engine.last
    if found is not None and "score" in found.seconds:
        metrics.pieces.set(found.pieces)
        metrics.padding.set(found.padding)
        metrics.second_passes.inc(found.second_pass_samples)


def _observe_draw(metrics: Metrics, sampler: PoolSampler, *, probed: bool) -> None:
    if isinstance(sampler, BanditSampler | LearnedSampler | RivalSampler):
        metrics.waiting_records.set(sampler.waiting)
    if isinstance(sampler, LearnedSampler):
        _observe_learned(metrics, sampler, probed=probed)
    if isinstance(sampler, BanditSampler):
        for arm, mean in enumerate(sampler.bandit.moments.means_K.tolist()):
            metrics.draws.arm_reward.labels(str(arm)).set(mean)
        for arm in sampler.last_arms:
            metrics.draws.arm_draws.labels(str(arm)).inc()


def _observe_learned(metrics: Metrics, sampler: LearnedSampler, *, probed: bool) -> None:
    if probed:
        metrics.draws.probes.inc()
    if not metrics.draws.learned_due():
        return
    learned = sampler.learned
    if isinstance(sampler.draw, AutoDraw):
        metrics.training_way.state(sampler.draw.way)
        for way, rate in sampler.draw.rates.items():
            metrics.draws.way_rate.labels(way).set(rate)
    metrics.draws.explained.set(learned.explained)
    metrics.draws.probe_interval.set(learned.interval)
    columns = zip(learned.table.names, learned.coefficients_d.tolist(), learned.deviations_d.tolist(), strict=True)
    for name, coefficient, deviation in columns:
        if name.startswith(UNSEEN):
            continue
        metrics.draws.coefficient_deviation.set(deviation, name)
        metrics.draws.coefficient.set(coefficient, name)


def expect_layers(metrics: Metrics, engine: SelectionEngine) -> None:
    """Create the series of the layers that draw, for an alert on an absent series never fires."""
    if engine.route is not None:
        for layer in layers_of(engine):
            metrics.route_entropy.labels(layer)


def layers_of(engine: SelectionEngine) -> list[str]:
    """The layers that hold trainable parameters, in the order of a decision's rows."""
    return list(dict.fromkeys(layer_of(name) for name in engine.capture.parameters))
