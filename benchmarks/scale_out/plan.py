"""What is measured: a model, its pools, and the ways to make a step. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.shapes import SHAPES, Case, Shape

METHODS = ("plain", "sketch", "exact")
REFRESH_STEPS = 4  # steps that share a refresh of the target, the library's default: all of them are one repetition
SHARE_CHOSEN, SHARE_KEPT = 4, 2  # of a pool one sample in 4 enters the update, one in 2 its quadratic term
TARGET = 8  # samples of a refresh, the library's default


@dataclass(frozen=True)
class Workload:
    """A model and its samples.

    Attributes:
        pool: candidates N of a step, of all ranks together where the work of one is shared.
        tokens: T of each.
    """

    shape: Shape
    tokens: int
    pool: int = 16

    @property
    def case(self) -> Case:
        return Case(self.shape, self.tokens)


@dataclass(frozen=True)
class Setting:
    """So many ranks at a pool of so many candidates.

    Attributes:
        kind: `strong` where the pool is that of one rank, `weak` where it grows with the ranks, `one` for one rank.
    """

    ranks: int
    pool: int
    kind: str


TINY = Workload(Shape("tiny", 2, 72, 96, 2, 2, vocabulary=256, checkpoints_from=4096), tokens=16, pool=8)
SMALL = Workload(Shape("14M", 6, 384, 1024, 6, 6, vocabulary=8192, checkpoints_from=4096), tokens=128)
ON_GPU = Workload(SHAPES[0], tokens=512)  # 135M


def settings_of(workload: Workload, ranks: Sequence[int]) -> list[Setting]:
    """One rank alone; each other number at the same pool, and at one that grows with it."""
    found = []
    for count in ranks:
        if count == 1:
            found.append(Setting(1, workload.pool, "one"))
        else:
            found += [Setting(count, workload.pool, "strong"), Setting(count, count * workload.pool, "weak")]
    return found
