"""The GPU script: that it does the right work within its time and reports all of it, never how fast it is."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import engine
from gradient_selectors.capture.factors import nonzero_samples
from gradient_selectors.weigh.selector import equal_coefficients
from torch import Tensor

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import check, measure, models, profiling
from benchmarks.gpu.measure import Budget, Result
from benchmarks.gpu.methods import METHODS, REFRESH_STEPS, Bench, Method
from benchmarks.gpu.report import summarise
from benchmarks.gpu.shapes import CHOSEN, SHAPES, TINY, TINY_SHAPES, TINY_TOKENS, TOKENS, Case, Shape, cases
from benchmarks.step_cost.agreement import DisagreementError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Case(TINY, TINY_TOKENS[0])
BY_NAME = {method.name: method for method in METHODS}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

DRY_RUN = """
import sys
for package in ("pydantic", "pydantic_settings", "kafka", "prometheus_client"):
    sys.modules[package] = None  # as if it were not installed
from benchmarks.gpu.__main__ import main
code = main(sys.argv[1:])
print(sorted(name for name in sys.modules if name.startswith("stream_trainer.")))
sys.exit(code)
"""


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class FakeBench:
    """Steps that take so many seconds for each unit of a case's work, and fail where they are told to."""

    events: list[str]
    clock: Clock
    pace: float
    fails: dict[str, Exception]

    def __init__(self, case: Case, device: torch.device) -> None:
        if "make" in self.fails:
            raise self.fails["make"]
        self.case, self.device = case, device

    def begin(self, method: Method) -> None:
        self.events.append(method.name)

    def step(self, method: Method) -> int:
        if method.name in self.fails:
            raise self.fails[method.name]
        self.clock.now += self.pace * self.case.work
        return CHOSEN

    def rest(self) -> None:
        self.events.append("rest")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeBench]:
    """Benches without models, on a clock of their own."""
    FakeBench.events, FakeBench.clock, FakeBench.pace, FakeBench.fails = [], Clock(), 1e-9, {}
    monkeypatch.setattr(measure, "Bench", FakeBench)
    monkeypatch.setattr(measure, "time", FakeBench.clock)
    monkeypatch.setattr(measure, "phases", lambda *_: {"score": 1.0})
    monkeypatch.setattr(measure, "_free", lambda _: None)
    return FakeBench


def run(todo: list[Case], seconds: float = 1e9, repeats: int = 2) -> Result:
    budget = Budget(FakeBench.clock.now + seconds)
    return measure.measure(todo, CPU, budget, repeats, lambda _: None)


def gradient_of(bench: Bench, ids_NT: Tensor) -> dict[str, Tensor]:
    bench.backward_plainly(ids_NT)
    return {name: p.grad.clone() for name, p in bench.parameters.items() if p.grad is not None}


def test_a_dry_run_needs_nothing_of_the_service_and_reports_every_case(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    arguments = ["--json", str(path), "--device", "cpu", "--tiny", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"  # no module of the service
    written = json.loads(path.read_text())
    assert {"version", "date", "machine", "gpu", "passes", "versions", "agreement", "synchronisations"} <= set(written)
    assert written["passes"] == "bfloat16"
    assert {row["way"] for row in written["agreement"]} == {"scored", "equal"}
    assert all(row["error"] <= row["allowed"] for row in written["agreement"])
    assert len(written["cases"]) == len(TINY_SHAPES) * len(TINY_TOKENS)
    found = {(row["shape"], row["tokens"], row["method"]) for row in (*written["runs"], *written["missing"])}
    assert found == {
        (shape.name, tokens, method.name) for shape in TINY_SHAPES for tokens in TINY_TOKENS for method in METHODS
    }
    measured = {(row["shape"], row["method"]) for row in written["runs"]}
    assert {("tiny", method.name) for method in METHODS} <= measured
    for row in written["runs"]:
        assert row["median_s"] > 0
        assert 0 < row["selected"] <= row["samples"]
        assert row["peak_bytes"] is None
        expected = (
            {"target", "score", "weigh", "update", "optimizer"} if row["method"] in ("select", "probe") else set()
        )
        assert expected <= set(row.get("phases", ()))
    assert {("select", "plain_all"), ("probe", "plain_k")} <= {
        (row["method"], row["against"]) for row in written["summary"]
    }


def test_shapes_count_the_weights_of_matrix_products() -> None:
    for shape in (TINY, replace(TINY, tied=False)):
        model = models.make_model(Case(shape, 8), CPU)
        weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
        head = 0 if "lm_head.weight" in weights else shape.hidden * shape.vocabulary
        assert shape.weights == sum(weights.values()) + head
    assert [round(shape.weights / 1e6) for shape in SHAPES] == [134, 1236, 6607]


def test_the_dearest_come_last_and_nothing_twice() -> None:
    todo = cases(SHAPES, TOKENS)
    assert len({case.name for case in todo}) == len(SHAPES) * len(TOKENS)
    assert [case.work for case in todo] == sorted(case.work for case in todo)
    assert all(case.pool in (2 * CHOSEN, 4 * CHOSEN) for case in todo)
    assert todo[-1] == Case(SHAPES[-1], TOKENS[-1])


def test_methods_are_interleaved_and_rest_after_each_repetition(fakes: type[FakeBench]) -> None:
    result = run([SMALL])
    one_round = [event for method in METHODS for event in (method.name, "rest")]
    assert fakes.events == 3 * one_round  # the first is not counted
    assert [row["method"] for row in result.runs] == [method.name for method in METHODS]
    assert all(len(row["repetitions"]) == 2 for row in result.runs)
    assert {row["method"] for row in result.runs if "phases" in row} == {"select", "probe"}


def test_seconds_are_of_one_step_and_tokens_of_all_candidates(fakes: type[FakeBench]) -> None:
    fakes.pace = 1 / SMALL.work
    rows = {row["method"]: row for row in run([SMALL]).runs}
    assert all(row["median_s"] == pytest.approx(1.0) for row in rows.values())
    assert rows["select"]["tokens_per_s"] == pytest.approx(SMALL.pool * SMALL.tokens)
    assert rows["plain_k"]["tokens_per_s"] == pytest.approx(CHOSEN * SMALL.tokens)


def test_a_method_that_does_not_fit_into_memory_is_left_out_and_the_others_are_not(fakes: type[FakeBench]) -> None:
    fakes.fails = {"select": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB")}
    result = run([SMALL])
    assert [(row["method"], row["reason"]) for row in result.missing] == [
        ("select", "out of memory: CUDA out of memory. Tried to allocate 9 GiB")
    ]
    assert [row["method"] for row in result.runs] == ["plain_all", "plain_k", "probe", "equal"]
    assert fakes.events.count("select") == 1


def test_a_model_that_does_not_fit_is_left_out_as_a_case(fakes: type[FakeBench]) -> None:
    fakes.fails = {"make": torch.OutOfMemoryError("CUDA out of memory.")}
    result = run([SMALL, SMALL])
    assert result.runs == []
    assert [row["method"] for row in result.missing] == [None, None]


def test_other_errors_are_not_hidden(fakes: type[FakeBench]) -> None:
    fakes.fails = {"probe": RuntimeError("a mistake of ours")}
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run([SMALL])


@pytest.mark.parametrize("seconds", [60.0, 480.0, 3600.0])
@pytest.mark.parametrize("of_cheapest", [0.01, 0.5, 5.0])
def test_it_ends_in_time_and_says_what_was_left_out(fakes: type[FakeBench], seconds: float, of_cheapest: float) -> None:
    todo = cases(SHAPES, TOKENS)
    fakes.pace = of_cheapest / todo[0].work
    started = fakes.clock.now
    result = run(todo, seconds, repeats=3)
    assert fakes.clock.now - started <= seconds
    measured = {(row["shape"], row["tokens"]) for row in result.runs}
    left_out = {(row["shape"], row["tokens"]) for row in result.missing}
    assert len(measured) + len(left_out) == len(todo)
    assert not measured & left_out
    assert all("raise --minutes" in row["reason"] for row in result.missing)


def test_a_case_for_which_there_is_time_is_measured_once_at_least(fakes: type[FakeBench]) -> None:
    fakes.pace = 1 / SMALL.work
    (row, *_), steps = run([SMALL], seconds=60.0, repeats=50).runs, sum(method.steps for method in METHODS)
    assert 1 <= len(row["repetitions"]) <= 60 // steps


def test_the_engine_does_not_pay_for_the_plain_methods_nor_they_for_it() -> None:
    bench = Bench(SMALL, CPU, dtype=None)
    before = gradient_of(bench, torch.ones(2, 8, dtype=torch.int64))
    for name in ("select", "plain_all"):
        measure.repetition(bench, BY_NAME[name])
    bench.rest()
    assert all(p.grad is None for p in bench.parameters.values())
    assert bench.engine().target is None
    assert not bench.engine().scoring.state_dict().get("projections")
    hooked = [module for module in bench.plain.modules() if module._forward_hooks]
    assert hooked == []
    shared = {name: p for name, p in bench.plain.named_parameters() if p.requires_grad}
    assert all(shared[name] is parameter for name, parameter in bench.parameters.items())
    after = gradient_of(bench, torch.ones(2, 8, dtype=torch.int64))
    assert any(not torch.equal(before[name], after[name]) for name in before)  # both have trained it


@pytest.mark.parametrize(("name", "refreshes"), [("select", 1), ("probe", 1)])
def test_a_repetition_holds_one_refresh_of_the_target(name: str, refreshes: int) -> None:
    bench = Bench(SMALL, CPU)
    for _ in range(2):
        bench.begin(BY_NAME[name])
        found = []
        for _ in range(BY_NAME[name].steps):
            bench.step(BY_NAME[name])
            report = bench.engine().last
            assert report is not None
            found.append(report.target_refreshed)
        assert sum(found) == refreshes
    assert BY_NAME["select"].steps == REFRESH_STEPS


def test_adapters_without_peft_are_left_out_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    result = measure.measure([Case(TINY_SHAPES[1], 8)], CPU, Budget(1e12), 1, lambda _: None)
    assert [(row["method"], row["reason"]) for row in result.missing] == [
        (None, "LoRA needs the package peft, which is not installed; pip install peft")
    ]


def test_adapters_are_float32_on_a_frozen_bfloat16_base() -> None:
    pytest.importorskip("peft")
    model = models.make_model(Case(TINY_SHAPES[1], 8), CPU)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def test_phases_are_the_engines_own_whose_clock_is_put_back() -> None:
    bench = Bench(SMALL, CPU)
    found = profiling.phases(bench, BY_NAME["probe"])
    assert {"target", "score", "weigh", "update", "optimizer"} <= set(found)
    assert all(seconds >= 0 for seconds in found.values())
    assert vars(engine)["time"] is time


def test_nothing_is_timed_or_written_if_the_update_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(num_samples: int, selected: range) -> Tensor:
        return 0.5 * equal_coefficients(num_samples, selected)

    def timed(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(check, "equal_coefficients", half)
    monkeypatch.setattr(measure, "measure", timed)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--json", str(path), "--device", "cpu", "--tiny"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the update of a step (scored, float32 passes) differs from plain autograd's on tiny")
    assert "relative error 0.5, allowed 0.0001" in said
    assert not path.exists()


def test_a_wrong_plain_step_of_the_engine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check._update

    def wrong(bench: Bench, selector: Any, ids_NT: Tensor) -> dict[str, Tensor]:
        found = right(bench, selector, ids_NT)
        return found if isinstance(selector, check.AllAlike) else {name: -grad for name, grad in found.items()}

    monkeypatch.setattr(check, "_update", wrong)
    with pytest.raises(DisagreementError, match=r"\(equal, float32 passes\).*relative error 2"):
        check.check(SMALL, CPU)


def test_errors_of_updates() -> None:
    wanted = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert check.relative_error(wanted, wanted) == 0
    assert check.relative_error({**wanted, "b": torch.tensor([4.5])}, wanted) == pytest.approx(0.1)
    assert check.relative_error({"a": wanted["a"]}, wanted) == float("inf")
    assert check.relative_error({**wanted, "b": torch.tensor([torch.nan])}, wanted) == float("inf")


def test_waits_are_counted_by_their_place_in_the_library() -> None:
    class Waiting:
        def tolist(self) -> list[float]:
            warnings.warn(f"{profiling.WAITED} (here)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            return [0.0]

    def work() -> None:
        for _ in range(3):
            nonzero_samples(Waiting())  # type: ignore[arg-type]
        Waiting().tolist()

    ((inside, three), (outside, one)) = profiling.waits(work).most_common()
    assert (three, one) == (3, 1)
    assert inside.startswith("gradient_selectors/capture/factors.py:")
    assert inside.endswith(" nonzero_samples")
    assert outside.startswith("tests/benchmarks/test_gpu.py:")
    with pytest.raises(UserWarning, match="as before"):
        warnings.warn("as before", stacklevel=1)


def layered(layers: int) -> Shape:
    return replace(TINY, layers=layers)


@NEEDS_GPU
@pytest.mark.parametrize("name", ["plain_k", "equal", "select"])
def test_the_host_does_not_wait_for_the_gpu_once_a_layer(name: str) -> None:
    counts = [
        sum(row["count"] for row in profiling.synchronisations(Bench(case, torch.device("cuda")), BY_NAME[name]))
        for case in (Case(layered(2), 16), Case(layered(6), 16))
    ]
    assert counts[0] == counts[1]


@NEEDS_GPU
def test_memory_is_that_of_the_gpu() -> None:
    bench = Bench(SMALL, torch.device("cuda"))
    found = measure.repetition(bench, BY_NAME["plain_all"])
    bench.rest()
    assert found.rest_bytes is not None
    assert found.peak_bytes is not None
    assert found.peak_bytes > found.rest_bytes >= 12 * sum(p.numel() for p in bench.parameters.values())


def test_ratios_are_ours_over_plain_training() -> None:
    def row(method: str, seconds: float, peak: int | None) -> dict[str, Any]:
        return {
            "shape": "tiny",
            "tokens": 8,
            "method": method,
            "median_s": seconds,
            "rest_bytes": 100,
            "peak_bytes": peak,
        }

    runs = [row("plain_all", 4.0, 300), row("plain_k", 1.0, None), row("select", 6.0, 400)]
    first, second = summarise(runs)
    assert (first["method"], first["against"]) == ("select", "plain_all")
    assert (first["time"], first["peak"], first["over_rest"]) == (1.5, pytest.approx(4 / 3), 1.5)
    assert (second["against"], second["time"], second["peak"], second["over_rest"]) == ("plain_k", 6.0, None, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--json"),
        (["--json", "no-such-directory/x.json"], "cannot be written"),
        (["--json", "x.json", "--minutes", "0"], "0 is not a whole number of 1 or more"),
        (["--json", "x.json", "--device", "cpu"], "add --tiny"),
        (["--json", "x.json", "--device", "tpu"], "choose from"),
    ],
)
def test_a_bad_option_ends_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(["--json", "x.json"])
    assert end.value.code == 2
    assert "set it to cpu, with --tiny" in capsys.readouterr().err
