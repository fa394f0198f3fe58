"""The commands on dead letters: counts and examples, values that can be mended, and replay, each record once."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stream_trainer.cli import main
from stream_trainer.commands.publish import Publisher
from stream_trainer.errors import SourceError
from stream_trainer.ingest.letter import DeadLetter, to_message
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.records import Partition, Record
from tests.helpers.brokers import ApacheKafka, create_topic
from tests.helpers.fakes import records_of
from tests.stream_trainer.commands.test_produce import read_topic, settings_of

VALUES = [b"{'a': 1}", b'{\n "text": "\xc3\xa9"}', b"no\nJSON", None, b"\xff\x00"]
REASONS = ["bad_json", "missing_field", "bad_json", "missing_field", "bad_utf8"]


def write_letters(path: Path, records: Sequence[Record], reasons: Sequence[str], max_bytes: int | None = None) -> Path:
    file = FileDeadLetters(path, max_bytes=max_bytes)
    for record, reason in zip(records, reasons, strict=True):
        file.send(DeadLetter(record, reason, f"detail of {record.offset}"))
    file.close()
    return path


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Five dead letters, the first of them twice, in two files."""
    records = records_of(VALUES)
    return write_letters(tmp_path / "dead-letters.jsonl", [*records, records[0]], [*REASONS, REASONS[0]], 700)


def test_reasons_are_counted_with_an_example_each(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert letters.with_name("dead-letters.jsonl.1").exists()
    assert main(["dead-letters", "inspect", str(letters)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "       2  bad_json, first log:0 offset 0: detail of 0",
        "       2  missing_field, first log:0 offset 1: detail of 1",
        "       1  bad_utf8, first log:0 offset 4: detail of 4",
        "       5  in all",
    ]
    assert main(["dead-letters", "inspect", str(letters), "--reason=bad_utf8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "       1  in all"


def test_values_are_shown_only_if_asked_for(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead-letters", "inspect", str(letters), "--show-values", "--reason=bad_json"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == """          b"{'a': 1}\""""


@pytest.mark.parametrize("option", ["--show-values", "--values"])
def test_a_reader_that_leaves_is_no_failure(letters: Path, option: str) -> None:
    """As `head` does. Python says so once more at its end, if what is left is written then."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "stream_trainer", "dead-letters", "inspect", str(letters), option]
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, [line for line in found.stderr.splitlines() if "left out" not in line]) == (0, [])


def test_values_come_as_they_were_one_a_line(letters: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["dead-letters", "inspect", str(letters), "--values"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == b"{'a': 1}\n" + '{"text": "é"}\n'.encode() + b"\xff\x00\n"
    assert err == b"left out: 1 with line breaks that are no JSON, 1 without a value\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["inspect", "none.jsonl"], "none.jsonl cannot be read (No such file or directory); name a file of dead"),
        (["inspect", "other.jsonl"], "other.jsonl line 1 is no dead letter (KeyError); remove that line"),
        (
            ["inspect", "dead-letters.jsonl", "--reason=x"],
            "--reason x is in no dead letter of dead-letters.jsonl; it has bad_json, ",
        ),
        (["inspect"], "name a file of dead letters, or a topic with --topic"),
        (["inspect", "dead-letters.jsonl", "--topic=t"], "name a file of dead letters, or a topic with --topic"),
        (["replay", "dead-letters.jsonl"], "the following arguments are required: --to; see"),
        (["replay", "dead-letters.jsonl", "--to=t", "--ledger=other.jsonl"], "--ledger other.jsonl cannot be read"),
        (["dead-letters.jsonl"], "argument ACTION: invalid choice: 'dead-letters.jsonl'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    problem: str,
    letters: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(letters.parent)
    Path("other.jsonl").write_text("{}\n")
    assert main(["dead-letters", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")


def records(count: int) -> list[Record]:
    headers = (("source", b"\xfe"), ("empty", b""))
    return [Record(Partition("samples", 0), i, i + 1, b"value-%d" % i, b"key-%d" % i, headers) for i in range(count)]


def reasons(count: int) -> list[str]:
    return ["too_long" if i % 3 else "bad_json" for i in range(count)]


def test_a_dry_run_counts_and_needs_no_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_letters(tmp_path / "dead.jsonl", records(9), reasons(9))
    assert main(["dead-letters", "replay", str(path), "--to", "samples", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "       6  too_long",
        "       3  bad_json",
        "       9  would be published to samples",
    ]
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_replay_gives_back_the_records_and_a_second_one_nothing(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    path = write_letters(tmp_path / "dead.jsonl", records(30), reasons(30))
    command = ["dead-letters", "replay", str(path), "--to", topic, "--bootstrap-servers", servers]
    for arguments, published, before in ((["--reason=too_long"], 20, 0), ([], 10, 20), ([], 0, 30)):
        assert main([*command, *arguments]) == 0
        out = capsys.readouterr().out
        assert out == f"published {published} records to {topic}; {before} were published before\n"
    found = {record.key: (record.value, record.headers) for record in read_topic(settings_of(servers, topic))}
    assert found == {record.key: (record.value, record.headers) for record in records(30)}
    assert len(read_topic(settings_of(servers, topic))) == 30
    assert main([*command, "--dry-run"]) == 0
    assert "0  would be published" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("committed", [False, True])
def test_a_replay_that_dies_between_ledger_and_brokers_is_gone_on_with_exactly(
    committed: bool, apache_kafka: ApacheKafka, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    path = write_letters(tmp_path / "dead.jsonl", records(20), reasons(20))
    command = ["dead-letters", "replay", str(path), "--to", topic, "--bootstrap-servers", servers]
    commit = Publisher.commit

    def die(publisher: Publisher, number: int, note: str) -> None:
        if committed:
            commit(publisher, number, note)
        raise SourceError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "commit", die)
        assert main([*command, "--reason=bad_json"]) == 3
    assert json.loads(path.with_name("dead.jsonl.replayed").read_text().splitlines()[-1])["batch"] == 1
    assert main(command) == 0
    keys = [record.key for record in read_topic(settings_of(servers, topic))]
    assert sorted(map(str, keys)) == sorted(str(record.key) for record in records(20))


def test_letters_come_from_a_topic_too(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers, dead = apache_kafka.bootstrap_servers, f"{topic}.dead-letters"
    for name in (topic, dead):
        create_topic(servers, name)
    publisher = Publisher(settings_of(servers, dead), dead, None)
    for record, reason in [*zip(records(6), reasons(6), strict=True)] * 2:  # a letter may be there twice
        key, headers = to_message(DeadLetter(record, reason, "why"))
        publisher.send(record.value, key=key, headers=headers)
    publisher.commit(0, "")
    publisher.close()
    place = ["--topic", dead, "--bootstrap-servers", servers]
    assert main(["dead-letters", "inspect", *place]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "       6  in all"
    ledger = ["--ledger", str(tmp_path / "ledger")]
    for published, before in ((6, 0), (0, 6)):
        assert main(["dead-letters", "replay", *place, "--to", topic, *ledger]) == 0
        out = capsys.readouterr().out
        assert out == f"published {published} records to {topic}; {before} were published before\n"
