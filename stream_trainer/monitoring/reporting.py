"""Shows the progress of a run while it lasts: a live panel on a terminal, a log line from time to time elsewhere.

A thread of its own asks how far the run is. The run never waits for what is shown.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOBase
from typing import Literal, TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from stream_trainer.monitoring.panel import fields, panel
from stream_trainer.monitoring.progress import Progress
from stream_trainer.settings.schema import LogSettings

REFRESHES_PER_S = 4
JOIN_S = 5.0
NO_CURSOR = ("dumb", "unknown", "")  # terminals that cannot move back up

logger = logging.getLogger(__name__)


@contextmanager
def shown(progress: Progress, title: str, settings: LogSettings) -> Iterator[None]:
    """Show the progress within this context, as `log.progress` asks; at its end the terminal is as before."""
    match way(settings, sys.stderr):
        case "live":
            with _live(progress, title, Console(stderr=True, force_terminal=True)):
                yield
        case "plain":
            with _lines(progress, settings.every_s):
                yield
        case _:
            yield


def way(settings: LogSettings, stream: TextIO) -> Literal["off", "plain", "live"]:
    """How to show progress on this stream."""
    if settings.progress != "auto":
        return settings.progress
    is_terminal = stream.isatty() and os.environ.get("TERM", "").lower() not in NO_CURSOR
    return "live" if is_terminal and settings.format == "text" else "plain"


@contextmanager
def _lines(progress: Progress, every_s: float) -> Iterator[None]:
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(every_s):
            now = progress.now()
            logger.info("progress", extra=fields(now))

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(JOIN_S)


class _Above(TextIOBase):
    """In the place of a log's stream: lines go above the panel."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        self._console.print(text, end="", markup=False, highlight=False, emoji=False, soft_wrap=True)
        return len(text)


@contextmanager
def _live(progress: Progress, title: str, console: Console) -> Iterator[None]:
    def picture() -> RenderableType:
        return panel(progress.now(), title, console.width, console.height)

    streams = [
        (handler, handler.stream)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    live = Live(
        get_renderable=picture,
        console=console,
        refresh_per_second=REFRESHES_PER_S,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    with live:
        for handler, _ in streams:
            handler.setStream(_Above(console))
        try:
            yield
        finally:
            for handler, stream in streams:
                handler.setStream(stream)
