"""What a topic's log and its brokers do wrong: nothing is lost unseen, and every remedy is named in one line."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaConnectionError

from stream_trainer.demo.broker import free_port
from stream_trainer.errors import DataLossError, FencedError, SourceAwayError, SourceError
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.records import Outcome, Partition
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources import kafka as kafka_source
from stream_trainer.sources.connection import Topic, require_topic
from stream_trainer.sources.kafka import KafkaSource
from stream_trainer.sources.topic_log import TopicLog
from stream_trainer.sources.transactions import SAY_AFTER_S, OpenTransactions
from tests.helpers.brokers import (
    ApacheKafka,
    committed,
    create_topic,
    delete_records,
    delete_topic,
    how_to_reach,
    needs_apache_kafka,
    publish,
    rewrite_batch,
)
from tests.stream_trainer.ingest.service import Service, good, running
from tests.stream_trainer.sources.test_kafka import WAIT_S, letters, read, read_to_end, started, values
from tests.stream_trainer.sources.test_kafka_topics import recreate


def marks_of(records: list[Any]) -> dict[Partition, tuple[int, str]]:
    return {record.partition: (record.offset, record.mark) for record in records}


# The order of several partitions.


def test_the_order_of_three_partitions_with_many_fetches_is_the_same_in_every_run(
    broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_source, "FETCH_BYTES", 4000)  # some fifty records
    create_topic(broker, topic, partitions=3)
    for number in range(3):
        publish(broker, topic, [good(n) for n in range(300 + 50 * number)], number, linger_ms=20, batch_size=2000)
    settings = KafkaSettings(bootstrap_servers=broker, topic=topic, stop_at_end=True, fencing="off", **how_to_reach())
    expected = [(number, n) for n in range(400) for number in range(3) if n < 300 + 50 * number]
    assert order_of(settings, Cursor(), len(expected)) == expected
    cursor = Cursor()
    for count in (200, 300, len(expected)):
        order = order_of(settings, cursor, count)
        assert order == expected[: len(order)]
        expected, cursor = expected[len(order) :], Cursor.restore(cursor.state_dict())
    assert expected == []


def order_of(settings: KafkaSettings, cursor: Cursor, count: int) -> list[tuple[int, int]]:
    """Partition and offset of the next samples: `count`, or a few more, or all there are."""
    taken: list[tuple[int, int]] = []
    with running(Service(KafkaSource(settings), cursor)) as service:
        while len(taken) < count and (samples := service.take(37)):
            for sample in samples:
                service.cursor.resolve(sample.partition, sample.offset, Outcome.TRAINED)
            taken += [(sample.partition.number, sample.offset) for sample in samples]
    return taken


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_a_partition_of_which_nothing_is_to_be_fetched_goes_on_where_it_was(broker: str, topic: str) -> None:
    create_topic(broker, topic, partitions=2)
    for number in range(2):
        publish(broker, topic, letters("abc"), number)
    first, second = Partition(topic, 0), Partition(topic, 1)
    with started(broker, topic) as source:
        source.hold(frozenset([first]))
        assert {r.partition for r in read(source, 3)} == {second}
        publish(broker, topic, letters("d"), 0)
        assert source.poll(0.5) == []
        assert source.positions() == {first: 0, second: 3}
        source.hold(frozenset())
        assert values(read(source, 4)) == letters("abcd")
        assert source.drained == {first, second}


# Batches that cannot be decoded.


def spoil_a_header(kafka: ApacheKafka, topic: str) -> None:
    """Twenty good records, one with the name of a header that is not UTF-8, nineteen good ones, all in one batch."""
    create_topic(kafka.bootstrap_servers, topic)
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers, linger_ms=2000, batch_size=1 << 20)
    for n in range(40):
        producer.send(topic, b"value %d" % n, headers=[("spoiled" if n == 20 else "fine", b"")])
    producer.close()
    rewrite_batch(kafka, topic, b"spoiled", b"spoiled", b"sp\xff\xfeled")


def test_a_header_that_is_not_utf_8_costs_no_record(apache_kafka: ApacheKafka, topic: str) -> None:
    spoil_a_header(apache_kafka, topic)
    with started(apache_kafka.bootstrap_servers, topic, stop_at_end=True) as source:
        assert values(read_to_end(source)) == [b"value %d" % n for n in range(40)]


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_damaged_batch_costs_no_other_record(apache_kafka: ApacheKafka, topic: str, policy: str) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    publish(servers, topic, [good(n) for n in range(50)])
    publish(servers, topic, [b"to be damaged"])
    publish(servers, topic, [good(n) for n in range(51, 60)])
    segment = apache_kafka.data_dir / "log" / f"{topic}-0" / f"{0:020}.log"
    segment.write_bytes(segment.read_bytes().replace(b"to be damaged", b"TO be damaged"))
    settings = KafkaSettings(bootstrap_servers=servers, topic=topic, stop_at_end=True, on_undecodable=policy)
    taken: list[int] = []
    with running(Service(KafkaSource(settings))) as service:
        if policy == "fail":
            with pytest.raises(SourceError, match=r"offset 50: 1 records cannot be decoded .*on_undecodable=skip"):
                decide_all(service, taken)
        else:
            decide_all(service, taken)
    if policy == "fail":
        assert taken == list(range(50))
        assert service.cursor.positions() == {Partition(topic, 0): 50}
    else:
        assert taken == [n for n in range(60) if n != 50]
        assert service.cursor.counts[Outcome.DEAD_LETTERED] == 1
        assert service.metric("dead_letters_total", reason="undecodable") == 1


def decide_all(service: Service, taken: list[int]) -> None:
    """Take what comes, noting its offsets, to the end of the stream."""
    while samples := service.take(7):
        for sample in samples:
            service.cursor.resolve(sample.partition, sample.offset, Outcome.TRAINED)
            taken.append(sample.offset)


# Logs that were put in another's place.


@needs_apache_kafka("the mock cluster creates and deletes nothing on request")
def test_a_log_that_was_replaced_below_the_cursor_is_noticed(broker: str, topic: str) -> None:
    """Made anew and grown past the cursor, as after a backup was restored; no id gives it away."""
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    with started(broker, topic) as source:
        marks = marks_of(read(source, 6))
    delete_topic(broker, topic)
    recreate(broker, topic)
    publish(broker, topic, letters("ABCDEFGH"))
    cursor = {Partition(topic, 0): 6}
    replaced = "partition 0: the log was replaced below the cursor: offset 5 is not what was decided"
    with pytest.raises(DataLossError, match=replaced), started(broker, topic, cursor, {}, marks):
        pass
    with started(broker, topic, cursor, {}, marks, on_data_loss="skip") as source:
        assert source.replaced == {Partition(topic, 0): 6}
        assert values(read(source, 2)) == letters("GH")


@needs_apache_kafka("the mock cluster creates and deletes nothing on request")
def test_a_log_that_is_the_same_is_read_on(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    with started(broker, topic) as source:
        marks = marks_of(read(source, 6)[:4])
    with started(broker, topic, {Partition(topic, 0): 4}, {}, marks) as source:
        assert values(read(source, 2)) == letters("ef")
    delete_records(broker, topic, before=4)  # the record that was decided last is gone, as it may
    with started(broker, topic, {Partition(topic, 0): 4}, {}, marks) as source:
        assert values(read(source, 2)) == letters("ef")


def test_a_log_that_was_cut_below_what_was_decided_above_the_cursor(broker: str, topic: str) -> None:
    """Else records that come later at those offsets would pass for decided."""
    create_topic(broker, topic)
    publish(broker, topic, letters("abc"))
    cursor, marks = {Partition(topic, 0): 1}, {Partition(topic, 0): (7, "0 1 00000000")}
    with (
        pytest.raises(DataLossError, match="offset 7 is not what was decided"),
        started(broker, topic, cursor, {}, marks),
    ):
        pass
    with started(broker, topic, cursor, {}, marks, on_data_loss="skip") as source:
        assert source.replaced == {Partition(topic, 0): 3}
        assert values(read(source, 2)) == letters("bc")


# Open transactions.


@contextmanager
def open_transaction(servers: str, topic: str) -> Iterator[Any]:
    producer = KafkaProducer(bootstrap_servers=servers, transactional_id=f"tx-{topic}")
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(topic, b"open").get(timeout=WAIT_S)
    try:
        yield producer
    finally:
        producer.close(timeout=5)


def test_a_run_to_the_end_does_not_take_an_open_transaction_for_the_end(apache_kafka: ApacheKafka, topic: str) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    publish(servers, topic, letters("ab"))
    with open_transaction(servers, topic) as producer:
        publish(servers, topic, letters("cdef"))
        p = Partition(topic, 0)
        with started(servers, topic, stop_at_end=True, transaction_wait_s=0.001) as source:
            assert values(read(source, 2)) == letters("ab")
            assert not source.exhausted
            assert source.end_positions() == {p: 7}
            assert source.held_back() == {p: 5}
            with pytest.raises(
                SourceError, match=r"an open transaction of producer id \d+ since offset 2 holds back 5"
            ):
                read(source, 1)
        with started(servers, topic, stop_at_end=True) as source:
            assert values(read(source, 2)) == letters("ab")
            producer.abort_transaction()
            assert values(read_to_end(source)) == letters("cdef")


def test_an_open_transaction_that_stays_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    now, p = [0.0], Partition("t", 0)
    watch = OpenTransactions(KafkaSettings(topic="t"), lambda _: "of producer id 7", clock=lambda: now[0])
    for seconds in (0.0, SAY_AFTER_S, 3 * SAY_AFTER_S):
        now[0] = seconds
        watch.look({p: 20}, {p: 520})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "an open transaction of producer id 7 holds back 500 records from offset 20 on" in line
    assert watch.held_back == {p: 500}
    watch.look({p: 520}, {p: 520})
    assert watch.held_back == {p: 0}


# Partitions without a leader.


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_one_partition_without_a_leader_leaves_the_others_to_be_read(
    broker: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create_topic(broker, topic, partitions=2)
    for number in range(2):
        publish(broker, topic, letters("abc"), number)

    def without_a_leader(admin: Any, name: str) -> Topic:
        return replace(require_topic(admin, name), leaderless=frozenset([1]))

    first, second = Partition(topic, 0), Partition(topic, 1)
    with monkeypatch.context() as patched:
        for name in ("require_topic", "describe_topic"):
            patched.setattr(kafka_source, name, without_a_leader)
        no_leader = pytest.raises(SourceAwayError, match=r"partitions \[1\] have no leader")
        with no_leader, started(broker, topic, stop_at_end=True):
            pass
        cursor = {first: 1, second: 2}
        source = KafkaSource(
            KafkaSettings(bootstrap_servers=broker, topic=topic, discovery_interval_s=0.05, **how_to_reach())
        )
        source.start(cursor, {}, {})
        assert values(read(source, 2)) == letters("bc")
        assert source.positions() == {first: 3, second: 2}
        assert source.without_leader() == {second}
        assert source.reachable
        source.poll(0.1)
    try:
        assert values(read(source, 1)) == letters("c")
        assert source.without_leader() == frozenset()
    finally:
        source.close()
    assert caplog.text.count("have no leader; the others are read") == 1


# Two trainers.


def test_the_older_of_two_trainers_is_fenced(apache_kafka: ApacheKafka, topic: str) -> None:
    servers, p = apache_kafka.bootstrap_servers, Partition(topic, 0)
    create_topic(servers, topic)
    publish(servers, topic, letters("abc"))
    with started(servers, topic) as older:
        older.commit({p: 1}, step=1)
        with started(servers, topic, on_lost_checkpoint="continue") as newer:
            with pytest.raises(FencedError, match=rf"another trainer of topic {topic} has taken over"):
                older.commit({p: 3}, step=3)
            newer.commit({p: 2}, step=2)
            assert older.fences
    assert committed(servers, f"group-of-{topic}", topic) == (2, "step=2")
    others: dict[str, Any] = {"fencing": "off", "on_lost_checkpoint": "continue"}
    with started(servers, topic, **others) as third, started(servers, topic, **others):
        third.commit({p: 3}, step=3)
        assert not third.fences


# Brokers that are not there.


def test_brokers_that_are_away_are_told_from_those_that_refuse(topic: str) -> None:
    source = KafkaSource(
        KafkaSettings(bootstrap_servers=f"127.0.0.1:{free_port()}", topic=topic, bootstrap_timeout_s=0.5)
    )
    with pytest.raises(SourceAwayError, match="ECONNREFUSED"):
        source.start({}, {}, {})


def test_a_start_that_failed_can_be_made_again(broker: str, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    create_topic(broker, topic)
    publish(broker, topic, letters("ab"))
    nowhere = KafkaSettings(
        bootstrap_servers=f"127.0.0.1:{free_port()}", topic=topic, bootstrap_timeout_s=0.5, **how_to_reach()
    )
    source = KafkaSource(nowhere)
    with pytest.raises(SourceAwayError):
        source.start({}, {}, {})
    source._settings = nowhere.model_copy(update={"bootstrap_servers": broker, "bootstrap_timeout_s": WAIT_S})
    try:
        source.start({}, {}, {})
        assert values(read(source, 2)) == letters("ab")
    finally:
        source.close()


def test_records_that_were_fetched_before_an_outage_do_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    """Else it would be told of again and again, and an alert that waits for it to last would never fire."""
    caplog.set_level(logging.INFO, "stream_trainer")
    source = KafkaSource(KafkaSettings(topic="samples"))
    answers: list[dict[Partition, int] | None] = [None, None, {}]

    def ends(_: object) -> dict[Partition, int]:
        answer = answers.pop(0)
        if answer is None:
            raise KafkaConnectionError("111 ECONNREFUSED")
        return answer

    source._next_discovery = math.inf
    source._partitions = [Partition("samples", 0)]
    source._consumer = SimpleNamespace(poll=lambda **_: {TopicPartition("samples", 0): []})
    source._log = cast(TopicLog, SimpleNamespace(ends=ends))
    source._note_outage("the brokers are away")
    reachable = []
    for _ in range(4):
        assert source.poll(0.0) == []
        reachable.append(source.reachable)
    assert reachable == [False, False, True, True]
    assert [record.getMessage()[-9:] for record in caplog.records] == ["trying on", "ead again"]
