"""Batches that the client cannot decode: every record but the damaged ones is read, and no offset goes unnamed."""

from collections.abc import Callable
from typing import Any

import pytest
from kafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from kafka.errors import CorruptRecordError
from kafka.record import MemoryRecords
from kafka.record.memory_records import MemoryRecordsBuilder
from kafka.record.util import calc_crc32c

from stream_trainer.records import Partition
from stream_trainer.sources.batches import salvage
from tests.helpers.brokers import with_checksum

LOG = Partition("log", 0)


def batch_of(values: list[bytes], first: int = 0, compression: int = 0) -> bytearray:
    """A batch as a broker stores it; each record has a header `name`."""
    builder = MemoryRecordsBuilder(2, compression, 1 << 20)
    for value in values:
        builder.append(1000, b"key", value, headers=[("name", b"content")])
    builder.close()
    data = bytearray(builder.buffer())
    data[:8] = first.to_bytes(8, "big")
    return data


def renamed(data: bytearray, value: bytes) -> bytearray:
    """Spoil the name of the header of the record with this value."""
    at = data.index(b"name", data.index(value))
    data[at : at + 4] = b"\xff\xfe\xff\xfe"
    return with_checksum(data)


def test_the_client_itself_gives_up_at_such_a_batch() -> None:
    with pytest.raises(CorruptRecordError):
        list(MemoryRecords(bytes(renamed(batch_of([b"v0", b"v1"]), b"v1"))).next_batch())


def test_a_batch_that_the_client_can_decode_is_left_to_it() -> None:
    assert salvage(bytes(batch_of([b"v0", b"v1"])), LOG, 0) == []


def test_a_header_whose_name_is_not_utf_8_costs_no_record() -> None:
    data = batch_of([b"before"]) + renamed(batch_of([b"v0", b"v1", b"v2"], first=1), b"v1")
    records = salvage(bytes(data), LOG, 2)
    assert [(r.offset, r.value, r.damage) for r in records] == [(2, b"v1", ""), (3, b"v2", "")]
    assert records[0].headers == (("\ufffd\ufffd\ufffd\ufffd", b"content"),)
    assert records[0].timestamp == 1.0
    assert records[0].key == b"key"


@pytest.mark.parametrize("encode", [gzip_encode, snappy_encode, lz4_encode, zstd_encode])
def test_what_was_compressed_is_read_too(encode: Callable[[bytes], bytes]) -> None:
    plain = renamed(batch_of([b"v0", b"v1"]), b"v0")
    data = plain[:61] + encode(bytes(plain[61:]))
    data[22] = [gzip_encode, snappy_encode, lz4_encode, zstd_encode].index(encode) + 1
    data[8:12] = (len(data) - 12).to_bytes(4, "big")
    records = salvage(bytes(with_checksum(bytearray(data))), LOG, 0)
    assert [(r.offset, r.value, r.damage) for r in records] == [(0, b"v0", ""), (1, b"v1", "")]


def shorten_a_field(data: bytearray) -> bytearray:
    """Announce more bytes of a value than its record has."""
    at = data.index(b"v1") - 1
    data[at] = 2 * 60
    return with_checksum(data)


def test_one_damaged_record_costs_no_other() -> None:
    records = salvage(bytes(shorten_a_field(batch_of([b"v0", b"v1", b"v2"]))), LOG, 0)
    assert [(r.offset, r.value) for r in records if not r.damage] == [(0, b"v0"), (2, b"v2")]
    (damaged,) = [r for r in records if r.damage]
    assert damaged.offset == 1
    assert b"v1" in (damaged.value or b"")


def spoil_the_checksum(data: bytearray) -> bytearray:
    data[-1] ^= 1
    return data


def spoil_the_compressed(data: bytearray) -> bytearray:
    data[70:] = b"\x00" * len(data[70:])
    return with_checksum(data)


@pytest.mark.parametrize(("spoil", "compression"), [(spoil_the_checksum, 0), (spoil_the_compressed, 1)])
def test_a_batch_of_which_nothing_can_be_told_apart_is_named_whole(
    spoil: Callable[[bytearray], bytearray], compression: int
) -> None:
    data = bytes(spoil(batch_of([b"v0" * 50, b"v1" * 50, b"v2" * 50], first=7, compression=compression)))
    records = salvage(data, LOG, 8)
    assert [(r.offset, r.next_offset) for r in records] == [(8, 9), (9, 10)]
    assert all(r.damage for r in records)
    assert [r.value for r in records] == [data, b""]


def test_the_checksum_that_these_tests_write_is_the_right_one() -> None:
    data: Any = batch_of([b"v0"])
    assert with_checksum(bytearray(data)) == data
    assert int.from_bytes(data[17:21], "big") == calc_crc32c(memoryview(data)[21:])
