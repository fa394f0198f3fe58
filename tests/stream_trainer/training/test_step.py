"""One step: the same as plain AdamW where it must be, and harmless where nothing should happen."""

import copy

import pytest
import torch
from gradient_selectors.capture.batch import mean_losses
from gradient_selectors.draw.uniform import draw_uniform

from stream_trainer.errors import TrainingError
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.steps import Setup, make_samples, make_setup
from tests.helpers.tiny_models import settings_of

EPS = 1e-4  # Adam turns the rounding of a gradient that is really zero (GPT-2's key bias) into full-sized updates
MODELS = {
    "llama": settings_of("llama"),
    "qwen2_tied": settings_of("qwen2"),
    "gpt2": settings_of("gpt2"),
    "lora": settings_of("llama", lora=LoraSettings(rank=3, alpha=7.0)),
    "checkpointing": settings_of("llama", gradient_checkpointing=True),
}
LLAMA = MODELS["llama"]


def point_nowhere(setup: Setup) -> None:
    """A target whose gradient is zero, so that no candidate helps."""
    setup.target.gradient = {name: torch.zeros_like(p) for name, p in setup.parameters.items()}


def copies_of(setup: Setup) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in setup.loaded.model.named_parameters()}


def assert_unmoved(setup: Setup, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in setup.loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_equal_coefficients_are_plain_adamw(model: ModelSettings) -> None:
    """w = 1/n for all, five steps, against transformers' forward, autograd and torch's own AdamW."""
    setup = make_setup(model, weigh="equal", optimizer={"eps": EPS})
    plain = copy.deepcopy(setup.loaded.model)
    decayed = [p for p in plain.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in plain.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3, eps=EPS
    )
    for step in range(5):
        pool = make_samples(6, seed=step)
        assert setup.step(pool).result == "applied"
        batch = collate(pool, setup.pad_id)
        mask = (torch.arange(batch.input_ids_NT.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
        logits = plain(input_ids=batch.input_ids_NT, attention_mask=mask).logits
        optimizer.zero_grad()
        torch.autograd.backward(mean_losses(logits, batch.labels_NT).mean())
        optimizer.step()
    wanted = dict(plain.named_parameters())
    for name, parameter in setup.loaded.model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-6)


def test_selection_really_changes_the_update() -> None:
    """A peer reports what it dropped and updates on everything all the same."""
    heads = []
    for weigh in ("equal", "top_k", "filter_then_weight"):
        setup = make_setup(LLAMA, weigh=weigh, batch_size=2)
        report = setup.step(make_samples(8))
        assert len(report.selected) <= (8 if weigh == "equal" else 2)
        heads.append(setup.loaded.model.get_parameter("lm_head.weight"))
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_step_towards_the_target_lowers_its_loss_more_than_a_random_one() -> None:
    """Pool of target samples among others: selection must find them."""
    target = make_samples(4, seed=99)
    selecting, random = (
        make_setup(LLAMA, target, weigh=weigh, batch_size=4, preconditioner_warmup_steps=2)
        for weigh in ("filter_then_weight", "equal")
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        pool = [*make_samples(12, seed=step), *target]
        selecting.step(pool)
        random.step([pool[i] for i in draw_uniform(16, 4, generator)])
    assert selecting.loss(target) < random.loss(target)


def test_the_target_is_never_trained_on() -> None:
    """Nothing in the pool: the target's gradient must not reach the weights by itself."""
    setup = make_setup(LLAMA)
    before = copies_of(setup)
    point_nowhere(setup)
    report = setup.step(make_samples(4))
    assert report.result == "skipped_none_helps"
    assert report.selected == ()
    assert_unmoved(setup, before)
    assert not setup.optimizer.state


def test_when_nothing_helps_a_uniform_update_may_run() -> None:
    setup = make_setup(LLAMA, when_none_helps="uniform", batch_size=2)
    point_nowhere(setup)
    report = setup.step(make_samples(4))
    assert report.result == "applied"
    assert sorted(report.coefficients) == [0, 0, 0.5, 0.5]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    setup = make_setup(LLAMA, weigh="equal")
    setup.step(make_samples(4))
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            setup.loaded.model.get_parameter(f"model.layers.0.mlp.{name}.weight")[0, 0] = 1e30
    before = copies_of(setup)
    report = setup.step(make_samples(4, seed=1))
    assert report.result in ("skipped_nonfinite", "skipped_none_helps")
    assert report.selected == ()
    assert_unmoved(setup, before)


def test_a_samples_weight_scales_its_coefficient() -> None:
    pool = make_samples(2)
    heavy = [pool[0], make_samples(2, weight=3.0)[1]]
    report = make_setup(LLAMA, weigh="equal").step(heavy)
    assert report.coefficients == pytest.approx((0.25, 0.75))


def test_the_target_gradient_is_refreshed_every_r_steps() -> None:
    setup = make_setup(LLAMA)
    refreshed = [setup.step(make_samples(4, seed=step)).target_refreshed for step in range(5)]
    assert refreshed == [True, False, True, False, True]


def test_a_report_covers_every_candidate_of_the_pool() -> None:
    report = make_setup(LLAMA, draw="cluster_ucb", batch_size=2).step(make_samples(7))
    assert report.utilities is not None
    assert {len(report.losses), len(report.coefficients), len(report.utilities)} == {7}
    assert report.seconds.keys() == {"target", "score", "weigh", "update"}
    assert all(seconds >= 0 for seconds in report.seconds.values())


def test_clipping_bounds_the_gradient() -> None:
    setup = make_setup(LLAMA, weigh="equal", optimizer={"clip_norm": 1e-3})
    report = setup.step(make_samples(4))
    moments = torch.stack([state["exp_avg"].norm() for state in setup.optimizer.state.values()]).norm()
    assert report.gradient_norm > 1e-3
    assert float(moments) == pytest.approx((1 - 0.9) * 1e-3, rel=1e-3)


def test_an_optimizer_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some weights may have moved: no sample is tried again, and nothing is saved."""
    setup = make_setup(LLAMA)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand more")

    monkeypatch.setattr(setup.optimizer, "step", fail)
    with pytest.raises(TrainingError, match=r"midst of an update \(OutOfMemoryError: tried to allocate 9 GiB\); start"):
        setup.step(make_samples(6))
    assert all(parameter.grad is None for parameter in setup.parameters.values())
