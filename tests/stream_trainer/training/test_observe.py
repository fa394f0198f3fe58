"""What a step did, as metrics."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stream_trainer.errors import SettingsError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.monitoring.metrics import WAYS, Metrics
from stream_trainer.training.draw.sampling import make_sampler
from stream_trainer.training.observe import expect_layers, layers_of, observe_stages, observe_step
from tests.helpers.service import ALL_ON
from tests.helpers.steps import make_samples, setup_of


def test_the_health_of_every_stage_is_exported(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, ALL_ON)
    buffer = Buffer(setup.settings.buffer)
    for sample in make_samples(24):
        buffer.put(sample)
    sampler = make_sampler(setup.settings, buffer, setup.loaded, setup.engine, make_samples(4, seed=99))
    metrics = Metrics(arms=4)
    value = metrics.registry.get_sample_value
    expect_layers(metrics, setup.engine)
    layers = layers_of(setup.engine)
    assert [value("stream_trainer_route_entropy_ratio", {"layer": layer}) for layer in layers] == [0] * len(layers)
    report = setup.step(sampler.next(lambda: False))
    sampler.feedback(report)
    observe_stages(metrics, setup.engine, sampler, report)
    assert sum(value("stream_trainer_arm_draws_total", {"arm": str(arm)}) or 0 for arm in range(4)) == 8
    assert (value("stream_trainer_mask_churn_ratio"), value("stream_trainer_mask_refreshes_total")) == (1.0, 1.0)
    assert value("stream_trainer_mask_age_steps") == 0
    assert value("stream_trainer_waiting_records") == 12
    entropy = value("stream_trainer_route_entropy_ratio", {"layer": "model.layers.1"})
    assert entropy is not None
    assert 0 < entropy < 1
    assert any(value("stream_trainer_arm_reward", {"arm": str(arm)}) for arm in range(4))


def test_what_a_learned_draw_has_learned_is_exported_by_the_features_names(tmp_path: Path) -> None:
    """With `auto`, the way it trains and the rate of each, too."""
    setup = setup_of(tmp_path, ALL_ON | {"draw": "auto"})
    buffer = Buffer(setup.settings.buffer)
    for number, sample in enumerate(make_samples(24)):
        buffer.put(replace(sample, fields=(("source", "ab"[number % 2]),)))
    sampler = make_sampler(setup.settings, buffer, setup.loaded, setup.engine, make_samples(4, seed=99))
    report = setup.step(sampler.next(lambda: False))
    sampler.feedback(report)
    metrics = Metrics()
    observe_stages(metrics, setup.engine, sampler, report)
    value = metrics.registry.get_sample_value
    for feature in ("constant", "likeness", "source=a", "source=b", "other fields"):
        assert value("stream_trainer_draw_coefficient", {"feature": feature}) is not None
        deviation = value("stream_trainer_draw_coefficient_deviation", {"feature": feature})
        assert deviation is not None
        assert deviation > 0
    assert value("stream_trainer_draw_coefficient", {"feature": "unseen value 5"}) is None
    assert value("stream_trainer_draw_probes_total") == 1
    ways = {way: value("stream_trainer_training_way", {"stream_trainer_training_way": way}) for way in WAYS}
    assert sum(count or 0 for count in ways.values()) == 1
    assert all(value("stream_trainer_way_rate", {"way": way}) is not None for way in WAYS)
    assert value("stream_trainer_pool_pieces") == 1


def test_a_step_is_counted_with_its_pool_and_its_samples(tmp_path: Path) -> None:
    setup, pool = setup_of(tmp_path, {}), make_samples(8)
    report = setup.step(pool)
    metrics = Metrics()
    observe_step(metrics, pool, make_samples(3, seed=1), report, 0.25, 0.5)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"stream_trainer_{name}", labels)

    assert value("steps_total", result="applied") == 1
    assert value("step_seconds_sum") == 0.5
    assert value("phase_seconds_total", phase="wait") == 0.25
    for phase, seconds in report.seconds.items():
        assert value("phase_seconds_total", phase=phase) == pytest.approx(seconds)
    assert value("tokens_scored_total") == sum(sample.num_tokens for sample in pool)
    assert value("tokens_trained_total") == sum(pool[i].num_tokens for i in report.selected)
    assert value("selected_ratio") == len(report.selected) / 8
    assert value("progressive_loss") == pytest.approx(sum(report.losses) / 8)
    assert value("target_refreshes_total") == 1
    assert value("effective_samples") == pytest.approx(report.decision.effective_samples)
    assert value("solver_runs_total", status="optimal") == 1


def test_a_refused_refresh_of_the_target_is_counted_and_changes_no_decision(tmp_path: Path) -> None:
    """One sample of the target becomes poison after the first refresh: steps go on with the gradient of that one."""
    selection = {"weigh": "top_k", "draw": "all", "mask": "none", "route": "none"}
    options = {"path": "none.jsonl", "refresh_steps": 2, "refresh_samples": 4}
    poisoned, sound = (setup_of(tmp_path, selection, target=options) for _ in range(2))
    metrics, pool, found = Metrics(), make_samples(8), []
    for setup in (poisoned, sound):
        for step in range(3):
            if step == 1:
                gradient = {name: values.clone() for name, values in (setup.target.gradient or {}).items()}
                if setup is sound:
                    setup.target.refresh_steps = 100
                with torch.no_grad():
                    setup.loaded.model.get_parameter("model.embed_tokens.weight")[2] = (
                        torch.nan
                    )  # pools hold no token below 3
                setup.target.samples[1].input_ids_NT[0, 0] = 2
            report = setup.step(pool)
            found.append((report.target_refused, report.target_refreshed, report.coefficients, report.losses))
            if setup is poisoned:
                observe_step(metrics, pool, (), report, 0.0, 0.1)
        assert all(torch.equal(values, gradient[name]) for name, values in (setup.target.gradient or {}).items())
    assert [refused for refused, *_ in found[:3]] == [False, False, True]
    assert [rest for _, *rest in found[:3]] == [rest for _, *rest in found[3:]]
    value = metrics.registry.get_sample_value
    assert value("stream_trainer_target_refreshes_refused_total") == 1
    assert value("stream_trainer_target_refreshes_total") == 1


def test_a_target_that_is_poison_from_the_start_is_one_line(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, {"weigh": "top_k"})
    with torch.no_grad():
        setup.loaded.model.get_parameter("model.embed_tokens.weight")[2] = torch.nan
    setup.target.samples[3].input_ids_NT[0, 0] = 2
    with pytest.raises(SettingsError) as caught:
        setup.step(make_samples(8))
    assert "target.path" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sample 3 is nan" in str(caught.value)
