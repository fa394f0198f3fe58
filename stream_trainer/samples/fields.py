"""One record's bytes to checked fields, before any tokenizer sees them. `samples` documents the format."""

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from stream_trainer.errors import SampleError
from stream_trainer.samples.others import ELSEWHERE, NO_OTHERS, Others
from stream_trainer.samples.wire_formats import hint

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_TIMESTAMP = 253_402_300_800.0  # the year 10000: anything later is a mistake in the unit, such as milliseconds
FORMS = (("text",), ("prompt", "response"), ("messages",))
FORM_OF = {name: form for form in FORMS for name in form}
BESIDE_MESSAGES = ("system", "tools", "chat_template_kwargs")
OPTIONAL = {"id", "weight", "timestamp", "domain"}


@dataclass(frozen=True, slots=True)
class Fields:
    """What a record says.

    Attributes:
        form: `{"text"}`, `{"prompt", "response"}` or `{"messages"}`, unchecked. What goes with messages is in it where
            there are some.
        timestamp: seconds since the epoch, or None if the record does not say.
        named: names and values of the fields that were asked for.
    """

    form: dict[str, Any]
    weight: float
    timestamp: float | None
    id: str | None
    domain: str | None
    named: tuple[tuple[str, str], ...] = ()


def parse_fields(value: bytes, max_bytes: int, names: Sequence[str] = (), others: Others = NO_OTHERS) -> Fields:
    """Raises SampleError if the bytes are not one JSON object with exactly one form, or say what is not read.

    `names`: fields whose values are kept in `named` where they are texts, whole numbers or truth values. `others`: what
    the producers call our fields.
    """
    given = _json_object(value, max_bytes)
    fields = others.renamed(given)
    form = _only_form(fields, others.ignored)
    if is_talk(form) and "messages" not in form and others.names.keys().isdisjoint(form):
        raise SampleError("wrong_type", "prompt or response is a list of messages: map it, fields={response: response}")
    if unread := fields.keys() - form.keys() - OPTIONAL - set(names):
        others.check_meaning({name: fields[name] for name in unread})
    return Fields(
        form=form,
        weight=_weight(fields.get("weight")),
        timestamp=_timestamp(fields.get("timestamp")),
        id=_id(fields.get("id")),
        domain=_label("domain", fields.get("domain")),
        named=tuple((name, _named(given[name])) for name in names if isinstance(given.get(name), str | int)),
    )


def text_of(name: str, value: object) -> str:
    """`value` as a string that says something."""
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise SampleError("empty", f"{name} is empty")
    check_surrogates(value)
    return value


def _json_object(value: bytes, max_bytes: int) -> dict[str, Any]:
    if not value:
        raise SampleError("empty", "the value has no bytes")
    if len(value) > max_bytes:
        raise SampleError("too_large", f"{len(value)} bytes are more than {max_bytes}")
    try:
        fields = STRICT.decode(str(value.removeprefix(BYTE_ORDER_MARK), "utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError("bad_utf8", f"byte {error.start} is not UTF-8{hint(value)}") from error
    except json.JSONDecodeError as error:
        raise SampleError("bad_json", f"{error.msg} at character {error.pos}{hint(value)}") from error
    except RecursionError as error:
        raise SampleError("too_deep", "nested too deeply") from error
    except ValueError as error:  # Python limits the digits of an integer
        raise SampleError("bad_number", "an integer has too many digits") from error
    if not isinstance(fields, dict):
        inner = "; it is JSON inside a JSON string: serialise it once" if _is_json_text(fields) else ""
        raise SampleError("not_an_object", f"the value is a {type(fields).__name__}{inner}")
    return {name: value for name, value in fields.items() if value is not None}


def _is_json_text(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise SampleError("bad_json", "a key appears twice in an object")
    return fields


def _no_constant(name: str) -> None:
    raise SampleError("bad_number", f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _only_form(fields: dict[str, Any], ignored: Set[str]) -> dict[str, Any]:
    """The fields of the one form that is given, but for those that are `ignored`."""
    begun = {FORM_OF[name] for name in FORM_OF.keys() & fields.keys() - ignored}
    if len(begun) > 1:
        listed = ", ".join(name for form in FORMS if form in begun for name in form if name in fields)
        raise SampleError("ambiguous_fields", f"{listed} exclude each other; see samples.ignore")
    names = next(iter(begun), ())
    if not names or not fields.keys() >= set(names):
        raise SampleError("missing_fields", f"needs text, or prompt and response, or messages{_looks_like(fields)}")
    form = {name: fields[name] for name in names}
    if is_talk(form):
        form |= {name: fields[name] for name in BESIDE_MESSAGES if name in fields}
    return form


def is_talk(form: Mapping[str, Any]) -> bool:
    """Whether a form is of messages; a prompt and a response may be lists of them too."""
    return "messages" in form or isinstance(form.get("prompt"), list) or isinstance(form.get("response"), list)


def _looks_like(fields: dict[str, Any]) -> str:
    """What to do about fields of other names."""
    if fields.keys() == {"schema", "payload"}:
        return "; it is wrapped by Kafka Connect: set schemas.enable=false of its converter"
    for names, remedy in ELSEWHERE.items():
        if fields.keys() >= set(names):
            return f"; it has {' and '.join(names)}: set samples.fields={remedy}"
    return ""


def check_surrogates(text: str) -> None:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("lone_surrogate", f"character {error.start} of a string is half a surrogate pair") from error


def _named(value: str | int) -> str:
    check_surrogates(str(value))
    return str(value)


def _label(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name} is a {type(value).__name__}, not a string")
    check_surrogates(value)
    return value


def _id(value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _label("id", value)


def number_of(name: str, value: object) -> float:
    """`value` as a finite float; an integer may be beyond one. Raises SampleError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SampleError("wrong_type", f"{name} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise SampleError("bad_number", f"{name} is not finite")
    return number


def _weight(value: object) -> float:
    weight = 1.0 if value is None else number_of("weight", value)
    if weight <= 0:
        raise SampleError("bad_number", "weight is not above 0")
    return weight


def _timestamp(value: object) -> float | None:
    """Seconds since the epoch."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise SampleError("bad_number", "timestamp is neither a number nor ISO 8601") from error
    else:
        seconds = number_of("timestamp", value)
    if not 0 <= seconds < MAX_TIMESTAMP:
        raise SampleError("bad_number", "timestamp is not between 1970 and 9999; it is in seconds, not milliseconds")
    return seconds
