"""Records as producers with a Schema Registry write them."""

import base64
import io
import json
import struct
from typing import Any

from fastavro import parse_schema, schemaless_writer
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message

OPTIONAL_ID: dict[str, Any] = {"name": "id", "type": ["null", "long"], "default": None}
AVRO: dict[str, Any] = {
    "type": "record",
    "name": "Sample",
    "fields": [{"name": "text", "type": "string"}, OPTIONAL_ID],
}
GAINED: dict[str, Any] = {
    **AVRO,
    "fields": [*AVRO["fields"], {"name": "weight", "type": "double", "default": 1.0}],
}
JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "id": {"type": "integer"}},
    "required": ["text"],
}


def prefixed(number: int, payload: bytes) -> bytes:
    return struct.pack(">bI", 0, number) + payload


def avro(schema: Any, value: Any) -> bytes:
    out = io.BytesIO()
    schemaless_writer(out, parse_schema(schema), value)
    return out.getvalue()


def proto_file() -> FileDescriptorProto:
    """`Other`, and `Sample` with `Turn` inside; the sample is the second message of the file."""
    file = FileDescriptorProto(name="sample.proto", package="t", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    file.message_type.add(name="Other")
    sample = file.message_type.add(name="Sample")
    turn = sample.nested_type.add(name="Turn")
    for number, name in enumerate(("role", "content"), start=1):
        turn.field.add(name=name, number=number, type=9, label=1)
    sample.field.add(name="text", number=1, type=9, label=1)
    sample.field.add(name="id", number=2, type=3, label=1)
    sample.field.add(name="messages", number=3, type=11, label=3, type_name=".t.Sample.Turn")
    sample.field.add(name="timestamp", number=4, type=11, label=1, type_name=".google.protobuf.Timestamp")
    return file


def described(file: FileDescriptorProto) -> str:
    return base64.b64encode(file.SerializeToString()).decode()


def proto_message(file: FileDescriptorProto, name: str = "t.Sample") -> Message:
    pool = descriptor_pool.DescriptorPool()
    for dependency in file.dependency:
        pool.AddSerializedFile(descriptor_pool.Default().FindFileByName(dependency).serialized_pb)
    pool.Add(file)
    message: Message = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))()
    return message


def protobuf(message: Any, indices: bytes = b"\x02\x02") -> bytes:
    """By default the second message of its file: one index, which is 1, both zigzag-encoded."""
    return indices + bytes(message.SerializeToString())


def json_value(value: Any) -> bytes:
    return json.dumps(value).encode()
