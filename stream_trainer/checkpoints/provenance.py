"""Who made a checkpoint: the settings in force, since when, and the code. Kept in its manifest, for people to read.

Secrets are masked, and what users put into free mappings is theirs: of these there is a digest. What of it decides the
course of training is in the fingerprint as well, and compared on a resume.
"""

import hashlib
import json
import logging
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from platform import python_version
from typing import Any

from stream_trainer.checkpoints.manifest import MADE_WITH, MANIFEST
from stream_trainer.settings.help import plain
from stream_trainer.settings.loading import FREE
from stream_trainer.settings.schema import Settings

HASH_CHARS = 16
GIT_TIMEOUT_S = 5.0
_PRIVATE = ("sasl_", "ssl_")  # who we are to the brokers is nobody's business

logger = logging.getLogger(__name__)


def provenance_of(settings: Settings, version: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of its making; `before` is what the resumed one says, empty without one.

    `settings_since` is when a run with these settings first began (Unix time).
    """
    shown = _shown(settings)
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:HASH_CHARS]
    is_same = before.get("settings_hash") == digest
    return {
        "settings": shown,
        "settings_hash": digest,
        "settings_since": before["settings_since"] if is_same else time.time(),
        "code": {"version": version, "commit": commit_of(Path(__file__).parents[2]), "python": python_version()},
    }


def read_provenance(checkpoint: Path) -> dict[str, Any]:
    """What a verified checkpoint says of its making; empty from before it did."""
    found: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes()).get(MADE_WITH, {})
    return found


def report_changes(before: Mapping[str, Any], now: Mapping[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Log in one line which settings are other than before, then and now; returns them one by one.

    Those named in `but` are reported elsewhere. Of a setting that only one of the two knows nothing is said.
    """
    then, there = dict(_flat(before.get("settings", {}))), dict(_flat(now["settings"]))
    names = sorted(name for name in then.keys() & there.keys() - set(but) if then[name] != there[name])
    changes = [f"{name}: {_text(then[name])}, now {_text(there[name])}" for name in names]
    if changes:
        logger.info("settings that are other than the checkpoint's: %s", "; ".join(changes))
    return changes


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout, `-dirty` after it if files differ from it; None for an installed package."""
    if not (checkout / ".git").exists():
        return None  # nor is it that of a directory above, which may be the user's own
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _shown(settings: Settings) -> dict[str, Any]:
    shown = plain(settings)
    for section, name in FREE:
        if shown[section][name]:
            text = json.dumps(shown[section][name], sort_keys=True)
            shown[section][name] = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]}"
    kafka = shown["source"]["kafka"]
    shown["source"]["kafka"] = {name: kafka[name] for name in kafka if not name.startswith(_PRIVATE)}
    return shown


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    return "unset" if value is None else str(value)
