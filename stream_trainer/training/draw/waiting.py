"""Samplers that let many samples wait and draw among them: by a bandit, by what was learned, by likeness.

As new samples come in, the oldest of the others leave without being scored.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gradient_selectors import ClusterUcb
from gradient_selectors.draw.auto import AutoDraw, Way
from gradient_selectors.draw.cluster_ucb import Draw
from gradient_selectors.draw.learned import LearnedDraw
from gradient_selectors.draw.stream_draw import Found, StreamDraw
from gradient_selectors.features.traits import Traits, embeddings_of
from gradient_selectors.state import Stateful

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.training.step import StepReport

logger = logging.getLogger(__name__)

WAYS: dict[Way, str] = {
    "learned": "training on what the learned draw draws: it makes the most progress in a second",
    "scored": "scoring every pool: it makes the most progress in a second",
    "rival": "training on some of what is most like the target: it makes the most progress in a second",
    "uniform": "selection does not pay at present: training on what chance draws, and probing now and then",
}

Describe = Callable[[Sequence[Sample]], Sequence[Traits | None]]


@dataclass
class WaitingRoom:
    """Samples that wait, and what is known of each.

    Before each draw it is filled up to `capacity`. After it, all but the newest `capacity - intake` leave: with a full
    room that makes `intake` samples a step, drawn or not; while the stream is slow, only drawn samples leave. What
    waits after a step is thus the same after a restart, when it is read again.

    Attributes:
        describe: computes the traits of samples that come in, None for those that it gave away.
        capacity: samples that wait at most.
        intake: samples that come in for each step, at least as many as are drawn.
    """

    buffer: Buffer
    describe: Describe
    capacity: int
    intake: int
    wait_s: float
    samples: list[Sample] = field(default_factory=list, init=False)
    traits: list[Traits] = field(default_factory=list, init=False)

    def fill(self, stopped: Callable[[], bool]) -> bool:
        """Let samples in. Returns whether there is something to draw from."""
        while missing := self.capacity - len(self.samples):
            come = self.buffer.take(missing, self.wait_s, stopped, or_none=bool(self.samples))
            described = [pair for pair in zip(come, self.describe(come), strict=True) if pair[1] is not None]
            self.samples += [sample for sample, _ in described]
            self.traits += [traits for _, traits in described if traits is not None]
            if self.samples or not come:
                break
        return bool(self.samples) and not stopped()

    def leave(self, drawn: Sequence[int]) -> tuple[list[Sample], list[Traits]]:
        """Let those drawn and the oldest of the others go: the samples not drawn, and the traits of all that leave."""
        rest = sorted(set(range(len(self.samples))) - set(drawn))
        stay = rest[max(0, len(rest) - (self.capacity - self.intake)) :]
        gone = sorted(set(range(len(self.samples))) - set(stay))
        undrawn = [self.samples[i] for i in gone if i not in set(drawn)]
        traits = [self.traits[i] for i in gone]
        self.samples, self.traits = [self.samples[i] for i in stay], [self.traits[i] for i in stay]
        return undrawn, traits


@dataclass
class BanditSampler:
    """A bandit over clusters draws, and every pool is scored.

    Attributes:
        last_arms: the arm of each sample of the last pool.
    """

    room: WaitingRoom
    bandit: ClusterUcb
    num_drawn: int
    scores: bool = field(default=True, init=False)
    last_arms: tuple[int, ...] = field(default=(), init=False)
    _draw: Draw | None = field(default=None, init=False)

    @property
    def waiting(self) -> int:
        return len(self.room.samples)

    @property
    def offered(self) -> Sequence[Sample]:
        return self.room.samples

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        if not self.room.fill(stopped):
            return []
        self._draw = self.bandit.draw(embeddings_of(self.room.traits), self.num_drawn)
        self.last_arms = tuple(self._draw.arms_n.tolist())
        return [self.room.samples[i] for i in self._draw.indices_n.tolist()]

    def feedback(self, report: StepReport) -> list[Sample]:
        assert self._draw is not None, "feedback follows a draw"
        assert report.utilities is not None, "the bandit needs the utilities of all that was scored"
        self.bandit.observe(self._draw.arms_n, torch.tensor(report.utilities, dtype=torch.float64))
        undrawn, gone = self.room.leave(self._draw.indices_n.tolist())
        self.bandit.learn(embeddings_of(gone))
        self._draw = None
        return undrawn

    def state_dict(self) -> dict[str, Any]:
        return {"bandit": self.bandit.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's: the bandit was off when the checkpoint was made, and begins now."""
        if "bandit" in state:
            self.bandit.load_state_dict(state["bandit"])


@dataclass
class LearnedSampler:
    """What was learned draws. Most steps train on all that is drawn; a probe scores its pool.

    Attributes:
        name: of the draw, under which it has its state.
    """

    room: WaitingRoom
    name: str
    draw: LearnedDraw | AutoDraw
    _drawn: list[int] = field(default_factory=list, init=False)

    @property
    def waiting(self) -> int:
        return len(self.room.samples)

    @property
    def offered(self) -> Sequence[Sample]:
        return self.room.samples

    @property
    def scores(self) -> bool:
        return self.draw.scores

    @property
    def learned(self) -> LearnedDraw:
        """What has the coefficients."""
        return self.draw.learned if isinstance(self.draw, AutoDraw) else self.draw

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        if not self.room.fill(stopped):
            return []
        self._drawn = self.draw.draw(self.room.traits, self.draw.count)
        return [self.room.samples[i] for i in self._drawn]

    def feedback(self, report: StepReport) -> list[Sample]:
        losses_n, coefficients_n = (torch.tensor(values) for values in (report.losses, report.coefficients))
        utilities_n = None if report.utilities is None else torch.tensor(report.utilities, dtype=torch.float64)
        before = self._way
        self.draw.observe(Found(losses_n, coefficients_n, utilities_n, report.own_seconds))
        if self._way != before:
            logger.info("%s", WAYS[self._way])
        undrawn, gone = self.room.leave(self._drawn)
        self.draw.learn(gone)
        return undrawn

    @property
    def _way(self) -> Way:
        return self.draw.way if isinstance(self.draw, AutoDraw) else "learned"

    def state_dict(self) -> dict[str, Any]:
        return {self.name: self.draw.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's: what is learned begins now."""
        if self.name in state:
            self.draw.load_state_dict(state[self.name])


@dataclass
class RivalSampler:
    """A draw that no gradient teaches.

    Attributes:
        name: of the draw, under which it has its state.
    """

    room: WaitingRoom
    name: str
    draw: StreamDraw
    num_drawn: int
    scores: bool = field(default=True, init=False)
    _drawn: list[int] = field(default_factory=list, init=False)

    @property
    def waiting(self) -> int:
        return len(self.room.samples)

    @property
    def offered(self) -> Sequence[Sample]:
        return self.room.samples

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        if not self.room.fill(stopped):
            return []
        self._drawn = self.draw.draw(self.room.traits, self.num_drawn)
        return [self.room.samples[i] for i in self._drawn]

    def feedback(self, report: StepReport) -> list[Sample]:  # noqa: ARG002
        undrawn, gone = self.room.leave(self._drawn)
        self.draw.learn(gone)
        return undrawn

    def state_dict(self) -> dict[str, Any]:
        return {self.name: self.draw.state_dict()} if isinstance(self.draw, Stateful) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's."""
        if isinstance(self.draw, Stateful) and self.name in state:
            self.draw.load_state_dict(state[self.name])
