"""Publishing JSON lines: original bytes, in the stated mixture, with every failure told."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from stream_trainer.commands.produce import ProduceReport, add_arguments, parse_files, produce, run
from stream_trainer.demo.broker import free_port
from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.records import Record
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.kafka import KafkaSource
from tests.helpers.brokers import (
    ApacheKafka,
    apache_kafka,
    create_topic,
    running,
    why_no_apache_kafka,
)


@pytest.fixture
def broker(apache_kafka: ApacheKafka) -> str:
    """Publishing takes transactions, whose marks the mock cluster writes with wrong checksums."""
    return apache_kafka.bootstrap_servers


def settings_of(servers: str, topic: str) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=servers, topic=topic, stop_at_end=True)


def read_topic(settings: KafkaSettings) -> list[Record]:
    source = KafkaSource(settings)
    try:
        source.start({}, {}, {})
        records: list[Record] = []
        while not source.exhausted:
            records += source.poll(0.2)
        return records
    finally:
        source.close()


def write(path: Path, name: str, lines: int) -> Path:
    file = path / f"{name}.jsonl"
    file.write_bytes(b"".join(b"%s-%d\n" % (name.encode(), i) for i in range(lines)))
    return file


def names_of(records: list[Record]) -> list[str]:
    return [(record.value or b"").decode().split("-")[0] for record in records]


def counts_of(report: ProduceReport) -> list[int]:
    return [count for _, count in report.per_file]


def test_lines_are_published_byte_for_byte(broker: str, topic: str, tmp_path: Path) -> None:
    file = tmp_path / "raw.jsonl"
    file.write_bytes(b'{"a": 1}\r\n\n\xff\x00\xfe\nno newline')
    report = produce([file], None, settings_of(broker, topic))
    records = read_topic(settings_of(broker, topic))
    assert [r.value for r in records] == [b'{"a": 1}\r', b"", b"\xff\x00\xfe", b"no newline"]
    assert {(r.key, r.headers) for r in records} == {(None, ())}
    assert (report.records, report.bytes, report.per_file) == (4, 22, ((file, 4),))


def test_a_mixture_has_the_stated_shares_and_ends_with_the_first_empty_file(
    broker: str, topic: str, tmp_path: Path
) -> None:
    files = [write(tmp_path, "math", 400), write(tmp_path, "tools", 5_000)]
    report = produce(files, [1, 3], settings_of(broker, topic), seed=1)
    math, tools = counts_of(report)
    assert (math, report.ended_by) == (400, f"{files[0]} ran out")
    assert 1_000 < tools < 1_400  # 1200 expected, five standard deviations
    names = names_of(read_topic(settings_of(broker, topic)))
    assert Counter(names) == {"math": math, "tools": tools}
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    assert all(0.18 < half.count("math") / len(half) < 0.32 for half in halves)


def test_without_shares_files_are_interleaved_evenly_to_their_ends(broker: str, topic: str, tmp_path: Path) -> None:
    files = [write(tmp_path, "math", 300), write(tmp_path, "tools", 900)]
    report = produce(files, None, settings_of(broker, topic))
    assert (counts_of(report), report.ended_by) == ([300, 900], "every file was read to its end")
    records = read_topic(settings_of(broker, topic))
    first_half = names_of(records)[:600]
    assert 110 < first_half.count("math") < 190
    of_math = [r.value for r in records if names_of([r]) == ["math"]]
    assert of_math == [b"math-%d" % i for i in range(300)]


def test_the_seed_decides_the_order(broker: str, topic: str, tmp_path: Path) -> None:
    files = [write(tmp_path, "math", 50), write(tmp_path, "tools", 50)]
    orders = []
    for suffix, seed in (("a", 5), ("b", 5), ("c", 6)):
        settings = settings_of(broker, f"{topic}-{suffix}")
        produce(files, None, settings, seed=seed)
        orders.append(names_of(read_topic(settings)))
    assert orders[0] == orders[1] != orders[2]


def test_a_count_ends_it_and_partitions_take_turns(broker: str, topic: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = produce(
        [write(tmp_path, "math", 50)],
        None,
        settings_of(broker, topic),
        count=9,
        partitions=3,
        progress=lambda sent, total: told.append((sent, total)),
    )
    assert (report.records, report.ended_by) == (9, "count=9 reached")
    assert told == [(i, 9) for i in range(1, 10)]
    assert Counter(r.partition.number for r in read_topic(settings_of(broker, topic))) == {0: 3, 1: 3, 2: 3}


def test_an_existing_topic_is_used_as_it_is(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic, partitions=2)
    produce([write(tmp_path, "math", 4)], None, settings_of(broker, topic), partitions=5)
    assert Counter(r.partition.number for r in read_topic(settings_of(broker, topic))) == {0: 2, 1: 2}


def test_a_rate_spreads_the_records_over_time(broker: str, topic: str, tmp_path: Path) -> None:
    report = produce([write(tmp_path, "math", 6)], None, settings_of(broker, topic), rate=20)
    assert report.seconds >= 5 / 20  # the sixth is not due before; how much later it comes is not ours to say


def test_a_record_the_broker_refuses_ends_it(broker: str, topic: str, tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    file.write_bytes(b"x" * 2_000_000 + b"\n")
    with pytest.raises(SourceError, match="record 1 of 2000000 bytes cannot be published"):
        produce([file], None, settings_of(broker, topic))


def test_a_record_that_is_refused_on_arrival_ends_it(apache_kafka: ApacheKafka, topic: str, tmp_path: Path) -> None:
    create_topic(apache_kafka.bootstrap_servers, topic, configs={"max.message.bytes": "100"})
    file = tmp_path / "large.jsonl"
    file.write_bytes(b"x" * 10_000 + b"\n")
    with pytest.raises(SourceError, match=r"of 1 records sent the last 1 are not published .*MessageSizeTooLarge"):
        produce([file], None, settings_of(apache_kafka.bootstrap_servers, topic))


def test_an_unreachable_broker_ends_it(topic: str, tmp_path: Path) -> None:
    settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_port()}", topic=topic, bootstrap_timeout_s=0.3)
    with pytest.raises(SourceError, match="could not be reached"):
        produce([write(tmp_path, "math", 1)], None, settings)


def command_line(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_publishes_and_reports(
    broker: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAM_TRAINER_SOURCE__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    files = [write(tmp_path, name, 10) for name in ("math", "tools")]
    args = command_line(f"{files[0]}:0.5", f"{files[1]}:0.5", "--topic", topic, "--bootstrap-servers", broker)
    args.count = 6
    assert run(args) == 0
    out = capsys.readouterr().out
    assert "published 6 records" in out
    assert all(str(file) in out for file in files)
    assert len(read_topic(settings_of(broker, topic))) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["math.jsonl", "--rate", "-1"], "--rate -1 is not above zero"),
        (["math.jsonl", "--rate", "nan"], "--rate nan is not above zero"),
        (["math.jsonl", "--count", "0"], "--count 0 is not above zero"),
        (["math.jsonl"], "--topic is missing"),
        (["math.jsonl", "--topic", "no spaces"], r"source\.kafka\.topic: "),
        (["math.jsonl", "--topic", "t", "--security-protocol", "SASL_SSL"], "needs sasl_mechanism"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "math", 1)
    with pytest.raises(SettingsError, match=message) as caught:
        run(command_line(*arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["math.jsonl:x"], "math.jsonl:x: the share 'x' is not a number above zero"),
        (["math.jsonl:0"], "is not a number above zero"),
        (["math.jsonl:inf"], "is not a number above zero"),
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["missing.jsonl:0.5"], "missing.jsonl does not exist"),
        (["math.jsonl", "math.jsonl:0.5"], "1 of 2 files have a share"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "math", 1)
    with pytest.raises(SettingsError, match=message):
        parse_files(arguments)


def test_a_file_name_may_contain_a_colon(tmp_path: Path) -> None:
    file = write(tmp_path, "math:0.5", 1)
    assert parse_files([str(file)]) == ([file], None)
    assert parse_files([f"{file}:0.25"]) == ([file], [0.25])


LONG_S = 400.0
PRODUCE = "import sys; from stream_trainer.cli import main; sys.exit(main())"


def start(file: Path, servers: str, topic: str, *options: str) -> subprocess.Popen[bytes]:
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = ["produce", str(file), "--topic", topic, "--bootstrap-servers", servers, *options]
    return subprocess.Popen([sys.executable, "-c", PRODUCE, *arguments], env=os.environ | paths)


def wait_for_records(servers: str, topic: str, count: int) -> None:
    """Until so many are in the topic, committed or not."""
    consumer = KafkaConsumer(bootstrap_servers=servers)
    partition = TopicPartition(topic, 0)
    deadline = time.monotonic() + LONG_S
    try:
        while consumer.end_offsets([partition])[partition] < count:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)
    finally:
        consumer.close()


def test_a_run_that_is_killed_and_started_again_publishes_every_line_once(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    file = write(tmp_path, "math", 20_000)
    for least in (1, 5_000, 12_000):
        process = start(file, servers, topic, "--rate", "8000")
        wait_for_records(servers, topic, least)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    report = produce([file], None, settings_of(servers, topic))
    assert report.before + report.records == 20_000
    assert (report.exact, report.before > 0, report.records > 0) == (True, True, True)
    assert [r.value for r in read_topic(settings_of(servers, topic))] == [b"math-%d" % i for i in range(20_000)]


def test_what_was_published_is_passed_over_unless_it_is_wanted_again(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    settings = settings_of(apache_kafka.bootstrap_servers, topic)
    files = [write(tmp_path, "math", 20), write(tmp_path, "tools", 40)]

    def again(shares: list[float] | None = None, **options: Any) -> tuple[int, int]:
        report = produce(files[: 1 if shares is None else 2], shares, settings, **options)
        return report.before, report.records

    assert again(count=5) == (0, 5)
    assert again() == (5, 15)
    assert again() == (20, 0)
    with files[0].open("ab") as file:
        file.write(b"math-20\n")
    assert again() == (20, 1)  # what a file gains is published
    assert again(again=True) == (0, 21)
    assert again() == (21, 0)
    files[0].write_bytes(files[0].read_bytes().replace(b"math-7\n", b"other\n"))
    assert again() == (0, 21)  # another file of that name
    assert again([1, 1], count=10) == (0, 10)  # a mixture is another thing to publish
    before, _ = again([1, 1])
    assert before == 10
    values = [r.value for r in read_topic(settings)]
    assert values[:21] == [b"math-%d" % i for i in range(21)] == values[21:42]


@pytest.mark.slow
def test_a_broker_that_is_killed_in_the_middle_changes_nothing(topic: str, tmp_path: Path) -> None:
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    file = write(tmp_path, "math", 20_000)
    with apache_kafka(tmp_path) as broker:
        servers = broker.bootstrap_servers
        create_topic(servers, topic)
    with running(broker) as process:
        producer = start(file, servers, topic, "--rate", "4000")
        wait_for_records(servers, topic, 3_000)
        process.kill()
        process.wait()
    with running(broker):
        assert producer.wait(LONG_S) in (0, 3)  # 3: the brokers were away too long, and a new start goes on
        produce([file], None, settings_of(servers, topic))
        assert [r.value for r in read_topic(settings_of(servers, topic))] == [b"math-%d" % i for i in range(20_000)]
