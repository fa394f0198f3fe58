"""How long the quadratic program of a step takes, for 8 to 64 candidates, without and with a cap.

    python -m benchmarks.solver --json solver.json [--repeats 300]

Measured is one call of the service's own solver; a step calls it on its survivors and, where that leaves more than it
may select, again on those selected. Each round has a new problem: gradients that share a direction, of lognormal
lengths, some of them twice. Sizes are measured in turn, so that a busy machine slows all of them alike, and each
problem is solved three times, of which the fastest counts: percentiles are of problems, not of what else the machine
did. `first_ms` is the first call of a new solver and counts in nothing else. A cap of 1 bounds coefficients at the mean
of those that are positive without a cap, which are solved for first: two programs.

Before anything is timed, every solution must be feasible and as good as that of scipy's active sets, to 1e-8 of the
objective, or nothing is. Exit codes: 0 done, 1 the solver is wrong, 2 a mistake in the options.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from platform import python_version
from typing import Any

import numpy as np
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight, with_ridge
from gradient_selectors.weigh.program import Matrix, Vector
from scipy.optimize import lsq_linear, nnls  # type: ignore[import-untyped]

from benchmarks.common.reporting import (
    OneLineParser,
    at_least_one,
    duration,
    say,
    table,
    writable_file,
    write_result,
)
from benchmarks.step_cost.agreement import DisagreementError

Case = tuple[int, float | None]  # candidates and cap
Problem = tuple[Matrix, Vector]
Round = Mapping[int, Problem]  # one problem of each size

CANDIDATES = (8, 16, 32, 64)
CASES: tuple[Case, ...] = tuple((n, cap) for n in CANDIDATES for cap in (None, 1.0))
RIDGE = FilterThenWeight.ridge
TOLERANCE = 1e-8  # relative, of the objective
ATTEMPTS = 3  # at each problem
FEATURES, CORRELATION, SPREAD = 256, 0.3, 0.7  # of gradients: numbers, mean cosine of two, spread of log length
PACKAGES = ("numpy", "scipy", "cvxpy", "clarabel")
TIMES = {"median_ms": 50, "p95_ms": 95, "p99_ms": 99, "max_ms": 100}  # percentiles


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.solver", description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    parser.add_argument("--repeats", type=at_least_one, default=300, metavar="R", help="problems of each size (300)")
    options = parser.parse_args(arguments)
    generator = np.random.default_rng(0)
    rounds = [{n: make_problem(n, generator) for n in CANDIDATES} for _ in range(options.repeats + 1)]
    try:
        disagreements = check(rounds)
    except DisagreementError as error:
        say(f"error: {error}")
        return 1
    summary = [summarise(case, ms, disagreements[case]) for case, ms in measure(rounds).items()]
    versions = {"python": python_version(), **{name: version(name) for name in PACKAGES}}
    write_result(options.json, {"versions": versions, "summary": summary})
    print(report(summary))
    return 0


def make_problem(candidates: int, generator: np.random.Generator) -> Problem:
    """K (n, n) and c (n,), all positive, of the better half of a pool whose every eighth gradient is there twice."""
    shared_F = generator.normal(size=FEATURES)
    own_MF = generator.normal(size=(2 * candidates + 1, FEATURES))
    directions_MF = np.sqrt(CORRELATION) * shared_F + np.sqrt(1 - CORRELATION) * own_MF
    target_F, pool_NF = directions_MF[0], directions_MF[1:] * generator.lognormal(0, SPREAD, (2 * candidates, 1))
    pool_NF[1::8] = pool_NF[::8]
    gradients_nF = pool_NF[np.argsort(-(pool_NF @ target_F), kind="stable")[:candidates]]
    return gradients_nF @ gradients_nF.T, gradients_nF @ target_F


def check(rounds: Sequence[Round]) -> dict[Case, float]:
    """The largest disagreement of each case; raises DisagreementError if one exceeds the tolerance."""
    found: dict[Case, float] = {}
    for candidates, cap in CASES:
        say(f"checking {candidates} candidates, cap {cap} ({len(found) + 1} of {len(CASES)})")
        solver = CoefficientSolver()
        # The largest is not a number if any is not: that is no agreement either.
        worst = float(np.max([disagreement(problems[candidates], cap, solver) for problems in rounds]))
        if not worst <= TOLERANCE:
            message = f"the solver differs from scipy's for {candidates} candidates, cap {cap}: relative disagreement"
            raise DisagreementError(f"{message} {worst:.2g}, allowed {TOLERANCE:g}")
        found[candidates, cap] = worst
    return found


def disagreement(problem: Problem, cap: float | None, solver: CoefficientSolver) -> float:
    """Relative difference of the objective from that of scipy's solution; of a bound, where that is broken by more."""
    gram_nn, linear_n = problem
    coefficients_n = solver.solve(gram_nn, linear_n, RIDGE, cap).coefficients
    hessian_nn = with_ridge(gram_nn, RIDGE)
    lower_nn = np.linalg.cholesky(hessian_nn)
    wanted_n = np.linalg.solve(lower_nn, linear_n)  # 1/2 ||L^T w - wanted||^2 is the objective but for a constant
    reference_n, upper = nnls(lower_nn.T, wanted_n)[0], np.inf
    if cap is not None:
        upper = cap * reference_n[reference_n > 0].mean()
        reference_n = lsq_linear(lower_nn.T, wanted_n, (0.0, upper), method="bvls", tol=1e-14).x
    ours, best = (0.5 * w_n @ hessian_nn @ w_n - linear_n @ w_n for w_n in (coefficients_n, reference_n))
    outside = max(0.0, -coefficients_n.min(), coefficients_n.max() - upper) / reference_n.max()
    return float(np.maximum(abs(ours - best) / abs(best), outside))


def measure(rounds: Sequence[Round]) -> dict[Case, list[float]]:
    """Milliseconds of each problem of each case; the first one is that of the first call."""
    solvers = {case: CoefficientSolver() for case in CASES}
    found: dict[Case, list[float]] = {case: [] for case in CASES}
    started = time.monotonic()
    for i, problems in enumerate(rounds):
        for case, solver in solvers.items():
            attempts = [solve_ms(problems[case[0]], case[1], solver) for _ in range(ATTEMPTS if i else 1)]
            found[case].append(min(attempts))
        if i % 50 == 0 or i == len(rounds) - 1:
            left = (time.monotonic() - started) / (i + 1) * (len(rounds) - i - 1)
            say(f"round {i + 1} of {len(rounds)}, {duration(left)} left")
    return found


def solve_ms(problem: Problem, cap: float | None, solver: CoefficientSolver) -> float:
    (gram_nn, linear_n), before = problem, time.perf_counter()
    solver.solve(gram_nn, linear_n, RIDGE, cap)
    return 1000 * (time.perf_counter() - before)


def summarise(case: Case, ms: Sequence[float], worst: float) -> dict[str, Any]:
    """The row of a case; `ms` starts with the first call, which is kept out of the rest."""
    first, *warm = ms
    row = {"candidates": case[0], "cap": case[1], "solves": len(warm), "first_ms": first}
    return {**row, **{name: float(np.percentile(warm, TIMES[name])) for name in TIMES}, "disagreement": worst}


def report(summary: Sequence[Mapping[str, Any]]) -> str:
    """What people read at the end."""
    times, rows = ("first_ms", *TIMES), []
    for row in summary:
        cells = (f"{row['candidates']}", "-" if row["cap"] is None else f"{row['cap']:g}", f"{row['solves']}")
        rows.append((*cells, *(f"{row[name]:.2f}" for name in times), f"{row['disagreement']:.1e}"))
    return table(("candidates", "cap", "solves", *(name.replace("_", " ") for name in times), "disagreement"), rows)


if __name__ == "__main__":
    sys.exit(main())
