"""A target that a topic holds, kept in a file: what is in use in `target.path`, what is to be tried beside it.

So a checkpoint knows its target as it knows any file, and a run goes on from it while the brokers are away. Lines are
in the order of the keys: the same set makes the same file.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from stream_trainer.checkpoints.trouble import sync
from stream_trainer.errors import SettingsError


class KeptTarget:
    """The file of a topic.

    Attributes:
        named: the topic, for people.
        setting: what names the file, for errors.
        path: what is in use.
        candidate: what the topic holds, where that is something else.
        lock: held while the candidate is tried: it does not change then.
    """

    def __init__(self, path: Path, topic: str) -> None:
        """Raises SettingsError if there is a file that no such topic made."""
        self.path, self._topic, self.named = path, topic, f"target.topic={topic}"
        self.setting = f"{self.named}, target.path"
        self.candidate = path.with_name(f"{path.name}.new")
        self._mark = path.with_name(f"{path.name}.topic")
        self.lock = threading.Lock()
        self.changed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (self._mark.exists() and self._mark.read_text() == topic):
            raise SettingsError(
                f"target.path={path} is not of {self.named}, which would overwrite it; name a file that is not there"
            )

    @property
    def exists(self) -> bool:
        """Whether there is a target to go on with while the topic cannot be read."""
        return self.path.exists()

    def take(self, found: Mapping[bytes, bytes]) -> None:
        """Write down what the topic holds now, for it to be tried. Raises OSError."""
        contents = b"".join(_line(found[key]) for key in sorted(found))
        with self.lock:
            if self.path.exists() and self.path.read_bytes() == contents:
                self.candidate.unlink(missing_ok=True)
                self.changed = False
            elif not self.candidate.exists() or self.candidate.read_bytes() != contents or not self.path.exists():
                _write(self.candidate, contents)
                self.changed = True

    def settle(self) -> None:
        """Take note that the candidate is being tried: once, whatever comes of it."""
        self.changed = False

    def accept(self) -> None:
        """The candidate is what is in use from now on. Raises OSError."""
        _write(self._mark, self._topic.encode())
        os.replace(self.candidate, self.path)

    def begin(self, check: Callable[[Path], object]) -> None:
        """Let the first set be what is in use, if `check` finds nothing wrong with it; it raises if it does."""
        with self.lock:
            if not self.exists:
                check(self.candidate)
                self.accept()
            self.changed = self.candidate.exists()


def _line(value: bytes) -> bytes:
    """A value in one line; what is no JSON comes as it is, for the decoder to refuse."""
    try:
        return json.dumps(json.loads(value), ensure_ascii=False).encode() + b"\n"
    except ValueError:
        return b" ".join(value.split()) + b"\n"


def _write(path: Path, contents: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(contents)
    sync(part)
    os.replace(part, path)
