"""The plan of `benchmarks.learning`: its order, and what its runs ask of the service."""

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learning.methods import FTW, METHODS, RIVALS, selection_of
from benchmarks.learning.plan import BROAD, REAL, Run, key, plan, quick
from benchmarks.learning.run import Bench, prepare, stream_of
from benchmarks.learning.streams import Data
from stream_trainer.settings.sections.selection import PREDICTS, SelectionSettings
from tests.helpers.learning import TINY


def test_the_plan_goes_seed_by_seed_with_the_reference_first() -> None:
    runs = plan([REAL])
    methods = list(REAL.streams["mixture"])
    assert [run.method for run in runs[: len(methods)]] == methods
    assert runs[0].method == "uniform"
    assert [run.seed for run in runs[: 3 * len(methods) : len(methods)]] == [0, 1, 2]
    assert Counter((run.stream, run.share) for run in runs) == {
        ("mixture", 25): 24,
        ("mixture", 10): 24,
        ("swapped", 25): 15,
        ("duplicates", 25): 15,
        ("copies", 25): 9,
        ("narrow", 25): 9,
    }
    chosen = plan([REAL, BROAD], ["drift"], [10], ["oracle"], 1)
    assert [str(run) for run in chosen] == [
        f"{tier} drift 10 % {method} seed 0" for tier in ("real", "broad") for method in ("uniform", "oracle")
    ]


def test_anchors_are_of_what_is_forgotten_and_in_no_test(data: Data, tmp_path: Path) -> None:
    run = Run(TINY, "narrow", 25, f"{FTW}+cluster_ucb+dual_sft/prior", 0)
    bench = Bench(data, tmp_path, 1, threading.Event(), lambda _: None)
    settings = prepare(bench, replace(run, tier=replace(TINY, warm_up_steps=0)), stream_of(data, run), tmp_path)
    assert settings.selection.dual_sft.anchor_path == tmp_path / "anchors.jsonl"
    anchors = [json.loads(line)["id"] for line in (tmp_path / "anchors.jsonl").read_text().splitlines()]
    assert anchors == [r["id"] for r in data.warm_up["roleplay"]][: TINY.retention]
    assert not set(anchors) & {r["id"] for r in data.retention}


@pytest.mark.parametrize("method", METHODS)
def test_the_service_accepts_every_method(method: str) -> None:
    found = SelectionSettings.model_validate(selection_of(METHODS[method]))
    assert (found.draw == "cluster_ucb") == ("cluster_ucb" in method or method.split("/")[0] == "everything")
    rival, _, then = method.partition("+")
    if rival in RIVALS:
        assert (found.draw, found.weigh) == (rival, then or "equal")
        assert found.num_drawn == (8 if then and "loss" not in rival else 4)
    elif found.draw not in PREDICTS:
        assert found.num_drawn == {"full": 16}.get(method, 4 if found.draw != "all" else 16)
    sketched = found.draw in PREDICTS or found.draw == "cluster_ucb" or "sketched" in method or then in (FTW,)
    assert found.scoring == ("sketched" if sketched else "exact")


def test_a_profile_refreshes_the_target_as_it_says_itself_and_others_as_their_tier_does(
    data: Data, tmp_path: Path
) -> None:
    tier = replace(TINY, warm_up_steps=0, refresh_samples=3)
    bench = Bench(data, tmp_path, 1, threading.Event(), lambda _: None)
    samples = {}
    for method in ("uniform", "thrifty", "thorough"):
        run = Run(tier, "mixture", 25, method, 0)
        settings = prepare(bench, run, stream_of(data, run), tmp_path)
        samples[method] = settings.target.refresh_samples
        assert settings.selection.profile == ("thrifty" if method == "thrifty" else "thorough")
    assert samples == {"uniform": 3, "thrifty": 4, "thorough": 8}


def test_quick_is_small() -> None:
    for tier in (REAL, BROAD):
        small = quick(tier)
        assert len(plan([small])) <= 5
        assert small.steps < tier.steps


def test_names_of_results_change_with_what_results_depend_on() -> None:
    run = Run(REAL, "mixture", 25, FTW, 0)
    names = {
        key(run, "data", 2),
        key(run, "other", 2),
        key(run, "data", 1),
        key(replace(run, seed=1), "data", 2),
        key(replace(run, share=10), "data", 2),
        key(replace(run, stream="drift"), "data", 2),
        key(replace(run, method="top_k"), "data", 2),
        key(replace(run, tier=replace(REAL, model={"name": "m"})), "data", 2),
        key(replace(run, tier=replace(REAL, steps=65)), "data", 2),
    }
    assert len(names) == 9
    assert key(replace(run, tier=replace(REAL, seeds=7)), "data", 2) in names, "more seeds are more files"
