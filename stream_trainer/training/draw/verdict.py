"""What a step tells of whether selection pays: noted, exported, and said once each time that the answer changes."""

import logging

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.training.draw.paying import Paying, Shadows, comparison_of
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.shadow import Effects
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watchers

logger = logging.getLogger(__name__)


def note_advantage(
    paying: Paying, sampler: PoolSampler, report: StepReport, step: int, metrics: Metrics, watchers: Watchers
) -> None:
    """Take note of what a step compared, if it did."""
    found, changes = comparison_of(sampler, report), False
    if found is not None:
        changes = paying.note(found)
        metrics.comparisons.inc()
    if paying.shadows is not None and report.effects is not None:
        _note_effects(paying.shadows, report.effects, step, metrics, watchers)
        changes |= paying.judge()
    if found is not None or report.effects is not None:
        observe_advantage(metrics, paying)
    if changes:
        known = "predicted" if paying.measured_advantage is None else "measured"
        why = f"an update of selection is worth {paying.advantage:.2f} uniform ones ({known})"
        text = f"selection {'pays again' if paying.pays else 'does not pay'}: {why}"
        logger.warning("%s", text)
        watchers.event(step, "selection_pays" if paying.pays else "selection_does_not_pay", text)


def _note_effects(shadows: Shadows, found: Effects, step: int, metrics: Metrics, watchers: Watchers) -> None:
    if found.chosen is None or found.uniform is None:
        metrics.shadow.shadows.labels("failed").inc()
        return
    metrics.shadow.shadows.labels("measured").inc()
    if shadows.note(found.chosen, found.uniform):
        better, foretold = ("chance", "selection") if shadows.measured.direction < 0 else ("selection", "chance")
        text = f"an update of {better} lowers the loss on the held-back target more, where {foretold} was predicted to"
        logger.warning("%s", text)
        watchers.event(step, "shadow_disagrees", text)


def observe_advantage(metrics: Metrics, paying: Paying) -> None:
    """Export whether selection pays, as far as it is known."""
    if paying.agreement is not None:
        metrics.target_agreement.set(paying.agreement)
    if paying.predicted.advantage is not None:
        metrics.selection_advantage.set(paying.predicted.advantage)
    if paying.measured_advantage is not None:
        metrics.shadow.advantage.set(paying.measured_advantage)
    if paying.pays is not None:
        metrics.pays.set(paying.pays)
    if paying.shadows is None:
        return
    metrics.shadow.disagrees.set(paying.shadows.disagree)
    for kind, sides in (("predicted", paying.shadows.predicted), ("measured", paying.shadows.measured)):
        for side, mean in zip(("chosen", "uniform"), sides.means or (), strict=False):
            metrics.shadow.effect.labels(side, kind).set(mean)
