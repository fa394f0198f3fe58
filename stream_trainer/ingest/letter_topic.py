"""Dead letters in a topic at the source's brokers, acknowledged by all replicas.

A letter that the brokers have not acknowledged is held and tried again; nobody waits for it, and its record stays
undecided. So if the brokers are away, or the topic has no leader, a restart reads a few records again, and that is all.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, RecordListTooLargeError

from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.ingest.letter import DeadLetter, are_too_many, to_message
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.settings.source import KafkaSettings
from stream_trainer.sources.connection import connect

PATIENCE_S = 60.0  # a letter held for longer pauses reading: else what is decided behind it would pile up in the cursor
SETTLE_S = 5.0  # so long a checkpoint waits for a letter that was sent just now
BLOCK_MS = 500  # so long the ingest thread may stand still for the brokers' metadata
RETRY_S = 1.0
MAX_REQUEST_BYTES = 64 * 1024 * 1024  # a broker drops connections that send more than its 100 MB

TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """A letter that is not acknowledged; `future` is None while the client does not have it."""

    letter: DeadLetter
    since: float
    future: Any = None


class TopicDeadLetters:
    """Publishes to a topic. What the brokers refuse as too large goes to the file instead."""

    def __init__(self, kafka: KafkaSettings, topic: str | None, open_file: Callable[[], FileDeadLetters]) -> None:
        """`topic` is the source's with `.dead-letters` appended if it is None.

        Raises SettingsError if the topic is not there and is not created, SourceError if no broker answers.
        """
        self._topic = topic or f"{kafka.topic}.dead-letters"
        self._open_file = open_file
        self._file: FileDeadLetters | None = None
        self._lock = threading.Lock()
        self._held: deque[_Held] = deque()
        self._retry_at = 0.0
        self._refusal: SourceError | None = None
        self._failing = self._closed = False
        self._producer = connect(
            KafkaProducer,
            kafka,
            "stream-trainer-dead-letters",
            acks="all",
            # One record that the brokers refuse as too large would end an idempotent producer for good.
            enable_idempotence=False,
            max_request_size=MAX_REQUEST_BYTES,
            max_block_ms=BLOCK_MS,
        )
        self._require_topic(kafka.bootstrap_timeout_s)

    def send(self, letter: DeadLetter) -> None:
        """Hand the letter to the client, which sends it in the background."""
        with self._lock:
            self._held.append(_Held(letter, time.monotonic()))
            if time.monotonic() >= self._retry_at:
                self._hand_over()
            if self._refusal is not None:
                raise self._refusal

    def settled(self) -> list[DeadLetter]:
        """What the brokers have acknowledged since the last call. Raises SourceError if they refuse for good."""
        with self._lock:
            kept = self._collect()
            if time.monotonic() >= self._retry_at:
                self._hand_over()
            kept += self._file.settled() if self._file is not None else []
            if self._refusal is not None and not kept:
                raise self._refusal
            return kept

    def wait(self) -> None:
        """Until every letter is acknowledged, or was sent more than `SETTLE_S` seconds ago."""
        with self._lock:
            newest = self._held[-1].since if self._held else 0.0
        with suppress(KafkaTimeoutError):  # they stay held
            self._producer.flush(timeout=max(0.0, newest + SETTLE_S - time.monotonic()))

    def flush(self) -> None:
        """Make durable what went to the file: acknowledged is durable already."""
        if self._file is not None:
            self._file.flush()

    @property
    def held(self) -> int:
        """Letters that are not acknowledged, or wait for the file."""
        return len(self._held) + (self._file.held if self._file is not None else 0)

    @property
    def full(self) -> bool:
        """Whether to read nothing more for now."""
        with self._lock:
            waits_long = bool(self._held) and time.monotonic() - self._held[0].since > PATIENCE_S
            return waits_long or are_too_many([held.letter for held in self._held])

    def state_dict(self) -> dict[str, Any]:
        """That of the file, if it was needed."""
        return self._file.state_dict() if self._file is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the file back. The topic keeps what it has: a letter may be there twice, with the same position."""
        self._file = self._file or self._open_file()
        self._file.load_state_dict(state)

    def close(self) -> None:
        """Wait a little, and disconnect."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
            self.flush()
        finally:
            with suppress(KafkaError):  # what is held stays undecided
                self._producer.close(timeout=0)
            if self._file is not None:
                self._file.close()

    def _require_topic(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._producer.partitions_for(self._topic)
            except KafkaError as error:
                if isinstance(error, KafkaTimeoutError) and time.monotonic() < deadline:
                    continue
                self._producer.close(timeout=0)
                raise SettingsError(
                    f"dead_letters.topic={self._topic} cannot be written ({type(error).__name__}); create it and allow "
                    "writing, or set dead_letters.kind=file"
                ) from error
            else:
                return

    def _hand_over(self) -> None:
        """Give the client what it does not have."""
        for held in [held for held in self._held if held.future is None]:
            key, headers = to_message(held.letter)
            try:
                held.future = self._producer.send(self._topic, value=held.letter.record.value, key=key, headers=headers)
            except MessageSizeTooLargeError:
                self._keep_in_file(held)
            except KafkaError as error:
                self._note_failure(error)
                return

    def _collect(self) -> list[DeadLetter]:
        """Take out what is acknowledged, and take back what the client gave up."""
        kept = []
        for held in [held for held in self._held if held.future is not None and held.future.is_done]:
            error = held.future.exception
            if error is None:
                kept.append(held.letter)
                self._held.remove(held)
            elif isinstance(error, TOO_LARGE):
                self._keep_in_file(held)
            else:
                held.future = None
                self._note_failure(error)
        if self._failing and not self._held:
            logger.info("dead_letters.topic=%s takes records again", self._topic)
            self._failing = False
        return kept

    def _note_failure(self, error: KafkaError) -> None:
        """Try again soon, unless that would be in vain."""
        if not error.retriable:
            self._refusal = SourceError(
                f"dead_letters.topic={self._topic} does not take records ({type(error).__name__}); check the brokers "
                "and the topic, or set dead_letters.kind=file"
            )
        self._retry_at = time.monotonic() + RETRY_S
        if not self._failing:
            logger.warning(
                "dead_letters.topic=%s takes no records for now (%s); they stay undecided until it does",
                self._topic,
                type(error).__name__,
            )
        self._failing = True

    def _keep_in_file(self, held: _Held) -> None:
        if self._file is None:
            try:
                self._file = self._open_file()
            except SettingsError as error:  # in the middle of a run: what was learned is to be kept
                raise SourceError(str(error)) from error
        self._held.remove(held)
        self._file.send(held.letter)
        logger.warning(
            "%s offset %d is too large for dead_letters.topic=%s and goes to the file",
            held.letter.record.partition,
            held.letter.record.offset,
            self._topic,
        )
