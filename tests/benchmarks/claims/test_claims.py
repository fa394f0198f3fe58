"""The benchmark of the papers' claims: what decides a direction, that budgets are equal, and the command itself."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from torch.nn import functional as F

from benchmarks.claims import __main__ as claims
from benchmarks.claims import cluster_ucb, dual_sft, gast, runs, weighing
from benchmarks.claims.__main__ import CLAIMS, QUICK
from benchmarks.claims.runs import Choice
from benchmarks.claims.table import Figure, judge, report, summarise
from benchmarks.learning import run as learning_run
from benchmarks.learning.methods import BATCH, FTW, POOL
from benchmarks.learning.run import Bench, warm_up
from benchmarks.learning.streams import Data
from stream_trainer.service import Summary, serve
from stream_trainer.settings.schema import Settings
from tests.helpers.learning import points
from tests.helpers.oracle import dense, make_batch, make_model

LOSS = Figure("loss", "ours", ("one", "two"), shown=("free",))
LENGTHS = tuple(6 + i * 5 % 7 for i in range(40))


def seed_of(ours: float | None, one: float | None, two: float | None = 9.0) -> dict[str, dict[str, float | None]]:
    return {"loss": {"ours": ours, "one": one, "two": two, "free": 0.0}}


@pytest.mark.parametrize(
    ("seeds", "shows"),
    [
        ([(1.0, 2.0), (3.0, 4.0)], "yes"),
        ([(1.0, 2.0), (3.0, 2.0)], "within noise"),
        ([(2.0, 1.0), (4.0, 3.0)], "no"),
        ([(1.0, 2.0)], "within noise"),
        ([(1.0, 1.0009), (1.0, 2.0)], "within noise"),
        ([(1.0009, 1.0), (2.0, 1.0)], "within noise"),
        ([(1.0, None), (1.0, None)], "yes"),
        ([(None, 1.0), (None, 1.0)], "no"),
        ([(None, None), (None, None)], "within noise"),
    ],
)
def test_a_direction_shows_if_every_seed_says_so(seeds: list[tuple[float | None, float | None]], shows: str) -> None:
    values = [seed_of(*pair, two=9.0 if pair[0] is not None else None) for pair in seeds]
    assert judge(LOSS, values) == shows


def test_every_rival_counts_and_more_may_be_better() -> None:
    assert judge(LOSS, [seed_of(2.0, 3.0, 1.0)] * 2) == "no"
    gain = Figure("loss", "ours", ("one",), higher=True)
    assert judge(gain, [seed_of(2.0, 1.0)] * 2) == "yes"
    assert judge(gain, [seed_of(None, 1.0)] * 2) == "no"


def test_the_table_has_a_row_for_each_arm() -> None:
    found = summarise("weighing", "it learns more", [LOSS], [seed_of(1.0, 2.0, None), seed_of(1.5, 1.25)])
    (figure,) = found["figures"]
    assert figure["values"]["ours"] == [1.0, 1.5]
    assert figure["seeds_ahead"] == {"one": 1, "two": 2}
    lines = report([found]).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[-6:] == ["2", "1.2500", "1.0000", "1.5000", "within", "noise"]
    assert lines[2].endswith("ahead of it 1 of 2")
    assert lines[3].split()[-9:-6] == ["-", "-", "-"], "a seed without a value leaves no median"
    assert lines[4].endswith("for scale")


def choice() -> tuple[Choice, torch.Tensor, torch.Tensor]:
    """A pool, its gradients (N, total) and the target's mean gradient (total,) by dense autograd."""
    model, target = make_model("llama"), make_batch((8, 6, 9), seed=4)
    halves = [make_batch(LENGTHS[:20], seed=2), make_batch(LENGTHS[20:], seed=3)]
    gradients = torch.cat([dense(model, half).gradients for half in halves])
    records = [{"id": str(i), "prompt": "", "response": ""} for i in range(len(LENGTHS))]
    return Choice(model, records, halves, [target]), gradients, dense(model, target).gradients.mean(0)


def test_all_gradients_find_the_best_and_a_fifth_costs_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_ucb, "SELECTED", 0.1)
    made, gradients, towards = choice()
    cosines_N = F.cosine_similarity(gradients, towards[None])
    utilities_N, arms = cluster_ucb.choose(made, seed=0)
    torch.testing.assert_close(utilities_N, cosines_N, rtol=1e-3, atol=1e-5)
    assert set(arms[cluster_ucb.ALL]) == set(utilities_N.topk(4).indices.tolist())
    assert {len(chosen) for chosen in arms.values()} == {4}
    fifth = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:8]
    assert list(arms[cluster_ucb.RANDOM]) == sorted(fifth.tolist(), key=lambda i: -float(utilities_N[i]))[:4]
    kept = {arm: cluster_ucb.share_kept(utilities_N, chosen, arms[cluster_ucb.ALL]) for arm, chosen in arms.items()}
    assert kept[cluster_ucb.ALL] == 1
    assert all(share <= 1 for share in kept.values())


def test_masks_and_subsets_of_all_arms_are_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_sft, "SELECTED", 0.2)
    made, gradients, towards = choice()
    before = {name: values.clone() for name, values in made.model.state_dict().items()}
    arms = dual_sft.choose(made, learning_rate=1e-3, seed=0)
    assert all(torch.equal(values, before[name]) for name, values in made.model.state_dict().items())
    assert {len(set(chosen.samples)) for chosen in arms.values()} == {8}
    assert {sum(int(part.sum()) for part in chosen.mask.values()) for chosen in arms.values()} == {
        round(dual_sft.RULE.density * gradients.shape[1])
    }
    together, cosine, largest, chance = (
        arms[name] for name in (dual_sft.TOGETHER, dual_sft.THEN_COSINE, dual_sft.LARGEST_THEN_COSINE, dual_sft.RANDOM)
    )
    best = F.cosine_similarity(gradients, towards[None]).topk(8).indices.tolist()
    assert set(cosine.samples) == set(largest.samples) == set(best)
    assert all(torch.equal(together.mask[name], cosine.mask[name]) for name in cosine.mask)
    names = list(dense(made.model, make_batch((4,))).parameters)
    squares = gradients.mean(0).square()
    kept = torch.cat([largest.mask[name].flatten() for name in names])
    by_chance = torch.cat([chance.mask[name].flatten() for name in names])
    assert squares[kept].mean() > 3 * squares[by_chance].mean()


def test_a_subset_is_trained_on_over_and_over() -> None:
    chosen = [{"id": f"r-{i}", "prompt": "p", "response": str(i)} for i in range(3)]
    stream = runs.over_subset(QUICK, chosen, seed=1)
    assert len(stream.records) == len({record["id"] for record in stream.records}) == BATCH * QUICK.steps
    counts = [sum(record["response"] == str(i) for record in stream.records) for i in range(3)]
    assert max(counts) - min(counts) <= 1
    assert stream == runs.over_subset(QUICK, chosen, seed=1) != runs.over_subset(QUICK, chosen, seed=2)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, threads = root.handlers[:], root.level, torch.get_num_threads()
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    torch.set_num_threads(threads)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, int]]:
    """Settings of every run of the service and the records of its stream, in order."""
    seen: list[tuple[Settings, int]] = []

    def recorded(settings: Settings, *others: Any) -> Summary:
        seen.append((settings, len(Path(str(settings.source.jsonl.path)).read_text().splitlines())))
        return serve(settings, *others)

    monkeypatch.setattr(runs, "serve", recorded)
    monkeypatch.setattr(learning_run, "serve", recorded)
    return seen


def options(directory: Path, file: Path, *others: str) -> list[str]:
    return [f"--data={directory}", f"--json={file}", "--seeds=1", "--quick", *others]


@pytest.mark.slow
@pytest.mark.usefixtures("logging_as_before")
def test_every_claim_from_the_warm_up_to_the_table(
    directory: Path, tmp_path: Path, capsys: Any, served: list[tuple[Settings, int]]
) -> None:
    file = tmp_path / "claims.json"
    assert claims.main(options(directory, file)) == 0
    result = json.loads(file.read_text())
    assert {"version", "date", "machine", "environment", "model", "steps"} <= set(result)
    assert [claim["claim"] for claim in result["claims"]] == list(CLAIMS)
    for claim in result["claims"]:
        for figure in claim["figures"]:
            arms = {figure["arm"], *figure["rivals"]}
            assert arms <= set(figure["values"])
            assert all(len(values) == 1 for values in figure["values"].values())
            assert figure["shows"] == "within noise", "one seed says nothing"
    shown = capsys.readouterr().out
    assert all(name in shown for name in (FTW, gast.EACH, dual_sft.TOGETHER, cluster_ucb.ARM))

    trained = served[1:]  # the first is the warm-up
    assert {settings.training.max_steps for settings, _ in trained} == {QUICK.steps}
    for settings, count in trained:
        selection = settings.selection
        masked_or_chosen = selection.weigh == "equal" and selection.draw == "all" and selection.batch_size == BATCH
        assert count == QUICK.steps * (BATCH if masked_or_chosen else POOL)
    each = [settings.selection for settings, _ in trained if settings.selection.route == "gast"]
    assert [(s.weigh, s.gast.per_layer) for s in each] == [("equal", 4)] * 2 + [(FTW, 2)] * 3
    assert sum(settings.selection.mask == "fixed" for settings, _ in trained) == 4

    assert claims.main(options(directory, file)) == 0
    assert len(served) == len(trained) + 1, "what is finished is not made again"
    again = json.loads(file.read_text())
    assert again["claims"] == result["claims"]


@pytest.mark.usefixtures("logging_as_before")
def test_what_is_finished_survives_a_stop(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: list[str] = []

    def train(bench: Bench, run: Any, reference: float | None) -> list[dict[str, Any]] | None:
        assert reference is None, "every arm makes all steps"
        if run.method == "top_k" and not resumed:
            bench.stop.set()
            return None
        made.append(run.method)
        return points([3.0, 2.0 if run.method == "uniform" else 1.0], 4, 4, 1.0)

    resumed = False
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(claims, "warm_up", lambda _bench, _tier: True)
    file = tmp_path / "claims.json"
    assert claims.main(options(directory, file, "--claims=weighing")) == 130
    assert json.loads(file.read_text())["claims"] == []
    assert "stopped" in capsys.readouterr().err
    resumed = True
    assert claims.main(options(directory, file, "--claims=weighing")) == 0
    assert sorted(made) == sorted(["uniform", FTW, "greedy", "top_k"] * len(weighing.STREAMS))
    loss, samples = json.loads(file.read_text())["claims"][0]["figures"][:2]
    assert loss["values"][FTW] == [1.0]
    assert samples["values"] == {FTW: [0.5], "greedy": [0.5], "top_k": [0.5], "uniform": [1.0]}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--claims=weighing,magic"], "magic"),
        (["--seeds=0"], "--seeds"),
        (["--threads=two"], "two"),
        (["--json=/nowhere/at/all.json"], "/nowhere/at/all.json"),
        (["--data=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(directory: Path, tmp_path: Path, capsys: Any, arguments: list[str], names: str) -> None:
    try:
        code = claims.main([*options(directory, tmp_path / "claims.json"), *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert names in lines[0]


def test_a_batch_of_the_pool_is_what_is_read(data: Data, tmp_path: Path) -> None:
    """Records and samples stay side by side, or the wrong ones would be trained on."""
    bench = Bench(data, tmp_path, 1, threading.Event(), lambda _: None)
    assert warm_up(bench, QUICK)
    made = runs.choice_from(bench, QUICK, "mixture", seed=0)
    samples: list[Batch] = [sample for batch in made.pool for sample in batch.samples()]
    assert len(samples) == len(made.records) == POOL * QUICK.steps
    for sample, record in zip(samples, made.records, strict=True):
        text = bytes(token for token in sample.input_ids_NT[0].tolist() if token < 256).decode(errors="replace")
        assert record["prompt"][-QUICK.prompt_chars :] in text
