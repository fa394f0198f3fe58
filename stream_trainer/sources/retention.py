"""How long it takes until a topic's retention reaches what is undecided: seconds until records are lost."""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping

from stream_trainer.records import Partition, Record

NOTED_S = 1.0  # between the timestamps that are remembered of a partition


class Horizon:
    """Remembers the timestamps of a few of the records that were read. Used by the ingest thread alone.

    Retention by time deletes whole segments, each once its newest record is too old. So a record lives at least as long
    as its own timestamp says.
    """

    def __init__(self) -> None:
        self._noted: defaultdict[Partition, deque[tuple[int, float]]] = defaultdict(deque)

    def note(self, records: Iterable[Record]) -> None:
        """Take note of records that were read, in the order of each partition."""
        for record in records:
            noted = self._noted[record.partition]
            if record.timestamp is not None and (not noted or record.timestamp - noted[-1][1] >= NOTED_S):
                noted.append((record.offset, record.timestamp))

    def remaining(
        self, retention_s: float, positions: Mapping[Partition, int], ends: Mapping[Partition, int], now: float
    ) -> dict[Partition, float]:
        """Seconds by partition, from the lowest undecided offsets, the ends and Unix time.

        It is the whole retention where nothing is undecided, and not there while no record was read.
        """
        found = {}
        for partition, position in positions.items():
            if position >= ends.get(partition, position + 1):
                found[partition] = retention_s
                continue
            written = self._written(partition, position)
            if written is not None:
                found[partition] = retention_s - max(0.0, now - written)
        return found

    def _written(self, partition: Partition, position: int) -> float | None:
        """When the record at `position` was written, at the earliest."""
        noted = self._noted[partition]
        below = bisect_right(noted, (position, float("inf"))) - 1
        for _ in range(below):
            noted.popleft()
        return noted[0][1] if noted else None
