"""A service that is killed at a point named beforehand, in a process that is forked and so costs no imports.

The product has no hooks for this: what leads to each point is wrapped in the child alone. Whatever is wrapped counts
twice, before and after, so that a kill falls on either side of it. Whoever forks must have no threads, and must never
have run a backward pass: autograd refuses to run in a fork of such a process.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradient_selectors import SelectionEngine
from gradient_selectors.weigh.coefficients import CoefficientSolver
from kafka import KafkaProducer
from torch.optim import optimizer as torch_optimizer

from stream_trainer.checkpoints.plan import PlanFile
from stream_trainer.errors import StreamTrainerError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.letter_topic import TopicDeadLetters
from stream_trainer.records import Outcome, Partition, Sample
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.sources.jsonl import JsonlSource
from stream_trainer.sources.kafka import KafkaSource
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher

# Where a kill may fall is named by what is wrapped. `take`: samples come from the buffer; `step`: a pool is scored or
# trained on, and planned by then; `capture`: a backward pass; `solve`: the program for the coefficients; `optimizer`;
# `plan`: a line says what a step is made of, or how it went; `letter`: one dead letter is written or handed over;
# `transaction`, with what is done to it: letters or offsets are published; `commit`: the source is told; `fsync`,
# `rename` and `delete`, each with the kind of file: those of a checkpoint, and the dead letters' own flush.
RANDOM = "random"  # at a moment that the parent chooses


@dataclass(frozen=True)
class Kill:
    """Where a process ends: the `n`-th time at a point, or after some seconds."""

    point: str
    n: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Place:
    """What a run writes beside its checkpoints, in a folder of its own.

    Attributes:
        trace: a line for each step: number, pool and selected samples by position.
        ledger: a line for each decision: partition, offset and outcome.
    """

    folder: Path

    @property
    def trace(self) -> Path:
        return self.folder / "trace"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def killed(self) -> Path:
        """What a process that killed itself was doing."""
        return self.folder / "killed"

    @property
    def counts(self) -> Path:
        """How often each point was reached, of a run that came to its end."""
        return self.folder / "counts.json"


@dataclass
class Points:
    """Counts how often each point is reached, and ends the process at the one it is given."""

    place: Place
    kill: Kill | None
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reached(self, point: str) -> None:
        with self.lock:
            self.counts[point] += 1
            if self.kill == Kill(point, self.counts[point]):
                self.place.killed.write_text(point)
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, name: str, point: str, what: Callable[..., str] = lambda *_: "") -> None:
        """Put a function that reports to us in place of `owner.name`, which is left as it is otherwise."""
        inner = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            named = f"{point} {what(*args)}".strip()
            self.reached(named)
            result = inner(*args, **options)
            self.reached(named)
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        """For good: to be called in a child."""
        self.wrap(Buffer, "take", "take")
        self.wrap(SelectionEngine, "backward", "step")
        self.wrap(SelectionEngine, "train", "step")
        self.wrap(torch.autograd, "backward", "capture")
        self.wrap(CoefficientSolver, "solve", "solve")
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: self.reached("optimizer"))
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: self.reached("optimizer"))
        self.wrap(PlanFile, "append", "plan")
        for place in (FileDeadLetters, TopicDeadLetters):
            self.wrap(place, "send", "letter")
        for name in ("init", "begin", "commit"):
            self.wrap(KafkaProducer, f"{name}_transaction{'s' if name == 'init' else ''}", f"transaction {name}")
        self.wrap(os, "fsync", "fsync", lambda fd: _kind(os.readlink(f"/proc/self/fd/{fd}")))
        for name in ("rename", "replace"):
            self.wrap(os, name, "rename", lambda _, to: _kind(to))
        for name in ("unlink", "rmdir"):
            self.wrap(os, name, "delete", lambda path: _kind(path))
        for source in (JsonlSource, KafkaSource):
            self.wrap(source, "commit", "commit")


def _kind(path: Any) -> str:
    """The name of a file without what differs from one checkpoint or run to the next."""
    name = re.sub(r"(\.tmp-e\d+|\.trial)-[0-9a-f]+", r"\1", os.path.basename(os.fspath(path)))
    return re.sub(r"\d+(\.e\d+)?", "N", name)


def fork(work: Callable[[], int]) -> int:
    """The id of a child that does `work` and exits with what it returns, or with 1 and a traceback if it raises."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_in_child(config: dict[str, Any], place: Place, kill: Kill | None, timeout_s: float) -> int:
    """Run the service to its end or to `kill`. Returns its exit code, -9 if it was killed.

    Raises TimeoutError if it does not end.
    """
    place.killed.unlink(missing_ok=True)
    child = fork(lambda: _serve(config, place, kill))
    deadline = time.monotonic() + timeout_s
    kill_at = time.monotonic() + kill.seconds if kill is not None and kill.point == RANDOM else deadline
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= kill_at:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if kill_at == deadline:
                raise TimeoutError(f"did not end within {timeout_s:g} s")
            place.killed.write_text(RANDOM)
            return -signal.SIGKILL
        time.sleep(0.005)


def _serve(config: dict[str, Any], place: Place, kill: Kill | None) -> int:
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(1)
    points = Points(place, kill)
    points.install()
    _tell_decisions(place.ledger)
    try:
        serve(Settings(**config), threading.Event(), Watcher(_tell_steps(place.trace)))
    except StreamTrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    place.counts.write_text(json.dumps(points.counts))
    return 0


def _appending(path: Path) -> Callable[[str], None]:
    """Each line is whole, or missing, whenever the process is killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return lambda line: void(os.write(descriptor, line.encode() + b"\n"))


def void(_: object) -> None:
    """Drop a result."""


def _tell_steps(path: Path) -> Callable[[int, Sequence[Sample], StepReport], None]:
    write = _appending(path)

    def on_step(number: int, pool: Sequence[Sample], report: StepReport) -> None:
        pools = [[sample.partition.number, sample.offset] for sample in pool]
        write(json.dumps({"step": number, "pool": pools, "selected": list(report.selected)}))

    return on_step


def _tell_decisions(path: Path) -> None:
    write, inner = _appending(path), Cursor.resolve

    def resolve(self: Cursor, partition: Partition, offset: int, outcome: Outcome, **more: Any) -> None:
        inner(self, partition, offset, outcome, **more)
        write(f"{partition.number} {offset} {outcome.value}")

    Cursor.resolve = resolve  # type: ignore[method-assign]
