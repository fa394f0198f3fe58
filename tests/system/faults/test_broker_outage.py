"""A broker that goes away while the service runs, and comes back with the same log at the same address."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.brokers import committed, create_topic, needs_apache_kafka, prepare_kafka, publish, running
from tests.helpers.service import (
    configuration,
    counts,
    decided,
    get,
    goods,
    kafka,
    on_free_port,
    serving,
    state_of,
    trainer_json,
    wait_for,
)

BEFORE, AFTER, BAD = 300, 40, 20


@needs_apache_kafka("the mock cluster forgets its log")
def test_the_service_waits_for_a_broker_that_goes_away(
    topic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    broker = prepare_kafka(tmp_path)
    servers = broker.bootstrap_servers
    with ExitStack() as up:
        up.enter_context(running(broker))
        create_topic(servers, topic)
        create_topic(servers, f"{topic}.dead-letters")
        publish(servers, topic, goods(BEFORE))
        source = kafka(servers, topic, stop_at_end=False, discovery_interval_s=1.0)
        buffer = {"max_records": 64, "wait_s": 1.0}
        config = on_free_port(configuration(tmp_path, source, dead_letters={"kind": "topic"}, buffer=buffer))
        with serving(config) as ended:
            wait_for(lambda: decided(config) > 16)
            up.close()
            wait_for(lambda: "cannot be read for now" in caplog.text and state_of(config) == "idle")
            assert get(config, "/healthz")[0] == 200
            assert decided(config) <= BEFORE
            up.enter_context(running(broker))
            publish(servers, topic, [*goods(AFTER), *[b"not JSON"] * BAD])
            wait_for(lambda: decided(config) == BEFORE + AFTER + BAD)
        assert counts(config) == ended[0].counts
        assert counts(config)["dead_lettered"] == BAD
        assert sum(counts(config).values()) == BEFORE + AFTER + BAD
        cursor = trainer_json(config)["cursor"]["partitions"][f"{topic}:0"]
        assert cursor == {"next": BEFORE + AFTER + BAD, "decided": []}
        assert committed(servers, f"{topic}-group", topic)[0] == BEFORE + AFTER + BAD
