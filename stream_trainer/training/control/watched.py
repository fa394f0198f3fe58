"""A file that is looked at every few seconds for whether it is another one now."""

import time
from collections.abc import Callable
from pathlib import Path

from stream_trainer.checkpoints.fingerprint import digest_of_file

LOOK_S = 5.0

Mark = tuple[int, int, int]


class WatchedFile:
    """A file counts as changed once it has been the same for two looks, so that nobody reads half of it.

    Attributes:
        refused: whether the contents that were tried last could not be used: those in use are then tried, too.
    """

    def __init__(self, path: Path, in_use: Callable[[], object]) -> None:
        """`in_use`: digest of the contents in use."""
        self.refused = False
        self._path = path
        self._in_use = in_use
        self._due = 0.0
        self._before: Mark | None = None
        self._judged: Mark | None = None
        self._changed = False

    @property
    def changed(self) -> bool:
        """Whether it holds something new that nobody has tried yet."""
        now = time.monotonic()
        if not self._changed and now >= self._due:
            self._due = now + LOOK_S
            self._changed = self._look()
        return self._changed

    def settle(self) -> None:
        """Take note that what it holds is being tried: once, whatever comes of it."""
        self._changed = False

    def _look(self) -> bool:
        try:
            found = self._path.stat()
            mark = (found.st_mtime_ns, found.st_size, found.st_ino)
            stays, self._before = mark == self._before, mark
            if not stays or mark == self._judged:
                return False
            self._judged = mark
            digest = digest_of_file(self._path)
            return digest is not None and (self.refused or digest != self._in_use())
        except OSError:
            return False  # it is being replaced, or was taken away: what is in use stays
