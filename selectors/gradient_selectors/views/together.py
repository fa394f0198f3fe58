"""Score a pool on all ranks: each its own samples, and what the ranks then know of one another's."""

from collections.abc import Mapping, Sequence

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Factor, Lookup, MatrixFactor, TokenRows
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.preconditioner import Preconditioner
from gradient_selectors.views.again import Spares
from gradient_selectors.views.pieces import Budget, Part, keeps_all, score_pool
from gradient_selectors.views.scoring import Scoring
from gradient_selectors.views.sharded import ShardedPool
from gradient_selectors.views.sharded_again import ShardedInPieces
from gradient_selectors.views.shared import Holdings, SharedFactor, SharedMatrix, SharedPool, SharedTable
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.world.base import World, together
from gradient_selectors.world.deal import Shares, missing
from gradient_selectors.world.partial import Partial

NOTHING, PLAIN, MATRIX, TOKENS, LOOKUPS = range(5)  # what a parameter's factors are


def score_together(
    world: World,
    capture: GradientCapture,
    batch: Batch,
    scoring: Scoring,
    target: Gradient,
    preconditioner: Preconditioner,
    budget: Budget,
) -> PoolGradients:
    """`score_pool` on all ranks, each with its share of the samples. All are given the same batch."""
    if world.size == 1:
        return score_pool(capture, batch, scoring, target, preconditioner, budget)
    shares = Shares.of(world, batch.lengths)
    shortest = min(range(len(batch)), key=lambda i: batch.lengths[i])  # of a rank that has none; it counts for nothing
    own, num_tokens = batch.among(shares.own or [shortest]), batch.input_ids_NT.shape[1]
    part = Part(num_tokens)
    if capture.is_sharded:
        part = Part(num_tokens, _keeps(capture, batch, shares, budget), _spares(world, batch.among([shortest])))
    _get_ready(scoring, target, preconditioner, capture.head)
    with together(world, has_calls=capture.is_sharded):
        local = score_pool(capture, own, scoring, target, preconditioner, budget, part)
    kinds = _agreed_kinds(world, local)
    held = Holdings(local, shares)  # and not the pool: one that holds itself would outlive its step
    made = {PLAIN: SharedFactor, MATRIX: SharedMatrix, TOKENS: SharedTable, LOOKUPS: SharedFactor}
    factors = {name: [made[kind](held, name)] for name, kind in kinds.items() if kind != NOTHING}
    by_index = frozenset(name for name, kind in kinds.items() if kind == LOOKUPS)
    pool_type = SharedPool
    if capture.is_sharded:
        pool_type = ShardedPool if part.keeps else ShardedInPieces
    return pool_type(held.spread(local.losses_N), factors, local.shapes, held, by_index)


def _get_ready(scoring: Scoring, target: Gradient, preconditioner: Preconditioner, head: str | None) -> None:
    """Exchange what passes read of the target: within one, nothing can be."""
    if not isinstance(target, Partial):
        return
    scoring.start(target, preconditioner, head)
    target.complete(n for n in target if not (isinstance(scoring, Sketched) and scoring.is_projected(n)))


def _keeps(capture: GradientCapture, batch: Batch, shares: Shares, budget: Budget) -> bool:
    """Whether the factors of every rank's samples fit its budget: one that lets go makes passes that all must make."""
    most = max(sum(batch.lengths[i] for i in share) for share in shares.of_ranks)
    return keeps_all(capture, most, budget.factors_bytes)


def _spares(world: World, shortest: Batch) -> Spares:
    """Over a sharded model all ranks make as many passes, and one with fewer pieces runs the shortest sample again."""
    return lambda passes: [shortest] * missing(world, passes)


def _agreed_kinds(world: World, local: PoolGradients) -> Mapping[str, int]:
    """What the factors of each parameter are, on all ranks that have any: where these differ, only what all know."""
    facts = world.facts([_kind(local.factors.get(name, ())) for name in local.shapes])
    kinds = {}
    for name, found in zip(local.shapes, zip(*facts, strict=True), strict=True):
        known = set(found) - {NOTHING}
        kinds[name] = NOTHING if not known else known.pop() if len(known) == 1 else PLAIN
    return kinds


def _kind(factors: Sequence[Factor]) -> int:
    if not factors:
        return NOTHING
    if all(isinstance(factor, Lookup) for factor in factors):
        return LOOKUPS
    if not all(isinstance(factor, MatrixFactor) for factor in factors):
        return PLAIN
    return TOKENS if any(isinstance(factor, TokenRows) for factor in factors) else MATRIX
