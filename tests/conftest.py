"""Brokers as fixtures: started once, only if a test asks, skipped with the reason where they cannot run."""

import gc
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_trainer.demo.broker import has_mock_cluster
from stream_trainer.demo.broker import mock_cluster as run_mock_cluster
from tests.helpers.brokers import ApacheKafka, why_no_apache_kafka
from tests.helpers.brokers import apache_kafka as run_apache_kafka


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs, which take long, come first: short tests can fill what time one process has left at the end."""
    items.sort(key=lambda item: "system" not in item.path.parts)


@pytest.fixture(scope="module")
def heap_set_aside() -> Iterator[None]:
    """After a failure the trainer collects garbage: not among all that pytest has collected, which takes half a second
    each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command that runs in a test sets the level of all logs; for the next test it is as it was."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """Apache Kafka, with a plain and a secured listener."""
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    with run_apache_kafka(tmp_path_factory.mktemp("apache_kafka")) as broker:
        yield broker


@pytest.fixture(scope="session")
def mock_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a mock cluster."""
    if not has_mock_cluster():
        pytest.skip("confluent-kafka is not installed: pip install 'stream-trainer[demo]'")
    with run_mock_cluster(tmp_path_factory.mktemp("mock_cluster") / "log") as servers:
        yield servers


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> str:
    """`host:port` of the best broker there is, with `how_to_reach` in settings."""
    if why_no_apache_kafka() is None:
        kafka: ApacheKafka = request.getfixturevalue("apache_kafka")
        return kafka.bootstrap_servers
    servers: str = request.getfixturevalue("mock_cluster")
    return servers


@pytest.fixture
def topic() -> str:
    """A name that no topic has yet."""
    return f"samples-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def samples_file(tmp_path: Path) -> Path:
    """Where a test may write a JSONL file."""
    return tmp_path / "samples.jsonl"
