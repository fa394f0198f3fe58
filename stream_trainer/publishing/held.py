"""Files of a checkpoint, held open: they can be read to their end although the checkpoint is deleted meanwhile."""

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

CHUNK = 4 * 1024 * 1024


class HeldFiles:
    """Open files by their names below one directory. To be used by one thread at a time, and closed."""

    def __init__(self, directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:  # noqa: ARG005
        """Raises OSError if they cannot be opened."""
        self._files: dict[str, IO[bytes]] = {}
        with ExitStack() as stack:
            for path in sorted(path for path in directory.rglob("*") if path.is_file()):
                name = path.relative_to(directory).as_posix()
                if wanted(name):
                    self._files[name] = stack.enter_context(path.open("rb"))
            self._stack = stack.pop_all()

    @property
    def names(self) -> list[str]:
        """In order."""
        return list(self._files)

    def read(self, name: str) -> bytes:
        """The whole of a file. Raises OSError."""
        file = self._files[name]
        file.seek(0)
        return file.read()

    def copy(self, name: str, to: IO[Any]) -> str:
        """Copy a file; returns the SHA-256 of what was copied. Raises OSError."""
        file, digest = self._files[name], hashlib.sha256()
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            to.write(chunk)
        return digest.hexdigest()

    def copy_file(self, name: str, to: Path) -> str:
        """Copy to a new file, durably; returns the SHA-256. Raises OSError.

        A copy and no hard link: whoever changes one of the two would change the other, mode and contents.
        """
        with to.open("xb") as file:
            digest = self.copy(name, file)
            file.flush()
            os.fsync(file.fileno())
        return digest

    def close(self) -> None:
        """Let them go."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
