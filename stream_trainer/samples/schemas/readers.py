"""How bytes are read by a schema: Avro, JSON Schema, and `protobuf` beside this.

A reader is made once for each schema, with all that it refers to, and from then on asks nobody: so an outage of the
registry can never look like a fault of a record. (confluent-kafka's own deserialisers ask in the middle of decoding.)
Readers raise whatever does not fit; the caller makes a SampleError of it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from stream_trainer.formats.as_json import as_json

Reader = Callable[[bytes], bytes]
"""From what follows the schema's number to JSON."""


class Schema(NamedTuple):
    """A schema as the registry gives it.

    Attributes:
        kind: `AVRO`, `JSON` or `PROTOBUF`.
        text: the schema; of Protobuf a serialized file descriptor in base64.
        references: name and text of each schema that it refers to, directly or not, those first that others need.
    """

    kind: str
    text: str
    references: Sequence[tuple[str, str]] = ()


class UnfitError(ValueError):
    """Bytes or a schema do not fit, and why, without a piece of the record."""


def avro_reader(schema: Schema) -> Reader:
    """Raises whatever the library raises for a schema that is none."""
    from fastavro import parse_schema, schemaless_reader

    named: dict[str, dict[str, Any]] = {}
    for _, text in schema.references:
        parse_schema(json.loads(text), named_schemas=named)
    parsed = parse_schema(json.loads(schema.text), named_schemas=named)

    def read(payload: bytes) -> bytes:
        stream = BytesIO(payload)
        value = schemaless_reader(stream, parsed, None)
        if stream.tell() != len(payload):
            raise UnfitError(f"{len(payload) - stream.tell()} bytes are left over")
        return as_json(value)

    return read


def json_reader(schema: Schema) -> Reader:
    """Checks the record, and leaves its bytes as they are. Raises whatever the library raises for a wrong schema."""
    from jsonschema import Draft7Validator
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.jsonschema import DRAFT7

    named = {name: DRAFT7.create_resource(json.loads(text)) for name, text in schema.references}
    parsed: Mapping[str, Any] = json.loads(schema.text)
    kind = validator_for(parsed, default=Draft7Validator)
    kind.check_schema(parsed)
    # With a registry of its own it never follows an address of the schema.
    validator = kind(parsed, registry=Registry().with_resources(named.items()))

    def read(payload: bytes) -> bytes:
        try:
            value = json.loads(payload)
        except ValueError:
            return payload  # the decoder says better what is wrong
        for error in validator.iter_errors(value):
            where = "/".join(str(part) for part in error.absolute_schema_path)
            raise UnfitError(f"it is not what the schema asks for at {where}")
        return payload

    return read
