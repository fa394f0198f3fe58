"""The protocol of a source. One thread owns a source and is the only one to call it."""

import time
from collections.abc import Mapping
from typing import Protocol

from stream_trainer.records import Partition, Record


class Source(Protocol):
    """A set of ordered logs that can be read from a stored position.

    `start` is called once, then `poll` until `exhausted` or `close`. Positions are Kafka offsets or byte offsets.
    """

    def start(
        self,
        cursor: Mapping[Partition, int],
        identity: Mapping[str, str],
        marks: Mapping[Partition, tuple[int, str]],
    ) -> None:
        """Begin at `cursor`; partitions it does not name begin where the settings say.

        `identity` is what `identity()` returned when the cursor was stored, empty on a first start. `marks` are offset
        and mark of the last record of each partition that was decided: the log must still hold these, or none there.
        Raises SourceAwayError if nobody answers, after which it may be called again, SourceError if the stream cannot
        be read, DataLossError if the cursor cannot be honoured.
        """

    @property
    def finite(self) -> bool:
        """Whether the run ends with what the stream holds at its start."""

    @property
    def replaced(self) -> Mapping[Partition, int]:
        """Where logs were found replaced at the start: what was decided from there on says nothing any more."""

    @property
    def drained(self) -> frozenset[Partition]:
        """Partitions that will give nothing more: of a finite run ever, of another for all that is known now."""

    def hold(self, partitions: frozenset[Partition]) -> None:
        """Return no records of these until called again without them. Idempotent."""

    def poll(self, timeout_s: float) -> list[Record]:
        """Records in order within each partition; empty after `timeout_s` seconds without any, or while paused."""

    def pause(self) -> None:
        """Stop returning records. Idempotent."""

    def resume(self) -> None:
        """Return records again. Idempotent."""

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Tell the stream how far we are, for lag tools only: the truth is in the checkpoint.

        Raises FencedError if another trainer has taken over.
        """

    @property
    def fences(self) -> bool:
        """Whether a commit fails once another trainer has taken over."""

    def positions(self) -> Mapping[Partition, int]:
        """The next position to be read, for each partition that is being read."""

    def end_positions(self) -> Mapping[Partition, int]:
        """The position after the last record of each partition, whether it can be read yet or not."""

    def held_back(self) -> Mapping[Partition, int]:
        """Records of each partition that cannot be read because of an open transaction, as last looked at."""

    def without_leader(self) -> frozenset[Partition]:
        """Partitions that nobody serves at present, as last looked at."""

    @property
    def retention_s(self) -> float | None:
        """For how long records are kept, in seconds; infinite if for ever, None if that is not known."""

    def identity(self) -> Mapping[str, str]:
        """What tells this stream from another of the same name (topic id); stored beside the cursor."""

    @property
    def exhausted(self) -> bool:
        """Whether the run's last record has been returned. Always False for an endless stream."""

    @property
    def reachable(self) -> bool:
        """Whether the stream can be read now, for all that is known: False during an outage of its brokers."""

    @property
    def records_lost(self) -> int:
        """Undecided records found missing from the log and skipped since `start` (setting `on_data_loss: skip`)."""

    def close(self) -> None:
        """Release connections and files. Idempotent."""


class NoSource:
    """The source of a process that reads nothing: of several that train together, where there are fewer partitions."""

    finite = reachable = exhausted = True
    replaced: Mapping[Partition, int] = {}
    drained: frozenset[Partition] = frozenset()
    fences = False
    retention_s = None
    records_lost = 0

    def start(
        self, cursor: Mapping[Partition, int], identity: Mapping[str, str], marks: Mapping[Partition, tuple[int, str]]
    ) -> None:
        """There is nothing to begin."""

    def hold(self, partitions: frozenset[Partition]) -> None:
        """There is nothing to hold."""

    def poll(self, timeout_s: float) -> list[Record]:
        time.sleep(timeout_s)
        return []

    def pause(self) -> None:
        """There is nothing to pause."""

    def resume(self) -> None:
        """There is nothing to resume."""

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """There is nothing to commit."""

    def positions(self) -> Mapping[Partition, int]:
        return {}

    def end_positions(self) -> Mapping[Partition, int]:
        return {}

    def held_back(self) -> Mapping[Partition, int]:
        return {}

    def without_leader(self) -> frozenset[Partition]:
        return frozenset()

    def identity(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        """There is nothing to close."""
