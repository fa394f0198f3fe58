"""When a run goes back and when it gives up, what it remembers, and that going back is like starting again."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.state import flatten, load_states, states_of

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import TrainerState, load_latest, restore, save_checkpoint
from stream_trainer.errors import TrainingError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.settings.schema import OptimizerSettings, TrainingSettings
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.sampling import make_sampler
from stream_trainer.training.faults.recovery import ADVISE_AFTER, MAX_ROLLBACKS, Recovery
from stream_trainer.training.step import APPLIED, SKIPPED_NONE_HELPS, SKIPPED_NONFINITE, train_step
from tests.helpers.service import ALL_ON
from tests.helpers.steps import Setup, make_samples, setup_of


def recovery(learning_rate: float = 1e-3, **training: Any) -> Recovery:
    return Recovery(TrainingSettings(**training), OptimizerSettings(learning_rate=learning_rate))


def test_a_run_goes_back_after_so_many_dead_steps_in_a_row() -> None:
    found = recovery(max_dead_steps=3)
    said = []
    for result in (SKIPPED_NONFINITE, SKIPPED_NONFINITE, APPLIED, *[SKIPPED_NONFINITE] * 3):
        found.note(result)
        said.append(found.dead_steps)
    found.roll_back("it died")
    assert [*said, found.dead_steps] == [None] * 5 + ["3 steps in a row were not finite", None]
    assert found.rates.learning_rate == 5e-4


def test_it_gives_up_unless_something_new_was_saved() -> None:
    found = recovery()
    for _ in range(MAX_ROLLBACKS):
        found.saves()  # what it went back to, with the positions of now
        found.roll_back("it died")
    with pytest.raises(
        TrainingError, match=r"^optimizer.learning_rate=0.001 \(now 0.000125\): it died, and 3 rollbacks"
    ):
        found.roll_back("it died")
    found.note(APPLIED)
    found.saves()
    found.roll_back("it died")
    assert found.rollbacks == 1


def test_what_went_wrong_is_shown_until_something_new_is_saved() -> None:
    found = recovery()
    found.roll_back("it died")
    found.trouble = "went back"
    found.saves()
    assert found.trouble == "went back"
    found.note(APPLIED)
    found.saves()
    assert found.trouble == ""


def test_it_is_remembered_and_the_rate_is_the_users_when_another_is_set() -> None:
    first = recovery()
    first.roll_back("it died")
    for result in (APPLIED, SKIPPED_NONFINITE, SKIPPED_NONFINITE):
        first.note(result)
    second, other = recovery(), recovery(learning_rate=1e-4)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert (second.dead, second.idle, second.rates.learning_rate) == (2, 2, 5e-4)
    assert other.rates.learning_rate == 1e-4


def test_a_loss_is_too_high_by_so_much_above_the_lowest() -> None:
    found = recovery(max_loss_rise=2.0)
    assert not found.watches_loss
    assert found.why_diverged(99.0) is None
    for loss in (5.0, 4.0, math.nan, 4.5):
        found.note_loss(loss)
    assert [found.why_diverged(loss) is None for loss in (6.0, 6.1, math.inf, math.nan)] == [True, False, False, False]
    assert found.why_diverged(None) is None
    assert found.why_diverged(40.0) == "the target loss 40 is more than training.max_loss_rise=2 above the lowest, 4"
    unlimited = recovery(max_loss_rise=None)
    unlimited.load_state_dict(found.state_dict())
    assert unlimited.best_loss == 4.0
    assert unlimited.why_diverged(40.0) is None


def test_a_checkpoint_of_before_there_was_a_limit_has_no_lowest_loss() -> None:
    state = recovery().state_dict()
    del state["best_loss"]
    found = recovery()
    found.load_state_dict(state)
    assert not found.watches_loss


def test_a_refused_refresh_of_the_target_is_shown() -> None:
    found = recovery()
    found.note(APPLIED, target_refused=True)
    assert found.trouble == "a refresh of the target's gradient was not finite; the gradient before it steers on"


def test_steps_that_change_nothing_are_advised_on_once(caplog: pytest.LogCaptureFixture) -> None:
    found = recovery()
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * ADVISE_AFTER):
            found.note(SKIPPED_NONE_HELPS)
        assert found.idle == 3 * ADVISE_AFTER
    (line,) = caplog.messages
    assert "50 steps in a row changed no weight" in line
    assert "target.path" in line
    found.note(APPLIED)
    assert found.idle == 0


SELECTIONS: dict[str, dict[str, Any]] = {
    "scored": {},
    "all on": ALL_ON,
    "auto": {"draw": "auto", "waiting": 24, "intake": 12, "learned": {"probe_every": 2}},
    "uniform": {"draw": "uniform", "when_none_helps": "uniform"},
    "sketched": {"scoring": "sketched", "sketch_width": 4},
    "dsir": {"draw": "dsir", "waiting": 24, "intake": 12},
}


def steps_of(setup: Setup, sampler: PoolSampler, count: int) -> list[Any]:
    found = []
    for _ in range(count):
        pool = sampler.next(lambda: False)
        report = train_step(setup.engine, pool, setup.pad_id, setup.settings.optimizer, scores=sampler.scores)
        sampler.feedback(report)
        found.append(([sample.offset for sample in pool], report.losses, report.coefficients))
    return found


def parts_of(folder: Path, selection: dict[str, Any]) -> tuple[Setup, PoolSampler, Buffer]:
    setup = setup_of(folder, selection)
    buffer = Buffer(setup.settings.buffer)
    return setup, make_sampler(setup.settings, buffer, setup.loaded, setup.engine, make_samples(4, seed=99)), buffer


@pytest.mark.parametrize("before", [0, 3], ids=["the first checkpoint", "a later one"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_going_back_in_a_run_is_like_starting_again(name: str, before: int, tmp_path: Path) -> None:
    """No part keeps anything of what is taken back."""
    ends = []
    for goes_on in (True, False):
        setup, sampler, buffer = parts_of(tmp_path, SELECTIONS[name])
        parts: dict[str, object] = {"engine": setup.engine, "sampler": sampler}
        if goes_on:
            buffer.put(*make_samples(400))
            steps_of(setup, sampler, before)
            state = TrainerState(before, {}, {}, __version__, states_of(parts))
            save_checkpoint(tmp_path / "c", setup.loaded, setup.optimizer, state, keep=2)
            steps_of(setup, sampler, 4)
            buffer.take(10**6, 0.0, lambda: False)
            if hasattr(sampler, "room"):
                sampler.room.samples, sampler.room.traits = [], []
        checkpoint = load_latest(tmp_path / "c")
        assert checkpoint is not None
        load_states(parts, restore(checkpoint, setup.loaded, setup.optimizer).parts)
        tensors, _ = flatten(states_of(parts))
        buffer.put(*make_samples(400, seed=7))
        ends.append((tensors, steps_of(setup, sampler, 4), dict(setup.parameters)))
    (ours, our_steps, our_weights), (theirs, their_steps, their_weights) = ends
    assert ours.keys() == theirs.keys()
    assert our_steps == their_steps
    assert all(torch.equal(values, their_weights[key]) for key, values in our_weights.items())
