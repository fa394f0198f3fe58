"""A run whose settings are only source, model and target: what is on, that it learns, and that it can be resumed."""

from pathlib import Path
from typing import Any

import pytest
from gradient_selectors import FilterThenWeight, Sketched

from stream_trainer.checkpoints.directory import checkpoints_in
from stream_trainer.training.draw.waiting import LearnedSampler
from stream_trainer.training.trainer import Trainer
from tests.helpers.service import MODEL, goods, hashes, jsonl, note_trainers, serve_until, write_lines

RECORDS = 600


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Nothing else is set, but that no port is opened, which another process may hold, and torch has one thread."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "samples.jsonl", [*goods(RECORDS), b"not JSON"])
    write_lines(tmp_path / "target.jsonl", goods(12))
    return {
        "source": jsonl(tmp_path / "samples.jsonl"),
        "model": {"config": MODEL, "tokenizer": "bytes"},
        "target": {"path": str(tmp_path / "target.jsonl")},
        "server": {"enabled": False},
        "training": {"threads": 1},
    }


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Those that the service puts together, as it does so."""
    return note_trainers(monkeypatch)


def test_what_is_learned_draws_and_sketches_score_the_probes(
    config: dict[str, Any], trainers: list[Trainer], tmp_path: Path
) -> None:
    summary, steps = serve_until(config)
    (trainer,) = trainers
    sampler, engine = trainer.sampler, trainer.engine
    assert isinstance(sampler, LearnedSampler)
    assert (sampler.room.capacity, sampler.room.intake) == (256, 128)
    assert isinstance(engine.selector, FilterThenWeight)
    assert engine.selector.batch_size == 4
    assert isinstance(engine.scoring, Sketched)
    assert engine.scoring.projections, "some matrices are large enough to be sketched"
    assert engine.target is not None
    assert (engine.target.refresh_samples, len(engine.target.samples)) == (4, 12)
    assert (engine.route, engine.mask) == (None, None)
    assert [len(step.ids) for step in steps[:17]] == [*[4] * 8, 6, *[4] * 7, 6]  # probes at 8 and 16
    candidates = [name for step in steps for name in step.ids]
    assert len(candidates) == len(set(candidates)) < RECORDS
    assert all(len(step.selected) <= 4 for step in steps)
    assert "applied" in {step.result for step in steps}
    assert summary.counts["trained"] == sum(len(step.selected) for step in steps) > 0
    assert summary.counts["dead_lettered"] == 1
    assert sum(summary.counts.values()) == RECORDS + 1
    assert (tmp_path / "dead-letters.jsonl").exists()


def test_it_learns_what_the_target_shows(config: dict[str, Any]) -> None:
    config["optimizer"] = {"learning_rate": 3e-3}
    summary, _ = serve_until(config)
    assert summary.losses["target"] < 5.0  # ln(300) = 5.7 is where random weights begin


def test_with_a_mask_that_is_chosen_the_first_step_is_a_probe_and_trains(config: dict[str, Any]) -> None:
    """No weight moves before there is a mask."""
    config["selection"] = {"mask": "dual_sft"}
    _, steps = serve_until(config, 9)
    assert [len(step.ids) for step in steps] == [6, *[4] * 7, 6]
    assert all(step.result == "applied" and step.selected for step in steps)


def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not(config: dict[str, Any], tmp_path: Path) -> None:
    whole = config | {"checkpoint": {"dir": "whole"}}
    resumed = config | {"checkpoint": {"dir": "resumed"}}
    _, expected = serve_until(whole, 24)
    assert [step for last in (3, 10, 24) for step in serve_until(resumed, last)[1]] == expected
    assert len(expected) == 24
    ours, theirs = (hashes(checkpoints_in(tmp_path / name)[0].path) for name in ("resumed", "whole"))
    for name in ("model/model.safetensors", "optimizer.safetensors", "state.safetensors"):
        assert ours[name] == theirs[name]
