"""One step: the same as plain AdamW where it must be, and harmless where nothing should happen."""

import copy
from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import mean_losses
from gradient_selectors.capture.capture import GradientCapture
from torch import nn

from stream_trainer.records import Partition, Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.settings.selection import SelectionSettings
from stream_trainer.training.build import make_generators, make_selector
from stream_trainer.training.optimizer import learning_rate, make_optimizer
from stream_trainer.training.step import Learner, train_step
from stream_trainer.training.target import Target, mean_gradient, mean_loss
from tests.helpers.oracle import make_model

PAD = 0
EPS = 1e-4  # Adam turns the rounding of a gradient that is really zero (GPT-2's key bias) into full-sized updates


def make_samples(count: int, seed: int = 0, weight: float = 1.0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        length = int(torch.randint(6, 14, (), generator=generator))
        ids = tuple(torch.randint(3, 300, (length,), generator=generator).tolist())
        samples.append(Sample(ids, (-100, -100, *ids[2:]), Partition("stream", 0), i, length, weight=weight))
    return samples


def make_learner(model: nn.Module, weigh: str = "filter_then_weight", **selection: Any) -> Learner:
    settings = SelectionSettings(weigh=weigh, **selection)
    optimization = OptimizerSettings(learning_rate=1e-3, weight_decay=0.1, clip_norm=None)
    capture = GradientCapture(model)
    generators = make_generators(0)
    return Learner(
        capture=capture,
        optimizer=make_optimizer(capture, optimization, settings),
        selector=make_selector(settings, generators),
        target=Target(make_samples(5, seed=99), 2, PAD, 5, 0.0) if settings.needs_target else None,
        masking=None,
        selection=settings,
        optimization=optimization,
        pad_id=PAD,
        generators=generators,
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora", "checkpointing"])
def test_equal_weights_are_plain_adamw(kind: str) -> None:
    """w = 1/n for all, five steps, against transformers' forward, autograd and torch's own AdamW."""
    model = make_model(kind)
    plain = copy.deepcopy(model)
    learner = make_learner(model, weigh="full")
    for group in learner.optimizer.param_groups:
        group["eps"] = EPS
    decayed = [p for p in plain.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in plain.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3, eps=EPS
    )
    for step in range(5):
        pool = make_samples(6, seed=step)
        report = train_step(learner, pool)
        assert report.result == "applied"
        batch = collate(pool, PAD)
        mask = (torch.arange(batch.input_ids_NT.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
        logits = plain(input_ids=batch.input_ids_NT, attention_mask=mask).logits
        optimizer.zero_grad()
        mean_losses(logits, batch.labels_NT).mean().backward()
        optimizer.step()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-6)


def test_selection_really_changes_the_update() -> None:
    """A peer reports what it dropped and updates on everything all the same."""
    models = {weigh: make_model("llama") for weigh in ("full", "top_k", "filter_then_weight")}
    for weigh, model in models.items():
        report = train_step(make_learner(model, weigh, chosen=2), make_samples(8))
        assert len(report.chosen) <= (8 if weigh == "full" else 2)
    weights = [model.lm_head.weight for model in models.values()]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_step_towards_the_target_lowers_its_loss_more_than_a_random_one() -> None:
    """Pool of target samples among others: selection must find them."""
    target = make_samples(4, seed=99)
    losses = {}
    for weigh in ("filter_then_weight", "uniform"):
        learner = make_learner(make_model("llama"), weigh, chosen=4, settle_steps=2)
        if learner.target is not None:
            learner.target.samples = target
        for step in range(8):
            train_step(learner, [*make_samples(12, seed=step), *target])
        losses[weigh] = mean_loss(learner.capture, target, PAD)
    assert losses["filter_then_weight"] < losses["uniform"]


def test_the_target_is_never_trained_on() -> None:
    """Nothing in the pool: the target's gradient must not reach the weights by itself."""
    model = make_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = make_learner(model)
    target = learner.target
    assert target is not None
    target.gradient, target.age = {n: torch.zeros_like(p) for n, p in learner.capture.parameters.items()}, 0
    report = train_step(learner, make_samples(4))
    assert report.result == "skipped_none_helps"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not learner.optimizer.state


def test_when_nothing_helps_a_uniform_update_may_run() -> None:
    learner = make_learner(make_model("llama"), when_none_helps="uniform", chosen=2)
    target = learner.target
    assert target is not None
    target.gradient, target.age = {n: torch.zeros_like(p) for n, p in learner.capture.parameters.items()}, 0
    report = train_step(learner, make_samples(4))
    assert report.result == "applied"
    assert sorted(report.weights) == [0, 0, 0.5, 0.5]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = make_model("llama")
    learner = make_learner(model, "full")
    train_step(learner, make_samples(4))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e30
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e30
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = train_step(learner, make_samples(4, seed=1))
    assert report.result in ("skipped_nonfinite", "skipped_none_helps")
    assert report.chosen == ()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_samples_weight_scales_its_coefficient() -> None:
    pool = make_samples(2)
    heavy = [pool[0], make_samples(2, weight=3.0)[1]]
    report = train_step(make_learner(make_model("llama"), "full"), heavy)
    assert report.weights == pytest.approx((0.25, 0.75))


def test_uniform_computes_no_more_than_it_trains_on() -> None:
    report = train_step(make_learner(make_model("llama"), "uniform", chosen=3), make_samples(8))
    assert len(report.candidates) == 3
    assert report.chosen == report.candidates


def test_the_target_gradient_is_refreshed_every_r_steps() -> None:
    learner = make_learner(make_model("llama"))
    refreshed = [train_step(learner, make_samples(4, seed=step)).target_refreshed for step in range(5)]
    assert refreshed == [True, False, True, False, True]


def test_the_target_gradient_is_a_mean_over_samples() -> None:
    capture = GradientCapture(make_model("llama"))
    samples = make_samples(20)  # more than one micro batch
    whole = mean_gradient(capture, samples, PAD)
    parts = [mean_gradient(capture, [sample], PAD) for sample in samples]
    for name, values in whole.items():
        torch.testing.assert_close(values, torch.stack([part[name] for part in parts]).mean(0), rtol=1e-4, atol=1e-6)


def test_a_target_is_refreshed_in_turn() -> None:
    """Parts of 2 of 5 samples, in turn and around; the first ones as a plain mean, then with a decay of 0.5."""
    capture = GradientCapture(make_model("llama"))
    samples = make_samples(5)
    target = Target(samples, 1, PAD, 2, 0.5)
    expected: dict[str, torch.Tensor] = {}
    for part, share in (((0, 1), 1.0), ((2, 3), 0.5), ((4, 0), 0.5), ((1, 2), 0.5)):
        gradient, refreshed = target.current(capture)
        assert refreshed
        for name, values in mean_gradient(capture, [samples[i] for i in part], PAD).items():
            expected[name] = share * values + (1 - share) * expected.get(name, torch.zeros_like(values))
            torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_first_refreshes_count_alike() -> None:
    """However long the decay: three parts of 2 that are the whole have the mean gradient of the whole."""
    capture = GradientCapture(make_model("llama"))
    samples = make_samples(6)
    target = Target(samples, 1, PAD, 2, 0.99)
    for _ in range(3):
        gradient, _ = target.current(capture)
    for name, values in mean_gradient(capture, samples, PAD).items():
        torch.testing.assert_close(gradient[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "updates", "share"),
    [
        ("constant", 0, 0.25),
        ("constant", 3, 1.0),
        ("constant", 1000, 1.0),
        ("linear", 4, 1.0),
        ("linear", 9, 0.55),
        ("linear", 50, 0.1),
        ("cosine", 9, 0.55),
        ("cosine", 50, 0.1),
    ],
)
def test_schedules(schedule: str, updates: int, share: float) -> None:
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=4, decay_steps=10)
    assert learning_rate(settings, updates) == pytest.approx(2.0 * share)


def test_clipping_bounds_the_gradient() -> None:
    model = make_model("llama")
    learner = make_learner(model, "full")
    learner.optimization = OptimizerSettings(learning_rate=1e-3, clip_norm=1e-3)
    report = train_step(learner, make_samples(4))
    moments = torch.stack([state["exp_avg"].norm() for state in learner.optimizer.state.values()]).norm()
    assert report.gradient_norm > 1e-3
    assert float(moments) == pytest.approx((1 - 0.9) * 1e-3, rel=1e-3)
