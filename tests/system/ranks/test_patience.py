"""Ranks that keep the others waiting: one is slow, one has nothing to read for long, one has read all there is.

STREAM_TRAINER_IDLE_S is for how long the partitions of one rank stay empty: more than ten minutes unless it is set.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from gradient_selectors.views.interaction import Interaction

from stream_trainer.demo.broker import free_port
from tests.gradient_selectors.world.processes import run_to_end
from tests.gradient_selectors.world.threads import without_locks
from tests.helpers.brokers import create_topic, publish
from tests.helpers.service import (
    LONG_S,
    counts,
    decided,
    get,
    good,
    goods,
    jsonl,
    kafka,
    trainer_json,
    wait_for,
    write_lines,
)
from tests.system.ranks.runs import serve_on_ranks
from tests.system.ranks.slow import slow_down
from tests.system.ranks.test_first import ordering
from tests.system.ranks.test_ranks import PARTITIONS, settings
from tests.system.ranks.test_sharded import settings as settings_of_mode
from tests.system.ranks.test_torchrun import torchrun, workers

RECORDS = 48
PASS_S = 0.6  # of the slow rank; a pass by itself takes a hundredth of a second
TIMEOUT_S = 10.0  # for the others to wait in a step
TOO_LONG_S = 1.5 * TIMEOUT_S
IDLE_S = float(os.environ.get("STREAM_TRAINER_IDLE_S", "630"))
OFTEN_S = 15.0  # between records for the other rank
OWN = ((0, 2), (1, 3))  # partitions by rank
FEW = 3  # records in each
MODES = ["replicated", "fsdp2"]


@pytest.fixture(autouse=True)
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)


def test_a_slow_rank_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "samples.jsonl", goods(32))
    _, quick = serve_on_ranks(settings(tmp_path / "quick", jsonl(tmp_path / "samples.jsonl")), 2)
    waits = slow_down(PASS_S / 10, PASS_S, monkeypatch)
    _, slow = serve_on_ranks(settings(tmp_path / "slow", jsonl(tmp_path / "samples.jsonl")), 2)
    assert slow == quick
    assert len(waits) > len(slow[0])


def test_the_stream_may_end_for_one_rank_first(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic, PARTITIONS)
    for number, count in enumerate((20, 1, 12, 0)):
        publish(broker, topic, goods(count), number)
    config = settings(tmp_path / "run", kafka(broker, topic))
    summaries, steps = serve_on_ranks(config, 2)
    assert [summary.step for summary in summaries] == [5, 5]
    assert steps[0] == steps[1]
    assert sum(counts(config).values()) == 33


def test_partitions_that_were_idle_are_read_once_records_come(
    broker: str, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topic(broker, topic, PARTITIONS)
    publish(broker, topic, goods(16), OWN[0][0])
    late = threading.Timer(2.0, publish, (broker, topic, goods(40)[32:], OWN[1][0]))
    ordering({2: lambda _: late.start()}, monkeypatch)
    config = settings(tmp_path / "run", kafka(broker, topic, stop_at_end=False), buffer={"wait_s": 0.5})
    summaries, steps = serve_on_ranks(config, 2, 3, told=1)
    late.join()
    assert [summary.step for summary in summaries] == [3, 3]
    assert steps[0] == steps[1]
    assert set(steps[0][2].ids) <= {str(number) for number in range(32, 40)}


@pytest.mark.slow
@pytest.mark.timeout(LONG_S * 3)
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_ten_times_slower_is_not_taken_for_one_that_hangs(mode: str, tmp_path: Path) -> None:
    """Where ranks only meet between passes, one pass may take longer than they wait for each other in a step."""
    (quick, _), _ = on_processes(tmp_path / "quick", mode, 0.0, 0.0)
    first_s = TOO_LONG_S if mode == "replicated" else PASS_S
    (slow, other), waits = on_processes(tmp_path / "slow", mode, PASS_S, first_s)
    assert sum(waits) > TIMEOUT_S
    assert slow == other == quick
    assert (slow["failure"], len(slow["steps"])) == ("", RECORDS // 8)


@pytest.mark.slow
@pytest.mark.timeout(LONG_S * 2)
def test_a_rank_that_keeps_others_waiting_too_long_within_a_pass_ends_all(tmp_path: Path) -> None:
    said, _ = on_processes(tmp_path / "hangs", "fsdp2", 0.0, TOO_LONG_S)
    assert [rank["failure"].partition(":")[0] for rank in said] == ["GroupError", "GroupError"]


def on_processes(folder: Path, mode: str, pass_s: float, first_s: float) -> tuple[list[dict[str, Any]], list[float]]:
    """What both ranks say, and for how long each pass of the slow one was held up."""
    config = settings_of_mode(folder, {}, mode, evaluation={"every_steps": 1})
    config["distributed"]["timeout_s"] = TIMEOUT_S
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    run_to_end("tests.system.ranks.slow_program", [str(folder), str(pass_s), str(first_s)], 2, LONG_S)
    said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return said, json.loads((folder / "waited.json").read_text())


@dataclass(frozen=True)
class Running:
    """A run of two processes that reads on until it is told to stop."""

    config: dict[str, Any]
    process: subprocess.Popen[bytes]

    def of_rank(self, rank: int) -> dict[str, Any]:
        return self.config | {"server": {"port": self.config["server"]["port"] + rank}}

    def has_decided(self, records: int) -> bool:
        return self.process.poll() is not None or all(decided(self.of_rank(rank)) == records for rank in range(2))

    def health(self) -> list[tuple[int, str]]:
        pages = [get(self.of_rank(rank), "/healthz") for rank in range(2)]
        return [(status, json.loads(page)["health"]) for status, page in pages]


@contextmanager
def begun(folder: Path, mode: str, source: dict[str, Any]) -> Iterator[Running]:
    sections: dict[str, Any] = {"buffer": {"wait_s": 1.0}, "server": {"enabled": True, "port": free_port()}}
    config = settings_of_mode(folder, {}, mode, **sections) | {"source": source}
    with torchrun(folder, config, 2) as process:
        yield Running(config, process)


def publish_few(broker: str, topic: str, before: int, rank: int) -> int:
    """Records for each partition of a rank, after the first so many. Returns how many there are now."""
    for partition in OWN[rank]:
        publish(broker, topic, [good(number) for number in range(before, before + FEW)], partition)
        before += FEW
    return before


@pytest.mark.slow
@pytest.mark.timeout(LONG_S * 3 + IDLE_S)
def test_partitions_may_be_idle_for_ten_minutes(
    broker: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both modes side by side. As long as that, by default, brokers keep connections, and health and ranks wait."""
    create_topic(broker, topic, PARTITIONS)
    with ExitStack() as up:
        runs = [
            up.enter_context(
                begun(tmp_path / mode, mode, kafka(broker, topic, group_id=f"{topic}-{mode}", stop_at_end=False))
            )
            for mode in MODES
        ]
        sent = publish_few(broker, topic, 0, 0)
        wait_for(lambda: all(run.has_decided(sent) for run in runs))
        began, seen = time.monotonic(), set[tuple[int, str]]()
        while time.monotonic() < began + IDLE_S:
            sent = publish_few(broker, topic, sent, 0)
            time.sleep(OFTEN_S)
            seen.update(health for run in runs for health in run.health())
        sent = publish_few(broker, topic, sent, 1)
        wait_for(lambda: all(run.has_decided(sent) for run in runs))
        for run in runs:
            workers(run.process)[1].send_signal(signal.SIGTERM)
        assert [run.process.wait(LONG_S) for run in runs] == [0, 0]
    assert seen == {(200, "healthy")}
    assert [sum(counts(run.config).values()) for run in runs] == [sent, sent]
    steps = [trainer_json(run.config)["step"] for run in runs]
    with capsys.disabled():
        print(f"\nidle for {IDLE_S:.0f} s: {sent} records, steps {dict(zip(MODES, steps, strict=True))}")
