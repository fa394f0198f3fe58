"""Brokers for tests: Apache Kafka from the jars in KAFKA_HOME, and what tests do to a topic from outside.

Where KAFKA_HOME is not set, tests that need no more than it can do get a mock cluster instead.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.record.util import calc_crc32c
from kafka.structs import OffsetAndMetadata

from stream_trainer.demo.broker import API_VERSION, HOST, free_port
from stream_trainer.errors import StreamTrainerError

START_TIMEOUT_S = 120.0  # a busy machine takes its time; a broker that died is noticed at once
STOP_TIMEOUT_S = 30.0
MOCK_PARTITIONS = 4  # of every topic that the mock cluster creates
ELSEWHERE = "localhost:1"  # what the lost listener advertises
USER, PASSWORD = "trainer", "right-password"  # of the secured listener

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure},LOST://127.0.0.1:{lost},\
WIRE://127.0.0.1:{wired},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure},LOST://{elsewhere},\
WIRE://127.0.0.1:{wire}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,LOST:PLAINTEXT,WIRE:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
user_{user}="{password}";
ssl.keystore.type=PEM
ssl.keystore.location={data}/broker.pem
"""


@dataclass(frozen=True)
class ApacheKafka:
    """A running broker.

    Attributes:
        bootstrap_servers: its plain listener; `secure_servers` takes SASL PLAIN and SCRAM-SHA-256 over TLS as USER
            with PASSWORD.
        lost_servers: answers, but tells clients to go on at `ELSEWHERE`, where nobody is.
        ca_file: PEM of the authority behind the secured listener's certificate.
        data_dir: a partition's segments lie in `log/TOPIC-NUMBER` below it.
        wire: a port where nothing listens, to which clients are sent that come through the other one: for a test to
            put something in between.
    """

    bootstrap_servers: str
    secure_servers: str
    lost_servers: str
    ca_file: Path
    data_dir: Path
    wire: tuple[int, int] = (0, 0)


def why_no_apache_kafka() -> str | None:
    """What is missing to run Apache Kafka here; None if nothing is."""
    if not os.environ.get("KAFKA_HOME"):
        return "KAFKA_HOME is not set: it names an Apache Kafka distribution"
    if not list(_libs().glob("kafka-server-*.jar")):
        return f"KAFKA_HOME={os.environ['KAFKA_HOME']} holds no libs/kafka-server-*.jar"
    for program in ("java", "openssl"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def needs_apache_kafka(why: str) -> pytest.MarkDecorator:
    """Marks a test that has to have what the mock cluster cannot do."""
    reason = why_no_apache_kafka()
    return pytest.mark.skipif(reason is not None, reason=f"{reason}; {why}")


def how_to_reach() -> dict[str, str]:
    """What settings need to reach the broker that tests get, besides its address."""
    return {} if why_no_apache_kafka() is None else {"api_version": API_VERSION}


def client_options() -> dict[str, Any]:
    """The same for a client of kafka-python."""
    return {name: tuple(map(int, value.split("."))) for name, value in how_to_reach().items()}


@contextmanager
def apache_kafka(data_dir: Path, **overrides: str) -> Iterator[ApacheKafka]:
    """Run one broker, its own controller, with its data in `data_dir`. Overrides are properties, `_` for a dot."""
    kafka = prepare_kafka(data_dir, **overrides)
    with running(kafka):
        yield kafka


def prepare_kafka(data_dir: Path, **overrides: str) -> ApacheKafka:
    """A broker that has an identity and a certificate, and is not started yet."""
    plain, secure, lost, wire, wired = (free_port() for _ in range(5))
    ca_file = _make_certificate(data_dir)
    properties = data_dir / "server.properties"
    ports = {"plain": plain, "secure": secure, "lost": lost, "wire": wire, "wired": wired, "controller": free_port()}
    text = PROPERTIES.format(**ports, elsewhere=ELSEWHERE, data=data_dir, user=USER, password=PASSWORD)
    properties.write_text(text + "".join(f"{name.replace('_', '.')}={value}\n" for name, value in overrides.items()))
    identity = run_storage_tool("random-uuid").split()[-1]
    scram = f"SCRAM-SHA-256=[name={USER},password={PASSWORD}]"
    run_storage_tool("format", "--config", str(properties), "--cluster-id", identity, "--add-scram", scram)
    plain_servers, secure_servers, lost_servers = (f"127.0.0.1:{port}" for port in (plain, secure, lost))
    return ApacheKafka(plain_servers, secure_servers, lost_servers, ca_file, data_dir, (wire, wired))


@contextmanager
def running(kafka: ApacheKafka) -> Iterator[subprocess.Popen[bytes]]:
    """The broker's process, which may be started as often as one likes: addresses and data stay the same."""
    log = kafka.data_dir / "broker.log"
    with log.open("ab") as output:
        command = [*java(), "kafka.Kafka", str(kafka.data_dir / "server.properties")]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for_port(int(kafka.bootstrap_servers.rpartition(":")[2]), process, log)
        yield process
    finally:
        stop(process)


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


def java(heap: str = "512m") -> list[str]:
    """The beginning of a command that runs a class of Kafka's."""
    return ["java", f"-Xmx{heap}", "-cp", f"{_libs()}/*"]


def run_storage_tool(*arguments: str) -> str:
    """What it prints."""
    tool = [*java(), "kafka.tools.StorageTool", *arguments]
    return subprocess.run(tool, capture_output=True, check=True, text=True).stdout


def _libs() -> Path:
    return Path(os.environ["KAFKA_HOME"]) / "libs"


def _make_certificate(folder: Path) -> Path:
    """Write `broker.pem` (key, then certificate) and return the certificate alone, which is its own authority."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, capture_output=True, check=True)
    (folder / "broker.pem").write_text(key.read_text() + certificate.read_text())
    return certificate


@contextmanager
def admin(servers: str) -> Iterator[Any]:
    """An admin client."""
    client = KafkaAdminClient(bootstrap_servers=servers, **client_options())
    try:
        yield client
    finally:
        client.close()


def create_topic(
    servers: str, topic: str, partitions: int = 1, configs: dict[str, str] | None = None, replicas: int = 1
) -> None:
    if why_no_apache_kafka() is not None:
        _create_in_mock(servers, topic, partitions, configs)
        return
    with admin(servers) as client:
        client.create_topics(
            {topic: {"num_partitions": partitions, "replication_factor": replicas, "configs": configs or {}}},
            wait_for_metadata=True,
        )


def _create_in_mock(servers: str, topic: str, partitions: int, configs: dict[str, str] | None) -> None:
    """It creates what a producer asks about, with four partitions."""
    if configs or partitions > MOCK_PARTITIONS:
        pytest.skip(f"{why_no_apache_kafka()}; the mock cluster has no topics with {configs or partitions}")
    producer = KafkaProducer(bootstrap_servers=servers, **client_options())
    try:
        assert len(producer.partitions_for(topic)) == MOCK_PARTITIONS
    finally:
        producer.close()


def delete_topic(servers: str, topic: str) -> None:
    with admin(servers) as client:
        client.delete_topics([topic])


def delete_records(servers: str, topic: str, before: int, partition: int = 0) -> None:
    """Make `before` the first offset of the partition, as retention does."""
    with admin(servers) as client:
        client.delete_records({TopicPartition(topic, partition): before})


def publish(servers: str, topic: str, values: Sequence[bytes | None], partition: int = 0, **options: Any) -> None:
    """Publish values with keys `k0`, `k1`, ..., acknowledged one and all."""
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", **client_options(), **options)
    try:
        sent = [
            producer.send(topic, value, key=b"k%d" % i, partition=partition, headers=[("h", b"\x00"), ("empty", b"")])
            for i, value in enumerate(values)
        ]
        for future in sent:
            future.get(timeout=30)
    finally:
        producer.close()


def commit_for_group(servers: str, group: str, topic: str, offset: int) -> None:
    consumer = KafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False, **client_options())
    try:
        consumer.commit({TopicPartition(topic, 0): OffsetAndMetadata(offset, "", -1)})
    finally:
        consumer.close()


def committed(servers: str, group: str, topic: str) -> tuple[int, str]:
    """The group's offset of partition 0 and its metadata."""
    consumer = KafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False, **client_options())
    try:
        found = consumer.committed(TopicPartition(topic, 0), metadata=True)
    finally:
        consumer.close()
    return found.offset, found.metadata


def with_checksum(batch: bytearray) -> bytearray:
    """A batch of records that was changed, with the checksum made anew."""
    batch[17:21] = calc_crc32c(memoryview(bytes(batch))[21:]).to_bytes(4, "big")
    return batch


def rewrite_batch(kafka: ApacheKafka, topic: str, marker: bytes, old: bytes, new: bytes) -> None:
    """Change the batch with `marker` where the broker stores it, in a topic of one partition, and its checksum."""
    segment = kafka.data_dir / "log" / f"{topic}-0" / f"{0:020}.log"
    stored, at = bytearray(segment.read_bytes()), 0
    while at < len(stored):
        end = at + 12 + int.from_bytes(stored[at + 8 : at + 12], "big")
        if marker in stored[at:end]:
            stored[at:end] = with_checksum(stored[at:end].replace(old, new))
            segment.write_bytes(stored)
            return
        at = end
    raise AssertionError(f"no batch holds {marker!r}")
