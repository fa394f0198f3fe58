"""A broker that goes away while the service runs, and comes back with the same log at the same address."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from stream_trainer.demo.broker import embedded_broker
from tests.helpers.brokers import (
    ApacheKafka,
    apache_kafka,
    committed,
    create_topic,
    publish,
    running,
    why_no_apache_kafka,
)
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

Start = Callable[[Path], AbstractContextManager[str]]
StartAgain = Callable[[Path, str], AbstractContextManager[str]]


@contextmanager
def start_apache(folder: Path) -> Iterator[str]:
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    with apache_kafka(folder) as broker:
        yield broker.bootstrap_servers


@contextmanager
def start_apache_again(folder: Path, servers: str) -> Iterator[str]:
    with running(ApacheKafka(servers, "", "", Path(), folder)):
        yield servers


@contextmanager
def start_embedded(folder: Path) -> Iterator[str]:
    if find_spec("noida_db") is None:
        pytest.skip("noida-db is not installed: pip install 'stream-trainer[demo]'")
    with embedded_broker(folder / "broker") as servers:
        yield servers


def start_embedded_again(folder: Path, servers: str) -> AbstractContextManager[str]:
    return embedded_broker(folder / "broker", port_of(servers))


def port_of(servers: str) -> int:
    return int(servers.rpartition(":")[2])


@pytest.mark.parametrize(
    ("start", "start_again"),
    [(start_apache, start_apache_again), (start_embedded, start_embedded_again)],
    ids=["apache", "embedded"],
)
def test_the_service_waits_for_a_broker_that_goes_away(
    start: Start, start_again: StartAgain, topic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    with ExitStack() as up:
        servers = up.enter_context(start(tmp_path))
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
            up.enter_context(start_again(tmp_path, servers))
            publish(servers, topic, [*goods(AFTER), *[b"not JSON"] * BAD])
            wait_for(lambda: decided(config) == BEFORE + AFTER + BAD)
        assert counts(config) == ended[0].counts
        assert counts(config)["dead_lettered"] == BAD
        assert sum(counts(config).values()) == BEFORE + AFTER + BAD
        cursor = trainer_json(config)["cursor"]["partitions"][f"{topic}:0"]
        assert cursor == {"next": BEFORE + AFTER + BAD, "decided": []}
        assert committed(servers, f"{topic}-group", topic)[0] == BEFORE + AFTER + BAD
