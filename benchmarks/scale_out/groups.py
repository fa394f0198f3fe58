"""Groups of processes, one a rank, that are held up between what they are asked to do."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.scale_out.plan import Workload

ROOT = Path(__file__).parents[2]
GRACE_S = 10.0


class LostError(Exception):
    """A rank has ended, with what it said last in one line."""


class Group:
    """Ranks that are ready.

    Attributes:
        weights: that the model trains.
    """

    def __init__(self, processes: list["_Process"]) -> None:
        self._processes = processes
        self.weights: int = self._answers()[0]["weights"]

    def ask(self, do: str, **order: Any) -> list[dict[str, Any]]:
        """Have all ranks do something. Returns their answers. Raises LostError if one fails."""
        for process in self._processes:
            process.send({"do": do, **order})
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        return [process.receive() for process in self._processes]


@contextmanager
def group(workload: Workload, size: int, device: str, **variables: str) -> Iterator[Group]:
    """A group of so many ranks, one thread each."""
    with ExitStack() as up, tempfile.TemporaryDirectory(prefix="scale-out-") as folder:
        job = {"workload": asdict(workload), "device": device, "threads": 1, "meeting": f"{folder}/meeting"}
        processes = []
        for rank in range(size):
            log = up.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = _Process(job, {"RANK": str(rank), "WORLD_SIZE": str(size), **variables}, log)
            up.callback(process.close)
            processes.append(process)
        yield Group(processes)


class _Process:
    """One rank."""

    def __init__(self, job: Mapping[str, Any], variables: Mapping[str, str], log: IO[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.scale_out.worker", json.dumps(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
        self._log, pipe = log, subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True
        )

    def send(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # where it has died, what it said last tells why
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()]
            raise LostError(f"a rank ended with code {code}: {said[-1].strip() if said else 'it said nothing'}")
        message: dict[str, Any] = json.loads(line)
        return message

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
