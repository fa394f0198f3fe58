"""A compacted topic as a set, read whole and followed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from stream_trainer.demo.broker import free_port
from stream_trainer.errors import SourceError
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.compacted import topic as module
from stream_trainer.sources.compacted.topic import CompactedTopic
from tests.helpers.brokers import create_topic, how_to_reach, publish
from tests.helpers.service import wait_for


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.2)


def settings(servers: str, **others: object) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=servers, **{**how_to_reach(), **others})


@contextmanager
def followed(kafka: KafkaSettings, topic: str, needed: bool = True) -> Iterator[tuple[CompactedTopic, list]]:  # type: ignore[type-arg]
    seen: list[Mapping[bytes, bytes]] = []
    found = CompactedTopic(kafka, topic, lambda values: seen.append(dict(values)))
    found.start(needed=needed)
    try:
        yield found, seen
    finally:
        found.close()


def test_it_is_read_whole_and_followed_and_a_tombstone_removes(broker: str, topic: str) -> None:
    create_topic(broker, topic)
    publish(broker, topic, [b"zero", b"one", b"two"])
    publish(broker, topic, [b"zero again", None])
    with followed(settings(broker), topic) as (found, seen):
        assert seen == [{b"k0": b"zero again", b"k2": b"two"}]
        assert found.reachable
        publish(broker, topic, [None, b"one is back"])
        wait_for(lambda: len(seen) > 1 and seen[-1] == {b"k1": b"one is back", b"k2": b"two"})


def test_all_partitions_are_read_and_an_empty_topic_is_an_empty_set(broker: str, topic: str) -> None:
    create_topic(broker, topic, 3)
    with followed(settings(broker), topic) as (_, seen):
        assert seen == [{}]
    publish(broker, topic, [b"zero"], partition=0)
    publish(broker, topic, [b"zero", b"one"], partition=2)
    with followed(settings(broker), topic) as (_, seen):
        assert seen == [{b"k0": b"zero", b"k1": b"one"}]


def test_what_cannot_be_read_is_an_error_only_where_it_is_needed(broker: str, topic: str) -> None:
    away = settings(f"127.0.0.1:{free_port()}", bootstrap_timeout_s=0.5)
    with pytest.raises(SourceError, match="could not be reached"), followed(away, topic):
        pass
    with followed(away, topic, needed=False) as (found, seen):
        assert (found.reachable, seen) == (False, [])
    with pytest.raises(SourceError, match=f"target.topic={topic} does not exist"), followed(settings(broker), topic):
        pass


def test_after_a_failure_it_is_read_from_its_beginning_again(
    broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topic(broker, topic)
    publish(broker, topic, [b"zero", b"one"])
    with followed(settings(broker), topic) as (found, seen):
        real = found._poll

        def fails() -> bool:
            monkeypatch.setattr(found, "_poll", real)
            raise ValueError("a batch that nobody can decode")

        monkeypatch.setattr(found, "_poll", fails)
        publish(broker, topic, [None])
        wait_for(lambda: seen[-1] == {b"k1": b"one"})
        assert found.reachable
