"""The draw: which of the samples that wait become a step's pool.

`SequentialSampler` takes them as they come, `UniformSampler` some of each pool at random. `BanditSampler` lets many
wait, clustered by features that need no forward pass, and a bandit draws among them. As new ones come in, the oldest
of the others leave without being scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from gradient_selectors import ClusterUcb
from gradient_selectors.draw.cluster_ucb import Draw
from gradient_selectors.draw.features import EmbeddingFeatures
from gradient_selectors.draw.uniform import draw_uniform
from torch import Tensor

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample


class PoolSampler(Protocol):
    """Where a step's pool comes from."""

    @property
    def waiting(self) -> int:
        """Samples taken from the buffer that are neither drawn nor gone."""

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        """The next step's candidates; empty only if `stopped()` turned true or nothing is left."""

    def feedback(self, utilities: Sequence[float] | None) -> list[Sample]:
        """After the step: learn from its candidates' utilities. Returns the samples that leave without a gradient."""

    def state_dict(self) -> dict[str, Any]:
        """What the future depends on, for a checkpoint; samples that wait are read again."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a copy of what `state_dict` returned. Raises ValueError if it does not fit."""


@dataclass
class SequentialSampler:
    """Every sample is a candidate once, in the order of the stream."""

    buffer: Buffer
    pool_size: int
    wait_s: float
    waiting: int = field(default=0, init=False)

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        return self.buffer.take(self.pool_size, self.wait_s, stopped)

    def feedback(self, utilities: Sequence[float] | None) -> list[Sample]:  # noqa: ARG002
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take over; the state of another sampler is dropped."""


@dataclass
class UniformSampler:
    """`num_drawn` of each `pool_size` samples at random; the others leave without being scored.

    Attributes:
        generator: source of the draws, on the CPU.
    """

    buffer: Buffer
    pool_size: int
    num_drawn: int
    wait_s: float
    generator: torch.Generator
    waiting: int = field(default=0, init=False)
    _undrawn: list[Sample] = field(default_factory=list, init=False)

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        come = self.buffer.take(self.pool_size, self.wait_s, stopped)
        drawn = draw_uniform(len(come), self.num_drawn, self.generator)
        self._undrawn = [sample for i, sample in enumerate(come) if i not in set(drawn)]
        return [come[i] for i in drawn]

    def feedback(self, utilities: Sequence[float] | None) -> list[Sample]:  # noqa: ARG002
        gone, self._undrawn = self._undrawn, []
        return gone

    def state_dict(self) -> dict[str, Any]:
        return {"uniform": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's."""
        if "uniform" in state:
            self.generator.set_state(state["uniform"])


@dataclass
class BanditSampler:
    """A bandit draws among the samples that wait.

    Before each draw they are filled up to `capacity`. After it, all but the newest `capacity - intake` leave: with a
    full room that makes `intake` samples a step, drawn or not; while the stream is slow, only drawn samples leave. What
    waits after a step is thus the same after a restart, when it is read again.

    Attributes:
        capacity: samples that wait at most.
        intake: samples that come in for each step, at least as many as are drawn.
        last_arms: the arm of each sample of the last pool.
    """

    buffer: Buffer
    bandit: ClusterUcb
    features: EmbeddingFeatures
    num_drawn: int
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

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        missing = self.capacity - len(self._samples)
        if missing:
            come = self.buffer.take(missing, self.wait_s, stopped, or_none=bool(self._samples))
            self._samples += come
            self._features_Md = torch.cat([self._features_Md, self.features([sample.input_ids for sample in come])])
        if stopped() or not self._samples:
            return []
        self._draw = self.bandit.draw(self._features_Md, self.num_drawn)
        self.last_arms = tuple(self._draw.arms_n.tolist())
        return [self._samples[i] for i in self._draw.indices_n.tolist()]

    def feedback(self, utilities: Sequence[float] | None) -> list[Sample]:
        assert self._draw is not None, "feedback follows a draw"
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

    def state_dict(self) -> dict[str, Any]:
        return {"bandit": self.bandit.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's: the bandit was off when the checkpoint was made, and begins now."""
        if "bandit" in state:
            self.bandit.load_state_dict(state["bandit"])
