"""Open transactions hold back what follows their first record: until they end, nobody may read on.

Most end within moments. One that stays is said once, with its producer; a run with `stop_at_end` does not wait for it
for longer than `source.kafka.transaction_wait_s`, and never takes what it holds back for the end.
"""

import logging
import time
from collections.abc import Callable, Mapping

from stream_trainer.errors import SourceError
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings

SAY_AFTER_S = 10.0

logger = logging.getLogger(__name__)


class OpenTransactions:
    """What is held back, and since when.

    Attributes:
        held_back: records of each partition that cannot be read, as last looked at.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        describe: Callable[[Partition], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`describe` names the open transactions of a partition."""
        self._settings = settings
        self._describe = describe
        self._clock = clock
        self._since: dict[Partition, tuple[int, float]] = {}  # where reading ends, and since when it does
        self._said: set[Partition] = set()
        self.held_back: dict[Partition, int] = {}

    def look(self, stable: Mapping[Partition, int], ends: Mapping[Partition, int]) -> None:
        """Take note of how far partitions may be read, and of where they end."""
        now = self._clock()
        self.held_back = {p: max(0, ends[p] - at) for p, at in stable.items() if p in ends}
        pinned = {p: stable[p] for p, count in self.held_back.items() if count}
        self._since = {
            p: self._since[p] if p in self._since and self._since[p][0] == at else (at, now) for p, at in pinned.items()
        }
        self._said &= self._since.keys()
        for partition, (at, since) in self._since.items():
            if partition not in self._said and now - since >= SAY_AFTER_S:
                self._said.add(partition)
                logger.warning(
                    "source.kafka.topic=%s: partition %d: an open transaction %s holds back %d records from offset %d "
                    "on; they are read once it is committed or aborted",
                    self._settings.topic,
                    partition.number,
                    self._describe(partition),
                    self.held_back[partition],
                    at,
                )

    def require_progress(self, positions: Mapping[Partition, int], stop_at: Mapping[Partition, int]) -> None:
        """Raise SourceError if a finite run has waited for a transaction for too long."""
        limit = self._settings.transaction_wait_s
        for partition, (at, since) in self._since.items():
            waits = at <= positions.get(partition, at) < stop_at.get(partition, 0)
            if waits and self._clock() - since >= limit:
                raise SourceError(
                    f"source.kafka.topic={self._settings.topic}: partition {partition.number}: an open transaction "
                    f"{self._describe(partition)} holds back {stop_at[partition] - at} records from offset {at} on for "
                    f"more than source.kafka.transaction_wait_s={limit:g}; commit or abort it (kafka-transactions.sh "
                    "abort), then start again: what was read is kept"
                )
