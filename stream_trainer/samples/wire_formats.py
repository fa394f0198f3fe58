"""What bytes are that are no JSON: the wire formats that producers commonly use, told by their first bytes.

A hint for people, made only for records that have failed already. It never quotes the record.
"""

import re
import struct

_MAGIC = (
    (b"\x1f\x8b", "is compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4"),
    (b"\xff\x06\x00\x00sNaPpY", "is compressed with snappy"),
    (b"\x82SNAPPY\x00", "is compressed with snappy"),
    (b"BZh", "is compressed with bzip2"),
    (b"\xfd7zXZ\x00", "is compressed with xz"),
    (b"PK\x03\x04", "is a zip archive"),
    (b"PAR1", "is a Parquet file"),
    (b"Obj\x01", "is an Avro file"),
    (b"\xc3\x01", "begins with the marker of a single Avro object"),
    (b"\xac\xed\x00\x05", "is a serialised Java object"),
    (b"\xff\xfe", "is UTF-16"),
    (b"\xfe\xff", "is UTF-16"),
    (b"{\x00", "is UTF-16"),
)
_REMEDY = "produce plain JSON in UTF-8"
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # Protobuf's kinds of fields


def hint(value: bytes) -> str:
    """`; it ...`, to be added to an error, or nothing if the bytes look like no format that we know."""
    name = _wire_format(value)
    return f"; it {name}: {_REMEDY}" if name else ""


def _wire_format(value: bytes) -> str | None:
    if value[:1] == b"\x00" and len(value) > 5:
        return _registered(value)
    if value[:2] in (b"\x03\x00", b"\x03\x05") and len(value) > 18:
        return "begins with the header of the AWS Glue schema registry"
    known = next((name for magic, name in _MAGIC if value.startswith(magic)), None)
    if known is not None:
        return known
    if _is_map(value, 0x80, (0xA0, 0xD9)):
        return "looks like MessagePack"
    if _is_map(value, 0xA0, (0x60, 0x70)):
        return "looks like CBOR"
    return "looks like Protobuf" if _is_protobuf(value) else None


def _registered(value: bytes) -> str:
    """Confluent's framing: a zero byte, the schema's number in four bytes, and the data."""
    (number,) = struct.unpack(">I", value[1:5])
    inside = "JSON" if value[5:].lstrip()[:1] == b"{" else "Avro or Protobuf"
    begins = f"begins with the magic byte of a schema registry (schema {number}), with {inside} behind it"
    return f"{begins} (which source.kafka.format can read)"


def _is_map(value: bytes, first: int, second: tuple[int, int]) -> bool:
    """Whether this begins as a small map, not empty, whose first key is a text."""
    if len(value) < 3 or not first < value[0] < first + 16:
        return False
    return any(start <= value[1] < start + 16 for start in second)


def _is_protobuf(value: bytes) -> bool:
    """Whether the bytes are fields of Protobuf from end to end, some of them binary."""
    at = 0
    while at < len(value):
        tag, at = _varint(value, at)
        kind = tag & 7
        if tag >> 3 == 0:
            return False
        if kind == _VARINT:
            at = _varint(value, at)[1]
        elif kind == _DELIMITED:
            length, at = _varint(value, at)
            at += length
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            return False
    return at == len(value) > 3 and re.search(rb"[^\t\n\r\x20-\x7e]", value) is not None


def _varint(value: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and where it ends; past the end of the bytes if it has none."""
    number = 0
    for index in range(10):
        if at + index >= len(value):
            break
        number |= (value[at + index] & 0x7F) << (7 * index)
        if value[at + index] < 0x80:
            return number, at + index + 1
    return 0, len(value) + 1
