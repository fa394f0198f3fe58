"""Draw, weigh, route and mask together: one pass for all of them, every combination valid or refused, all resumable."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Sketched
from gradient_selectors.capture.batch import mean_losses
from gradient_selectors.capture.gradients import layer_of
from safetensors.torch import save_file

from stream_trainer.checkpoints.directory import checkpoints_in
from stream_trainer.errors import CheckpointError
from stream_trainer.models.loading import load_model
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import ModelSettings
from stream_trainer.training.observe import layers_of
from tests.helpers.service import (
    ALL_ON,
    MODEL,
    Step,
    configuration,
    good,
    goods,
    hashes,
    jsonl,
    serve_until,
    write_lines,
)
from tests.helpers.steps import Setup, make_samples, setup_of

DRAWS, WEIGHERS = ("all", "uniform", "learned", "cluster_ucb"), ("filter_then_weight", "greedy", "top_k", "equal")
ROUTES, MASKS = ("none", "gast"), ("none", "fixed", "dual_sft")
WIDE = MODEL | {"hidden_size": 96, "intermediate_size": 160}  # wide enough for the kernels that large matrices get


def write_mask(folder: Path, share: float) -> Path:
    model = load_model(ModelSettings(config=MODEL, tokenizer="bytes"), 5).model
    generator = torch.Generator().manual_seed(0)
    path = folder / "mask.safetensors"
    save_file({name: torch.rand(p.shape, generator=generator) < share for name, p in model.named_parameters()}, path)
    return path


def combinations() -> list[Any]:
    """All of them; those that are not slow have each value of one setting with each of another."""
    found = []
    for places in itertools.product(*(range(len(values)) for values in (DRAWS, WEIGHERS, ROUTES, MASKS))):
        chosen = DRAWS[places[0]], WEIGHERS[places[1]], ROUTES[places[2]], MASKS[places[3]]
        if chosen[:2] != ("learned", "equal"):
            found.append(pytest.param(*chosen, marks=[pytest.mark.slow] if sum(places) % 3 else []))
    return found


@pytest.mark.parametrize(("draw", "weigh", "route", "mask"), combinations())
def test_every_combination_makes_updates(tmp_path: Path, draw: str, weigh: str, route: str, mask: str) -> None:
    selection = ALL_ON | {"draw": draw, "weigh": weigh, "route": route, "mask": mask}
    if mask == "fixed":
        selection["mask_path"] = str(write_mask(tmp_path, 0.3))
    setup = setup_of(tmp_path, selection)
    reports = [setup.step(make_samples(8, seed=seed)) for seed in range(3)]
    assert [report.result for report in reports] == ["applied"] * 3
    assert all((report.utilities is not None) == (draw in ("learned", "cluster_ucb")) for report in reports)
    assert all((report.decision.coefficients_LN is not None) == (route == "gast") for report in reports)


class _Passes:
    """Forward passes of the model and calls of autograd, while a step runs."""

    def __init__(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        layer = setup.loaded.model.get_submodule("model.layers.0")
        layer.register_forward_hook(lambda *_: self.counts.update(["forward"]))
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
    setup = setup_of(tmp_path, ALL_ON)
    setup.step(make_samples(8))
    passes = _Passes(setup, monkeypatch)
    reports = [setup.step(make_samples(8, seed=seed)) for seed in (1, 2, 3)]
    assert [report.target_refreshed for report in reports] == [False] * 3
    assert [report.mask_change is not None for report in reports] == [True, False, True]
    assert passes.counts == {"forward": 3, "backward": 3}
    assert all(report.decision.coefficients_LN is not None for report in reports)


def run_all_on(folder: Path, last_step: int | None, selection: dict[str, Any], **sections: Any) -> list[Step]:
    checkpoint = {"dir": str(folder / "checkpoints"), "every_steps": 7}
    config = configuration(
        folder, jsonl(folder / "stream.jsonl"), selection=ALL_ON | selection, checkpoint=checkpoint, **sections
    )
    return serve_until(config, last_step)[1]


def whole_and_resumed(folder: Path, selection: dict[str, Any], **sections: Any) -> tuple[list[Step], list[Step]]:
    """What a run of 21 steps decided, and one that was stopped after steps 4 and 11; both leave the same checkpoint."""
    runs, left = [], []
    for name, stops in {"whole": [21], "resumed": [4, 11, 21]}.items():
        place = folder / name
        place.mkdir()
        write_lines(place / "stream.jsonl", goods(400))
        runs.append([step for stop in stops for step in run_all_on(place, stop, selection, **sections)])
        left.append(hashes(checkpoints_in(place / "checkpoints")[0].path))
    for name in ("model/model.safetensors", "optimizer.safetensors", "state.safetensors"):
        assert left[0][name] == left[1][name], name
    return runs[0], runs[1]


@pytest.mark.parametrize(
    ("selection", "sections"),
    [
        ({}, {}),
        pytest.param({}, {"model": {"lora": {"rank": 2}}}, marks=pytest.mark.slow),
        ({"mask": "none", "scoring": "sketched", "sketch_width": 4}, {"target": {"refresh_steps": 8}}),
    ],
    ids=["full", "lora", "sketched"],
)
def test_resumed_runs_make_the_same_next_ten_decisions(
    tmp_path: Path, selection: dict[str, Any], sections: dict[str, Any]
) -> None:
    """Bandit, routes, mask, its statistics and projections go through the checkpoint: every decision is equal."""
    whole, resumed = whole_and_resumed(tmp_path, selection, **sections)
    assert [step.number for step in resumed] == list(range(1, 22))
    assert resumed == whole
    assert sum(step.result == "applied" for step in whole[11:]) == 10


@pytest.mark.parametrize("draw", ["cluster_ucb", pytest.param("uniform", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("mask", "sketch_width"),
    [
        ("dual_sft", 16),
        pytest.param("none", 16, marks=pytest.mark.slow),
        pytest.param("none", 4, marks=pytest.mark.slow),
    ],
)
def test_a_wide_model_goes_on_bit_for_bit(draw: str, mask: str, sketch_width: int, tmp_path: Path) -> None:
    """Matrices above 64 on a side go to other kernels: what was kept must come back with the layout it had.

    The learning rate is so large that in some steps nothing helps; without a fallback these are skipped.
    """
    sketching = {"scoring": "sketched", "sketch_width": sketch_width}
    small = {"pool_size": 4, "batch_size": 2, "draw": draw, "mask": mask, **sketching}
    sections = {"model": {"config": WIDE}, "target": {"refresh_steps": 8}, "optimizer": {"learning_rate": 3e-2}}
    results = {}
    for remedy in ("skip", "uniform"):
        folder = tmp_path / remedy
        folder.mkdir()
        whole, resumed = whole_and_resumed(folder, small | {"when_none_helps": remedy}, **sections)
        assert resumed == whole
        results[remedy] = {step.result for step in whole}
    assert results == {"skip": {"applied", "skipped_none_helps"}, "uniform": {"applied"}}


@pytest.mark.parametrize("more", [{}, {"micro_tokens": 40}], ids=["whole", "pieces"])
def test_a_learned_draw_goes_on_bit_for_bit(more: dict[str, Any], tmp_path: Path) -> None:
    """With routes, a mask and sketches of a wide model; where memory is short, with second passes too."""
    learned = {"probe_every": 4, "max_probe_every": 8}
    selection = {"draw": "learned", "scoring": "sketched", "sketch_width": 4, "learned": learned, **more}
    sections: dict[str, Any] = {"model": {"config": WIDE}, "optimizer": {"learning_rate": 1e-3}}
    if more:
        sections["memory"] = {"factors_gb": 0}
    whole, resumed = whole_and_resumed(tmp_path, selection, **sections)
    assert resumed == whole
    assert {len(step.ids) for step in whole} == {3, 8}, "training steps and probes"


def test_records_left_undrawn_are_decided_and_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(100))
    config = configuration(tmp_path, jsonl(tmp_path / "stream.jsonl"), selection=ALL_ON)
    summary, steps = serve_until(config)
    assert sum(summary.counts.values()) == 100
    trained = [name for step in steps for name in step.selected]
    assert len(trained) == len(set(trained)) == summary.counts["trained"]
    drawn = [name for step in steps for name in step.ids]
    assert len(drawn) == len(set(drawn)) < 100


def test_masked_weights_stay_as_they_are(tmp_path: Path) -> None:
    """Bit for bit, over changes of the mask and with weight decay: what was never in a mask has never moved."""
    setup = setup_of(tmp_path, ALL_ON, optimizer={"learning_rate": 1e-3, "weight_decay": 0.5})
    before = {name: p.detach().clone() for name, p in setup.parameters.items()}
    ever = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.items()}
    for seed in range(7):
        setup.step(make_samples(8, seed=seed))
        for name in ever:
            ever[name] |= setup.masked.mask(name).bool()
    for name, parameter in setup.parameters.items():
        assert torch.equal(parameter[~ever[name]], before[name][~ever[name]])
    assert any(not torch.equal(p, before[name]) for name, p in setup.parameters.items())
    assert setup.optimizer.density == pytest.approx(setup.settings.selection.dual_sft.density, abs=1e-3)


def test_a_mask_from_a_file_stays(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, {"mask": "fixed", "mask_path": str(write_mask(tmp_path, 0.2))})
    masks = {name: setup.masked.mask(name) for name in setup.parameters}
    for seed in range(3):
        assert setup.step(make_samples(8, seed=seed)).result == "applied"
    for name, mask in masks.items():
        assert torch.equal(setup.masked.mask(name), mask)


def test_a_checkpoint_made_without_a_mask_or_with_one_says_so(tmp_path: Path) -> None:
    write_lines(tmp_path / "stream.jsonl", goods(60))
    source = jsonl(tmp_path / "stream.jsonl")
    masked = configuration(tmp_path, source, selection=ALL_ON)
    plain = configuration(tmp_path, source, checkpoint={"dir": str(tmp_path / "plain")})
    serve_until(masked, 2)
    serve_until(plain, 2)
    with pytest.raises(CheckpointError, match=r"made with a mask; set selection\.mask to fixed or dual_sft"):
        serve_until(plain | {"checkpoint": masked["checkpoint"]})
    with pytest.raises(CheckpointError, match=r"it was made without a mask.*; restore the settings it was made"):
        serve_until(masked | {"checkpoint": plain["checkpoint"]})


@pytest.mark.parametrize("others", [{}, {"when_none_helps": "uniform"}, {"draw": "uniform", "scoring": "sketched"}])
def test_a_stage_that_was_off_begins_afresh(tmp_path: Path, others: dict[str, str]) -> None:
    """The bandit, the routes and the fallback may be switched on and off over the life of a model."""
    write_lines(tmp_path / "stream.jsonl", [good(number) for number in range(200)])
    source = jsonl(tmp_path / "stream.jsonl")
    off, on = configuration(tmp_path, source), ALL_ON | {"mask": "none"} | others
    serve_until(off, 2)
    _, steps = serve_until(configuration(tmp_path, source, selection=on), 5)
    assert [step.number for step in steps] == [3, 4, 5]
    _, steps = serve_until(off, 7)
    assert [step.number for step in steps] == [6, 7]


def test_projections_are_kept_for_as_long_as_the_targets_gradient(tmp_path: Path) -> None:
    sketching = {"scoring": "sketched", "sketch_width": 4, "preconditioner_warmup_steps": 3}
    setup = setup_of(tmp_path, sketching)
    scoring = setup.engine.scoring
    assert isinstance(scoring, Sketched)
    seen = []
    for seed in range(6):
        setup.step(make_samples(8, seed=seed))
        seen.append(scoring.projections)
    assert scoring.projections
    # The target is refreshed before steps 1 and 5; before step 4 the second moment may be trusted.
    assert [seen[i] is seen[i + 1] for i in range(5)] == [True, True, False, False, True]


@pytest.mark.parametrize(("scoring", "tolerance"), [("exact", 1e-4), ("rank_one", 1e-4), ("sketched", 0.25)])
def test_the_targets_own_samples_have_a_utility_of_one(tmp_path: Path, scoring: str, tolerance: float) -> None:
    """On average, at a refresh, whatever the scoring: P differs by orders of magnitude between the two looks."""
    setup = setup_of(tmp_path, {"draw": "cluster_ucb", "scoring": scoring, "sketch_width": 8})
    of_the_target = {}
    for step in range(5):
        pool = make_samples(4, seed=99) if step in (0, 4) else make_samples(8, seed=step)
        report = setup.step(pool)
        assert report.utilities is not None
        if step in (0, 4):
            assert report.target_refreshed
            of_the_target[step] = sum(report.utilities) / 4
    assert of_the_target == {0: pytest.approx(1, rel=tolerance), 4: pytest.approx(1, rel=tolerance)}


def test_natural_coefficients_are_applied_as_they_are(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, {"filter_then_weight": {"normalisation": "natural"}})
    for seed in range(4):
        report = setup.step(make_samples(8, seed=seed))
        assert sum(report.coefficients) == pytest.approx(float(report.decision.coefficients_N.sum()), rel=1e-5)
    assert sum(report.coefficients) != pytest.approx(1.0, rel=1e-2)


def test_routed_coefficients_reach_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's gradient is that of the loss weighted with the layer's own coefficients, by autograd."""
    routed = {"route": "gast", "weigh": "equal", "gast": {"per_layer": 2}}
    setup = setup_of(tmp_path, routed, optimizer={"learning_rate": 1e-3, "clip_norm": None})
    seen: dict[str, torch.Tensor] = {}

    def look() -> None:
        seen.update({name: p.grad.clone() for name, p in setup.parameters.items() if p.grad is not None})

    monkeypatch.setattr(setup.optimizer, "step", look)
    pool = make_samples(6)
    layers_LN = setup.step(pool).decision.coefficients_LN
    assert layers_LN is not None
    assert ((layers_LN > 0).sum(1) == 2).all()
    assert len({tuple(row) for row in (layers_LN > 0).tolist()}) > 1
    batch = collate(pool, setup.pad_id)
    losses_N = mean_losses(setup.loaded.model(input_ids=batch.input_ids_NT).logits, batch.labels_NT)
    for layer, coefficients_N in zip(layers_of(setup.engine), layers_LN, strict=True):
        names = [name for name in seen if layer_of(name) == layer]
        expected = torch.autograd.grad(
            losses_N @ coefficients_N, [setup.parameters[name] for name in names], retain_graph=True
        )
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
