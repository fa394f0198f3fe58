"""The mock cluster: it serves the topics it was given, ends with whoever started it, and says why it cannot run."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from stream_trainer.demo import broker as module
from stream_trainer.demo.broker import API_VERSION, has_mock_cluster, mock_cluster
from stream_trainer.errors import StreamTrainerError

OPTIONS = {"api_version": tuple(map(int, API_VERSION.split(".")))}
needs_package = pytest.mark.skipif(not has_mock_cluster(), reason="confluent-kafka is not installed")


@needs_package
def test_what_is_published_is_read(tmp_path: Path) -> None:
    with mock_cluster(tmp_path / "log", ["a", "b"]) as servers:
        producer = KafkaProducer(bootstrap_servers=servers, acks="all", **OPTIONS)
        producer.send("a", b"value", partition=0).get(timeout=30)
        producer.close()
        consumer = KafkaConsumer(bootstrap_servers=servers, **OPTIONS)
        assert consumer.topics() == {"a", "b"}
        assert consumer.end_offsets([TopicPartition("a", 0)]) == {TopicPartition("a", 0): 1}
        consumer.close()


@needs_package
def test_it_ends_when_whoever_started_it_is_killed(tmp_path: Path) -> None:
    """Its standard input closes then, of which it hears without a signal."""
    code = (
        "import os, pathlib, sys, stream_trainer.demo.broker as broker\n"
        "with broker.mock_cluster(pathlib.Path(sys.argv[1])) as servers:\n"
        "    print(servers, flush=True)\n"
        "    os._exit(1)\n"
    )
    starter = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(starter, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().partition(":")
        assert process.wait(60) == 1
    wait_until_refused(host, int(port))


def wait_until_refused(host: str, port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError("it still listens")


def test_one_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "import sys; sys.exit('no luck today')"]
    monkeypatch.setattr(module, "_command", lambda _: broken)
    monkeypatch.setattr(module, "has_mock_cluster", lambda: True)
    with pytest.raises(StreamTrainerError, match="ends with: no luck today"), mock_cluster(tmp_path / "log"):
        pass


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(StreamTrainerError, match="stream-trainer\\[demo\\]"), mock_cluster(tmp_path / "log"):
        pass
