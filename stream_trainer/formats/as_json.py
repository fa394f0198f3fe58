"""Values of typed formats (Avro, Protobuf, Arrow) as the JSON of a record.

A null is the same as absent, so it is left out at any depth: Arrow and Avro fill in what one record lacks and another
has. Moments become ISO 8601, and bytes become text if they are UTF-8.
"""

import json
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any


def as_json(value: Any) -> bytes:
    """One line of JSON. Raises TypeError for a value that JSON has nothing for."""
    text = json.dumps(_without_nulls(value), ensure_ascii=False, default=_plain)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which the decoder finds and names
        return json.dumps(_without_nulls(value), default=_plain).encode()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _plain(value: Any) -> Any:
    """What JSON has for a value of another type."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes | bytearray):
        return value.decode(errors="surrogateescape")
    return str(value)
