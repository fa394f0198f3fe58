"""Pictures of what `benchmarks.learning` measured, as small SVG files: one pair for each tier, stream and share.

`learning-...svg` has the test loss against trained samples and against time, `chosen-...svg` the share of the target's
domain among the samples that were trained on. Curves are means over seeds, as far as every seed got.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.learning_streams import TARGET
from benchmarks.learning_summary import Curve, case_of

AXES = {"trained": "trained samples", "seconds": "seconds without evaluations"}


def draw(curves: Iterable[Curve], directory: Path) -> list[Path]:
    """Write the pictures into a directory. Returns their paths."""
    cases: dict[tuple[str, str, int], dict[str, list[Curve]]] = {}
    for curve in curves:
        cases.setdefault(case_of(curve), {}).setdefault(curve["method"], []).append(curve)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for case, methods in cases.items():
        for name, figure in (("learning", _learning(case, methods)), ("chosen", _chosen(case, methods))):
            path = directory / f"{name}-{'-'.join(map(str, case))}.svg"
            # The same picture from the same figures: no date, and ids that follow from a salt.
            with mpl.rc_context({"svg.hashsalt": path.stem}):
                figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            written.append(path)
    return written


def _learning(case: tuple[str, str, int], methods: Mapping[str, Sequence[Curve]]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (amount, label) in zip(panels, AXES.items(), strict=True):
        for method, group in methods.items():
            points = mean_points(group)
            panel.plot([p[amount] for p in points], [p["test"] for p in points], label=method, linewidth=1.2)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test loss (nats per token)")
    panels[1].legend(fontsize="x-small")
    figure.suptitle(_title(case, methods))
    return figure


def _chosen(case: tuple[str, str, int], methods: Mapping[str, Sequence[Curve]]) -> Figure:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    panel = figure.subplots()
    for method, group in methods.items():
        points = [point for point in mean_points(group)[1:] if point["share"] is not None]
        panel.plot([p["step"] for p in points], [100 * p["share"] for p in points], label=method, linewidth=1.2)
    panel.axhline(case[2], color="black", linestyle=":", linewidth=1)
    panel.set_xlabel("step")
    panel.set_ylabel(f"{TARGET} among trained samples (%); dotted: stated share")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small")
    figure.suptitle(_title(case, methods))
    return figure


def _title(case: tuple[str, str, int], methods: Mapping[str, Sequence[Curve]]) -> str:
    tier, stream, share = case
    seeds = max(len(group) for group in methods.values())
    return f"{tier}, {stream}, {share} % {TARGET}, mean of {seeds} seed{'s' if seeds > 1 else ''}"


def mean_points(group: Sequence[Curve]) -> list[dict[str, Any]]:
    """Means over seeds at each evaluation that all of them made; `share` is the target's part of what was trained on
    since the one before, None where that was nothing.
    """
    means: list[dict[str, Any]] = []
    for points in zip(*(curve["points"] for curve in group), strict=False):
        domains = [point["domains"] for point in points]
        total = sum(sum(counts.values()) for counts in domains)
        share = sum(counts.get(TARGET, 0) for counts in domains) / total if total else None
        mean = {name: fmean(point[name] for point in points) for name in ("step", "test", *AXES)}
        means.append(mean | {"share": share})
    return means
