"""The whole service on records with schemas: a registry that is away, a schema that changes, and what has none."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.demo.broker import free_port
from stream_trainer.ingest.letter import read_dead_letters
from tests.helpers.brokers import create_topic, publish
from tests.helpers.service import (
    configuration,
    counts,
    decided,
    get,
    kafka,
    metrics,
    on_free_port,
    serve_until,
    serving,
    wait_for,
)
from tests.stream_trainer.samples.schemas.server import SmallRegistry
from tests.stream_trainer.samples.schemas.server import serving as serving_schemas
from tests.stream_trainer.samples.schemas.writing import AVRO, GAINED, avro, prefixed


def samples(number: int, schema: Any, ids: range, **others: Any) -> list[bytes]:
    return [prefixed(number, avro(schema, {"text": f"stone {i}", "id": i} | others)) for i in ids]


@pytest.mark.slow  # the next one is the short form, and unit tests have the rest
def test_records_wait_for_the_registry_and_each_is_decided_once(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic)
    registry, port = SmallRegistry(), free_port()
    first = registry.register("AVRO", json.dumps(AVRO))
    publish(broker, topic, samples(first, AVRO, range(16)))
    schemas = {"format": "avro", "schema_registry": {"url": f"http://localhost:{port}", "timeout_s": 5.0}}
    selection = {"pool_size": 4, "batch_size": 2}
    source = kafka(broker, topic, stop_at_end=False, **schemas)
    config = on_free_port(
        configuration(tmp_path, source, selection=selection | {"profile": "thorough"}, buffer={"wait_s": 0.5})
    )
    bad = [prefixed(99, b"planted"), b'{"text": "planted"}', prefixed(first, b"\xff")]
    with serving(config):
        wait_for(lambda: "schema_registry" in get(config, "/status")[1])
        time.sleep(0.5)
        assert metrics(config)["source_reachable"] == 0
        assert decided(config) == 0
        assert get(config, "/healthz")[0] == 200, "waiting is no reason to be restarted"
        with serving_schemas(registry, port):
            wait_for(lambda: decided(config) == 16)
            assert metrics(config)["source_reachable"] == 1
            second = registry.register("AVRO", json.dumps(GAINED))
            publish(broker, topic, samples(second, GAINED, range(16, 24), weight=2.0))
            publish(broker, topic, bad)
            wait_for(lambda: decided(config) == 27)
        publish(broker, topic, samples(first, AVRO, range(24, 28)))
        wait_for(lambda: decided(config) == 31)  # what is known needs no registry
    found = counts(config)
    assert found["dead_lettered"] == 3
    assert found["trained"] + found["not_selected"] == 28
    letters = list(read_dead_letters(tmp_path / "dead-letters.jsonl"))
    assert [letter.reason for letter in letters] == ["unknown_schema", "no_schema_id", "schema_mismatch"]
    assert [letter.record.value for letter in letters] == bad


def test_a_run_that_was_stopped_while_records_waited_goes_on(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic)
    registry, port = SmallRegistry(), free_port()
    first = registry.register("AVRO", json.dumps(AVRO))
    publish(broker, topic, samples(first, AVRO, range(8)))
    schemas = {"format": "avro", "schema_registry": {"url": f"http://localhost:{port}"}}
    live = on_free_port(configuration(tmp_path, kafka(broker, topic, stop_at_end=False, **schemas)))
    with serving(live):
        wait_for(lambda: "schema_registry" in get(live, "/status")[1])
    with serving_schemas(registry, port):
        config = configuration(tmp_path, kafka(broker, topic, **schemas))
        _, steps = serve_until(config)
    assert sorted(name or "" for step in steps for name in step.ids) == [str(i) for i in range(8)]
    assert sum(counts(config).values()) == 8
