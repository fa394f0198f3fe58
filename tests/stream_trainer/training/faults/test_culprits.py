"""Which samples a failing step is blamed on, with steps and samples that are not real."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from stream_trainer.errors import SourceError
from stream_trainer.records import Sample
from stream_trainer.training.faults.culprits import OUT_OF_MEMORY, STEP_FAILED, Failure, Hands, Made, make_step
from stream_trainer.training.step import StepReport
from tests.helpers.fakes import sample, step_report

CONTROL = sample(10**6)

pytestmark = pytest.mark.usefixtures("heap_set_aside")


@dataclass
class Model:
    """Fails on some samples, and on more tokens than it has room for; `fails` may make it fail for another reason."""

    bad: set[int] = field(default_factory=set)
    room: int = 10**9
    error: Exception = field(default_factory=lambda: ValueError("no"))
    fails: int = 0
    accused: list[tuple[int, str]] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    passes: int = 0

    def rehearse(self, samples: Sequence[Sample]) -> None:
        self.passes += 1
        if self.bad & {s.offset for s in samples}:
            raise self.error
        if sum(s.num_tokens for s in samples) > self.room:
            raise torch.OutOfMemoryError

    def step(self, samples: Sequence[Sample]) -> StepReport:
        self.steps.append([s.offset for s in samples])
        if self.fails:
            self.fails -= 1
            raise self.error
        self.rehearse(samples)
        return step_report([float(s.offset) for s in samples], [1.0] * len(samples))

    def accuse(self, accused: Sample, failure: Failure) -> None:
        self.accused.append((accused.offset, failure.reason))

    def make(self, count: int, gone: Sequence[int] = ()) -> Made | Failure:
        drawn = [sample(offset, num_tokens=3 + offset) for offset in range(count)]
        return make_step(drawn, Hands(self.step, self.rehearse, self.accuse, scores=True, control=[CONTROL]), gone)


@pytest.mark.parametrize("bad", [{0}, {7}, {2, 3}, {0, 4, 7}])
def test_those_that_fail_by_themselves_are_found(bad: set[int]) -> None:
    model = Model(bad)
    made = model.make(8)
    assert isinstance(made, Made)
    assert model.accused == [(offset, STEP_FAILED) for offset in sorted(bad)]
    assert [s.offset for s in made.pool] == [i for i in range(8) if i not in bad]
    assert [i for i, loss in enumerate(made.whole.losses) if loss != loss] == sorted(bad)
    assert [i for i, weight in enumerate(made.whole.coefficients) if not weight] == sorted(bad)
    assert made.whole.utilities is not None
    assert len(made.whole.utilities) == 8
    assert len(model.steps) == 2


def test_a_pool_of_nothing_else_leaves_no_step() -> None:
    made = Model(set(range(4))).make(4)
    assert isinstance(made, Made)
    assert (made.pool, made.report, made.whole.result) == ([], None, "skipped_failed")
    assert made.whole.coefficients == (0.0,) * 4


def test_samples_that_are_gone_already_are_not_tried() -> None:
    model = Model({2})
    made = model.make(4, gone=[2])
    assert isinstance(made, Made)
    assert model.steps == [[0, 1, 3]]
    assert model.accused == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_memory_that_runs_out_has_a_reason_of_its_own(error: Exception) -> None:
    model = Model({1}, error=error)
    model.make(4)
    assert model.accused == [(1, OUT_OF_MEMORY)]


def test_where_each_fits_and_all_do_not_the_longest_goes() -> None:
    model = Model(room=3 + 4 + 5)
    made = model.make(4)
    assert isinstance(made, Made)
    assert model.accused == [(3, OUT_OF_MEMORY)]
    assert [s.offset for s in made.pool] == [0, 1, 2]


def test_a_failure_that_does_not_come_again_costs_nothing() -> None:
    model = Model(fails=1)
    made = model.make(4)
    assert isinstance(made, Made)
    assert len(made.pool) == 4
    assert model.accused == []


@pytest.mark.parametrize("model", [Model(fails=10), Model({10**6, 0, 1}), Model({10**6, 0, 1, 2, 3})])
def test_what_is_of_no_samples_making_is_told(model: Model) -> None:
    failure = model.make(4)
    assert isinstance(failure, Failure)
    assert failure.detail == "ValueError: no"
    assert "Traceback" in failure.trace
    assert model.accused == []


def test_errors_that_an_operator_mends_are_not_blamed_on_samples() -> None:
    with pytest.raises(SourceError):
        Model({0}, error=SourceError("the disk is full")).make(4)
