"""Dead letters: the original bytes come back, from the file and from the topic, and none goes missing on the way."""

import json
import os
import stat
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import NewTopic

from stream_trainer import __version__
from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.ingest.dead_letters import DeadLetters, open_dead_letters
from stream_trainer.ingest.letter import DeadLetter, read_dead_letters
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.records import Partition, Record
from stream_trainer.settings.schema import Settings
from tests.helpers.brokers import ApacheKafka, client_options, create_topic, how_to_reach, needs_apache_kafka

LOG = Partition("users:eu", 3)
RECORDS = [
    Record(
        LOG, 5, 6, b'{"text": \xff}', key=b"k\x00", headers=(("a", b"\xfe"), ("b", None), ("a", b"")), timestamp=1.5
    ),
    Record(LOG, 9, 10, b"", key=None),
    Record(LOG, 12, 13, None, key=b"tombstone"),
    Record(LOG, 14, 15, None, key=None),
]


def settings_for(path: Path, servers: str = "localhost:1", topic: str | None = None) -> Settings:
    return Settings.model_validate(
        {
            "source": {
                "kafka": {"topic": "stream", "bootstrap_servers": servers, "bootstrap_timeout_s": 5} | how_to_reach()
            },
            "model": {"name": "unused"},
            "target": {"path": "unused"},
            "dead_letters": {"kind": "topic" if topic else "file", "path": path, "topic": topic},
        }
    )


def keep(letters: DeadLetters) -> list[int]:
    """Make durable what was sent. Returns the offsets of what is kept."""
    letters.wait()
    kept = sorted(letter.record.offset for letter in letters.settled())
    letters.flush()
    assert letters.held == 0
    return kept


def test_the_file_gives_back_every_record_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "dead.jsonl"
    letters = open_dead_letters(settings_for(path))
    for record in RECORDS:
        letters.send(DeadLetter(record, "bad_json", "at character 9"))
    letters.close()
    letters.close()
    kept = list(read_dead_letters(path))
    assert [letter.record for letter in kept] == RECORDS
    assert {(letter.reason, letter.detail, letter.trainer_version) for letter in kept} == {
        ("bad_json", "at character 9", __version__)
    }


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    FileDeadLetters(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_line_is_in_the_file_as_soon_as_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)
    letters.send(DeadLetter(RECORDS[0], "bad_json", ""))
    assert len(list(read_dead_letters(path))) == 1
    letters.close()


def test_the_detail_is_cut_to_200_characters(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)
    letters.send(DeadLetter(RECORDS[0], "unexpected", "x" * 1000))
    letters.close()
    (letter,) = read_dead_letters(path)
    assert letter.detail == "x" * 200


def test_a_second_run_appends_and_drops_a_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "dead.jsonl"
    for record in RECORDS[:2]:
        letters = FileDeadLetters(path)
        letters.send(DeadLetter(record, "empty", ""))
        letters.close()
        with path.open("ab") as file:
            file.write(b'{"topic": "to')
    FileDeadLetters(path).close()
    assert [letter.record for letter in read_dead_letters(path)] == RECORDS[:2]
    assert "torn line of 13 bytes" in caplog.text


def test_sending_from_two_threads_keeps_lines_whole(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)

    def send(first: int) -> None:
        for offset in range(first, first + 200):
            letters.send(DeadLetter(Record(LOG, offset, offset + 1, bytes(1000)), "empty", ""))

    threads = [threading.Thread(target=send, args=(first,)) for first in (0, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    letters.close()
    assert sorted(letter.record.offset for letter in read_dead_letters(path)) == list(range(400))


def test_a_file_that_cannot_be_opened_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"dead_letters\.path={tmp_path} cannot be written \(Is a directory\)"):
        FileDeadLetters(tmp_path)


def test_a_full_disk_holds_letters_until_it_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)
    write, room = os.write, [0]

    def write_little(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr("stream_trainer.ingest.letter_file.os.write", write_little)
    monkeypatch.setattr("stream_trainer.ingest.letter_file.RETRY_S", 0.0)
    for room[0] in (0, 10):
        letters.send(DeadLetter(RECORDS[0], "empty", ""))
        assert (letters.settled(), path.read_bytes()) == ([], b"")
    assert letters.held == 2
    room[0] = 1_000_000
    assert len(letters.settled()) == len(list(read_dead_letters(path))) == 2
    assert (letters.held, letters.settled()) == (0, [])
    letters.close()
    assert [record.message.partition("dead.jsonl")[2] for record in caplog.records] == [
        " cannot be written for now ([Errno 28] No space left on device); trying on",
        " can be written again",
    ]


def test_too_many_held_letters_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_trainer.ingest.letter.MAX_HELD", 3)
    letters = FileDeadLetters(Path("/dev/full"))
    for _ in range(3):
        assert not letters.full
        letters.send(DeadLetter(RECORDS[0], "empty", ""))
    assert letters.full
    with pytest.raises(SourceError, match=r"^dead_letters.path=/dev/full cannot be made durable"):
        letters.close()
    letters.close()


@pytest.mark.parametrize("line", ["{", '{"topic": "t"}', "[]", '{"topic": 1, "value": "?"}'])
def test_a_line_that_is_no_dead_letter_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "dead.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(SettingsError, match="line 1 is no dead letter"):
        list(read_dead_letters(path))


def published(servers: str, topic: str, count: int) -> list[Any]:
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=20_000,
        group_id=None,
        isolation_level="read_committed",
        **client_options(),
    )
    try:
        return [next(consumer) for _ in range(count)]
    finally:
        consumer.close()


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_the_topic_gets_key_value_and_headers_as_they_were(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic)
    letters = open_dead_letters(settings_for(tmp_path / "unused.jsonl", broker, topic))
    for record in RECORDS:
        letters.send(DeadLetter(record, "bad_json", "at character 9"))
    assert keep(letters) == [5, 9, 12, 14]
    messages = sorted(published(broker, topic, len(RECORDS)), key=lambda message: message.offset)
    letters.close()
    letters.close()
    assert [message.value for message in messages] == [record.value for record in RECORDS]
    assert [message.key for message in messages] == [b"k\x00", b"users:eu:3:9", b"tombstone", b"users:eu:3:14"]
    assert messages[0].headers == [
        ("a", b"\xfe"),
        ("b", b""),
        ("a", b""),
        ("stream-trainer-topic", b"users:eu"),
        ("stream-trainer-partition", b"3"),
        ("stream-trainer-offset", b"5"),
        ("stream-trainer-reason", b"bad_json"),
        ("stream-trainer-detail", b"at character 9"),
        ("stream-trainer-version", __version__.encode()),
        ("stream-trainer-trainer", letters.state_dict()["in_topic"]["owner"].encode()),
        ("stream-trainer-timestamp", b"1500"),
        ("stream-trainer-null-headers", b"1"),
    ]
    marks = [("stream-trainer-null-key", b"1") in message.headers for message in messages]
    assert marks == [False, True, False, True]
    assert not (tmp_path / "unused.jsonl").exists()


def test_what_the_brokers_refuse_as_too_large_goes_to_the_file(
    apache_kafka: ApacheKafka, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others in flight are not harmed, and all is kept once `flush` returns."""
    topic, path = f"dead-{uuid.uuid4().hex}", tmp_path / "dead.jsonl"
    admin = KafkaAdminClient(bootstrap_servers=apache_kafka.bootstrap_servers)
    admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "10000"})])
    admin.close()
    letters = open_dead_letters(settings_for(path, apache_kafka.bootstrap_servers, topic))
    values = [b"small", b"\x00" * 20_000, b"small too"]
    for offset, value in enumerate(values):
        letters.send(DeadLetter(Record(LOG, offset, offset + 1, value), "too_large", ""))
    assert keep(letters) == [0, 1, 2]
    letters.send(DeadLetter(Record(LOG, 3, 4, b"later"), "bad_json", ""))
    assert keep(letters) == [3]
    published_values = [message.value for message in published(apache_kafka.bootstrap_servers, topic, 3)]
    assert sorted(published_values) == [b"later", b"small", b"small too"]
    assert [letter.record.value for letter in read_dead_letters(path)] == [values[1]]
    assert "is too large for dead_letters.topic" in caplog.text
    letters.close()


def test_what_the_client_refuses_as_too_large_goes_to_the_file(
    broker: str, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_trainer.ingest.letter_sender.MAX_REQUEST_BYTES", 1000)
    create_topic(broker, topic)
    path = tmp_path / "dead.jsonl"
    letters = open_dead_letters(settings_for(path, broker, topic))
    record = Record(LOG, 0, 1, bytes(2000))
    letters.send(DeadLetter(record, "too_large", "2000 bytes are more than 1000"))
    assert keep(letters) == [0]
    letters.close()
    assert [letter.record for letter in read_dead_letters(path)] == [record]


def test_a_topic_that_is_not_there_and_is_not_created_is_a_wrong_setting(
    apache_kafka: ApacheKafka, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"dead_letters\.topic=not-there-\w+ cannot be written"):
        open_dead_letters(settings_for(tmp_path, apache_kafka.bootstrap_servers, f"not-there-{uuid.uuid4().hex}"))


def test_json_lines_are_readable_by_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)
    letters.send(DeadLetter(RECORDS[1], "empty", "the value has no bytes"))
    letters.close()
    assert json.loads(path.read_text()) == {
        "topic": "users:eu",
        "partition": 3,
        "offset": 9,
        "next_offset": 10,
        "timestamp": None,
        "key": None,
        "value": "",
        "headers": [],
        "reason": "empty",
        "detail": "the value has no bytes",
        "trainer_version": __version__,
        "trainer": "",
    }
