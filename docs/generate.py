"""Write the reference pages that follow from the code: settings, metrics and commands.

python docs/generate.py           # write docs/reference/{settings,metrics,commands}.md
python docs/generate.py --check   # write nothing; exit with 1 if a page is stale
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric

from stream_trainer.errors import SampleError, StreamTrainerError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.help import schema
from stream_trainer.settings.sections.selection import PROFILES, TARGET_PROFILES

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/generate.py. Change the code, then run it again. -->\n"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def main() -> int:
    """Write or check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the reference pages that follow from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path} is stale; run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(pages()[path])
            print(f"wrote {path}")
    return int(check and bool(stale))


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    return {
        REFERENCE / "settings.md": settings_page(),
        REFERENCE / "metrics.md": metrics_page(),
        REFERENCE / "commands.md": commands_page(),
    }


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; bars within cells are escaped."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain(text: str | None) -> str:
    """A docstring on one line."""
    return re.sub(r"\s+", " ", text or "").strip()


# Settings

SETTINGS_INTRO = """\
# Settings

Settings come from a YAML file, then the environment, then the command line. The later one wins. All three of these set
`source.kafka.topic`:

| place | how |
| --- | --- |
| file | `source: {kafka: {topic: samples}}` |
| environment | `STREAM_TRAINER_SOURCE__KAFKA__TOPIC=samples` |
| command line | `--source.kafka.topic=samples` |

`--config FILE` or the variable `STREAM_TRAINER_CONFIG` names the file. Lists and mappings are written as in YAML:
`--optimizer.betas='[0.9, 0.95]'`. `stream-trainer config show` prints the settings in force, and
`stream-trainer config schema` prints the JSON schema of the file. How to choose is on
[another page](../how-to/choose-settings.md).
"""

PROFILES_INTRO = """\
## Profiles

`selection.profile` sets several settings at once. A setting that you give yourself overrides the profile.
"""


def settings_page() -> str:
    """Every setting by section."""
    found = schema()
    parts = [GENERATED, SETTINGS_INTRO, PROFILES_INTRO, profiles_table(found), ""]
    for name, section, required in sections(found, found, "", required=False):
        parts.append(f"## `{name}`\n\n{plain(section.get('description'))}{'' if required else ' Off unless given.'}\n")
        rows = [
            (f"`{name}.{key}`", kind(found, field), default(field, key in section.get("required", ())), meaning(field))
            for key, field in section["properties"].items()
            if section_of(found, field) is None
        ]
        if rows:
            parts += [table(("setting", "type", "default", "meaning"), rows), ""]
    return "\n".join(parts).rstrip() + "\n"


def profiles_table(root: Mapping[str, Any]) -> str:
    """What each profile sets, the defaults included."""
    sets = {name: {f"selection.{key}": v for key, v in values.items()} for name, values in PROFILES.items()}
    for name, values in TARGET_PROFILES.items():
        sets[name] |= {f"target.{key}": value for key, value in values.items()}
    names = list(dict.fromkeys(name for values in sets.values() for name in values))
    found = {name: default_at(root, name) for name in names}
    rows = [(f"`{name}`", *(f"`{values.get(name, found[name])}`" for values in sets.values())) for name in names]
    return table(("setting", *(f"`{name}`" for name in sets)), rows)


def default_at(root: Mapping[str, Any], name: str) -> Any:
    """The default of a setting by its dotted name."""
    section, _, key = name.partition(".")
    inner = section_of(root, root["properties"][section])
    assert inner is not None
    return inner["properties"][key]["default"]


def sections(
    root: Mapping[str, Any], section: Mapping[str, Any], prefix: str, *, required: bool
) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Every section with its dotted name, and whether it is always there."""
    if prefix:
        yield prefix[:-1], section, required
    for key, field in section["properties"].items():
        inner = section_of(root, field)
        if inner is not None:
            yield from sections(root, inner, f"{prefix}{key}.", required="anyOf" not in field)


def section_of(root: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of a field that is a section, or None."""
    for part in (field, *field.get("anyOf", ())):
        if "$ref" in part:
            found: Mapping[str, Any] = root["$defs"][part["$ref"].rpartition("/")[2]]
            if "properties" in found:
                return found
    return None


def kind(root: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """What values a setting takes, with the limits of numbers."""
    if "anyOf" in field:
        return " or ".join(kind(root, part) for part in field["anyOf"] if part.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "prefixItems" in field:
        return "[" + ", ".join(kind(root, part) for part in field["prefixItems"]) + "]"
    if field.get("type") == "array":
        return f"list of {kind(root, field['items'])}"
    if "pattern" in field and ":" in field["pattern"]:
        return "`package.module:name`"
    words = {"string": "text", "object": "mapping", "boolean": "true or false", "integer": "whole number"}
    word = {"path": "path", "password": "secret"}.get(field.get("format", ""), words.get(field["type"], field["type"]))
    return " ".join(
        [word, ", ".join(f"{sign} {field[name]:g}" for name, sign in BOUNDS.items() if name in field)]
    ).strip()


def default(field: Mapping[str, Any], required: bool) -> str:
    """A default as it is written in YAML."""
    if required:
        return "**required**"
    value = field.get("default")
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def meaning(field: Mapping[str, Any]) -> str:
    """The docstring of a setting."""
    return plain(field.get("description"))


# Metrics

METRICS_INTRO = """\
# Metrics

`GET /metrics` on `server.port` answers in the formats of Prometheus and OpenMetrics. There are also metrics of the
process (`process_*`) and of Python (`python_info`). A histogram has the series `_bucket`, `_sum` and `_count`. A series
whose labels come from a closed set exists from the start.

Three metrics are a good first dashboard:

- `stream_trainer_records_total`: what became of the records;
- `stream_trainer_evaluation_loss`: whether the model learns;
- `stream_trainer_lag_records`: whether the service keeps up.
"""

SUFFIXES = {"counter": "_total", "info": "_info"}


def metrics_page() -> str:
    """Every metric of the service."""
    metrics = Metrics(REASONS, arms=1)
    labels = {getattr(metric, "_name", ""): getattr(metric, "_labelnames", ()) for metric in vars(metrics).values()}
    families = [family for family in metrics.registry.collect() if family.name.startswith("stream_trainer_")]
    rows = [
        (
            f"`{family.name}{SUFFIXES.get(family.type, '')}`",
            type_of(family),
            label_text(family, labels),
            family.documentation,
        )
        for family in families
    ]
    return "\n".join([GENERATED, METRICS_INTRO, table(("metric", "type", "labels", "meaning"), rows)]) + "\n"


def type_of(family: Metric) -> str:
    """The type; a state set is exported as a gauge."""
    return "gauge" if family.type == "stateset" else str(family.type)


def label_text(family: Metric, labels: Mapping[str, Iterable[str]]) -> str:
    """The labels, with their values where these are a closed set."""
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for name, value in sample.labels.items():
            if name not in ("le", "arm") and value not in values.setdefault(name, []):
                values[name].append(value)
    names = dict.fromkeys([*labels.get(family.name, ()), *values])
    return "; ".join(f"`{n}`" + (": " + ", ".join(values[n]) if values.get(n) else "") for n in names)


# Commands

COMMANDS_INTRO = """\
# Commands

| command | what it does |
| --- | --- |
| [`run`](#run) | trains from the stream until it is told to stop |
| [`produce`](#produce) | publishes JSONL files as records of a topic |
| [`demo`](#demo) | runs broker, stream, training and report on this machine |
| [`select dual-sft`](#select-dual-sft) | chooses parameters and samples of a file, once and offline |
| [`select cluster-ucb`](#select-cluster-ucb) | chooses samples of a file, once and offline |
| [`config`](#config) | shows, checks or describes the settings |
| [`dead-letters inspect`](#dead-letters-inspect) | shows records that could not be used, and why |
| [`dead-letters replay`](#dead-letters-replay) | publishes them again |
| [`ctl`](#ctl) | pauses, resumes, checkpoints or asks a trainer that runs, or has it reload its target |
| [`models`](#models) | lists, shows and verifies published versions, rolls back and promotes |
| [`ledger`](#ledger) | shows what became of a record, and which models were trained on it |

`stream-trainer COMMAND --help` says the same.

## Exit codes
"""

TAKES_SETTINGS = """\
## run

    stream-trainer run [--config FILE] [--section.name=VALUE ...]

Trains until the stream ends, `training.max_steps` is reached, or it is told to stop. SIGTERM and Ctrl-C end the run
with a checkpoint. The next run with the same `checkpoint.dir` goes on from there. Every [setting](settings.md) can be
given.

## config

    stream-trainer config {show,check,schema} [--config FILE] [--section.name=VALUE ...]

| action | what it does |
| --- | --- |
| `show` | prints the settings in force as YAML; secrets are masked |
| `check` | tells whether what the settings name is there: files, model directory, device, port, brokers, topic |
| `schema` | prints the JSON schema of the file |
"""

# Name -> module, and what the command leaves behind.
WITH_OPTIONS = {
    "produce": ("stream_trainer.commands.produce", "Publishes JSONL files to a Kafka topic, one record a line."),
    "demo": (
        "stream_trainer.demo.run",
        "Trains twice on a made-up stream: once it selects, once it draws at random. Then it compares the two.",
    ),
    "select dual-sft": (
        "stream_trainer.commands.select_dual_sft",
        "Writes `mask.safetensors`, `subset.jsonl`, `scores.jsonl` and `rejected.jsonl` to `--out`.",
    ),
    "select cluster-ucb": (
        "stream_trainer.commands.select_cluster_ucb",
        "Writes `subset.jsonl`, `scores.jsonl` and `rejected.jsonl` to `--out`.",
    ),
    "dead-letters inspect": (
        "stream_trainer.commands.dead_letters",
        "Counts dead letters by reason, or writes their original values.",
    ),
    "dead-letters replay": (
        "stream_trainer.commands.replay_letters",
        "Publishes the original records again, each once however often it is called.",
    ),
    "ctl": (
        "stream_trainer.commands.ctl",
        "Gives an order to a trainer that runs, and prints what came of it. Settings may be given, as to `run`.",
    ),
    "models": (
        "stream_trainer.commands.models",
        "Shows what is published, and says which version servers are to use.",
    ),
    "ledger": (
        "stream_trainer.commands.ledger",
        "Shows what became of a record, and which checkpoints and published versions were trained on it.",
    ),
}


def commands_page() -> str:
    """Every command with its options, and the exit codes."""
    parts = [GENERATED, COMMANDS_INTRO, exit_codes(), "", TAKES_SETTINGS]
    for name, (module_name, what) in WITH_OPTIONS.items():
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(f"stream-trainer {name}", add_help=False)
        module.add_arguments(parser)
        parts += [f"## {name}\n\n{what}\n", table(("argument", "default", "meaning"), options_of(parser)), ""]
        if getattr(module, "EXAMPLES", ""):
            parts += [f"```text\n{module.EXAMPLES.strip()}\n```", ""]
    return "\n".join(parts).rstrip() + "\n"


def exit_codes() -> str:
    """The exit code of each kind of error."""
    rows = [("0", "", "Done, or stopped by SIGTERM or Ctrl-C with a checkpoint.")]
    rows += [("1", "", "An error that nobody foresaw, with a traceback. Please report it.")]
    rows += [
        (str(error.exit_code), f"`{error.__name__}`", plain(error.__doc__).partition(". ")[0].rstrip(".") + ".")
        for error in sorted(kinds_of(StreamTrainerError), key=lambda found: found.exit_code)
        if error is not SampleError
    ]
    rows += [
        ("130", "", "Interrupted by Ctrl-C outside of training, or by a second Ctrl-C: there is no new checkpoint.")
    ]
    return table(("code", "error", "meaning"), rows)


def kinds_of(error: type[StreamTrainerError]) -> Iterator[type[StreamTrainerError]]:
    """Every kind of an error, kinds of kinds included."""
    for inner in error.__subclasses__():
        yield inner
        yield from kinds_of(inner)


def options_of(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    """Argument, default and meaning of everything a command takes."""
    rows = []
    for action in parser._actions:
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        takes_value = action.option_strings and action.nargs != 0
        value = (action.metavar or "{" + ",".join(action.choices or ()) + "}") if takes_value else ""
        is_unset = action.default is None or action.default is False
        shown = "**required**" if action.required else "" if is_unset else f"`{action.default}`"
        value = action.dest.upper() if value == "{}" else value
        rows.append((f"`{f'{name} {value}'.strip()}`", shown, (action.help or "").replace("%%", "%")))
    return rows


if __name__ == "__main__":
    sys.exit(main())
