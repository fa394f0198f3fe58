"""Dead letters in a topic at the source's brokers, acknowledged by all replicas.

Letters are held, and published by a thread of their own in short transactions: nobody waits for the brokers, and the
record of a letter that is held stays undecided. So if the brokers are away, or the topic has no leader, a restart reads
a few records again, and that is all. How a letter comes to be there once is for `letter_sender` to say.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaProducer
from kafka.errors import AuthorizationError, KafkaError, KafkaTimeoutError

from stream_trainer.errors import FencedError, SettingsError, SourceError, StreamTrainerError
from stream_trainer.ingest.letter import MAX_HELD, DeadLetter, are_too_many
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.letter_sender import CLIENT_ID, LetterSender, TooLargeError, TopicMark, mark_at_end
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import abandon, connect

PATIENCE_S = 60.0  # a letter held for longer pauses reading: else what is decided behind it would pile up in the cursor
SETTLE_S = 5.0  # so long a checkpoint waits for a letter that was sent just now
GATHER_S = 0.3  # so long a letter waits for others to share its transaction
BLOCK_MS = 500
RETRY_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """A letter that the topic does not have yet."""

    letter: DeadLetter
    since: float


class TopicDeadLetters:
    """Publishes to a topic. What the brokers refuse as too large goes to the file instead."""

    def __init__(
        self,
        kafka: KafkaSettings,
        topic: str | None,
        open_file: Callable[[], FileDeadLetters],
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        """`topic` is the source's with `.dead-letters` appended if it is None; `confirm` raises FencedError if another
        trainer has taken over.

        Raises SettingsError if the topic is not there and is not created, or may not be read, SourceError if no broker
        answers.
        """
        self._kafka, self._topic = kafka, topic or f"{kafka.topic}.dead-letters"
        self._open_file, self._confirm = open_file, confirm
        self._file: FileDeadLetters | None = None
        self._lock = threading.Lock()
        self._held: deque[_Held] = deque()
        self._to_file: deque[DeadLetter] = deque()
        self._kept: list[DeadLetter] = []
        self._too_large: int | None = None  # the size of the smallest letter that was refused for it
        self._retry_at = 0.0
        self._refusal: StreamTrainerError | None = None
        self._failing = self._closed = False
        self._sender: LetterSender | None = None
        self._worker: threading.Thread | None = None
        self._mark = self._reached = _first_mark(kafka, self._topic)

    def send(self, letter: DeadLetter) -> None:
        """Hold the letter; it is published in the background."""
        with self._lock:
            if self._too_large is not None and letter.size >= self._too_large:
                self._to_file.append(letter)
            else:
                self._held.append(_Held(letter, time.monotonic()))
            if self._refusal is not None:
                raise self._refusal

    def settled(self) -> list[DeadLetter]:
        """What the topic has since the last call. Raises SourceError if the brokers refuse for good, FencedError."""
        with self._lock:
            while self._to_file:
                self._keep_in_file(self._to_file[0])
                self._to_file.popleft()
            if self._is_due():
                self._start()
            kept, self._kept = self._kept, []
            self._mark = self._reached
            kept += self._file.settled() if self._file is not None else []
            if self._refusal is not None and not kept:
                raise self._refusal
            return kept

    def wait(self) -> None:
        """Until the topic has every letter, or each was sent more than `SETTLE_S` seconds ago."""
        while True:
            with self._lock:
                left = self._held[-1].since + SETTLE_S - time.monotonic() if self._held else 0.0
                if left <= 0 or self._refusal is not None:
                    return
                self._start()
                worker, pause = self._worker, self._retry_at - time.monotonic()
            if worker is not None:
                worker.join(left)
            else:
                time.sleep(max(0.0, min(pause, left)))

    def flush(self) -> None:
        """Make durable what went to the file: what is in the topic is durable already."""
        if self._file is not None:
            self._file.flush()

    @property
    def held(self) -> int:
        """Letters that the topic does not have, or that wait for the file."""
        return len(self._held) + len(self._to_file) + (self._file.held if self._file is not None else 0)

    @property
    def full(self) -> bool:
        """Whether to read nothing more for now."""
        with self._lock:
            waits_long = bool(self._held) and time.monotonic() - self._held[0].since > PATIENCE_S
            return waits_long or are_too_many([held.letter for held in self._held])

    def state_dict(self) -> dict[str, Any]:
        """Up to where the topic is accounted for, and that of the file, if it was needed."""
        with self._lock:
            file = self._file.state_dict() if self._file is not None else {}
            return file | {"in_topic": self._mark.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the file back. The topic keeps what it has; of that nothing is sent again."""
        file = {name: value for name, value in state.items() if name != "in_topic"}
        if file:
            self._file = self._file or self._open_file()
            self._file.load_state_dict(file)
        if "in_topic" not in state:  # of an earlier version, or of a run whose letters went to a file
            return
        mark = TopicMark.from_json(state["in_topic"])
        if mark.topic == self._topic:
            self._mark = self._reached = mark

    def close(self) -> None:
        """Wait a little, and disconnect. What is held stays undecided, and is not sent later."""
        if self._closed:
            return
        try:
            self.wait()
            self.flush()
        finally:
            with self._lock:
                self._closed = True
                if self._sender is not None:
                    self._sender.close()
            if self._file is not None:
                self._file.close()

    def _is_due(self) -> bool:
        if not self._held or self._worker is not None:
            return False
        return len(self._held) >= MAX_HELD // 2 or time.monotonic() - self._held[0].since >= GATHER_S

    def _start(self) -> None:
        """Have all that waits published, unless that is under way, or is to be tried again later."""
        if self._worker is not None or self._closed or not self._held or time.monotonic() < self._retry_at:
            return
        batch = list(self._held)
        self._worker = threading.Thread(target=self._work, args=(batch,), name="dead letters", daemon=True)
        self._worker.start()

    def _work(self, batch: Sequence[_Held]) -> None:
        error: Exception | None = None
        try:
            self._publish([held.letter for held in batch])
        except Exception as caught:
            error = caught
        with self._lock:
            if error is None:
                self._note_kept(batch)
            else:
                self._note_failure(batch, error)
            self._worker = None

    def _publish(self, letters: Sequence[DeadLetter]) -> None:
        if self._sender is None:
            self._confirm()  # else we would take the transactional id away from a successor
            sender = LetterSender(self._kafka, self._reached)
            with self._lock:
                self._sender = sender
                if self._closed:
                    sender.close()
        self._sender.publish(letters)

    def _note_kept(self, batch: Sequence[_Held]) -> None:
        for held in batch:
            self._held.remove(held)
        self._kept += [held.letter for held in batch]
        assert self._sender is not None
        self._reached = self._sender.mark
        if self._failing:
            logger.info("dead_letters.topic=%s takes records again", self._topic)
            self._failing = False

    def _note_failure(self, batch: Sequence[_Held], error: Exception) -> None:
        """What became of the batch the next sender finds out. Try again soon, unless that would be in vain."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if isinstance(error, TooLargeError):
            self._note_too_large(batch, error.size)
            return
        if isinstance(error, FencedError):
            self._refusal = error
        elif _is_refusal(error):
            self._refusal = SourceError(
                f"dead_letters.topic={self._topic} does not take records ({type(error).__name__}); grant Read and "
                "Write on it, or set dead_letters.kind=file"
            )
        self._retry_at = time.monotonic() + RETRY_S
        if not self._failing and not self._closed:
            logger.warning(
                "dead_letters.topic=%s takes no records for now (%s); they stay undecided until it does",
                self._topic,
                type(error).__name__,
            )
        self._failing = True

    def _note_too_large(self, batch: Sequence[_Held], refused: int) -> None:
        self._too_large = min(self._too_large or refused, refused)
        for held in batch:
            if held.letter.size >= refused:
                self._held.remove(held)
                self._to_file.append(held.letter)

    def _keep_in_file(self, letter: DeadLetter) -> None:
        if self._file is None:
            try:
                self._file = self._open_file()
            except SettingsError as error:  # in the middle of a run: what was learned is to be kept
                raise SourceError(str(error)) from error
        self._file.send(letter)
        logger.warning(
            "%s offset %d is too large for dead_letters.topic=%s and goes to the file",
            letter.record.partition,
            letter.record.offset,
            self._topic,
        )


def _is_refusal(error: Exception) -> bool:
    """Whether to try again is in vain. What the client says of a transaction that failed is no refusal."""
    return isinstance(error, AuthorizationError) or isinstance(error.__cause__, AuthorizationError)


def _first_mark(kafka: KafkaSettings, topic: str) -> TopicMark:
    """The mark at the end of the topic, which the brokers may create upon being asked for it."""
    _require_topic(kafka, topic)
    deadline = time.monotonic() + kafka.bootstrap_timeout_s
    while True:
        try:
            return mark_at_end(kafka, topic)
        except SettingsError:  # not everywhere yet
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_S / 10)


def _require_topic(kafka: KafkaSettings, topic: str) -> None:
    producer = connect(KafkaProducer, kafka, CLIENT_ID, max_block_ms=BLOCK_MS)
    deadline = time.monotonic() + kafka.bootstrap_timeout_s
    try:
        while True:
            try:
                producer.partitions_for(topic)
            except KafkaError as error:
                if isinstance(error, KafkaTimeoutError) and time.monotonic() < deadline:
                    continue
                raise SettingsError(
                    f"dead_letters.topic={topic} cannot be written ({type(error).__name__}); create it and allow "
                    "writing, or set dead_letters.kind=file"
                ) from error
            else:
                return
    finally:
        abandon(producer)
