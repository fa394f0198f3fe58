"""What the pictures share: whether matplotlib is there, results read back, and the same file from the same figures.

matplotlib is of the extra `bench` and is imported only where something is drawn. Pictures are as wide as a README shows
them, on white, so that they are readable in light and in dark.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.reporting import writable_file
from stream_trainer.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches of 96 pixels: 864 pixels
SMALL = 9.0  # points, of all text but titles


def need_matplotlib(option: str, path: Path) -> None:
    """Raise SettingsError if matplotlib is not installed; `option` is what asked for a picture at `path`."""
    if find_spec("matplotlib") is None:
        raise SettingsError(f"{option} {path} needs matplotlib; pip install 'stream-trainer[bench]'")


def svg_file(text: str) -> Path:
    """An option's path of a picture to write; its directory must be there."""
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text} is not an SVG file; end its name in .svg")
    return writable_file(text)


def read_rows(paths: Sequence[Path], part: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The list `part` of each result, one after the other; its rows have these keys.

    Raises SettingsError if a file does not hold it.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            found = json.loads(path.read_text())[part]
            if not all(set(keys) <= set(row) for row in found):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise SettingsError(
                f"{path} is not a result with {part} of {', '.join(keys)}; name a file that --json wrote"
            ) from None
        rows += found
    return rows


def new_figure(height: float) -> "Figure":
    """An empty picture of that height in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)  # inches
    return Figure(figsize=(WIDTH, height), layout=layout, facecolor="white")


def save(figure: "Figure", path: Path) -> None:
    """Write a picture as SVG, its directory too. Raises SettingsError if it cannot be written."""
    import matplotlib as mpl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same picture from the same figures: no date, and ids that follow from a salt.
        with mpl.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}); name another place") from None
