"""A Kafka topic as a source: every partition read by hand from the offsets of our own checkpoint.

Partitions are assigned, never subscribed to: one model has one owner, and no rebalance may rewind it. Bytes are never
decoded by the client, for an exception inside a fetch leaves its next `poll` spinning for ever.

Where a partition begins: the checkpoint's cursor, then the group's committed offset, then the setting `start`.
Partitions that the cursor does not name although it names others of the topic were added meanwhile; they begin at
their earliest record.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import (
    AuthorizationError,
    CorruptRecordError,
    KafkaError,
    LogTruncationError,
    OffsetOutOfRangeError,
    UnsupportedCodecError,
)

from stream_trainer.errors import DataLossError, SourceError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.source import KafkaSettings
from stream_trainer.sources.connection import connect, describe_topic, require_codecs, require_topic
from stream_trainer.sources.group import Group
from stream_trainer.sources.lost_checkpoint import may_begin

REQUEST_TIMEOUT_MS = 5_000  # look-ups and commits that run between polls: an outage must not hold the thread longer
CLOSE_TIMEOUT_MS = 2_000

logger = logging.getLogger(__name__)


class KafkaSource:
    """The source for `source.kind: kafka`. See `sources.base.Source` for the protocol."""

    def __init__(self, settings: KafkaSettings, client_id: str = "stream-trainer") -> None:
        """Raises SettingsError if a compression library is missing. Connects only at `start`."""
        require_codecs()
        self._settings = settings
        self._client_id = client_id
        self._topic = settings.topic or ""
        self._topic_id: str | None = None
        self._admin: Any = None
        self._consumer: Any = None
        self._group: Group | None = None
        self._partitions: list[Partition] = []
        self._stop_at: dict[Partition, int] = {}
        self._last_ends: dict[Partition, int] = {}
        self._next_discovery = 0.0
        self._paused = False
        self._outage = False
        self._records_lost = 0

    def start(self, cursor: Mapping[Partition, int], identity: Mapping[str, str]) -> None:
        """Connect, settle where each partition begins, and note the ends for `stop_at_end`.

        Raises SettingsError if the topic does not exist or an address or file is wrong, SourceError if the brokers
        cannot be reached or refuse, DataLossError if the log does not hold the cursor and `on_data_loss` is `fail`.
        """
        self._connect()
        try:
            topic = require_topic(self._admin, self._topic)
            self._topic_id = topic.id
            found = [Partition(self._topic, number) for number in topic.partitions]
            ours = self._cursor_of_this_topic(cursor, identity.get(self._topic), found)
            begins, ends = self._begins(found), self._ends(found)
            positions = {p: self._first_position(p, ours, begins[p], ends[p]) for p in found}
            self._read_from(positions)
        except KafkaError as error:
            raise self._unreadable(error) from error
        if self._settings.stop_at_end:
            self._stop_at = ends
        self._last_ends = ends
        self._next_discovery = time.monotonic() + self._settings.discovery_interval_s
        logger.info("reading %s from %s", self._topic, {p.number: offset for p, offset in positions.items()})

    def poll(self, timeout_s: float) -> list[Record]:
        """Records in order within each partition. Empty while the brokers are away, which is logged once.

        Raises DataLossError if the log no longer holds what comes next, SourceError if it cannot be decoded or the
        brokers refuse.
        """
        self._discover_when_due()
        if self._paused:
            time.sleep(timeout_s)
            return []
        try:
            fetched = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
        except OffsetOutOfRangeError as error:
            self._leave_lost_records(error)
            return []
        except LogTruncationError as error:
            raise self._shortened(str(error)) from error
        except KafkaError as error:
            if not error.retriable:
                raise self._unreadable(error) from error
            self._note_outage(error)
            return []
        except Exception as error:  # whatever a decompressor raises
            raise self._undecodable(error) from error
        if fetched:
            self._note_end_of_outage()
        return [record for batch in fetched.values() for record in map(_to_record, batch) if self._is_wanted(record)]

    def pause(self) -> None:
        """Stop returning records; what was already fetched is kept for `resume`.

        The client is not told: its paused partitions drop the error of a batch that cannot be decoded, and the `poll`
        after `resume` then spins for ever. Its own thread keeps the connections alive, and fetches no more than it may
        hold.
        """
        self._paused = True

    def resume(self) -> None:
        """Return records again."""
        self._paused = False

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Commit offsets under the group, with the step as their metadata. Raises SourceError if that fails."""
        if self._group is not None:
            self._group.commit(positions, step)

    def positions(self) -> Mapping[Partition, int]:
        """The next offset of each partition; past control records and compacted gaps, unlike the last record.

        With `stop_at_end` never past the end noted at the start: records behind it are left for another run.
        """
        try:
            read_to = {p: self._consumer.position(_to_kafka(p), timeout_ms=0) for p in self._partitions}
        except LogTruncationError as error:
            raise self._shortened(str(error)) from error
        return {p: min(offset, self._stop_at.get(p, offset)) for p, offset in read_to.items()}

    def end_positions(self) -> Mapping[Partition, int]:
        """The offset after the last committed record of each partition; the last known ones during an outage."""
        if self._outage:
            return dict(self._last_ends)
        try:
            self._last_ends = self._ends(self._partitions)
        except KafkaError as error:
            if not error.retriable:
                raise self._unreadable(error) from error
            self._note_outage(error)
        return dict(self._last_ends)

    def identity(self) -> Mapping[str, str]:
        """The topic's id by its name; empty where the brokers give none."""
        return {self._topic: self._topic_id} if self._topic_id else {}

    @property
    def exhausted(self) -> bool:
        """Whether every partition has been read to where it ended at the start (`stop_at_end`)."""
        if not self._stop_at:
            return False
        positions = self.positions()
        return all(positions[p] >= end for p, end in self._stop_at.items())

    @property
    def reachable(self) -> bool:
        """Whether the brokers answered when they were last asked."""
        return not self._outage

    @property
    def records_lost(self) -> int:
        """Offsets skipped since `start` because the log no longer held them."""
        return self._records_lost

    def close(self) -> None:
        """Close all clients."""
        if self._group is not None:
            self._group.close()
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_MS)
        if self._admin is not None:
            self._admin.close()
        self._group = self._consumer = self._admin = None

    def _connect(self) -> None:
        self._admin = connect(
            KafkaAdminClient, self._settings, f"{self._client_id}-admin", request_timeout_ms=REQUEST_TIMEOUT_MS
        )
        self._consumer = connect(
            KafkaConsumer,
            self._settings,
            self._client_id,
            group_id=None,  # see `sources.group`
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            check_crcs=True,
            allow_auto_create_topics=False,
        )
        self._group = Group(self._settings, self._client_id)

    def _begins(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        asked = list(map(_to_kafka, partitions))
        found = self._consumer.beginning_offsets(asked, timeout_ms=REQUEST_TIMEOUT_MS)
        return {_from_kafka(p): offset for p, offset in found.items()}

    def _ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Under read_committed these stop short of open transactions."""
        asked = list(map(_to_kafka, partitions))
        found = self._consumer.end_offsets(asked, timeout_ms=REQUEST_TIMEOUT_MS)
        return {_from_kafka(p): offset for p, offset in found.items()}

    def _cursor_of_this_topic(
        self, cursor: Mapping[Partition, int], stored_id: str | None, found: list[Partition]
    ) -> dict[Partition, int]:
        """The part of the cursor that can be honoured, once another or a new topic is accounted for."""
        ours = {p: offset for p, offset in cursor.items() if p.topic == self._topic}
        if len(ours) < len(cursor):
            others = sorted({p.topic for p in cursor} - {self._topic})
            logger.warning("the cursor of %s is left behind: source.kafka.topic=%s", ", ".join(others), self._topic)
        gone = sorted(p.number for p in ours if p not in found)
        if stored_id and self._topic_id and stored_id != self._topic_id:
            what = f"the topic was deleted and created again (id {stored_id}, now {self._topic_id})"
        elif gone:
            what = f"partitions {gone} are gone, so the topic was deleted and created again"
        else:
            return ours
        self._lost(what, "read the new topic from its first record", 0)
        return dict.fromkeys(found, 0)

    def _first_position(self, p: Partition, cursor: Mapping[Partition, int], begin: int, end: int) -> int:
        if p in cursor:
            return self._within_log(p, cursor[p], begin, end, "the cursor")
        if cursor:
            return begin
        found = self._group.committed(p) if self._group is not None else None
        if found is not None and may_begin(self._settings, p, found.offset, found.metadata):
            committed = found.offset
            if committed > begin:
                logger.warning(
                    "partition %d: there is no checkpoint, so reading begins at %d, where group %s stands, and leaves "
                    "out the %d records before it; to read these too set source.kafka.group_id to a new name",
                    p.number,
                    committed,
                    self._settings.group_id,
                    committed - begin,
                )
            return self._within_log(p, committed, begin, end, f"the offset of group {self._settings.group_id}")
        return begin if self._settings.start == "earliest" else end

    def _within_log(self, p: Partition, offset: int, begin: int, end: int, whose: str) -> int:
        """`offset` if the log still holds it, else what `on_data_loss` says."""
        if offset < begin:
            what = f"partition {p.number} begins at {begin}, but {whose} is {offset}: {begin - offset} records are gone"
            self._lost(what, f"go on at {begin}", begin - offset)
            return begin
        if offset > end:
            what = f"partition {p.number} ends at {end}, but {whose} is {offset}: the log was cut or made anew"
            self._lost(what, f"go on at {end}", 0)
            return end
        return offset

    def _lost(self, what: str, remedy: str, records: int) -> None:
        if self._settings.on_data_loss == "fail":
            raise DataLossError(
                f"source.kafka.topic={self._topic}: {what}; restore the log, or set source.kafka.on_data_loss=skip to "
                f"{remedy}"
            )
        self._records_lost += records
        logger.error("source.kafka.topic=%s: %s; on_data_loss=skip: %s", self._topic, what, remedy)

    def _read_from(self, positions: Mapping[Partition, int]) -> None:
        """Take these partitions on, beside those already read."""
        self._partitions = [*self._partitions, *positions]
        self._consumer.assign(list(map(_to_kafka, self._partitions)))
        for p, offset in positions.items():
            self._consumer.seek(_to_kafka(p), offset)

    def _discover_when_due(self) -> None:
        """Look for new partitions, and whether the topic is still the same one. Batch runs end with what they had."""
        if self._settings.stop_at_end or time.monotonic() < self._next_discovery:
            return
        try:
            self._discover()
        except KafkaError as error:
            if isinstance(error, AuthorizationError):
                raise self._unreadable(error) from error
            self._note_outage(error)
        # Counted from the end, so that a slow answer does not leave the loop with nothing but questions.
        self._next_discovery = time.monotonic() + self._settings.discovery_interval_s

    def _discover(self) -> None:
        topic = describe_topic(self._admin, self._topic)
        if topic is None:
            self._note_outage("the topic does not exist")
            return
        if self._topic_id and topic.id and topic.id != self._topic_id:
            raise self._shortened(f"the topic was deleted and created again (id {self._topic_id}, now {topic.id})")
        new = [p for p in (Partition(self._topic, n) for n in topic.partitions) if p not in self._partitions]
        if new:
            self._read_from(self._begins(new))
            logger.info("new partitions of %s: %s", self._topic, [p.number for p in new])
        self._note_end_of_outage()

    def _leave_lost_records(self, error: KafkaError) -> None:
        """Go on after records that retention took while we were reading, if the settings allow it."""
        for asked, offset in error.args[0].items():
            p = _from_kafka(asked)
            try:
                begin, end = self._begins([p])[p], self._ends([p])[p]
            except KafkaError as failure:
                self._note_outage(failure)
                return
            if offset > end:
                raise self._shortened(f"partition {p.number} ends at {end}, but {offset} comes next") from error
            self._consumer.seek(asked, self._within_log(p, offset, begin, end, "the next offset"))

    def _is_wanted(self, record: Record) -> bool:
        """Whether the record is part of this run: all are, unless it stops at the ends noted at the start."""
        return not self._stop_at or record.offset < self._stop_at[record.partition]

    def _note_outage(self, reason: object) -> None:
        if not self._outage:
            logger.warning("source.kafka.topic=%s cannot be read for now: %s; trying on", self._topic, reason)
        self._outage = True

    def _note_end_of_outage(self) -> None:
        if self._outage:
            logger.info("source.kafka.topic=%s can be read again", self._topic)
        self._outage = False

    def _shortened(self, what: str) -> DataLossError:
        """A cursor cannot go back while its records are in flight, so this ends the run under either policy."""
        return DataLossError(
            f"source.kafka.topic={self._topic}: {what}; start again to see what is missing, with "
            "source.kafka.on_data_loss=skip to go on without it"
        )

    def _unreadable(self, error: KafkaError) -> SourceError:
        if isinstance(error, AuthorizationError):
            return SourceError(
                f"source.kafka.topic={self._topic} may not be read by {self._settings.sasl_username or 'us'} with "
                f"group {self._settings.group_id} ({error}); grant Read and Describe on both"
            )
        if isinstance(error, (CorruptRecordError, UnsupportedCodecError)):
            return self._undecodable(error)
        return SourceError(f"source.kafka.topic={self._topic} cannot be read ({error}); check the brokers")

    def _undecodable(self, error: Exception) -> SourceError:
        """A batch that cannot be decoded: going on would spin in the client, or lose records unseen."""
        where = ", ".join(f"{p.number} at {offset}" for p, offset in self.positions().items())
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return SourceError(
            f"source.kafka.topic={self._topic} holds a batch that cannot be read; next offsets by partition: {where} "
            f"({reason}); delete records up to the end of that batch and set source.kafka.on_data_loss=skip"
        )


def probe(settings: KafkaSettings) -> None:
    """Connect and look the topic up. Raises SettingsError or SourceError with what is wrong."""
    require_codecs()
    admin = connect(KafkaAdminClient, settings, "stream-trainer-check", request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        require_topic(admin, settings.topic or "")
    except KafkaError as error:
        raise SourceError(f"source.kafka.topic={settings.topic} cannot be described ({error}); check access") from error
    finally:
        admin.close()


def _to_kafka(partition: Partition) -> Any:
    return TopicPartition(partition.topic, partition.number)


def _from_kafka(partition: Any) -> Partition:
    return Partition(partition.topic, partition.partition)


def _to_record(message: Any) -> Record:
    return Record(
        partition=Partition(message.topic, message.partition),
        offset=message.offset,
        next_offset=message.offset + 1,
        value=message.value,
        key=message.key,
        headers=tuple(message.headers or ()),
        timestamp=message.timestamp / 1000 if message.timestamp >= 0 else None,
    )
