"""`stream-trainer models`: what is published, whether it is whole, and which version servers are to use."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stream_trainer.checkpoints.trouble import remedy_of
from stream_trainer.errors import SettingsError
from stream_trainer.publishing.hooks import FAILURES, Hook, telling_hooks
from stream_trainer.publishing.versions import (
    CARD,
    PIN,
    Named,
    changing,
    current_in,
    hold,
    is_held,
    point_at,
    problems_of,
    read_about,
    release,
    versions_in,
)
from stream_trainer.settings.loading import load_settings

BROKEN = 1  # exit code of `verify`

EXAMPLES = """\
actions:
  list              every version: when, at which step, the losses; which one is current
  show [VERSION]    the model card; --json for version.json
  verify [VERSION]  whether every file is as it was published; exit code 1 if not
  rollback          make the version before the current one current; it stays that until `promote`
  promote VERSION   make a version current, keep it from being deleted, and let later versions follow it;
                    with --hold, let none follow

VERSION is the current one unless given. With --config, a vLLM server and publish.command are told of another current
version, as after publishing.

examples:
  stream-trainer models list --dir /models
  stream-trainer models rollback --config stream-trainer.yaml
  stream-trainer models promote v000012-step-3400 --dir /models
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; with --config, settings may follow."""
    parser.add_argument("action", choices=tuple(_ACTIONS), metavar="ACTION", help="one of those below")
    parser.add_argument("version", nargs="?", metavar="VERSION", help="name of a version")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="directory of the versions (publish.dir)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file that names it")
    parser.add_argument("--json", action="store_true", help="of show: version.json")
    parser.add_argument("--hold", action="store_true", help="of promote: let no later version follow")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do what was asked. Returns the exit code. Raises SettingsError."""
    directory, hooks = _place(args, overrides)
    try:
        return _ACTIONS[args.action](args, directory, hooks)
    except (OSError, ValueError) as error:
        raise SettingsError(f"publish.dir={directory} cannot be used ({error}); {remedy_of(error)}") from error


def _place(args: argparse.Namespace, overrides: Sequence[str]) -> tuple[Path, dict[str, Hook]]:
    if args.dir is not None:
        if args.config is not None or overrides:
            raise SettingsError("--dir names the directory already; leave out --config and settings")
        return args.dir, {}
    publish = load_settings(args.config, overrides).publish
    if publish.dir is None:
        raise SettingsError("publish.dir is not set; name the directory with --dir")
    return publish.dir, telling_hooks(publish)


def _chosen(args: argparse.Namespace, directory: Path) -> Named:
    """The version that is named, else the current one."""
    name = args.version or current_in(directory)
    found = next((version for version in versions_in(directory) if version.name == name), None)
    if found is None:
        shown = f"version {name} is not" if name else "no version is current"
        raise SettingsError(f"{shown} in {directory}; stream-trainer models list shows what is there")
    return found


def _list(_: argparse.Namespace, directory: Path, __: object) -> int:
    current, held = current_in(directory), is_held(directory)
    rows = [("", "version", "published", "target loss", "largest forgetting", "")]
    for version in versions_in(directory):
        about: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            about = read_about(version.path)
        is_pinned = (directory / f"{version.name}{PIN}").exists()
        notes = ["held"] if held and version.name == current else []
        rows.append(
            (
                "*" if version.name == current else "",
                version.name,
                about.get("time", "unreadable"),
                _number(about.get("losses", {}).get("target")),
                _number(max(about.get("forgetting", {}).values(), default=None)),
                ", ".join([*notes, *(["pinned"] if is_pinned else [])]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _show(args: argparse.Namespace, directory: Path, _: object) -> int:
    path = _chosen(args, directory).path
    print(json.dumps(read_about(path), indent=2) if args.json else (path / CARD).read_text().rstrip())
    return 0


def _verify(args: argparse.Namespace, directory: Path, _: object) -> int:
    version = _chosen(args, directory)
    problems = problems_of(version.path)
    for problem in problems:
        print(f"{version.name}: {problem}")
    if not problems:
        print(f"{version.name}: every file is as it was published")
    return BROKEN if problems else 0


def _rollback(args: argparse.Namespace, directory: Path, hooks: dict[str, Hook]) -> int:
    if args.version is not None:
        raise SettingsError(f"rollback goes to the version before; for {args.version} use promote --hold")
    with changing(directory):
        now = _chosen(args, directory)
        earlier = [version for version in versions_in(directory) if version < now]
        if not earlier:
            raise SettingsError(f"there is no version before {now.name} in {directory}; publish another first")
        hold(directory, f"{_now()}: rolled back from {now.name} to {earlier[0].name}")
        point_at(directory, earlier[0].name)
    print(f"current is {earlier[0].name}, no longer {now.name}; it stays that until promote")
    return _tell(earlier[0].path, hooks)


def _promote(args: argparse.Namespace, directory: Path, hooks: dict[str, Hook]) -> int:
    if args.version is None:
        raise SettingsError("promote needs a version; stream-trainer models list shows what is there")
    with changing(directory):
        chosen = _chosen(args, directory)
        (directory / f"{chosen.name}{PIN}").touch()
        if args.hold:
            hold(directory, f"{_now()}: {chosen.name} was promoted to stay")
        point_at(directory, chosen.name)
        if not args.hold:
            release(directory)
    print(f"current is {chosen.name}; {'it stays that' if args.hold else 'later versions follow it'}")
    return _tell(chosen.path, hooks)


def _tell(path: Path, hooks: dict[str, Hook]) -> int:
    """Tell servers of another current version; what they refuse is the user's to see, and `current` has moved."""
    failed = []
    for hook in hooks.values():
        try:
            hook(path.absolute())
        except FAILURES as error:
            failed.append(f"current has moved, but {error}; tell that server by hand, or promote again")
    if failed:
        raise SettingsError("\n".join(failed))
    return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_ACTIONS: dict[str, Callable[[argparse.Namespace, Path, dict[str, Hook]], int]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "rollback": _rollback,
    "promote": _promote,
}
