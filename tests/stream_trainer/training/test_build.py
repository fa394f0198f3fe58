"""What settings stand for: selectors, scorings, samplers, a mask with its anchors, and what each draws from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Decision, Equal, Exact, FilterThenWeight, Greedy, Interaction, RankOne, Sketched, TopK
from gradient_selectors.weigh.baselines import OrUniform
from gradient_selectors.weigh.selector import Selector

from stream_trainer.errors import SettingsError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.settings.sections.selection import SelectionSettings
from stream_trainer.training.build import Generators, make_route, make_scoring, make_selector
from stream_trainer.training.draw.pools import LossSampler, SequentialSampler, UniformSampler
from stream_trainer.training.draw.sampling import make_sampler
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler, RivalSampler
from tests.helpers.service import ALL_ON
from tests.helpers.steps import make_samples, setup_of

ANCHORS = make_samples(6, seed=7)


class Loudest:
    """A selector of a user's own: the candidates with the largest loss."""

    def __init__(self, batch_size: int, generator: torch.Generator, share: float = 1.0) -> None:
        if share > 1:
            raise ValueError(f"share={share} is above 1")
        self.batch_size, self.generator, self.share = batch_size, generator, share

    def decide(self, interaction: Interaction) -> Decision:
        coefficients_N = torch.zeros(interaction.num_samples)
        best = interaction.gradients.losses_N.topk(round(self.share * self.batch_size)).indices
        coefficients_N[best] = 1 / len(best)
        return Decision(coefficients_N)


class Silent:
    """No selector: it decides nothing."""


def selector_of(**selection: Any) -> Selector:
    return make_selector(SelectionSettings(**selection), Generators.of(3))


@pytest.mark.parametrize(
    ("weigh", "kind"),
    [("filter_then_weight", FilterThenWeight), ("greedy", Greedy), ("top_k", TopK), ("equal", Equal)],
)
def test_each_name_is_its_selector(weigh: str, kind: type) -> None:
    selector = selector_of(draw="all", weigh=weigh)
    assert type(selector) is kind
    assert getattr(selector, "batch_size", 4) == 4
    fallback = selector_of(draw="all", weigh=weigh, when_none_helps="uniform")
    assert isinstance(fallback, OrUniform)
    assert type(fallback.selector) is kind
    assert fallback.needs_target == (weigh != "equal")


def test_settings_of_the_methods_reach_them() -> None:
    method = {"keep_ratio": 1.25, "min_gain": 0.1, "ridge": 0.5, "max_coefficient": 2.0, "filter": "cosine"}
    selector = selector_of(pool_size=9, batch_size=7, filter_then_weight=method)
    assert isinstance(selector, FilterThenWeight)
    assert (selector.batch_size, selector.keep_ratio, selector.min_gain) == (7, 1.25, 0.1)
    assert (selector.ridge, selector.cap, selector.filter) == (0.5, 2.0, "cosine")
    greedy = selector_of(weigh="greedy", greedy={"keep_ratio": 1.5})
    assert isinstance(greedy, Greedy)
    assert greedy.keep_ratio == 1.5


@pytest.mark.parametrize(("scoring", "kind"), [("exact", Exact), ("rank_one", RankOne), ("sketched", Sketched)])
def test_each_name_is_its_scoring(scoring: str, kind: type) -> None:
    assert type(make_scoring(SelectionSettings.model_validate({"scoring": scoring}), Generators.of(3))) is kind


def test_each_name_is_its_sampler(tmp_path: Path) -> None:
    kinds = {"all": SequentialSampler, "uniform": UniformSampler, "cluster_ucb": BanditSampler}
    kinds |= {"learned": LearnedSampler, "lowest_loss": LossSampler, "middle_loss": LossSampler}
    kinds |= dict.fromkeys(("nearest", "near_random", "knn_kde", "dsir"), RivalSampler)
    for draw, kind in kinds.items():
        setup = setup_of(tmp_path, ALL_ON | {"draw": draw})
        sampler = make_sampler(
            setup.settings, Buffer(setup.settings.buffer), setup.loaded, setup.engine, make_samples(4)
        )
        assert type(sampler) is kind


def test_a_route_is_made_where_one_is_asked_for() -> None:
    generators = Generators.of(3)
    assert make_route(SelectionSettings(), generators) is None
    gast = make_route(SelectionSettings.model_validate({"route": "gast", "gast": {"per_layer": 3}}), generators)
    assert gast is not None
    assert (gast.per_layer, gast.generator) == (3, generators.route)


def test_every_part_draws_from_a_generator_of_its_own() -> None:
    """Switching one off, or drawing more of it, leaves the others as they are."""
    made = Generators.of(3)
    drawn = [torch.rand(4, generator=g) for g in (made.uniform, made.route, made.scoring, made.fallback, made.selector)]
    assert len({tuple(values.tolist()) for values in drawn}) == 5
    assert torch.equal(torch.rand(4, generator=Generators.of(3).fallback), drawn[3])


@pytest.mark.parametrize(
    ("selection", "steered"),
    [
        ({"weigh": "equal"}, False),
        ({"weigh": "equal", "draw": "uniform"}, False),
        ({"weigh": "equal", "when_none_helps": "uniform"}, False),
        ({"weigh": "top_k"}, True),
        ({"weigh": "equal", "draw": "cluster_ucb"}, True),
        ({"weigh": "equal", "route": "gast"}, True),
        ({"weigh": "equal", "mask": "dual_sft"}, True),
    ],
)
def test_the_targets_gradient_is_computed_where_something_reads_it(
    selection: dict[str, Any], steered: bool, tmp_path: Path
) -> None:
    setup = setup_of(tmp_path, selection)
    assert (setup.engine.target is not None) == steered
    assert setup.step(make_samples(8)).target_refreshed == steered


# A selector of the user's own


def own(name: str, **options: Any) -> Selector:
    return selector_of(weigh=f"{__name__}:{name}", weigh_options=options)


def test_a_selector_of_ones_own_is_given_what_it_asks_for() -> None:
    generators = Generators.of(3)
    settings = SelectionSettings(weigh=f"{__name__}:Loudest", weigh_options={"share": 0.5}, batch_size=2)
    selector = make_selector(settings, generators)
    assert isinstance(selector, Loudest)
    assert (selector.batch_size, selector.generator, selector.share) == (2, generators.selector, 0.5)


def test_a_selector_of_ones_own_decides(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, {"weigh": f"{__name__}:Loudest", "route": "gast", "mask": "dual_sft"})
    report = setup.step(make_samples(8))
    assert report.result == "applied"
    assert set(report.selected) == set(torch.tensor(report.losses).topk(3).indices.tolist())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Quietest", {}, "cannot be imported .*no attribute 'Quietest'.*; put it on the PYTHONPATH as module:Class"),
        (
            "Loudest",
            {"shares": 1},
            "cannot be made .*unexpected keyword argument 'shares'.*; correct selection",
        ),
        ("Loudest", {"share": 2}, "cannot be made .share=2 is above 1.; correct selection.weigh_options"),
        ("Silent", {}, r"has no method decide\(interaction\); see the page"),
    ],
)
def test_a_selector_that_cannot_be_made_is_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=f"^selection.weigh={__name__}:{name} {says}") as caught:
        own(name, **options)
    assert "\n" not in str(caught.value)


def test_a_module_that_there_is_not_is_one_line() -> None:
    with pytest.raises(SettingsError, match=r"^selection.weigh=no.such:Thing cannot be imported .No module named 'no'"):
        selector_of(weigh="no.such:Thing")


# The anchors of a mask


def rises_of_the_anchors_loss(folder: Path, steps: int, **dual_sft: float) -> list[float]:
    """How far the anchors' loss is above its start after each step of training on something else."""
    method = {"density": 0.2, "lambda_prior": 0.0, **dual_sft}
    setup = setup_of(folder, {"mask": "dual_sft", "dual_sft": method}, anchors=ANCHORS)
    start, rises = setup.loss(ANCHORS), []
    for seed in range(steps):
        setup.step(make_samples(8, seed=seed))
        rises.append(setup.loss(ANCHORS) - start)
    return rises


def test_the_anchors_guard_the_first_mask_where_self_distillation_cannot(tmp_path: Path) -> None:
    unguarded = rises_of_the_anchors_loss(tmp_path, 1, lambda_anchor=0.0)
    distilled = rises_of_the_anchors_loss(tmp_path, 1, lambda_anchor=0.0, lambda_prior=4.0)
    guarded = rises_of_the_anchors_loss(tmp_path, 1, lambda_anchor=4.0)
    assert distilled == pytest.approx(unguarded)
    assert guarded[0] < unguarded[0]


def test_masks_that_the_anchors_guard_keep_their_loss_down(tmp_path: Path) -> None:
    unguarded = rises_of_the_anchors_loss(tmp_path, 6, lambda_anchor=0.0)
    guarded = rises_of_the_anchors_loss(tmp_path, 6, lambda_anchor=4.0)
    assert all(ours < theirs for ours, theirs in zip(guarded, unguarded, strict=True))


def test_without_anchors_nothing_is_guarded(tmp_path: Path) -> None:
    mask = setup_of(tmp_path, {"mask": "dual_sft"}).engine.mask
    assert mask is not None
    assert mask.anchors is None
