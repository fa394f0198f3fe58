"""Start the process of a method and talk to it: memory is then its own, and so may be its Python."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common.child import ROOT, Child, EndedError
from benchmarks.step_cost.methods import ENVIRONMENTS
from benchmarks.step_cost.workloads import Workload


class MissingError(Exception):
    """A method that cannot be measured here, with the reason in one line."""


@dataclass(frozen=True)
class Job:
    """What a process is for.

    Attributes:
        threads: CPU threads of torch.
        answers: file for what the method finds for the check samples; None to time it.
    """

    method: str
    workload: Workload
    device: str
    threads: int
    answers: Path | None = None


class Worker(Protocol):
    """A method that is ready. `ready` is its first message."""

    ready: dict[str, Any]

    def repeat(self) -> dict[str, Any]:
        """Details of one repetition: `seconds`, `peak_bytes` and more. Raises MissingError if it fails."""

    def close(self) -> None:
        """End it."""


Start = Callable[[Job], Worker]
"""Makes a method ready. Raises MissingError if it cannot be measured."""


class Process:
    """A worker in a process of its own."""

    def __init__(self, job: Job) -> None:
        command = [_interpreter(job.method), "-m", "benchmarks.step_cost.worker", _job_text(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
        self._child = Child(command, environment)
        try:
            self.ready = self._receive()
        except BaseException:
            self.close()
            raise

    def repeat(self) -> dict[str, Any]:
        self._child.send("")
        return self._receive()

    def close(self) -> None:
        self._child.close()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._child.receive()
        except EndedError as error:
            raise MissingError(f"its process {error}") from error
        if "error" in message:
            raise MissingError(message["error"])
        return message


def start(job: Job) -> Worker:
    """Start a method in a process of its own and wait until it is ready."""
    return Process(job)


def _interpreter(method: str) -> str:
    environment = ENVIRONMENTS.get(method)
    if environment is None:
        return sys.executable
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        raise MissingError(f"{environment} is not there; run make bench-env")
    return str(python)


def _job_text(job: Job) -> str:
    return json.dumps({**asdict(job), "answers": str(job.answers) if job.answers else None})
