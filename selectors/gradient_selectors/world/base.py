"""What ranks exchange, as a protocol: `Alone` is the identity, `ranks.Ranks` has torch.distributed.

Every rank makes the same calls in the same order. A call that only some make hangs the others, so nothing that only one
rank knows may decide whether a call is made: what only one knows is first told to all.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class LostError(BaseException):
    """Another rank has ended or does not answer. Nothing that was exchanged can be trusted, so nothing is saved.

    No `except Exception` goes on after it, as after a KeyboardInterrupt: what comes next would be of other calls.
    """


class RankError(RuntimeError):
    """A rank failed in a pass of its own; raised on every rank with the same words, so that all go on alike."""


class World(Protocol):
    """The ranks of a run. Every method is a call of all ranks together; each may raise LostError.

    Attributes:
        rank, size: which of how many this is.
        sent: bytes that this rank has sent, by kind of call; what it keeps for itself does not count.
    """

    rank: int
    size: int
    sent: Counter[str]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place: the same bits everywhere. Returns `values`."""

    def rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one rank after the other; `counts` says how many each has."""

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Give `parts[r]` to rank r. Returns what each rank gave this one, flat: `counts[r]` numbers of rank r."""

    def scatter(self, values: Tensor) -> Tensor:
        """Sum over ranks, of which each keeps its own rows, as `own_span` says."""

    def gather(self, value: bytes) -> list[bytes]:
        """Every rank's value, on a way of its own that occupies no device."""

    def facts(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's few whole numbers, on the same way."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.sent = Counter[str]()

    def sum(self, values: Tensor) -> Tensor:
        return values

    def rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:  # noqa: ARG002
        return local

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:  # noqa: ARG002
        return [part.flatten() for part in parts]

    def scatter(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: bytes) -> list[bytes]:
        return [value]

    def facts(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]


def gathered(world: World, value: Any) -> list[Any]:
    """Every rank's JSON value."""
    return [json.loads(part) for part in world.gather(json.dumps(value).encode())]


def first(world: World, value: Any) -> Any:
    """Rank 0's JSON value; what the others give is left out."""
    return json.loads(world.gather(json.dumps(value if world.rank == 0 else None).encode())[0])


def is_same(world: World, said: bytes) -> list[bool]:
    """Of each rank, whether it says the same as rank 0; of what is said a digest of 7 bytes is exchanged."""
    digests = world.facts([int.from_bytes(hashlib.sha256(said).digest()[:7])])
    return [digest == digests[0] for digest in digests]


@contextmanager
def ending_all(world: World) -> Iterator[None]:
    """Whatever fails within ends the run: the others notice as this process ends."""
    try:
        yield
    except Exception as error:
        raise LostError(f"rank {world.rank} failed: {type(error).__name__}: {error}") from error


@contextmanager
def together(world: World, *, has_calls: bool = False) -> Iterator[None]:
    """A part that each rank does by itself, and that may fail on some: then RankError is raised on all.

    Nothing may be exchanged within, but for passes over a sharded model (`has_calls`). Where one of these fails, the
    others wait in the midst of theirs, and nothing brings them together again: it raises LostError.
    """
    if world.size == 1:
        yield
        return
    if has_calls:
        with ending_all(world):
            yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # of the model, or of the device: whatever it is, the others must be told
        failure = error
    if any(failed for (failed,) in world.facts([failure is not None])):
        said = world.gather(b"" if failure is None else f"{type(failure).__name__}: {failure}".encode())
        rank = next(i for i, words in enumerate(said) if words)
        raise RankError(f"rank {rank} failed: {said[rank].decode()}") from failure


def union(world: World, values: Tensor) -> Tensor:
    """Whole numbers that any rank has, sorted, each once, (n,) int64."""
    own = torch.unique(values)
    counts = [count for (count,) in world.facts([len(own)])]
    found: Tensor = torch.unique(world.rows(own, counts))
    return found
