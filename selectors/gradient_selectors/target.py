"""The target set, whose gradient steers the selection; and means over any fixed set of samples."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradient_selectors.capture.batch import Batch, micro_batches
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.capture.pieces import add_weighted_gradient, pieces_of
from gradient_selectors.capture.shards import is_sharded, lying_as, own_part, own_rows
from gradient_selectors.world.base import Alone, World, together
from gradient_selectors.world.deal import Shares, agreed_names, missing
from gradient_selectors.world.partial import Partial
from gradient_selectors.world.rows import RowsGradient, total_norm

MICRO_BATCH = 16  # samples in one pass; bounds the memory, the result does not depend on it
ALONE = Alone()


class TargetError(ValueError):
    """The target's gradient is not finite, and there is no older one to go on with."""


def mean_gradient(
    capture: GradientCapture, batches: Iterable[Batch], micro_tokens: int | None = None, world: World = ALONE
) -> Gradient:
    """Mean of the samples' gradients, by parameter name, float32.

    Each sample's gradient is that of its mean loss, so long samples do not outweigh short ones. `micro_tokens`: bound
    on the tokens of a pass, padding included. With a `world`, ranks share the samples, and each has a part of the mean.
    Of a sharded model the gradient lies in rows as its parameters do.
    """
    samples, own = _shared(batches, world)
    total: dict[str, Tensor] = {}
    parts = [b.among(piece) for b in micro_batches(own, MICRO_BATCH) for piece in pieces_of(b.lengths, micro_tokens)]
    spares = _spares(world, capture, samples, len(parts))
    with together(world, has_calls=capture.is_sharded):
        for part in parts:
            add_weighted_gradient(total, capture, part, torch.full((len(part),), 1.0 / len(samples)))
        for spare in spares:
            add_weighted_gradient(total, capture, spare, torch.zeros(1))
    if capture.is_sharded:
        return {
            name: lying_as(parameter, total[name]) for name, parameter in capture.parameters.items() if name in total
        }
    return total if world.size == 1 else _parted(total, capture, world)


def mean_loss(
    capture: GradientCapture,
    batches: Iterable[Batch],
    advance: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
) -> float:
    """Mean over samples of their mean loss (nats per token). `advance` is told how many samples are done."""
    samples, own = _shared(batches, world)
    losses: list[Tensor] = []
    parts = list(micro_batches(own, MICRO_BATCH))
    spares = _spares(world, capture, samples, len(parts))
    with together(world, has_calls=capture.is_sharded):
        for batch in parts:
            losses.append(capture.losses(batch))
            advance(sum(map(len, losses)))
        for spare in spares:
            capture.losses(spare)
    found = torch.cat(losses).double() if losses else torch.zeros(0, dtype=torch.float64, device=capture.device)
    return float(found.mean()) if world.size == 1 else float(world.sum(found.sum().reshape(1))) / len(samples)


def _shared(batches: Iterable[Batch], world: World) -> tuple[list[Batch], list[Batch]]:
    """All samples, and this rank's of them."""
    samples = [sample for batch in batches for sample in batch.samples()]
    own = Shares.of(world, [sample.lengths[0] for sample in samples]).own
    return samples, [samples[i] for i in own]


def _spares(world: World, capture: GradientCapture, samples: Sequence[Batch], passes: int) -> list[Batch]:
    """What this rank makes passes over that only others need: over a sharded model all must make as many."""
    if not capture.is_sharded:
        return []
    shortest = min(samples, key=lambda sample: sample.lengths[0])
    return [shortest] * missing(world, passes)


def in_place(state: Mapping[str, Any], parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a run with what is as large as the parameters as these lie: in rows, if they do."""
    if not any(map(is_sharded, parameters.values())):
        return state
    lying = dict(state)
    for part, name in (("target", "gradient"), ("mask", "average")):
        if state.get(part):
            own = {key: own_part(parameters[key], values) for key, values in state[part][name].items()}
            lying[part] = {**state[part], name: own}
    return lying


def seen(gradient: Mapping[str, Tensor], world: World) -> Gradient:
    """The gradient as it is read: one that lies in rows is made whole, one parameter at a time, as it is looked up."""
    if isinstance(gradient, Partial) or not any(map(is_sharded, gradient.values())):
        return gradient
    own = {name: own_rows(values) for name, values in gradient.items()}
    return RowsGradient(world, own, {name: values.shape for name, values in gradient.items()})


def _parted(total: dict[str, Tensor], capture: GradientCapture, world: World) -> Partial:
    """The sum over ranks, in parts. A parameter may have a gradient on some only."""
    for name in agreed_names(world, list(total), list(capture.parameters)):
        if name not in total:
            total[name] = torch.zeros(capture.parameters[name].shape, device=capture.device)
    return Partial(world, {name: total[name] for name in capture.parameters if name in total})


@dataclass
class Target:
    """The target set and its gradient, which is refreshed every `refresh_steps` steps.

    A gradient that is some steps old points where the model has already gone: samples like the target's lose their
    utility within a few steps. So many small refreshes serve better than a few large ones: each takes the next
    `refresh_samples` of the set, and the gradient is their moving average, the plain mean of the first ones.

    A refresh that is not finite is refused: nothing of it enters the average, the old gradient stays, and the next one
    is due as if this one had been made.

    Attributes:
        samples: what the model should get better at, one a batch; never trained on.
        refresh_samples: samples of a refresh, taken in turn; all of them if there are no more.
        decay: of the moving average of the gradient, where a refresh takes fewer samples than there are.
        gradient: None before the first refresh.
        age: steps that used `gradient` since its last refresh.
        refreshes: how many there were, with those that were refused.
        refusals: how many of them were refused.
        refused: whether the last step's was.
    """

    samples: Sequence[Batch]
    refresh_steps: int = 4
    refresh_samples: int = 8
    decay: float = 0.5
    gradient: Gradient | None = None
    age: int = 0
    refreshes: int = 0
    refusals: int = 0
    refused: bool = field(default=False, init=False)

    @classmethod
    def of(cls, batches: "Iterable[Batch | Mapping[str, Any]]", **options: Any) -> "Target":
        """The target set of some batches, as a data collator makes them. Raises ValueError if they hold no sample."""
        samples = [sample for batch in batches for sample in Batch.of(batch).samples()]
        if not samples:
            raise ValueError("the target holds no sample; give some dozens of what the model should get better at")
        return cls(samples, **options)

    def current(
        self, capture: GradientCapture, micro_tokens: int | None = None, world: World = ALONE
    ) -> tuple[Gradient, bool]:
        """The gradient for the next step, and whether it was refreshed: in passes of at most `micro_tokens`.

        Raises TargetError if it is not finite and there is no older one.
        """
        due, self.refused = self.gradient is None or self.age >= self.refresh_steps, False
        found = self.gradient
        if world.size > 1 and found is not None and not (capture.is_sharded or isinstance(found, Partial)):
            self.gradient = Partial(world, found, whole=True)
        if due:
            self._refresh(capture, micro_tokens, world)
        assert self.gradient is not None
        self.age += 1
        return seen(self.gradient, world), due and not self.refused

    def renewed(
        self, batches: "Iterable[Batch | Mapping[str, Any]]", capture: GradientCapture, micro_tokens: int | None = None
    ) -> "Target":
        """Another target with the same options and its first gradient; this one stays as it is.

        Raises ValueError if there is no sample, and TargetError if the gradient is not finite.
        """
        options = {"refresh_steps": self.refresh_steps, "refresh_samples": self.refresh_samples, "decay": self.decay}
        other = Target.of(batches, **options)
        other._refresh(capture, micro_tokens, ALONE)
        return other

    def next(self, capture: GradientCapture, micro_tokens: int | None = None, world: World = ALONE) -> Gradient | None:
        """The gradient of samples whose turn is next, as the model is now. Nothing of it enters `gradient`.

        None of them was in the last refresh. Of all samples the least of these is in `gradient`: nothing before the set
        was gone through once. None where each refresh takes all samples, for then none is without a say.
        """
        turn = self._turn()[0]
        others = turn[: len(self.samples) - len(turn)]
        return seen(mean_gradient(capture, others, micro_tokens, world), world) if others else None

    def _turn(self) -> tuple[list[Batch], int]:
        """The samples of the next refresh, and the number of the first of them."""
        count, total = min(self.refresh_samples, len(self.samples)), len(self.samples)
        first = self.refreshes * count if count < total else 0
        return [self.samples[i % total] for i in range(first, first + count)], first

    def _refresh(self, capture: GradientCapture, micro_tokens: int | None, world: World) -> None:
        samples, first = self._turn()
        count, total = len(samples), len(self.samples)
        fresh = mean_gradient(capture, samples, micro_tokens, world)
        self.refused = not is_finite(seen(fresh, world))
        if self.refused and self.gradient is None:
            raise TargetError(_poisoned(capture, samples, first, total))
        if self.refused:
            self.refusals += 1
        elif self.gradient is None or count == total:
            self.gradient = fresh
        else:
            share = max(1 - self.decay, 1 / (self.refreshes - self.refusals + 1))
            _move(self.gradient, fresh, share)
        self.refreshes, self.age = self.refreshes + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The gradient, which lies as the live one does and may share memory, and the counters: a call of all ranks."""
        gradient = {} if self.gradient is None else dict(self.gradient)
        counters = {"age": self.age, "refreshes": self.refreshes, "refusals": self.refusals}
        return {"gradient": gradient} | counters

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a copy. A gradient that is not finite, as was once saved, is left out: the next step makes one."""
        gradient = {name: values.clone() for name, values in state["gradient"].items()}
        self.gradient = gradient if gradient and is_finite(gradient) else None
        self.age, self.refreshes, self.refusals = state["age"], state["refreshes"], state.get("refusals", 0)


def _move(gradient: Gradient, fresh: Gradient, share: float) -> None:
    """So far towards a fresh one, in place."""
    if isinstance(gradient, Partial):
        assert isinstance(fresh, Partial)
        gradient.move(fresh, share)
        return
    for name, values in gradient.items():
        own_rows(values).lerp_(own_rows(fresh[name]), share)


def is_finite(gradient: Gradient) -> bool:
    """Whether a gradient is of a finite length: one answer is read back from a device."""
    if isinstance(gradient, Partial):
        return gradient.is_finite()
    if isinstance(gradient, RowsGradient):
        return math.isfinite(total_norm(gradient.world, gradient.own))
    return math.isfinite(float(torch.nn.utils.get_total_norm(gradient.values())))


def _poisoned(capture: GradientCapture, samples: Sequence[Batch], first: int, total: int) -> str:
    """What is wrong with the samples of a refresh, in one line; `first`: the number of the first of them."""
    losses = [mean_loss(capture, [sample]) for sample in samples]
    found = next(((i, loss) for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    which = "" if found is None else f": the loss of its sample {(first + found[0]) % total} is {found[1]}"
    return f"the gradient of the target is not finite{which}; check that sample and the model's weights"
