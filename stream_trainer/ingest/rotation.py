"""The order in which records of several partitions are handed on: one of each in turn, by number of partition.

So the order is that of the logs, not of the fetches: a finite run is the same every time. One record a turn, because
fetches are held here anyhow, so that longer turns would save nothing and mix worse.

At its turn a partition may have nothing here. A finite run waits for it until it is known to be at its end. A live one
passes it over: at once if it is at its end as far as is known, else after `PATIENCE_S`, and then until it gives
something again; which is counted, for from there on the order is that of this run alone.

What waited for its decision when a run ended comes first, in the order in which it had come. Then comes what an earlier
process planned and did not live to save, as it was planned: a live run too waits for that.
"""

import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator

from stream_trainer.ingest.cursor import Cursor
from stream_trainer.records import Partition, Record

PATIENCE_S = 1.0  # twice what a broker holds back a fetch that finds nothing
PLAN_PATIENCE_S = 60.0  # for a record that was there before: a partition may be without a leader
# What may be held here for a partition that is waited for; its fetches go on, those of the others stop.
MAX_RECORDS = 8192
MAX_BYTES = 64 * 1024 * 1024


class Rotation:
    """Records that were fetched and wait for their turn. Used by the ingest thread alone.

    Attributes:
        passes: how often partitions were left out of turn, each time until they gave something again.
    """

    def __init__(self, cursor: Cursor, clock: Callable[[], float] = time.monotonic) -> None:
        self._cursor = cursor
        self._clock = clock
        self._queues: defaultdict[Partition, deque[Record]] = defaultdict(deque)
        self._records = 0
        self._bytes = 0
        self._partitions: list[Partition] = []
        self._drained: Collection[Partition] = frozenset()
        self._finite = False
        self._awaited: Partition | None = None
        self._awaited_since = 0.0
        self._late: set[Partition] = set()
        self._passed: set[Partition] = set()
        self._held: frozenset[Partition] = frozenset()
        self.passes = 0

    def put(self, records: Collection[Record]) -> None:
        """Add records, in the order of each partition."""
        for record in records:
            self._queues[record.partition].append(record)
        self._records += len(records)
        self._bytes += sum(_size(record) for record in records)

    def know(self, partitions: Collection[Partition], drained: Collection[Partition], *, finite: bool) -> None:
        """Learn which partitions are read, and which of these will give nothing more for all that is known now."""
        self._partitions, self._drained, self._finite = sorted(partitions), drained, finite

    def next(self) -> tuple[Record, bool] | None:
        """The next record, which the cursor takes note of, and whether it is undecided; None if there is none now."""
        partition = self._whose_turn()
        if partition is None:
            return None
        record = self._queues[partition].popleft()
        self._records -= 1
        self._bytes -= _size(record)
        return record, self._cursor.fetched(partition, record.offset, record.next_offset, record.mark)

    def to_hold(self) -> frozenset[Partition]:
        """Partitions of which enough is here while another is waited for: fetch no more of these."""
        if self._records >= MAX_RECORDS or self._bytes >= MAX_BYTES:
            self._held = frozenset(p for p, queue in self._queues.items() if queue)
        elif 2 * self._records < MAX_RECORDS and 2 * self._bytes < MAX_BYTES:
            self._held = frozenset()
        return self._held

    @property
    def waiting(self) -> int:
        """Records that wait for their turn."""
        return self._records

    def is_empty(self, partition: Partition) -> bool:
        """Whether nothing of this partition waits here."""
        return not self._queues[partition]

    def _whose_turn(self) -> Partition | None:
        """A record that was decided before a restart takes no turn: the cursor then leaves the turn as it is."""
        known = self._cursor.to_reread or self._cursor.planned
        for partition in self._in_turn(known):
            if self._queues[partition]:
                self._late.discard(partition)
                self._passed.discard(partition)
                self._awaited = None
                return partition
            patience_s = PLAN_PATIENCE_S if partition == known else PATIENCE_S
            if (self._records or partition == known) and not self._may_pass(partition, patience_s):
                return None
            if partition == known:
                self._cursor.gives_nothing(partition)
        return None

    def _in_turn(self, known: Partition | None) -> Iterator[Partition]:
        """Partitions in the order in which they are asked for a record; first the one whose record is known to come."""
        if known is not None:
            yield known
        last = self._cursor.last
        start = 0 if last is None else bisect_right(self._partitions, last)
        yield from self._partitions[start:]
        yield from self._partitions[:start]

    def _may_pass(self, partition: Partition, patience_s: float) -> bool:
        """Whether to go on without a partition that has nothing here."""
        if self._finite:
            return partition in self._drained
        if partition not in self._drained and partition not in self._late:
            if self._awaited != partition:
                self._awaited, self._awaited_since = partition, self._clock()
            if self._clock() - self._awaited_since < patience_s:
                return False
            self._late.add(partition)
        if partition not in self._passed:
            self._passed.add(partition)
            self.passes += 1
        return True


def _size(record: Record) -> int:
    return len(record.value or b"")
