"""Which records are decided, and where to resume reading so that each is decided exactly once.

A partition's position is its lowest undecided one. Records above it may be decided already, because decisions come in
any order; the state keeps those as intervals, and after a restart they are skipped when they are read again.
Offsets rise within a partition but have gaps (compaction, transactions, byte offsets), so an interval ends where the
record after it may begin, and no offset is ever counted on to exist.
"""

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stream_trainer.records import Outcome, Partition


@dataclass(slots=True)
class _Entry:
    """A record between the lowest undecided one and the last one read."""

    offset: int
    next_offset: int
    decided: bool


@dataclass(slots=True)
class _Log:
    """What is known of one partition.

    Attributes:
        read_to: everything below it has been read.
        entries: records from the lowest undecided one to `read_to`, in order.
        undecided: those of `entries` that are undecided, by offset.
        restored: intervals `[start, end)` above `read_to` that were decided before a restart, in order.
    """

    read_to: int
    entries: deque[_Entry] = field(default_factory=deque)
    undecided: dict[int, _Entry] = field(default_factory=dict)
    restored: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def position(self) -> int:
        return self.entries[0].offset if self.entries else self.read_to

    def was_decided(self, offset: int) -> bool:
        """Whether a restart finds `offset` decided. Offsets rise, so intervals that end below it are done with."""
        while self.restored and self.restored[0][1] <= offset:
            self.restored.popleft()
        return bool(self.restored) and self.restored[0][0] <= offset

    def drop_decided(self) -> None:
        while self.entries and self.entries[0].decided:
            self.entries.popleft()

    def intervals(self) -> list[list[int]]:
        """Decided `[start, end)` above `position`. Neighbours with no record between them are one interval."""
        found: list[list[int]] = []
        joins = False
        for entry in self.entries:
            if entry.decided and joins:
                found[-1][1] = entry.next_offset
            elif entry.decided:
                found.append([entry.offset, entry.next_offset])
            joins = entry.decided
        for start, end in self.restored:
            if end > self.read_to:
                found.append([max(start, self.read_to), end])
        return found


class Cursor:
    """Thread-safe: the ingest thread fetches, and both it and the trainer decide. O(1) amortised per record."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logs: dict[Partition, _Log] = {}
        self._counts: Counter[Outcome] = Counter()

    def begin(self, positions: Mapping[Partition, int]) -> None:
        """Agree with the source on where reading begins; to be called once, before the first `fetched`.

        A partition that begins below the cursor has been made anew, so what was decided above it says nothing. One
        that is not read any more is forgotten.
        """
        with self._lock:
            kept = {p: log for p, log in self._logs.items() if p in positions and log.position <= positions[p]}
            self._logs = {partition: kept.get(partition, _Log(read_to=0)) for partition in positions}
            for partition, position in positions.items():
                self._logs[partition].read_to = position

    def fetched(self, partition: Partition, offset: int, next_offset: int) -> bool:
        """Take note of a record that was read, in the order of its partition.

        Returns False if it was decided before a restart: skip it.
        """
        with self._lock:
            log = self._logs.setdefault(partition, _Log(read_to=offset))
            assert log.read_to <= offset < next_offset, f"{partition} read {offset} after {log.read_to}"
            entry = _Entry(offset, next_offset, decided=log.was_decided(offset))
            log.read_to = next_offset
            if not entry.decided:
                log.undecided[offset] = entry
            if log.entries or not entry.decided:
                log.entries.append(entry)
            return not entry.decided

    def reached(self, partition: Partition, position: int) -> None:
        """Take note that every record below `position` has been read.

        Takes the position past what the stream never returns (control records, compacted gaps).
        """
        with self._lock:
            log = self._logs.setdefault(partition, _Log(read_to=position))
            log.read_to = max(log.read_to, position)

    def resolve(self, partition: Partition, offset: int, outcome: Outcome) -> None:
        """Settle what became of a record. Asserts that it was fetched and is undecided."""
        with self._lock:
            log = self._logs.get(partition, _Log(read_to=0))
            assert offset in log.undecided, f"{partition} has no undecided record {offset}"
            log.undecided.pop(offset).decided = True
            log.drop_decided()
            self._counts[outcome] += 1

    def positions(self) -> dict[Partition, int]:
        """The lowest undecided position of each partition: where to resume reading."""
        with self._lock:
            return {partition: log.position for partition, log in self._logs.items()}

    @property
    def counts(self) -> Mapping[Outcome, int]:
        """Records by outcome over the life of the model, restarts included."""
        with self._lock:
            return {outcome: self._counts[outcome] for outcome in Outcome}

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON: `{"partitions": {"topic:0": {"next": 7, "decided": [[9, 12]]}}, "counts": {...}}`.

        Intervals are half-open. O(records between the lowest undecided one and the last one read).
        """
        with self._lock:
            return {
                "partitions": {
                    str(partition): {"next": log.position, "decided": log.intervals()}
                    for partition, log in self._logs.items()
                },
                "counts": {outcome.value: self._counts[outcome] for outcome in Outcome},
            }

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> "Cursor":
        """Inverse of `state_dict`, to be followed by reading again from `positions()`."""
        cursor = cls()
        for name, log in snapshot["partitions"].items():
            intervals: Sequence[Sequence[int]] = log["decided"]
            cursor._logs[Partition.parse(name)] = _Log(
                read_to=log["next"], restored=deque((start, end) for start, end in intervals)
            )
        cursor._counts.update({Outcome(name): count for name, count in snapshot["counts"].items()})
        return cursor
