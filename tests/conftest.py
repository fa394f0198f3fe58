"""Brokers as fixtures: started once, only if a test asks, skipped with the reason where they cannot run."""

import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from stream_trainer.demo.broker import embedded_broker as run_embedded_broker
from tests.helpers.brokers import ApacheKafka, why_no_apache_kafka
from tests.helpers.brokers import apache_kafka as run_apache_kafka


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """Apache Kafka, with a plain and a secured listener."""
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    with run_apache_kafka(tmp_path_factory.mktemp("apache_kafka")) as broker:
        yield broker


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of the embedded broker."""
    if find_spec("noida_db") is None:
        pytest.skip("noida-db is not installed: pip install 'stream-trainer[demo]'")
    with run_embedded_broker(tmp_path_factory.mktemp("embedded_broker")) as servers:
        yield servers


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> str:
    """`host:port` of the best broker there is."""
    if why_no_apache_kafka() is None:
        kafka: ApacheKafka = request.getfixturevalue("apache_kafka")
        return kafka.bootstrap_servers
    servers: str = request.getfixturevalue("embedded_broker")
    return servers


@pytest.fixture
def topic() -> str:
    """A name that no topic has yet."""
    return f"samples-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def samples_file(tmp_path: Path) -> Path:
    """Where a test may write a JSONL file."""
    return tmp_path / "samples.jsonl"
