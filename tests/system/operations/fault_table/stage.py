"""A trainer on a topic of Apache Kafka, and a Prometheus with the rules of `deploy/`, for faults to be done to.

The rules are those that are deployed but for their waiting times, which are shorter by `FACTOR`. So is the time without
a step after which a trainer counts as stalled, but by less: on a busy machine a step may take ten seconds. Prometheus
scrapes every second.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy.as_processes import DEPLOY, process, trainer_settings, write_yaml
from stream_trainer.demo.broker import free_port
from tests.helpers.brokers import ApacheKafka, create_topic, prepare_kafka, publish, running, why_no_apache_kafka
from tests.helpers.service import get, metrics, wait_for

FACTOR = 60
STALL_S = 600.0  # as deployed: `server.stall_s`, and the same in the rule of a stalled trainer
STALL_HERE_S = 30.0
CHECKPOINT_S = 30.0
RECORDS = 40_000  # for twenty minutes
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TRAINER = "tests.system.operations.fault_table.trainer"


@dataclass
class Stage:
    """What runs.

    Attributes:
        folder: holds everything that the trainer writes, and the files of `trainer.py`.
        config: the trainer's settings.
        waits: seconds that each alert waits before it fires, as deployed.
        broker: closes with the broker, which may be started again in it.
    """

    folder: Path
    config: dict[str, Any]
    kafka: ApacheKafka
    broker: ExitStack
    broker_process: subprocess.Popen[bytes]
    trainer: subprocess.Popen[bytes]
    prometheus: str
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "trainer.log"

    def steps(self) -> float:
        return sum(value for name, value in metrics(self.config).items() if name.startswith("steps_total"))

    def start_broker(self) -> None:
        self.broker_process = self.broker.enter_context(running(self.kafka))


def why_not() -> str | None:
    """What is missing here; None if nothing is."""
    if shutil.which("prometheus") is None:
        return "prometheus is not on the PATH"
    return why_no_apache_kafka()


@contextmanager
def stage(folder: Path, checkpoint_dir: Path) -> Iterator[Stage]:
    """All of it, until the block ends. Yields once steps are made and Prometheus has seen some."""
    with ExitStack() as up:
        broker = up.enter_context(ExitStack())
        kafka = prepare_kafka(folder)
        broker_process = broker.enter_context(running(kafka))
        config = _settings(folder, kafka, checkpoint_dir)
        _fill(kafka, config["source"]["kafka"]["topic"])
        port, waits = free_port(), write_rules(folder)
        trainer = up.enter_context(_trainer(folder, config))
        scraped = f"127.0.0.1:{config['server']['port']}"
        arguments = (f"--config.file={_prometheus(folder, scraped)}", f"--storage.tsdb.path={folder / 'prometheus'}")
        up.enter_context(
            process(folder, "prometheus", "prometheus", *arguments, f"--web.listen-address=127.0.0.1:{port}")
        )
        found = Stage(folder, config, kafka, broker, broker_process, trainer, f"http://127.0.0.1:{port}", waits)
        wait_for(lambda: found.trainer.poll() is not None or _begun(found))
        assert trainer.poll() is None, found.log.read_text()[-2000:]
        yield found


def _begun(found: Stage) -> bool:
    return get(found.config, "/readyz")[0] == 200 and found.steps() > 4


def _settings(folder: Path, kafka: ApacheKafka, checkpoint_dir: Path) -> dict[str, Any]:
    settings = trainer_settings(folder, kafka, free_port())
    target = folder / "target.jsonl"
    shutil.copy(settings["target"]["path"], target)
    settings["target"] |= {"path": str(target), "watch": True}
    settings["checkpoint"] |= {"dir": str(checkpoint_dir), "every_seconds": CHECKPOINT_S, "every_steps": 1_000_000}
    settings["server"]["stall_s"] = STALL_HERE_S
    settings["publish"] = {"dir": str(folder / "published")}
    settings["buffer"] = {"wait_s": 1.0}
    settings["selection"] = {"intake": 32, "waiting": 128}
    return settings


def _fill(kafka: ApacheKafka, topic: str) -> None:
    create_topic(kafka.bootstrap_servers, topic)
    lines = (DEPLOY / "target.jsonl").read_bytes().splitlines()
    publish(kafka.bootstrap_servers, topic, [lines[i % len(lines)] for i in range(RECORDS)])


@contextmanager
def _trainer(folder: Path, config: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    file = write_yaml(folder / "trainer.yaml", config)
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "FAULTS": str(folder)}
    command = [sys.executable, "-m", TRAINER, "run", f"--config={file}"]
    with (folder / "trainer.log").open("wb") as log:
        running_process = subprocess.Popen(command, stderr=log, env=os.environ | paths)
    try:
        yield running_process
    finally:
        running_process.send_signal(signal.SIGCONT)
        running_process.kill()
        running_process.wait()


def _prometheus(folder: Path, scraped: str) -> Path:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [scraped]
    del config["alerting"]
    return write_yaml(folder / "prometheus.yml", config)


def write_rules(folder: Path) -> dict[str, float]:
    """The rules with shorter waits; returns the waits as they are deployed, in seconds."""
    rules, waits = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text()), {}
    for group in rules["groups"]:
        for rule in group["rules"]:
            wait = seconds_of(rule.get("for", "0s"))
            if "alert" in rule:
                waits[rule["alert"]] = wait
            if wait:
                rule["for"] = f"{wait / FACTOR:.0f}s"
            if rule.get("alert") == "StreamTrainerStalled":
                rule["expr"], changed = re.subn(rf"> {STALL_S:.0f}\)", f"> {STALL_HERE_S:.0f})", rule["expr"])
                assert changed == 1
                waits[rule["alert"]] += STALL_S - STALL_HERE_S
    write_yaml(folder / "alerts.yml", rules)
    return waits


def seconds_of(duration: str) -> float:
    """A duration of Prometheus, with one unit."""
    return float(duration[:-1]) * UNITS[duration[-1]]
