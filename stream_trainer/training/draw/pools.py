"""The draw: which of the samples that come in become a step's pool.

`SequentialSampler` takes them as they come, `UniformSampler` some of each pool at random, `LossSampler` those whose
loss is of a certain rank. `waiting` holds the samplers that let many wait and draw among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from gradient_selectors.draw.uniform import draw_uniform
from torch import Tensor

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.training.step import StepReport


class PoolSampler(Protocol):
    """Where a step's pool comes from."""

    @property
    def waiting(self) -> int:
        """Samples taken from the buffer that are neither drawn nor gone."""

    @property
    def scores(self) -> bool:
        """Whether the pool that was drawn last is to be scored; otherwise the step trains on all of it."""

    @property
    def offered(self) -> Sequence[Sample]:
        """What the last pool was drawn from, that pool included; to be read before `feedback`."""

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        """The next step's candidates; empty only if `stopped()` turned true or nothing is left."""

    def feedback(self, report: StepReport) -> list[Sample]:
        """After the step: learn from what it found. Returns the samples that leave without a gradient."""

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
    scores: bool = field(default=True, init=False)
    offered: list[Sample] = field(default_factory=list, init=False)

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        self.offered = self.buffer.take(self.pool_size, self.wait_s, stopped)
        return self.offered

    def feedback(self, report: StepReport) -> list[Sample]:  # noqa: ARG002
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
    scores: bool = field(default=True, init=False)
    offered: list[Sample] = field(default_factory=list, init=False)
    _undrawn: list[Sample] = field(default_factory=list, init=False)

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        come = self.offered = self.buffer.take(self.pool_size, self.wait_s, stopped)
        drawn = draw_uniform(len(come), self.num_drawn, self.generator)
        self._undrawn = [sample for i, sample in enumerate(come) if i not in set(drawn)]
        return [come[i] for i in drawn]

    def feedback(self, report: StepReport) -> list[Sample]:  # noqa: ARG002
        gone, self._undrawn = self._undrawn, []
        return gone

    def state_dict(self) -> dict[str, Any]:
        return {"uniform": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's."""
        if "uniform" in state:
            self.generator.set_state(state["uniform"])


@dataclass
class LossSampler:
    """Of each `pool_size` samples the `num_drawn` whose loss is lowest, or in the middle; the others leave.

    Attributes:
        losses: the loss of each sample, by a forward pass.
    """

    buffer: Buffer
    pool_size: int
    num_drawn: int
    wait_s: float
    rank: Literal["lowest", "middle"]
    losses: Callable[[Sequence[Sample]], Tensor]
    waiting: int = field(default=0, init=False)
    scores: bool = field(default=True, init=False)
    offered: list[Sample] = field(default_factory=list, init=False)
    _undrawn: list[Sample] = field(default_factory=list, init=False)

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        come = self.offered = self.buffer.take(self.pool_size, self.wait_s, stopped)
        if not come:
            return []
        order = torch.argsort(self.losses(come).nan_to_num(torch.inf), stable=True).tolist()
        first = 0 if self.rank == "lowest" else max(0, (len(come) - self.num_drawn) // 2)
        drawn = sorted(order[first : first + self.num_drawn])
        self._undrawn = [sample for i, sample in enumerate(come) if i not in drawn]
        return [come[i] for i in drawn]

    def feedback(self, report: StepReport) -> list[Sample]:  # noqa: ARG002
        gone, self._undrawn = self._undrawn, []
        return gone

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take over; the state of another sampler is dropped."""
