"""What evaluations lead to: a model that gets worse goes back, one that cannot be evaluated trains on."""

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.target import mean_loss

from stream_trainer.errors import TrainingError
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training import evaluations
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    checkpoints,
    configuration,
    counts,
    get,
    goods,
    hashes,
    jsonl,
    metrics,
    on_free_port,
    run_main,
    serve_until,
    serve_with_crashes,
    trainer_json,
    write_lines,
)

DIVERGING = {"learning_rate": 5.0}  # losses rise and stay finite
ONE_ROLLBACK_MENDS_IT = {"rollback_learning_rate_factor": 2e-4, "seed": 5, "threads": 1}
DEGRADED = 'degraded{cause="evaluation"}'


def config_of(folder: Path, records: int = 120, **sections: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_lines(folder / "samples.jsonl", goods(records))
    base: dict[str, dict[str, Any]] = {
        "evaluation": {"every_steps": 4},
        "checkpoint": {"dir": str(folder / "c"), "every_steps": 3, "keep": 2},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return configuration(folder, jsonl(folder / "samples.jsonl"), **merged)


# A model that gets worse


def test_a_model_that_gets_worse_goes_back_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = {"every_steps": 1000}
    config = on_free_port(
        config_of(tmp_path, optimizer=DIVERGING, training=ONE_ROLLBACK_MENDS_IT, checkpoint=checkpoint)
    )
    shown: dict[int, tuple[float, str]] = {}
    losses: dict[int, float] = {}

    def on_step(number: int, *_: object) -> None:
        shown[number] = metrics(config)["rollbacks_total"], json.loads(get(config, "/healthz")[1])["detail"]

    def on_evaluation(number: int, found: Mapping[str, float], _seconds: float) -> None:
        losses[number] = found["target"]

    summary = serve(Settings(**config), threading.Event(), Watcher(on_step, on_evaluation))
    assert losses[0] + 3 < losses[4] < 1000
    assert [rollbacks for rollbacks, _ in shown.values()] == [0.0] * 4 + [1.0] * 11
    assert shown[5][1].startswith(
        f"step 4: the target loss {losses[4]:.3g} is more than training.max_loss_rise=3 above"
    )
    assert shown[5][1].endswith("went back to step 0, learning rate 0.001")
    assert f"{shown[5][1]}; 4 steps are taken back, 32 records discarded" in caplog.messages
    assert summary.counts["discarded"] == 32
    assert sum(summary.counts.values()) == 120
    assert summary.losses["target"] < losses[0]


@pytest.mark.parametrize(
    "every_steps", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_what_no_rollback_mends_ends_the_run_and_no_bad_checkpoint_is_left(
    every_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether an evaluation in its turn finds it, or the one before a checkpoint."""
    training = {"rollback_learning_rate_factor": 0.9}
    config = config_of(tmp_path, 200, optimizer=DIVERGING, training=training, checkpoint={"every_steps": every_steps})
    capsys.readouterr()
    assert run_main(tmp_path, config) == 7
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: optimizer.learning_rate=5 (now 3.")
    assert "training.max_loss_rise=3 above the lowest" in line
    assert "3 rollbacks did not help" in line
    assert counts(config)["trained"] == counts(config)["not_selected"] == 0
    evaluated: list[float] = []
    mended = config | {"optimizer": {"learning_rate": 1e-3}}
    watcher = Watcher(on_evaluation=lambda _, found, __: evaluated.append(found["target"]))
    summary = serve(Settings(**mended), threading.Event(), watcher)
    assert evaluated[0] < 6  # what it goes on from is as good as random weights
    assert sum(summary.counts.values()) == 200
    assert summary.losses["target"] < evaluated[0]


def test_without_a_limit_it_is_not_seen(tmp_path: Path) -> None:
    training = {"max_loss_rise": None}
    summary = serve(Settings(**config_of(tmp_path, optimizer=DIVERGING, training=training)), threading.Event())
    assert summary.counts["discarded"] == 0
    assert summary.losses["target"] > 9


@pytest.mark.slow
@pytest.mark.parametrize(("every_steps", "crashes"), [(3, [1, 2, 3, 5, 8, 9]), (7, [3, 5, 6, 8])])
def test_it_goes_back_at_the_same_step_after_crashes(every_steps: int, crashes: list[int], tmp_path: Path) -> None:
    ends = []
    for name, killed_at in (("whole", []), ("crashed", crashes)):
        folder = tmp_path / name
        sections: dict[str, Any] = {"optimizer": DIVERGING, "training": ONE_ROLLBACK_MENDS_IT}
        checkpoint = {"dir": str(folder / "c"), "every_steps": every_steps}
        config = config_of(folder, **sections, checkpoint=checkpoint)
        config["source"]["jsonl"]["path"] = str(tmp_path / "whole" / "samples.jsonl")
        summary = serve_with_crashes(config, killed_at)
        assert sum(summary.counts.values()) == 120
        assert summary.counts["discarded"] > 0
        ends.append(hashes(checkpoints(config)[-1]))
    assert ends[0] == ends[1]


def test_a_loss_is_compared_with_none_of_another_target(tmp_path: Path) -> None:
    config = config_of(tmp_path, optimizer={"learning_rate": 0.01}, training={"max_loss_rise": 1.0})
    serve_until(config, 8)
    write_lines(tmp_path / "target.jsonl", [json.dumps({"text": "@#%&"}).encode()])
    lowest = trainer_json(config)["parts"]["recovery"]["best_loss"]
    summary, _ = serve_until(config | {"optimizer": {"learning_rate": 1e-6}}, 12)
    assert summary.losses["target"] > lowest + 1
    assert summary.counts["discarded"] == 0


# An evaluation that fails


def failing_in(calls: range) -> Callable[..., float]:
    made = 0

    def failing_loss(*arguments: Any) -> float:
        nonlocal made
        made += 1
        if made in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return mean_loss(*arguments)

    return failing_loss


def test_an_evaluation_that_fails_is_shown_until_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = {"every_steps": 1000}
    config = on_free_port(config_of(tmp_path, 128, checkpoint=checkpoint))
    monkeypatch.setattr(evaluations, "mean_loss", failing_in(range(2, 4)))  # at step 4, and again for its comparison
    shown: dict[int, tuple[float, bool, str]] = {}

    def on_step(number: int, *_: object) -> None:
        health = json.loads(get(config, "/healthz")[1])
        shown[number] = metrics(config)[DEGRADED], health["ok"], health["detail"]

    serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert [degraded for degraded, _, _ in shown.values()] == [0.0] * 4 + [1.0] * 4 + [0.0] * 8
    assert all(well for _, well, _ in shown.values())
    trouble = "step 4: the loss of target cannot be measured (OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert shown[4][2] == ""
    assert shown[5][2].startswith(trouble)
    assert "Traceback" not in caplog.text


def test_a_start_that_fails_in_its_first_evaluation_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the right model, named next, would be refused: the checkpoint was made with another."""
    config = config_of(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(evaluations, "mean_loss", failing_in(range(1, 2)))
        with pytest.raises(TrainingError, match="the loss of target cannot be measured"):
            serve_until(config)
    assert checkpoints(config) == []
    wider = config["model"] | {"config": config["model"]["config"] | {"hidden_size": 48}}
    summary, _ = serve_until(config | {"model": wider})
    assert sum(summary.counts.values()) == 120


def test_an_evaluation_at_the_start_of_a_resume_decides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made at whatever step a run was stopped."""
    config = config_of(tmp_path, evaluation={"every_steps": 1000})
    with caplog.at_level(logging.INFO):
        serve_until(config, 5)
        first = trainer_json(config)["parts"]["recovery"]["best_loss"]
        serve_until(config, 9)
    assert "step 5: target loss" in caplog.text
    assert trainer_json(config)["parts"]["recovery"]["best_loss"] == first


def test_an_evaluation_tells_what_has_moved(tmp_path: Path) -> None:
    """With a mask of whole layers, only these tensors may; without one, all do."""
    found = []
    for name, selection in (
        ("all", {}),
        ("masked", {"mask": "dual_sft", "dual_sft": {"density": 0.02, "refresh_steps": 100}}),
    ):
        config = on_free_port(config_of(tmp_path / name, 48, selection=selection))
        seen: list[dict[str, Any]] = []

        def on_step(step: int, *_: object, config: dict[str, Any] = config, seen: list[Any] = seen) -> None:
            if step == 5:
                seen.append(metrics(config))
                seen.append(json.loads(get(config, "/status")[1]))

        serve(Settings(**config), threading.Event(), Watcher(on_step))
        shown, status = seen
        assert (status["moved_tensors"], status["moved_weights"]) == (
            shown["moved_tensors_ratio"],
            shown["moved_weights_ratio"],
        )
        found.append(shown)
    assert found[0]["moved_tensors_ratio"] == 1
    assert found[0]["moved_weights_ratio"] > 0.5
    assert 0 < found[1]["moved_tensors_ratio"] <= 1
    assert found[1]["moved_weights_ratio"] < 0.1


def test_an_evaluation_that_fails_later_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, 64, evaluation={"every_steps": 3})
    monkeypatch.setattr(evaluations, "mean_loss", failing_in(range(2, 10**9)))
    summary, steps = serve_until(config)
    assert [step.number for step in steps] == list(range(1, 9))
    assert sum(summary.counts.values()) == 64
    assert math.isfinite(summary.losses["target"])  # the first, for none came after it


def test_a_first_evaluation_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, 64)
    monkeypatch.setattr(evaluations, "mean_loss", failing_in(range(1, 10**9)))
    assert run_main(tmp_path, config) == 7
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the loss of target cannot be measured (OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB); "
        "lower evaluation.max_samples or target.max_samples"
    )
