"""What is wrong with settings, in one line each: the dotted name, the value, the problem and the remedy."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from stream_trainer.settings.schema import Settings
from stream_trainer.settings.secrets import shown_name, shown_value

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


# Settings that had another name once.
RENAMED = {
    "selection.chosen": "selection.batch_size",
    "selection.geometry": "selection.scoring",
    "selection.settle_steps": "selection.preconditioner_warmup_steps",
    "selection.survivors": "selection.filter_then_weight.keep_ratio",
    "selection.cluster_ucb.waiting": "selection.waiting",
    "selection.cluster_ucb.intake": "selection.intake",
    "selection.dual_sft.lambda_answers": "selection.dual_sft.lambda_anchor",
} | {
    f"selection.{name}": f"selection.filter_then_weight.{name}"
    for name in (
        "min_gain",
        "filter",
        "metric",
        "gamma",
        "normalisation",
        "ridge",
        "max_coefficient",
    )
}

# Settings that are gone, and what takes their place.
GONE = dict.fromkeys(
    ("selection.solver_time_limit_s", "selection.filter_then_weight.solver_time_limit_s"),
    "is gone, for a limit in seconds made results depend on the machine's load; leave it out, or limit iterations by "
    "selection.filter_then_weight.solver_max_iterations",
)


@dataclass(frozen=True, slots=True)
class Layer:
    """The settings one place gives, nested as in the file. `origin` tells the user where that place is."""

    origin: str
    values: dict[str, Any]


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


def unknown_name(name: str, prefix: str, section: type[BaseModel], origin: str) -> str:
    """The line for an unknown name, with the nearest right one: its neighbour, or the same word in another section."""
    if name in RENAMED:
        return f"setting {name} ({origin}) is now {RENAMED[name]}; rename it"
    if name in GONE:
        return f"setting {name} ({origin}) {GONE[name]}"
    first, _, rest = name[len(prefix) :].partition(".")
    near = difflib.get_close_matches(first, section.model_fields, n=1)
    suggestion = f"{prefix}{near[0]}{'.' + shown_name(rest) if rest else ''}" if near else None
    names = [known for known, _ in fields()]
    if suggestion not in names:
        ending = [known for known in names if known.endswith("." + name.rpartition(".")[2])]
        pool, cutoff = (ending, 0.3) if ending else ([] if prefix else names, 0.6)
        suggestion = next(iter(difflib.get_close_matches(suggestion or name, pool, n=1, cutoff=cutoff)), suggestion)
    place = prefix[:-1] or "the top level"
    remedy = f"did you mean {suggestion}?" if suggestion else f"{place} has {', '.join(section.model_fields)}"
    return f"unknown setting {shown_name(name)} ({origin}); {remedy}"


def mistakes_of(error: ValidationError, layers: Sequence[Layer], names_are_right: bool) -> list[str]:
    """One line per setting that is wrong. A union of types reports once per member; those become one line.

    While names are wrong, nothing is said of what is missing: most likely it stands under the wrong name.
    """
    problems: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        kind = details["type"]
        if kind in ("value_error", "missing") and not names_are_right:
            continue
        name, index = _name(details["loc"])
        text = _problem(details, name)
        if kind == "value_error":
            problems[text] = []  # a validator's own words, which name the settings
        elif kind == "missing":
            problems[name + index] = [text]
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
        return _qualified(str(context["error"]), name)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        spelt = {choice.lower(): choice for choice in choices}
        near = difflib.get_close_matches(str(details["input"]).lower(), spelt, n=1)
        if near:
            return f"must be {context['expected']}; did you mean {spelt[near[0]]}?"
    template = _PROBLEMS.get(kind)
    if template is None:
        return f"is wrong: {details['msg']}; see stream-trainer run --help-all"
    return template.format(name=name, **context)


def _qualified(text: str, section: str) -> str:
    """`text` of a section's validator with the names it calls its own settings by made whole."""
    if not section:
        return text
    names = {name for name, _ in fields()}

    def whole(match: re.Match[str]) -> str:
        name = f"{section}.{match[0]}"
        # A plain word counts only where it is given a value: `name=x`, but not `name the topic`.
        is_setting = name in names and (re.search(r"[._]", match[0]) or text[match.end() :].startswith("="))
        return name if is_setting else match[0]

    qualified = re.sub(r"(?<![\w.=])[a-z_]+(\.[a-z_]+)*", whole, text)
    return qualified if qualified.startswith(section) else f"{section}: {qualified}"


def _origin(name: str, layers: Sequence[Layer]) -> str:
    """Where the value of `name` comes from: the highest layer that has it."""
    for layer in layers:
        value: Any = layer.values
        for part in name.split("."):
            value = value.get(part, layer) if isinstance(value, dict) else layer
        if value is not layer:
            return layer.origin
    return "default"


def shown(name: str, value: Any) -> str:
    """`value` of the setting `name` as an error may quote it (`secrets`)."""
    return shown_value(name, value, _is_private(name))


def _is_private(name: str) -> bool:
    """Whether the setting is a secret, holds one, or stands in the same section as one."""
    if name == "source.kafka.topic":  # anybody may know it, and its mistakes are not seen without it
        return False
    secrets = [known for known, field in fields() if SecretStr in (field.annotation, *get_args(field.annotation))]
    sections = {secret.rpartition(".")[0] for secret in secrets}
    return name.rpartition(".")[0] in sections or any(f"{secret}.".startswith(f"{name}.") for secret in secrets)
