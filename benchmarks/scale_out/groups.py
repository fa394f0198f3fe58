"""Groups of processes, one a rank, that are held up between what they are asked to do."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from benchmarks.common.child import Child, EndedError
from benchmarks.scale_out.plan import Workload


class LostError(Exception):
    """A rank has ended, with what it said last in one line."""


class Group:
    """Ranks that are ready.

    Attributes:
        weights: that the model trains.
    """

    def __init__(self, ranks: list[Child]) -> None:
        self._ranks = ranks
        self.weights: int = self._answers()[0]["weights"]

    def ask(self, do: str, **order: Any) -> list[dict[str, Any]]:
        """Have all ranks do something. Returns their answers. Raises LostError if one fails."""
        for rank in self._ranks:
            rank.send(json.dumps({"do": do, **order}))
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        try:
            return [rank.receive() for rank in self._ranks]
        except EndedError as error:
            raise LostError(f"a rank {error}") from error


@contextmanager
def group(workload: Workload, size: int, device: str, **variables: str) -> Iterator[Group]:
    """A group of so many ranks, one thread each."""
    with ExitStack() as up, tempfile.TemporaryDirectory(prefix="scale-out-") as folder:
        job = {"workload": asdict(workload), "device": device, "threads": 1, "meeting": f"{folder}/meeting"}
        command = [sys.executable, "-m", "benchmarks.scale_out.worker", json.dumps(job)]
        alike = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(size), **variables}
        ranks = []
        for rank in range(size):
            ranks.append(Child(command, alike | {"RANK": str(rank)}))
            up.callback(ranks[-1].close)
        yield Group(ranks)
