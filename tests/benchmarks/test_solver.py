"""The benchmark of the quadratic program: that it checks before it times and reports all of it, never how fast."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gradient_selectors.weigh.coefficients import CoefficientSolver, Solution
from gradient_selectors.weigh.filter_then_weight import with_ridge
from gradient_selectors.weigh.program import Matrix, Vector

from benchmarks import solver
from benchmarks.solver import CASES, TOLERANCE, check, disagreement, make_problem, summarise
from benchmarks.step_cost.agreement import DisagreementError

Answer = Callable[[Matrix, Vector, float, float | None], Vector]


def too_long(gram: Matrix, linear: Vector, ridge: float, cap: float | None) -> Vector:
    return CoefficientSolver().solve(gram, linear, ridge, cap).coefficients * 1.01


def no_numbers(gram: Matrix, linear: Vector, ridge: float, cap: float | None) -> Vector:
    return np.full_like(linear, np.nan)


def unbounded(gram: Matrix, linear: Vector, ridge: float, cap: float | None) -> Vector:
    """The optimum among negative ones, too, which beats every solution that is right."""
    return np.linalg.solve(with_ridge(gram, ridge), linear).astype(np.float64)


def uncapped(gram: Matrix, linear: Vector, ridge: float, cap: float | None) -> Vector:
    return CoefficientSolver().solve(gram, linear, ridge).coefficients


def slightly_negative(gram: Matrix, linear: Vector, ridge: float, cap: float | None) -> Vector:
    return np.array([1.0, 1.0, -1e-5])


def solver_that_says(answer: Answer) -> type[CoefficientSolver]:
    class Wrong(CoefficientSolver):
        def solve(self, gram: Matrix, linear: Vector, ridge: float = 0.0, cap: float | None = None) -> Solution:
            return Solution(answer(gram, linear, ridge, cap), "optimal", 0.0, 0.0)

    return Wrong


def test_the_command_writes_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "solver.json"
    assert solver.main(["--json", str(path), "--repeats", "2"]) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"version", "date", "machine", "versions", "summary"}
    assert set(written["versions"]) == {"python", "numpy", "scipy", "cvxpy", "clarabel"}
    assert [(row["candidates"], row["cap"]) for row in written["summary"]] == list(CASES)
    for row in written["summary"]:
        assert row["solves"] == 2
        assert row["first_ms"] > 0
        assert 0 < row["median_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert 0 <= row["disagreement"] <= TOLERANCE
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 + len(CASES)
    assert "round 3 of 3, 0 s left" in said.err


def test_the_first_solve_counts_in_nothing_else() -> None:
    row = summarise((8, None), [100.0, 1.0, 2.0, 3.0], 0.0)
    assert (row["first_ms"], row["solves"], row["median_ms"], row["max_ms"]) == (100.0, 3, 2.0, 3.0)


def test_of_the_attempts_at_a_problem_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([5.0, 9.0, 2.0])
    monkeypatch.setattr(solver, "solve_ms", lambda *_: next(times))
    monkeypatch.setattr(solver, "CASES", ((8, None),))
    rng = np.random.default_rng(0)
    rounds = [{8: make_problem(8, rng)} for _ in range(3)]
    assert solver.measure(rounds) == {(8, None): [5.0, 2.0, 2.0]}


def test_nothing_is_timed_or_written_if_the_solver_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(solver, "CoefficientSolver", solver_that_says(too_long))
    monkeypatch.setattr(solver, "measure", measure)
    path = tmp_path / "solver.json"
    assert solver.main(["--json", str(path), "--repeats", "1"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the solver differs from scipy's for 8 candidates, cap None")
    assert not path.exists()


@pytest.mark.parametrize(("wrong", "cap"), [(too_long, None), (no_numbers, None), (unbounded, None), (uncapped, 1.0)])
def test_every_kind_of_wrong_solution_is_noticed(
    wrong: Answer, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    rounds = [{n: make_problem(n, rng) for n in solver.CANDIDATES} for _ in range(2)]
    assert set(check(rounds)) == set(CASES)
    assert not disagreement(rounds[0][64], cap, solver_that_says(wrong)()) <= TOLERANCE
    monkeypatch.setattr(solver, "CoefficientSolver", solver_that_says(wrong))
    with pytest.raises(DisagreementError, match="relative disagreement"):
        check(rounds)


def test_a_broken_bound_is_noticed_even_where_the_objective_agrees() -> None:
    """Gradients at right angles and one c far below the others: its coefficient hardly shows in the objective."""
    problem = np.eye(3), np.array([1.0, 1.0, 1e-6])
    assert disagreement(problem, None, CoefficientSolver()) <= TOLERANCE
    assert 9e-6 < disagreement(problem, None, solver_that_says(slightly_negative)()) < 1.1e-5


@pytest.mark.parametrize("candidates", solver.CANDIDATES)
def test_problems_are_like_those_of_a_step(candidates: int) -> None:
    gram, linear = make_problem(candidates, np.random.default_rng(0))
    again, _ = make_problem(candidates, np.random.default_rng(0))
    np.testing.assert_array_equal(gram, again)
    assert gram.shape == (candidates, candidates)
    assert (linear > 0).all()
    assert (np.diff(linear) <= 0).all()
    lengths = np.sqrt(np.diag(gram))
    cosines = (gram / np.outer(lengths, lengths))[np.triu_indices(candidates, 1)]
    assert (cosines > 1 - 1e-9).any()  # duplicates
    assert 0.1 < np.median(cosines) < 0.5
    assert lengths.max() > 2 * lengths.min()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--json"),
        (["--json", "no-such-directory/x.json"], "cannot be written"),
        (["--json", "x.json", "--repeats", "0"], "0 is not a whole number of 1 or more"),
    ],
)
def test_a_bad_option_ends_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        solver.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
