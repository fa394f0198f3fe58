"""A Kafka cluster for demos and tests, without Java or a container: the mock inside the package confluent-kafka.

It is no production broker: it keeps the last 5 MB of a partition in memory and nothing on disk, creates and deletes no
topics on request, and what marks the end of a transaction in it cannot be read.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from stream_trainer.errors import StreamTrainerError

HOST = "127.0.0.1"
API_VERSION = "2.3"  # the mock answers the question for its versions in a way that kafka-python cannot read
CAPACITY_BYTES = 12_000_000  # of values: a topic's four partitions hold 5 MB each, with what batches add
STOP_TIMEOUT_S = 10.0


def has_mock_cluster() -> bool:
    """Whether the package that holds the mock is installed."""
    return find_spec("confluent_kafka") is not None


@contextmanager
def mock_cluster(log: Path, topics: Sequence[str] = ()) -> Iterator[str]:
    """Run a mock cluster of one broker that has `topics`; yields its `host:port`. Clients must be told `API_VERSION`.

    What it complains of is written to `log`. Raises StreamTrainerError if the package is missing or it does not start.
    """
    if not has_mock_cluster():
        raise StreamTrainerError(
            "the mock cluster is not installed (package confluent-kafka); run pip install 'stream-trainer[demo]', or "
            "name a broker of your own with source.kafka.bootstrap_servers"
        )
    with log.open("wb") as errors:
        # In a session of its own: Ctrl-C is for us, who still need the cluster to end in order.
        process = subprocess.Popen(  # noqa: S603
            _command(topics), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    try:
        yield _address(process, log)
    finally:
        _stop(process)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _command(topics: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "stream_trainer.demo.mock_cluster", *topics]


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What it writes once it serves. A process that dies closes its output, so this never waits in vain."""
    assert process.stdout is not None
    servers = process.stdout.readline().decode().strip()
    if not servers:
        last_line = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise StreamTrainerError(f"the mock cluster did not start; {log} ends with: {last_line}")
    return servers


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Close its input, upon which it ends; SIGKILL if that takes too long."""
    with process:  # closes its pipes, input first
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
