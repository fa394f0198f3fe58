"""Runs on a file that are told to stop, at every moment that matters, or killed: nothing is lost, nothing repeated."""

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.service import (
    LONG_S,
    checkpoints,
    configuration,
    counts,
    decided,
    fifo,
    good,
    goods,
    hashes,
    interrupt_command,
    jsonl,
    metrics,
    on_free_port,
    run_and_terminate,
    run_command,
    serve_until,
    start_command,
    state_of,
    trainer_json,
    write_lines,
)

RECORDS, POOL = 200, 8
STEPS = RECORDS // POOL
BAD = RECORDS // 10


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a stream of good samples and, after every tenth, one that cannot be used."""
    values = [good(number) + b"\nnot JSON" * (number % 10 == 0) for number in range(RECORDS)]
    write_lines(tmp_path / "samples.jsonl", values)
    return tmp_path


def config_of(place: Path, run: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run on the stream in `place`, with everything it writes in a folder of its own."""
    (place / run).mkdir()
    return configuration(place / run, jsonl(place / "samples.jsonl"), **sections)


@pytest.mark.parametrize("selection", [{}, {"draw": "uniform", "weigh": "equal"}], ids=["scored", "uniform"])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not(selection: dict[str, Any], place: Path) -> None:
    """Bit for bit: weights, optimizer, random states, target gradient, cursor, and every decision on the way."""
    whole = config_of(place, "whole", selection=selection)
    _, expected = serve_until(whole)
    assert len(expected) == STEPS
    between_refreshes = 0
    for seed in range(5):
        stops = sorted(random.Random(seed).sample(range(1, STEPS), 2))
        between_refreshes += sum(step % 4 != 0 for step in stops)
        config = config_of(place, f"seed-{seed}", selection=selection)
        steps = [step for last in (*stops, None) for step in serve_until(config, last)[1]]
        assert steps == expected, stops
        assert hashes(checkpoints(config)[-1]) == hashes(checkpoints(whole)[-1]), stops
        candidates = [name for step in steps for name in step.ids]
        assert len(candidates) == len(set(candidates)) == (3 * STEPS if selection else RECORDS)
        assert sum(counts(config).values()) == RECORDS + BAD
    assert between_refreshes >= 3
    assert counts(whole)["dead_lettered"] == BAD


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_loses_nothing_and_repeats_nothing(number: signal.Signals, place: Path) -> None:
    """The end state, cursor included, is that of a run that was left alone."""
    write_lines(place / "samples.jsonl", goods(800))
    checkpoint = {"dir": str(place / "ended" / "checkpoints"), "every_steps": 20}
    config = config_of(place, "ended", checkpoint=checkpoint)
    code = interrupt_command(place / "ended", config, number, step=25)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    left = trainer_json(config)
    assert 20 <= left["step"] < 100
    assert left["step"] > 20 or number == signal.SIGKILL  # SIGTERM ends in a checkpoint of its own
    assert sum(left["cursor"]["counts"].values()) == 8 * left["step"]
    assert run_command(place / "ended", config) == 0
    whole = config_of(place, "whole")
    serve_until(whole)
    assert sum(counts(config).values()) == 800
    assert hashes(checkpoints(config)[-1]) == hashes(checkpoints(whole)[-1])


def test_sigterm_while_starting(tmp_path: Path) -> None:
    """Before anything has begun, there is nothing to save."""
    settings = tmp_path / "settings.yaml"
    with fifo(settings), (tmp_path / "log").open("wb") as log, start_command(settings, log) as process:
        descriptor = os.open(settings, os.O_WRONLY)  # returns when the process asks for its settings
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG_S) == 0
        os.close(descriptor)
    assert (tmp_path / "log").read_text() == ""


def test_sigterm_while_loading(place: Path) -> None:
    config = on_free_port(config_of(place, "run"))
    target = place / "target.fifo"
    config["target"] = {"path": str(target)}
    with fifo(target) as write:
        finish_loading = partial(write, good(0) + b"\n")
        assert run_and_terminate(config, lambda: state_of(config) == "loading", finish_loading) == 0
    assert checkpoints(config) == []


def test_sigterm_while_idle_on_a_followed_file(place: Path) -> None:
    (place / "samples.jsonl").write_bytes(b"")
    config = on_free_port(config_of(place, "run", buffer={"wait_s": 0.0}))
    config["source"]["jsonl"]["follow"] = True
    assert run_and_terminate(config, lambda: state_of(config) == "idle") == 0
    assert trainer_json(config)["step"] == 0
    write_lines(place / "samples.jsonl", goods(3))
    assert run_and_terminate(config, lambda: decided(config) == 3 and state_of(config) == "idle") == 0
    assert sum(counts(config).values()) == 3


def test_sigterm_while_the_buffer_is_full(place: Path) -> None:
    write_lines(place / "samples.jsonl", goods(2000))
    config = on_free_port(config_of(place, "run", buffer={"max_records": 16, "wait_s": 60.0}))
    assert run_and_terminate(config, lambda: metrics(config).get("reading_paused") == 1) == 0
    stopped = trainer_json(config)["step"]
    assert 0 < stopped < 250
    _, steps = serve_until(config)
    assert [name for step in steps for name in step.ids] == [str(number) for number in range(8 * stopped, 2000)]
    assert sum(counts(config).values()) == 2000
