"""Steps that go wrong: the model never stays dead, one bad sample never ends the run, every record has one outcome."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import FilterThenWeight
from safetensors.torch import load_file
from torch import nn

from stream_trainer import assembly
from stream_trainer.checkpoints.ownership import note_in
from stream_trainer.errors import TrainingError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.status import Status
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    ALL_ON,
    LONG_S,
    checkpoints,
    configuration,
    counts,
    get,
    good,
    goods,
    hashes,
    jsonl,
    metrics,
    on_free_port,
    run_main,
    serve_until,
    serve_with_crashes,
    start_python,
    write_lines,
)

POOL = 8
TOO_HIGH = {"learning_rate": 1e38}
ONE_ROLLBACK_MENDS_IT = {"max_dead_steps": 3, "rollback_learning_rate_factor": 1e-41, "seed": 5, "threads": 1}
POISON = ord("~")  # a token of the tokenizer of bytes that no other sample holds

pytestmark = pytest.mark.usefixtures("heap_set_aside")


def config_of(folder: Path, values: list[bytes], **sections: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_lines(folder / "samples.jsonl", values)
    return configuration(folder, jsonl(folder / "samples.jsonl"), **sections)


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def is_finite(checkpoint: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in saved_weights(checkpoint).values())


# A model that dies


@pytest.mark.parametrize("every_steps", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_learning_rate_that_kills_the_model_ends_the_run_and_costs_no_record(
    every_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = {"dir": str(tmp_path / "c"), "every_steps": every_steps}
    config = config_of(tmp_path, goods(200), optimizer=TOO_HIGH, checkpoint=checkpoint)
    capsys.readouterr()
    assert run_main(tmp_path, config) == 7
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: optimizer.learning_rate=1e+38 (now 1.25e+37): ")
    assert "lower optimizer.learning_rate" in line
    assert checkpoints(config)
    assert all(is_finite(path) for path in checkpoints(config))
    discarded = counts(config)["discarded"]
    assert counts(config)["trained"] == counts(config)["not_selected"] == 0
    summary, _ = serve_until(config | {"optimizer": {"learning_rate": 1e-3}})
    assert sum(summary.counts.values()) == 200
    assert summary.counts["discarded"] == discarded
    assert summary.counts["trained"] > 0
    assert math.isfinite(summary.losses["target"])


def test_one_rollback_is_shown_and_the_run_goes_on(tmp_path: Path) -> None:
    config = on_free_port(config_of(tmp_path, goods(160), optimizer=TOO_HIGH, training=ONE_ROLLBACK_MENDS_IT))
    shown: list[tuple[str, float, str]] = []

    def on_step(number: int, *_: object) -> None:
        health = json.loads(get(config, "/healthz")[1])
        assert health["ok"]
        shown.append((_result(config), metrics(config)["rollbacks_total"], health["detail"]))

    summary = serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert [rollbacks for _, rollbacks, _ in shown] == [0.0] * 4 + [1.0] * 16
    assert "step 4: 3 steps in a row were not finite; went back to step 0, learning rate 0.001" in shown[4][2]
    assert summary.counts["discarded"] == 4 * POOL
    assert sum(summary.counts.values()) == 160
    assert is_finite(checkpoints(config)[-1])
    assert summary.losses["target"] < 5.7  # ln(300), where random weights begin


def _result(config: dict[str, Any]) -> str:
    return str(metrics(config)["steps_without_update"])


@pytest.mark.parametrize("learning_rate", [1e3, 1e10, 1e30])
def test_a_model_that_nothing_moves_any_more_is_dead_too(learning_rate: float, tmp_path: Path) -> None:
    """Its losses may be finite, those of chance, and its gradient zero: no candidate helps, and no step fails."""
    training = ONE_ROLLBACK_MENDS_IT | {"rollback_learning_rate_factor": 1e-3 / learning_rate}
    config = config_of(tmp_path, goods(160), optimizer={"learning_rate": learning_rate}, training=training)
    summary, steps = serve_until(config)
    assert [step.result for step in steps][-8:] == ["applied"] * 8
    assert 0 < summary.counts["discarded"] <= 8 * POOL
    assert sum(summary.counts.values()) == 160
    assert summary.losses["target"] < 5.7


@pytest.mark.parametrize(
    ("selection", "every_steps"),
    [
        pytest.param({}, 3, id="scored-3", marks=pytest.mark.slow),
        pytest.param({}, 6, id="scored-6"),
        pytest.param({**ALL_ON, "draw": "uniform"}, 3, id="routed and masked-3"),
        pytest.param({**ALL_ON, "draw": "uniform"}, 6, id="routed and masked-6", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_rolls_back_and_crashes_ends_as_one_that_only_rolls_back(
    every_steps: int, selection: dict[str, Any], tmp_path: Path
) -> None:
    """Whether the dead model is found by its steps, or by the checkpoint that is not written."""
    ends = []
    for name, crashes in (("whole", []), ("crashed", [1, 2, 5, 7, 8])):
        folder = tmp_path / name
        checkpoint = {"dir": str(folder / "c"), "every_steps": every_steps}
        sections = {"optimizer": TOO_HIGH, "training": ONE_ROLLBACK_MENDS_IT, "selection": selection}
        config = config_of(folder, goods(120), checkpoint=checkpoint, **sections)
        config["source"]["jsonl"]["path"] = str(tmp_path / "whole" / "samples.jsonl")
        summary = serve_with_crashes(config, crashes)
        assert sum(summary.counts.values()) == 120
        assert summary.counts["discarded"] > 0
        ends.append(hashes(checkpoints(config)[-1]))
    assert ends[0] == ends[1]


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an earlier version wrote."""
    config = config_of(tmp_path, goods(40))

    def load(*arguments: Any) -> LoadedModel:
        loaded = load_model(*arguments)
        loaded.model.get_parameter("model.norm.weight").data[0] = math.nan
        return loaded

    monkeypatch.setattr(assembly, "load_model", load)
    with pytest.raises(TrainingError, match=r"weight model.norm.weight is not finite at step 0, before any update"):
        serve_until(config)


# Samples that a step fails on


def poisoned(number: int) -> bytes:
    return json.dumps({"id": number, "text": f"{number} ~ stone"}).encode()


def failing_model(error: Callable[[], Exception]) -> Callable[..., LoadedModel]:
    """Loads a model that cannot take one token."""

    def refuse(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if bool((arguments[0] == POISON).any()):
            raise error()

    def load(*arguments: Any) -> LoadedModel:
        loaded = load_model(*arguments)
        model: Any = loaded.model
        model.get_input_embeddings().register_forward_pre_hook(refuse)
        return loaded

    return load


ERRORS: dict[str, tuple[str, Callable[[], Exception]]] = {
    "memory of a GPU": ("out_of_memory", lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")),
    "memory of a CPU": (
        "out_of_memory",
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ),
    "the model": ("step_failed", lambda: IndexError("index out of range in self")),
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "thorough": {},
    "everything": ALL_ON,
    "auto": {"draw": "auto", "learned": {"probe_every": 2}},
    "middle loss": {"draw": "middle_loss"},
}
QUICK = {("middle loss", "memory of a CPU")}


@pytest.mark.parametrize(
    ("selection", "reason", "error"),
    [
        pytest.param(
            SELECTIONS[one],
            *ERRORS[other],
            id=f"{one}, {other}",
            marks=() if (one, other) in QUICK else pytest.mark.slow,
        )
        for one in SELECTIONS
        for other in ERRORS
    ],
)
def test_samples_that_a_step_fails_on_are_dead_lettered_and_the_step_is_made_without_them(
    selection: dict[str, Any],
    reason: str,
    error: Callable[[], Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "load_model", failing_model(error))
    # Two of a pool, one, and a pool of nothing else; so many that whatever draws draws some.
    bad = set(range(0, 96, 3)) if selection else {3, 4, 29} | set(range(40, 48))
    values = [poisoned(number) if number in bad else good(number) for number in range(96)]
    summary, steps = serve_until(config_of(tmp_path, values, selection=selection))
    letters = list(read_dead_letters(tmp_path / "dead-letters.jsonl"))
    assert sum(summary.counts.values()) == 96
    assert summary.counts["dead_lettered"] == len(letters)
    assert {letter.record.value for letter in letters} <= {values[number] for number in bad}
    # A sample without a finite loss is never in the middle, so that draw leaves it out by itself.
    assert {letter.reason for letter in letters} == ({reason} if selection.get("draw") != "middle_loss" else set())
    assert summary.counts["trained"] > 0
    assert math.isfinite(summary.losses["target"])
    trained = {int(name) for step in steps for name in step.selected if name is not None}
    assert not trained & bad
    if not selection:
        assert [letter.record.value for letter in letters] == [values[number] for number in sorted(bad)]
        assert [step.number for step in steps] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]  # nothing was left of the sixth
        assert {step.result for step in steps} == {"applied"}


@pytest.mark.parametrize("kind", ["memory of a GPU", "the model"])
def test_what_was_taken_out_is_on_health_and_in_metrics(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason, error = ERRORS[kind]
    monkeypatch.setattr(assembly, "load_model", failing_model(error))
    config = on_free_port(config_of(tmp_path, [poisoned(11) if n == 11 else good(n) for n in range(32)]))
    shown: list[tuple[float, bool, str]] = []

    def on_step(*_: object) -> None:
        values, health = metrics(config), json.loads(get(config, "/healthz")[1])
        assert health["ok"]
        letters = values[f'dead_letters_total{{reason="{reason}"}}']
        shown.append((letters, values['last_event_timestamp_seconds{kind="accused"}'] > 0, health["detail"]))

    serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert [(letters, noted) for letters, noted, _ in shown[:2]] == [(0, False), (1, True)]
    assert shown[0][2] == ""
    assert f" is dead-lettered as {reason}: " in shown[1][2]


def test_a_selector_that_fails_once_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = serve_until(config_of(tmp_path / "whole", goods(80)))
    fail_from(monkeypatch, 4, 4)
    summary, _ = serve_until(config_of(tmp_path / "failing", goods(80)))
    assert summary.counts["dead_lettered"] == 0
    assert sum(summary.counts.values()) == sum(expected.counts.values()) == 80


def test_a_selector_that_fails_on_everything_ends_the_run_with_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = on_free_port(config_of(tmp_path, goods(80)))
    shown = shown_at_the_end(monkeypatch, config)
    with monkeypatch.context() as patched:
        fail_from(patched, 4, 10**9)
        with pytest.raises(
            TrainingError, match=r"^step 4 failed, and no sample is to blame \(ArithmeticError: no"
        ) as e:
            serve_until(config)
    assert e.value.exit_code == 7
    assert "\n" not in str(e.value)
    assert caplog.text.count("Traceback") == 1
    assert shown == [(503, str(e.value), 1.0)]
    assert checkpoints(config)[-1].name == "step-00000003.e1"
    assert counts(config)["dead_lettered"] == 0
    assert sum(counts(config).values()) == 3 * POOL
    summary, steps = serve_until(config)
    assert [name for step in steps for name in step.ids] == [str(number) for number in range(24, 80)]
    assert sum(summary.counts.values()) == 80


def shown_at_the_end(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> list[tuple[int, str, float]]:
    """Collects health's code and reason, and the metric of the state, whenever a run fails."""
    fail, shown = Status.fail, list[tuple[int, str, float]]()

    def failing(self: Status, error: BaseException) -> None:
        fail(self, error)
        code, page = get(config, "/healthz")
        shown.append((code, json.loads(page)["detail"], metrics(config)['state{stream_trainer_state="failed"}']))

    monkeypatch.setattr(Status, "fail", failing)
    return shown


def fail_from(patched: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Make the selector raise in some of its calls."""
    decide, calls = FilterThenWeight.decide, iter(range(1, 10**9))

    def failing(self: FilterThenWeight, interaction: Any) -> Any:
        if first <= next(calls) <= last:
            raise ArithmeticError("no solution")
        return decide(self, interaction)

    patched.setattr(FilterThenWeight, "decide", failing)


# A sample that kills the process

KILLED_BY_A_TOKEN = """
import os, signal, sys
from stream_trainer import assembly
from stream_trainer.cli import main
from stream_trainer.models.loading import load_model

def kill(_module, arguments):
    if (arguments[0] == 126).any():
        os.kill(os.getpid(), signal.SIGKILL)

def load(*arguments):
    loaded = load_model(*arguments)
    loaded.model.get_input_embeddings().register_forward_pre_hook(kill)
    return loaded

assembly.load_model = load
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_sample_that_kills_the_process_is_got_past_in_the_end(tmp_path: Path) -> None:
    """Steps before it, and those after it, are as in a run that never saw it die."""
    values = [poisoned(number) if number == 29 else good(number) for number in range(48)]
    checkpoint = {"dir": str(tmp_path / "c"), "every_steps": 2}
    config = config_of(tmp_path, values, checkpoint=checkpoint)
    codes: list[int] = []
    while not codes or (codes[-1] != 0 and len(codes) < 8):
        with start_python(tmp_path, KILLED_BY_A_TOKEN, config) as process:
            codes.append(process.wait(LONG_S))
    assert codes == [-9, -9, -9, 0], (tmp_path / "log").read_text()
    (letter,) = read_dead_letters(tmp_path / "dead-letters.jsonl")
    assert (letter.reason, letter.record.value) == ("killed", values[29])
    assert sum(counts(config).values()) == 48
    assert counts(config)["dead_lettered"] == 1


def note_of(config: dict[str, Any]) -> tuple[Path, bytes, dict[str, Any]]:
    """What the last process noted behind the words of its claim, and where."""
    (path,) = Path(config["checkpoint"]["dir"]).glob("epoch-*")
    content = path.read_bytes()
    note = note_in(content)
    return path, content.removesuffix(note), json.loads(note)


def test_tries_of_single_samples_change_nothing(tmp_path: Path) -> None:
    """A process that was killed for another reason goes on as if it had not been."""
    for selection in ({}, ALL_ON, {"scoring": "sketched", "sketch_width": 4, "when_none_helps": "uniform"}):
        ends = []
        for name, dies in (("whole", False), ("killed", True)):
            folder = tmp_path / f"{name}-{len(selection)}"
            config = config_of(folder, goods(64), selection=selection)
            config["source"]["jsonl"]["path"] = str(tmp_path / f"whole-{len(selection)}" / "samples.jsonl")
            serve_until(config, last_step=3)
            note, words, found = note_of(config)
            assert found["step"] is None
            note.write_bytes(words + json.dumps(found | {"step": 5 if dies else None}).encode())
            serve_until(config)
            note, _, found = note_of(config)
            assert found["killers"] == []
            ends.append(hashes(checkpoints(config)[-1]))
        assert ends[0] == ends[1]
    assert len(note_in(note.read_bytes())) < 1000
