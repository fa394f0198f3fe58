"""Filter, then weight: which candidates enter the update, and with what coefficient.

The method of "Filter-then-Weight: Online Data Selection and Reweighting for LLM Fine-Tuning" (arXiv 2604.00001). From
the paper: the update under the linearised Adam map, the match to a target update, the two stages, non-negative
coefficients. The paper's text leaves open what the settings below choose between.

Metrics, each of one scale for `c` and `K`, so that redundancy neither vanishes nor takes over:

- `p_norm`: `c = <g, P G>`, `K = <g, P g>`. The update is matched to the target's in the norm of `P^-1`, the curvature
  that Adam implicitly assumes: an exact second-order utility.
- `update`: `c = <P g, P G>`, `K = <P g, P g>`. Both updates are matched as vectors.
- `greats`: `c = gamma <g, P G>`, `K = <P g, P g>`, with the curvature `1 / gamma` in units of the learning rate. Gamma
  scales all coefficients alike, so it shows under the `natural` normalisation and in the `simplex` only.

From scratch, P is wrong by up to the whole update until Adam's second moment has settled (about 100 steps). Pass the
`plain` one then: the three metrics become one, the match of raw gradients, and the rest works as it does later.
Under `mean_one` the change from one to the other does not show in the size of the steps. A pretrained model does better
under Adam's from its second step on, since plain inner products favour short answers.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradient_selectors.preconditioner import squared
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.coefficients import CoefficientSolver, Solution
from gradient_selectors.weigh.program import Matrix, Vector
from gradient_selectors.weigh.selector import Decision, SolverReport

Filter = Literal["first_order", "cosine", "nn_omp"]
Metric = Literal["p_norm", "update", "greats"]
Normalisation = Literal["mean_one", "natural", "simplex"]

Indices = npt.NDArray[np.intp]
Choice = tuple[list[int], Matrix, Vector, Solution]
"""Samples that were chosen, their K and c, and their coefficients."""

NOTHING = Solution(np.zeros(0), "optimal", 0.0, 0.0)

PURSUIT_TOLERANCE = 1e-6  # of the first candidate's score
JITTER = 1e-8  # of a candidate's own K_ii: copies have no inverse without a ridge


class SolverError(Exception):
    """A solver failed; what it raised is the cause."""


@dataclass(frozen=True)
class FilterThenWeight:
    """Settings of the method.

    Examples:
        >>> from gradient_selectors import FilterThenWeight
        >>> FilterThenWeight(batch_size=4).max_survivors
        8

    Attributes:
        batch_size: samples k that may enter the update.
        keep_ratio: the filter keeps at most this many times `batch_size`; only these enter the quadratic term.
        min_gain: share of the utility that a selected sample must add, or it is not trained on.
        solver: solves for the coefficients.
        ridge: regularisation relative to each sample's own K_ii; gives duplicates equal shares of the update.
        cap: bound on a coefficient, in units of the mean of those that are positive without it, or None.
        filter: `first_order` keeps the largest positive `c_i`; `cosine` ranks the positive ones by `c_i / sqrt(K_ii)`,
            so that long gradients (short samples) gain nothing, and needs K for all of them; `nn_omp` adds one
            candidate after the other by what the earlier ones leave unmatched, and needs K for the whole pool.
        metric: what the update is matched in, see above.
        gamma: of the metric `greats`.
        normalisation: `mean_one` gives the coefficients a sum of 1: a step as long as plain training's. `natural` keeps
            the optimum's own scale, set right by an exact line search: the step is then as long as the target's
            update asks for, which is noisy for a small target set. `simplex` solves under a sum of 1, where the
            lengths of the gradients count against that of the target's.
    """

    batch_size: int
    keep_ratio: float = 2.0
    solver: CoefficientSolver = field(default_factory=CoefficientSolver)
    ridge: float = 1e-3
    cap: float | None = None
    filter: Filter = "first_order"
    metric: Metric = "p_norm"
    gamma: float = 1.0
    normalisation: Normalisation = "mean_one"
    min_gain: float = 0.0

    @property
    def max_survivors(self) -> int:
        """Samples m that the filter keeps at most."""
        return math.ceil(self.keep_ratio * self.batch_size - 1e-9)

    def decide(self, interaction: Interaction) -> Decision:
        """Coefficients with a sum of 1 (or in natural scale); all zero if no candidate points towards the target.

        If the solver fails, the best survivors get equal coefficients, and the report's status is `fallback_equal`.
        Raises ValueError for views whose shapes do not go together.
        """
        utilities_N, quadratic = self._views(interaction)
        positive = positive_samples(utilities_N)
        nothing = Decision(torch.zeros(len(utilities_N)), num_positive=len(positive))
        if not positive:
            return nothing
        try:
            kept, gram, linear, solution = self._choice(utilities_N, positive, quadratic)
        except (SolverError, np.linalg.LinAlgError) as error:
            kept, gram, linear, solution = self._alike(utilities_N, positive, quadratic, str(error))
        if not kept or linear @ solution.coefficients <= 0:
            return nothing
        coefficients_N = torch.zeros(len(utilities_N), dtype=torch.float64)
        coefficients_N[kept] = torch.from_numpy(solution.coefficients)
        if self.normalisation == "natural":
            coefficients_N *= line_search(quadratic, utilities_N, coefficients_N)
        else:
            coefficients_N /= coefficients_N.sum()
        return Decision(
            coefficients_N.float(),
            len(positive),
            redundancy(gram, linear, solution.coefficients),
            SolverReport(solution.status, solution.seconds, solution.reason),
        )

    def _choice(self, utilities_N: Tensor, positive: list[int], quadratic: Interaction) -> Choice:
        """Those that survive the filter and are not dispensable, weighed."""
        survivors, gram = sound(*self._filter(utilities_N, positive, quadratic))
        if not survivors:
            return [], gram, np.zeros(0), NOTHING
        linear = utilities_N[survivors].cpu().double().numpy()
        kept, solution = self._weigh(gram, linear)
        return [survivors[i] for i in kept], gram[np.ix_(kept, kept)], linear[kept], solution

    def _alike(self, utilities_N: Tensor, positive: list[int], quadratic: Interaction, reason: str) -> Choice:
        """The best by first order, all alike: what needs no solver."""
        best = positive[: self.batch_size]
        kept, gram = sound(best, _matrix(quadratic.gram(best)))
        linear = utilities_N[kept].cpu().double().numpy()
        return kept, gram, linear, Solution(np.ones(len(kept)), "fallback_equal", 0.0, math.nan, reason)

    def _views(self, interaction: Interaction) -> tuple[Tensor, Interaction]:
        """`c` of usable candidates, and the interaction whose Gram matrix is K."""
        if self.metric == "p_norm":
            return usable_utilities(interaction), interaction
        updates = replace(interaction, preconditioner=squared(interaction.preconditioner))
        if self.metric == "update":
            return usable_utilities(updates), updates
        return usable_utilities(interaction) * self.gamma, updates

    def _filter(self, utilities_N: Tensor, positive: list[int], quadratic: Interaction) -> tuple[list[int], Matrix]:
        """At most m candidates and their K. `positive` is in the order of c."""
        if self.filter == "first_order":
            # A positive cosine and a positive c are the same; ranked by c, no K is needed outside the survivors.
            survivors = positive[: self.max_survivors]
            return survivors, _matrix(quadratic.gram(survivors))
        if self.filter == "cosine":
            positive, gram = sound(positive, _matrix(quadratic.gram(positive)))
            cosines = utilities_N[positive].cpu().double().numpy() / np.sqrt(np.diag(gram))
            order = np.argsort(-cosines, kind="stable")[: self.max_survivors]
            return [positive[i] for i in order], gram[np.ix_(order, order)]
        usable = torch.isfinite(utilities_N).nonzero().squeeze(1).tolist()
        usable, gram = sound(usable, _matrix(quadratic.gram(usable)))
        linear = utilities_N[usable].cpu().double().numpy()
        picked = matching_pursuit(with_ridge(gram, self.ridge), linear, self.max_survivors, self.solver)
        return [usable[i] for i in picked], gram[np.ix_(picked, picked)]

    def _weigh(self, gram: Matrix, linear: Vector) -> tuple[list[int], Solution]:
        """Solve on all survivors, drop the most dispensable as `eliminate` does, and solve again on those left."""
        hessian, reward = self._program(gram, linear)
        solution = self._solve(hessian, reward)
        kept = eliminate(hessian, reward, np.flatnonzero(solution.coefficients > 0), self.batch_size, self.min_gain)
        if (solution.coefficients > 0).sum() > len(kept):
            solution = self._solve(hessian[np.ix_(kept, kept)], reward[kept])
        else:
            solution = replace(solution, coefficients=solution.coefficients[kept])
        if self.normalisation == "simplex":
            solution = replace(solution, coefficients=solution.coefficients / solution.coefficients.sum())
        return kept.tolist(), solution

    def _program(self, gram: Matrix, linear: Vector) -> tuple[Matrix, Vector]:
        """H and c of the program over non-negative coefficients."""
        hessian = with_ridge(gram, self.ridge)
        return on_simplex(hessian, linear) if self.normalisation == "simplex" else (hessian, linear)

    def _solve(self, hessian: Matrix, linear: Vector) -> Solution:
        return answer(self.solver, hessian, linear, self.cap)


def answer(solver: CoefficientSolver, hessian: Matrix, linear: Vector, cap: float | None = None) -> Solution:
    """What a solver says. Raises SolverError for whatever goes wrong in it."""
    try:
        solution = solver.solve(hessian, linear, cap=cap)
    except Exception as error:
        raise SolverError(f"{type(error).__name__}: {error}") from error
    if not np.isfinite(solution.coefficients).all():
        raise SolverError("the coefficients are not finite")
    return solution


def sound(samples: list[int], gram: Matrix) -> tuple[list[int], Matrix]:
    """Without samples whose gradient is so long that its square overflows: c may be finite where K is not.

    Raises ValueError if K is not that of the samples.
    """
    if gram.shape != (len(samples), len(samples)):
        raise ValueError(f"K of shape {gram.shape} and c of {len(samples)} samples do not go together")
    kept = np.flatnonzero(np.isfinite(np.diag(gram)) & (np.diag(gram) > 0))
    return [samples[i] for i in kept], gram[np.ix_(kept, kept)]


def matching_pursuit(gram: Matrix, linear: Vector, size: int, solver: CoefficientSolver) -> list[int]:
    """Non-negative orthogonal matching pursuit: at most `size` candidates, in the order in which they were added.

    Each is the one whose own step would gain most after the earlier ones, `r_i / sqrt(K_ii)` with `r = c - K w` and w
    solved again on those picked so far. Ends early once no step gains anything. A longer list starts with a shorter
    one, so utility grows with `size`.
    """
    lengths = np.sqrt(np.diag(gram))
    free = lengths > 0
    picked: list[int] = []
    weights = np.zeros(len(linear))
    first = 0.0
    while len(picked) < size and free.any():
        scores = np.where(free, (linear - gram @ weights) / np.where(free, lengths, 1.0), -np.inf)
        best = int(np.argmax(scores))
        first = first or float(scores[best])
        if scores[best] <= max(0.0, PURSUIT_TOLERANCE * first):
            break
        picked.append(best)
        free[best] = False
        weights[picked] = answer(solver, gram[np.ix_(picked, picked)], linear[picked]).coefficients
    return picked


def on_simplex(hessian: Matrix, linear: Vector) -> tuple[Matrix, Vector]:
    """The program whose solution, divided by its sum, is that of `min 1/2 w^T H w - c^T w` over `w >= 0` of sum 1.

    There, the objective is half of `w^T (H - c 1^T - 1 c^T + s 1 1^T) w` but for a constant. The shortest vector of a
    cone's section is found without the constraint: solve for the same matrix and a linear term of ones, then divide by
    the sum. Any s from `c^T H^-1 c` on keeps the matrix positive.
    """
    offset = 2 * linear @ np.linalg.lstsq(hessian, linear, rcond=None)[0]
    return hessian - linear[:, None] - linear[None, :] + offset, np.ones(len(linear))


def eliminate(hessian: Matrix, linear: Vector, candidates: Indices, size: int, min_gain: float = 0.0) -> Indices:
    """Of `candidates`, those that remain when again and again the one goes that is missed least.

    At most `size` remain, and where more than one does, each adds at least the share `min_gain` of their utility.

    Without candidate i, the others answering, the utility `c^T w - 1/2 w^T H w` is lower by half of
    `w_i^2 / (H^-1)_ii` (Hassibi and Stork 1993, equation 5), of `1/2 c^T w` in all; one whose own coefficient has
    become negative goes first. Of duplicates all but one go at no loss, where ranking by `c_i w_i` would keep them and
    drop what they hide.
    """
    kept = candidates
    hessian = hessian + np.diag(JITTER * np.diag(hessian))
    while len(kept) > (1 if min_gain else size):
        inverse = np.linalg.inv(hessian[np.ix_(kept, kept)])
        weights = inverse @ linear[kept]
        losses = np.where(weights > 0, weights**2 / np.diag(inverse), -np.inf)
        least = int(np.argmin(losses))
        if len(kept) <= size and losses[least] >= min_gain * (linear[kept] @ weights):
            break
        kept = np.delete(kept, least)
    return kept


def line_search(quadratic: Interaction, utilities_N: Tensor, coefficients_N: Tensor) -> float:
    """The factor on the coefficients that suits best, `c^T w / w^T K w`, not negative: exact however w was found.

    `utilities_N` are c; candidates with a coefficient of zero are not read. `quadratic` is the interaction of K.
    """
    used = coefficients_N != 0
    linear = float(utilities_N.double().cpu()[used] @ coefficients_N.double()[used])  # weights are decided on the CPU
    return max(0.0, linear) / quadratic.gradients.squared_length(coefficients_N, quadratic.preconditioner)


def with_ridge(gram: Matrix, ridge: float) -> Matrix:
    """K with each entry of its diagonal raised by the share `ridge` of itself."""
    hessian: Matrix = gram + np.diag(ridge * np.diag(gram))
    return hessian


def usable_utilities(interaction: Interaction) -> Tensor:
    """`c_i`, with minus infinity for candidates whose loss or gradient is not finite: they are never selected."""
    utilities_N = interaction.utilities_N
    usable = torch.isfinite(utilities_N) & torch.isfinite(interaction.gradients.losses_N)
    return torch.where(usable, utilities_N, -torch.inf)


def positive_samples(utilities_N: Tensor) -> list[int]:
    """Candidates whose update points towards the target, the best first."""
    order = torch.argsort(utilities_N, descending=True, stable=True).tolist()
    return [i for i in order if utilities_N[i] > 0]


def redundancy(gram: Matrix, linear: Vector, weights: Vector) -> float:
    """What pairs of samples take away, `1/2 sum_{i != j} w_i w_j K_ij`, as a share of `c^T w`."""
    pairs = 0.5 * (weights @ gram @ weights - (weights**2) @ np.diag(gram))
    return float(pairs / (linear @ weights))


def _matrix(gram: Tensor) -> Matrix:
    matrix: Matrix = gram.cpu().numpy()
    return matrix
