"""Two trainers on one directory, on one machine and on two: one survives, and what it leaves is no mixture.

STREAM_TRAINER_STARTS=50 makes as many starts of each kind as that; without it there are few.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_trainer.checkpoints.ownership import claim
from tests.helpers.brokers import ApacheKafka, committed, create_topic, publish
from tests.helpers.service import (
    LONG_S,
    MAIN,
    checkpoints,
    configuration,
    counts,
    goods,
    hashes,
    jsonl,
    kafka,
    serve_until,
    wait_for,
    write_lines,
)

STARTS = int(os.environ.get("STREAM_TRAINER_STARTS", "4"))
RECORDS = 800

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LONG_S * (1 + STARTS))]

# Machines apart do not see each other's locks.
APART = f"""
import errno, fcntl, os
def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
{MAIN}
"""


def start(folder: Path, name: str, config: dict[str, Any], program: str) -> subprocess.Popen[bytes]:
    settings = folder / f"{name}.yaml"
    settings.write_text(yaml.safe_dump(config))
    variables = {name: value for name, value in os.environ.items() if name != "STREAM_TRAINER_STARTS"}
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with (folder / f"{name}.log").open("wb") as log:
        arguments = [sys.executable, "-c", program, "run", f"--config={settings}"]
        return subprocess.Popen(arguments, env=variables, stdin=subprocess.DEVNULL, stderr=log)


@contextmanager
def killed_at_the_end(processes: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def last_line(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text().splitlines()[-1]


def config_of(folder: Path, follow: bool = False) -> dict[str, Any]:
    samples = folder.parent / "samples.jsonl"  # of one path, for a checkpoint holds it
    write_lines(samples, goods(RECORDS))
    return configuration_of(folder, jsonl(samples, follow=follow))


def configuration_of(folder: Path, source: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    return configuration(folder, source, checkpoint={"dir": str(folder / "checkpoints"), "every_steps": 20})


def compete(folder: Path, config: dict[str, Any], program: str, delay_s: float) -> bool:
    """Start one trainer, and another after some seconds; returns whether one of them lost, as is documented."""
    processes = {"first": start(folder, "first", config, program)}
    with killed_at_the_end(processes):
        time.sleep(delay_s)
        processes["second"] = start(folder, "second", config, program)
        codes = {name: process.wait(LONG_S) for name, process in processes.items()}
    # One that comes when the other has ended finds nothing to do.
    assert sorted(codes.values()) in ([0, 6], [0, 0]), [last_line(folder, name) for name in codes]
    losers = [name for name, code in codes.items() if code == 6]
    for loser in losers:
        winner = next(process for name, process in processes.items() if name != loser)
        assert last_line(folder, loser).startswith(f"error: checkpoint.dir={folder}/checkpoints ")
        assert f" pid {winner.pid} on " in last_line(folder, loser)
    assert not list((folder / "checkpoints").glob(".tmp-*"))
    return bool(losers)


@pytest.mark.parametrize("program", [MAIN, APART], ids=["one machine", "two machines"])
def test_of_two_trainers_one_survives_and_nothing_is_mixed(program: str, tmp_path: Path) -> None:
    whole = config_of(tmp_path / "whole")
    serve_until(whole)
    delays, losers = random.Random(program), 0
    for number in range(STARTS // 2):
        folder = tmp_path / str(number)
        config = config_of(folder)
        losers += compete(folder, config, program, delays.uniform(0, 2))
        assert sum(counts(config).values()) == RECORDS
        assert hashes(checkpoints(config)[-1]) == hashes(checkpoints(whole)[-1])
    assert losers > 0


@pytest.mark.parametrize("program", [MAIN, APART], ids=["one machine", "two machines"])
def test_of_two_trainers_of_a_topic_one_survives(
    program: str, apache_kafka: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    """Also where one is the last to claim the directory, and the other the last to claim the brokers' id."""
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    publish(servers, topic, goods(RECORDS))
    whole = configuration_of(tmp_path / "whole", kafka(servers, topic, group_id=f"{topic}-whole"))
    serve_until(whole)
    delays, losers = random.Random(program), 0
    for number in range(STARTS // 2):
        folder, group = tmp_path / str(number), f"{topic}-{number}"
        config = configuration_of(folder, kafka(servers, topic, group_id=group))
        losers += compete(folder, config, program, delays.choice((0, delays.uniform(0, 2))))
        assert sum(counts(config).values()) == RECORDS
        assert hashes(checkpoints(config)[-1]) == hashes(checkpoints(whole)[-1])
        assert committed(servers, group, topic)[0] == RECORDS
    assert losers > 0


def test_a_trainer_that_is_woken_after_a_takeover_ends_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = config_of(folder, follow=True)
    directory = folder / "checkpoints"
    process = start(folder, "old", config, APART)
    with killed_at_the_end({"old": process}):
        wait_for(lambda: bool(checkpoints(config)) or process.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # a write that is under way ends first
        claim(directory)
        left = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        process.send_signal(signal.SIGCONT)
        assert process.wait(LONG_S) == 6
    found = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert {path: content for path, content in found.items() if ".tmp-" not in str(path)} == left
    assert last_line(folder, "old").startswith(
        f"error: checkpoint.dir={directory} was taken over by pid {os.getpid()} on "
    )


def test_a_trainer_that_died_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = config_of(folder)
    process = start(folder, "old", config, MAIN)
    with killed_at_the_end({"old": process}):
        wait_for(lambda: bool(checkpoints(config)) or process.poll() is not None)
    serve_until(config)
    assert sum(counts(config).values()) == RECORDS
