"""The process of one service: it makes as many steps as each line on standard input says, and waits in between.

    python -m benchmarks.telemetry.worker '{"variant": "all", "folder": "...", "steps": 400, "port": 9000, ...}'

Answers are JSON, one object a line: the seconds of each step, of the processor and of the wall, whatever thread they
were spent by, and those of the processor that the ledger's calls took. With the variant `off` nothing is watched: no
metric is written, there is no page, no ledger, and no log.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from prometheus_client import Counter, Enum, Gauge, Histogram

from stream_trainer import service
from stream_trainer.demo.run import INTAKE, MODEL_CONFIG, WAITING
from stream_trainer.demo.stream import write_stream
from stream_trainer.ledger.book import Ledger
from stream_trainer.monitoring.logs import configure_logging
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.monitoring.pages import Health
from stream_trainer.monitoring.progress import Progress
from stream_trainer.monitoring.reporting import shown
from stream_trainer.settings.schema import LogSettings, Settings
from stream_trainer.training import trainer
from stream_trainer.training.watchers import Watcher

VARIANTS = ("off", "ledger", "all")
# The demo's model, of 0.3 million parameters, and one of two million: a step of it takes a few tenths of a second.
MODELS = {
    "demo": dict(MODEL_CONFIG),
    "small": MODEL_CONFIG | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4},
}
CHECKPOINT_STEPS = 50  # four times as often as by default: each writes a segment of the ledger
DISTANT_STEPS = 1_000_000


class KeptProgress(Progress):
    """Progress that lets the metrics be seen, for there to be as many partitions as one likes."""

    def begin(self, metrics: Metrics, health: Callable[[], Health]) -> None:
        """Keep the metrics, too."""
        super().begin(metrics, health)
        self.kept = metrics

    def fill(self, partitions: int) -> None:
        """Series of so many partitions, with numbers in them."""
        metrics = self.kept
        for number in range(partitions):
            by_partition = (metrics.lag, metrics.decided_offset, metrics.behind_transactions)
            for i, gauge in enumerate((*by_partition, metrics.retention_remaining)):
                gauge.set(12_345_678.0 + number + i, "samples", str(number))


class Turns:
    """Holds the service up after its step, until it is its turn again."""

    def __init__(self, replies: TextIO, ready: Callable[[], None], in_ledger: list[float]) -> None:
        self._replies, self._ready, self._in_ledger = replies, ready, in_ledger
        self._left = self._began = 0
        self._steps: list[tuple[float, float, float]] = []
        self._from: tuple[float, float] | None = None

    def on_step(self, *_: object) -> None:
        now = time.process_time(), time.perf_counter()
        if self._from is not None:
            self._steps.append((now[0] - self._from[0], now[1] - self._from[1], sum(self._in_ledger)))
            self._left -= 1
        self._in_ledger.clear()
        if self._left <= 0:
            self._wait()
        self._from = time.process_time(), time.perf_counter()

    def _wait(self) -> None:
        if self._from is None:
            self._ready()
        names = ("processor_s", "wall_s", "ledger_s")
        answer = {name: [step[i] for step in self._steps] for i, name in enumerate(names)}
        self._replies.write(json.dumps(answer) + "\n")
        self._replies.flush()
        self._steps, line = [], sys.stdin.readline()
        if not line:
            os._exit(0)
        self._left = int(line)


def main(job: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, watched = Path(job["folder"]), job["variant"] == "all"
    log = LogSettings(level="INFO" if watched else "ERROR", format="json", progress="plain" if watched else "off")
    progress = KeptProgress()
    with ExitStack() as stack:
        configure_logging(log, stack.enter_context((folder / "log").open("w")))
        if watched:
            stack.enter_context(shown(progress, "telemetry", log))
        else:
            _write_no_metric()
        in_ledger = _timed_ledger() if job["variant"] == "ledger" else []
        turns = Turns(replies, (lambda: progress.fill(job["partitions"])) if watched else lambda: None, in_ledger)
        settings = settings_of(folder, job)
        service.serve(settings, threading.Event(), Watcher(turns.on_step), progress=progress if watched else None)
    raise SystemExit("the stream ended before the measurement")


def _write_no_metric() -> None:
    """Make every write of a metric, and the work of finding out what to write, nothing."""

    def nothing(*_: object, **__: object) -> None: ...

    for kind, name in ((Counter, "inc"), (Gauge, "set"), (Gauge, "inc"), (Histogram, "observe"), (Enum, "state")):
        setattr(kind, name, nothing)
    for name in ("observe_step", "observe_stages", "observe_advantage"):
        setattr(trainer, name, nothing)


def _timed_ledger() -> list[float]:
    """Seconds of the processor that each call of the ledger takes from now on, in whatever thread."""
    found: list[float] = []

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            began = time.thread_time()
            call(*args)
            found.append(time.thread_time() - began)

        return run

    for name in ("note", "write", "saved"):
        setattr(Ledger, name, timed(getattr(Ledger, name)))
    return found


def settings_of(folder: Path, job: dict[str, Any]) -> Settings:
    """A model on the demo's stream; the selection is the default."""
    stream = write_stream(folder, job["steps"] * INTAKE + WAITING, seed=0)
    watched = job["variant"] == "all"
    return Settings.model_validate(
        {
            "source": {"kind": "jsonl", "jsonl": {"path": str(stream.records)}},
            "model": {"config": MODELS[job["model"]], "tokenizer": "bytes"},
            "target": {"path": str(stream.target)},
            "selection": {"waiting": WAITING, "intake": INTAKE},
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 20},
            "training": {"threads": 1},
            "evaluation": {"every_steps": DISTANT_STEPS},
            "checkpoint": {"dir": str(folder / "checkpoints"), "every_steps": CHECKPOINT_STEPS},
            "ledger": {"enabled": job["variant"] != "off"},
            "dead_letters": {"path": str(folder / "dead-letters.jsonl")},
            "server": {"enabled": watched, "port": job["port"]},
        }
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
