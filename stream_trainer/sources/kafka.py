"""A Kafka topic as a source: every partition read by hand from the offsets of our own checkpoint.

Partitions are assigned, never subscribed to: one model has one owner, and no rebalance may rewind it. Bytes are never
decoded by the client, for an exception inside a fetch leaves its next `poll` spinning for ever.

Where a partition begins is for `beginning` to say. One that was added while we read begins at its earliest record.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import AuthorizationError, KafkaError, LogTruncationError, OffsetOutOfRangeError

from stream_trainer.errors import SourceAwayError, SourceError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.batches import record_of
from stream_trainer.sources.beginning import Brokers, Cursor, where_to_begin
from stream_trainer.sources.connection import connect, describe_topic, require_codecs, require_topic
from stream_trainer.sources.group import Group
from stream_trainer.sources.loss import LossPolicy
from stream_trainer.sources.topic_log import FETCH_BYTES, REQUEST_TIMEOUT_MS, TopicLog, from_kafka, to_kafka
from stream_trainer.sources.transactions import OpenTransactions
from stream_trainer.sources.undecodable import usable_records

CLOSE_TIMEOUT_MS = 2_000

logger = logging.getLogger(__name__)


class KafkaSource:
    """The source for `source.kind: kafka`. See `sources.base.Source` for the protocol."""

    def __init__(
        self,
        settings: KafkaSettings,
        client_id: str = "stream-trainer",
        confirm: Callable[[], None] | None = None,
        owned: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """`confirm` raises if another trainer owns `checkpoint.dir`; `owned` says which partitions are read here.

        Raises SettingsError if a compression library is missing.
        """
        require_codecs()
        self._settings, self._client_id = settings, client_id
        self._confirm, self._owned = confirm, owned
        self._topic = settings.topic or ""
        self._topic_id: str | None = None
        self._admin: Any = None
        self._consumer: Any = None
        self._group: Group | None = None
        self._loss = LossPolicy(settings)
        self._transactions = OpenTransactions(settings, lambda p: self._log.open_transactions(p))
        self._partitions: list[Partition] = []
        self._held: dict[Partition, int] = {}  # positions of partitions of which nothing is fetched for now
        self._unserved: dict[Partition, int] = {}  # positions of those that had no leader at the start
        self._leaderless: frozenset[Partition] = frozenset()
        self._stop_at: dict[Partition, int] = {}
        self._last_ends: dict[Partition, int] = {}
        self._next_discovery = 0.0
        self._paused = self._outage = False
        self.retention_s: float | None = None

    def start(
        self, cursor: Mapping[Partition, int], identity: Mapping[str, str], marks: Mapping[Partition, tuple[int, str]]
    ) -> None:
        """Connect, settle where each partition begins, and note the ends for `stop_at_end`.

        Raises SettingsError if the topic does not exist or an address or file is wrong, SourceAwayError if the brokers
        do not answer, SourceError if they refuse, DataLossError if the log does not hold the cursor, or holds others
        than were decided, and `on_data_loss` is `fail`.
        """
        try:
            group = self._connect()
            self._open(group, Cursor(cursor, identity, marks))
        except SourceAwayError:
            self.close()
            raise
        except KafkaError as error:
            self.close()
            if error.retriable:
                raise SourceAwayError(
                    f"source.kafka.topic={self._topic} cannot be read ({type(error).__name__}: {error}); check that "
                    "all brokers run"
                ) from error
            raise self._unreadable(error) from error

    def _open(self, group: Group, cursor: Cursor) -> None:
        topic = require_topic(self._admin, self._topic).shared(self._owned)
        brokers = Brokers(self._consumer, self._log, group)
        beginning = where_to_begin(self._settings, brokers, self._loss, topic, cursor)
        self._topic_id = topic.id
        self._unserved = dict(beginning.unserved)
        self._stop_at = dict(beginning.ends) if self.finite else {}
        self._last_ends = dict(beginning.ends)
        self._read_from(beginning.positions)
        self._note_leaders(topic.leaderless)
        self.retention_s = self._log.retention_s(self._topic)
        self._next_discovery = time.monotonic() + self._settings.discovery_interval_s
        logger.info("reading %s from %s", self._topic, {p.number: at for p, at in beginning.positions.items()})

    def poll(self, timeout_s: float) -> list[Record]:
        """Records in order within each partition. Empty while the brokers are away, which is logged once.

        Raises DataLossError if the log no longer holds what comes next, SourceError if it cannot be decoded and
        `on_undecodable` is `fail`, if a finite run waits for a transaction in vain, or if the brokers refuse.
        """
        self._discover_when_due()
        if self._paused or not self._partitions:
            time.sleep(timeout_s)
            return []
        try:
            fetched = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
        except OffsetOutOfRangeError as error:
            self._leave_lost_records(error)
            return []
        except LogTruncationError as error:
            raise self._loss.shortened(str(error)) from error
        except AuthorizationError as error:
            raise self._unreadable(error) from error
        except Exception as error:  # an outage, or whatever a decompressor raises
            if isinstance(error, KafkaError) and error.retriable:
                self._note_outage(error)
                return []
            return self._read_undecodable(error)
        if fetched:
            self._look_for_end_of_outage(from_kafka(next(iter(fetched))))
        elif self._stop_at:
            self._transactions.require_progress(self.positions(), self._stop_at)
        return [record for batch in fetched.values() for record in map(record_of, batch) if self._is_wanted(record)]

    def hold(self, partitions: frozenset[Partition]) -> None:
        """Fetch nothing of these partitions.

        They are not paused: the client forgets the error of a batch of a paused partition, and spins for ever after.
        What it has fetched of them is fetched again later.
        """
        if partitions == self._held.keys() or not set(self._partitions) - partitions:
            return
        positions = {p: at for p, at in self.positions().items() if p in self._partitions}
        released = self._held.keys() - partitions
        self._held = {p: positions[p] for p in partitions if p in positions}
        self._assign()
        for partition in released:
            self._consumer.seek(to_kafka(partition), positions[partition])

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
        """Commit offsets under the group. Raises SourceError if that fails, FencedError if we were replaced."""
        if self._group is not None:
            self._group.commit(positions, step)

    @property
    def fences(self) -> bool:
        """Whether the brokers refuse the commits of a trainer that another one has replaced."""
        return self._group is not None and self._group.fences

    def positions(self) -> Mapping[Partition, int]:
        """The next offset of each partition; past control records and compacted gaps, unlike the last record.

        With `stop_at_end` never past the end noted at the start: records behind it are left for another run.
        """
        reading = [p for p in self._partitions if p not in self._held]
        try:
            read_to = {p: self._consumer.position(to_kafka(p), timeout_ms=0) for p in reading}
        except LogTruncationError as error:
            raise self._loss.shortened(str(error)) from error
        read_to |= self._held | self._unserved
        return {p: min(offset, self._stop_at.get(p, offset)) for p, offset in read_to.items()}

    @property
    def finite(self) -> bool:
        """Whether the run stops at the ends noted at the start."""
        return self._settings.stop_at_end

    @property
    def drained(self) -> frozenset[Partition]:
        """Partitions read to the end that is known: the one noted at the start, or the last one heard of."""
        ends = self._stop_at or {p: self._known_end(p) for p in self._partitions}
        return frozenset(p for p, offset in self.positions().items() if p in ends and offset >= ends[p])

    def _known_end(self, partition: Partition) -> int:
        heard = None if partition in self._held else self._consumer.highwater(to_kafka(partition))
        return max(heard or 0, self._last_ends.get(partition, 0))

    def end_positions(self) -> Mapping[Partition, int]:
        """The offset after the last record of each partition; the last known ones during an outage."""
        served = [p for p in self._partitions if p not in self._leaderless]
        if self._outage:
            return dict(self._last_ends)
        try:
            stable = self._log.stable_ends(served)  # first: what is written meanwhile is held back by nobody
            self._last_ends |= self._log.ends(served)
            self._transactions.look(stable, self._last_ends)
        except KafkaError as error:
            if not error.retriable:
                raise self._unreadable(error) from error
            self._note_outage(error)
            self._next_discovery = 0.0  # perhaps only some partitions have lost their leader
        return dict(self._last_ends)

    def held_back(self) -> Mapping[Partition, int]:
        """Records behind open transactions, when the ends were last looked at."""
        return self._transactions.held_back

    def without_leader(self) -> frozenset[Partition]:
        """Partitions that no broker serves, as the topic was last described."""
        return self._leaderless

    def identity(self) -> Mapping[str, str]:
        """The topic's id by its name; empty where the brokers give none."""
        return {self._topic: self._topic_id} if self._topic_id else {}

    @property
    def replaced(self) -> Mapping[Partition, int]:
        """Where logs were found replaced at the start."""
        return self._loss.replaced

    @property
    def exhausted(self) -> bool:
        """Whether every partition has been read to where it ended at the start (`stop_at_end`)."""
        return self.finite and self.drained >= self._stop_at.keys()

    @property
    def reachable(self) -> bool:
        """Whether the brokers answered when they were last asked."""
        return not self._outage

    @property
    def records_lost(self) -> int:
        """Offsets skipped since `start` because the log no longer held them."""
        return self._loss.records_lost

    def close(self) -> None:
        """Close all clients."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_MS)
        if self._admin is not None:
            self._admin.close()
        if self._group is not None:
            self._group.close()
        self._consumer = self._admin = self._group = None

    def _connect(self) -> Group:
        self._admin = connect(
            KafkaAdminClient, self._settings, f"{self._client_id}-admin", request_timeout_ms=REQUEST_TIMEOUT_MS
        )
        self._consumer = connect(
            KafkaConsumer,
            self._settings,
            self._client_id,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            check_crcs=True,
            max_partition_fetch_bytes=FETCH_BYTES,
            allow_auto_create_topics=False,
        )
        self._log = TopicLog(self._consumer, self._admin)
        self._group = Group.connect(self._settings, self._client_id, self._admin, self._confirm)
        return self._group

    def _read_from(self, positions: Mapping[Partition, int]) -> None:
        """Take these partitions on, beside those already read."""
        self._partitions = [*self._partitions, *positions]
        self._assign()
        for p, offset in positions.items():
            self._consumer.seek(to_kafka(p), offset)

    def _assign(self) -> None:
        self._consumer.assign([to_kafka(p) for p in self._partitions if p not in self._held])

    def _discover_when_due(self) -> None:
        """Look for new partitions and lost leaders, and whether the topic is still the same one."""
        if time.monotonic() < self._next_discovery:
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
            raise self._loss.shortened(f"the topic was deleted and created again (id {self._topic_id}, now {topic.id})")
        topic = topic.shared(self._owned)
        self._note_leaders(topic.leaderless)
        if self.retention_s is not None:  # else the brokers do not say
            self.retention_s = self._log.retention_s(self._topic)
        every = (Partition(self._topic, n) for n in topic.read)
        new = [p for p in every if p not in self._partitions and p not in self._leaderless]
        if new and not self.finite:  # a batch run ends with what it had
            self._take_on(new)
        self._note_end_of_outage()

    def _take_on(self, new: list[Partition]) -> None:
        """Read partitions that were added, or that had no leader at the start."""
        begins, ends = self._log.begins(new), self._log.ends(new)
        positions = {}
        for p in new:
            at = self._unserved.pop(p, begins[p])
            positions[p] = self._loss.within_log(p, at, begins[p], ends[p], "the cursor")
        self._read_from(positions)
        logger.info("new partitions of %s: %s", self._topic, [p.number for p in new])

    def _note_leaders(self, leaderless: frozenset[int]) -> None:
        lost = frozenset(Partition(self._topic, number) for number in leaderless)
        if lost and lost != self._leaderless:
            numbers = sorted(leaderless)
            logger.warning(
                "source.kafka.topic=%s: partitions %s have no leader; the others are read", self._topic, numbers
            )
        elif self._leaderless and not lost:
            logger.info("source.kafka.topic=%s: every partition has a leader again", self._topic)
        self._leaderless = lost

    def _leave_lost_records(self, error: KafkaError) -> None:
        """Go on after records that retention took while we were reading, if the settings allow it."""
        for asked, offset in error.args[0].items():
            p = from_kafka(asked)
            try:
                begin, end = self._log.begins([p])[p], self._log.ends([p])[p]
            except KafkaError as failure:
                self._note_outage(failure)
                return
            if offset > end:
                raise self._loss.shortened(f"partition {p.number} ends at {end}, but {offset} comes next") from error
            self._consumer.seek(asked, self._loss.within_log(p, offset, begin, end, "the next offset"))

    def _read_undecodable(self, error: Exception) -> list[Record]:
        """What can be read of a batch at which the client failed: its next poll would spin, or lose records unseen."""
        away = self._held.keys() | self._leaderless
        positions = {p: at for p, at in self.positions().items() if p not in away}
        try:
            records = usable_records(self._settings, self._log, positions, error)
        except KafkaError as failure:
            if not failure.retriable:
                raise self._unreadable(failure) from failure
            self._note_outage(failure)
            return []
        self._consumer.seek(to_kafka(records[-1].partition), records[-1].next_offset)
        return [record for record in records if self._is_wanted(record)]

    def _is_wanted(self, record: Record) -> bool:
        """Whether the record is part of this run: all are, unless it stops at the ends noted at the start."""
        return not self._stop_at or record.offset < self._stop_at[record.partition]

    def _note_outage(self, reason: object) -> None:
        if not self._outage:
            logger.warning("source.kafka.topic=%s cannot be read for now: %s; trying on", self._topic, reason)
        self._outage = True

    def _look_for_end_of_outage(self, partition: Partition) -> None:
        """Ask: records that come may have been fetched before the brokers went away."""
        if self._outage:
            with suppress(KafkaError):
                self._log.ends([partition])
                self._note_end_of_outage()

    def _note_end_of_outage(self) -> None:
        if self._outage:
            logger.info("source.kafka.topic=%s can be read again", self._topic)
        self._outage = False

    def _unreadable(self, error: KafkaError) -> SourceError:
        if isinstance(error, AuthorizationError):
            return SourceError(
                f"source.kafka.topic={self._topic} may not be read by {self._settings.sasl_username or 'us'} with "
                f"group {self._settings.group_id} ({error}); grant Read and Describe on both"
            )
        return SourceError(f"source.kafka.topic={self._topic} cannot be read ({error}); check the brokers")
