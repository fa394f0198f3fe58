"""Train at full speed for a long time while the broker restarts again and again, and see that nothing grows or is lost.

    python -m tests.system.faults.soak --minutes 30

A producer keeps a topic of three partitions ahead of a service in a process of its own; one record in a hundred is
poison. After a warm-up of a quarter of the time, the second quarter is compared with the last: memory may grow by 3 %,
threads and descriptors not at all. In the end every record that is in the topic must be decided, and counted once.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from tests.helpers.brokers import ApacheKafka, create_topic, prepare_kafka, running
from tests.helpers.service import (
    LONG_S,
    configuration,
    decided,
    good,
    kafka,
    on_free_port,
    start_command,
    state_of,
    wait_for,
)
from tests.system.faults.ends import newest, trainer_of

TOPIC, PARTITIONS = "soak", 3
POISON_EVERY = 100
AHEAD = 4_000  # records that the producer is ahead of the service
DOWN_S = 3.0
ANSWERED_S = 0.3  # after which the service has closed what it answered


@dataclass(frozen=True)
class Reading:
    """What the service's process holds, `seconds` after its start."""

    seconds: float
    bytes: int
    threads: int
    descriptors: int
    kinds: dict[str, int]  # descriptors by what they are: when their number grows, this says of what


class Producer:
    """Publishes until it is stopped, whatever happens to the broker. What counts in the end is what the topic holds."""

    def __init__(self, servers: str, config: dict[str, Any]) -> None:
        self._servers, self._config = servers, config
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.asking = threading.Lock()  # held while it asks the service, which takes a thread and a connection there
        self.sent = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(LONG_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(KafkaError):
                self._publish()

    def _publish(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self._servers, acks="all", linger_ms=20, max_block_ms=5000)
        try:
            while not self._stopping.is_set():
                while self.sent - self._decided() > AHEAD and not self._stopping.wait(0.1):
                    pass
                for _ in range(500):
                    value = b"not JSON" if self.sent % POISON_EVERY == 0 else good(self.sent)
                    producer.send(TOPIC, value, partition=self.sent % PARTITIONS)
                    self.sent += 1
                producer.flush(timeout=30)
        finally:
            producer.close(timeout=5)

    def _decided(self) -> float:
        with self.asking:
            return decided(self._config)


def ends_of(servers: str) -> dict[int, int]:
    """Offsets after the last record, by partition."""
    consumer = KafkaConsumer(bootstrap_servers=servers)
    try:
        found = consumer.end_offsets([TopicPartition(TOPIC, number) for number in range(PARTITIONS)])
    finally:
        consumer.close()
    return {partition.partition: end for partition, end in found.items()}


def read(process: psutil.Process, started: float) -> Reading:
    with process.oneshot():
        memory = process.memory_info().rss
        kinds = descriptors_of(process)
        return Reading(time.monotonic() - started, memory, process.num_threads(), sum(kinds.values()), kinds)


def descriptors_of(process: psutil.Process) -> dict[str, int]:
    """Open descriptors by what they are: the place of a file, a connection's state and port, pipes and the like."""
    kinds: Counter[str] = Counter()
    sockets = {c.fd: f"{c.status} to {c.raddr.port if c.raddr else 'nobody'}" for c in process.net_connections("inet")}
    for number in os.listdir(f"/proc/{process.pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            place = os.readlink(f"/proc/{process.pid}/fd/{number}")
            kinds[sockets.get(int(number), re.sub(r"\d+", "N", place))] += 1
    return dict(kinds)


def growth(readings: list[Reading], whole_s: float) -> dict[str, float]:
    """From the second quarter to the last: share of the memory, and the number of threads and descriptors.

    Medians: while the broker is away, connections come and go.
    """
    before = [r for r in readings if whole_s / 4 <= r.seconds < whole_s / 2]
    after = [r for r in readings if r.seconds >= whole_s * 3 / 4]
    memory = [statistics.median(r.bytes for r in part) for part in (before, after)]
    return {
        "memory": memory[1] / memory[0] - 1,
        "threads": statistics.median(r.threads for r in after) - statistics.median(r.threads for r in before),
        "descriptors": statistics.median(r.descriptors for r in after)
        - statistics.median(r.descriptors for r in before),
    }


def what_is_wrong(
    grown: dict[str, float], allowed: float, config: dict[str, Any], ends: dict[int, int]
) -> Iterator[str]:
    cursor = trainer_of(newest(config))["cursor"]
    positions = {f"{TOPIC}:{number}": {"next": end, "decided": []} for number, end in ends.items()}
    if {
        name: {key: log[key] for key in ("next", "decided")} for name, log in cursor["partitions"].items()
    } != positions:
        yield f"the cursor is {cursor['partitions']}, the topic ends at {ends}"
    if sum(cursor["counts"].values()) != sum(ends.values()):
        yield f"{cursor['counts']} do not add up to the {sum(ends.values())} records of the topic"
    if grown["memory"] > allowed:
        yield f"memory grew by {grown['memory']:.1%}"
    yield from (f"{grown[name]:g} more {name}" for name in ("threads", "descriptors") if grown[name] > 0)


def soak(seconds: float, restart_s: float, allowed: float, folder: Path) -> dict[str, Any]:
    """Run it; what it came to, with `wrong` empty if all is well."""
    readings: list[Reading] = []
    with ExitStack() as all_up:
        (folder / "broker").mkdir()
        broker, up = prepare_kafka(folder / "broker"), all_up.enter_context(ExitStack())
        up.enter_context(running(broker))
        config = _config(broker, folder)
        log = all_up.enter_context((folder / "log").open("wb"))
        service = all_up.enter_context(start_command(folder / "settings.yaml", log))
        all_up.callback(service.kill)
        wait_for(lambda: state_of(config) not in (None, "loading") or service.poll() is not None)
        producer, process, started = (
            Producer(broker.bootstrap_servers, config),
            psutil.Process(service.pid),
            time.monotonic(),
        )
        all_up.callback(producer.stop)
        producer.start()
        restarts = 0
        while (passed := time.monotonic() - started) < seconds:
            assert service.poll() is None, (folder / "log").read_text()[-2000:]
            with producer.asking:
                time.sleep(ANSWERED_S)
                readings.append(read(process, started))
            if passed > (restarts + 1) * restart_s:
                up.close()
                time.sleep(DOWN_S)
                up.enter_context(running(broker))
                restarts += 1
            time.sleep(min(5.0, seconds / 60))
        producer.stop()
        ends = ends_of(broker.bootstrap_servers)
        wait_for(lambda: decided(config) == sum(ends.values()) or service.poll() is not None)
        service.terminate()
        code = service.wait(LONG_S)
    grown = growth(readings, seconds)
    wrong = [f"exit code {code}"] if code else list(what_is_wrong(grown, allowed, config, ends))
    found = {"records": sum(ends.values()), "restarts": restarts, "growth": grown, "wrong": wrong}
    shown = {"first": readings[0], "half": readings[len(readings) // 2], "last": readings[-1]}
    return found | {name: asdict(reading) for name, reading in shown.items()} | {"kinds": kinds_over(readings)}


def kinds_over(readings: list[Reading]) -> dict[str, list[float]]:
    """The median number of descriptors of each kind in each eighth of the time."""
    names = sorted({name for reading in readings for name in reading.kinds})
    cuts = [len(readings) * part // 8 for part in range(9)]
    parts = [readings[a:b] for a, b in pairwise(cuts) if a < b]
    return {name: [statistics.median(r.kinds.get(name, 0) for r in part) for part in parts] for name in names}


def _config(broker: ApacheKafka, folder: Path) -> dict[str, Any]:
    create_topic(broker.bootstrap_servers, TOPIC, PARTITIONS)
    source = kafka(broker.bootstrap_servers, TOPIC, stop_at_end=False)
    selection = {"filter_then_weight": {"solver_max_iterations": 1000}}
    checkpoint, buffer = {"every_steps": 500, "every_seconds": 30.0}, {"wait_s": 1.0}
    config = on_free_port(configuration(folder, source, checkpoint=checkpoint, buffer=buffer))
    config |= {"selection": selection, "log": {"level": "WARNING"}}
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    return config


def main() -> int:
    """Returns 1 if anything grew or is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--restart-seconds", type=float, default=120.0, help="time between restarts of the broker")
    parser.add_argument("--growth", type=float, default=0.03, help="share by which memory may grow after the warm-up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        found = soak(60 * options.minutes, options.restart_seconds, options.growth, Path(name))
    print(json.dumps(found, indent=2))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
