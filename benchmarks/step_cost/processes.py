"""Start the process of a method and talk to it: memory is then its own, and so may be its Python."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.step_cost.methods import ENVIRONMENTS
from benchmarks.step_cost.workloads import Workload

ROOT = Path(__file__).parents[2]
GRACE_S = 10.0


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
        python = _interpreter(job.method)
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.step_cost.worker", _job_text(job)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.ready = self._receive()
        except BaseException:
            self.close()
            raise

    def repeat(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # where it has died, what it said last tells why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()]
            raise MissingError(f"its process ended with code {code}: {said[-1].strip() if said else 'it said nothing'}")
        message: dict[str, Any] = json.loads(line)
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
