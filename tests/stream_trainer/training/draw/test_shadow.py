"""Measured effects of a step and of a uniform one."""

import dataclasses

import pytest
import torch
from torch import Tensor

from stream_trainer.errors import TrainingError
from stream_trainer.settings.schema import LoraSettings
from stream_trainer.training.draw import shadow as shadow_module
from stream_trainer.training.draw.shadow import Shadow
from stream_trainer.training.step import StepReport, train_step
from tests.helpers.steps import Setup, make_samples, make_setup
from tests.helpers.tiny_models import settings_of

LLAMA, LORA = settings_of("llama"), settings_of("llama", lora=LoraSettings(rank=3))
HELD = make_samples(4, seed=77)


def shadowed(setup: Setup, seed: int, held: list = HELD, pool: list | None = None) -> StepReport:  # type: ignore[type-arg]
    pool = make_samples(8, seed=seed) if pool is None else pool
    found = Shadow(held, pool, torch.Generator().manual_seed(seed))
    return train_step(setup.engine, pool, setup.pad_id, setup.settings.optimizer, shadow=found)


def weights(setup: Setup) -> dict[str, Tensor]:
    return {name: values.detach().clone() for name, values in setup.loaded.model.named_parameters()}


def moments(setup: Setup) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values).clone() for name, values in setup.optimizer.state_dict().items()}


@pytest.mark.parametrize("model", [LLAMA, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mask", ["none", "dual_sft"])
def test_every_bit_is_as_without(model: object, mask: str) -> None:
    options = {"mask": mask, "batch_size": 2, "dual_sft": {"density": 0.3, "refresh_steps": 2}}
    plain, measured = (make_setup(model, **options) for _ in range(2))  # type: ignore[arg-type]
    for seed in range(5):
        before = torch.random.get_rng_state()
        report = shadowed(measured, seed)
        assert torch.equal(before, torch.random.get_rng_state())
        assert report.effects is not None
        assert report.effects.chosen is not None
        assert plain.step(make_samples(8, seed=seed)).effects is None
        for left, right in ((weights(plain), weights(measured)), (moments(plain), moments(measured))):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_measured_effect_is_that_of_the_gradient_alone() -> None:
    """Against three optimizers that really make the steps."""
    setup = make_setup(LLAMA, weigh="equal", optimizer={"clip_norm": 1.0})
    for seed in range(3):
        setup.step(make_samples(8, seed=seed))
    pool, still = make_samples(8, seed=9), make_setup(LLAMA, weigh="equal", optimizer={"clip_norm": 1.0})
    still.loaded.model.load_state_dict(setup.loaded.model.state_dict())
    still.optimizer.load_state_dict(setup.optimizer.state_dict())
    report = shadowed(setup, 9, pool=pool)
    for group in still.optimizer.param_groups:
        group["lr"] = report.learning_rate
    for parameter in still.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    still.optimizer.step()
    assert report.effects is not None
    assert report.effects.chosen is not None
    assert report.effects.uniform is not None
    assert report.effects.chosen.measured == pytest.approx(still.loss(HELD) - setup.loss(HELD), abs=1e-9)
    # All are trained on alike, and so is what chance draws of as many: both sides are the same.
    assert report.effects.uniform.measured == pytest.approx(report.effects.chosen.measured, rel=0.02, abs=1e-4)


def test_a_prediction_is_near_what_is_measured_for_small_steps() -> None:
    setup = make_setup(LLAMA, optimizer={"learning_rate": 1e-5, "weight_decay": 0.0}, batch_size=2)
    for seed in range(3):
        report = shadowed(setup, seed, pool=[*make_samples(6, seed=seed), *HELD[:2]])
    assert report.effects is not None
    assert report.effects.chosen is not None
    assert report.effects.chosen.predicted == pytest.approx(report.effects.chosen.measured, rel=0.1)


def test_samples_like_the_target_are_measured_to_help_more_than_chance() -> None:
    setup = make_setup(LLAMA, target=HELD, batch_size=2)
    report = shadowed(setup, 3, pool=[*make_samples(8, seed=3), *HELD])
    assert report.effects is not None
    assert report.effects.chosen is not None
    assert report.effects.uniform is not None
    assert report.effects.chosen.measured > report.effects.uniform.measured


def test_a_trial_that_fails_leaves_the_step_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, measured = (make_setup(LLAMA, batch_size=2) for _ in range(2))

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    for seed in range(3):
        with monkeypatch.context() as patched:
            if seed:
                patched.setattr(shadow_module, "_gradient_of", fails)
            report = shadowed(measured, seed)
        plain.step(make_samples(8, seed=seed))
        assert report.effects is not None
        assert (report.effects.chosen is None) == bool(seed)
        assert report.result == "applied"
        assert all(torch.equal(values, weights(measured)[name]) for name, values in weights(plain).items())


def test_a_trial_that_cannot_be_taken_back_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup(LLAMA, batch_size=2)
    setup.step(make_samples(8))

    def fails(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(shadow_module, "_put_back", fails)
    with pytest.raises(TrainingError, match="cannot be taken back"):
        shadowed(setup, 1)


def test_a_held_back_loss_that_is_not_finite_has_no_effect() -> None:
    setup = make_setup(LLAMA, batch_size=2)
    nowhere = [dataclasses.replace(sample, labels=(-100,) * len(sample.labels)) for sample in HELD]
    report = shadowed(setup, 0, held=nowhere)
    assert report.effects is None or report.effects.chosen is None


def test_the_time_counts_apart() -> None:
    report = shadowed(make_setup(LLAMA, batch_size=2), 0)
    assert report.seconds["shadow"] > 0
    assert report.own_seconds == pytest.approx(sum(report.seconds.values()) - report.seconds["shadow"])
