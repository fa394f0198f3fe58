"""The Kafka source: nothing is read twice, nothing is lost unseen, and every end is stated in one line."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from pydantic import ValidationError

from stream_trainer.demo.broker import free_port
from stream_trainer.errors import CheckpointError, SettingsError, SourceError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.sections.source import KafkaSettings, SourceSettings
from stream_trainer.sources import connection as kafka_connection
from stream_trainer.sources import open_source
from stream_trainer.sources.connection import probe
from stream_trainer.sources.kafka import KafkaSource
from tests.helpers.brokers import (
    ELSEWHERE,
    PASSWORD,
    USER,
    ApacheKafka,
    commit_for_group,
    committed,
    create_topic,
    how_to_reach,
    needs_apache_kafka,
    prepare_kafka,
    publish,
    running,
)

WAIT_S = 30.0  # patience of a test, never its measure


def letters(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


@contextmanager
def started(
    servers: str,
    topic: str,
    cursor: Mapping[Partition, int] | None = None,
    identity: Mapping[str, str] | None = None,
    marks: Mapping[Partition, tuple[int, str]] | None = None,
    **settings: Any,
) -> Iterator[KafkaSource]:
    settings = (
        {"bootstrap_servers": servers, "topic": topic, "group_id": f"group-of-{topic}"} | how_to_reach() | settings
    )
    source = KafkaSource(KafkaSettings(**settings))
    try:
        source.start(cursor or {}, identity or {}, marks or {})
        yield source
    finally:
        source.close()


def read(source: KafkaSource, count: int) -> list[Record]:
    """`count` records, or as many as come while the test is patient."""
    records: list[Record] = []
    deadline = time.monotonic() + WAIT_S
    while len(records) < count and time.monotonic() < deadline:
        records += source.poll(0.2)
    return records


def read_to_end(source: KafkaSource) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + WAIT_S
    while not source.exhausted:
        assert time.monotonic() < deadline, "not exhausted"
        records += source.poll(0.2)
    return records


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def test_records_arrive_byte_for_byte(broker: str, topic: str) -> None:
    payloads = [b"\x00\xff\xfe\x80", b"", None, b'{"text": "\xc3\xa9"}', bytes(range(256)) * 100]
    create_topic(broker, topic)
    before = time.time()
    publish(broker, topic, payloads)
    with started(broker, topic) as source:
        records = read(source, 5)
    assert values(records) == payloads
    assert [(r.partition, r.offset, r.next_offset) for r in records] == [
        (Partition(topic, 0), i, i + 1) for i in range(5)
    ]
    assert [r.key for r in records] == [b"k0", b"k1", b"k2", b"k3", b"k4"]
    assert {r.headers for r in records} == {(("h", b"\x00"), ("empty", b""))}
    assert all(r.timestamp is not None and before - 5 < r.timestamp < time.time() + 5 for r in records)


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd", "snappy"])
def test_every_compression_is_undone(broker: str, topic: str, codec: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, [b"a" * 10_000, b"b"], compression_type=codec, linger_ms=100)
    with started(broker, topic) as source:
        assert values(read(source, 2)) == [b"a" * 10_000, b"b"]


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_the_cursor_wins_over_the_group_and_the_group_over_start(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    with started(broker, topic, start="latest") as source:
        assert source.positions() == {Partition(topic, 0): 6}
    commit_for_group(broker, f"group-of-{topic}", topic, 2)
    with started(broker, topic, start="latest") as source:
        assert values(read(source, 4)) == letters("cdef")
    with started(broker, topic, {Partition(topic, 0): 4}) as source:
        assert values(read(source, 2)) == letters("ef")


def test_records_that_the_groups_offset_leaves_out_are_reported(
    broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    commit_for_group(broker, f"group-of-{topic}", topic, 2)
    with started(broker, topic):
        pass
    (line,) = [record.getMessage() for record in caplog.records if "there is no checkpoint" in record.getMessage()]
    assert f"begins at 2, where group group-of-{topic} stands, and leaves out the 2 records before it" in line
    caplog.clear()
    with started(broker, topic, {Partition(topic, 0): 4}):
        pass
    assert "there is no checkpoint" not in caplog.text


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_committing_tells_the_group_the_position_and_the_step(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abc"))
    with started(broker, topic) as source:
        read(source, 3)
        source.commit({Partition(topic, 0): 2}, step=7)
        assert source.end_positions() == {Partition(topic, 0): 3}
    assert committed(broker, f"group-of-{topic}", topic) == (2, "step=7")


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_where_the_group_tells_of_steps_that_no_checkpoint_has(broker: str, topic: str) -> None:
    """A fresh model in the middle of the topic would never have seen what lies before."""
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    with started(broker, topic) as source:
        source.commit({Partition(topic, 0): 2}, step=0)
    with started(broker, topic) as source:
        assert source.positions() == {Partition(topic, 0): 2}, "no step was made, so nothing is lost"
        source.commit({Partition(topic, 0): 4}, step=7)
    message = (
        rf"^source.kafka.group_id=group-of-{topic} stands at offset 4 of partition 0, put there at step 7, but .*"
        r"on_lost_checkpoint to continue .* or start_over; if another trainer did that, name another .*group_id$"
    )
    with pytest.raises(CheckpointError, match=message), started(broker, topic):
        pass
    for policy, position in (("continue", 4), ("start_over", 0)):
        with started(broker, topic, on_lost_checkpoint=policy) as source:
            assert source.positions() == {Partition(topic, 0): position}
    with started(broker, topic, {Partition(topic, 0): 1}) as source:
        assert source.positions() == {Partition(topic, 0): 1}


def test_order_holds_within_each_partition(broker: str, topic: str) -> None:
    create_topic(broker, topic, partitions=3)
    for partition in range(3):
        publish(broker, topic, [b"%d-%d" % (partition, i) for i in range(700)], partition)
    with started(broker, topic, stop_at_end=True) as source:
        records = read_to_end(source)
    for partition in range(3):
        of_partition = [r for r in records if r.partition.number == partition]
        assert values(of_partition) == [b"%d-%d" % (partition, i) for i in range(700)]


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_stopping_at_the_end_leaves_later_records_to_another_run(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abc"))
    with started(broker, topic, stop_at_end=True) as source:
        assert not source.exhausted
        publish(broker, topic, letters("de"))
        assert values(read_to_end(source)) == letters("abc")
        cursor = source.positions()
    assert cursor == {Partition(topic, 0): 3}
    with started(broker, topic, cursor, stop_at_end=True) as source:
        assert values(read_to_end(source)) == letters("de")


def test_an_empty_topic_is_exhausted_at_once(broker: str, topic: str) -> None:
    create_topic(broker, topic, partitions=2)
    with started(broker, topic, stop_at_end=True) as source:
        assert source.exhausted


def test_pausing_returns_nothing_and_resuming_goes_on(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("ab"))
    with started(broker, topic) as source:
        source.pause()
        assert source.poll(0.5) == []
        publish(broker, topic, letters("c"))
        assert source.poll(0.5) == []
        source.resume()
        assert values(read(source, 3)) == letters("abc")


def test_aborted_transactions_are_hidden_and_passed(apache_kafka: ApacheKafka, topic: str) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    producer = KafkaProducer(bootstrap_servers=servers, transactional_id=topic)
    producer.init_transactions()
    for value, commits in ((b"kept", True), (b"aborted", False)):
        producer.begin_transaction()
        producer.send(topic, value)
        producer.flush()
        producer.commit_transaction() if commits else producer.abort_transaction()
    producer.close()
    end = {Partition(topic, 0): 4}  # one record and one marker for each transaction; markers come a little later
    with started(servers, topic) as source:
        deadline = time.monotonic() + WAIT_S
        while source.end_positions() != end and time.monotonic() < deadline:
            source.poll(0.1)
    with started(servers, topic, stop_at_end=True) as source:
        assert values(read_to_end(source)) == [b"kept"]
        assert source.positions() == source.end_positions() == end


def test_a_missing_topic_is_a_setting_to_correct(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    with pytest.raises(SettingsError, match=f"topic={topic}x does not exist; did you mean {topic}"):
        probe(KafkaSettings(bootstrap_servers=broker, topic=f"{topic}x", **how_to_reach()))
    with pytest.raises(SettingsError, match="does not exist"), started(broker, f"{topic}x"):
        pass
    probe(KafkaSettings(bootstrap_servers=broker, topic=topic, **how_to_reach()))


def test_an_unreachable_broker_is_named() -> None:
    servers = f"127.0.0.1:{free_port()}"
    message = rf"source\.kafka\.bootstrap_servers={servers} could not be reached .*ECONNREFUSED"
    with pytest.raises(SourceError, match=message):
        probe(KafkaSettings(bootstrap_servers=servers, topic="t", bootstrap_timeout_s=0.5))


@pytest.mark.parametrize(
    "wrong", [{"bootstrap_servers": "here:there"}, {"security_protocol": "SSL", "ssl_cafile": "/missing.pem"}]
)
def test_settings_that_cannot_be_used_are_named(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=rf"source\.kafka\.{list(wrong)[-1]}={list(wrong.values())[-1]}"):
        probe(KafkaSettings(**{"topic": "t", **wrong}))


def test_brokers_are_asked_for_their_version_unless_it_is_set() -> None:
    options = [kafka_connection.connection_options(KafkaSettings(api_version=given), "c") for given in (None, "2.3")]
    assert [found["api_version"] for found in options] == [None, (2, 3)]
    with pytest.raises(ValidationError, match="api_version"):
        KafkaSettings(api_version="latest")


def test_a_missing_compression_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_connection, "has_zstd", lambda: False)
    with pytest.raises(SettingsError, match="zstd"):
        open_source(SourceSettings(kafka=KafkaSettings(topic="t")))


@pytest.mark.slow
@needs_apache_kafka("the mock cluster forgets its log")
def test_an_outage_is_logged_once_and_survived(tmp_path: Path, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    kafka = prepare_kafka(tmp_path)
    servers = kafka.bootstrap_servers
    caplog.set_level(logging.INFO, "stream_trainer")
    with running(kafka):
        create_topic(servers, topic)
        publish(servers, topic, letters("a"))
        source = KafkaSource(KafkaSettings(bootstrap_servers=servers, topic=topic, discovery_interval_s=0.05))
        source.start({}, {}, {})
        assert values(read(source, 1)) == letters("a")
    for _ in range(5):
        assert source.poll(0.1) == []
    assert source.end_positions() == {Partition(topic, 0): 1}
    with running(kafka):
        publish(servers, topic, letters("b"))
        assert values(read(source, 1)) == letters("b")
        source.close()
    told = [r.getMessage() for r in caplog.records if r.name == "stream_trainer.sources.kafka"]
    assert [("for now" in line, "again" in line) for line in told[1:]] == [(True, False), (False, True)]


def test_a_batch_that_was_damaged_on_disk_ends_the_run(apache_kafka: ApacheKafka, topic: str) -> None:
    publish_good_and_damaged(apache_kafka, topic)
    with started(apache_kafka.bootstrap_servers, topic) as source:
        assert values(read(source, 1)) == [b"good"]
        with pytest.raises(SourceError, match=r"partition 0, offset 1: 1 records cannot be decoded .*checksum"):
            read(source, 1)


def test_a_pause_before_a_damaged_batch_does_not_hide_it(apache_kafka: ApacheKafka, topic: str) -> None:
    """The client drops the error of a batch whose partition it is told to pause, and then spins for ever."""
    publish_good_and_damaged(apache_kafka, topic)
    with started(apache_kafka.bootstrap_servers, topic) as source:
        assert values(read(source, 1)) == [b"good"]
        source.pause()
        assert source.poll(0.2) == []
        source.resume()
        with pytest.raises(SourceError, match=r"partition 0, offset 1: 1 records cannot be decoded .*checksum"):
            read(source, 1)


def publish_good_and_damaged(kafka: ApacheKafka, topic: str) -> None:
    """Two batches, the second changed where the broker stores it."""
    create_topic(kafka.bootstrap_servers, topic)
    publish(kafka.bootstrap_servers, topic, [b"good"])
    publish(kafka.bootstrap_servers, topic, [b"to be damaged"])
    segment = kafka.data_dir / "log" / f"{topic}-0" / f"{0:020}.log"
    stored = segment.read_bytes()
    with segment.open("r+b") as file:
        file.seek(stored.index(b"to be damaged"))
        file.write(b"TO")


def test_tls_and_sasl_pass_with_the_right_password(apache_kafka: ApacheKafka, topic: str) -> None:
    create_topic(apache_kafka.bootstrap_servers, topic)
    publish(apache_kafka.bootstrap_servers, topic, letters("ab"))
    with started(apache_kafka.secure_servers, topic, **secured(apache_kafka)) as source:
        assert values(read(source, 2)) == letters("ab")


@pytest.mark.parametrize(
    ("wrong", "reason", "timeout_s"),
    [
        # Time for a dozen tries, of which each second one hears why it was refused.
        pytest.param({"sasl_password": "wrong-password"}, "SaslAuthenticationFailed", 15, marks=pytest.mark.slow),
        ({"ssl_cafile": None}, "CERTIFICATE_VERIFY_FAILED", 6),
    ],
)
def test_tls_and_sasl_fail_in_one_line(
    apache_kafka: ApacheKafka, topic: str, wrong: dict[str, Any], reason: str, timeout_s: int
) -> None:
    settings = {**secured(apache_kafka), "bootstrap_timeout_s": timeout_s, **wrong}
    with pytest.raises(SourceError, match=reason) as caught, started(apache_kafka.secure_servers, topic, **settings):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert PASSWORD not in message
    assert "wrong-password" not in message


def secured(kafka: ApacheKafka) -> dict[str, Any]:
    return {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": kafka.ca_file,
        "sasl_mechanism": "PLAIN",
        "sasl_username": USER,
        "sasl_password": PASSWORD,
    }


def test_advertised_addresses_that_lead_elsewhere_are_named(apache_kafka: ApacheKafka, topic: str) -> None:
    create_topic(apache_kafka.bootstrap_servers, topic)
    servers = apache_kafka.lost_servers
    with pytest.raises(SourceError) as raised, started(servers, topic):
        pass
    with pytest.raises(SourceError) as probed:
        probe(KafkaSettings(bootstrap_servers=servers, topic=topic))
    for line in (str(raised.value), str(probed.value)):
        assert f"bootstrap_servers={servers} answers, but the brokers call themselves {ELSEWHERE} (" in line
        assert "correct advertised.listeners" in line
