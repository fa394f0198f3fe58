"""Reads settings: a YAML file, over it the environment, over that the command line. Every mistake becomes one line.

An option `--source.kafka.topic=VALUE` and a variable `STREAM_TRAINER_SOURCE__KAFKA__TOPIC=VALUE` mean the same, and
a structured VALUE (`[0.9, 0.95]`, `{model_type: llama}`, `null`) is YAML in both. `Settings` says what may be set.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from stream_trainer.errors import SettingsError
from stream_trainer.settings.mistakes import Layer, mistakes_of, section_of, unknown_name
from stream_trainer.settings.schema import ENVIRONMENT_PREFIX, Settings
from stream_trainer.settings.secrets import MASK, is_sensitive, shown_name, shown_value

CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"

# Nothing says what is in these settings, so their values are YAML everywhere: hidden_size=64 is a number.
FREE = (("model", "config"), ("selection", "weigh_options"))

# Kubernetes puts these into every pod beside a service named stream-trainer. They are no settings of ours.
_KUBERNETES = re.compile(r"(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_\w+)=.*|PORT=\w+://.*")


def load_settings(
    path: Path | None, overrides: Sequence[str], tell_format: Callable[[object], None] = lambda _: None
) -> Settings:
    """Settings from the file `path` (else the file named by STREAM_TRAINER_CONFIG, if any), the environment and
    `overrides`, the command line's `--section.name=value` or `--section.name value`. The later wins. `tell_format` is
    called with `log.format` as it was given, before anything is refused.

    Raises SettingsError with one line per mistake.
    """
    mistakes: list[str] = []
    file = path if path is not None else os.environ.get(CONFIG_VARIABLE) or None
    layers = [
        Layer("command line", _from_texts(_options(overrides, mistakes), "command line", mistakes)),
        Layer("environment", _from_texts(_variables(), "environment", mistakes)),
    ]
    if file is not None:
        layers.append(Layer(str(file), read_yaml(Path(file))))
    known = [
        Layer(layer.origin, _without_unknown(layer.values, Settings, "", layer.origin, mistakes)) for layer in layers
    ]
    merged: dict[str, Any] = {name: {} for name, field in Settings.model_fields.items() if field.is_required()}
    for layer in reversed(known):
        merged = _merge(merged, layer.values)
    log = merged.get("log")
    tell_format(log.get("format") if isinstance(log, dict) else None)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        mistakes += mistakes_of(error, known, names_are_right=not mistakes)
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return settings


# The file


class _Loader(yaml.SafeLoader):
    """YAML without two of its traps: a key given twice is an error, and 1e-5 is a number (in YAML 1.1 it is text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"{shown_name(key.value)} is set twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
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
            f"settings file {shown_value('config', str(path), private=False)} cannot be read ({error.strerror}); "
            "check the name and its permissions"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"settings file {path}{_place(error)}; correct it there") from None
    if content is None:
        raise SettingsError(f"settings file {path} is empty; start from examples/stream-trainer.yaml")
    if not isinstance(content, dict):
        raise SettingsError(f"settings file {path} is no mapping at its top level; write section: lines")
    return content


_QUOTED = re.compile(r"'[^'<][^']+'|\"[^\"]+\"")  # but for '<scalar>' and other kinds of tokens


def _place(error: Exception) -> str:
    """Line and problem. Not the error's own text: that quotes the file, and the file may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        # `*name` and `!name` begin an alias or a tag: such a password would be named as the one that is not found.
        return f", line {error.problem_mark.line + 1}: {_QUOTED.sub('...', error.problem or '')}"
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
    texts = {}
    for variable, text in os.environ.items():
        name = variable.upper().removeprefix(ENVIRONMENT_PREFIX)
        if name not in (variable.upper(), "CONFIG") and not _KUBERNETES.fullmatch(f"{name}={text}"):
            texts[name.lower().replace("__", ".")] = text
    return texts


def _options(arguments: Sequence[str], mistakes: list[str]) -> dict[str, str]:
    """Dotted name -> text, of `--name=text` and `--name text`."""
    options: dict[str, str] = {}
    rest = iter(range(len(arguments)))
    for index in rest:
        name, equals, text = arguments[index].partition("=")
        if not re.match(r"--\w", name):
            word = "..." if any(map(is_sensitive, arguments)) else shown_name(name)
            mistakes.append(f"unexpected argument {word}; settings are given as --section.name=value")
        elif equals:
            options[name[2:]] = text
        elif index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            options[name[2:]] = arguments[next(rest)]
        else:
            shown = f"--{shown_name(name[2:])}"
            mistakes.append(f"{shown} has no value; write {shown}=VALUE")
    return options


def _from_texts(texts: Mapping[str, str], origin: str, mistakes: list[str]) -> dict[str, Any]:
    """Nested values. A name without a section of ours is reported here: EnvSettingsSource passes over it in silence."""
    known = {}
    for name, text in texts.items():
        if name.partition(".")[0] in Settings.model_fields:
            known[ENVIRONMENT_PREFIX.lower() + name.replace(".", "__")] = text
        else:
            mistakes.append(unknown_name(name, "", Settings, origin))
    values: dict[str, Any] = _nulls(_Texts(known)())
    for section, name in FREE:
        inner = values.get(section, {})
        if isinstance(inner, dict) and isinstance(inner.get(name), dict):
            inner[name] = {key: _value(v) if isinstance(v, str) else v for key, v in inner[name].items()}
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
            mistakes.append(unknown_name(f"{prefix}{name}", prefix, section, origin))
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
