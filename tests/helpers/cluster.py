"""Three Apache Kafka brokers on one machine, and a wire to a broker that can be cut."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kafka import KafkaAdminClient

from stream_trainer.demo.broker import free_port
from tests.helpers.brokers import java, run_storage_tool, stop, wait_for_port

NODES = 3
HEAP = "256m"
PROPERTIES = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/log
auto.create.topics.enable=false
default.replication.factor=3
min.insync.replicas=2
offsets.topic.replication.factor=3
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=6000
broker.heartbeat.interval.ms=1000
"""


@dataclass(frozen=True)
class Cluster:
    """Brokers that run.

    Attributes:
        bootstrap_servers: all of them.
        nodes: their processes, by node id - 1.
    """

    bootstrap_servers: str
    nodes: tuple[subprocess.Popen[bytes], ...]


@contextmanager
def three_brokers(folder: Path) -> Iterator[Cluster]:
    """Each has every record: a topic needs `replication_factor=3`. Two of them are enough to write."""
    ports = [(free_port(), free_port()) for _ in range(NODES)]
    voters = ",".join(f"{node}@127.0.0.1:{controller}" for node, (_, controller) in enumerate(ports, start=1))
    identity = run_storage_tool("random-uuid").split()[-1]
    with ExitStack() as up:
        processes = []
        for node, (plain, controller) in enumerate(ports, start=1):
            place = folder / f"node-{node}"
            place.mkdir()
            (place / "server.properties").write_text(
                PROPERTIES.format(node=node, voters=voters, plain=plain, controller=controller, folder=place)
            )
            run_storage_tool("format", "--config", str(place / "server.properties"), "--cluster-id", identity)
            with (place / "broker.log").open("wb") as log:
                command = [*java(HEAP), "kafka.Kafka", str(place / "server.properties")]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            up.callback(stop, processes[-1])
        for node, ((plain, _), process) in enumerate(zip(ports, processes, strict=True), start=1):
            wait_for_port(plain, process, folder / f"node-{node}" / "broker.log")
        yield Cluster(",".join(f"127.0.0.1:{plain}" for plain, _ in ports), tuple(processes))


def leader_of(servers: str, topic: str) -> int:
    """Node id of the broker that leads partition 0."""
    client = KafkaAdminClient(bootstrap_servers=servers)
    try:
        (described,) = client.describe_topics([topic])
    finally:
        client.close()
    return int(described["partitions"][0]["leader_id"])


class Wire:
    """Passes on what comes to `port`, and breaks off answers once more than `length` bytes came, `cuts` times."""

    def __init__(self, port: int, to: int, length: int, cuts: int) -> None:
        self._to, self._length = to, length
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.cuts, self._left = 0, cuts
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                broker = socket.create_connection(("127.0.0.1", self._to))
                for ends in ((client, broker, False), (broker, client, True)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, to: socket.socket, answers: bool) -> None:
        passed = 0
        with suppress(OSError):
            while piece := source.recv(64 * 1024):
                passed += len(piece)
                if answers and passed > self._length and self._may_cut():
                    to.sendall(piece[: len(piece) // 2])
                    break
                to.sendall(piece)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _may_cut(self) -> bool:
        with self._lock:
            self._left -= 1
            self.cuts += self._left >= 0
            return self._left >= 0
