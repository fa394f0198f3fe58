"""Records with schemas: read as meant, or refused by reason; and none is judged while the registry is away."""

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import timestamp_pb2  # noqa: F401 - known to the pool from which tests write
from hypothesis import given
from hypothesis import strategies as st

from stream_trainer.errors import SampleError, SettingsError, SourceAwayError, SourceError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import Decoder
from stream_trainer.samples.schemas.registry import MAX_BACKOFF_S, UNKNOWN_FOR_S, Registry
from stream_trainer.settings.schema import SampleSettings
from stream_trainer.settings.sections.source import KafkaSettings
from tests.stream_trainer.samples.schemas.server import SmallRegistry, serving
from tests.stream_trainer.samples.schemas.writing import (
    AVRO,
    GAINED,
    JSON_SCHEMA,
    avro,
    described,
    json_value,
    prefixed,
    proto_file,
    proto_message,
    protobuf,
)

DECODER = Decoder(byte_tokenizer(), SampleSettings(max_tokens=64))
PASSWORD = "planted-secret"


@pytest.fixture
def server() -> Iterator[SmallRegistry]:
    with serving(SmallRegistry()) as registry:
        yield registry


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def registry_at(url: str, form: str = "avro", clock: Clock | None = None, **values: Any) -> Registry:
    given = {"topic": "t", "format": form, "schema_registry": {"url": url, "timeout_s": 5.0} | values}
    return Registry(KafkaSettings.model_validate(given), clock or Clock(), lambda: 0.5)


def record(value: bytes | None, headers: tuple[tuple[str, bytes | None], ...] = ()) -> Record:
    return Record(Partition("t", 0), 7, 8, value, headers=headers)


def read(registry: Registry, one: Record) -> dict[str, Any]:
    assert registry.ready([one])
    fields: dict[str, Any] = json.loads(registry.to_json(one))
    return fields


def refused(registry: Registry, one: Record) -> SampleError:
    assert registry.ready([one])
    with pytest.raises(SampleError) as raised:
        registry.to_json(one)
    return raised.value


def test_avro_and_a_schema_that_gains_a_field_meanwhile(server: SmallRegistry) -> None:
    registry = registry_at(server.url)
    first = server.register("AVRO", json.dumps(AVRO))
    old = record(prefixed(first, avro(AVRO, {"text": "a", "id": 1})))
    assert read(registry, old) == {"text": "a", "id": 1}
    second = server.register("AVRO", json.dumps(GAINED))
    new = record(prefixed(second, avro(GAINED, {"text": "b", "id": None, "weight": 2.0})))
    assert read(registry, new) == {"text": "b", "weight": 2.0}
    assert read(registry, old) == {"text": "a", "id": 1}
    assert len(server.requests) == 2, "each schema is asked for once"


def test_the_sample_keeps_the_original_bytes(server: SmallRegistry) -> None:
    registry = registry_at(server.url)
    number = server.register("AVRO", json.dumps(AVRO))
    one = record(prefixed(number, avro(AVRO, {"text": "abc", "id": None})))
    assert registry.ready([one])
    sample = replace(DECODER, unpack=registry.to_json).decode(one)
    assert isinstance(sample, Sample)
    assert sample.record == one
    assert sample.size == len(one.value or b"")
    assert sample.input_ids == DECODER.decode(record(b'{"text": "abc"}')).input_ids  # type: ignore[union-attr]


def test_json_schema_is_checked_and_left_as_it_is(server: SmallRegistry) -> None:
    registry = registry_at(server.url, "json_schema")
    number = server.register("JSON", json.dumps(JSON_SCHEMA))
    value = b'{"text":  "a", "id": 3}'
    assert registry.ready([record(prefixed(number, value))])
    assert registry.to_json(record(prefixed(number, value))) == value
    error = refused(registry, record(prefixed(number, json_value({"text": "planted", "id": "x"}))))
    assert error.reason == "schema_mismatch"
    assert "properties/id/type" in str(error)
    assert "planted" not in str(error)


def test_protobuf_by_the_index_of_its_message(server: SmallRegistry) -> None:
    registry = registry_at(server.url, "protobuf")
    file = proto_file()
    number = server.register("PROTOBUF", described(file))
    message: Any = proto_message(file)
    message.id = 2**40
    message.timestamp.seconds = 86400
    message.messages.add(role="user", content="hi")
    message.messages.add(role="assistant", content="ho")
    expected = {
        "id": 2**40,
        "timestamp": "1970-01-02T00:00:00Z",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    }
    assert read(registry, record(prefixed(number, protobuf(message)))) == expected
    turn: Any = proto_message(file, "t.Sample.Turn")
    turn.role = "user"
    assert read(registry, record(prefixed(number, protobuf(turn, b"\x04\x02\x00")))) == {"role": "user"}
    assert read(registry, record(prefixed(number, protobuf(proto_message(file, "t.Other"), b"\x00")))) == {}
    for indices in (b"\x02\x08", b"\x04\x02", b"\xff"):
        assert refused(registry, record(prefixed(number, indices))).reason == "schema_mismatch"


@pytest.mark.parametrize("kind", ["avro", "json_schema", "protobuf"])
def test_schemas_that_refer_to_others(server: SmallRegistry, kind: str) -> None:
    registry = registry_at(server.url, kind)
    if kind == "avro":
        turn = {"type": "record", "name": "Turn", "fields": [{"name": "role", "type": "string"}]}
        server.register("AVRO", json.dumps(turn), "turn")
        whole = {"type": "record", "name": "All", "fields": [{"name": "turn", "type": "Turn"}]}
        number = server.register("AVRO", json.dumps(whole), "all", (("Turn", "turn", 1),))
        inner = {**whole, "fields": [{"name": "turn", "type": turn}]}
        value = avro(inner, {"turn": {"role": "user"}})
    elif kind == "json_schema":
        server.register("JSON", json.dumps({"type": "object", "required": ["role"]}), "turn")
        text = json.dumps({"type": "object", "properties": {"turn": {"$ref": "turn.json"}}})
        number = server.register("JSON", text, "all", (("turn.json", "turn", 1),))
        value = json_value({"turn": {"role": "user"}})
        assert refused(registry, record(prefixed(number, json_value({"turn": {}})))).reason == "schema_mismatch"
    else:
        file = proto_file()
        server.register("PROTOBUF", described(file), "turn")
        whole_file = type(file)(name="x.proto", package="u", syntax="proto3", dependency=["dir/sample.proto"])
        whole_file.message_type.add(name="All").field.add(
            name="turn", number=1, type=11, label=1, type_name=".t.Sample.Turn"
        )
        number = server.register("PROTOBUF", described(whole_file), "all", (("dir/sample.proto", "turn", 1),))
        value = b"\x00" + b"\x0a\x06\x0a\x04user"
    assert read(registry, record(prefixed(number, value))) == {"turn": {"role": "user"}}


def test_the_schema_may_be_named_in_a_header(server: SmallRegistry) -> None:
    registry = registry_at(server.url)
    number = server.register("AVRO", json.dumps(AVRO))
    value = avro(AVRO, {"text": "a", "id": None})
    in_header = (("other", None), ("__value_schema_id", prefixed(number, b"")))
    by_guid = (("__value_schema_id", b"\x01" + uuid.UUID(int=number).bytes),)
    assert read(registry, record(value, in_header)) == {"text": "a"}
    assert read(registry, record(value, by_guid)) == {"text": "a"}


def test_what_cannot_be_read_is_refused_by_its_reason(server: SmallRegistry) -> None:
    registry = registry_at(server.url)
    number = server.register("AVRO", json.dumps(AVRO))
    other = server.register("JSON", json.dumps(JSON_SCHEMA))
    broken = server.register("AVRO", '{"type": "record"}')
    good = avro(AVRO, {"text": "planted", "id": None})
    cases = {
        b'{"text": "planted"}': "no_schema_id",
        prefixed(999, good): "unknown_schema",
        prefixed(number, good[:-3]): "schema_mismatch",
        prefixed(number, good + b"!"): "schema_mismatch",
        prefixed(other, good): "schema_mismatch",
        prefixed(broken, good): "schema_mismatch",
    }
    for value, reason in cases.items():
        error = refused(registry, record(value))
        assert error.reason == reason, value
        assert "planted" not in str(error)


def test_a_schema_that_is_registered_late_is_found_later(server: SmallRegistry) -> None:
    clock = Clock()
    registry = registry_at(server.url, clock=clock)
    one = record(prefixed(1, avro(AVRO, {"text": "a", "id": None})))
    assert refused(registry, one).reason == refused(registry, one).reason == "unknown_schema"
    assert len(server.requests) == 1
    server.register("AVRO", json.dumps(AVRO))
    clock.now += UNKNOWN_FOR_S
    assert read(registry, one) == {"text": "a"}


@pytest.mark.parametrize("how", ["closed", "busy", "no registry"])
def test_while_it_is_away_nothing_is_ready_and_nothing_refused(how: str) -> None:
    clock, server = Clock(), SmallRegistry(answer={"busy": 503, "no registry": 404}.get(how, 0))
    number = server.register("AVRO", json.dumps(AVRO))
    one = record(prefixed(number, avro(AVRO, {"text": "a", "id": None})))
    with serving(server):
        port = int(server.url.rpartition(":")[2])
        registry = registry_at(server.url, clock=clock)
        if how != "closed":
            assert not registry.ready([one])
    waits = []
    for _ in range(10):
        assert not registry.ready([one])
        assert f"source.kafka.schema_registry.url={server.url}" in registry.away
        assert registry.waits
        waits.append(registry._again_at - clock.now)
        clock.now += waits[-1]
        assert not registry.waits
    assert waits == sorted(waits)
    assert waits[-1] == MAX_BACKOFF_S
    server.answer = 0
    with serving(server, port):
        assert read(registry, one) == {"text": "a"}
    assert registry.away == ""


def test_known_schemas_need_no_registry(server: SmallRegistry) -> None:
    registry = registry_at(server.url)
    number = server.register("AVRO", json.dumps(AVRO))
    one = record(prefixed(number, avro(AVRO, {"text": "a", "id": None})))
    assert registry.ready([one])
    server.answer = 503
    assert read(registry, one) == {"text": "a"}


def test_who_is_refused_ends_and_quotes_no_password(server: SmallRegistry) -> None:
    server.credentials = "me:right"
    number = server.register("AVRO", json.dumps(AVRO))
    one = record(prefixed(number, avro(AVRO, {"text": "a", "id": None})))
    with pytest.raises(SourceError, match="HTTP status 401") as raised:
        registry_at(server.url, username="me", password=PASSWORD).ready([one])
    assert not isinstance(raised.value, SourceAwayError)
    assert PASSWORD not in str(raised.value)
    assert read(registry_at(server.url, username="me", password="right"), one) == {"text": "a"}


def test_the_password_may_be_in_a_file(server: SmallRegistry, tmp_path: Path) -> None:
    server.credentials = "me:right"
    (tmp_path / "secret").write_text("right\n")
    registry = registry_at(server.url, username="me", password_file=tmp_path / "secret")
    registry.probe()
    (tmp_path / "secret").unlink()
    with pytest.raises(SettingsError, match=r"source\.kafka\.schema_registry\.password_file"):
        registry_at(server.url, username="me", password_file=tmp_path / "secret")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(tmp_path: Path) -> None:
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    both = tmp_path / "both.pem"
    both.write_text((tmp_path / "key.pem").read_text() + (tmp_path / "cert.pem").read_text())
    with serving(SmallRegistry(), certificate=both) as server:
        registry_at(server.url, ssl_cafile=tmp_path / "cert.pem").probe()
        with pytest.raises(SourceAwayError, match="CERTIFICATE_VERIFY_FAILED"):
            registry_at(server.url).probe()
    with pytest.raises(SettingsError, match=r"schema_registry\.ssl_cafile=.*is no file"):
        registry_at(server.url, ssl_cafile=tmp_path / "none.pem")
    (tmp_path / "none.pem").touch()
    with pytest.raises(SettingsError, match="files for TLS do not fit"):
        registry_at(server.url, ssl_cafile=tmp_path / "none.pem")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"url": f"http://me:{PASSWORD}@host"}, "takes no user"),
        ({"url": f"{PASSWORD}"}, "neither http"),
        ({"password": PASSWORD}, "go together"),
        ({"username": "me"}, "go together"),
        ({"username": "me", "password": PASSWORD, "password_file": "/x"}, "exclude each other"),
        ({"username": "me", "password_file": PASSWORD}, "no absolute path"),
        ({"ssl_keyfile": "x.pem"}, "needs ssl_certfile"),
    ],
)
def test_settings_that_do_not_fit_together(values: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        KafkaSettings.model_validate({"topic": "t", "schema_registry": values})
    assert PASSWORD not in str(raised.value)


def test_a_format_with_schemas_needs_a_registry() -> None:
    with pytest.raises(ValueError, match=r"format=avro needs schema_registry\.url"):
        KafkaSettings.model_validate({"topic": "t", "format": "avro"})


@pytest.fixture(scope="module")
def known() -> Iterator[dict[str, Registry]]:
    with serving(SmallRegistry()) as server:
        server.register("AVRO", json.dumps(AVRO))
        server.register("PROTOBUF", described(proto_file()))
        server.register("JSON", json.dumps(JSON_SCHEMA))
        yield {kind: registry_at(server.url, kind) for kind in ("avro", "protobuf", "json_schema")}


@given(
    kind=st.sampled_from(["avro", "protobuf", "json_schema"]),
    number=st.integers(0, 4),
    payload=st.binary(max_size=60),
    cut=st.integers(0, 6),
)
def test_whatever_the_bytes_are_they_are_json_or_a_reason(
    known: dict[str, Registry], kind: str, number: int, payload: bytes, cut: int
) -> None:
    one = record(prefixed(number, payload)[cut:])
    decoder = replace(DECODER, unpack=known[kind].to_json)
    assert known[kind].ready([one])
    (result,) = decoder.decode_batch([one])
    assert isinstance(result, Sample) or (isinstance(result, SampleError) and result.reason != "unexpected")
