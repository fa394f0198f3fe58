"""Records that could not be used, kept with their original bytes and the reason.

Two places to keep them:

- a file of JSON lines: `topic`, `partition`, `offset`, `next_offset`, `timestamp` (seconds or null), `key`, `value`
  (base64 or null), `headers` (`[name, base64 or null]` pairs), `reason`, `detail`, `trainer_version`;
- a Kafka topic: key, value and headers as they were, and the headers `stream-trainer-topic`, `-partition`, `-offset`,
  `-timestamp` (milliseconds), `-reason`, `-detail` and `-version` after them. A record without a key gets
  `topic:partition:offset` for one, marked by `stream-trainer-null-key`. Header values that were null are sent empty
  and named by index in `stream-trainer-null-headers`. What the brokers refuse as too large goes to the file instead.

A record is kept at least once: after a crash the records since the last checkpoint are read, and kept, again.
"""

import base64
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from stream_trainer import __version__
from stream_trainer.checkpoints.manifest import sync
from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.schema import Settings
from stream_trainer.sources.connection import connect

DETAIL_CHARS = 200
FLUSH_TIMEOUT_S = 60.0  # a broker that restarts is back by then
MAX_IN_FLIGHT = 1000
MAX_REQUEST_BYTES = 64 * 1024 * 1024  # a broker drops connections that send more than its 100 MB
HEADER = "stream-trainer-"

logger = logging.getLogger(__name__)


class DeadLetters(Protocol):
    """Where records go that cannot be used. Thread-safe: one thread sends, another flushes."""

    def send(self, record: Record, reason: str, detail: str) -> None:
        """Keep a record; durable after the next `flush`. Raises SourceError if it cannot be kept."""

    def flush(self) -> None:
        """Return once all that was sent is durable. Raises SourceError if it is not."""

    def close(self) -> None:
        """Flush, and release files and connections. Idempotent. Raises SourceError as `flush` does."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was kept, and why."""

    record: Record
    reason: str
    detail: str
    trainer_version: str


def open_dead_letters(settings: Settings) -> DeadLetters:
    """The kind that the settings name. Raises SettingsError if the file or the topic cannot be written."""
    if settings.dead_letters.kind == "file":
        return FileDeadLetters(settings.dead_letters.path)
    return TopicDeadLetters(settings)


def read_dead_letters(path: Path) -> Iterator[DeadLetter]:
    """What a file of dead letters holds, with the original bytes. Raises SettingsError at a line that is none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(
                    f"{path} line {number} is no dead letter ({type(error).__name__}); remove that line"
                ) from error


class FileDeadLetters:
    """Appends JSON lines to a file that only its owner may read, for it holds what users sent."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError if the file cannot be opened for writing."""
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(descriptor, "ab", buffering=0)
            _drop_torn_line(descriptor)
            sync(path.parent)  # the new file's name
        except OSError as error:
            raise SettingsError(
                f"dead_letters.path={path} cannot be written ({error.strerror}); name a writable file"
            ) from error

    def send(self, record: Record, reason: str, detail: str) -> None:
        """Append one line."""
        line = json.dumps(_to_json(record, reason, detail)).encode() + b"\n"
        with self._lock, self._as_source_error():
            if self._file.write(line) != len(line):
                raise OSError(None, "the line was written in part")

    def flush(self) -> None:
        """Sync the file to disk."""
        with self._lock, self._as_source_error():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._file.close()

    @contextmanager
    def _as_source_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SourceError(
                f"dead_letters.path={self._path} cannot be written ({error.strerror or error}); free some space, or "
                "name another file"
            ) from error


class TopicDeadLetters:
    """Publishes to a topic at the source's brokers, acknowledged by all replicas."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if the topic is not there and is not created, SourceError if no broker answers."""
        kafka = settings.source.kafka
        self._topic = settings.dead_letters.topic or f"{kafka.topic}.dead-letters"
        self._path = settings.dead_letters.path
        self._file: FileDeadLetters | None = None
        self._lock = threading.Lock()
        self._in_flight: deque[tuple[Any, Record, str, str]] = deque()
        self._closed = False
        self._producer = connect(
            KafkaProducer,
            kafka,
            "stream-trainer-dead-letters",
            acks="all",
            # One record that the brokers refuse as too large would end an idempotent producer for good.
            enable_idempotence=False,
            max_request_size=MAX_REQUEST_BYTES,
            max_block_ms=int(kafka.bootstrap_timeout_s * 1000),
        )
        try:
            self._producer.partitions_for(self._topic)
        except KafkaError as error:
            self._producer.close(timeout=0)
            raise SettingsError(
                f"dead_letters.topic={self._topic} cannot be written ({type(error).__name__}); create it and allow "
                "writing, or set dead_letters.kind=file"
            ) from error

    def send(self, record: Record, reason: str, detail: str) -> None:
        """Hand the record to the producer; waits only if many are not acknowledged yet."""
        key = b"%s:%d" % (str(record.partition).encode(), record.offset) if record.key is None else record.key
        with self._lock:
            while self._in_flight and (self._in_flight[0][0].is_done or len(self._in_flight) >= MAX_IN_FLIGHT):
                self._settle_oldest()
            headers = _headers(record, reason, detail)
            try:
                future = self._producer.send(self._topic, value=record.value, key=key, headers=headers)
            except MessageSizeTooLargeError:
                self._keep_in_file(record, reason, detail)
            except KafkaError as error:
                raise self._refused(error) from error
            else:
                self._in_flight.append((future, record, reason, detail))

    def flush(self) -> None:
        """Wait until the brokers have acknowledged everything."""
        with self._lock:
            try:
                self._producer.flush(timeout=FLUSH_TIMEOUT_S)
            except KafkaError as error:
                raise self._refused(error) from error
            while self._in_flight:
                self._settle_oldest()
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Flush and disconnect."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._producer.close(timeout=0)
            if self._file is not None:
                self._file.close()

    def _settle_oldest(self) -> None:
        future, record, reason, detail = self._in_flight[0]
        try:
            future.get(timeout=FLUSH_TIMEOUT_S)
        except (MessageSizeTooLargeError, RecordListTooLargeError):
            self._keep_in_file(record, reason, detail)
        except KafkaError as error:
            raise self._refused(error) from error
        self._in_flight.popleft()

    def _keep_in_file(self, record: Record, reason: str, detail: str) -> None:
        if self._file is None:
            try:
                self._file = FileDeadLetters(self._path)
            except SettingsError as error:  # in the middle of a run: what was learned is to be kept
                raise SourceError(str(error)) from error
        self._file.send(record, reason, detail)
        logger.warning(
            "%s offset %d is too large for dead_letters.topic=%s and goes to %s",
            record.partition,
            record.offset,
            self._topic,
            self._path,
        )

    def _refused(self, error: KafkaError) -> SourceError:
        return SourceError(
            f"dead_letters.topic={self._topic} does not take records ({type(error).__name__}); check the brokers and "
            "the topic, or set dead_letters.kind=file"
        )


def _headers(record: Record, reason: str, detail: str) -> list[tuple[str, bytes]]:
    """The original headers and ours. The client refuses null values, which Kafka itself allows."""
    ours = {
        "topic": record.partition.topic,
        "partition": record.partition.number,
        "offset": record.offset,
        "reason": reason,
        "detail": detail[:DETAIL_CHARS],
        "version": __version__,
    }
    if record.timestamp is not None:
        ours["timestamp"] = round(record.timestamp * 1000)
    if record.key is None:
        ours["null-key"] = 1
    nulls = [str(index) for index, (_, value) in enumerate(record.headers) if value is None]
    if nulls:
        ours["null-headers"] = ",".join(nulls)
    original = [(name, value or b"") for name, value in record.headers]
    return original + [(HEADER + name, str(value).encode()) for name, value in ours.items()]


def _to_json(record: Record, reason: str, detail: str) -> dict[str, Any]:
    return {
        "topic": record.partition.topic,
        "partition": record.partition.number,
        "offset": record.offset,
        "next_offset": record.next_offset,
        "timestamp": record.timestamp,
        "key": _encoded(record.key),
        "value": _encoded(record.value),
        "headers": [[name, _encoded(value)] for name, value in record.headers],
        "reason": reason,
        "detail": detail[:DETAIL_CHARS],
        "trainer_version": __version__,
    }


def _from_json(fields: dict[str, Any]) -> DeadLetter:
    record = Record(
        partition=Partition(fields["topic"], fields["partition"]),
        offset=fields["offset"],
        next_offset=fields["next_offset"],
        value=_decoded(fields["value"]),
        key=_decoded(fields["key"]),
        headers=tuple((name, _decoded(value)) for name, value in fields["headers"]),
        timestamp=fields["timestamp"],
    )
    return DeadLetter(record, fields["reason"], fields["detail"], fields["trainer_version"])


def _encoded(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)


def _drop_torn_line(descriptor: int) -> None:
    """Cut off a last line that a crash left in part: it was never flushed, so its record is read again."""
    size = os.fstat(descriptor).st_size
    end = size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        logger.warning("the dead letters end in a torn line of %d bytes, which is dropped", size - end)
        os.ftruncate(descriptor, end)
