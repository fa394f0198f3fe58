"""The pictures of the benchmarks: what they show, that results can be drawn again, and that mistakes are one line."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import plotting
from benchmarks.learning import plots as learning_plots
from benchmarks.learning.methods import METHODS, REFERENCE
from benchmarks.learning.streams import TARGET
from benchmarks.step_cost import __main__ as step_cost
from benchmarks.step_cost import plot as step_cost_plot
from benchmarks.step_cost.interleaving import Result
from benchmarks.step_cost.methods import AGAINST
from benchmarks.step_cost.workloads import WORKLOADS

EXACT = f"{step_cost_plot.OURS}/exact"


@pytest.fixture(autouse=True)
def _drawing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pytest.importorskip("matplotlib", reason="the extra bench is not installed")


def ratio(against: str, value: float, workload: str = "W1", method: str = EXACT) -> dict[str, Any]:
    return {"workload": workload, "method": method, "against": against, "time_ratio": value, "memory_ratio": 1.0}


def curve(method: str, seed: int, losses: Sequence[float], **case: Any) -> dict[str, Any]:
    where = {"tier": "real", "stream": "mixture", "target_share": 25, "method": method, "seed": seed}
    points = [
        {"step": i, "trained": 4 * i, "seconds": 1.5 * i, "test": loss, "domains": {TARGET: i, "tools": i}}
        for i, loss in enumerate(losses)
    ]
    return where | case | {"points": points}


def result(path: Path, **parts: Any) -> str:
    path.write_text(json.dumps(parts))
    return str(path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written, as matplotlib knows them."""
    figures: list[Any] = []
    for module in (step_cost_plot, learning_plots):
        monkeypatch.setattr(module, "save", lambda figure, _path: figures.append(figure))
    return figures


def bars(panel: Any) -> list[float]:
    return [float(bar.get_width()) for bar in panel.patches]


def labels(panel: Any) -> list[str]:
    return [str(label) for label in panel.get_legend_handles_labels()[1]]


def test_a_bar_is_a_ratio_of_the_stated_scoring(drawn: list[Any]) -> None:
    rows = [
        ratio("dattri", 0.5),
        ratio("plain_all", 1.5),
        ratio("plain_all", 0.9, method=f"{step_cost_plot.OURS}/sketched"),
    ]
    step_cost_plot.draw([*rows, ratio("oracle", 0.25, "W3"), ratio("plain_k", 4.0)], Path("x.svg"))
    step_cost_plot.draw(rows, Path("x.svg"), "sketched")
    exact, sketched = (figure.axes[0] for figure in drawn)
    assert bars(exact) == [1.5, 0.5, 0.25]
    assert bars(sketched) == [0.9]
    texts = [text.get_text() for text in exact.texts]
    assert [text for text in texts if text[0] != "W"] == ["1.50", "0.50", "0.25"]
    assert [text.partition(":")[0] for text in texts if text[0] == "W"] == ["W1", "W3"]
    assert [line.get_xdata() for line in exact.lines] == [[1, 1]]
    for figure, scoring in zip(drawn, ("exact", "sketched"), strict=True):
        title = figure.get_suptitle()
        assert scoring in title
        assert "below 1: ours is cheaper" in title


def test_of_the_same_pair_the_later_file_counts(tmp_path: Path, drawn: list[Any]) -> None:
    first = result(tmp_path / "1.json", summary=[ratio("plain_all", 2.0), ratio("vmap", 0.4)])
    second = result(tmp_path / "2.json", summary=[ratio("plain_all", 1.0), ratio("opacus", 0.3, "W2")])
    assert step_cost_plot.main([first, second, "--plot", str(tmp_path / "cost.svg")]) == 0
    assert bars(drawn[0].axes[0]) == [1.0, 0.4, 0.3]


def test_the_command_draws_the_first_scoring_that_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[Any]
) -> None:
    seconds = {f"{step_cost_plot.OURS}/sketched": 1.0, EXACT: 3.0, "top_k": 2.0, "plain_all": 4.0}
    runs = [{"workload": "W1", "method": name, "median_s": s, "peak_bytes": 1} for name, s in seconds.items()]
    monkeypatch.setattr(step_cost, "measure", lambda *_: Result(runs=runs))
    arguments = [f"--json={tmp_path / 'cost.json'}", f"--plot={tmp_path / 'cost.svg'}", "--workloads=W1"]
    assert step_cost.main([*arguments, "--scoring=sketched,exact"]) == 0
    assert bars(drawn[0].axes[0]) == [0.25]


def test_every_other_method_but_one_has_a_name_in_the_picture() -> None:
    assert set(step_cost_plot.SHOWN) == set(AGAINST) - {"plain_k"}
    every = [ratio(against, 1.0, workload) for against in AGAINST for workload in WORKLOADS]
    found = step_cost_plot.ratios_of(every, "exact")
    assert list(found) == list(WORKLOADS)
    assert {tuple(group) for group in found.values()} == {tuple(step_cost_plot.SHOWN)}


def test_both_panels_show_every_seed_the_median_and_where_uniform_ends(drawn: list[Any]) -> None:
    curves = [curve("uniform", seed, [3.0, 2.5, 2.0 + 0.1 * seed]) for seed in range(3)]
    learning_plots.draw([*curves, curve("top_k", 0, [3.0, 2.0])], Path("plots"))
    learning, chosen = drawn
    for panel, amount in zip(learning.axes, (4, 1.5), strict=True):
        thick = [line for line in panel.lines if not line.get_label().startswith("_")]
        assert labels(panel) == ["uniform", "top-k", "where uniform ends: 2.100"]
        assert list(thick[0].get_xdata()) == [0, amount, 2 * amount]
        assert list(thick[0].get_ydata()) == [3.0, 2.5, 2.1]
        assert list(thick[1].get_ydata()) == [3.0, 2.0]
        assert set(thick[2].get_ydata()) == {2.1}
        single = [line for line in panel.lines if line.get_alpha() is not None]
        assert [line.get_ydata()[-1] for line in single] == [2.0, 2.1, 2.2]
        assert {line.get_color() for line in single} == {thick[0].get_color()} != {thick[1].get_color()}
    assert [axis.get_xlabel() for axis in learning.axes] == list(learning_plots.AXES.values())
    assert "median of 3 seeds" in learning.get_suptitle()
    assert labels(chosen.axes[0]) == ["uniform", "top-k", "in the stream: 25 %"]
    assert list(chosen.axes[0].lines[0].get_ydata()) == [50.0, 50.0]


def test_points_are_medians_as_far_as_every_seed_got() -> None:
    losses = ([3.0, 2.0], [2.0, 1.0, 0.5], [9.0, 1.5])
    found = learning_plots.middle_points([curve("top_k", seed, each) for seed, each in enumerate(losses)])
    assert [point["test"] for point in found] == [3.0, 1.5]
    assert [point["share"] for point in found] == [None, 0.5]


def test_without_uniform_there_is_no_line_for_its_end(drawn: list[Any]) -> None:
    learning_plots.draw([curve("top_k", 0, [3.0, 2.0])], Path("plots"))
    assert labels(drawn[0].axes[0]) == ["top-k"]


def test_many_methods_are_two_pictures_and_no_two_look_alike(drawn: list[Any]) -> None:
    written = learning_plots.draw([curve(method, 0, [3.0, 2.0]) for method in METHODS], Path("plots"))
    kinds = ("learning", "chosen", "learning-ablations", "chosen-ablations")
    assert [path.name for path in written] == [f"{kind}-real-mixture-25.svg" for kind in kinds]
    for figure in drawn:
        lines = figure.axes[0].get_legend_handles_labels()[0]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)
    shown = {label for figure in drawn for label in labels(figure.axes[0])}
    assert {learning_plots.NAMES.get(method, method) for method in METHODS} <= shown
    assert set(learning_plots.NAMES) <= set(METHODS) - {REFERENCE}


def test_curves_of_several_files_are_drawn_together(tmp_path: Path, drawn: list[Any], capsys: Any) -> None:
    other = curve("uniform", 0, [3.0, 1.0], target_share=10)
    first = result(tmp_path / "1.json", curves=[curve("uniform", 0, [3.0, 2.0]), curve("top_k", 0, [3.0, 1.5]), other])
    second = result(tmp_path / "2.json", curves=[curve("uniform", 0, [3.0, 2.5]), curve("uniform", 1, [3.0, 2.7])])
    assert learning_plots.main([first, second, "--plots", str(tmp_path / "plots")]) == 0
    assert labels(drawn[0].axes[0]) == ["uniform", "top-k", "where uniform ends: 2.600"]
    assert labels(drawn[2].axes[0]) == ["uniform", "where uniform ends: 1.000"]
    assert capsys.readouterr().out.count(".svg\n") == 4


def test_the_same_figures_are_the_same_file(tmp_path: Path) -> None:
    curves = [curve("uniform", seed, [3.0, 2.0]) for seed in range(2)]
    written: list[list[bytes]] = []
    for name in ("a", "b"):
        step_cost_plot.draw([ratio("plain_all", 0.9)], tmp_path / name / "cost.svg")
        paths = [tmp_path / name / "cost.svg", *learning_plots.draw(curves, tmp_path / name)]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    for content in written[0]:
        assert content.rstrip().endswith(b"</svg>")
        assert b"<dc:date>" not in content


Main = Callable[[Sequence[str]], int]
COST: tuple[Main, str] = (step_cost_plot.main, "--plot=cost.svg")
LEARNING: tuple[Main, str] = (learning_plots.main, "--plots=plots")


@pytest.mark.parametrize(("main", "option"), [COST, LEARNING])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": []}', '{"summary": [{}], "curves": [{}]}'])
def test_a_file_that_is_no_result_is_named(
    main: Main, option: str, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("result.json").write_text(content)
    assert main(["result.json", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: result.json is not a result")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plot=cost.png"], "cost.png is not an SVG file"),
        (["--plot=nowhere/cost.svg"], "cannot be written"),
        (["--plot=cost.svg", "--scoring=rough"], "rough"),
        (["--plot=cost.svg", "--scoring=rank_one"], "filter_then_weight/rank_one was not measured"),
        ([], "--plot"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = step_cost_plot.main([result(tmp_path / "1.json", summary=[ratio("plain_all", 1.0)]), *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert says in line


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, capsys: Any) -> None:
    file = result(tmp_path / "1.json", curves=[curve("uniform", 0, [3.0, 2.0])])
    assert learning_plots.main([file, "--plots", file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1.json" in line


def test_without_matplotlib_nothing_is_measured_or_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda _name: None)
    plot = f"--plot={tmp_path / 'cost.svg'}"
    assert step_cost.main([f"--json={tmp_path / 'cost.json'}", plot]) == 2
    assert step_cost_plot.main(["1.json", plot]) == 2
    assert learning_plots.main(["1.json", "--plots=plots"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("needs matplotlib; pip install 'stream-trainer[bench]'" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
