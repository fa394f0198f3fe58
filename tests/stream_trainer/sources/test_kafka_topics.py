"""What becomes of a topic beside the records that are written to it: deleted, made anew, with more partitions."""

import logging
import time

import pytest

from stream_trainer.errors import DataLossError
from stream_trainer.records import Partition
from stream_trainer.sources import connection as kafka_connection
from tests.helpers.brokers import (
    ApacheKafka,
    admin,
    create_topic,
    delete_records,
    delete_topic,
    needs_apache_kafka,
    publish,
)
from tests.stream_trainer.sources.test_kafka import WAIT_S, letters, read, started, values


@needs_apache_kafka("the mock cluster creates and deletes nothing on request")
def test_records_deleted_below_the_cursor_end_the_run(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    delete_records(broker, topic, before=4)
    loss = "partition 0 begins at 4, but the cursor is 1: 3 records are gone; .*source.kafka.on_data_loss=skip"
    with pytest.raises(DataLossError, match=loss), started(broker, topic, {Partition(topic, 0): 1}):
        pass


@needs_apache_kafka("the mock cluster creates and deletes nothing on request")
def test_records_deleted_below_the_cursor_are_counted_when_skipped(
    broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("abcdef"))
    delete_records(broker, topic, before=4)
    with started(broker, topic, {Partition(topic, 0): 1}, on_data_loss="skip") as source:
        assert values(read(source, 2)) == letters("ef")
        assert source.records_lost == 3
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR and "stream_trainer" in r.name]
    assert len(errors) == 1
    assert "3 records are gone" in errors[0]


@needs_apache_kafka("the mock cluster creates and deletes nothing on request")
@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_records_deleted_while_reading(broker: str, topic: str, policy: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("ab"))
    with started(broker, topic, on_data_loss=policy) as source:
        read(source, 2)
        source.pause()
        source.poll(1.0)
        publish(broker, topic, letters("cdef"))
        delete_records(broker, topic, before=5)
        source.resume()
        if policy == "fail":
            with pytest.raises(DataLossError, match="begins at 5, but the next offset is 2: 3 records are gone"):
                read(source, 1)
        else:
            assert values(read(source, 1)) == letters("f")
            assert source.records_lost == 3


@needs_apache_kafka("each topic of the mock cluster has four partitions")
def test_a_cursor_behind_the_end_of_the_log(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, letters("ab"))
    cursor = {Partition(topic, 0): 9}
    with pytest.raises(DataLossError, match="ends at 2, but the cursor is 9"), started(broker, topic, cursor):
        pass
    with started(broker, topic, cursor, on_data_loss="skip") as source:
        assert source.positions() == {Partition(topic, 0): 2}


def test_a_topic_made_anew_is_recognised_by_its_id(apache_kafka: ApacheKafka, topic: str) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    publish(servers, topic, letters("ab"))
    with started(servers, topic) as source:
        identity, cursor = source.identity(), {Partition(topic, 0): 1}
    assert set(identity) == {topic}
    with started(servers, topic, cursor, identity) as source:
        assert values(read(source, 1)) == letters("b")
    delete_topic(servers, topic)
    recreate(servers, topic)
    publish(servers, topic, letters("xyz"))
    with pytest.raises(DataLossError, match="deleted and created again"), started(servers, topic, cursor, identity):
        pass
    with started(servers, topic, cursor, identity, on_data_loss="skip") as source:
        assert values(read(source, 3)) == letters("xyz")


def recreate(servers: str, topic: str) -> None:
    """Create a topic as soon as its deletion is through."""
    deadline = time.monotonic() + WAIT_S
    with admin(servers) as client:
        while kafka_connection.describe_topic(client, topic) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
    create_topic(servers, topic)


def test_a_topic_made_anew_while_reading_ends_the_run(apache_kafka: ApacheKafka, topic: str) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    with started(servers, topic, on_data_loss="skip", discovery_interval_s=0.01) as source:
        delete_topic(servers, topic)
        recreate(servers, topic)
        with pytest.raises(DataLossError, match="deleted and created again"):
            read(source, 1)


@needs_apache_kafka("the mock cluster creates and deletes nothing on request")
def test_new_partitions_are_read_from_their_first_record(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    with started(broker, topic, start="latest", discovery_interval_s=0.2) as source:
        with admin(broker) as client:
            client.create_partitions({topic: 2})
        publish(broker, topic, letters("ab"), partition=1)
        records = read(source, 2)
        assert values(records) == letters("ab")
        assert source.positions() == {Partition(topic, 0): 0, Partition(topic, 1): 2}


def test_partitions_added_between_runs_are_read_from_their_first_record(broker: str, topic: str) -> None:
    create_topic(broker, topic, partitions=2)
    publish(broker, topic, letters("ab"), partition=1)
    with started(broker, topic, {Partition(topic, 0): 0}, start="latest") as source:
        assert values(read(source, 2)) == letters("ab")
