"""Shadows: what is measured beside a step leaves no trace in what is learned."""

import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_trainer.errors import SettingsError
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.trainer import Trainer
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    ALL_ON,
    MODEL,
    configuration,
    get,
    goods,
    jsonl,
    metrics,
    note_trainers,
    on_free_port,
    write_lines,
)

STEPS = 30
KINDS: dict[str, dict[str, Any]] = {
    "selects": {},
    "learned": {"selection": {"profile": "thrifty", "waiting": 24, "intake": 12, "learned": {"probe_every": 3}}},
    "mask": {"selection": {"mask": "dual_sft", "dual_sft": {"density": 0.3, "refresh_steps": 3}}},
    "lora": {"model": {"lora": {"rank": 2}}},
    "uniform_draw": {"selection": {"draw": "uniform", "weigh": "equal"}},
    "all_on": {"selection": ALL_ON, "model": {"config": MODEL, "tokenizer": "bytes", "lora": {"rank": 2}}},
}


def trained(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, dict[str, float]]:
    """A run of `STEPS` steps, and its time by phase."""
    made = note_trainers(monkeypatch)
    seconds: dict[str, float] = {}

    def on_step(_step: int, _pool: Any, report: Any) -> None:
        for phase, spent in report.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent

    serve(Settings(**config), threading.Event(), Watcher(on_step))
    return made[0], seconds


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{i}")
    else:
        yield name, value


def everything(trainer: Trainer) -> dict[str, Any]:
    """Weights, moments, masks, and the state of whatever draws and chooses."""
    parts = {
        "weights": {name: values.detach() for name, values in trainer.loaded.model.named_parameters()},
        "optimizer": trainer.optimizer.state_dict(),
        "engine": trainer.engine.state_dict(),
        "sampler": trainer.sampler.state_dict(),
        "predicted": {k: v for k, v in trainer.paying.state_dict().items() if k not in ("shadows", "pays")},
        "torch": torch.random.get_rng_state(),
    }
    return dict(leaves(parts))


LONG = ("selects", "mask", "lora")  # parts of which `all_on` has, too


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in LONG else ()) for kind in KINDS])
def test_weights_are_those_of_a_run_without_shadows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(STEPS * 14))
    write_lines(tmp_path / "target.jsonl", goods(6))
    left = []
    for every in (None, 3):
        sections = {name: dict(values) for name, values in KINDS[kind].items()}
        own = {"advantage": {"every_steps": 4, "window": 4, "shadow_every": every}}
        sections["selection"] = {**sections.get("selection", {}), **own}
        sections["checkpoint"] = {"dir": str(tmp_path / f"checkpoints-{every}")}
        sections["target"] = {"path": str(tmp_path / "target.jsonl"), "held_back": 2}
        sections["training"] = {"max_steps": STEPS}
        config = configuration(tmp_path, jsonl(tmp_path / "stream.jsonl"), **sections)
        trainer, seconds = trained(config, monkeypatch)
        assert trainer.step == STEPS
        assert ("shadow" in seconds) == (every is not None)
        left.append(everything(trainer))
    assert trainer.paying.shadows is not None
    assert trainer.paying.shadows.measured.comparisons >= 8
    assert left[0].keys() == left[1].keys()
    for name, value in left[0].items():
        same = torch.equal(value, left[1][name]) if isinstance(value, torch.Tensor) else value == left[1][name]
        assert same, name


def test_effects_are_exported_and_on_the_page(tmp_path: Path) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(12 * 8))
    write_lines(tmp_path / "target.jsonl", goods(6))
    config = on_free_port(
        configuration(
            tmp_path,
            jsonl(tmp_path / "stream.jsonl"),
            target={"path": str(tmp_path / "target.jsonl"), "held_back": 2},
            selection={"advantage": {"every_steps": None, "window": 4, "shadow_every": 2}},
        )
    )
    seen: list[dict[str, Any]] = []

    def on_step(step: int, *_: object) -> None:
        if step == 10:
            seen.extend((metrics(config), json.loads(get(config, "/status")[1])))

    serve(Settings(**config), threading.Event(), Watcher(on_step))
    shown, status = seen
    assert shown['shadows_total{result="measured"}'] == 5
    assert shown['shadows_total{result="failed"}'] == 0
    assert math.isfinite(shown["selection_advantage_measured"])
    assert math.isnan(shown["selection_advantage"]), "nothing is predicted where that is off"
    assert shown['phase_seconds_total{phase="shadow"}'] > 0
    for kind in ("predicted", "measured"):
        for side in ("chosen", "uniform"):
            found = shown[f'shadow_effect_nats{{kind="{kind}",side="{side}"}}']
            assert found == status["effects"][kind][side]


def test_a_target_with_nothing_left_to_steer_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(8))
    own = {"advantage": {"shadow_every": 2}}
    for held_back, why in ((0, r"target\.held_back is 0"), (4, r"leaves none of the 4 samples of target\.path")):
        config = configuration(
            tmp_path, jsonl(tmp_path / "stream.jsonl"), target={"held_back": held_back}, selection=own
        )
        with pytest.raises((SettingsError, ValueError), match=why):
            serve(Settings(**config), threading.Event())
