"""Processes that torchrun starts: told to stop, killed, and started again in another number.

STREAM_TRAINER_KILLS=30 kills as often as that, at points that STREAM_TRAINER_SEED draws.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers.brokers import create_topic, publish
from tests.helpers.service import LONG_S, checkpoints, counts, good, goods, kafka, trainer_json, wait_for
from tests.system.ranks.test_ranks import PARTITIONS, publish_to_all, settings

RECORDS = 400
KILLS = int(os.environ.get("STREAM_TRAINER_KILLS", "3"))
FEWEST, MOST = 12, 60  # records that come before each kill: some lives have too few for a step, and are killed idle
QUIET_S = 4.0  # without a word for so long, a life is idle

OURS = ("STREAM_TRAINER_KILLS", "STREAM_TRAINER_SEED", "STREAM_TRAINER_IDLE_S")  # which a run would take for settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LONG_S * (2 + KILLS))]


@contextmanager
def torchrun(
    folder: Path, config: dict[str, Any], size: int, options: Sequence[str] = (), **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A run on so many processes, whose log is in `folder/log`; killed if it still runs at the end."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(config | {"log": {"level": "DEBUG"}}))
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *options]
    arguments = [*launcher, "-m", "stream_trainer", "run", f"--config={file}"]
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            arguments, env={**inherited, **paths, **variables}, stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        yield process
    finally:
        for child in workers(process):
            child.kill()
        process.kill()
        process.wait()


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Those that torchrun has started, by rank."""
    try:
        children = [(child, child.environ()) for child in psutil.Process(process.pid).children()]
        begun = [
            (int(known["RANK"]), child) for child, known in children if "RANK" in known
        ]  # one has just been forked
        return [child for _, child in sorted(begun, key=lambda pair: pair[0])]
    except psutil.Error:
        return []


def wait_until_made(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    def is_made() -> bool:
        found = re.findall(r": step (\d+): ", (folder / "log").read_text())
        return any(int(number) >= step for number in found) or process.poll() is not None

    wait_for(is_made)


def everything_once(config: dict[str, Any], topic: str, records: int = RECORDS) -> None:
    assert sum(counts(config).values()) == records
    cursor = trainer_json(config)["cursor"]["partitions"]
    ends = {f"{topic}:{number}": len(range(number, records, PARTITIONS)) for number in range(PARTITIONS)}
    assert {name: log["next"] for name, log in cursor.items()} == ends


def test_sigterm_to_one_process_ends_all_with_a_checkpoint(broker: str, topic: str, tmp_path: Path) -> None:
    publish_to_all(broker, topic, goods(RECORDS))
    config = settings(tmp_path / "run", kafka(broker, topic))
    with torchrun(tmp_path, config, 2) as process:
        wait_until_made(process, tmp_path, 3)
        workers(process)[1].send_signal(signal.SIGTERM)
        assert process.wait(LONG_S) == 0
    stopped = re.findall(r"step (\d+): stopped", (tmp_path / "log").read_text())
    assert len(stopped) == 2
    assert len(set(stopped)) == 1
    assert trainer_json(config)["step"] == int(stopped[0])
    with torchrun(tmp_path, config, 3) as process:
        assert process.wait(LONG_S) == 0
    everything_once(config, topic)


def test_killed_processes_lose_and_repeat_nothing_in_whatever_number_they_go_on(
    broker: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while they load, read, score, write a checkpoint or wait; started again on 2, 1, 3, 2, ... ranks.

    Each life has the whole model on each rank or in rows, and waits for its checkpoints or trains on, as chance says.
    """
    # A step takes few records: else most of a life would be waiting for more.
    learned: dict[str, Any] = {"profile": "thrifty", "pool_size": 8, "batch_size": 3, "waiting": 16, "intake": 8}
    learned["learned"] = {"probe_every": 3}
    source = kafka(broker, topic, stop_at_end=False)
    config = settings(tmp_path / "run", source, checkpoint={"every_steps": 4}, selection=learned)
    chance = random.Random(int(os.environ.get("STREAM_TRAINER_SEED", "1")))
    create_topic(broker, topic, PARTITIONS)
    records, places = 0, Counter[str]()
    for number in range(KILLS):
        records = publish_more(broker, topic, records, chance.randrange(FEWEST, MOST))
        config["distributed"]["mode"] = mode = chance.choice(["replicated", "fsdp2"])
        config["checkpoint"]["asynchronous"] = chance.random() < 0.5
        with torchrun(tmp_path, config, (2, 1, 3)[number % 3]) as process:
            saved = trainer_json(config)["step"] if checkpoints(config) else 0
            found = wait_for_a_moment(process, tmp_path, saved, chance)
            places[found] += 1
            chance.choice(workers(process)).kill()
            assert process.wait(LONG_S) not in (0, None)
        with capsys.disabled():
            print(f"\nkill {number + 1}: {found}, of {(2, 1, 3)[number % 3]} ranks, {mode}", end="", flush=True)
    config["source"]["kafka"]["stop_at_end"] = True
    with torchrun(tmp_path, config, 2) as process:
        assert process.wait(LONG_S) == 0
    with capsys.disabled():
        print(f"\n{KILLS} kills, {dict(places)}: {records} records, each once, {trainer_json(config)['step']} steps")
    everything_once(config, topic, records)


def publish_more(broker: str, topic: str, before: int, count: int) -> int:
    """Records after the first so many, dealt to the partitions in turn. Returns how many there are now."""
    values = {number: good(number) for number in range(before, before + count)}
    for partition in range(PARTITIONS):
        own = [value for number, value in values.items() if number % PARTITIONS == partition]
        publish(broker, topic, own, partition)
    return before + count


def wait_for_a_moment(process: subprocess.Popen[bytes], folder: Path, saved: int, chance: random.Random) -> str:
    """Until a moment that chance has drawn, or until nothing comes any more. Says what the ranks did then."""
    if chance.random() < 0.15:
        wait_for(lambda: bool(workers(process)))
        time.sleep(10 * chance.random())
        return "start"
    step, logged = saved + chance.randrange(1, 7), folder / "log"
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        said = logged.read_text()
        assert process.poll() is None, said[:500]
        made = [int(found) for found in re.findall(r": step (\d+): ", said)]
        if made and max(made) >= step:
            time.sleep(chance.random() / 10)
            return "checkpoint" if step % 4 == 0 else "step"
        if "loaded the model" in said and time.time() - logged.stat().st_mtime > QUIET_S:
            return "idle"
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_torchrun_starts_killed_processes_again(broker: str, topic: str, tmp_path: Path) -> None:
    publish_to_all(broker, topic, goods(RECORDS))
    config = settings(tmp_path / "run", kafka(broker, topic), checkpoint={"every_steps": 4})
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with torchrun(tmp_path, config, 2, ["--max-restarts=2"], **own) as process:
        wait_until_made(process, tmp_path, 5)
        workers(process)[0].kill()
        assert process.wait(LONG_S) == 0
    assert "resumed from" in (tmp_path / "log").read_text()
    everything_once(config, topic)
