"""Which records are decided, and where to resume reading so that each is decided exactly once.

A partition's position is its lowest undecided one. Records above it may be decided already, because decisions come in
any order; the state keeps those as intervals, and after a restart they are skipped when they are read again.
Offsets rise within a partition but have gaps (compaction, transactions, byte offsets), so an interval ends where the
record after it may begin, and no offset is ever counted on to exist.

The cursor also knows in which order records of several partitions arrived. The state holds the order of those that wait
for their decision, and the partition that came last: after a restart they are read again in this order, and the turn
goes on where it was. Within a partition the order is that of the offsets, so it is a list of partitions.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stream_trainer.ingest.arrivals import Arrivals
from stream_trainer.records import Decided, Decisions, Outcome, Partition


@dataclass(slots=True)
class _Entry:
    """A record between the lowest undecided one and the last one read."""

    offset: int
    next_offset: int
    decided: bool
    arrival: int
    mark: str


@dataclass(slots=True)
class _Log:
    """What is known of one partition.

    Attributes:
        read_to: everything below it has been read.
        entries: records from the lowest undecided one to `read_to`, in order.
        undecided: those of `entries` that are undecided, by offset.
        restored: intervals `[start, end)` above `read_to` that were decided before a restart, in order.
        reread_to: what lies below it was read before a restart, and its order is known.
        last_decided: offset and mark of the highest record that is decided, in this run or before; None if unknown.
    """

    read_to: int
    entries: deque[_Entry] = field(default_factory=deque)
    undecided: dict[int, _Entry] = field(default_factory=dict)
    restored: deque[tuple[int, int]] = field(default_factory=deque)
    reread_to: int = 0
    last_decided: tuple[int, str] | None = None

    @property
    def position(self) -> int:
        return self.entries[0].offset if self.entries else self.read_to

    def was_decided(self, offset: int) -> bool:
        """Whether a restart finds `offset` decided. Offsets rise, so intervals that end below it are done with."""
        while self.restored and self.restored[0][1] <= offset:
            self.restored.popleft()
        return bool(self.restored) and self.restored[0][0] <= offset

    def decide(self, offset: int) -> None:
        entry = self.undecided.pop(offset)
        entry.decided = True
        if entry.mark and (self.last_decided is None or offset > self.last_decided[0]):
            self.last_decided = offset, entry.mark
        self.drop_decided()

    def forget_from(self, offset: int) -> None:
        """What was decided from `offset` on was in another log."""
        self.restored = deque((start, min(end, offset)) for start, end in self.restored if start < offset)
        self.reread_to = min(self.reread_to, offset)
        self.last_decided = None

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
    """Thread-safe: the ingest thread fetches, and both it and the trainer decide. O(1) amortised per record.

    Attributes:
        ledger: told of every decision, in the order of the counts.
    """

    def __init__(self) -> None:
        self.ledger: Decisions | None = None
        self._lock = threading.Lock()
        self._logs: dict[Partition, _Log] = {}
        self._counts: Counter[Outcome] = Counter()
        self._arrivals = 0
        self._order = Arrivals()
        self._last: Partition | None = None
        self._to_reread: deque[Partition] = deque()

    def begin(self, positions: Mapping[Partition, int], replaced: Mapping[Partition, int] | None = None) -> None:
        """Agree with the source on where reading begins; to be called once, before the first `fetched`.

        A partition that begins below the cursor has been made anew, so what was decided above it says nothing. Nor does
        what was decided from the offset on that `replaced` names. One that is not read any more is forgotten.
        """
        with self._lock:
            kept = {p: log for p, log in self._logs.items() if p in positions and log.position <= positions[p]}
            self._logs = {partition: kept.get(partition, _Log(read_to=0)) for partition in positions}
            for partition, position in positions.items():
                self._logs[partition].read_to = position
            for partition, offset in (replaced or {}).items():
                self._logs[partition].forget_from(offset)
            self._to_reread = deque(p for p in self._to_reread if p in kept)
            self._order.begin({p: log.reread_to for p, log in self._logs.items()}, positions)

    def follow(self, records: Iterable[tuple[Partition, int]]) -> None:
        """Have these records come in this order, after those that waited. To be called before `begin`, or to end it."""
        with self._lock:
            self._order.plan(records)

    def arrived_to(self, partition: Partition, offset: int) -> list[tuple[Partition, int]]:
        """Records that came since the last call, up to one that did, in order, whatever became of them."""
        with self._lock:
            return self._order.take_to(partition, offset)

    @property
    def planned(self) -> Partition | None:
        """Whose record comes next by the plan that is followed, once all that waited was read again."""
        with self._lock:
            return None if self._to_reread else self._order.next

    @property
    def plan_broken(self) -> str:
        """Why records cannot come as planned; empty if they can, for all that is known."""
        return self._order.broken

    def gives_nothing(self, partition: Partition) -> None:
        """Take note that what is planned of a partition does not come."""
        with self._lock:
            self._order.gave_all(partition)

    def fetched(self, partition: Partition, offset: int, next_offset: int, mark: str = "") -> bool:
        """Take note of a record that was read, in the order of its partition and of arrival.

        Returns False if it was decided before a restart: skip it.
        """
        with self._lock:
            log = self._logs.setdefault(partition, _Log(read_to=offset))
            assert log.read_to <= offset < next_offset, f"{partition} read {offset} after {log.read_to}"
            self._arrivals += 1
            entry = _Entry(offset, next_offset, log.was_decided(offset), self._arrivals, mark)
            log.read_to = next_offset
            if not entry.decided:
                log.undecided[offset] = entry
                self._order.note(partition, offset, lambda p, at: at in self._logs[p].undecided)
                self._arrived(partition, offset < log.reread_to)
            if log.entries or not entry.decided:
                log.entries.append(entry)
            return not entry.decided

    def _arrived(self, partition: Partition, again: bool) -> None:
        """Cross a record off the list of what is to be read again, or else note whose turn it was."""
        if again and partition in self._to_reread:
            self._to_reread.remove(partition)
            return
        self._last = partition
        self._gave_all(partition)

    def _gave_all(self, partition: Partition) -> None:
        """Nothing that was read before a restart is left of this partition, whatever has vanished from its log."""
        if self._to_reread:
            self._to_reread = deque(p for p in self._to_reread if p != partition)

    def reached(self, partition: Partition, position: int) -> None:
        """Take note that every record below `position` has been read.

        Takes the position past what the stream never returns (control records, compacted gaps).
        """
        with self._lock:
            log = self._logs.setdefault(partition, _Log(read_to=position))
            log.read_to = max(log.read_to, position)
            if log.read_to >= log.reread_to:
                self._gave_all(partition)
            self._order.gave_all(partition, position)

    def resolve(
        self,
        partition: Partition,
        offset: int,
        outcome: Outcome,
        *,
        id: str | None = None,
        step: int | None = None,
        coefficient: float | None = None,
        reason: str | None = None,
    ) -> None:
        """Settle what became of a record; the rest is for the ledger (see `Decided`).

        Asserts that it was fetched and is undecided.
        """
        with self._lock:
            log = self._logs.get(partition, _Log(read_to=0))
            assert offset in log.undecided, f"{partition} has no undecided record {offset}"
            log.decide(offset)
            self._counts[outcome] += 1
            if self.ledger is not None:
                self.ledger.note(Decided(partition, offset, outcome, time.time(), id, step, coefficient, reason))

    def discard(self, before: Mapping[str, int]) -> int:
        """Count as discarded what was trained on or not selected since the counts of an earlier `state_dict`.

        Weights go back to that moment and positions do not. Returns how many records that are.
        """
        with self._lock:
            gone = 0
            for outcome in (Outcome.TRAINED, Outcome.NOT_SELECTED):
                gone += self._counts[outcome] - before.get(outcome.value, 0)
                self._counts[outcome] = before.get(outcome.value, 0)
            self._counts[Outcome.DISCARDED] += gone
            if self.ledger is not None:
                self.ledger.discard(sum(before.values()))
            return gone

    def positions(self) -> dict[Partition, int]:
        """The lowest undecided position of each partition: where to resume reading."""
        with self._lock:
            return {partition: log.position for partition, log in self._logs.items()}

    @property
    def marks(self) -> dict[Partition, tuple[int, str]]:
        """Offset and mark of the highest decided record of each partition, where known."""
        with self._lock:
            return {p: log.last_decided for p, log in self._logs.items() if log.last_decided is not None}

    @property
    def last(self) -> Partition | None:
        """The partition whose record arrived last, those aside that are read again after a restart."""
        return self._last

    @property
    def to_reread(self) -> Partition | None:
        """The partition whose record comes next of those that are read again; None once all are."""
        with self._lock:
            return self._to_reread[0] if self._to_reread else None

    @property
    def counts(self) -> Mapping[Outcome, int]:
        """Records by outcome over the life of the model, restarts included."""
        with self._lock:
            return {outcome: self._counts[outcome] for outcome in Outcome}

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON: `{"partitions": {"topic:0": {"next": 7, "decided": [[9, 12]]}}, "counts": {...}, ...}`.

        Intervals are half-open. `rotation` holds what a restart needs to read on in the same order: `waiting` lists
        the undecided records that were read, by index of their partition. `marks` tells a log from one put in its
        place. O(records between the lowest undecided one and the last one read).
        """
        with self._lock:
            return {
                "partitions": {
                    str(partition): {"next": log.position, "decided": log.intervals()}
                    for partition, log in self._logs.items()
                },
                "counts": {outcome.value: self._counts[outcome] for outcome in Outcome},
                "rotation": {
                    "last": None if self._last is None else str(self._last),
                    "read_to": [max(log.read_to, log.reread_to) for log in self._logs.values()],
                    "waiting": " ".join(map(str, self._waiting())),
                },
                "marks": {str(p): log.last_decided for p, log in self._logs.items() if log.last_decided is not None},
            }

    def _waiting(self) -> list[int]:
        """Indices of partitions, in order: of what waits, then of what is still to be read again."""
        index = {partition: i for i, partition in enumerate(self._logs)}
        arrived = [(entry.arrival, index[p]) for p, log in self._logs.items() for entry in log.undecided.values()]
        return [i for _, i in sorted(arrived)] + [index[p] for p in self._to_reread]

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
        if "rotation" in snapshot:  # older checkpoints have none
            cursor._restore_rotation(snapshot["rotation"], snapshot["marks"])
        return cursor

    def _restore_rotation(self, rotation: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
        partitions = list(self._logs)
        self._last = None if rotation["last"] is None else Partition.parse(rotation["last"])
        self._to_reread = deque(partitions[int(i)] for i in rotation["waiting"].split())
        for partition, read_to in zip(partitions, rotation["read_to"], strict=True):
            self._logs[partition].reread_to = read_to
        for name, (offset, mark) in marks.items():
            self._logs[Partition.parse(name)].last_decided = offset, mark
