"""Report a run to whatever the settings name."""

from collections.abc import Mapping
from contextlib import ExitStack

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.settings.sections.publish import TrackingSettings
from stream_trainer.tracking.otlp import OtlpReporter
from stream_trainer.tracking.reporting import Reporter
from stream_trainer.tracking.scalars import scalars_of
from stream_trainer.tracking.trackers import make_tracker
from stream_trainer.training.watchers import Watcher, Watchers


def track(settings: TrackingSettings, metrics: Metrics, watchers: Watchers, stack: ExitStack) -> None:
    """Report until `stack` ends. Raises SettingsError if a package is missing."""
    trackers = [make_tracker(name, settings) for name in dict.fromkeys(settings.report_to)]
    reporters = [Reporter(tracker, metrics) for tracker in trackers]
    otlp = [OtlpReporter(settings, metrics)] if settings.otlp_url is not None else []
    everyone: list[Reporter | OtlpReporter] = [*reporters, *otlp]
    for one in everyone:
        stack.callback(one.end)

    def on_step(step: int, *_: object) -> None:
        if step % settings.every_steps == 0:
            report(step)
        metrics.degraded.labels("tracking").set(any(one.failing for one in everyone))

    def report(step: int) -> None:
        values = scalars_of(metrics.registry) if reporters else {}
        for reporter in reporters:
            reporter.report(step, values)

    def on_evaluation(step: int, _: Mapping[str, float], __: float) -> None:
        report(step)

    if everyone:
        watchers.all.append(Watcher(on_step=on_step, on_evaluation=on_evaluation))
