"""What takes the place of parts of a run where several processes make it: owner, ingest, plan and saver.

Rank 0 writes, and says to all how it went. What a rank reads it decides by itself; the rest is the same everywhere.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradient_selectors.world.base import World, first, is_same

from stream_trainer.checkpoints.ownership import Owner, claim
from stream_trainer.distributed.control import by_first
from stream_trainer.distributed.cursor import owns
from stream_trainer.errors import TrainingError
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.thread import Ingest
from stream_trainer.records import Partition, Sample
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.faults.culprits import Failure
from stream_trainer.training.planning import Plan
from stream_trainer.training.step import StepReport

ELSEWHERE = "dead_letters_elsewhere"  # a checkpoint's part: the letters of all ranks but the first


@dataclass(frozen=True)
class SharedOwner(Owner):
    """The claim of rank 0, as all ranks know it."""

    world: World = field(kw_only=True)

    @classmethod
    def claim(cls, world: World, directory: Path) -> "SharedOwner":
        """Rank 0 takes the directory over. Raises on all ranks what fails there."""
        found: list[Owner] = []
        by_first(world, lambda: found.append(claim(directory)))
        epoch, words = first(world, [found[0].epoch, found[0].words.decode()] if found else None)
        return cls(directory, epoch, words.encode(), world=world)

    @property
    def writes(self) -> bool:
        return self.world.rank == 0

    def agreed(self, note: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = first(self.world, note)
        return found

    def confirm(self) -> None:
        if self.writes:
            super().confirm()


class SharedIngest(Ingest):
    """Reads this rank's partitions.

    Attributes:
        world: whose partitions are whose.
        everywhere: positions of all partitions in the checkpoint that the run goes on from.
    """

    world: World
    everywhere: Mapping[Partition, int]

    @classmethod
    def of(cls, world: World, decided: Mapping[str, Any] | None, *parts: Any) -> "SharedIngest":
        """With the parts of any ingest; `decided` is the cursor of the whole checkpoint, None without one."""
        ingest = cls(*parts)
        partitions = {} if decided is None else decided["partitions"]
        ingest.world = world
        ingest.everywhere = {Partition.parse(name): log["next"] for name, log in partitions.items()}
        return ingest

    def start(self, positions: Mapping[Partition, int], identity: Mapping[str, str]) -> None:
        super().start({**self.everywhere, **positions}, identity)

    def dead_letter(self, letter: DeadLetter) -> None:
        if owns(self.world, letter.record.partition.number):
            super().dead_letter(letter)


@dataclass
class SharedPlan(Plan):
    """No step is planned: what comes when, on several processes, is not written down, so nothing is made again."""

    world: World = field(kw_only=True)

    def begin(self, step: int, *, follow: bool) -> None:  # noqa: ARG002
        if self.world.rank == 0:
            self.file.begin(step, follow=False)

    def next(self, sampler: PoolSampler, step: int, saved: int | None, stopped: Callable[[], bool]) -> list[Sample]:  # noqa: ARG002
        pool = sampler.next(stopped)
        drawn = [(sample.partition.number, sample.offset) for sample in pool]
        if not all(is_same(self.world, json.dumps([drawn, sampler.scores]).encode())):
            raise TrainingError(
                f"selection.draw: the ranks drew other samples for step {step} from the same ones; start again, on "
                "machines of one kind"
            )
        return pool

    def accuse(self, sample: Sample, failure: Failure) -> None:
        """Nothing is written down."""

    def made(self, step: int, whole: StepReport, factor: float) -> StepReport:  # noqa: ARG002
        """The report with rank 0's times: draws that learn from them learn the same everywhere."""
        return replace(whole, seconds=first(self.world, dict(whole.seconds)))
