"""The whole service on a topic: every record decided once, whatever the topic holds and however often it is stopped."""

import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from stream_trainer.demo.broker import free_port
from stream_trainer.sources import kafka as kafka_source
from tests.helpers.brokers import client_options, create_topic, needs_apache_kafka, publish
from tests.helpers.malformed import malformed_values
from tests.helpers.service import (
    ALL_ON,
    Step,
    configuration,
    counts,
    decided,
    get,
    good,
    goods,
    interrupt_command,
    kafka,
    metrics,
    on_free_port,
    run_and_terminate,
    run_command,
    run_main,
    serve_until,
    serving,
    state_of,
    trainer_json,
    wait_for,
)

PARTITIONS = 3
MAX_BYTES = 10_000


def publish_to_all(broker: str, topic: str, values: list[bytes]) -> None:
    """Spread values over the partitions of a new topic."""
    create_topic(broker, topic, PARTITIONS)
    for number in range(PARTITIONS):
        publish(broker, topic, values[number::PARTITIONS], number)


def committed(broker: str, topic: str) -> dict[str, int]:
    """The group's offsets by partition, as cursors name them."""
    consumer = KafkaConsumer(
        bootstrap_servers=broker, group_id=f"{topic}-group", enable_auto_commit=False, **client_options()
    )
    try:
        numbers = consumer.partitions_for_topic(topic)
        names = {f"{topic}:{number}": TopicPartition(topic, number) for number in numbers}
        return {name: consumer.committed(partition) for name, partition in names.items()}
    finally:
        consumer.close()


def positions(config: dict[str, Any]) -> dict[str, int]:
    """Where the newest checkpoint would resume."""
    return {name: log["next"] for name, log in trainer_json(config)["cursor"]["partitions"].items()}


def read_topic(broker: str, topic: str) -> list[bytes | None]:
    consumer = KafkaConsumer(
        bootstrap_servers=broker, auto_offset_reset="earliest", enable_auto_commit=False, **client_options()
    )
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        values: list[bytes | None] = []
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            values += [record.value for batch in consumer.poll(timeout_ms=1000).values() for record in batch]
        return values
    finally:
        consumer.close()


@pytest.mark.slow
def test_however_often_it_is_stopped_every_record_is_decided_once(broker: str, topic: str, tmp_path: Path) -> None:
    publish_to_all(broker, topic, goods(150))
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        config = configuration(folder, kafka(broker, topic, group_id=f"{topic}-{seed}"))
        stops = sorted(random.Random(seed).sample(range(1, 18), 2))
        steps = [step for last in (*stops, None) for step in serve_until(config, last)[1]]
        assert Counter(name for step in steps for name in step.ids) == Counter(str(number) for number in range(150))
        assert [step.number for step in steps] == list(range(1, 20))
        assert sum(counts(config).values()) == 150


@pytest.mark.parametrize("selection", [pytest.param({}, marks=pytest.mark.slow), ALL_ON], ids=["sequential", "waiting"])
def test_a_run_over_three_partitions_that_is_stopped_equals_one_that_was_not(
    selection: dict[str, Any], broker: str, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetches are small and differ in every run; the candidates of every step are the same."""
    create_topic(broker, topic, PARTITIONS)
    for number in range(PARTITIONS):
        values = [good(1000 * number + n) for n in range(60 + 20 * number)]
        publish(broker, topic, values, number, linger_ms=20, batch_size=700)

    def run_of(name: str, stops: list[int | None]) -> list[Step]:
        folder = tmp_path / name
        folder.mkdir()
        source = kafka(broker, topic, group_id=f"{topic}-{name}")
        config = configuration(folder, source, selection=selection)
        return [step for last in stops for step in serve_until(config, last)[1]]

    monkeypatch.setattr(kafka_source, "FETCH_BYTES", 2000)
    whole = run_of("whole", [None])
    for seed, size in enumerate((1000, 5000)):
        monkeypatch.setattr(kafka_source, "FETCH_BYTES", size)
        stops = sorted(random.Random(seed).sample(range(1, len(whole)), 2))
        steps = run_of(f"seed-{seed}", [*stops, None])
        assert [step.ids for step in steps] == [step.ids for step in whole], stops
        assert selection or steps == whole


@needs_apache_kafka("the mock cluster does not show what a transaction committed")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_process_that_is_ended_loses_nothing_and_repeats_nothing(
    number: signal.Signals, broker: str, topic: str, tmp_path: Path
) -> None:
    publish_to_all(broker, topic, goods(600))
    config = configuration(tmp_path, kafka(broker, topic))
    config["checkpoint"]["every_steps"] = 20
    code = interrupt_command(tmp_path, config, number, step=25)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    left = trainer_json(config)
    assert 20 <= left["step"] < 75
    assert sum(left["cursor"]["counts"].values()) == 8 * left["step"]
    if number == signal.SIGTERM:
        assert left["step"] > 20
        assert committed(broker, topic) == positions(config)
    assert run_command(tmp_path, config) == 0
    assert sum(counts(config).values()) == 600
    assert trainer_json(config)["step"] == 75
    assert sum(positions(config).values()) == 600
    assert committed(broker, topic) == positions(config)


def test_sigterm_while_idle_on_an_empty_topic(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic)
    config = on_free_port(configuration(tmp_path, kafka(broker, topic, stop_at_end=False)))
    lag = f'lag_records{{partition="0",topic="{topic}"}}'
    assert run_and_terminate(config, lambda: state_of(config) == "idle" and metrics(config).get(lag) == 0) == 0


@needs_apache_kafka("the mock cluster's marks of transactions are corrupt")
def test_malformed_records_among_good_ones(broker: str, topic: str, tmp_path: Path) -> None:
    """Every kind that a topic can hold, 2000 in all, and tombstones; on a file there are ten thousand."""
    usable = [value for _, value in malformed_values(MAX_BYTES)]
    short = [value for value in usable if len(value) <= MAX_BYTES]
    assert len(short) >= 20
    bad = [value for value in usable if len(value) > MAX_BYTES]
    bad += [short[number % len(short)] for number in range(2000 - len(bad))]
    create_topic(broker, topic)
    create_topic(broker, f"{topic}.dead-letters")
    good_ones = goods(2000)
    publish(broker, topic, [value for pair in zip(bad, good_ones, strict=True) for value in pair] + [None] * 7)
    config = configuration(
        tmp_path,
        kafka(broker, topic),
        selection={"weigh": "equal", "batch_size": 128},
        samples={"max_bytes": MAX_BYTES},
        dead_letters={"kind": "topic"},
    )
    summary, steps = serve_until(config)
    nothing = {"not_selected": 0, "discarded": 0, "duplicate": 0}
    assert summary.counts == {"trained": 2000, "filtered": 7, "dead_lettered": 2000, **nothing}
    assert counts(config) == summary.counts
    assert [name for step in steps for name in step.selected] == [str(number) for number in range(2000)]
    assert Counter(read_topic(broker, f"{topic}.dead-letters")) == Counter(bad)
    assert not (tmp_path / "dead-letters.jsonl").exists()


@needs_apache_kafka("the mock cluster does not show what a transaction committed")
def test_what_it_shows_is_what_it_commits(broker: str, topic: str, tmp_path: Path) -> None:
    publish_to_all(broker, topic, [*goods(60), b"not JSON"])
    source = kafka(broker, topic, stop_at_end=False)
    config = on_free_port(configuration(tmp_path, source, buffer={"wait_s": 0.5}))
    lag = {f'lag_records{{partition="{number}",topic="{topic}"}}' for number in range(PARTITIONS)}
    with serving(config) as ended:
        wait_for(lambda: state_of(config) == "idle" and decided(config) == 61)
        wait_for(lambda: sum(metrics(config)[name] for name in lag) == 0)
        assert (get(config, "/healthz")[0], get(config, "/readyz")[0]) == (200, 200)
        shown = metrics(config)
    assert {name: shown[f'records_total{{outcome="{name}"}}'] for name in counts(config)} == counts(config)
    assert counts(config) == ended[0].counts
    assert shown['dead_letters_total{reason="bad_json"}'] == 1
    assert shown["commit_failures_total"] == 0
    assert sum(positions(config).values()) == 61
    assert committed(broker, topic) == positions(config)


def test_a_topic_that_does_not_exist_is_one_line(
    broker: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_topic(broker, topic)
    assert run_main(tmp_path, configuration(tmp_path, kafka(broker, f"{topic}s"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: source.kafka.topic={topic}s does not exist; did you mean {topic}?")


def test_a_broker_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    source = kafka(nowhere, "samples", bootstrap_timeout_s=1.0)
    assert run_main(tmp_path, configuration(tmp_path, source)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert nowhere in line


def test_a_live_service_waits_for_brokers_that_are_not_there_yet(tmp_path: Path) -> None:
    source = kafka(f"127.0.0.1:{free_port()}", "samples", bootstrap_timeout_s=0.5, stop_at_end=False)
    config = on_free_port(configuration(tmp_path, source))

    def waits() -> bool:
        status, page = get(config, "/readyz")
        return status == 503 and "waiting for the stream" in page and get(config, "/healthz")[0] == 200

    assert run_and_terminate(config, waits) == 0
