"""What the HTTP server shows of a run: its health, and the report of its page."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from stream_trainer.errors import FencedError, TrainingError
from stream_trainer.monitoring.metrics import DEGRADED_CAUSES, Metrics, State
from stream_trainer.settings.schema import Settings
from stream_trainer.training.failing import Failing
from stream_trainer.training.status import OUTAGE_GRACE_S, Status
from stream_trainer.training.trainer import Trainer
from tests.helpers.service import configuration, jsonl


def settings_of(folder: Path) -> Settings:
    return Settings(**configuration(folder, jsonl(folder / "samples.jsonl")))


@pytest.mark.parametrize(
    ("state", "idle_s", "silent_s", "alive", "detail"),
    [
        (State.TRAINING, 600 + 59, 0, True, ""),
        (State.TRAINING, 600 + 61, 0, True, "no progress for 601 s"),
        (State.IDLE, 10**6, 599, True, ""),
        (State.IDLE, 10**6, 601, True, "reading hangs since 601 s"),
        (State.DRAINING, 0, 10**6, False, ""),
    ],
)
def test_health_tells_of_steps_and_of_reading_that_do_not_come(
    state: State, idle_s: float, silent_s: float, alive: bool, detail: str, tmp_path: Path
) -> None:
    """With `stall_s` 600 and `buffer.wait_s` 60."""
    status, now = Status(settings_of(tmp_path), Metrics()), time.monotonic()
    ingest = SimpleNamespace(alive=alive, last_turn=now - silent_s, away="", unreachable_since=None)
    recovery, saver = SimpleNamespace(trouble=""), SimpleNamespace(failing=None)
    trainer = SimpleNamespace(state=state, last_progress=now - idle_s, ingest=ingest, recovery=recovery, saver=saver)
    status.trainer = cast(Trainer, trainer)
    health = status.health()
    assert health.ok == (not detail)
    assert health.health == ("stuck" if detail else "healthy")
    assert health.detail.startswith(detail)
    recovery.trouble = "went back to step 3"
    assert status.health().ok == health.ok
    assert status.health().detail == (health.detail or "went back to step 3")


def test_while_the_brokers_are_away_it_is_well_and_not_ready(tmp_path: Path) -> None:
    status, now = Status(settings_of(tmp_path), Metrics()), time.monotonic()
    ingest = SimpleNamespace(alive=True, last_turn=now, away="nobody answers", unreachable_since=now - 59)
    status.trainer = cast(Trainer, SimpleNamespace(state=State.IDLE, last_progress=now, ingest=ingest))
    health = status.health()
    assert (health.ok, health.ready, health.detail) == (True, False, "waiting for the stream: nobody answers")
    assert health.health == "starting"
    ingest.unreachable_since = now - 61
    assert status.health().health == "degraded"


def test_while_the_model_is_loaded_it_is_well_and_not_ready(tmp_path: Path) -> None:
    status = Status(settings_of(tmp_path), Metrics())
    health, report = status.health(), status.report()
    assert (health.state, health.ok, health.ready, health.health) == ("loading", True, False, "starting")
    assert (report["state"], report["selection"]) == ("loading", "all, filter_then_weight")
    assert "step" not in report


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (TrainingError("optimizer.learning_rate=9: lower it"), "optimizer.learning_rate=9: lower it"),
        (ValueError("what a record said"), "the service failed; see its log"),
    ],
)
def test_a_service_that_failed_is_neither_well_nor_ready(error: Exception, detail: str, tmp_path: Path) -> None:
    metrics = Metrics()
    status = Status(settings_of(tmp_path), metrics)
    status.fail(error)
    health = status.health()
    assert (health.state, health.ok, health.ready, health.detail) == ("failed", False, False, detail)
    assert health.health == "stuck"
    assert metrics.registry.get_sample_value("stream_trainer_fenced") == 0
    assert metrics.registry.get_sample_value("stream_trainer_state", {"stream_trainer_state": "failed"}) == 1


def running(status: Status, state: State = State.TRAINING) -> SimpleNamespace:
    """A trainer at work, which the status shows."""
    now = time.monotonic()
    trainer = SimpleNamespace(
        state=state,
        last_progress=now,
        ingest=SimpleNamespace(alive=True, last_turn=now, away="", unreachable_since=None),
        recovery=SimpleNamespace(trouble=""),
        saver=SimpleNamespace(failing=None),
    )
    status.trainer = cast(Trainer, trainer)
    return trainer


@pytest.mark.parametrize("cause", DEGRADED_CAUSES)
def test_what_fails_beside_training_degrades_and_recovers(cause: str, tmp_path: Path) -> None:
    metrics = Metrics()
    status = Status(settings_of(tmp_path), metrics)
    running(status)
    assert status.health().health == "healthy"
    metrics.degraded.labels(cause).set(1)
    health = status.health()
    assert (health.health, health.ok, health.ready) == ("degraded", True, True)
    assert health.detail == f"{cause} fails; the log says why"
    metrics.degraded.labels(cause).set(0)
    assert (status.health().health, status.health().detail) == ("healthy", "")


def test_checkpoints_that_fail_degrade_and_recover(tmp_path: Path) -> None:
    status = Status(settings_of(tmp_path), Metrics())
    trainer = running(status)
    trainer.saver.failing = Failing("disk full", time.monotonic() - 5, 1, 0)
    assert (status.health().health, status.health().detail) == ("degraded", "fails for 5 s: disk full")
    trainer.saver.failing = None
    assert status.health().health == "healthy"


def test_a_broker_that_is_restarted_changes_nothing_and_one_that_stays_away_degrades(tmp_path: Path) -> None:
    status = Status(settings_of(tmp_path), Metrics())
    trainer = running(status)
    trainer.ingest.unreachable_since = time.monotonic() - OUTAGE_GRACE_S + 20
    assert (status.health().health, status.health().ready) == ("healthy", True)
    assert "cannot be read for 40 s" in status.health().detail
    trainer.ingest.unreachable_since = time.monotonic() - OUTAGE_GRACE_S - 1
    assert (status.health().health, status.health().ok, status.health().ready) == ("degraded", True, True)
    trainer.ingest.unreachable_since = None
    assert (status.health().health, status.health().detail) == ("healthy", "")


def test_a_trainer_that_has_not_begun_to_read_is_starting(tmp_path: Path) -> None:
    status = Status(settings_of(tmp_path), Metrics())
    running(status, State.LOADING)
    assert (status.health().health, status.health().ready) == ("starting", False)


def test_a_trainer_that_was_taken_over_shows_it(tmp_path: Path) -> None:
    metrics = Metrics()
    status = Status(settings_of(tmp_path), metrics)
    status.fail(FencedError("taken over"))
    assert metrics.registry.get_sample_value("stream_trainer_fenced") == 1
    assert status.health().health == "stuck"
