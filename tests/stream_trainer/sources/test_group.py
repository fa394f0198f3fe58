"""Offsets of the group are advisory: what they cost while they cannot be committed is bounded."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import KafkaTimeoutError

from stream_trainer.errors import FencedError, SourceError
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources import connection
from stream_trainer.sources import group as groups
from stream_trainer.sources.group import HASTE_S, HASTY_TIMEOUT_MS, Group
from stream_trainer.sources.topic_log import REQUEST_TIMEOUT_MS
from tests.helpers.brokers import ApacheKafka, committed, create_topic, publish, why_no_apache_kafka
from tests.helpers.brokers import apache_kafka as run_apache_kafka
from tests.stream_trainer.sources.test_kafka import WAIT_S, letters, read, started, values

AT = {Partition("t", 0): 6}


class Client:
    """A client whose coordinator is away, or there."""

    def __init__(self) -> None:
        self.away = False
        self.timeouts: list[int] = []

    def commit(self, _offsets: Any, timeout_ms: int) -> None:
        self.timeouts.append(timeout_ms)
        if self.away:
            raise KafkaTimeoutError


def test_a_commit_that_fails_again_takes_less_time_from_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    client, clock = Client(), 100.0
    monkeypatch.setattr(groups, "connect", lambda *_, **__: client)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    group = Group.connect(KafkaSettings(topic="t", fencing="off"), "test", None)
    for away, seconds in ((False, 0), (True, 0), (True, 1), (False, 1), (False, HASTE_S + 1)):
        client.away = away
        clock += seconds
        if away:
            with pytest.raises(SourceError, match="could not be committed to group stream-trainer"):
                group.commit(AT, step=1)
        else:
            group.commit(AT, step=1)
    assert client.timeouts == [
        REQUEST_TIMEOUT_MS,
        REQUEST_TIMEOUT_MS,
        HASTY_TIMEOUT_MS,
        HASTY_TIMEOUT_MS,
        REQUEST_TIMEOUT_MS,
    ]


def test_without_a_group_there_is_nothing_to_know_or_to_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "connect", lambda *_, **__: pytest.fail("connected"))
    group = Group.connect(KafkaSettings(topic="t", group_id=None), "test", None)
    assert group.committed(Partition("t", 0)) is None
    group.commit(AT, step=1)
    group.close()


@pytest.mark.slow
def test_without_the_groups_coordinator_reading_goes_on(tmp_path: Path, topic: str) -> None:
    """Three replicas of the group's offsets, which a lone broker cannot give: the coordinator is never there."""
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    with run_apache_kafka(tmp_path, offsets_topic_replication_factor="3") as kafka:
        servers = kafka.bootstrap_servers
        create_topic(servers, topic)
        publish(servers, topic, letters("abcdef"))
        with started(servers, topic, {Partition(topic, 0): 2}) as source:
            assert values(read(source, 4)) == letters("cdef")
            with pytest.raises(SourceError, match="could not be committed"):
                source.commit({Partition(topic, 0): 6}, step=1)
            publish(servers, topic, letters("g"))
            assert values(read(source, 1)) == letters("g")
            assert source.reachable
        unknown = f"group_id=group-of-{topic}: its coordinator does not answer .* set source.kafka.group_id to null"
        with pytest.raises(SourceError, match=unknown), started(servers, topic):
            pass
        with started(servers, topic, group_id=None) as source:
            assert values(read(source, 7)) == letters("abcdefg")
            source.commit({Partition(topic, 0): 7}, step=1)


def test_the_first_commit_of_one_that_was_replaced_is_refused(apache_kafka: ApacheKafka, topic: str) -> None:
    servers, first = apache_kafka.bootstrap_servers, Partition(topic, 0)
    create_topic(servers, topic)
    publish(servers, topic, letters("abcdef"))
    with started(servers, topic) as zombie, started(servers, topic) as owner:
        owner.commit({first: 5}, step=2)
        with pytest.raises(FencedError):
            zombie.commit({first: 3}, step=1)
    assert committed(servers, f"group-of-{topic}", topic)[0] == 5


@pytest.mark.slow
def test_a_group_with_members_of_its_own_cannot_be_committed_to(apache_kafka: ApacheKafka, topic: str) -> None:
    servers = apache_kafka.bootstrap_servers
    create_topic(servers, topic)
    member = KafkaConsumer(topic, bootstrap_servers=servers, group_id=f"group-of-{topic}", metadata_max_age_ms=300)
    deadline = time.monotonic() + WAIT_S
    while not member.assignment() and time.monotonic() < deadline:
        member.poll(timeout_ms=200)
    try:
        with (
            started(servers, topic) as source,
            pytest.raises(SourceError, match=rf"source\.kafka\.group_id=group-of-{topic} is in use"),
        ):
            source.commit({Partition(topic, 0): 0}, step=1)
    finally:
        member.close()


def test_who_still_owns_the_directory_claims_again_and_only_once(apache_kafka: ApacheKafka, topic: str) -> None:
    """Of two that start at once, one may come last to the directory and the other last to the brokers."""
    servers, p = apache_kafka.bootstrap_servers, Partition(topic, 0)
    create_topic(servers, topic)
    settings = KafkaSettings(bootstrap_servers=servers, topic=topic, group_id=f"group-of-{topic}")
    looks: list[str] = []

    def lost() -> None:
        looks.append("lost")
        raise FencedError("taken over by pid 7")

    def committed_now() -> tuple[int, str]:
        return committed(servers, f"group-of-{topic}", topic)

    with ExitStack() as stack:

        def connect(confirm: Callable[[], None]) -> Group:
            admin = connection.connect(KafkaAdminClient, settings, "test-admin")
            stack.callback(admin.close)
            group = Group.connect(settings, "test", admin, confirm)
            stack.callback(group.close)
            return group

        old = connect(lost)
        old.commit({p: 1}, step=1)
        owner = connect(lambda: looks.append("ours"))
        with pytest.raises(FencedError, match="taken over by pid 7"):
            old.commit({p: 2}, step=2)
        assert committed_now() == (1, "step=1")
        connect(lost)  # claimed the directory before the owner, and comes to the brokers after it
        owner.commit({p: 2}, step=2)
        assert committed_now() == (2, "step=2")
        connect(lost)
        with pytest.raises(FencedError, match=rf"^source.kafka.group_id=group-of-{topic}: another trainer of topic"):
            owner.commit({p: 3}, step=3)
        assert looks == ["lost", "ours"]
