"""A picture of what `benchmarks.step_cost` measured: the time of our whole step over that of each other method.

    python -m benchmarks.step_cost.plot FILE... --plot OUT.svg [--scoring exact]

FILEs are what `benchmarks.step_cost --json` wrote, such as one for each workload; where two have the same pair of
methods on the same workload, the later file counts. Nothing is measured. `plain_k` is not drawn, for it never looks at
the other candidates; the table of ratios has it.
Exit codes: 0 done, 2 a mistake in the options.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.plotting import SMALL, need_matplotlib, new_figure, read_rows, save, svg_file
from benchmarks.common.reporting import OneLineParser, say
from benchmarks.step_cost.methods import SCORINGS
from benchmarks.step_cost.workloads import WORKLOADS, Workload
from stream_trainer.errors import SettingsError, StreamTrainerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = {
    "plain_all": "plain AdamW on all samples",
    "dattri": "dattri-llm",
    "opacus": "Opacus",
    "vmap": "torch.func vmap",
    "oracle": "autograd, one sample at a time",
}
OURS = "filter_then_weight"
COLOUR = "#0072B2"
ROW, FRAME = 0.22, 1.25  # inches: of a bar or a heading, and of all that is above and below them
GAP = 0.4  # rows between workloads

KEYS = ("workload", "method", "against", "time_ratio")

Row = Mapping[str, Any]
"""A row of a result's `summary`: it has `KEYS`; `method` is ours."""


def draw(summary: Iterable[Row], path: Path, scoring: str = "exact") -> None:
    """Write the picture of one way to score as SVG; of rows with the same key the last counts.

    Raises SettingsError if there is no ratio to draw, or the file cannot be written.
    """
    ratios = ratios_of(summary, scoring)
    if not ratios:
        raise SettingsError(f"{path} is not drawn: {OURS}/{scoring} was not measured against {', '.join(SHOWN)}")
    rows = sum(1 + len(group) + GAP for group in ratios.values()) - GAP
    figure = new_figure(FRAME + ROW * rows)
    panel = figure.subplots()
    _bars(panel, ratios)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_xlim(0, 1.12 * max(1, *(ratio for group in ratios.values() for ratio in group.values())))
    panel.set_xlabel("time of our step / time of the other's (medians)", fontsize=SMALL)
    panel.tick_params(axis="x", labelsize=SMALL)
    panel.tick_params(axis="y", length=0, labelsize=SMALL)
    panel.spines[["top", "left", "right"]].set_visible(False)
    figure.suptitle(
        f"Time of our whole step ({OURS}, scoring {scoring}) over that of other methods\nbelow 1: ours is cheaper",
        fontsize=SMALL + 2,
    )
    save(figure, path)


def ratios_of(summary: Iterable[Row], scoring: str) -> dict[str, dict[str, float]]:
    """Time ratios by workload and other method, in the order of the tables; of the same key the last counts."""
    found = {
        (row["workload"], row["against"]): float(row["time_ratio"])
        for row in summary
        if row["method"] == f"{OURS}/{scoring}"
    }
    groups = {
        workload: {against: found[workload, against] for against in SHOWN if (workload, against) in found}
        for workload in WORKLOADS
    }
    return {workload: group for workload, group in groups.items() if group}


def _bars(panel: "Axes", ratios: Mapping[str, Mapping[str, float]]) -> None:
    """A heading for each workload and its bars below."""
    # In front of the line at 1, which would strike text out otherwise.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    at, labels = 0.0, {}
    for workload, group in ratios.items():
        heading = _heading(WORKLOADS[workload])
        panel.text(0, at, heading, fontsize=SMALL, fontweight="bold", va="center_baseline", bbox=box, zorder=3)
        for against, ratio in group.items():
            at += 1
            labels[at] = SHOWN[against]
            panel.barh(at, ratio, height=0.7, color=COLOUR)
            place: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center_baseline"}
            panel.annotate(f"{ratio:.2f}", (ratio, at), fontsize=SMALL, bbox=box, zorder=3, **place)
        at += 1 + GAP
    panel.set_yticks(list(labels), list(labels.values()))
    panel.set_ylim(at - GAP - 0.4, -0.6)


def _heading(workload: Workload) -> str:
    adapters = "" if workload.lora_rank is None else f", LoRA of rank {workload.lora_rank}"
    return (
        f"{workload.name}: {workload.layers} layers of {workload.hidden}, vocabulary {workload.vocabulary}, "
        f"{workload.dtype}{adapters}, {workload.pool} samples of {workload.tokens} tokens"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code."""
    parser = OneLineParser(
        "python -m benchmarks.step_cost.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="results of benchmarks.step_cost")
    add("--plot", type=svg_file, required=True, metavar="OUT", help="where to write the picture, as SVG")
    add("--scoring", choices=tuple(SCORINGS), default="exact", help="of our step (exact)")
    args = parser.parse_args(arguments)
    try:
        need_matplotlib("--plot", args.plot)
        draw(read_rows(args.files, "summary", KEYS), args.plot, args.scoring)
    except StreamTrainerError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
