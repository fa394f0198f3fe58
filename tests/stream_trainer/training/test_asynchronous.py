"""Checkpoints that are written while training goes on: the same ones, told of no sooner, and none lost by a failure."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_trainer.checkpoints.checkpoint import TrainerState, save_checkpoint
from stream_trainer.checkpoints.ownership import claim
from stream_trainer.errors import CheckpointError, FencedError
from stream_trainer.ingest.thread import Ingest
from stream_trainer.monitoring.orders import Order, Outcome
from stream_trainer.monitoring.progress import Phase
from stream_trainer.service import Summary, serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training import failing, saver
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    ALL_ON,
    LONG_S,
    checkpoints,
    configuration,
    counts,
    goods,
    hashes,
    jsonl,
    metrics,
    note_trainers,
    on_free_port,
    serve_until,
    serve_with_crashes,
    serving,
    start_python,
    state_of,
    wait_for,
    write_lines,
)

RECORDS, POOL, EVERY = 64, 8, 2
LAST = RECORDS // POOL
OnStep = Callable[[int], None]


def config_of(folder: Path, name: str, *, asynchronous: bool, **sections: Any) -> dict[str, Any]:
    """A run on the one stream in `folder`, with a checkpoint after every other step, none of which is deleted."""
    (folder / name).mkdir()
    write_lines(folder / "samples.jsonl", goods(RECORDS))
    checkpoint = {"dir": str(folder / name / "checkpoints"), "every_steps": EVERY, "keep": 10}
    checkpoint |= {"asynchronous": asynchronous} | sections.pop("checkpoint", {})
    return configuration(folder / name, jsonl(folder / "samples.jsonl"), checkpoint=checkpoint, **sections)


def hashes_by_step(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of every checkpoint, by its step."""
    return {path.name.partition(".")[0]: hashes(path) for path in checkpoints(config)}


def named(step: int) -> str:
    return f"step-{step:08d}"


@dataclass
class Writer:
    """Holds what is written in the background, until it may go on or training waits for it.

    Attributes:
        begun: steps whose checkpoints it was asked to write.
        errors: what it fails with instead, once, by step.
        told: steps that the stream was told to be durable.
        waits: how often training has waited.
    """

    go_on: threading.Event = field(default_factory=threading.Event)
    begun: list[int] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)
    told: list[int] = field(default_factory=list)
    waits: int = 0

    def write(self, directory: Path, loaded: Any, optimizer: Any, state: TrainerState, *how: Any, **more: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            self.begun.append(state.step)
            assert self.go_on.wait(LONG_S)
            if state.step in self.errors:
                raise self.errors.pop(state.step)
        return save_checkpoint(directory, loaded, optimizer, state, *how, **more)

    def phase(self, phase: Phase) -> None:
        if phase.name == "waiting for a checkpoint" and phase.seconds is None:
            self.waits += 1
            self.go_on.set()

    def serve(self, config: dict[str, Any], on_step: OnStep, stop: threading.Event | None = None) -> Summary:
        watcher = Watcher(on_step=lambda step, *_: on_step(step), on_phase=self.phase)
        return serve(Settings(**config), stop or threading.Event(), watcher)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    found, request = Writer(), Ingest.request_commit

    def told(ingest: Ingest, positions: Any, step: int) -> None:
        found.told.append(step)
        request(ingest, positions, step)

    monkeypatch.setattr(saver, "save_checkpoint", found.write)
    monkeypatch.setattr(Ingest, "request_commit", told)
    yield found
    found.go_on.set()


@pytest.mark.parametrize(
    "sections",
    [{}, {"selection": ALL_ON}, pytest.param({"model": {"lora": {"rank": 2}}}, marks=pytest.mark.slow)],
    ids=["default", "everything", "lora"],
)
def test_every_checkpoint_is_the_one_that_training_would_have_waited_for(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, and so is what follows from it, in one run and in one that crashes and is resumed."""
    waiting = config_of(tmp_path, "waiting", asynchronous=False, **sections)
    _, expected = serve_until(waiting)
    going_on = config_of(tmp_path, "going on", asynchronous=True, **sections)
    _, steps = serve_until(going_on)
    assert steps == expected
    assert len(hashes_by_step(waiting)) > 3
    assert hashes_by_step(going_on) == hashes_by_step(waiting)
    crashing = config_of(tmp_path, "crashing", asynchronous=True, **sections)
    serve_with_crashes(crashing, [3])
    assert hashes_by_step(crashing) == hashes_by_step(waiting)


def test_training_goes_on_while_a_checkpoint_is_written_and_nobody_is_told_before(
    writer: Writer, tmp_path: Path
) -> None:
    config, seen = config_of(tmp_path, "held", asynchronous=True), list[tuple[int, list[int], set[str]]]()

    def on_step(step: int) -> None:
        seen.append((step, list(writer.told), set(hashes_by_step(config))))
        if step > 4:
            writer.go_on.set()

    writer.serve(config, on_step)
    first, second = {named(0)}, {named(0), named(2)}
    assert [each[:2] for each in seen[:4]] == [(1, [0]), (2, [0]), (3, [0]), (4, [0])]
    assert [there for _, _, there in seen[:4]] == [first] * 4
    # The next one was due after step 4, and waited.
    assert writer.waits >= 1
    assert second <= seen[4][2]
    assert seen[4][1] == [0, 2]
    assert writer.told == [0, 2, 4, 6, 8]
    waiting = config_of(tmp_path, "waiting", asynchronous=False)
    serve_until(waiting)
    assert hashes_by_step(config) == hashes_by_step(waiting)


def test_it_is_told_of_while_nothing_comes(writer: Writer, tmp_path: Path) -> None:
    config = on_free_port(config_of(tmp_path, "idle", asynchronous=True, buffer={"wait_s": 0.0}))
    write_lines(tmp_path / "samples.jsonl", goods(EVERY * POOL))
    config["source"]["jsonl"]["follow"] = True
    with serving(config):
        wait_for(lambda: state_of(config) == "idle" and writer.begun == [EVERY])
        assert metrics(config)["checkpoint_step"] == 0
        writer.go_on.set()
        wait_for(lambda: metrics(config)["checkpoint_step"] == EVERY)
        found = metrics(config)
    assert found["checkpoint_seconds_count"] == found["checkpoint_stall_seconds_count"] == 2
    assert found["checkpoint_stall_seconds_sum"] < found["checkpoint_seconds_sum"]


KILLED = """
import os, signal, sys, threading, yaml
from stream_trainer.checkpoints import checkpoint
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher
inner, begun = checkpoint.write_manifest, threading.Event()
def write_manifest(directory, step, *others):
    if step == 4:
        begun.set()
        threading.Event().wait()
    return inner(directory, step, *others)
checkpoint.write_manifest = write_manifest
def on_step(step, *_):
    if step == 6:
        begun.wait()
        os.kill(os.getpid(), signal.SIGKILL)
settings = yaml.safe_load(open(sys.argv[2].removeprefix("--config=")))
serve(Settings(**settings), threading.Event(), Watcher(on_step))
"""


def test_killed_while_one_is_written_it_goes_on_from_the_one_before(tmp_path: Path) -> None:
    config = config_of(tmp_path, "killed", asynchronous=True)
    with start_python(tmp_path / "killed", KILLED, config) as process:
        assert process.wait(LONG_S) == -signal.SIGKILL, (tmp_path / "killed" / "log").read_text()
    folder = Path(config["checkpoint"]["dir"])
    assert list(folder.glob(".tmp-*-step-00000004/model/model.safetensors"))
    assert set(hashes_by_step(config)) == {named(0), named(2)}
    _, steps = serve_until(config)
    assert [step.number for step in steps] == list(range(3, LAST + 1))
    assert sum(counts(config).values()) == RECORDS
    waiting = config_of(tmp_path, "waiting", asynchronous=False)
    serve_until(waiting)
    assert hashes_by_step(config) == hashes_by_step(waiting)


def test_one_that_fails_is_counted_and_tried_again(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "FIRST_PAUSE_S", 0.0)
    config = on_free_port(config_of(tmp_path, "failing", asynchronous=True))
    writer.errors[2] = CheckpointError("checkpoint.dir is full")
    seen = dict[int, tuple[float, float]]()

    def on_step(step: int) -> None:
        found = metrics(config)
        seen[step] = found["checkpoint_failures_total"], found['degraded{cause="checkpoint"}']

    summary = writer.serve(config, on_step)
    assert [seen[4], seen[LAST]] == [(0, 0), (1, 0)]
    assert 2 not in writer.told
    assert writer.told[-1] == LAST
    assert named(2) not in hashes_by_step(config)
    assert summary.counts == counts(config)
    assert sum(summary.counts.values()) == RECORDS


def test_one_that_fails_for_too_long_ends_the_run(writer: Writer, tmp_path: Path) -> None:
    config = config_of(tmp_path, "failing", asynchronous=True, checkpoint={"max_failing_s": 0.0})
    writer.errors[2] = CheckpointError("checkpoint.dir is full")
    steps = list[int]()
    with pytest.raises(CheckpointError, match=r"is full; this lasts longer than checkpoint.max_failing_s=0$"):
        writer.serve(config, steps.append)
    assert steps == [1, 2, 3, 4]  # the next one was due, and waited
    assert set(hashes_by_step(config)) == {named(0)}


def test_a_trainer_that_was_taken_over_meanwhile_publishes_nothing(writer: Writer, tmp_path: Path) -> None:
    config = config_of(tmp_path, "fenced", asynchronous=True)

    def on_step(step: int) -> None:
        if step == 3:
            claim(Path(config["checkpoint"]["dir"]))
            writer.go_on.set()

    with pytest.raises(FencedError, match="was taken over by"):
        writer.serve(config, on_step)
    assert set(hashes_by_step(config)) == {named(0)}
    assert writer.told == [0]


def test_told_to_stop_it_ends_once_that_one_and_a_last_one_are_durable(writer: Writer, tmp_path: Path) -> None:
    config, stop = config_of(tmp_path, "stopped", asynchronous=True), threading.Event()

    def on_step(step: int) -> None:
        if step == 3:
            assert writer.told == [0]
            stop.set()

    assert writer.serve(config, on_step, stop).step == 3
    assert writer.told == [0, 2, 3]
    assert set(hashes_by_step(config)) == {named(0), named(2), named(3)}
    assert sum(counts(config).values()) == 3 * POOL


def test_a_run_that_ends_in_an_error_leaves_no_writer_behind(writer: Writer, tmp_path: Path) -> None:
    config = config_of(tmp_path, "broken", asynchronous=True)

    def on_step(step: int) -> None:
        if step == 3:
            threading.Timer(0.1, writer.go_on.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        writer.serve(config, on_step)
    assert set(hashes_by_step(config)) == {named(0), named(2)}
    assert writer.told == [0]


def test_a_rollback_goes_to_the_one_that_is_being_written(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight is spoilt after step 3, which step 4 finds out."""
    trainers, ends = note_trainers(monkeypatch), list[dict[str, dict[str, str]]]()

    def on_step(step: int) -> None:
        if step == 3:
            with torch.no_grad():
                trainers[-1].loaded.model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = math.inf

    for asynchronous in (False, True):
        config = config_of(tmp_path, str(asynchronous), asynchronous=asynchronous, training={"max_dead_steps": 1})
        writer.serve(config, on_step)
        ends.append(hashes_by_step(config))
        assert counts(config)["discarded"] == POOL * 2
    assert ends[0] == ends[1]


def test_an_order_is_obeyed_once_its_checkpoint_is_durable(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers, config = note_trainers(monkeypatch), config_of(tmp_path, "ordered", asynchronous=True)
    asked = list[Order | None]()

    def on_step(step: int) -> None:
        if step == 3:
            asked.append(trainers[-1].steering._orders.give("checkpoint"))
        if step == 4:
            assert writer.told == [0, 2, 3]

    writer.serve(config, on_step)
    assert asked[0] is not None
    assert (asked[0].outcome, asked[0].detail) == (Outcome.DONE, "checkpoint of step 3")
