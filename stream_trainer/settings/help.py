"""Settings as people and tools read them: the list for `--help`, the JSON schema, and YAML without secrets."""

import re
import textwrap
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from stream_trainer.settings.mistakes import fields, section_of
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.secrets import MASK, is_secret_name

_WIDTH = 100
_WORDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH", SecretStr: "SECRET", dict: "MAPPING"}
_BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


# What a first run needs, in the order a person meets it.
FIRST = (
    "source.kafka.bootstrap_servers",
    "source.kafka.topic",
    "model.name",
    "model.dtype",
    "target.path",
    "selection.profile",
    "selection.batch_size",
    "optimizer.learning_rate",
    "samples.max_tokens",
    "evaluation.retention_path",
    "checkpoint.dir",
    "checkpoint.every_steps",
)


def describe_first_settings() -> str:
    """The settings of `FIRST`, as `describe_settings` has them."""
    known = dict(fields())
    return "\n".join(line for name in FIRST for line in _described(name, known[name])) + "\n"


def describe_settings() -> str:
    """Every setting by section: dotted name, type and limits, default and meaning. Plain text of 100 columns."""
    lines: list[str] = []
    for name, field in fields():
        section = section_of(field)
        if section is None:
            lines += _described(name, field)
        else:
            heading = f"{name}: {_plain(section.__doc__)}" + (
                " Off unless one is given." if field.default is None else ""
            )
            lines += ["", *textwrap.wrap(heading, _WIDTH)]
    return "\n".join(lines).strip() + "\n"


def _described(name: str, field: FieldInfo) -> list[str]:
    head = f"  --{name}={_word(field.annotation)}  ({'; '.join([_default(field), *_bounds(field)])})"
    indent = " " * 8
    return [head, *textwrap.wrap(_plain(field.description), _WIDTH, initial_indent=indent, subsequent_indent=indent)]


def schema() -> dict[str, Any]:
    """JSON schema of the settings file."""
    return Settings.model_json_schema()


def show(settings: Settings) -> str:
    """YAML that loads as the same settings, apart from secrets, which are masked."""
    return yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)


def plain(settings: Settings) -> dict[str, Any]:
    """The settings in force as JSON values, secrets masked."""
    return _without_secrets(settings.model_dump(mode="json"))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """Masks also what stands under a secret's name in a mapping of the user's own, such as `weigh_options`."""
    return {
        name: _without_secrets(value)
        if isinstance(value, dict)
        else (MASK if isinstance(value, str) and is_secret_name(name) else value)
        for name, value in values.items()
    }


def _plain(text: str | None) -> str:
    """A docstring without its line breaks and code marks."""
    return re.sub(r"\s+", " ", (text or "").replace("`", "")).strip()


def _bounds(field: FieldInfo) -> list[str]:
    """The limits of a number: `>= 0`, `< 1`."""
    return [
        f"{sign} {getattr(limit, name):g}"
        for limit in _limits(field)
        for kind, name, sign in _BOUNDS
        if isinstance(limit, kind)
    ]


def _limits(field: FieldInfo) -> list[Any]:
    """Limits of a field, also where it is a union or a tuple whose members have them."""
    inner = [limit for part in get_args(field.annotation) for limit in getattr(part, "__metadata__", ())]
    nested = [limit for info in inner for limit in getattr(info, "metadata", [info])]
    return list(dict.fromkeys([*field.metadata, *nested]))


def _word(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _word(parts[0])
    if origin is Literal:
        return "|".join(str(part) for part in parts)
    if annotation is bool:
        return "true|false"
    if origin is tuple:
        return "[" + ", ".join("..." if part is Ellipsis else _word(part) for part in parts) + "]"
    if origin is dict:
        return _WORDS[dict]
    if parts:
        return "|".join(_word(part) for part in parts if part is not NoneType)
    return _WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, tuple):
        return f"default {list(value)}"
    return f"default {str(value).lower() if isinstance(value, bool) else value}" if value is not None else "unset"
