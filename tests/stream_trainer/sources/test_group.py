"""Offsets of the group are advisory: what they cost while they cannot be committed is bounded."""

import time
from typing import Any

import pytest
from kafka.errors import KafkaTimeoutError

from stream_trainer.errors import SourceError
from stream_trainer.records import Partition
from stream_trainer.settings.source import KafkaSettings
from stream_trainer.sources import group as groups
from stream_trainer.sources.group import HASTE_S, HASTY_TIMEOUT_MS, Group
from stream_trainer.sources.topic_log import REQUEST_TIMEOUT_MS

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
    group = Group.connect(KafkaSettings(topic="t", fencing="off"), "test")
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
    group = Group.connect(KafkaSettings(topic="t", group_id=None), "test")
    assert group.committed(Partition("t", 0)) is None
    group.commit(AT, step=1)
    group.close()
