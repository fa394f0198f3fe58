"""One decision for all ranks. All decide from the same numbers, yet a solver's answer may differ on two machines."""

import json
import logging
from typing import Any

import torch
from torch import Tensor

from gradient_selectors.weigh.selector import Decision, SolverReport
from gradient_selectors.world.base import World, first, is_same

logger = logging.getLogger(__name__)


def agreed(world: World, decision: Decision) -> Decision:
    """Rank 0's decision, on every rank. A rank that has decided otherwise says so in its log."""
    if world.size == 1:
        return decision
    own = _told(decision)
    same = is_same(world, own.encode())
    if all(same):
        return decision
    if not same[world.rank]:
        logger.warning("rank %d decided otherwise than rank 0, whose decision holds", world.rank)
    return _understood(json.loads(first(world, own)), decision)


def _told(decision: Decision) -> str:
    """The decision as JSON, without how long it took."""
    solver = None if decision.solver is None else [decision.solver.status, decision.solver.reason]
    tensors = (decision.coefficients_N, decision.coefficients_LN, decision.route_entropy_L)
    listed = [None if tensor is None else tensor.tolist() for tensor in tensors]
    return json.dumps([*listed, decision.num_positive, decision.redundancy, solver])


def _understood(told: list[Any], own: Decision) -> Decision:
    def tensor(values: list[Any] | None, like: Tensor | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=None if like is None else like.dtype)

    coefficients_N, coefficients_LN, entropy_L, num_positive, redundancy, solver = told
    seconds = 0.0 if own.solver is None else own.solver.seconds
    return Decision(
        torch.tensor(coefficients_N, dtype=own.coefficients_N.dtype),
        num_positive,
        redundancy,
        None if solver is None else SolverReport(solver[0], seconds, solver[1]),
        tensor(coefficients_LN, own.coefficients_LN),
        tensor(entropy_L, own.route_entropy_L),
    )
