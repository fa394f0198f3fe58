"""The draw stage: which of the samples that wait get a gradient.

`InOrder` takes them as they come. `ByClusters` lets many wait, clustered by features that cost no pass, and a bandit
draws among them; the oldest of the others leave undrawn as new ones come in, read and decided but never scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from gradient_selectors.draw.cluster_ucb import ClusterUcb, Draw
from torch import Tensor

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.training.features import EmbeddingFeatures


class Draws(Protocol):
    """Where a step's pool comes from."""

    @property
    def waiting(self) -> int:
        """Samples taken from the buffer that are neither drawn nor gone."""

    def pool(self, stopped: Callable[[], bool]) -> list[Sample]:
        """The next step's candidates; empty only if `stopped()` turned true or nothing is left."""

    def settle(self, utilities: Sequence[float] | None) -> list[Sample]:
        """After the step: learn from its candidates' utilities. Returns the samples that leave without a gradient."""

    def state(self) -> dict[str, Tensor]:
        """What the future depends on, for a checkpoint; samples that wait are read again."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a copy of what `state` returned. Raises ValueError if it does not fit."""


@dataclass
class InOrder:
    """Every sample is a candidate once, in the order of the stream."""

    buffer: Buffer
    pool_size: int
    wait_s: float

    @property
    def waiting(self) -> int:
        return 0

    def pool(self, stopped: Callable[[], bool]) -> list[Sample]:
        return self.buffer.take(self.pool_size, self.wait_s, stopped)

    def settle(self, utilities: Sequence[float] | None) -> list[Sample]:  # noqa: ARG002
        return []

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is nothing to take over; the state of a bandit that is switched off is dropped."""


@dataclass
class ByClusters:
    """A bandit draws among the samples that wait.

    Before each draw they are filled up to `capacity`. After it, all but the newest `capacity - intake` leave: with a
    full room that makes `intake` samples a step, drawn or not; while the stream is slow nobody leaves undrawn. What
    waits after a step is thus the same after a restart, when it is read again.

    Attributes:
        capacity: samples that wait at most.
        intake: samples that come in for each step, at least as many as are drawn.
        last_arms: the arm of each sample of the last pool.
    """

    buffer: Buffer
    bandit: ClusterUcb
    features: EmbeddingFeatures
    pool_size: int
    capacity: int
    intake: int
    wait_s: float
    last_arms: tuple[int, ...] = field(default=(), init=False)
    _samples: list[Sample] = field(default_factory=list, init=False)
    _features_Md: Tensor = field(init=False)
    _draw: Draw | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._features_Md = torch.empty(0, self.features.size)

    @property
    def waiting(self) -> int:
        return len(self._samples)

    def pool(self, stopped: Callable[[], bool]) -> list[Sample]:
        missing = self.capacity - len(self._samples)
        if missing:
            come = self.buffer.take(missing, self.wait_s, stopped, or_none=bool(self._samples))
            self._samples += come
            self._features_Md = torch.cat([self._features_Md, self.features(come)])
        if stopped() or not self._samples:
            return []
        self._draw = self.bandit.draw(self._features_Md, self.pool_size)
        self.last_arms = tuple(self._draw.arms_n.tolist())
        return [self._samples[i] for i in self._draw.indices_n.tolist()]

    def settle(self, utilities: Sequence[float] | None) -> list[Sample]:
        assert self._draw is not None, "settle follows a draw"
        assert utilities is not None, "the bandit needs the utilities of all that was scored"
        self.bandit.observe(self._draw.arms_n, torch.tensor(utilities, dtype=torch.float64))
        drawn = set(self._draw.indices_n.tolist())
        rest = [i for i in range(len(self._samples)) if i not in drawn]
        stay = rest[max(0, len(rest) - (self.capacity - self.intake)) :]
        gone = sorted(set(range(len(self._samples))) - set(stay))
        undrawn = [self._samples[i] for i in gone if i not in drawn]
        self.bandit.learn(self._features_Md[gone])
        self._samples = [self._samples[i] for i in stay]
        self._features_Md, self._draw = self._features_Md[stay], None
        return undrawn

    def state(self) -> dict[str, Tensor]:
        return self.bandit.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing of it: the bandit was off when the checkpoint was made, and begins now."""
        if state:
            self.bandit.load_state(state)
