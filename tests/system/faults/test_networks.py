"""Brokers and wires that break while records are read, and a secured listener: every record is counted once."""

from pathlib import Path

import pytest

from tests.helpers.brokers import PASSWORD, USER, ApacheKafka, create_topic, publish, why_no_apache_kafka
from tests.helpers.cluster import Wire, leader_of, three_brokers
from tests.helpers.service import (
    configuration,
    counts,
    decided,
    goods,
    kafka,
    on_free_port,
    serve_until,
    serving,
    trainer_json,
    wait_for,
)

pytestmark = pytest.mark.slow

BAD = 20


def test_a_connection_that_is_cut_in_the_middle_of_answers(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    values = [value[:-1] + b', "note": "' + b"x" * 5000 + b'"}' for value in goods(400)]
    create_topic(apache_kafka.bootstrap_servers, topic)
    publish(apache_kafka.bootstrap_servers, topic, [*values, *[b"not JSON"] * BAD])
    port, to = apache_kafka.wire
    wire = Wire(port, to, length=200_000, cuts=4)
    try:
        config = configuration(tmp_path, kafka(f"127.0.0.1:{port}", topic), buffer={"wait_s": 5.0})
        summary, _ = serve_until(config)
    finally:
        wire.close()
    assert wire.cuts == 4
    assert sum(summary.counts.values()) == 400 + BAD
    assert counts(config)["dead_lettered"] == BAD
    assert trainer_json(config)["cursor"]["partitions"][f"{topic}:0"] == {"next": 400 + BAD, "decided": []}


def test_a_run_over_tls_with_scram(apache_kafka: ApacheKafka, topic: str, tmp_path: Path) -> None:
    create_topic(apache_kafka.bootstrap_servers, topic)
    publish(apache_kafka.bootstrap_servers, topic, [*goods(50), *[b"not JSON"] * BAD])
    secured = {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": str(apache_kafka.ca_file),
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_username": USER,
        "sasl_password": PASSWORD,
    }
    config = configuration(tmp_path, kafka(apache_kafka.secure_servers, topic, **secured))
    summary, _ = serve_until(config)
    assert sum(summary.counts.values()) == 50 + BAD
    assert counts(config)["dead_lettered"] == BAD
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()


def test_the_leader_of_three_brokers_is_killed(topic: str, tmp_path: Path) -> None:
    """While records are produced and read: the others go on, and each record counts once."""
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    with three_brokers(tmp_path) as cluster:
        servers = cluster.bootstrap_servers
        create_topic(servers, topic, replicas=3)
        publish(servers, topic, goods(300))
        source = kafka(servers, topic, stop_at_end=False)
        config = on_free_port(configuration(tmp_path, source, buffer={"max_records": 64, "wait_s": 1.0}))
        with serving(config):
            wait_for(lambda: decided(config) > 16)
            cluster.nodes[leader_of(servers, topic) - 1].kill()
            publish(servers, topic, [*goods(100), *[b"not JSON"] * BAD])
            wait_for(lambda: decided(config) >= 400 + BAD)
        assert sum(counts(config).values()) == 400 + BAD
        assert counts(config)["dead_lettered"] == BAD
        assert trainer_json(config)["cursor"]["partitions"][f"{topic}:0"] == {"next": 400 + BAD, "decided": []}
