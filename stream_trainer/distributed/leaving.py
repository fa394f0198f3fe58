"""Whether a process trains with others, and how it ends if it did."""

import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn


def processes() -> int:
    """How many of them torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave(code: int) -> NoReturn:
    """End this process with an exit code. One of several ends at once, without Python being taken apart.

    torch keeps the groups of sharded tensors in caches of its own, also after `destroy_process_group`, and with them
    threads that may hold tensors. One that lets go of a tensor while Python is taken apart aborts the process (seen
    with torch 2.13, in one of 170 runs; see pytorch #190489): a run that is done had failed, for whoever started it.
    """
    if processes() == 1:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # who reads it has seen enough
            stream.flush()
    os._exit(code)
