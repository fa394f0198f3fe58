"""One call in place of `loss.backward()`: score candidates, decide, and leave the update's gradient in `.grad`."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.capture.pieces import pieces_of
from gradient_selectors.capture.shards import lying_as
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.mask.masked_adamw import MaskChange, MaskedAdamW
from gradient_selectors.preconditioner import Preconditioner, optimizer_steps, preconditioner_of
from gradient_selectors.route.gast import Gast
from gradient_selectors.state import State, load_states, states_of
from gradient_selectors.target import Target, in_place, is_finite, seen
from gradient_selectors.views.advantage import Comparison, compare
from gradient_selectors.views.again import SecondPass, second_pass_of
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.pieces import Budget, padding_of
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.scoring import Exact, Scoring
from gradient_selectors.views.sharded import in_rows, require_rows
from gradient_selectors.views.together import score_together
from gradient_selectors.weigh.agreed import agreed
from gradient_selectors.weigh.baselines import Equal
from gradient_selectors.weigh.plain import train_plainly
from gradient_selectors.weigh.selector import Decision, Selector, needs_target
from gradient_selectors.weigh.stated import restated
from gradient_selectors.world.base import Alone, World

Batches = Iterable[Batch | Mapping[str, Any]]


@dataclass(frozen=True)
class PoolReport:
    """What a pass found, beside the decision.

    Attributes:
        losses_N: loss of each candidate before the update (nats per token): progressive validation for free.
        utilities_N: utility of each candidate relative to the target's own, float64, if it was asked for.
        alignments_N: `Interaction.utilities_N`, if the decision needed them.
        target_refreshed: whether the target's gradient was computed for this pass.
        target_refused: whether it was, but was not finite: the pass used the one before.
        mask_change: what a refresh of the mask changed, or None if there was none.
        seconds: time by phase: `target`, `score`, `weigh`, `compare`, `update`; and `second_pass`, where samples were
            run again.
        pieces: passes that the pool was scored in.
        padding: share of padding in the tokens of these passes.
        second_pass_samples: samples that were run again for what was not kept of them, counted for each pass.
        comparison: of the decision with a uniform one, if it was asked for and there is a target to judge by.
    """

    losses_N: Tensor
    utilities_N: Tensor | None = None
    target_refreshed: bool = False
    target_refused: bool = False
    mask_change: MaskChange | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    pieces: int = 1
    padding: float = 0.0
    second_pass_samples: int = 0
    comparison: Comparison | None = None
    alignments_N: Tensor | None = None


class SelectionEngine:
    """Selects by gradients in any training loop.

    A selecting step on 8 candidates, of which 2 enter the update:

    Examples:
        >>> from gradient_selectors import FilterThenWeight, SelectionEngine
        >>> from gradient_selectors.examples import tiny_batch, tiny_model
        >>> model, target_batches, loader = tiny_model(), [tiny_batch(seed=1)], [tiny_batch(8)]
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> engine = SelectionEngine(model, optimizer, FilterThenWeight(batch_size=2), target=target_batches)
        >>> for candidates in loader:
        ...     decision = engine.backward(candidates)  # in place of loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> len(decision.selected) <= 2, engine.losses_N.shape
        (True, torch.Size([8]))

    Attributes:
        capture: hooks on the model.
        last: what the last pass found; None before the first.
    """

    def __init__(
        self,
        model: nn.Module | GradientCapture,
        optimizer: torch.optim.Optimizer,
        selector: Selector,
        *,
        target: Target | Batches | None = None,
        refresh_steps: int = 4,
        scoring: Scoring | None = None,
        route: Gast | None = None,
        mask: DualSft | None = None,
        autocast: torch.dtype | None = None,
        preconditioner_warmup_steps: int = 1,
        reports_utilities: bool = False,
        micro_tokens: int | None = None,
        factors_bytes: int | None = None,
        world: World | None = None,
    ) -> None:
        """Attach to the model.

        Args:
            model: a transformers causal LM, or a PEFT model around one; or a capture of it, as of one that is sharded.
            optimizer: over the model's trainable parameters; AdamW, Adam, SGD or `MaskedAdamW`.
            selector: decides each candidate's coefficient.
            target: batches of what the model should get better at, as a data collator makes them, or a `Target`. Needed
                unless nothing reads its gradient.
            refresh_steps: steps between refreshes of the target's gradient, where `target` is given as batches.
            scoring: `Exact()` by default, `RankOne()` or `Sketched()`.
            route: draws the samples that update each layer.
            mask: chooses the parameters that may move, again and again; the optimizer is then a `MaskedAdamW`.
            autocast: dtype of the passes (bfloat16), or None for the model's own.
            preconditioner_warmup_steps: optimizer steps before Adam's second moment is trusted; plain inner products
                until then. 10 or more for a model that starts from random parameters.
            reports_utilities: keep every candidate's utility in `last.utilities_N`, which a bandit learns from.
            micro_tokens: tokens of one pass, padding included; samples of like length go together. None for all.
            factors_bytes: bytes that a pool's factors of large matrices may take until the update. Chosen samples
                beyond it are run again. None for no limit.
            world: the ranks that train together, each of which makes the same calls with the same samples.

        Raises UnsupportedParameterError, naming it, for a trainable parameter that is not covered exactly, and
        ValueError for parts that do not go together.
        """
        if target is not None and not isinstance(target, Target):
            target = Target.of(target, refresh_steps=refresh_steps)
        self.target = target
        self._budget = Budget(micro_tokens, factors_bytes)
        self.world: World = Alone() if world is None else world
        steered = needs_target(selector) or route is not None or mask is not None or reports_utilities
        if self.target is None and steered:
            raise ValueError(f"{type(selector).__name__} is steered by a target; give target=batches")
        _require_fit(optimizer, mask, scoring, self._budget, self.world)
        self.selector, self.route, self.mask, self.optimizer = selector, route, mask, optimizer
        self.scoring: Scoring = Exact() if scoring is None else scoring
        self.capture = model if isinstance(model, GradientCapture) else GradientCapture(model, autocast)
        require_rows(self.capture, optimizer, None if mask is None else mask.anchors)
        self.last: PoolReport | None = None
        self._warmup_steps = preconditioner_warmup_steps
        self._reports_utilities = reports_utilities
        parts = (route, mask) if isinstance(selector, Equal) and not reports_utilities else (selector,)
        self._trains_plainly = all(part is None for part in parts)  # nothing reads a sample's gradient

    def backward(self, candidates: Batch | Mapping[str, Any], *, rival: torch.Generator | None = None) -> Decision:
        """Score the candidates, decide, and leave the update's gradient in `.grad`: None everywhere if nothing helps.

        `candidates`: `input_ids`, `labels` and `attention_mask`, (N, T) each, padded on the right. `weights` (N,) may
        state what each sample counts; coefficients are multiplied with these. Takes the place of `loss.backward()`:
        clipping and the optimizer's step are the caller's. Whatever was in `.grad` is overwritten.

        With a generator `rival`, on the CPU, `last.comparison` says what the update is worth beside one of as many
        samples that the generator draws, seen from samples of the target that its last refresh did not take. It is
        None where that takes all. Nothing else changes.

        A refresh of the target that is not finite is refused and reported in `last`; raises TargetError if it is the
        first one.
        """
        if self._trains_plainly:
            return self.train(candidates)
        clock = _Clock()
        batch = Batch.of(candidates)
        direction, refreshed = self._target_gradient()
        clock.lap("target")
        interaction = self._score(batch, direction)
        pool, lap = interaction.gradients, partial(clock.lap, second=second_pass_of(interaction.gradients))
        utilities_N = interaction.relative_utilities_N if self._reports_utilities else None
        lap("score")
        decision = self._decide(interaction)
        if batch.weights_N is not None:
            decision = restated(decision, batch.weights_N)
        lap("weigh")
        compared = None
        if rival is not None:
            compared = self._compare(interaction, decision, rival)
            lap("compare")
        change = self._leave_gradient(pool, decision, direction)
        lap("update")
        self.last = PoolReport(
            pool.losses_N,
            utilities_N,
            refreshed,
            target_refused=self.target is not None and self.target.refused,
            mask_change=change,
            seconds=clock.seconds,
            comparison=compared,
            alignments_N=interaction.known_utilities_N,
            **self._passes(batch, pool),
        )
        return decision

    def train(self, samples: Batch | Mapping[str, Any]) -> Decision:
        """Plain training on all samples: leaves their mean gradient in `.grad`, each sample with its stated weight.

        One forward and one backward pass that tap nothing, so it costs what any trainer's step costs. A sample whose
        loss is not finite is left out. A mask that is on is obeyed, and waits for the next `backward` to be refreshed.
        """
        clock = _Clock()
        batch = Batch.of(samples)
        losses_N, decision = train_plainly(self.capture, batch, self.world)
        if isinstance(self.optimizer, MaskedAdamW):
            self._obey_mask(self.optimizer)
        clock.lap("train")
        self.last = PoolReport(losses_N, seconds=clock.seconds)
        return decision

    def rehearse(self, samples: Batch | Mapping[str, Any], *, scores: bool = True) -> None:
        """Go through `backward`, or without `scores` through `train`, for what it may raise, and leave no trace.

        It tells which samples a pass fails on. There is no refresh, no gradient, and every generator is as it was.
        """
        batch = Batch.of(samples)
        parts: dict[str, object] = {"scoring": self.scoring, "selector": self.selector, "route": self.route}
        kept = states_of(parts)
        known = {} if self.target is None else self.target.gradient
        try:
            if not scores or self._trains_plainly or known is None:
                train_plainly(self.capture, batch, self.world)
                return
            interaction = self._score(batch, seen(known, self.world))
            decision = self._decide(interaction)
            for name in interaction.gradients.factors if decision.selected else ():
                interaction.gradients.weighted_gradient_of(name, decision.coefficients_N)
        finally:
            load_states(parts, kept)
            self.optimizer.zero_grad(set_to_none=True)

    def _decide(self, interaction: Interaction) -> Decision:
        decision = self.selector.decide(interaction)
        routed = decision if self.route is None else self.route.route(decision, interaction)
        return agreed(self.world, routed)

    @property
    def losses_N(self) -> Tensor:
        """Loss of each candidate of the last pass, before its update (nats per token), (N,) float32."""
        if self.last is None:
            raise ValueError("no pool has been scored yet; call backward first")
        return self.last.losses_N

    @property
    def preconditioner(self) -> Preconditioner:
        """P of the coming step; of a sharded model, a call of all ranks."""
        parameters = self.capture.parameters
        return in_rows(self.world, preconditioner_of(self.optimizer, parameters, self._warmup_steps), parameters)

    def state_dict(self) -> dict[str, Any]:
        """What the next pass depends on, beside model and optimizer: nested dictionaries of tensors and JSON values."""
        return states_of(self._parts())

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of what `state_dict` returned. A part that was off then begins afresh."""
        lying = in_place(state, self.capture.parameters)
        load_states(self._parts(), _on_device(lying, self.capture.device))

    def close(self) -> None:
        """Take the hooks off the model again."""
        self.capture.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parts(self) -> dict[str, object]:
        return {
            "target": self.target,
            "scoring": self.scoring,
            "selector": self.selector,
            "route": self.route,
            "mask": self.mask,
        }

    def _target_gradient(self) -> tuple[Gradient, bool]:
        """The target's gradient, and whether it is new. What the scoring kept of an old one, or of another P, goes."""
        gradient: Gradient = {}
        refreshed = False
        if self.target is not None:
            gradient, refreshed = self.target.current(self.capture, self._budget.micro_tokens, self.world)
        if refreshed or optimizer_steps(self.optimizer) == self._warmup_steps:
            self.scoring.reset()
        return gradient, refreshed

    def _score(self, batch: Batch, target: Gradient) -> Interaction:
        """One forward and one backward pass over the candidates, in pieces, seen from the target."""
        preconditioner = self.preconditioner
        gradients = score_together(self.world, self.capture, batch, self.scoring, target, preconditioner, self._budget)
        return Interaction(gradients, target, preconditioner, self.scoring)

    def _compare(self, seen: Interaction, decision: Decision, rival: torch.Generator) -> Comparison | None:
        fresh = None if self.target is None else self.target.next(self.capture, self._budget.micro_tokens, self.world)
        if fresh is None:
            return None
        coefficients = decision.coefficients_N if decision.coefficients_LN is None else decision.coefficients_LN
        return compare(seen.gradients, coefficients, (seen.target, fresh), seen.preconditioner, rival)

    def _passes(self, batch: Batch, pool: PoolGradients) -> dict[str, Any]:
        """What a report says of the passes over a pool."""
        pieces, second = pieces_of(batch.lengths, self._budget.micro_tokens), second_pass_of(pool)
        return {
            "pieces": len(pieces),
            "padding": padding_of(batch, pieces),
            "second_pass_samples": 0 if second is None else second.samples,
        }

    def _leave_gradient(self, gradients: PoolGradients, decision: Decision, target: Gradient) -> MaskChange | None:
        """Book-keep the weighted gradient and let the mask follow it; what a refresh of the mask changed."""
        parameters = self.capture.parameters
        for parameter in parameters.values():
            parameter.grad = None
        if not decision.selected:
            return None
        coefficients = decision.coefficients_N if decision.coefficients_LN is None else decision.coefficients_LN
        for name, values in gradients.updates(coefficients):
            parameters[name].grad = lying_as(parameters[name], values.to(parameters[name].dtype))
        if not isinstance(self.optimizer, MaskedAdamW):
            return None
        left = self._finite_gradient()
        if left is None:
            return None
        change = None
        if self.mask is not None:
            change = self.mask.follow(self.capture, self.optimizer, left, target)
        if change is not None:
            self.scoring.reset()
        self.optimizer.mask_gradients()
        return change

    def _obey_mask(self, optimizer: MaskedAdamW) -> None:
        left = self._finite_gradient()
        if left is None:
            return
        if self.mask is not None:
            self.mask.observe(left)
        optimizer.mask_gradients()

    def _finite_gradient(self) -> Gradient | None:
        """What is in `.grad`; None where it is not finite: it would spoil the mask's averages."""
        left = {name: p.grad for name, p in self.capture.parameters.items() if p.grad is not None}
        return left if is_finite(seen(left, self.world)) else None


def _on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A state with its tensors on the device; those of generators (uint8) stay on the CPU."""
    moved: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            moved[name] = _on_device(value, device)
        elif isinstance(value, Tensor) and value.dtype != torch.uint8:
            moved[name] = value.to(device)
        else:
            moved[name] = value
    return moved


def _require_fit(
    optimizer: torch.optim.Optimizer, mask: DualSft | None, scoring: Scoring | None, budget: Budget, world: World
) -> None:
    """Raise ValueError for parts that do not go together."""
    if mask is not None and not isinstance(optimizer, MaskedAdamW):
        raise ValueError(f"a mask needs the optimizer MaskedAdamW, not {type(optimizer).__name__}")
    if not isinstance(scoring, RankOne):
        return
    if budget != Budget():
        raise ValueError("RankOne needs all factors of the whole pool; leave micro_tokens and factors_bytes out")
    if world.size > 1:
        raise ValueError("RankOne needs the factors of all samples, which several ranks have; use Sketched or Exact")


class _Clock:
    """Seconds by phase; those of second passes count by themselves."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, second: SecondPass | None = None) -> None:
        now = time.perf_counter()
        apart = 0.0 if second is None else second.seconds - self.seconds.get("second_pass", 0.0)
        self.seconds[phase] = now - self._last - apart
        if apart:
            self.seconds["second_pass"] = self.seconds.get("second_pass", 0.0) + apart
        self._last = now
