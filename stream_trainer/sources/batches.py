"""Records as the client decodes them, and what can be read of a batch that it cannot decode.

The client decodes a batch from its first record to its last and stops at the first fault. Here each record is decoded
by itself, and names of headers that are not UTF-8 are no fault: `bytes.decode(errors="replace")` shows what was meant.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kafka.codec import gzip_decode, lz4_decode, snappy_decode, zstd_decode
from kafka.record import MemoryRecords
from kafka.record.util import decode_varint

from stream_trainer.records import Partition, Record

PREFIX = struct.Struct(">qi")  # base offset, and the length of what follows
BODY_AT = 61  # where the records of a batch of format 2 begin
FORMAT_AT = 16
DECODERS: dict[int, Callable[[bytes], bytes]] = {
    0: bytes,
    1: gzip_decode,
    2: snappy_decode,
    3: lz4_decode,
    4: zstd_decode,
}


def mark_of(leader_epoch: int, timestamp_ms: int, key: bytes | None, value: bytes | None) -> str:
    """Tells a record from another at the same offset: two logs that share it share all that lies before it."""
    checksum = zlib.crc32(value or b"", zlib.crc32(key or b""))
    return f"{leader_epoch} {timestamp_ms} {checksum:08x}"


def record_of(message: Any) -> Record:
    """A record as the client decoded it."""
    return Record(
        partition=Partition(message.topic, message.partition),
        offset=message.offset,
        next_offset=message.offset + 1,
        value=message.value,
        key=message.key,
        headers=tuple(message.headers or ()),
        timestamp=message.timestamp / 1000 if message.timestamp >= 0 else None,
        mark=mark_of(message.leader_epoch, message.timestamp, message.key, message.value),
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch as the broker sent it: its bytes, and the offsets it may hold."""

    data: bytes
    first: int
    last: int


def salvage(fetched: bytes, partition: Partition, position: int) -> list[Record]:
    """The records from `position` on of the first batch in `fetched` that the client cannot decode.

    What cannot be read is a record with `damage`. Empty if the client can decode all there is.
    """
    for batch in _batches(fetched):
        reason = _fault(batch) if batch.last >= position else ""
        if reason:
            first = max(position, batch.first)
            return _records(batch, partition, first, reason)
    return []


def _batches(fetched: bytes) -> Iterator[_Batch]:
    """Whole batches; the last one of a fetch may be cut off."""
    at = 0
    while at + BODY_AT <= len(fetched):
        base, length = PREFIX.unpack_from(fetched, at)
        data = fetched[at : at + PREFIX.size + length]
        if len(data) < PREFIX.size + length or length <= 0:
            return
        (delta,) = struct.unpack_from(">i", data, 23) if data[FORMAT_AT] >= 2 else (0,)
        yield _Batch(data, base, base + max(0, delta))
        at += len(data)


def in_one_line(error: BaseException) -> str:
    """The kind of an error and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _fault(batch: _Batch) -> str:
    """Why the client cannot decode a batch; empty if it can."""
    try:
        found = MemoryRecords(batch.data).next_batch()
        if not found.validate_crc():
            return "its checksum is wrong"
        for _ in found:
            pass
    except Exception as error:  # whatever a decompressor raises
        return in_one_line(error)
    return ""


def _records(batch: _Batch, partition: Partition, first: int, reason: str) -> list[Record]:
    found = MemoryRecords(batch.data).next_batch() if batch.data[FORMAT_AT] == 2 else None
    try:
        if found is None or not found.validate_crc():
            raise ValueError(reason)
        body = DECODERS[found.compression_type](batch.data[BODY_AT:])
    except Exception:  # nothing of the batch can be told apart: the first record keeps its bytes
        lost = range(first, batch.last + 1)
        return [Record(partition, n, n + 1, batch.data if n == first else b"", damage=reason) for n in lost]
    return [record for record in _each(found, bytearray(body), partition) if record.offset >= first]


def _each(batch: Any, body: bytearray, partition: Partition) -> Iterator[Record]:
    """Every record of a batch, by the length that stands before it."""
    at, offset = 0, batch.base_offset
    for _ in range(batch.records_count):
        length, start = decode_varint(body, at)
        at = start + length
        try:
            record = _decode(batch, body[start:at], partition)
        except (IndexError, ValueError) as error:
            damage = in_one_line(error)
            record = Record(partition, offset, offset + 1, bytes(body[start:at]), damage=damage)
        yield record
        offset = record.next_offset


def _decode(batch: Any, data: bytearray, partition: Partition) -> Record:
    _, at = decode_varint(data, 0)  # attributes
    delta_ms, at = decode_varint(data, at)
    offset_delta, at = decode_varint(data, at)
    key, at = _field(data, at)
    value, at = _field(data, at)
    count, at = decode_varint(data, at)
    headers = []
    for _ in range(count):
        name, at = _field(data, at)
        content, at = _field(data, at)
        headers.append(((name or b"").decode(errors="replace"), content))
    if at != len(data) or offset_delta < 0:
        raise ValueError(f"{len(data)} bytes were announced, and {at} were used")
    timestamp = batch.max_timestamp if batch.timestamp_type else batch.first_timestamp + delta_ms
    offset = batch.base_offset + offset_delta
    return Record(
        partition=partition,
        offset=offset,
        next_offset=offset + 1,
        value=value,
        key=key,
        headers=tuple(headers),
        timestamp=timestamp / 1000 if timestamp >= 0 else None,
        mark=mark_of(batch.leader_epoch, timestamp, key, value),
    )


def _field(data: bytearray, at: int) -> tuple[bytes | None, int]:
    length, at = decode_varint(data, at)
    if length < 0:
        return None, at
    if at + length > len(data):
        raise ValueError(f"a field of {length} bytes is longer than what is left")
    return bytes(data[at : at + length]), at + length
