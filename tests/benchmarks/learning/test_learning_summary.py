"""What `benchmarks.learning` counts within a run, and the ratios and shares it makes of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Decision

from benchmarks.learning import run as run_module
from benchmarks.learning.methods import FTW
from benchmarks.learning.run import Watch
from benchmarks.learning.streams import CLEAN, COPY, SWAPPED, Data, Label
from benchmarks.learning.summary import clean_share, needed, summarise
from stream_trainer.training.step import StepReport
from tests.helpers.learning import curve, fake_bench, points


def test_what_is_needed_lies_between_two_evaluations() -> None:
    found = points([3.0, 2.0, 1.0], samples=4, scored=16, seconds=10.0)
    assert needed(found, "trained", 1.5) == pytest.approx(6.0)
    assert needed(found, "seconds", 2.75) == pytest.approx(2.5)
    assert needed(found, "trained", 1.0) == 8.0
    assert needed(found, "trained", 0.9) is None
    assert needed(found, "trained", 3.0) == 0.0
    assert needed(found, "trained", 0.75, loss="target") == pytest.approx(6.0)


def test_the_first_crossing_counts() -> None:
    assert needed(points([3.0, 1.0, 2.0, 1.0], 4, 4, 1.0), "trained", 2.0) == pytest.approx(2.0)


def test_ratios_are_to_uniform_on_the_same_seed() -> None:
    rows = summarise(
        [
            curve("uniform", 0, [3.0, 2.5, 2.0]),
            curve(FTW, 0, [3.0, 2.0], scored=16, seconds=3.0),
            curve("uniform", 1, [4.0, 3.5, 3.0]),
            curve(FTW, 1, [4.0, 2.0], scored=16, seconds=3.0),
        ]
    )
    uniform, ours = rows
    assert [uniform[name] for name in ("samples_ratio", "gradients_ratio", "seconds_ratio")] == [1.0, 1.0, 1.0]
    # Seed 0 reaches 2.0 after one step of two; seed 1 reaches 3.0 after half a step of two.
    assert ours["samples_ratio"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert ours["gradients_ratio"] == pytest.approx(4 * (1 / 2 + 1 / 4) / 2)
    assert ours["seconds_ratio"] == pytest.approx(3 * (1 / 2 + 1 / 4) / 2)
    assert (ours["seeds"], ours["reached"], ours["steps"]) == (2, 2, 1)
    assert ours["final_loss"] == pytest.approx(2.0)
    assert ours["retention_loss"] == pytest.approx(3.0)
    assert ours["retention_at_level"] is not None
    assert ours["retention_at_level"] < 3.0, "read where the level was reached, before the end"
    assert ours["retention_at_target"] == pytest.approx(ours["retention_at_level"]), "half of the same loss"


@pytest.mark.parametrize(("missed", "expected"), [(1, 0.5), (2, None)])
def test_a_seed_that_never_gets_there_counts_as_infinite(missed: int, expected: float | None) -> None:
    curves = [curve("uniform", seed, [3.0, 2.5, 2.0]) for seed in range(3)]
    curves += [curve("top_k", seed, [3.0, 2.9 if seed < missed else 2.0]) for seed in range(3)]
    row = summarise(curves)[1]
    assert row["samples_ratio"] == expected
    assert row["reached"] == 3 - missed


def test_there_is_no_ratio_without_a_reference_or_to_one_that_learned_nothing() -> None:
    assert summarise([curve("top_k", 0, [3.0, 2.0])])[0]["samples_ratio"] is None
    rows = summarise([curve("uniform", 0, [3.0, 3.5]), curve("top_k", 0, [3.0, 2.0])])
    assert [row["samples_ratio"] for row in rows] == [None, None]


def test_cases_are_kept_apart() -> None:
    other = curve("uniform", 0, [3.0, 1.0]) | {"target_share": 10}
    rows = summarise([curve("uniform", 0, [3.0, 2.0]), other, curve("top_k", 0, [3.0, 2.0])])
    assert [row["target_share"] for row in rows] == [25, 10, 25]
    assert rows[2]["samples_ratio"] == pytest.approx(1.0)


def kinds_at(*points: tuple[int, dict[str, int]]) -> list[dict[str, Any]]:
    return [{"step": step, "kinds": kinds} for step, kinds in points]


def test_the_share_of_clean_samples_counts_each_as_often_as_it_was_trained_on() -> None:
    found = kinds_at((0, {}), (4, {SWAPPED: 12}), (8, {CLEAN: 3, SWAPPED: 1}), (12, {CLEAN: 1, COPY: 1}))
    assert clean_share(found) == pytest.approx(4 / 18)
    assert clean_share(found, since=4) == pytest.approx(4 / 6), "what was trained on until step 4 counts no more"
    assert clean_share(found, since=5) == pytest.approx(1 / 2), "nor does what is half before"
    assert clean_share(found, since=12) is None
    assert clean_share(kinds_at((0, {}), (4, {}))) is None, "nothing was trained on"


def test_shares_of_clean_samples_are_means_over_seeds() -> None:
    def run(seed: int, *kinds: dict[str, int]) -> dict[str, Any]:
        made = curve("uniform", seed, [3.0] * len(kinds))
        return made | {"points": [point | {"kinds": each} for point, each in zip(made["points"], kinds, strict=True)]}

    first = run(0, {}, {SWAPPED: 2}, {CLEAN: 2})
    (row,) = summarise([first, run(1, {}, {CLEAN: 6}, {SWAPPED: 2})])
    assert row["clean_share"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert row["clean_share_later"] == pytest.approx((1 + 0) / 2), "from the middle of each run on"
    (row,) = summarise([first, run(1, {}, {CLEAN: 6})])
    assert row["clean_share_later"] is None, "one of the seeds was evaluated at its end only"


def test_a_run_ends_one_evaluation_after_it_has_reached_the_reference(data: Data) -> None:
    bench = fake_bench(data)
    watch = Watch(stop=bench.stop, given_up=bench.stop, labels={}, reference=2.0, tell=bench.tell)
    for step, loss in enumerate((3.0, 2.0, 2.1)):
        assert not watch.stop.is_set()
        watch.on_evaluation(step, {"test": loss, "retention": 1.0}, 0.0)
    assert watch.stop.is_set()
    assert watch.points[0]["seconds"] == 0.0


def test_neither_evaluations_nor_what_comes_before_the_first_step_count(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = fake_bench(data)
    watch = Watch(stop=bench.stop, given_up=bench.stop, labels={}, reference=None, tell=bench.tell)
    report = StepReport("applied", (), (), Decision(torch.zeros(0)))

    def tell_at(second: float, what: Callable[..., None], *arguments: Any) -> None:
        monkeypatch.setattr(run_module, "_clocks", lambda: (second, second / 2))
        what(*arguments)

    tell_at(100.0, watch.on_evaluation, 0, {"test": 3.0}, 0.0)
    tell_at(110.0, watch.on_checkpoint, 0, Path())
    tell_at(113.0, watch.on_step, 1, [], report)
    tell_at(120.0, watch.on_evaluation, 1, {"test": 2.0}, 7.0)
    tell_at(125.0, watch.on_step, 2, [], report)
    tell_at(126.0, watch.on_evaluation, 2, {"test": 2.0}, 1.0)
    assert [(point["seconds"], point["cpu_seconds"]) for point in watch.points] == [(0, 0), (3, 1.5), (8, 4)]


def test_samples_are_counted_by_domain_between_evaluations(data: Data) -> None:
    bench = fake_bench(data)
    labels = {"a": Label("math"), "b": Label("tools", COPY), "c": Label("math")}
    watch = Watch(stop=bench.stop, given_up=bench.stop, labels=labels, reference=None, tell=bench.tell)
    pool: Any = [type("Sample", (), {"id": name})() for name in labels]
    report = StepReport("applied", (1.0,) * 3, (1.0, 0.0, 0.5), Decision(torch.tensor([1.0, 0.0, 0.5])))
    watch.on_evaluation(0, {"test": 3.0}, 0.0)
    watch.on_step(1, pool, report)
    watch.on_step(2, pool, replace(report, coefficients=(0.0, 1.0, 0.0)))
    watch.on_evaluation(2, {"test": 2.0}, 0.0)
    watch.on_evaluation(3, {"test": 2.0}, 0.0)
    point = watch.points[1]
    assert (point["trained"], point["scored"]) == (3, 6)
    assert (point["domains"], point["kinds"]) == ({"math": 2, "tools": 1}, {CLEAN: 2, COPY: 1})
    assert watch.points[2]["domains"] == {}
