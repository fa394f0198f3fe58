"""Draw, weigh, route and mask together: one pass for all of them, every combination valid or refused, all resumable."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import mean_losses
from gradient_selectors.capture.gradients import layer_of
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from safetensors.torch import save_file

from stream_trainer.errors import CheckpointError, SettingsError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.models.loading import load_model
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.samples.collate import collate
from stream_trainer.service import make_draws, make_learner
from stream_trainer.settings.schema import ModelSettings, Settings
from stream_trainer.settings.selection import SelectionSettings
from stream_trainer.training.masking import start_from
from stream_trainer.training.observe import expect_layers, layers_of, observe_stages
from stream_trainer.training.pools import InOrder
from stream_trainer.training.step import Learner, reweighted, train_step
from tests.helpers.service import MODEL, Step, configuration, good, goods, jsonl, serve_until, write_lines
from tests.stream_trainer.training.test_step import make_samples

ALL_ON: dict[str, Any] = {
    "draw": "cluster_ucb",
    "weigh": "filter_then_weight",
    "route": "gast",
    "mask": "dual_sft",
    "pool_size": 8,
    "chosen": 3,
    "settle_steps": 2,
    "solver_time_limit_s": 60.0,
    "cluster_ucb": {"waiting": 24, "intake": 12, "clusters": 4},
    "gast": {"per_layer": 2},
    "dual_sft": {"density": 0.3, "refresh_steps": 3},
}
DRAWS, WEIGHERS = ("all", "cluster_ucb"), ("filter_then_weight", "greedy", "top_k", "uniform", "full")
ROUTES, MASKS = ("none", "gast"), ("none", "fixed", "dual_sft")


def learner_of(folder: Path, selection: dict[str, Any], **model: Any) -> tuple[Settings, Learner]:
    settings = Settings(
        **configuration(folder, jsonl(folder / "none.jsonl"), selection=selection, model=model)  # type: ignore[arg-type]
    )
    loaded = load_model(settings.model, settings.training.seed)
    return settings, make_learner(settings, loaded, make_samples(4, seed=99))


def write_mask(folder: Path, share: float) -> Path:
    model = load_model(ModelSettings(config=MODEL, tokenizer="bytes"), 5).model
    generator = torch.Generator().manual_seed(0)
    path = folder / "mask.safetensors"
    save_file({name: torch.rand(p.shape, generator=generator) < share for name, p in model.named_parameters()}, path)
    return path


@pytest.mark.parametrize(("draw", "weigh", "route", "mask"), list(itertools.product(DRAWS, WEIGHERS, ROUTES, MASKS)))
def test_every_combination_makes_updates_or_is_refused(
    tmp_path: Path, draw: str, weigh: str, route: str, mask: str
) -> None:
    selection = ALL_ON | {"draw": draw, "weigh": weigh, "route": route, "mask": mask}
    if mask == "fixed":
        selection["mask_path"] = str(write_mask(tmp_path, 0.3))
    if (draw, weigh) == ("cluster_ucb", "uniform"):
        with pytest.raises(ValueError, match="weigh=full"):
            SelectionSettings(**selection)
        return
    _, learner = learner_of(tmp_path, selection)
    results = [train_step(learner, make_samples(8, seed=seed)) for seed in range(3)]
    assert [report.result for report in results] == ["applied"] * 3
    assert all((report.utilities is not None) == (draw == "cluster_ucb") for report in results)


class _Passes:
    """Forward passes of the model and calls of autograd, while a step runs."""

    def __init__(self, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        model: Any = learner.capture._model
        model.model.layers[0].register_forward_hook(lambda *_: self.counts.update(["forward"]))
        for name in ("backward", "grad"):
            original = getattr(torch.autograd, name)

            def counted(*args: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
                self.counts.update([_name])
                return _original(*args, **options)

            monkeypatch.setattr(torch.autograd, name, counted)


def test_all_four_at_once_cost_one_forward_and_one_backward_over_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that refreshes the mask included. (One that refreshes the target passes over its samples, too.)"""
    _, learner = learner_of(tmp_path, ALL_ON)
    train_step(learner, make_samples(8))
    passes = _Passes(learner, monkeypatch)
    reports = [train_step(learner, make_samples(8, seed=seed)) for seed in (1, 2, 3)]
    assert [report.target_refreshed for report in reports] == [False] * 3
    assert [report.mask_refreshed for report in reports] == [True, False, True]
    assert passes.counts == {"forward": 3, "backward": 3}
    assert all(report.decision.layer_weights_LN is not None for report in reports)


def run_all_on(folder: Path, last_step: int | None, selection: dict[str, Any], **sections: Any) -> list[Step]:
    config = configuration(
        folder,
        jsonl(folder / "stream.jsonl"),
        selection=ALL_ON | selection,
        checkpoint={"dir": str(folder / "checkpoints"), "every_steps": 7},
        **sections,
    )
    return serve_until(config, last_step)[1]


@pytest.mark.parametrize(
    ("selection", "sections"),
    [
        ({}, {}),
        ({}, {"model": {"lora": {"rank": 2}}}),
        ({"mask": "none", "geometry": "sketch", "sketch_width": 4}, {"target": {"refresh_steps": 8}}),
    ],
    ids=["full", "lora", "sketch"],
)
def test_resumed_runs_make_the_same_next_ten_decisions(
    tmp_path: Path, selection: dict[str, Any], sections: dict[str, Any]
) -> None:
    """Bandit, routes, mask, its statistics and projections go through the checkpoint: every decision is equal."""
    runs = {}
    for name, stops in {"whole": [21], "resumed": [4, 11, 21]}.items():
        folder = tmp_path / name
        folder.mkdir()
        write_lines(folder / "stream.jsonl", goods(400))
        runs[name] = [step for stop in stops for step in run_all_on(folder, stop, selection, **sections)]
    assert [step.number for step in runs["resumed"]] == list(range(1, 22))
    assert runs["resumed"] == runs["whole"]
    assert sum(step.result == "applied" for step in runs["whole"][11:]) == 10


def test_records_left_undrawn_are_decided_and_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(100))
    config = configuration(tmp_path, jsonl(tmp_path / "stream.jsonl"), selection=ALL_ON)
    summary, steps = serve_until(config)
    assert sum(summary.counts.values()) == 100
    trained = [name for step in steps for name in step.chosen]
    assert len(trained) == len(set(trained)) == summary.counts["trained"]
    drawn = [name for step in steps for name in step.ids]
    assert len(drawn) == len(set(drawn)) < 100


def test_masked_weights_stay_as_they_are(tmp_path: Path) -> None:
    """Bit for bit, over changes of the mask and with weight decay: what was never in a mask has never moved."""
    settings, learner = learner_of(tmp_path, ALL_ON)
    learner.optimizer.param_groups[0]["weight_decay"] = 0.5
    before = {name: p.detach().clone() for name, p in learner.capture.parameters.items()}
    ever = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.items()}
    assert isinstance(learner.optimizer, MaskedAdamW)
    for seed in range(7):
        train_step(learner, make_samples(8, seed=seed))
        for name in ever:
            ever[name] |= learner.optimizer.mask(name).bool()
    for name, parameter in learner.capture.parameters.items():
        assert torch.equal(parameter[~ever[name]], before[name][~ever[name]])
    assert any(not torch.equal(p, before[name]) for name, p in learner.capture.parameters.items())
    assert learner.optimizer.density == pytest.approx(settings.selection.dual_sft.density, abs=1e-3)


def test_a_mask_from_a_file_stays(tmp_path: Path) -> None:
    path = write_mask(tmp_path, 0.2)
    _, learner = learner_of(tmp_path, {"mask": "fixed", "mask_path": str(path)})
    assert isinstance(learner.optimizer, MaskedAdamW)
    masks = {name: learner.optimizer.mask(name) for name in learner.capture.parameters}
    for seed in range(3):
        assert train_step(learner, make_samples(8, seed=seed)).result == "applied"
    for name, mask in masks.items():
        assert torch.equal(learner.optimizer.mask(name), mask)


def test_a_mask_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    missing, other, empty = (tmp_path / f"{name}.safetensors" for name in ("missing", "other", "empty"))
    save_file({"lm_head.weight": torch.ones(2, 2, dtype=torch.bool)}, other)
    model = load_model(ModelSettings(config=MODEL, tokenizer="bytes"), 5).model
    save_file({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}, empty)
    for path, reason in ((missing, "cannot be read"), (other, "does not fit"), (empty, "no weight at all")):
        with pytest.raises(SettingsError, match=f"selection.mask_path=.*{reason}.*; name the mask") as caught:
            start_from(MaskedAdamW(model.named_parameters()), path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ({"mask": "fixed"}, "mask=fixed needs mask_path"),
        ({"mask_path": "m.safetensors"}, "has no effect with mask=none"),
        ({"draw": "cluster_ucb", "cluster_ucb": {"intake": 4}}, "intake=4 is less than the pool_size=16"),
        ({"draw": "cluster_ucb", "cluster_ucb": {"intake": 64, "waiting": 32}}, "waiting=32 is less than"),
        ({"dual_sft": {"layer_quota": 0.7, "module_quota": 0.6}}, "add up to 1.3"),
    ],
)
def test_what_does_not_go_together_is_refused(selection: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SelectionSettings(**selection)


def test_a_room_that_does_not_fit_the_buffer_is_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path, jsonl(tmp_path / "s"), selection=ALL_ON, buffer={"max_records": 20})
    with pytest.raises(ValueError, match=r"selection\.cluster_ucb\.waiting=24 does not fit buffer\.max_records=20"):
        Settings(**config)


def test_a_checkpoint_made_without_a_mask_says_so(tmp_path: Path) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(60))
    source = jsonl(tmp_path / "stream.jsonl")
    serve_until(configuration(tmp_path, source), 2)
    with pytest.raises(CheckpointError, match=r"was made without a mask; set selection\.mask=none"):
        serve_until(configuration(tmp_path, source, selection=ALL_ON))


def test_a_stage_that_was_off_begins_afresh(tmp_path: Path) -> None:
    """The bandit and the routes may be switched on and off over the life of a model."""
    write_lines(tmp_path / "stream.jsonl", [good(number) for number in range(200)])
    source = jsonl(tmp_path / "stream.jsonl")
    on = ALL_ON | {"mask": "none"}
    serve_until(configuration(tmp_path, source), 2)
    _, steps = serve_until(configuration(tmp_path, source, selection=on), 5)
    assert [step.number for step in steps] == [3, 4, 5]
    _, steps = serve_until(configuration(tmp_path, source), 7)
    assert [step.number for step in steps] == [6, 7]


def test_projections_are_kept_for_as_long_as_the_targets_gradient(tmp_path: Path) -> None:
    _, learner = learner_of(tmp_path, {"geometry": "sketch", "sketch_width": 4, "pool_size": 8, "settle_steps": 3})
    seen = []
    for seed in range(6):
        train_step(learner, make_samples(8, seed=seed))
        seen.append(learner.projections)
    assert learner.projections
    # The target is refreshed before steps 1 and 5; before step 4 the second moment has settled.
    assert [seen[i] is seen[i + 1] for i in range(5)] == [True, True, False, False, True]


@pytest.mark.parametrize(("geometry", "tolerance"), [("exact", 1e-4), ("rank_one", 1e-4), ("sketch", 0.25)])
def test_the_targets_own_samples_have_a_utility_of_one(tmp_path: Path, geometry: str, tolerance: float) -> None:
    """On average, at a refresh, whatever the geometry: P differs by orders of magnitude between the two looks."""
    bandit = {"draw": "cluster_ucb", "geometry": geometry, "sketch_width": 8, "settle_steps": 2, "pool_size": 8}
    _, learner = learner_of(tmp_path, bandit)
    of_the_target = {}
    for step in range(5):
        pool = make_samples(4, seed=99) if step in (0, 4) else make_samples(8, seed=step)
        report = train_step(learner, pool)
        assert report.utilities is not None
        if step in (0, 4):
            assert report.target_refreshed
            of_the_target[step] = sum(report.utilities) / 4
    assert of_the_target == {0: pytest.approx(1, rel=tolerance), 4: pytest.approx(1, rel=tolerance)}


def test_natural_coefficients_are_applied_as_they_are(tmp_path: Path) -> None:
    _, learner = learner_of(tmp_path, {"normalisation": "natural", "pool_size": 8, "settle_steps": 2})
    for seed in range(4):
        report = train_step(learner, make_samples(8, seed=seed))
        assert sum(report.weights) == pytest.approx(float(report.decision.weights_N.sum()), rel=1e-5)
    assert sum(report.weights) != pytest.approx(1.0, rel=1e-2)


def test_stated_weights_keep_the_sum_of_every_row() -> None:
    weights_LN = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.5, 1.5], [0.0, 0.0, 0.0]])
    got = reweighted(weights_LN, torch.tensor([1.0, 3.0, 1e308], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]))


def test_routed_coefficients_reach_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's gradient is that of the loss weighted with the layer's own coefficients, by autograd."""
    _, learner = learner_of(tmp_path, {"route": "gast", "weigh": "full", "gast": {"per_layer": 2}})
    learner.optimization = learner.optimization.model_copy(update={"clip_norm": None})
    seen: dict[str, torch.Tensor] = {}

    def look() -> None:
        seen.update({name: p.grad.clone() for name, p in learner.capture.parameters.items() if p.grad is not None})

    monkeypatch.setattr(learner.optimizer, "step", look)
    pool = make_samples(6)
    layers_LN = train_step(learner, pool).decision.layer_weights_LN
    assert layers_LN is not None
    assert ((layers_LN > 0).sum(1) == 2).all()
    assert len({tuple(row) for row in (layers_LN > 0).tolist()}) > 1
    batch, model = collate(pool, learner.pad_id), learner.capture._model
    losses_N = mean_losses(model(input_ids=batch.input_ids_NT).logits, batch.labels_NT)
    for layer, weights_N in zip(layers_of(learner), layers_LN, strict=True):
        names = [name for name in seen if layer_of(name) == layer]
        expected = torch.autograd.grad(
            losses_N @ weights_N, [learner.capture.parameters[name] for name in names], retain_graph=True
        )
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_health_of_every_stage_is_exported(tmp_path: Path) -> None:
    settings, learner = learner_of(tmp_path, ALL_ON)
    loaded = load_model(settings.model, settings.training.seed)
    buffer = Buffer(settings.buffer)
    for sample in make_samples(24):
        buffer.put(sample)
    draws = make_draws(settings, buffer, loaded, make_samples(4, seed=99))
    metrics = Metrics(arms=4)
    expect_layers(metrics, learner)
    pool = draws.pool(lambda: False)
    report = train_step(learner, pool)
    draws.settle(report.utilities)
    observe_stages(metrics, learner, draws, report)
    value = metrics.registry.get_sample_value
    assert sum(value("stream_trainer_arm_draws_total", {"arm": str(arm)}) or 0 for arm in range(4)) == 8
    assert value("stream_trainer_mask_density_ratio") == pytest.approx(0.3, abs=1e-3)
    assert (value("stream_trainer_mask_churn_ratio"), value("stream_trainer_mask_refreshes_total")) == (1.0, 1.0)
    assert value("stream_trainer_mask_age_steps") == 0
    assert value("stream_trainer_waiting_records") == 12
    entropy = value("stream_trainer_route_entropy_ratio", {"layer": "model.layers.1"})
    assert entropy is not None
    assert 0 < entropy < 1
    assert any(value("stream_trainer_arm_reward", {"arm": str(arm)}) for arm in range(4))


def test_draws_in_order_hold_nothing_back(tmp_path: Path) -> None:
    settings, _ = learner_of(tmp_path, {})
    loaded = load_model(settings.model, settings.training.seed)
    draws = make_draws(settings, Buffer(settings.buffer), loaded, make_samples(4))
    assert isinstance(draws, InOrder)
    assert (draws.waiting, draws.settle(None), draws.state()) == (0, [], {})
