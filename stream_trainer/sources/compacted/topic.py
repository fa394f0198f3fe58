"""The last value of every key of a compacted topic: read whole, then followed, by a thread that nobody waits for.

Whatever goes wrong, the topic is read again from its beginning: it is small, and a reader that was away for long may
have missed tombstones that are gone.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from stream_trainer.errors import SourceAwayError, SourceError, StreamTrainerError
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import connect
from stream_trainer.sources.topic_log import REQUEST_TIMEOUT_MS

CLIENT_ID = "stream-trainer-target"
POLL_MS = 500
LOOK_S = 5.0  # between looks whether the brokers are there, and between tries while they are not
LONGEST_CHANGE_S = 30.0  # so long a set that keeps changing is waited for
STANDSTILL_S = 60.0  # so long a read to the end may bring nothing

logger = logging.getLogger(__name__)


class CompactedTopic:
    """Follows one topic.

    Attributes:
        reachable: whether the brokers answered lately.
    """

    def __init__(self, kafka: KafkaSettings, topic: str, take: Callable[[Mapping[bytes, bytes]], None]) -> None:
        """`take` is given the values by key: first within `start`, then in the thread when they may have changed."""
        self._kafka, self._topic, self._take = kafka, topic, take
        self.reachable = False
        self._found: dict[bytes, bytes] = {}
        self._consumer: Any = None
        self._partitions: list[Any] = []
        self._said = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="target-topic", daemon=True)

    def start(self, *, needed: bool) -> None:
        """Read it whole, and follow it from then on.

        Raises SettingsError or SourceError if that fails and it is `needed`; otherwise it is tried again later.
        """
        try:
            self._read_whole()
        except (StreamTrainerError, KafkaError, OSError) as error:
            self._leave(error)
            if needed:
                self._stop.set()
                raise self._named(error) from error
        self._thread.start()

    def close(self) -> None:
        """Follow it no longer."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_S)

    def _read_whole(self) -> None:
        """From the beginning to the end as it is now. Raises SettingsError, SourceError and KafkaError."""
        self._found = {}
        self._consumer = connect(
            KafkaConsumer,
            self._kafka,
            CLIENT_ID,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
        )
        numbers = self._consumer.partitions_for_topic(self._topic)
        if not numbers:
            raise SourceError(f"target.topic={self._topic} does not exist; correct the name or create the topic")
        self._partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        self._consumer.assign(self._partitions)
        for partition, offset in self._consumer.beginning_offsets(self._partitions).items():
            self._consumer.seek(partition, offset)
        ends, moved = self._ends(), time.monotonic()
        while self._behind(ends):
            if self._poll():
                moved = time.monotonic()
            if self._stop.is_set():
                return
            if time.monotonic() - moved > STANDSTILL_S:
                raise SourceAwayError(f"target.topic={self._topic} brings nothing for {STANDSTILL_S:g} s")
        self.reachable, self._said = True, ""
        self._take(self._found)

    def _ends(self) -> dict[Any, int]:
        ends: dict[Any, int] = self._consumer.end_offsets(self._partitions, timeout_ms=REQUEST_TIMEOUT_MS)
        return ends

    def _behind(self, ends: Mapping[Any, int]) -> bool:
        return any(self._consumer.position(partition, timeout_ms=0) < end for partition, end in ends.items())

    def _poll(self) -> bool:
        """Whether a record came. One without a key is of no sample."""
        fetched = self._consumer.poll(timeout_ms=POLL_MS)
        for record in (record for batch in fetched.values() for record in batch):
            if record.key is None:
                logger.warning("target.topic=%s offset %d has no key, and is left out", self._topic, record.offset)
            elif record.value:
                self._found[record.key] = record.value
            else:
                self._found.pop(record.key, None)
        return bool(fetched)

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                if self._consumer is None:
                    self._read_whole()
                self._listen()
            except Exception as error:  # the client's own, of a batch that cannot be read, of the disk
                self._leave(error)
                self._stop.wait(LOOK_S)
        self._close_client()

    def _listen(self) -> None:
        """Until something fails. A change counts once nothing more comes."""
        looked, since = time.monotonic(), None
        while not self._stop.is_set():
            came, now = self._poll(), time.monotonic()
            if came and since is None:
                since = now
            if since is not None and (not came or now - since > LONGEST_CHANGE_S):
                self._take(self._found)
                since = None
            if now - looked > LOOK_S:
                looked = now
                if self._consumer.partitions_for_topic(self._topic) != {p.partition for p in self._partitions}:
                    raise SourceError(f"target.topic={self._topic} has other partitions now")
                self._ends()

    def _leave(self, error: Exception) -> None:
        self.reachable = False
        self._close_client()
        text = str(self._named(error))
        if text != self._said:
            logger.warning("%s; the target stays as it is, and the topic is tried again", text)
        self._said = text

    def _named(self, error: Exception) -> StreamTrainerError:
        if isinstance(error, StreamTrainerError):
            return error
        return SourceError(f"target.topic={self._topic} cannot be read or kept ({type(error).__name__}: {error})")

    def _close_client(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close(timeout_ms=2_000)
