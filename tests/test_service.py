"""The whole service on a file: what it decides, how it stops, resumes, and survives what it reads."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from service_helpers import (
    checkpoints,
    configuration,
    counts,
    good,
    goods,
    hashes,
    interrupt_command,
    jsonl,
    run_command,
    serve_until,
    trainer_json,
    write_lines,
)

RECORDS, POOL = 200, 8
STEPS = RECORDS // POOL


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a stream of good samples and, at every tenth place, one that cannot be used."""
    values = [good(number) for number in range(RECORDS)]
    for at in range(0, RECORDS, 10):
        values[at] += b"\nnot JSON"
    write_lines(tmp_path / "samples.jsonl", values)
    return tmp_path


def config_of(place: Path, run: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run on the stream in `place`, with everything it writes in a folder of its own."""
    (place / run).mkdir()
    return configuration(place / run, jsonl(place / "samples.jsonl"), **sections)


@pytest.mark.parametrize("weigh", ["filter_then_weight", "uniform"])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not(weigh: str, place: Path) -> None:
    """Bit for bit: weights, optimizer, random states, target gradient, cursor, and every decision on the way."""
    selection = {"weigh": weigh, "pool_size": POOL, "chosen": 3, "settle_steps": 2, "solver_time_limit_s": 60.0}
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
        decided = [name for step in steps for name in step.ids]
        assert sorted(decided, key=lambda name: int(name or "")) == [str(number) for number in range(RECORDS)]
    assert between_refreshes >= 3
    assert counts(whole)["dead_lettered"] == RECORDS // 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_loses_nothing_and_repeats_nothing(number: signal.Signals, place: Path) -> None:
    """The end state, cursor included, is that of a run that was left alone."""
    write_lines(place / "samples.jsonl", goods(1600))
    checkpoint = {"every_steps": 20}
    config = config_of(place, "ended", checkpoint={"dir": str(place / "ended" / "checkpoints")} | checkpoint)
    code = interrupt_command(place / "ended", config, number, step=25)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    left = trainer_json(config)
    assert 20 <= left["step"] < 200
    assert left["step"] > 20 or number == signal.SIGKILL  # SIGTERM ends in a checkpoint of its own
    assert sum(left["cursor"]["counts"].values()) == 8 * left["step"]
    assert run_command(place / "ended", config) == 0
    whole = config_of(place, "whole")
    serve_until(whole)
    assert sum(counts(config).values()) == 1600
    assert hashes(checkpoints(config)[-1]) == hashes(checkpoints(whole)[-1])
