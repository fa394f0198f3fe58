"""What a step did, as metrics."""

import time
from collections.abc import Iterable, Sequence

from gradient_selectors.capture.gradients import layer_of
from gradient_selectors.mask.masked_adamw import MaskedAdamW

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Sample
from stream_trainer.training.pools import ByClusters, Draws
from stream_trainer.training.step import Learner, StepReport


def observe_step(
    metrics: Metrics,
    pool: Sequence[Sample],
    undrawn: Sequence[Sample],
    report: StepReport,
    waited: float,
    seconds: float,
) -> None:
    """Export what a step did with its pool, and with the samples that left undrawn beside it."""
    metrics.steps.labels(report.result).inc()
    metrics.step_seconds.observe(seconds)
    metrics.last_step.set_to_current_time()
    metrics.phase_seconds.labels("wait").inc(waited)
    for phase, spent in report.seconds.items():
        metrics.phase_seconds.labels(phase).inc(spent)
    metrics.tokens_scored.inc(sum(pool[i].num_tokens for i in report.candidates))
    metrics.tokens_trained.inc(sum(pool[i].num_tokens for i in report.chosen))
    metrics.loss.set(sum(report.losses) / len(report.losses))
    chosen = [loss for loss, weight in zip(report.losses, report.weights, strict=True) if weight > 0]
    if chosen:
        metrics.trained_loss.set(sum(chosen) / len(chosen))
        metrics.gradient_norm.set(report.gradient_norm)
        metrics.learning_rate.set(report.learning_rate)
    metrics.selected_ratio.set(len(chosen) / len(pool))
    metrics.target_refreshes.inc(int(report.target_refreshed))
    _observe_ages(metrics, (*pool, *undrawn))
    _observe_decision(metrics, report)


def _observe_ages(metrics: Metrics, decided: Iterable[Sample]) -> None:
    now = time.time()
    for sample in decided:
        if sample.timestamp is not None:
            metrics.sample_age.observe(max(0.0, now - sample.timestamp))


def _observe_decision(metrics: Metrics, report: StepReport) -> None:
    decision = report.decision
    metrics.effective_samples.set(decision.effective_samples)
    if decision.num_positive is not None:
        metrics.positive_ratio.set(decision.num_positive / len(report.candidates))
    if decision.redundancy is not None:
        metrics.redundancy_ratio.set(decision.redundancy)
    if decision.solver is not None:
        metrics.solver_seconds.observe(decision.solver.seconds)
        metrics.solver_runs.labels(decision.solver.status).inc()


def observe_stages(metrics: Metrics, learner: Learner, draws: Draws, report: StepReport) -> None:
    """Export the health of the stages that draw, route and mask, where they are on."""
    if isinstance(draws, ByClusters):
        metrics.waiting_records.set(draws.waiting)
        for arm, mean in enumerate(draws.bandit.moments.means_K.tolist()):
            metrics.arm_reward.labels(str(arm)).set(mean)
        for arm in draws.last_arms:
            metrics.arm_draws.labels(str(arm)).inc()
    if report.decision.route_entropy_L is not None:
        for layer, entropy in zip(layers_of(learner), report.decision.route_entropy_L.tolist(), strict=True):
            metrics.route_entropy.labels(layer).set(entropy)
    if isinstance(learner.optimizer, MaskedAdamW):
        metrics.mask_density.set(learner.optimizer.density)
    if learner.masking is not None:
        metrics.mask_age.set(learner.masking.age)
        if report.mask_refreshed and learner.masking.last is not None:
            metrics.mask_refreshes.inc()
            metrics.mask_churn.set(learner.masking.last.churn)


def expect_layers(metrics: Metrics, learner: Learner) -> None:
    """Create the series of the layers that draw, for an alert on an absent series never fires."""
    if learner.selection.route == "gast":
        for layer in layers_of(learner):
            metrics.route_entropy.labels(layer)


def layers_of(learner: Learner) -> list[str]:
    """The layers that hold trainable parameters, in the order of a decision's rows."""
    return list(dict.fromkeys(layer_of(name) for name in learner.capture.parameters))
