"""Letters to a topic are held until they are acknowledged, and nobody waits for brokers that are away."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka.errors import (
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    TopicAuthorizationFailedError,
)
from kafka.future import Future

from stream_trainer.errors import SourceError
from stream_trainer.ingest import letter_topic
from stream_trainer.ingest.letter import DeadLetter, from_message, read_dead_letters, to_message
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.letter_topic import TopicDeadLetters
from stream_trainer.records import Partition, Record
from stream_trainer.settings.source import KafkaSettings

LOG = Partition("samples", 0)


class Producer:
    """Stands in for the client: futures that the test settles.

    Attributes:
        sent: values and futures, in order.
        fail_send: raised by the next calls of `send`.
        flushes: timeouts of the calls of `flush`, which end at once.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Future]] = []
        self.keys: list[bytes] = []
        self.fail_send: Exception | None = None
        self.flushes: list[float] = []

    def partitions_for(self, _: str) -> set[int]:
        return {0}

    def send(self, _: str, value: bytes, key: bytes, **__: object) -> Future:
        if self.fail_send is not None:
            raise self.fail_send
        self.sent.append((value, Future()))
        self.keys.append(key)
        return self.sent[-1][1]

    def flush(self, timeout: float) -> None:
        self.flushes.append(timeout)
        raise KafkaTimeoutError

    def close(self, timeout: float) -> None:
        pass


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> Producer:
    made = Producer()
    monkeypatch.setattr(letter_topic, "connect", lambda *_, **__: made)
    monkeypatch.setattr(letter_topic, "RETRY_S", 0.0)
    return made


@pytest.fixture
def letters(producer: Producer, tmp_path: Path) -> Iterator[TopicDeadLetters]:
    found = TopicDeadLetters(KafkaSettings(topic="samples"), None, lambda: FileDeadLetters(tmp_path / "dead.jsonl"))
    yield found
    found.close()


def letter(offset: int) -> DeadLetter:
    return DeadLetter(Record(LOG, offset, offset + 1, b"%d" % offset), "bad_json", "")


def settled(letters: TopicDeadLetters) -> list[int]:
    return [found.record.offset for found in letters.settled()]


def test_a_letter_is_settled_when_it_is_acknowledged(producer: Producer, letters: TopicDeadLetters) -> None:
    for offset in range(3):
        letters.send(letter(offset))
    assert (settled(letters), letters.held) == ([], 3)
    producer.sent[1][1].success(None)
    assert (settled(letters), letters.held) == ([1], 2)
    for index in (0, 2):
        producer.sent[index][1].success(None)
    assert (settled(letters), letters.held, settled(letters)) == ([0, 2], 0, [])
    assert producer.keys == [b"samples:0:0", b"samples:0:1", b"samples:0:2"]


@pytest.mark.parametrize("error", [KafkaTimeoutError("no leader"), NotEnoughReplicasError("one of two")])
def test_what_the_brokers_do_not_take_now_is_sent_again(
    error: Exception, producer: Producer, letters: TopicDeadLetters, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    producer.fail_send = error
    letters.send(letter(0))
    letters.send(letter(1))
    assert (settled(letters), producer.sent) == ([], [])
    producer.fail_send = None
    assert (settled(letters), [value for value, _ in producer.sent]) == ([], [b"0", b"1"])
    producer.sent[0][1].failure(error)
    producer.sent[1][1].success(None)
    assert settled(letters) == [1]
    assert [value for value, _ in producer.sent] == [b"0", b"1", b"0"]
    producer.sent[2][1].success(None)
    assert (settled(letters), letters.held) == ([0], 0)
    assert caplog.text.count("takes no records for now") == 1
    assert caplog.text.count("takes records again") == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_refusal_for_good_is_an_error(late: bool, producer: Producer, letters: TopicDeadLetters) -> None:
    refusal = TopicAuthorizationFailedError("samples.dead-letters")
    if late:
        letters.send(letter(0))
        producer.sent[0][1].failure(refusal)
    else:
        producer.fail_send = refusal
    with pytest.raises(SourceError, match=r"^dead_letters.topic=samples.dead-letters does not take records"):
        letters.settled() if late else letters.send(letter(0))
    assert letters.held == 1


def test_what_is_too_large_goes_to_the_file(producer: Producer, letters: TopicDeadLetters, tmp_path: Path) -> None:
    assert letters.state_dict() == {}
    for offset in range(2):
        letters.send(letter(offset))
    producer.sent[0][1].failure(MessageSizeTooLargeError("refused"))
    assert settled(letters) == [0]
    letters.flush()
    assert [found.record.offset for found in read_dead_letters(tmp_path / "dead.jsonl")] == [0]
    stored = letters.state_dict()
    producer.sent[1][1].failure(MessageSizeTooLargeError("refused"))
    assert settled(letters) == [1]
    letters.load_state_dict(stored)
    assert [found.record.offset for found in read_dead_letters(tmp_path / "dead.jsonl")] == [0]


def test_it_is_full_with_many_letters_or_with_an_old_one(
    producer: Producer, letters: TopicDeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_trainer.ingest.letter.MAX_HELD", 2)
    letters.send(letter(0))
    assert [letters.full] == [False]
    letters.send(letter(1))
    assert [letters.full] == [True]
    producer.sent[1][1].success(None)
    assert (settled(letters), letters.full) == ([1], False)
    monkeypatch.setattr(letter_topic, "PATIENCE_S", -1.0)
    assert bool(letters.full)
    producer.sent[0][1].success(None)
    assert (settled(letters), letters.full) == ([0], False)


def test_waiting_is_bounded_from_the_time_of_sending(
    producer: Producer, letters: TopicDeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters.send(letter(0))
    letters.wait()
    assert 0 < producer.flushes[-1] <= letter_topic.SETTLE_S
    monkeypatch.setattr(letter_topic, "SETTLE_S", -1.0)
    letters.wait()  # it was sent long ago
    assert producer.flushes[-1] == 0
    assert letters.held == 1


@pytest.mark.parametrize(
    "record",
    [
        Record(LOG, 5, 6, b"\xff", b"key", (("a", b"\xfe"), ("b", None), ("stream-trainer-topic", b"x")), 1.5),
        Record(Partition("a:b", 7), 9, 10, None, None),
    ],
)
def test_a_message_gives_back_the_record(record: Record) -> None:
    original = DeadLetter(record, "bad_json", "at character 9")
    key, headers = to_message(original)
    message: Any = Record(Partition("dead", 0), 0, 1, record.value, key, tuple(headers))
    assert from_message(message) == original


def test_another_message_is_no_letter() -> None:
    with pytest.raises(ValueError, match="empty"):
        from_message(Record(LOG, 0, 1, b"{}"))
