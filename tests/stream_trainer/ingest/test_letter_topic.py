"""Letters to a topic are held until it has them, and nobody waits for brokers that are away."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    NotEnoughReplicasError,
    ProducerFencedError,
    TopicAuthorizationFailedError,
)

from stream_trainer.errors import FencedError, SourceAwayError, SourceError
from stream_trainer.ingest import letter_topic
from stream_trainer.ingest.letter import DeadLetter, from_message, read_dead_letters, to_message
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.letter_sender import TooLargeError, TopicMark
from stream_trainer.ingest.letter_topic import TopicDeadLetters
from stream_trainer.records import Partition, Record
from stream_trainer.settings.sections.source import KafkaSettings

LOG = Partition("samples", 0)
TOPIC = "samples.dead-letters"


class Broker:
    """Stands in for the topic, and for the senders to it.

    Attributes:
        letters: offsets of the records whose letters the topic has, in order.
        fail_with: raised by the next calls of `publish`, before anything is there; `fail_after`, once all is there.
        limit: size from which letters are refused.
        goes_on: cleared while the brokers do not answer.
    """

    def __init__(self) -> None:
        self.letters: list[int] = []
        self.fail_with: Exception | None = None
        self.fail_after: Exception | None = None
        self.limit = 10**9
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.opened = 0

    def open(self, _: KafkaSettings, mark: TopicMark) -> "Sender":
        self.opened += 1
        return Sender(self, mark)


class Sender:
    def __init__(self, broker: Broker, mark: TopicMark) -> None:
        found = frozenset(f"{LOG}:{offset}" for offset in broker.letters[mark.read_to.get(0, 0) :])
        self._broker = broker
        self.mark = replace(mark, read_to={0: len(broker.letters)}, ahead=mark.ahead | found)

    def publish(self, letters: Sequence[DeadLetter]) -> None:
        broker = self._broker
        broker.goes_on.wait()
        if broker.fail_with is not None:
            raise broker.fail_with
        if too_large := [letter.size for letter in letters if letter.size >= broker.limit]:
            raise TooLargeError(max(too_large))
        broker.letters += [letter.record.offset for letter in letters if letter.position not in self.mark.ahead]
        if broker.fail_after is not None:
            raise broker.fail_after
        left = self.mark.ahead - {letter.position for letter in letters}
        self.mark = replace(self.mark, read_to={0: len(broker.letters)}, ahead=left)

    def close(self) -> None:
        pass


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    made = Broker()
    monkeypatch.setattr(letter_topic, "LetterSender", made.open)
    monkeypatch.setattr(letter_topic, "_first_mark", lambda _, topic: TopicMark(topic, read_to={0: len(made.letters)}))
    monkeypatch.setattr(letter_topic, "RETRY_S", 0.0)
    monkeypatch.setattr(letter_topic, "SETTLE_S", 0.5)
    return made


@pytest.fixture
def opened(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., TopicDeadLetters]]:
    made: list[TopicDeadLetters] = []

    def open_letters(**options: Any) -> TopicDeadLetters:
        made.append(
            TopicDeadLetters(
                KafkaSettings(topic="samples"), None, lambda: FileDeadLetters(tmp_path / "dead.jsonl"), **options
            )
        )
        return made[-1]

    yield open_letters
    broker.goes_on.set()
    for letters in made:
        letters.close()


def letter(offset: int, size: int = 1) -> DeadLetter:
    return DeadLetter(Record(LOG, offset, offset + 1, bytes(size)), "bad_json", "")


def settled(letters: TopicDeadLetters) -> list[int]:
    letters.wait()
    return [found.record.offset for found in letters.settled()]


def test_a_letter_is_settled_when_the_topic_has_it(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    letters = opened()
    broker.goes_on.clear()
    for offset in range(3):
        letters.send(letter(offset))
    assert (settled(letters), letters.held) == ([], 3)
    broker.goes_on.set()
    letters.send(letter(3))
    assert (settled(letters), letters.held, settled(letters)) == ([0, 1, 2, 3], 0, [])
    assert (broker.letters, broker.opened) == ([0, 1, 2, 3], 1)


@pytest.mark.parametrize(
    "error", [KafkaTimeoutError(), NotEnoughReplicasError(), ProducerFencedError(), SourceAwayError("nobody")]
)
def test_what_the_brokers_do_not_take_now_is_sent_again(
    error: Exception, broker: Broker, opened: Callable[..., TopicDeadLetters], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    letters = opened()
    broker.fail_with = error
    letters.send(letter(0))
    assert (settled(letters), letters.held) == ([], 1)
    broker.fail_with = None
    letters.send(letter(1))
    assert (settled(letters), letters.held, broker.letters) == ([0, 1], 0, [0, 1])
    assert caplog.text.count("takes no records for now") == 1
    assert caplog.text.count("takes records again") == 1


def test_what_became_of_a_batch_is_found_in_the_topic(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    letters = opened()
    broker.fail_after = KafkaError("the connection was lost")
    letters.send(letter(0))
    assert settled(letters) == []
    broker.fail_after = None
    letters.send(letter(1))
    assert settled(letters) == [0, 1]
    assert broker.letters == [0, 1]


def test_what_the_topic_has_behind_a_checkpoint_is_not_sent_again(
    broker: Broker, opened: Callable[..., TopicDeadLetters]
) -> None:
    """Also after a second crash, before all of them were judged again."""
    first = opened()
    first.send(letter(0))
    assert settled(first) == [0]
    stored = first.state_dict()
    for offset in (5, 2, 7):
        first.send(letter(offset))
    assert settled(first) == [5, 2, 7]
    second = opened()
    second.load_state_dict(stored)
    second.send(letter(2))
    assert (settled(second), broker.letters) == ([2], [0, 5, 2, 7])
    stored = second.state_dict()
    assert stored["in_topic"]["ahead"] == ["samples:0:5", "samples:0:7"]
    third = opened()
    third.load_state_dict(stored)
    for offset in (5, 7, 8):
        third.send(letter(offset))
    assert (settled(third), broker.letters) == ([5, 7, 8], [0, 5, 2, 7, 8])
    assert third.state_dict()["in_topic"]["ahead"] == []


def test_a_mark_does_not_pass_what_is_not_settled(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    letters = opened()
    letters.send(letter(0))
    letters.wait()
    assert (broker.letters, letters.state_dict()["in_topic"]["read_to"]) == ([0], [[0, 0]])
    assert settled(letters) == [0]
    assert letters.state_dict()["in_topic"]["read_to"] == [[0, 1]]


def test_a_mark_of_another_topic_says_nothing(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    letters = opened()
    before = letters.state_dict()
    other = before["in_topic"] | {"topic": "others", "read_to": [[0, 9]]}
    letters.load_state_dict({"in_topic": other})
    assert letters.state_dict() == before
    with pytest.raises(ValueError, match="is no place in a topic"):
        letters.load_state_dict({"in_topic": {"topic": TOPIC}})


def test_a_refusal_for_good_is_an_error(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    letters = opened()
    broker.fail_with = TopicAuthorizationFailedError(TOPIC)
    letters.send(letter(0))
    with pytest.raises(SourceError, match=rf"^dead_letters.topic={TOPIC} does not take records"):
        settled(letters)
    assert letters.held == 1


def test_nothing_is_taken_away_from_a_successor(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    def confirm() -> None:
        raise FencedError("taken over")

    letters = opened(confirm=confirm)
    letters.send(letter(0))
    with pytest.raises(FencedError):
        settled(letters)
    assert broker.opened == 0


def test_what_is_too_large_goes_to_the_file(
    broker: Broker, opened: Callable[..., TopicDeadLetters], tmp_path: Path
) -> None:
    letters = opened()
    assert letters.state_dict().keys() == {"in_topic"}
    broker.limit = letter(0, 2000).size
    for offset, size in enumerate((1, 5000, 2, 2500, 2000)):
        letters.send(letter(offset, size))
    assert sorted(settled(letters)) == [0, 1, 2, 3, 4]
    assert (broker.letters, broker.opened) == ([0, 2], 4)
    letters.flush()
    assert sorted(found.record.offset for found in read_dead_letters(tmp_path / "dead.jsonl")) == [1, 3, 4]
    stored = letters.state_dict()
    letters.send(letter(5, 3000))  # nobody is asked again
    assert (settled(letters), broker.opened) == ([5], 4)
    letters.load_state_dict(stored)
    assert sorted(found.record.offset for found in read_dead_letters(tmp_path / "dead.jsonl")) == [1, 3, 4]


def test_a_run_may_go_on_with_a_file(opened: Callable[..., TopicDeadLetters], tmp_path: Path) -> None:
    stored = opened().state_dict()
    file = FileDeadLetters(tmp_path / "dead.jsonl")
    file.load_state_dict(stored)
    file.close()


def test_it_is_full_with_many_letters_or_with_an_old_one(
    broker: Broker, opened: Callable[..., TopicDeadLetters], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_trainer.ingest.letter.MAX_HELD", 2)
    letters = opened()
    broker.goes_on.clear()
    letters.send(letter(0))
    assert [letters.full] == [False]
    letters.send(letter(1))
    assert [letters.full] == [True]
    broker.goes_on.set()
    assert (settled(letters), letters.full) == ([0, 1], False)
    monkeypatch.setattr(letter_topic, "PATIENCE_S", -1.0)
    broker.goes_on.clear()
    letters.send(letter(2))
    assert bool(letters.full)
    broker.goes_on.set()
    assert (settled(letters), letters.full) == ([2], False)


def test_what_is_held_at_the_end_is_not_sent_later(broker: Broker, opened: Callable[..., TopicDeadLetters]) -> None:
    letters = opened()
    broker.fail_with = KafkaTimeoutError()
    letters.send(letter(0))
    letters.close()
    broker.fail_with = None
    assert (settled(letters), broker.letters) == ([], [])


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
