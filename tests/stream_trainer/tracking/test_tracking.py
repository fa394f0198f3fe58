"""Figures of a run in trackers and collectors; none of them can stop it."""

import logging
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.settings.sections.publish import TrackingSettings
from stream_trainer.tracking.attach import track
from stream_trainer.tracking.otlp import OtlpReporter
from stream_trainer.tracking.reporting import Reporter
from stream_trainer.tracking.scalars import scalars_of
from stream_trainer.tracking.trackers import Tracker, make_tracker
from stream_trainer.training.watchers import Watchers
from tests.helpers.service import configuration, goods, jsonl, serve_until, wait_for, write_lines
from tests.stream_trainer.publishing.test_hooks import http_server


def nothing() -> None:
    pass


def lost(metrics: Metrics, tracker: str) -> float | None:
    return metrics.registry.get_sample_value("stream_trainer_tracking_failures_total", {"tracker": tracker})


def test_names_are_those_of_the_metrics() -> None:
    metrics = Metrics()
    metrics.loss.set(2.5)
    metrics.evaluation_loss.labels("target").set(1.5)
    metrics.steps.inc(3, "applied")
    metrics.gradient_norm.set(float("nan"))
    found = scalars_of(metrics.registry)
    assert found["progressive_loss"] == 2.5
    assert found["evaluation_loss/target"] == 1.5
    assert found["steps_total/applied"] == 3
    assert "gradient_norm" not in found
    assert not [name for name in found if name.startswith(("process_", "python_", "step_seconds", "state"))]


def test_tensorboard_has_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_lines(tmp_path / "stream.jsonl", goods(40))
    tracking = {"report_to": ["tensorboard"], "every_steps": 2, "tensorboard_dir": str(tmp_path / "runs")}
    config = configuration(tmp_path, jsonl(tmp_path / "stream.jsonl"), tracking=tracking)
    summary, steps = serve_until(config)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("progressive_loss")}
    even = [step for step in steps if step.number % 2 == 0]
    assert even
    for step in even:
        assert losses[step.number] == pytest.approx(sum(step.losses) / len(step.losses), rel=1e-5)
    assert events.Scalars("evaluation_loss/target")[-1].value == pytest.approx(summary.losses["target"], rel=1e-5)


def fake_wandb(calls: list[tuple[Any, ...]]) -> Any:
    module = ModuleType("wandb")

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
        )

    module.__dict__["init"] = init
    return module


def test_weights_and_biases_gets_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    reporter = Reporter(make_tracker("wandb", TrackingSettings(name="first")), Metrics())
    reporter.report(10, {"progressive_loss": 2.5})
    reporter.report(20, {"progressive_loss": 2.0})
    reporter.end()
    assert calls == [
        ("init", {"project": "stream-trainer", "name": "first"}),
        ("log", 10, {"progressive_loss": 2.5}),
        ("log", 20, {"progressive_loss": 2.0}),
        ("finish",),
    ]


def test_mlflow_gets_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with the calls that MLflow's client has; it is too large to be installed for tests."""
    calls: list[tuple[Any, ...]] = []

    class Client:
        def __init__(self, uri: str | None) -> None:
            calls.append(("client", uri))

        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("experiment", name))

        def create_experiment(self, name: str) -> str:
            return f"id of {name}"

        def create_run(self, experiment: str, run_name: str | None) -> Any:
            calls.append(("run", experiment, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="run"))

        def log_batch(self, run: str, metrics: list[Any]) -> None:
            calls.append(("log", run, len(metrics), metrics[0].key, metrics[0].step))

        def set_terminated(self, run: str) -> None:
            calls.append(("end", run))

    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

    for name, content in (("mlflow", {"MlflowClient": Client}), ("mlflow.entities", {"Metric": metric})):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    uri = f"file://{tmp_path}/mlruns"
    reporter = Reporter(make_tracker("mlflow", TrackingSettings(mlflow_uri=uri)), Metrics())
    reporter.report(10, {f"loss/{number}": 1.0 for number in range(1001)})
    reporter.end()
    assert calls == [
        ("client", uri),
        ("experiment", "stream-trainer"),
        ("run", "id of stream-trainer", None),
        ("log", "run", 1000, "loss/0", 10),
        ("log", "run", 1, "loss/1000", 10),
        ("end", "run"),
    ]


def test_a_tracker_that_raises_is_logged_once_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    metrics, written, fails = Metrics(), list[int](), [True]

    def write(step: int, _: Mapping[str, float]) -> None:
        if fails[0]:
            raise RuntimeError("no such server\nmore of it")
        written.append(step)

    reporter = Reporter(Tracker("wandb", write, nothing), metrics)
    for step in range(3):
        reporter.report(step, {})
    wait_for(lambda: lost(metrics, "wandb") == 3)
    assert reporter.failing
    fails[0] = False
    reporter.report(3, {})
    wait_for(lambda: not reporter.failing)
    reporter.end()
    assert written == [3]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["tracker wandb fails (RuntimeError: no such server); training goes on without its figures"]


def test_a_tracker_that_hangs_holds_nobody_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_trainer.tracking.reporting.STOP_WAIT_S", 0.1)
    metrics, entered, go = Metrics(), threading.Event(), threading.Event()

    def write(*_: object) -> None:
        entered.set()
        go.wait(60)

    reporter = Reporter(Tracker("mlflow", write, nothing), metrics, hangs_s=0.0)
    reporter.report(1, {})
    assert entered.wait(60)
    for step in range(200):
        reporter.report(step, {})
    assert reporter.failing
    assert lost(metrics, "mlflow") == 200
    reporter.end()
    go.set()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "tracker mlflow fails (it has not answered for 0 s); training goes on without its figures",
        "tracker mlflow does not finish and is given up",
    ]


def test_a_run_goes_on_without_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise OSError("no network")

    module = ModuleType("wandb")
    module.__dict__["init"] = broken
    monkeypatch.setitem(sys.modules, "wandb", module)
    write_lines(tmp_path / "stream.jsonl", goods(24))
    config = configuration(tmp_path, jsonl(tmp_path / "stream.jsonl"), tracking={"report_to": ["wandb"]})
    summary, _ = serve_until(config)
    assert summary.step == 3


def test_steps_are_reported_every_so_often_and_a_failure_shows_as_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    module, metrics, watchers = fake_wandb(calls), Metrics(), Watchers()
    monkeypatch.setitem(sys.modules, "wandb", module)

    def degraded() -> float | None:
        watchers.step(1, (), None)  # type: ignore[arg-type]
        return metrics.registry.get_sample_value("stream_trainer_degraded", {"cause": "tracking"})

    with ExitStack() as stack:
        working, module.init = module.init, None
        track(TrackingSettings(report_to=("wandb",), every_steps=5), metrics, watchers, stack)
        watchers.evaluation(0, {"target": 1.0}, 0.1)
        wait_for(lambda: degraded() == 1)
        module.init = working
        for step in range(1, 11):
            watchers.step(step, (), None)  # type: ignore[arg-type]
        watchers.evaluation(11, {"target": 1.0}, 0.1)
        wait_for(lambda: degraded() == 0)
    assert [call[1] for call in calls if call[0] == "log"] == [5, 10, 11]
    assert calls[-1] == ("finish",)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_one_line_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(SettingsError) as caught:
        make_tracker(name, TrackingSettings())
    assert str(caught.value).startswith(f"tracking.report_to={name} needs a package that is missing")
    assert str(caught.value).endswith(f"pip install 'stream-trainer[{name}]'")
    assert caught.value.exit_code == 2


def test_a_collector_gets_all_metrics_with_their_histograms() -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    metrics = Metrics()
    metrics.loss.set(2.5)
    metrics.steps.inc(3, "applied")
    for seconds in (0.01, 0.2, 0.2, 1000.0):
        metrics.step_seconds.observe(seconds)
    with http_server(lambda _, __: (200, {})) as (url, asked):
        settings = TrackingSettings(otlp_url=f"{url}/v1/metrics", otlp_every_s=600)
        reporter = OtlpReporter(settings, metrics)
        reporter.end()  # which sends once more
    ((page, _, body),) = asked
    assert page == "/v1/metrics"
    request = ExportMetricsServiceRequest.FromString(body)
    (scope,) = request.resource_metrics[0].scope_metrics
    found = {metric.name: metric for metric in scope.metrics}
    attributes = {a.key: a.value.string_value for a in request.resource_metrics[0].resource.attributes}
    assert attributes["service.name"] == "stream-trainer"
    assert found["stream_trainer_progressive_loss"].gauge.data_points[0].as_double == 2.5
    steps = found["stream_trainer_steps"].sum
    assert steps.is_monotonic
    by_result = {point.attributes[0].value.string_value: point.as_double for point in steps.data_points}
    assert by_result["applied"] == 3
    assert steps.data_points[0].start_time_unix_nano > 0
    (point,) = found["stream_trainer_step_seconds"].histogram.data_points
    assert (point.count, point.sum) == (4, pytest.approx(1000.41))
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    assert sum(point.bucket_counts) == 4
    at = dict(zip(point.explicit_bounds, point.bucket_counts, strict=False))
    assert (at[0.05], at[0.1], at[0.25]) == (1, 0, 2)
    assert point.bucket_counts[-1] == 1


@pytest.mark.slow
def test_a_collector_that_is_away_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with http_server(lambda _, __: (200, {})) as (url, _):
        pass
    metrics = Metrics()
    with caplog.at_level(logging.WARNING):
        reporter = OtlpReporter(TrackingSettings(otlp_url=url, otlp_every_s=0.05), metrics)
        wait_for(lambda: (lost(metrics, "otlp") or 0) >= 2)
        reporter.end()
    assert reporter.failing
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("stream_trainer")]
    assert len(ours) == 1
    assert ours[0].startswith("OTLP fails (")
    assert ours[0].endswith("; training goes on without its figures")
