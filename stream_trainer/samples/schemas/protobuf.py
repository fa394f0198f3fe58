"""Protobuf by a schema from the registry: its messages are made from the descriptor, without generated code."""

import base64
from collections.abc import Iterable, MutableSequence
from typing import Any

from google.protobuf import (
    any_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    json_format,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message

from stream_trainer.formats.as_json import as_json
from stream_trainer.samples.schemas.readers import Reader, Schema, UnfitError

# Imported so that schemas may import them; what a schema imports beyond these it refers to in the registry.
WELL_KNOWN = (any_pb2, duration_pb2, empty_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)
WELL_KNOWN_PACKAGE = "google.protobuf."


def protobuf_reader(schema: Schema) -> Reader:
    """Raises whatever the library raises for a descriptor that is none, or that imports what nobody has."""
    pool = descriptor_pool.DescriptorPool()
    for module in WELL_KNOWN:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for name, text in (*schema.references, ("record.proto", schema.text)):
        file = FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
        file.name = name
        pool.Add(file)
    top = list(pool.FindFileByName("record.proto").message_types_by_name.values())

    def read(payload: bytes) -> bytes:
        indices, start = _indices(payload)
        message = message_factory.GetMessageClass(_message(top, indices))()
        message.ParseFromString(payload[start:])
        return as_json(_fields(message))

    return read


def _indices(payload: bytes) -> tuple[list[int], int]:
    """Which message of the schema it is, by its place at each level of nesting, and where its bytes begin."""
    count, at = _varint(payload, 0)
    if count == 0:
        return [0], at  # short for the first one
    if not 0 < count <= 32:
        raise UnfitError("its message indices are none")
    indices = []
    for _ in range(count):
        index, at = _varint(payload, at)
        indices.append(index)
    return indices, at


def _varint(payload: bytes, at: int) -> tuple[int, int]:
    """A zigzag-encoded number at `at`, and where it ends."""
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(payload):
            break
        byte = payload[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at
    raise UnfitError("its message indices are cut off")


def _message(among: list[Descriptor], indices: Iterable[int]) -> Descriptor:
    found = None
    for index in indices:
        if not 0 <= index < len(among):
            raise UnfitError(f"its schema has no message of index {index}")
        found = among[index]
        among = list(found.nested_types)
    assert found is not None
    return found


def _fields(message: Message) -> dict[str, Any]:
    """Fields that are set, under the names that the schema gives them."""
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"]
        return {str(key): _single(inner, value[key]) for key in value}
    if isinstance(value, MutableSequence):
        return [_single(field, one) for one in value]
    return _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    if field.message_type is None:
        return value
    if field.message_type.full_name.startswith(WELL_KNOWN_PACKAGE):
        return json_format.MessageToDict(value)  # moments, wrapped values and free structures, as JSON has them
    return _fields(value)
