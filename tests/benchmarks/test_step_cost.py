"""The benchmarks of a step's cost: that they measure the right work and report everything, never how fast it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_selectors.draw.cluster_ucb import ClusterUcb
from safetensors.numpy import save_file

from benchmarks.common.reporting import table
from benchmarks.step_cost import __main__ as step_cost
from benchmarks.step_cost import scaling
from benchmarks.step_cost.__main__ import as_json, report, summarise
from benchmarks.step_cost.agreement import TOLERANCE, DisagreementError
from benchmarks.step_cost.interleaving import Options, measure
from benchmarks.step_cost.methods import AGAINST, OURS, SCORINGS, UNCHECKED, make_method
from benchmarks.step_cost.methods.ours import Ours
from benchmarks.step_cost.methods.per_sample import Oracle
from benchmarks.step_cost.processes import Job, MissingError, start
from benchmarks.step_cost.workloads import REFRESH_STEPS, WORKLOADS, pools

EXACT, SKETCHED = SCORINGS["exact"], SCORINGS["sketched"]
IN_PROCESS = [name for name in (*OURS, *AGAINST) if name not in ("opacus", "dattri")]
OPTIONS = Options(("tiny",), (EXACT, SKETCHED), ("plain_all", "oracle", "opacus"), repeats=3, threads=1, device="cpu")
SECONDS = {EXACT: 2.0, SKETCHED: 1.0, "top_k": 1.0, "plain_all": 4.0, "oracle": 8.0, "opacus": 10.0}


class FakeWorker:
    """Answers and times as it is told."""

    def __init__(self, job: Job, events: list[str]) -> None:
        self.ready: dict[str, Any] = {"versions": {job.method: "1"}}
        self._method, self._events, self._slowdown = job.method, events, 0

    def repeat(self) -> dict[str, Any]:
        self._events.append(self._method)
        self._slowdown += 1
        return {"seconds": SECONDS[self._method] * self._slowdown, "peak_bytes": int(SECONDS[self._method] * 1e6)}

    def close(self) -> None:
        self._events.append(f"end {self._method}")


class FakeStart:
    """Starts fakes; `wrong` are methods whose answers are off by so much, `missing` cannot be started."""

    def __init__(self, wrong: dict[str, float] | None = None, missing: tuple[str, ...] = ()) -> None:
        self.wrong, self.missing = wrong or {}, missing
        self.events: list[str] = []
        self.dtypes: list[str] = []

    def __call__(self, job: Job) -> FakeWorker:
        if job.method in self.missing:
            raise MissingError("its environment is not there")
        if job.answers:
            self.dtypes.append(job.workload.dtype)
            scale = np.float32(1 + self.wrong.get(job.method, 0.0))
            save_file({"utilities_N": np.arange(1, 5, dtype=np.float32) * scale}, job.answers)
        return FakeWorker(job, self.events)


def rounds(events: list[str]) -> list[str]:
    return [event for event in events if not event.startswith("end")]


def test_every_pair_is_summarised_as_a_ratio_of_medians() -> None:
    rows = summarise(OPTIONS, measure(OPTIONS, FakeStart()))
    assert [(row["method"], row["against"]) for row in rows] == [
        (method, against) for method in OPTIONS.ours for against in OPTIONS.against
    ]
    assert rows[0] == {
        "workload": "tiny",
        "method": EXACT,
        "against": "plain_all",
        "time_ratio": 0.5,
        "memory_ratio": 0.5,
    }


def test_repetitions_are_interleaved_and_all_kept() -> None:
    fakes = FakeStart()
    result = measure(OPTIONS, fakes)
    order = [EXACT, SKETCHED, "plain_all", "oracle", "opacus"]
    assert rounds(fakes.events) == order * OPTIONS.repeats
    assert result.runs[0]["seconds"] == [2.0, 4.0, 6.0]
    assert {event for event in fakes.events if event.startswith("end")} == {f"end {method}" for method in order}


def test_answers_are_compared_in_float32() -> None:
    fakes = FakeStart()
    measure(replace(OPTIONS, workloads=("W2",)), fakes)
    assert set(fakes.dtypes) == {"float32"}


def test_nothing_is_timed_if_our_own_answers_are_wrong() -> None:
    fakes = FakeStart(wrong={SKETCHED: 10 * TOLERANCE})
    with pytest.raises(DisagreementError, match=r"sketched differs from autograd on tiny.*utilities_N"):
        measure(OPTIONS, fakes)
    assert rounds(fakes.events) == []


def test_a_peer_that_is_wrong_is_reported_with_its_error() -> None:
    result = measure(OPTIONS, FakeStart(wrong={"opacus": 10 * TOLERANCE}))
    written = as_json(OPTIONS, result)
    verdicts = {row["method"]: row["agrees"] for row in written["agreement"]}
    assert verdicts == {EXACT: True, SKETCHED: True, "opacus": False}
    assert written["agreement"][-1]["errors"]["utilities_N"] == pytest.approx(10 * TOLERANCE, rel=1e-2)
    assert "opacus disagrees with autograd" in report(OPTIONS, result)


def test_a_peer_whose_answers_are_not_finite_is_wrong() -> None:
    written = as_json(OPTIONS, measure(OPTIONS, FakeStart(wrong={"opacus": float("nan")})))
    assert written["agreement"][-1] | {"agrees": False, "errors": {"utilities_N": None}} == written["agreement"][-1]
    json.dumps(written, allow_nan=False)


def test_a_missing_peer_is_reported_with_the_reason() -> None:
    result = measure(OPTIONS, FakeStart(missing=("opacus",)))
    written = as_json(OPTIONS, result)
    reason = {"workload": "tiny", "against": "opacus", "reason": "its environment is not there"}
    assert written["missing"] == [reason]
    assert {row["against"] for row in written["summary"]} == {"plain_all", "oracle"}
    assert "opacus was not measured: its environment is not there" in report(OPTIONS, result)


def test_without_our_own_step_there_is_no_result() -> None:
    with pytest.raises(MissingError, match=r"sketched on tiny: its environment"):
        measure(OPTIONS, FakeStart(missing=(SKETCHED,)))


def test_a_peer_without_its_environment_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.step_cost.processes.ENVIRONMENTS", {"opacus": ".venv-of-nobody"})
    with pytest.raises(MissingError, match=r"\.venv-of-nobody is not there; run make bench-env"):
        start(Job("opacus", WORKLOADS["tiny"], "cpu", 1))


@pytest.mark.parametrize("workload", ["tiny", "tiny_lora"])
def test_our_answers_are_those_of_autograd(workload: str) -> None:
    wanted = Oracle(WORKLOADS[workload], "cpu").answers()
    for name in OURS:
        found = make_method(name, WORKLOADS[workload], "cpu").answers()
        assert found is not None
        assert {"utilities_N", "plain_utilities_N", "gradient"} <= set(found)
        assert ("gram_NN" in found) == (name != "top_k")
        for key in set(found) & set(wanted):
            error = (found[key].double() - wanted[key].double()).norm() / wanted[key].double().norm()
            assert error <= TOLERANCE, (name, key)


def test_the_scoring_that_is_asked_for_is_the_one_that_is_measured() -> None:
    found = Ours(WORKLOADS["tiny"], "cpu", weigh="filter_then_weight", scoring="sketched", sketch_width=4).answers()
    assert not torch.equal(found["approximate_gram_NN"], found["gram_NN"])
    assert not torch.equal(found["approximate_utilities_N"], found["exact_utilities_N"])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, about vmap
@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_method_takes_steps_that_train(name: str) -> None:
    method = make_method(name, WORKLOADS["tiny"], "cpu")
    owner: Any = getattr(method, "_bench", None) or getattr(method, "bench", None) or getattr(method, "engine", None)
    parameters = dict(getattr(owner, "capture", owner).parameters)
    method.warm_up()
    before = {key: p.detach().clone() for key, p in parameters.items()}
    assert method.repetition()["seconds"] > 0
    moved = {key for key, p in parameters.items() if not torch.equal(p, before[key])}
    assert moved == set(parameters)
    assert (method.answers() is None) == (name in UNCHECKED and name != "oracle")


def test_a_repetition_of_ours_holds_one_refresh_of_the_target() -> None:
    method: Any = make_method(EXACT, WORKLOADS["tiny"], "cpu")
    method.warm_up()
    assert method.engine.target.refresh_steps == REFRESH_STEPS
    for _ in range(2):
        method.repetition()  # raises unless it does
    method.engine.target.refresh_steps = 2
    with pytest.raises(RuntimeError, match="4 refreshes, not to one"):
        method.repetition()


def test_a_bandit_sees_all_candidates_and_gives_three_in_eight_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    draw = ClusterUcb.draw

    def watched(self: ClusterUcb, features_Md: torch.Tensor, count: int) -> Any:
        seen.append(len(features_Md))
        return draw(self, features_Md, count)

    monkeypatch.setattr(ClusterUcb, "draw", watched)
    workload = WORKLOADS["tiny"]
    method: Any = make_method(SCORINGS["sketched+cluster_ucb"], workload, "cpu")
    method.warm_up()
    found = method.repetition()
    assert set(seen) == {workload.pool}  # nobody is left over from the step before
    assert found["mean_scored"] == 3 / 8 * workload.pool
    assert found["mean_selected"] <= workload.batch_size


def test_pools_are_the_same_in_every_process_and_as_stated() -> None:
    tiny = WORKLOADS["tiny"]
    assert pools(tiny) == pools(tiny)
    assert pools(tiny)[0] != pools(tiny)[1]
    assert {len(pool) for pool in pools(tiny)} == {tiny.pool}
    assert {sample.num_tokens for pool in pools(tiny) for sample in pool} == {tiny.tokens}


@pytest.mark.slow
def test_processes_answer_and_take_turns() -> None:
    options = Options(("tiny",), (EXACT,), ("plain_k",), repeats=2, threads=1, device="cpu")
    result = measure(options, start)
    assert [run["method"] for run in result.runs] == [EXACT, "plain_k"]
    assert all(len(run["seconds"]) == 2 and run["peak_bytes"] > 1e7 for run in result.runs)
    assert [agreement.agrees for agreement in result.agreements] == [True]
    assert result.versions["torch"] == torch.__version__
    assert result.missing == []


def test_a_process_that_fails_says_why() -> None:
    broken = replace(WORKLOADS["tiny"], heads=0)
    with pytest.raises(MissingError, match="Error"):
        start(Job("plain_k", broken, "cpu", 1))


def test_the_command_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "start", FakeStart(missing=("opacus",)))
    path = tmp_path / "cost.json"
    arguments = [
        "--json",
        str(path),
        "--workloads",
        "tiny",
        "--against",
        "plain_all,opacus",
        "--scoring",
        "exact,sketched",
    ]
    assert step_cost.main(arguments) == 0
    written = json.loads(path.read_text())
    parts = {"options", "versions", "workloads", "agreement", "summary", "missing", "runs"}
    assert set(written) == parts | {"version", "date", "machine"}
    assert [row["method"] for row in written["summary"]] == [EXACT, SKETCHED, "top_k"]
    assert written["workloads"]["tiny"]["tokens"] == WORKLOADS["tiny"].tokens
    assert written["workloads"]["tiny"]["passes"] == "float32"
    assert EXACT in capsys.readouterr().out


def test_what_was_measured_before_a_failure_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailsLater(FakeStart):
        def __call__(self, job: Job) -> FakeWorker:
            self.wrong = {EXACT: 1.0} if job.workload.name == "tiny_lora" else {}
            return super().__call__(job)

    path = tmp_path / "cost.json"
    monkeypatch.setattr(step_cost, "start", FailsLater())
    arguments = ["--json", str(path), "--workloads", "tiny,tiny_lora", "--against", "plain_all", "--scoring", "exact"]
    assert step_cost.main(arguments) == 1
    assert {row["workload"] for row in json.loads(path.read_text())["summary"]} == {"tiny"}
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: filter_then_weight/exact differs")


@pytest.mark.slow
def test_scaling_measures_every_factor(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    threads = torch.get_num_threads()
    try:
        assert scaling.main(["--json", str(path), "--quick", "--repeats", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    summary = json.loads(path.read_text())["summary"]
    assert [row["factor"] for row in summary] == list(scaling.FACTORS)
    assert all(len(row["values"]) == len(row["seconds"]) == 2 for row in summary)
    assert all(isinstance(row["exponent"], float) for row in summary)


def test_the_exponent_is_that_of_the_power() -> None:
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_each_factor_changes_what_it_names_and_nothing_else() -> None:
    for name, factor in scaling.FACTORS.items():
        points = [factor.point(scaling.BASE, value) for value in factor.values]
        assert len({repr(point) for point in points}) == len(points), name
    wide = scaling.FACTORS["width"].point(scaling.BASE, 512)
    assert (wide.workload.hidden, wide.workload.heads, wide.workload.tokens) == (512, 16, scaling.BASE.tokens)
    masked = scaling.FACTORS["density"].point(scaling.BASE, 0.2)
    assert masked.selection == {"mask": "dual_sft", "dual_sft": {"density": 0.2}}


BAD_OPTIONS = [
    ([], "--json"),
    (["--json", "no-such-directory/x.json"], "cannot be written"),
    (["--json", "x.json", "--repeats", "0"], "0 is not a whole number of 1 or more"),
    (["--json", "x.json", "--threads", "many"], "many is not a whole number"),
    (["--json", "x.json", "--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize("main", [step_cost.main, scaling.main])
@pytest.mark.parametrize(("arguments", "says"), BAD_OPTIONS)
def test_a_bad_option_ends_in_one_line(
    main: Any, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said


@pytest.mark.parametrize(
    "arguments",
    [["--workloads", "W9"], ["--against", "plain_all,nobody"], ["--scoring", "exact,rough"], ["--device", "tpu"]],
)
def test_an_unknown_name_is_refused_with_the_known_ones(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        step_cost.main(["--json", "x.json", *arguments])
    assert end.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        step_cost.main(["--json", "x.json", "--device", "cuda"])
    assert end.value.code == 2
    assert "set it to cpu" in capsys.readouterr().err


def test_a_table_lines_up() -> None:
    assert table(("name", "s"), [("a", "1.5"), ("long one", "10.25")]).splitlines() == [
        "name          s",
        "a           1.5",
        "long one  10.25",
    ]
