"""Bytes that are no JSON are named, and keep their reason."""

import bz2
import gzip
import json
import lzma
import struct

import cramjam
import pytest

from stream_trainer.errors import SampleError
from stream_trainer.samples.fields import parse_fields
from stream_trainer.samples.wire_formats import hint

SAMPLE = json.dumps({"text": "planted words"}).encode()
REGISTERED = struct.pack(">bI", 0, 17)


def failure(value: bytes) -> SampleError:
    with pytest.raises(SampleError) as raised:
        parse_fields(value, 10_000)
    return raised.value


@pytest.mark.parametrize(
    ("value", "reason", "words"),
    [
        (REGISTERED + SAMPLE, "bad_json", "magic byte of a schema registry (schema 17), with JSON behind it"),
        (REGISTERED + b"\x1aplanted words", "bad_json", "(schema 17), with Avro or Protobuf behind it"),
        (gzip.compress(SAMPLE, mtime=0), "bad_utf8", "is compressed with gzip"),
        (bytes(cramjam.zstd.compress(SAMPLE)), "bad_utf8", "is compressed with zstd"),
        (bytes(cramjam.lz4.compress(SAMPLE)), "bad_utf8", "is compressed with lz4"),
        (bytes(cramjam.snappy.compress(SAMPLE)), "bad_utf8", "is compressed with snappy"),
        (bz2.compress(SAMPLE), "bad_utf8", "is compressed with bzip2"),
        (lzma.compress(SAMPLE), "bad_utf8", "is compressed with xz"),
        (b"\x03\x00" + bytes(16) + SAMPLE, "bad_json", "AWS Glue"),
        (b"Obj\x01\x04\x14avro.codec\x08null", "bad_json", "is an Avro file"),
        (b"\xc3\x01" + bytes(8) + b"\x1aplanted words", "bad_utf8", "a single Avro object"),
        (b"\xac\xed\x00\x05t\x00\x0dplanted words", "bad_utf8", "a serialised Java object"),
        ('{"text": "planted words"}'.encode("utf-16"), "bad_utf8", "is UTF-16"),
        ('{"text": "planted words"}'.encode("utf-16-le"), "bad_json", "is UTF-16"),
        (b"\x81\xa4text\xadplanted words", "bad_utf8", "looks like MessagePack"),
        (b"\xa1\x64text\x6dplanted words", "bad_utf8", "looks like CBOR"),
        (b"\x0a\x0dplanted words\x10\x01", "bad_json", "looks like Protobuf"),
        (json.dumps(SAMPLE.decode()).encode(), "not_an_object", "is JSON inside a JSON string"),
        (b'{"schema": {}, "payload": {"text": "planted words"}}', "missing_fields", "wrapped by Kafka Connect"),
    ],
)
def test_what_is_no_json_is_named_and_not_quoted(value: bytes, reason: str, words: str) -> None:
    error = failure(value)
    assert error.reason == reason
    assert words in str(error)
    assert "planted" not in str(error)
    assert len(str(error)) < 200  # what a dead letter keeps of it


@pytest.mark.parametrize(
    "value", [b"", b"plain words", b'{"text": ', b"\n\n", b"\xe9t\xe9", b"\x00", "{'text': 'é'}".encode()]
)
def test_what_is_no_known_format_gets_no_hint(value: bytes) -> None:
    assert hint(value) == ""


def test_no_error_quotes_a_record() -> None:
    """Every cut of a record, and a foreign byte at every place of it."""
    records = [b'{"text": "planted", "weight": 1}', b'{"prompt": "planted", "response": "planted"}', b'["planted"]']
    records += [
        b'{"messages": [{"role": "planted", "content": "planted"}], "timestamp": "planted", "id": {"planted": 1}}'
    ]
    foreign = [b"\x00", b"\xff", b'"', b"\\", b"{", b"]", b"\n", b"planted", b"NaN"]
    broken = [record[:at] for record in records for at in range(len(record))]
    broken += [record[:at] + byte + record[at:] for record in records for at in range(len(record)) for byte in foreign]
    details = []
    for value in broken:
        try:
            parse_fields(value, 10_000)
        except SampleError as error:
            details.append(str(error))
    assert len(details) > 500
    assert not any("planted" in detail for detail in details)
