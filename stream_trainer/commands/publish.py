"""Publish records to a topic, and know after any interruption how many of them are there.

Where the brokers have transactions, each holds some records and a number that says how far it got, committed as the
offset of a consumer group that is named after the job: either both are there or neither is. A job that is started again
reads that number and goes on behind it: readers of committed records see every record exactly once.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import InvalidProducerEpochError, KafkaError, ProducerFencedError
from kafka.protocol.api_key import ApiKey
from kafka.structs import OffsetAndMetadata

from stream_trainer.errors import SourceError
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import abandon, connect

IN_FLIGHT_RECORDS = 2_000  # the client has no memory limit of its own, so wait for acknowledgements this often
IN_FLIGHT_BYTES = 16 * 1024 * 1024
COMMIT_S = 0.5  # readers of committed records see a slow stream no later than this
LINGER_MS = 5
FLUSH_TIMEOUT_S = 60
REQUEST_TIMEOUT_MS = 10_000


class Publisher:
    """A producer whose failures are raised by the next call, and that never holds much.

    Attributes:
        records, bytes: handed over so far; bytes of the values.
        stored: number and note of the last `commit` that any run of this job has made; `(0, "")` if there was none.
    """

    def __init__(self, settings: KafkaSettings, topic: str, job: str | None) -> None:
        """Without `job`, or transactions, an interrupted run does not know what it has published.

        Raises SourceError if the brokers cannot be reached or refuse.
        """
        self._topic, self._job = topic, job if job and _has_transactions(settings) else None
        self._failure: BaseException | None = None
        self._waiting_records = self._waiting_bytes = 0
        self._begun = 0.0
        self.records = self.bytes = 0
        self.stored = (0, "")
        options: dict[str, Any] = {"acks": "all", "linger_ms": LINGER_MS}
        if self._job is not None:
            options["transactional_id"] = self._job
        self._producer = connect(KafkaProducer, settings, "stream-trainer-produce", **options)
        if self._job is not None:
            with self._telling_failure():
                self._producer.init_transactions()  # ends what an earlier run left open
                self.stored = self._read_stored(settings)

    @property
    def exact(self) -> bool:
        """Whether a job that is interrupted and started again publishes nothing twice."""
        return self._job is not None

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return (
            self._waiting_records >= IN_FLIGHT_RECORDS
            or self._waiting_bytes >= IN_FLIGHT_BYTES
            or (self.exact and self._waiting_records > 0 and time.monotonic() - self._begun >= COMMIT_S)
        )

    def send(
        self,
        value: bytes | None,
        partition: int | None = None,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Hand a record over. Raises SourceError if it is too large."""
        try:
            if self.exact and not self._waiting_records:
                self._producer.begin_transaction()
            sent = self._producer.send(self._topic, value, key=key, headers=list(headers), partition=partition)
            sent.add_errback(self._note_failure)
        except KafkaError as error:
            raise SourceError(
                f"record {self.records + 1} of {len(value or b'')} bytes cannot be published ({error}); "
                "check the topic's max.message.bytes"
            ) from error
        if not self._waiting_records:
            self._begun = time.monotonic()
        self.records += 1
        self.bytes += len(value or b"")
        self._waiting_records += 1
        self._waiting_bytes += len(value or b"")

    def commit(self, number: int, note: str) -> None:
        """Wait until the brokers have everything, and know this number and note. Raises SourceError if they do not."""
        if not self._waiting_records:
            return
        with self._telling_failure():
            self._producer.flush(timeout=FLUSH_TIMEOUT_S)
            if self._failure is not None:
                raise self._failure
            if self.exact:
                place = {TopicPartition(self._topic, 0): OffsetAndMetadata(number, note, -1)}
                self._producer.send_offsets_to_transaction(place, self._job)
                self._producer.commit_transaction()
        self._waiting_records = self._waiting_bytes = 0

    def close(self) -> None:
        """Disconnect. What was not committed is dropped, or unknown without transactions."""
        abandon(self._producer)

    def _read_stored(self, settings: KafkaSettings) -> tuple[int, str]:
        consumer = connect(
            KafkaConsumer, settings, "stream-trainer-produce-group", group_id=self._job, enable_auto_commit=False
        )
        try:
            place = TopicPartition(self._topic, 0)
            found = consumer.committed(place, metadata=True, timeout_ms=REQUEST_TIMEOUT_MS)
        finally:
            consumer.close(autocommit=False)
        return (found.offset, found.metadata or "") if found is not None else (0, "")

    def _note_failure(self, error: BaseException) -> None:
        self._failure = self._failure or error

    @contextmanager
    def _telling_failure(self) -> Iterator[None]:
        try:
            yield
        except (ProducerFencedError, InvalidProducerEpochError) as error:
            raise SourceError(
                f"another process publishes the same to {self._topic}, or the brokers were away for long "
                f"({type(error).__name__}); see that there is one, and start it again: it goes on where this one ended"
            ) from error
        except KafkaError as error:
            what = "are not published" if self.exact else "may be missing"
            remedy = "start it again: it goes on behind the others" if self.exact else "publish again"
            raise SourceError(
                f"of {self.records} records sent the last {self._waiting_records} {what} "
                f"({self._failure or error}); check the brokers and {remedy}"
            ) from error


def _has_transactions(settings: KafkaSettings) -> bool:
    admin = connect(KafkaAdminClient, settings, "stream-trainer-produce-admin", request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        offered = set(admin.api_versions())
        return offered >= {ApiKey.InitProducerId, ApiKey.AddOffsetsToTxn, ApiKey.TxnOffsetCommit}
    finally:
        admin.close()
