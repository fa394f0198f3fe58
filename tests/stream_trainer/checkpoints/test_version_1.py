"""A checkpoint of format 1, kept in `tests/data`: it is read whole, and training goes on as its own version would."""

import json
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.state import flatten
from safetensors.torch import load_file

from stream_trainer.checkpoints.manifest import format_of
from stream_trainer.checkpoints.version_1 import read_version_1
from stream_trainer.errors import SettingsError
from stream_trainer.records import Sample
from stream_trainer.service import serve
from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.mistakes import GONE, RENAMED
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher

KEPT = Path(__file__).parents[2] / "data" / "checkpoint-format-1"
CHECKPOINT = KEPT / "checkpoints" / "step-00000011"
Decided = dict[str, Any]

# Without MKL torch makes other exponential numbers of the same generator, and routes are drawn with these.
WITH_MKL = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
needs_mkl = pytest.mark.skipif(not WITH_MKL, reason="torch without MKL draws other numbers")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(KEPT, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def go_on(place: Path, last_step: int, monkeypatch: pytest.MonkeyPatch) -> list[Decided]:
    """What is decided up to a step, the records coming from standard input as they did then."""
    decided: list[Decided] = []

    def on_step(number: int, pool: Sequence[Sample], report: StepReport) -> None:
        decided.append(
            {
                "step": number,
                "result": report.result,
                "ids": [sample.id for sample in pool],
                "selected": [pool[i].id for i in report.selected],
                "coefficients": list(report.coefficients),
                "losses": list(report.losses),
            }
        )

    settings = load_settings(place / "settings-today.yaml", [f"--training.max_steps={last_step}"])
    with (place / "stream.jsonl").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        serve(settings, threading.Event(), Watcher(on_step))
    return decided


def assert_same(ours: Sequence[Decided], theirs: Sequence[Decided]) -> None:
    """The last digits may differ: another processor adds up in another order, coefficients that no producer's weight
    changes are no longer scaled there and back, and the ridge, a thousandth, is now one of each sample's own length.
    What a part forgot shows in the second digit or before, or in which samples were selected.
    """
    for mine, its in zip(ours, theirs, strict=True):
        for name in ("step", "result", "ids", "selected"):
            assert mine[name] == its[name], (its["step"], name)
        assert mine["coefficients"] == pytest.approx(its["coefficients"], abs=5e-3), its["step"]
        assert mine["losses"] == pytest.approx(its["losses"], abs=5e-3), its["step"]


@needs_mkl
def test_the_next_decisions_are_those_of_its_own_version(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads((KEPT / "continuation.json").read_text())
    assert len(expected) == 8
    assert_same(go_on(place, 19, monkeypatch), expected)


@needs_mkl
def test_what_is_written_next_is_of_todays_format_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads((KEPT / "continuation.json").read_text())
    assert format_of(CHECKPOINT) == 1
    first = go_on(place, 14, monkeypatch)
    assert format_of(place / "checkpoints" / "step-00000014.e1") == 2
    assert_same([*first, *go_on(place, 19, monkeypatch)], expected)


def test_every_tensor_and_every_counter_is_read() -> None:
    found = read_version_1(CHECKPOINT)
    tensors, rest = flatten(found["parts"])
    written = load_file(CHECKPOINT / "selector.safetensors") | load_file(CHECKPOINT / "random.safetensors")
    places = {"target": "engine/target/gradient", "sketch": "engine/scoring/projections"}
    places |= {"mask": "engine/mask", "draw": "sampler/bandit"}
    generators = {"route": ["engine/route"], "sketch": ["engine/scoring"], "step": ["engine/selector", "sampler"]}
    for name, values in written.items():
        part, _, own = name.partition(".")
        if own.startswith("average."):
            own = own.replace("average.", "average/", 1)
        paths = [f"{places[part]}/{own}"] if own else [f"{place}/generator" for place in generators[part]]
        for path in paths:
            assert torch.equal(tensors.pop(path.replace("sampler/generator", "sampler/uniform")), values), path
    assert tensors == {}
    assert rest["engine"]["target"] == {"gradient": {}, "age": 3, "refreshes": 2}
    assert rest["engine"]["mask"] == {"average": {}, "observed": 11, "since_refresh": 3}
    assert (found["step"], found["version"], found["source_identity"]) == (11, "0.1.0", {})
    assert sum(found["cursor"]["counts"].values()) == 132


def test_its_settings_are_refused_with_the_names_they_have_now() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(KEPT / "settings.yaml", [])
    lines = str(caught.value).splitlines()
    old = ["geometry", "chosen", "survivors", "settle_steps", "dual_sft.lambda_answers"]
    old += ["cluster_ucb.waiting", "cluster_ucb.intake"]
    gone = "selection.solver_time_limit_s"
    assert sorted(lines) == sorted(
        [
            f"setting selection.{name} ({KEPT / 'settings.yaml'}) is now {RENAMED[f'selection.{name}']}; rename it"
            for name in old
        ]
        + [f"setting {gone} ({KEPT / 'settings.yaml'}) {GONE[gone]}"]
    )
