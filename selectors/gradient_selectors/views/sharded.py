"""The gradients of a pool, and P, of a model that is sharded: each rank has its own rows of the parameters.

Per-sample gradients are those of `shared`: every rank has factors of its own samples, whole. What lies in rows is the
target's gradient, Adam's moments, and the update. `P * G` is made from rows and gathered, one parameter at a time; K is
multiplied by whose rows it is; of the update each rank gets its own rows. Whatever else is looked at is gathered, one
parameter at a time, by all ranks in the same order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.capture.shards import is_sharded, own_rows
from gradient_selectors.preconditioner import (
    AdamPreconditioner,
    Preconditioner,
    RowwisePreconditioner,
    SelectiveOptimizer,
    plain,
)
from gradient_selectors.views.shared import Asked, SharedPool
from gradient_selectors.world.base import World
from gradient_selectors.world.deal import own_span
from gradient_selectors.world.rows import RowsGradient, at_rows, whole


@dataclass(frozen=True, eq=False)
class RowsPreconditioner(RowwisePreconditioner):
    """P of which each rank has its own rows. A call is one of all ranks, which makes it whole.

    Attributes:
        own: rows of P that are this rank's, by parameter name; nothing is exchanged for it.
        parameters: whose P it is.
    """

    world: World
    own: Preconditioner
    parameters: Mapping[str, Tensor]

    def __call__(self, name: str, rows: Tensor | None = None) -> Tensor | None:
        own, num_rows = self.own(name), self.parameters[name].shape[0]
        if own is None:
            return None
        return whole(self.world, own, num_rows) if rows is None else at_rows(self.world, own, num_rows, rows)


@dataclass(frozen=True, eq=False)
class _AdamOfRows(AdamPreconditioner):
    """Adam's P of this rank's rows.

    Attributes:
        usual_sizes: mean second moment of each whole parameter.
    """

    usual_sizes: Mapping[str, Tensor] = field(kw_only=True)

    def usual(self, name: str) -> Tensor | None:
        return self.usual_sizes[name]


def require_rows(capture: GradientCapture, optimizer: torch.optim.Optimizer, anchors: object = None) -> None:
    """Raise ValueError for what a sharded model does not go with, if it is one."""
    if not capture.is_sharded:
        return
    if isinstance(optimizer, SelectiveOptimizer) and not hasattr(optimizer, "world"):
        kind = type(optimizer).__name__
        raise ValueError(f"{kind} needs whole parameters; use torch's AdamW or MaskedAdamW with a sharded model")
    if anchors is not None:
        raise ValueError("a mask's anchors need a whole model; leave them out with one that is sharded")
    if not all(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer holds parameters as they were before the model was sharded; make it after")


@torch.no_grad()
def in_rows(world: World, found: Preconditioner, parameters: Mapping[str, Tensor]) -> Preconditioner:
    """The same, for a model whose parameters lie in rows. Then it is a call of all ranks.

    `found` knows this rank's rows: of Adam's P the mean second moments are summed.
    """
    if found is plain or not any(map(is_sharded, parameters.values())):
        return found
    own = _summed(world, found) if isinstance(found, AdamPreconditioner) else found
    return RowsPreconditioner(world, own, parameters)


def _summed(world: World, whole_p: AdamPreconditioner) -> _AdamOfRows:
    states = {p: whole_p.states[p] for p in whole_p.parameters.values() if whole_p.states.get(p)}
    own = {p: own_rows(state["exp_avg_sq"]) for p, state in states.items()}
    names = [name for name, parameter in whole_p.parameters.items() if parameter in own]
    values = [own[whole_p.parameters[name]] for name in names]
    sums = [torch.stack([part.float().sum().double(), part.count_nonzero().double()]) for part in values]
    totals = world.sum(torch.stack(sums)) if sums else torch.zeros(0, 2)
    usual = {name: (total / count.clamp(min=1)).float() for name, (total, count) in zip(names, totals, strict=True)}
    return _AdamOfRows(
        whole_p.parameters,
        {p: {"exp_avg_sq": rows} for p, rows in own.items()},
        whole_p.groups,
        whole_p.steps,
        whole_p.top_rate,
        usual_sizes=usual,
    )


@dataclass(frozen=True)
class ShardedPool(SharedPool):
    """The per-sample gradients of all ranks' samples, of a model that is sharded."""

    @torch.no_grad()
    def dots(self, direction: Gradient) -> dict[str, Tensor]:
        return self.of_all({name: self.held.along(name, direction[name]) for name in self.factors})

    @torch.no_grad()
    def utilities_of(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        if not isinstance(target, RowsGradient):
            return super().utilities_of(name, target, preconditioner)
        rows, diagonal = target.own[name], self._own_diagonal(name, preconditioner)
        own = rows if diagonal is None else diagonal * rows
        return self.held.along(name, whole(self._world, own, self.shapes[name][0]))

    def _asked(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Asked:
        if name in self.by_index:
            return super()._asked(name, samples, preconditioner)
        diagonal, (first, _) = self._own_diagonal(name, preconditioner), own_span(self._world, self.shapes[name][0])
        return Asked(name, None, None if diagonal is None else diagonal.sqrt(), first)

    @torch.no_grad()
    def weighted_gradient_of(self, name: str, coefficients: Tensor) -> Tensor:
        return whole(self._world, self._update_of(name, coefficients), self.shapes[name][0])

    def updates(self, coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._update_of(name, coefficients)) for name in self.factors)

    @torch.no_grad()
    def _update_of(self, name: str, coefficients: Tensor) -> Tensor:
        own_n = self.held.own_coefficients(coefficients)
        return self._world.scatter(self.held.local.weighted_gradient_of(name, own_n))

    @property
    def _world(self) -> World:
        return self.held.shares.world

    def _own_diagonal(self, name: str, preconditioner: Preconditioner) -> Tensor | None:
        """P at this rank's rows."""
        if isinstance(preconditioner, RowsPreconditioner):
            return preconditioner.own(name)
        values, (lo, hi) = preconditioner(name), own_span(self._world, self.shapes[name][0])
        return None if values is None else values[lo:hi]
