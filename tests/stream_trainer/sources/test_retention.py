"""Seconds until retention reaches what is undecided."""

import math
import time

from kafka.admin import ConfigResource, ConfigResourceType

from stream_trainer.records import Partition, Record
from stream_trainer.sources.retention import Horizon
from tests.helpers.brokers import admin, create_topic, needs_apache_kafka, publish
from tests.stream_trainer.sources.test_kafka import WAIT_S, letters, read, started

ONE, TWO, THREE = (Partition("log", number) for number in range(3))


def records(partition: Partition, *written: float | None) -> list[Record]:
    return [Record(partition, n, n + 1, b"", timestamp=at) for n, at in enumerate(written)]


def test_the_oldest_undecided_record_decides() -> None:
    horizon = Horizon()
    horizon.note([*records(ONE, 1000, 1000.5, 1010, 1020, 1030), *records(TWO, 1050)])
    ends = {ONE: 5, TWO: 1, THREE: 9}
    assert horizon.remaining(100, {ONE: 0, TWO: 0, THREE: 0}, ends, 1060) == {ONE: 40, TWO: 90}  # nothing of THREE
    assert horizon.remaining(100, {ONE: 1}, ends, 1060) == {ONE: 40}  # at the earliest: 1000.5 was not noted
    assert horizon.remaining(100, {ONE: 3}, ends, 1060) == {ONE: 60}
    assert horizon.remaining(100, {ONE: 3}, ends, 1130) == {ONE: -10}


def test_where_nothing_is_undecided_all_of_it_remains() -> None:
    horizon = Horizon()
    horizon.note(records(ONE, 1000, 1010))
    assert horizon.remaining(100, {ONE: 2, TWO: 0}, {ONE: 2, TWO: 0}, 5000) == {ONE: 100, TWO: 100}
    assert horizon.remaining(100, {ONE: 2}, {ONE: 3}, 1015) == {ONE: 95}  # the next one is not read yet


def test_records_that_are_kept_for_ever_or_have_no_time_are_at_no_risk() -> None:
    horizon = Horizon()
    horizon.note([*records(ONE, 1000), *records(TWO, None)])
    assert horizon.remaining(math.inf, {ONE: 0, TWO: 0}, {ONE: 1, TWO: 1}, 1e9) == {ONE: math.inf}


@needs_apache_kafka("the mock cluster knows no configuration of a topic")
def test_the_retention_of_a_topic_is_known_and_followed(broker: str, topic: str) -> None:
    create_topic(broker, topic, configs={"retention.ms": "3600000"})
    with started(broker, topic, discovery_interval_s=0.2) as source:
        assert source.retention_s == 3600
        changed = ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "-1"})
        with admin(broker) as client:
            client.alter_configs([changed])
        deadline = time.monotonic() + WAIT_S
        while source.retention_s == 3600:
            assert time.monotonic() < deadline
            source.poll(0.1)
        assert source.retention_s == math.inf


@needs_apache_kafka("the mock cluster knows no configuration of a topic")
def test_a_topic_that_is_only_compacted_keeps_its_records(broker: str, topic: str) -> None:
    create_topic(broker, topic, configs={"cleanup.policy": "compact"})
    with started(broker, topic) as source:
        assert source.retention_s == math.inf


def test_a_topic_whose_configuration_nobody_tells_is_read_all_the_same(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    with started(broker, topic) as source:
        source._log._admin.describe_configs = lambda *_, **__: {}
        source.retention_s = source._log.retention_s(topic)
        assert source.retention_s is None
        publish(broker, topic, letters("ab"))
        assert len(read(source, 2)) == 2
