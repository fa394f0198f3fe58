"""Publishes letters to a topic so that none is there twice, whatever dies.

Each batch is a transaction of its own. Who begins first claims a transactional id, upon which the brokers end what
another process left open under it, and let it write nothing more. Then the end of the topic is read, from where a
checkpoint knows it: letters of ours that are there are not sent again. So after a crash, and after a batch of which
nobody knows what became of it, the topic itself is asked.
"""

import logging
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from kafka import KafkaProducer
from kafka.errors import (
    AuthorizationError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)

from stream_trainer.ingest.letter import DeadLetter, from_message, to_message
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import abandon, connect
from stream_trainer.sources.kafka import KafkaSource

CLIENT_ID = "stream-trainer-dead-letters"
BLOCK_MS = 5_000
FLUSH_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_MS = 10_000
POLL_S = 0.1
LARGE_BYTES = 16 * 1024  # the client sends smaller ones together
MAX_REQUEST_BYTES = 64 * 1024 * 1024  # a broker drops connections that send more than its 100 MB

TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

logger = logging.getLogger(__name__)


class TooLargeError(Exception):
    """The brokers refuse letters of this size, and the batch came to nothing.

    Attributes:
        size: of the refused letter, by `DeadLetter.size`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


@dataclass(frozen=True)
class TopicMark:
    """Up to where the letters in a topic are accounted for.

    Attributes:
        topic: its name.
        owner: whose letters are meant: a random name that goes from checkpoint to checkpoint.
        identity: what tells the topic from an earlier one of its name.
        read_to: the next offset of each partition.
        ahead: positions of letters below these offsets whose records wait to be read and judged again.
    """

    topic: str
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    identity: Mapping[str, str] = field(default_factory=dict)
    read_to: Mapping[int, int] = field(default_factory=dict)
    ahead: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "topic": self.topic,
            "owner": self.owner,
            "identity": [list(item) for item in self.identity.items()],
            "read_to": [list(item) for item in self.read_to.items()],
            "ahead": sorted(self.ahead),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TopicMark":
        """Inverse of `to_json`. Raises ValueError if it is no mark."""
        try:
            identity, read_to, ahead = dict(state["identity"]), dict(state["read_to"]), frozenset(state["ahead"])
            return cls(state["topic"], state["owner"], identity, read_to, ahead)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{dict(state)} is no place in a topic of dead letters") from error


def mark_at_end(kafka: KafkaSettings, topic: str) -> TopicMark:
    """The mark behind all that is in the topic. Raises StreamTrainerError if it cannot be asked."""
    with closing(_source(kafka, topic, start="latest")) as source:
        source.start({}, {}, {})
        return _marked(TopicMark(topic), source)


class LetterSender:
    """Of no more use once `publish` has raised.

    Attributes:
        mark: behind all that is known to be in the topic.
    """

    def __init__(self, kafka: KafkaSettings, mark: TopicMark) -> None:
        """Raises StreamTrainerError or KafkaError if the brokers do not answer or refuse."""
        self.mark = mark
        self._producer, self._is_exact = _claim(kafka, mark)
        try:
            self._read(kafka)
        except BaseException:
            self.close()
            raise

    def publish(self, letters: Sequence[DeadLetter]) -> None:
        """Return once the brokers have all of them. Waits for ever for brokers that die while they commit.

        Raises TooLargeError; KafkaError if they do not answer or refuse, after which nobody knows what they have.
        """
        fresh = [letter for letter in letters if letter.position not in self.mark.ahead]
        places = self._transact(fresh) if fresh else []
        self.mark = replace(
            self.mark,
            read_to={**self.mark.read_to, **{number: offset + 1 for number, offset in sorted(places)}},
            ahead=self.mark.ahead - {letter.position for letter in letters},
        )

    def close(self) -> None:
        """Drop whatever is not committed."""
        abandon(self._producer)

    def _transact(self, letters: Sequence[DeadLetter]) -> list[tuple[int, int]]:
        """Returns partitions and offsets of the letters."""
        if self._is_exact:
            self._producer.begin_transaction()
        sent: list[tuple[DeadLetter, Any]] = []
        for letter in letters:
            if letter.size > LARGE_BYTES:  # by itself: should it be refused, it is known that it was this one
                self._require_sent(sent)
            sent.append((letter, self._send(letter)))
            if letter.size > LARGE_BYTES:
                self._require_sent(sent[-1:])
        self._require_sent(sent)
        if self._is_exact:
            self._producer.commit_transaction()
        return [(answer.value.partition, answer.value.offset) for _, answer in sent]

    def _send(self, letter: DeadLetter) -> Any:
        key, headers = to_message(replace(letter, trainer=self.mark.owner))
        try:
            return self._producer.send(self.mark.topic, value=letter.record.value, key=key, headers=headers)
        except TOO_LARGE as error:
            raise TooLargeError(letter.size) from error

    def _require_sent(self, sent: Sequence[tuple[DeadLetter, Any]]) -> None:
        """Wait until the brokers have all of these. After a refusal the client tells of others what it heard of one."""
        self._producer.flush(timeout=FLUSH_TIMEOUT_S)
        failed = [(letter, answer.exception) for letter, answer in sent if answer.exception is not None]
        if too_large := [letter.size for letter, error in failed if isinstance(error, TOO_LARGE)]:
            raise TooLargeError(max(too_large))
        for _, error in failed:
            raise error

    def _read(self, kafka: KafkaSettings) -> None:
        """Look for letters of ours behind the mark, which is moved behind them."""
        found = set()
        with closing(_source(kafka, self.mark.topic)) as source:
            at = {Partition(self.mark.topic, number): offset for number, offset in self.mark.read_to.items()}
            source.start(at, self.mark.identity, {})
            while not source.exhausted:
                for message in source.poll(POLL_S):
                    try:
                        letter = from_message(message)
                    except (ValueError, KeyError):
                        continue  # of somebody else
                    if letter.trainer == self.mark.owner:
                        found.add(letter.position)
            self.mark = replace(_marked(self.mark, source), ahead=self.mark.ahead | found)
        if found:
            logger.info("dead_letters.topic=%s has %d letters already, not sent again", self.mark.topic, len(found))


def _claim(kafka: KafkaSettings, mark: TopicMark) -> tuple[Any, bool]:
    """A producer, and whether it has transactions."""
    name = f"{kafka.group_id or 'stream-trainer'}-{kafka.topic}-{mark.owner}"
    producer = _connect(kafka, transactional_id=name)
    try:
        producer.init_transactions()
    except KafkaError as error:
        abandon(producer)
        if error.retriable:
            raise
        what = (
            f"grant Write on transactional ids that begin with {name.removesuffix(mark.owner)}"
            if isinstance(error, AuthorizationError)
            else "use brokers with transactions"
        )
        logger.warning(
            "dead_letters.topic=%s: a letter may be there twice after a crash (%s); %s",
            mark.topic,
            type(error).__name__,
            what,
        )
        return _connect(kafka), False
    return producer, True


def _connect(kafka: KafkaSettings, **options: Any) -> Any:
    return connect(
        KafkaProducer,
        kafka,
        CLIENT_ID,
        acks="all",
        max_request_size=MAX_REQUEST_BYTES,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        max_block_ms=BLOCK_MS,
        **options,
    )


def _source(kafka: KafkaSettings, topic: str, start: str = "earliest") -> KafkaSource:
    """Reads what the topic holds now. What retention took, or went with an earlier topic, is not there: no loss."""
    reading = {"topic": topic, "group_id": None, "start": start, "stop_at_end": True}
    return KafkaSource(kafka.model_copy(update=reading | {"on_data_loss": "skip", "on_undecodable": "skip"}), CLIENT_ID)


def _marked(mark: TopicMark, source: KafkaSource) -> TopicMark:
    return replace(
        mark, identity=dict(source.identity()), read_to={p.number: at for p, at in source.positions().items()}
    )
