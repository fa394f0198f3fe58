"""`stream-trainer ledger`: what became of a record, and which checkpoints and versions were trained on it."""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_trainer.checkpoints.directory import TRAINER, Found, checkpoints_in, named
from stream_trainer.checkpoints.trouble import remedy_of
from stream_trainer.errors import SettingsError
from stream_trainer.ledger.names import FOLDER, NEEDS
from stream_trainer.publishing.versions import read_about, versions_in
from stream_trainer.records import Partition
from stream_trainer.settings.numbers import at_least

if TYPE_CHECKING:
    from stream_trainer.ledger.query import Found as Answer

NOT_FOUND = 1  # exit code

EXAMPLES = """\
actions:
  show    rows of a record, a sample or a step; or what a published version was trained on

examples:
  stream-trainer ledger show --config stream-trainer.yaml --partition 3 --offset 12345
  stream-trainer ledger show --config stream-trainer.yaml --id order-1234 --json
  stream-trainer ledger show --dir checkpoints --models /models --version v000012-step-3400
  stream-trainer ledger show --dir checkpoints --step 120 --limit 64

Exit codes: 0 found, 1 not in the ledger, 2 no ledger there, or no such version.
"""

_COLUMNS = ("topic", "partition", "offset", "id", "outcome", "step", "coefficient", "reason", "time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; with --config, settings may follow."""
    parser.add_argument("action", choices=("show",), metavar="ACTION", help="show")
    parser.add_argument("--partition", type=at_least(0), metavar="N", help="partition of a record; 0 for a file")
    parser.add_argument("--offset", type=at_least(0), metavar="N", help="its offset; in a file the byte it begins at")
    parser.add_argument("--topic", metavar="T", help="its topic, where there are several")
    parser.add_argument("--id", metavar="X", help="id of a sample, as its producer gave it")
    parser.add_argument("--step", type=at_least(1), metavar="N", help="all that a step decided")
    parser.add_argument("--version", metavar="V", help="what a published version was trained on, by partition")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="directory of the checkpoints (checkpoint.dir)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="directory of published versions (publish.dir)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file that names both")
    parser.add_argument("--limit", type=at_least(1), default=20, metavar="N", help="rows to show at most (20)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Answer one question. Returns the exit code. Raises SettingsError."""
    directory, models = _places(args, overrides)
    equal = _question(args)
    if not (directory / FOLDER).is_dir():
        raise SettingsError(f"checkpoint.dir={directory} holds no ledger; set ledger.enabled, or name another --dir")
    try:
        if args.version is not None:
            return _show_version(args, directory, models)
        return _show_rows(args, directory, models, equal)
    except ImportError as error:
        raise SettingsError(f"stream-trainer ledger {NEEDS}") from error
    except OSError as error:
        raise SettingsError(f"the ledger in {directory} cannot be read ({error}); {remedy_of(error)}") from error


def _places(args: argparse.Namespace, overrides: Sequence[str]) -> tuple[Path, Path | None]:
    if args.dir is None:
        from stream_trainer.settings.loading import load_settings  # it takes a moment, which --dir need not wait for

        settings = load_settings(args.config, overrides)
        return settings.checkpoint.dir, args.models or settings.publish.dir
    if args.config is not None or overrides:
        raise SettingsError("--dir names the directory already; leave out --config and settings")
    return args.dir, args.models


def _question(args: argparse.Namespace) -> dict[str, Any]:
    """Columns and the values that are asked for. Raises SettingsError unless one thing is asked."""
    asked = [name for name in ("offset", "id", "step", "version") if getattr(args, name) is not None]
    if len(asked) != 1:
        raise SettingsError(
            "ledger show answers one question; give --partition and --offset, --id, --step or --version"
        )
    if (args.offset is None) != (args.partition is None):
        raise SettingsError("--offset and --partition name a record together; give both")
    names = ("topic", "partition", "offset", "id", "step")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _show_rows(args: argparse.Namespace, directory: Path, models: Path | None, equal: Mapping[str, Any]) -> int:
    from stream_trainer.ledger.query import rows_where

    found = rows_where(directory, equal, args.limit)
    rows = [dict(_with_models(row, directory, models)) for row in found.rows]
    if args.json:
        print(json.dumps({"rows": rows, "more": found.more}, indent=2))
    elif rows:
        _print_rows(rows, found, args)
    else:
        print(_why_missing(directory, equal))
    return 0 if rows else NOT_FOUND


def _with_models(row: Mapping[str, Any], directory: Path, models: Path | None) -> Iterator[tuple[str, Any]]:
    """The row as JSON, with the checkpoints and versions that are there and were trained on its record."""
    from stream_trainer.ledger.query import holds

    for name in _COLUMNS:
        yield name, row[name].isoformat() if name == "time" else row[name]
    yield "checkpoint", f"step-{row['checkpoint']:08d}.e{row['epoch']}"
    kept = [found.path.name for found in reversed(checkpoints_in(directory)) if holds(row, found.epoch, found.step)]
    yield "checkpoints", kept
    yield "versions", [name for name, of in _versions(models) if holds(row, of.epoch, of.step)]


def _versions(models: Path | None) -> Iterator[tuple[str, Found]]:
    """Published versions, the oldest first, and the checkpoints they were made of."""
    if models is None:
        return
    for version in reversed(versions_in(models)):
        with suppress(OSError, ValueError, KeyError):  # one that is damaged, or just deleted
            checkpoint = named(Path(read_about(version.path)["checkpoint"]))
            if checkpoint is not None:
                yield version.name, checkpoint


def _print_rows(rows: Sequence[Mapping[str, Any]], found: "Answer", args: argparse.Namespace) -> None:
    _print_table([_COLUMNS, *([_text(row[name]) for name in _COLUMNS] for row in rows)])
    if found.more:
        print(f"there are more; --limit is {args.limit}")
    if args.step is None:
        for row in rows:
            print(f"decided before checkpoint {row['checkpoint']}")
            print(f"checkpoints trained on it: {', '.join(row['checkpoints']) or 'none of those kept'}")
            print(f"versions trained on it: {', '.join(row['versions']) or 'none'}")


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_table(rows: Sequence[Iterable[str]]) -> None:
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _why_missing(directory: Path, equal: Mapping[str, Any]) -> str:
    """What the newest checkpoint says of a record that the ledger does not have."""
    asked = ", ".join(f"{name} {value}" for name, value in equal.items())
    text = f"not in the ledger: {asked}"
    if "offset" not in equal:
        return text
    with suppress(OSError, ValueError, KeyError, IndexError):
        newest = checkpoints_in(directory)[0].path
        for name, log in json.loads((newest / TRAINER).read_text())["cursor"]["partitions"].items():
            at = Partition.parse(name)
            if at.number == equal["partition"] and equal.get("topic") in (None, at.topic):
                if equal["offset"] >= log["next"]:
                    return f"{text}; {newest.name} reads on at offset {log['next']}: it was not decided yet"
                return (
                    f"{text}; {newest.name} reads on at offset {log['next']}: it was lost or never there, or decided "
                    "without a ledger, or its row was pruned"
                )
    return text


def _show_version(args: argparse.Namespace, directory: Path, models: Path | None) -> int:
    from stream_trainer.ledger.query import redone, trained_on

    if models is None:
        raise SettingsError("--version needs the directory of published versions; give --models or set publish.dir")
    of = dict(_versions(models)).get(args.version)
    if of is None:
        raise SettingsError(
            f"version {args.version} is not in {models}; stream-trainer models list shows what is there"
        )
    trained, again = trained_on(directory, of.epoch, of.step), redone(directory, of.epoch, of.step)
    if args.json:
        partitions = [asdict(each) for each in trained]
        print(json.dumps({"version": args.version, "checkpoint": of.path.name, "redone": again, "trained": partitions}))
        return 0 if trained else NOT_FOUND
    total = sum(each.records for each in trained)
    print(f"{args.version}, of checkpoint {of.path.name}, was trained on {total} records")
    if trained:
        numbers = [
            [each.topic, str(each.partition), str(each.records), str(each.first), str(each.last)] for each in trained
        ]
        _print_table([("topic", "partition", "records", "first offset", "last offset"), *numbers])
    if again:
        print("a later trainer made its last steps again, and the ledger has only that trainer's rows of them")
    return 0 if trained else NOT_FOUND
