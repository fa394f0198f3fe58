"""Pictures of what `benchmarks.learning` measured, as small SVG files: some for each tier, stream and share.

    python -m benchmarks.learning.plots FILE... --plots DIR

FILEs are what `benchmarks.learning --json` wrote; where two have the same run, the later file counts. Nothing is run.

`learning-...svg` has the test loss against samples trained on and against time, `chosen-...svg` the share of the
target's domain among the samples that were trained on. Lines are medians over seeds, as far as every seed got, with a
dot for each evaluation; thin ones are single seeds. Of more than eight methods the ablations are in pictures of their
own, `learning-ablations-...svg` and `chosen-ablations-...svg`. Exit codes: 0 done, 2 a mistake in the options.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.common.plotting import SMALL, need_matplotlib, new_figure, read_rows, save
from benchmarks.common.reporting import OneLineParser, say
from benchmarks.learning.methods import FTW, METHODS, REFERENCE
from benchmarks.learning.plan import CORE
from benchmarks.learning.streams import TARGET
from benchmarks.learning.summary import Curve, case_of
from stream_trainer.errors import StreamTrainerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"trained": "samples trained on", "seconds": "seconds (evaluations not counted)"}
MOST = 8  # methods that one picture can hold
COLUMNS = 3  # of the legend
KEYS = ("tier", "stream", "target_share", "method", "seed", "points")  # of a curve
NAMES = {
    FTW: "filter-then-weight",
    f"{FTW}+cluster_ucb": "filter-then-weight + ClusterUCB",
    f"{FTW}+cluster_ucb+min_gain": "ClusterUCB, least gain 5 %",
    "oracle": f"oracle: {TARGET} only",
    "top_k": "top-k",
    "everything": "all four methods",
    "full": "full: all 16",
    f"{FTW}+sketched": "filter-then-weight, sketched",
    f"{FTW}+gast": "filter-then-weight + GAST",
    f"{FTW}+dual_sft": "filter-then-weight + DualSFT",
    f"{FTW}+cluster_ucb+dual_sft/prior": "ClusterUCB + guarded DualSFT",
    f"{FTW}+equal_coefficients": "filter-then-weight, equal coefficients",
    f"{FTW}+plain_preconditioner": "filter-then-weight, plain inner products",
    "shuffled_target": "shuffled target",
    f"{FTW}+gast/random_k_per_layer": "GAST's control: random, by layer",
    f"{FTW}+gast/random_k_shared": "GAST's control: random, shared",
    f"{FTW}+gast/top_k_per_layer": "GAST's control: best, by layer",
    "thrifty": "profile thrifty",
    "thorough": "profile thorough",
    "auto": "profile auto",
    "nearest": "nearest",
    "near_random": "near-random, no copies",
    "knn_kde": "KNN-KDE",
    "dsir": "DSIR",
    "lowest_loss": "lowest loss",
    "middle_loss": "middle loss",
}
COLOURS = ("#0072B2", "#D55E00", "#7F7F7F", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C564B", "#332288")
STROKES = ("-", "--", ":", "-.")
THICK: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 3.5}
THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.4}

Case = tuple[str, str, int]
Groups = Mapping[str, Sequence[Curve]]
"""Curves of one case, a list of seeds by method."""


def draw(curves: Iterable[Curve], directory: Path) -> list[Path]:
    """Write the pictures into a directory; of curves of the same run the last counts. Returns their paths.

    Raises SettingsError if they cannot be written.
    """
    runs = {(case_of(curve), curve["method"], curve["seed"]): curve for curve in curves}
    cases: dict[Case, dict[str, list[Curve]]] = {}
    for (case, method, _), curve in runs.items():
        cases.setdefault(case, {}).setdefault(method, []).append(curve)
    written = []
    for case, methods in cases.items():
        for suffix, groups in _pictures(methods).items():
            for kind, figure in (("learning", _learning(case, groups)), ("chosen", _chosen(case, groups))):
                written.append(directory / f"{kind}{suffix}-{'-'.join(map(str, case))}.svg")
                save(figure, written[-1])
    return written


def _pictures(methods: Groups) -> dict[str, Groups]:
    """The methods of each picture by what its name has more, in the order of the table of methods."""
    ordered = {name: methods[name] for name in (*METHODS, *methods) if name in methods}
    if len(ordered) <= MOST:
        return {"": ordered}
    core = {name: group for name, group in ordered.items() if name in CORE}
    ablations = {name: group for name, group in ordered.items() if name not in CORE or name in (REFERENCE, FTW)}
    return {"": core, "-ablations": ablations}


def _learning(case: Case, groups: Groups) -> "Figure":
    figure = new_figure(_height(groups))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (amount, label) in zip(panels, AXES.items(), strict=True):
        for method, group in groups.items():
            for curve in group if len(group) > 1 else ():
                _line(panel, method, [(p[amount], p["test"]) for p in curve["points"]], **THIN)
            points = [(p[amount], p["test"]) for p in middle_points(group)]
            _line(panel, method, points, label=NAMES.get(method, method), **THICK)
        if REFERENCE in groups:
            end = middle_points(groups[REFERENCE])[-1]["test"]
            panel.axhline(end, color="black", linestyle="--", linewidth=0.9, label=f"where uniform ends: {end:.3f}")
        _frame(panel, label)
    panels[0].set_ylabel("test loss (nats per token)", fontsize=SMALL)
    _finish(figure, panels[0], f"Test loss on {TARGET}", case, _seeds(groups, "thick: median of {} seeds"))
    return figure


def _chosen(case: Case, groups: Groups) -> "Figure":
    figure = new_figure(_height(groups))
    panel = figure.subplots()
    for method, group in groups.items():
        points = [(p["step"], 100 * p["share"]) for p in middle_points(group)[1:] if p["share"] is not None]
        _line(panel, method, points, label=NAMES.get(method, method), **THICK)
    panel.axhline(case[2], color="black", linestyle=":", linewidth=0.9, label=f"in the stream: {case[2]} %")
    panel.set_ylim(0, 102)
    _frame(panel, "step")
    panel.set_ylabel(f"{TARGET} among samples trained on (%)", fontsize=SMALL)
    _finish(figure, panel, f"What was trained on: share of {TARGET}", case, _seeds(groups, "{} seeds together"))
    return figure


def _height(groups: Groups) -> float:
    """Inches: those of the panels, and of the legend with one more line than there are methods."""
    return 3.7 + 0.2 * ceil((len(groups) + 1) / COLUMNS)


def _seeds(groups: Groups, several: str) -> str:
    """How many seeds a line stands for; `several` are the words for more than one."""
    count = max(len(group) for group in groups.values())
    return several.format(count) if count > 1 else "1 seed"


def _line(panel: "Axes", method: str, points: Sequence[tuple[float, float]], **style: Any) -> None:
    panel.plot([x for x, _ in points], [y for _, y in points], **_style(method), **style)


def _style(method: str) -> dict[str, Any]:
    """Uniform is black; each other method looks the same in every picture: the first nine solid, the next dashed."""
    others = [name for name in METHODS if name != REFERENCE]
    if method not in others:
        return {"color": "black"}
    round_, at = divmod(others.index(method), len(COLOURS))
    return {"color": COLOURS[at], "linestyle": STROKES[round_ % len(STROKES)]}


def _frame(panel: "Axes", label: str) -> None:
    panel.set_xlabel(label, fontsize=SMALL)
    panel.tick_params(labelsize=SMALL)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _finish(figure: "Figure", panel: "Axes", what: str, case: Case, how: str) -> None:
    """The title, and below the panels one legend for all of them."""
    tier, stream, share = case
    figure.suptitle(f"{what} (tier {tier}, stream {stream}, {share} % {TARGET}; {how})", fontsize=SMALL + 2)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=COLUMNS, fontsize=SMALL, frameon=False)


def middle_points(group: Sequence[Curve]) -> list[dict[str, Any]]:
    """Medians over seeds at each evaluation that all of them made; `share` is the target's part of what all trained on
    since the one before, None where that was nothing.
    """
    found: list[dict[str, Any]] = []
    for points in zip(*(curve["points"] for curve in group), strict=False):
        domains = [point["domains"] for point in points]
        total = sum(sum(counts.values()) for counts in domains)
        share = sum(counts.get(TARGET, 0) for counts in domains) / total if total else None
        middle = {name: median(point[name] for point in points) for name in ("step", "test", *AXES)}
        found.append(middle | {"share": share})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code."""
    parser = OneLineParser(
        "python -m benchmarks.learning.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results of benchmarks.learning")
    parser.add_argument("--plots", type=Path, required=True, metavar="DIR", help="where to write the pictures, as SVG")
    args = parser.parse_args(arguments)
    try:
        need_matplotlib("--plots", args.plots)
        written = draw(read_rows(args.files, "curves", KEYS), args.plots)
    except StreamTrainerError as error:
        say(f"error: {error}")
        return error.exit_code
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
