"""How the process keeps memory between steps, and how much it may take."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt, from glibc's malloc.h

# Of the container, by either version of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_limit(limits: Iterable[Path] = LIMITS) -> float:
    """Bytes that the process may take: the machine's memory, or what its container allows; 0 if that is not known."""
    try:
        found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    except (ValueError, OSError):
        return 0.0
    for path in limits:
        with suppress(OSError, ValueError):  # `max` is no limit
            found.append(float(path.read_text()))
    return min(found)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed for the next step; returns whether it could be told.

    By itself it gives large blocks back to the kernel as soon as they are free, and every step then waits while the
    kernel clears gigabytes of fresh pages. Peak memory stays the same. The setting holds for the whole process, and
    memory that one step needed is not there for other processes until this one ends. Other C libraries and allocators
    have settings of their own and are left alone.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return all(mallopt(option, value) == 1 for option, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)))


@contextmanager
def loading_for_good() -> Iterator[None]:
    """What is loaded meanwhile stays until the process ends: Python never looks for garbage among it.

    Libraries are hundreds of thousands of objects. To go through them again and again makes loading longer, and later
    holds up training whenever Python goes through all that it has.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
