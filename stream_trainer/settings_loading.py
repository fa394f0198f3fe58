"""Reads settings: a YAML file, over it the environment, over that the command line. Every mistake becomes one line.

An option `--source.kafka.topic=VALUE` and a variable `STREAM_TRAINER_SOURCE__KAFKA__TOPIC=VALUE` mean the same, and
a structured VALUE (`[0.9, 0.95]`, `{model_type: llama}`, `null`) is YAML in both. `Settings` says what may be set.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

from stream_trainer.errors import SettingsError
from stream_trainer.settings import ENVIRONMENT_PREFIX, Settings

CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
MASK = "**********"

# A value may be a password without standing in a field of that kind: a misplaced line, or a URL with a user in it.
_SECRET_NAME = re.compile(r"passw|pasw|secret|credential|api_?key|(^|\.)token$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"[^\s/:]+:[^\s/@]+@")

_PROBLEMS = {
    "missing": "needs a value; set it in the file, or as --{name}=VALUE",
    "literal_error": "must be {expected}; choose one",
    "greater_than_equal": "must be at least {ge:g}; raise it",
    "greater_than": "must be more than {gt:g}; raise it",
    "less_than_equal": "must be at most {le:g}; lower it",
    "less_than": "must be less than {lt:g}; lower it",
    "finite_number": "must be finite; give a number",
    "int_parsing": "is no whole number; give one",
    "int_type": "is no whole number; give one",
    "int_from_float": "is no whole number; give one",
    "float_parsing": "is no number; give one",
    "float_type": "is no number; give one",
    "bool_parsing": "is neither true nor false; give one of them",
    "bool_type": "is neither true nor false; give one of them",
    "string_type": "is no text; put it in quotes",
    "path_type": "is no path; give one as text",
    "string_pattern_mismatch": "does not match {pattern}; use only what that allows",
    "dict_type": "is no mapping; write name: value lines below it",
    "model_type": "is no mapping; write name: value lines below it",
    "tuple_type": "is no list; write [a, b]",
    "too_long": "has more than {max_length} values; leave some out",
}


@dataclass(frozen=True)
class _Layer:
    """The settings one place gives, nested as in the file. `origin` tells the user where that place is."""

    origin: str
    values: dict[str, Any]


def load_settings(path: Path | None, overrides: Sequence[str]) -> Settings:
    """Settings from the file `path` (else the file named by STREAM_TRAINER_CONFIG, if any), the environment and
    `overrides`, the command line's `--section.name=value` or `--section.name value`. The later wins.

    Raises SettingsError with one line per mistake.
    """
    mistakes: list[str] = []
    file = path if path is not None else os.environ.get(CONFIG_VARIABLE)
    layers = [
        _Layer("command line", _from_texts(_options(overrides, mistakes), "command line", mistakes)),
        _Layer("environment", _from_texts(_variables(), "environment", mistakes)),
    ]
    if file is not None:
        layers.append(_Layer(str(file), read_yaml(Path(file))))
    known = [
        _Layer(layer.origin, _without_unknown(layer.values, Settings, "", layer.origin, mistakes)) for layer in layers
    ]
    merged: dict[str, Any] = {name: {} for name, field in Settings.model_fields.items() if field.is_required()}
    for layer in reversed(known):
        merged = _merge(merged, layer.values)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        mistakes += _lines(error, known, names_are_right=not mistakes)
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return settings


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section, also of one that may be absent; None for a plain setting."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def fields(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting and section with its dotted name, a section before its parts."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = section_of(field)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


# The file


class _Loader(yaml.SafeLoader):
    """YAML without two of its traps: a key given twice is an error, and 1e-5 is a number (in YAML 1.1 it is text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is set twice", key.start_mark)
            if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a settings file. Raises SettingsError, in one line, if there is none."""
    try:
        # _Loader is a SafeLoader: it builds plain values only.
        content = yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506
    except OSError as error:
        raise SettingsError(
            f"settings file {path} cannot be read ({error.strerror}); check the name and its permissions"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"settings file {path}{_place(error)}; correct it there") from None
    if content is None:
        raise SettingsError(f"settings file {path} is empty; start from examples/stream-trainer.yaml")
    if not isinstance(content, dict):
        raise SettingsError(f"settings file {path} is no mapping at its top level; write section: lines")
    return content


def _place(error: Exception) -> str:
    """Line and problem. Not the error's own text: that quotes the file, and the file may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return " is not valid YAML: it holds a value or a byte that cannot be read"


# The environment and the command line


class _Texts(EnvSettingsSource):
    """Nests what has environment variables' names. What is no YAML stays text, for validation to name and refuse."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__(Settings)
        self.env_vars = texts

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002
        return _value(value)


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError):
        return text


def _variables() -> dict[str, str]:
    """Dotted name -> text, of all variables with our prefix."""
    return {
        name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", "."): text
        for name, text in os.environ.items()
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() != CONFIG_VARIABLE
    }


def _options(arguments: Sequence[str], mistakes: list[str]) -> dict[str, str]:
    """Dotted name -> text, of `--name=text` and `--name text`."""
    options: dict[str, str] = {}
    rest = iter(range(len(arguments)))
    for index in rest:
        name, equals, text = arguments[index].partition("=")
        if not re.match(r"--\w", name):
            mistakes.append(f"unexpected argument {name}; settings are given as --section.name=value")
        elif equals:
            options[name[2:]] = text
        elif index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            options[name[2:]] = arguments[next(rest)]
        else:
            mistakes.append(f"{name} has no value; write {name}=VALUE")
    return options


def _from_texts(texts: Mapping[str, str], origin: str, mistakes: list[str]) -> dict[str, Any]:
    """Nested values. A name without a section of ours is reported here: EnvSettingsSource passes over it in silence."""
    known = {}
    for name, text in texts.items():
        if name.partition(".")[0] in Settings.model_fields:
            known[ENVIRONMENT_PREFIX.lower() + name.replace(".", "__")] = text
        else:
            mistakes.append(_unknown(name, "", Settings, origin))
    values: dict[str, Any] = _nulls(_Texts(known)())
    config = values.get("model", {})
    if isinstance(config, dict) and isinstance(config.get("config"), dict):
        # Nothing says what is in there, so its values are YAML: hidden_size=64 is a number.
        config["config"] = {name: _value(v) if isinstance(v, str) else v for name, v in config["config"].items()}
    return values


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nulls(inner) for name, inner in value.items()}
    return None if value == "null" else value


# Putting it together


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            both[name] = _merge(below[name], above[name])
    return both


def _without_unknown(
    values: Mapping[Any, Any], section: type[BaseModel], prefix: str, origin: str, mistakes: list[str]
) -> dict[str, Any]:
    """`values` less the names that `section` does not have, each of which is a mistake."""
    known: dict[str, Any] = {}
    for name, value in values.items():
        field = section.model_fields.get(name)
        if field is None:
            mistakes.append(_unknown(f"{prefix}{name}", prefix, section, origin))
            continue
        inner = section_of(field)
        if inner is not None and value is None and NoneType not in get_args(field.annotation):
            value = {}  # a heading with nothing below it
        if inner is not None and isinstance(value, dict):
            value = _without_unknown(value, inner, f"{prefix}{name}.", origin, mistakes)
        if value == MASK:
            mistakes.append(f"{prefix}{name} ({origin}) is masked, as config show prints it; give the password itself")
        known[name] = value
    return known


def _unknown(name: str, prefix: str, section: type[BaseModel], origin: str) -> str:
    """The line for an unknown name, with the nearest right one: its neighbour, or the same word in another section."""
    first, _, rest = name[len(prefix) :].partition(".")
    near = difflib.get_close_matches(first, section.model_fields, n=1)
    suggestion = f"{prefix}{near[0]}{'.' + rest if rest else ''}" if near else None
    names = [known for known, _ in fields()]
    if suggestion not in names:
        ending = [known for known in names if known.endswith("." + name.rpartition(".")[2])]
        pool, cutoff = (ending, 0.3) if ending else ([] if prefix else names, 0.6)
        suggestion = next(iter(difflib.get_close_matches(suggestion or name, pool, n=1, cutoff=cutoff)), suggestion)
    place = prefix[:-1] or "the top level"
    remedy = f"did you mean {suggestion}?" if suggestion else f"{place} has {', '.join(section.model_fields)}"
    return f"unknown setting {name} ({origin}); {remedy}"


# Saying what is wrong


def _lines(error: ValidationError, layers: Sequence[_Layer], names_are_right: bool) -> list[str]:
    """One line per setting that is wrong. A union of types reports once per member; those become one line.

    While names are wrong, nothing is said of what is missing: most likely it stands under the wrong name.
    """
    problems: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        name, index = _name(details["loc"])
        text = _problem(details, name)
        if details["type"] in ("value_error", "missing"):
            if not names_are_right:
                continue
            line = f"{name}:" if name and details["type"] == "value_error" else name
        else:
            line = f"{name}{index}={shown(name, details['input'])} ({_origin(name, layers)})"
        problems.setdefault(line, []).append(text)
    return [f"{line} {' or '.join(texts)}".strip() for line, texts in problems.items()]


def _name(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """Dotted name of the setting at `loc`, and the position within its value (`[1]`) or nothing."""
    names = {name for name, _ in fields()}
    dotted = ""
    for depth, part in enumerate(loc):
        longer = f"{dotted}.{part}" if dotted else str(part)
        if longer not in names:
            # What follows is an index, or the name of a type in a union, which means nothing to a user.
            return dotted, "".join(f"[{index}]" for index in loc[depth:] if isinstance(index, int))
        dotted = longer
    return dotted, ""


def _problem(details: ErrorDetails, name: str) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        spelt = {choice.lower(): choice for choice in choices}
        near = difflib.get_close_matches(str(details["input"]).lower(), spelt, n=1)
        if near:
            return f"must be {context['expected']}; did you mean {spelt[near[0]]}?"
    template = _PROBLEMS.get(kind)
    if template is None:
        return f"is wrong: {details['msg']}; see stream-trainer run --help"
    return template.format(name=name, **context)


def _origin(name: str, layers: Sequence[_Layer]) -> str:
    """Where the value of `name` comes from: the highest layer that has it."""
    for layer in layers:
        value: Any = layer.values
        for part in name.split("."):
            value = value.get(part, layer) if isinstance(value, dict) else layer
        if value is not layer:
            return layer.origin
    return "default"


def shown(name: str, value: Any) -> str:
    """`value` as an error may quote it: short, on one line, and masked if it is or may be a password."""
    field = dict(fields()).get(name)
    annotations = () if field is None else (field.annotation, *get_args(field.annotation))
    if SecretStr in annotations or _SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)):
        return MASK
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict | list) for part in value)):
        return f"a {type(value).__name__}"
    text = value if isinstance(value, str) and re.fullmatch(r"\S+", value) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
