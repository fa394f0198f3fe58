"""The offsets of our consumer group: advisory, so nothing here may hold up reading.

They have a client of their own. A client that reads under a group returns no record while the group's coordinator is
away, however well every partition could be read.
"""

import time
from collections.abc import Mapping
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import CommitFailedError, IllegalGenerationError, KafkaError, UnknownMemberIdError
from kafka.structs import OffsetAndMetadata

from stream_trainer.errors import SourceError
from stream_trainer.records import Partition
from stream_trainer.settings.source import KafkaSettings
from stream_trainer.sources.connection import connect

TIMEOUT_MS = 5_000
CLOSE_TIMEOUT_MS = 2_000
RETRY_S = 60.0  # a commit that waits in vain takes its timeout from reading, so a failed one is not repeated at once


class Group:
    """Reads and commits the offsets of `source.kafka.group_id`. With none, it has none and commits none."""

    def __init__(self, settings: KafkaSettings, client_id: str) -> None:
        """Connects. Raises SettingsError or SourceError as `connect` does."""
        self._settings = settings
        self._retry_at = 0.0
        self._client: Any = None
        if settings.group_id is not None:
            group = {"group_id": settings.group_id, "enable_auto_commit": False}
            self._client = connect(KafkaConsumer, settings, f"{client_id}-group", **group)

    def committed(self, partition: Partition) -> OffsetAndMetadata | None:
        """The group's offset and what was said with it, None if it has none. Raises SourceError if it cannot be known."""
        if self._client is None:
            return None
        try:
            found = self._client.committed(_to_kafka(partition), metadata=True, timeout_ms=TIMEOUT_MS)
        except KafkaError as error:
            if not error.retriable:
                raise
            raise SourceError(
                f"source.kafka.group_id={self._settings.group_id}: where the group stands in {partition} is unknown, "
                f"for its coordinator did not answer ({type(error).__name__}), and there is no checkpoint that tells; "
                f"mend the topic __consumer_offsets, or set source.kafka.group_id to null to begin at "
                f"source.kafka.start={self._settings.start}"
            ) from error
        return found

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Commit offsets, with the step as their metadata. Raises SourceError if that fails, or failed just now."""
        if self._client is None:
            return
        if time.monotonic() < self._retry_at:
            raise SourceError(f"offsets are not committed to group {self._settings.group_id} for now")
        offsets = {_to_kafka(p): OffsetAndMetadata(offset, f"step={step}", -1) for p, offset in positions.items()}
        try:
            self._client.commit(offsets, timeout_ms=TIMEOUT_MS)
        except (CommitFailedError, IllegalGenerationError, UnknownMemberIdError) as error:
            raise SourceError(
                f"source.kafka.group_id={self._settings.group_id} is in use by a consumer that subscribes, so offsets "
                f"cannot be committed ({type(error).__name__}); give this service a group of its own"
            ) from error
        except KafkaError as error:
            self._retry_at = time.monotonic() + RETRY_S
            raise SourceError(
                f"offsets could not be committed to group {self._settings.group_id}: {type(error).__name__}"
            ) from error

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if self._client is not None:
            self._client.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_MS)
        self._client = None


def _to_kafka(partition: Partition) -> Any:
    return TopicPartition(partition.topic, partition.number)
