"""Whether selection pays: what comparisons come to, and training without it."""

import math
import random

import pytest
import torch
from gradient_selectors.views.advantage import Comparison

from stream_trainer.settings.sections.advantage import AdvantageSettings
from stream_trainer.training.draw.paying import Paying, Shadows, by_roles
from stream_trainer.training.draw.shadow import Effect
from stream_trainer.training.draw.sides import Sides


def paying(**options: object) -> Paying:
    return Paying(AdvantageSettings(window=8, **options), torch.Generator().manual_seed(0))


def noted(found: Paying, *sides: tuple[float, float], agreement: float | None = None) -> list[bool]:
    return [found.note(Comparison(chosen, uniform, agreement)) for chosen, uniform in sides]


def test_nothing_is_said_before_a_window_is_full() -> None:
    found = paying()
    noted(found, *[(1.0, 0.25)] * 7)
    assert (found.advantage, found.pays) == (None, None)
    noted(found, (1.0, 0.25))
    assert found.advantage == pytest.approx(4)
    assert found.pays is True


def test_noise_on_both_sides_is_near_one() -> None:
    chance = random.Random(0)
    found = paying()
    seen = []
    for _ in range(300):
        noted(found, (chance.gauss(0, 1), chance.gauss(0, 1)))
        if found.advantage is not None:
            seen.append(found.advantage)
    assert 0.8 < sum(seen) / len(seen) < 1.3


def test_what_chance_draws_may_do_harm() -> None:
    found = paying()
    noted(found, *[(1.0, -0.5), (0.8, -0.4)] * 8)
    assert found.advantage is not None
    assert found.advantage > 2
    assert math.isfinite(found.advantage)


def test_it_says_when_selection_ceases_to_pay_and_when_it_pays_again() -> None:
    found = paying()
    assert not any(noted(found, *[(1.0, 0.25)] * 8))
    assert sum(noted(found, *[(0.25, 0.25)] * 60)) == 1
    assert sum(noted(found, *[(1.0, 0.25)] * 60)) == 1
    assert found.advantage == pytest.approx(4, rel=0.1)


def test_a_fallback_compares_as_often_as_selection() -> None:
    found = paying(every_steps=4, when_not_paying="uniform")
    noted(found, *[(0.25, 0.25)] * 8)
    due = []
    for _ in range(8):
        due.append(found.rests and found.due)
        found.turn(scored=found.due)
    assert due == [True, False, False, False] * 2


def test_without_a_fallback_only_scored_steps_count() -> None:
    found = paying(every_steps=2)
    due = []
    for scored in (True, False, True):
        due.append(found.rival is found.generator)
        found.turn(scored=scored)
    assert (due, found.due) == ([True, False, False], True)


def test_none_compares_where_that_is_off() -> None:
    assert paying(every_steps=None).rival is None


def test_the_state_comes_back_whole() -> None:
    found, again = paying(), paying()
    noted(found, *[(1.0, 0.25)] * 9, agreement=0.5)
    found.turn(scored=True)
    torch.rand(3, generator=found.generator)
    again.load_state_dict(found.state_dict())
    for one in (found, again):
        noted(one, (0.3, 0.2), agreement=0.1)
    assert again.state_dict()["sums"] == found.state_dict()["sums"]
    assert (again.advantage, again.pays, again.agreement) == (found.advantage, found.pays, found.agreement)
    assert torch.equal(torch.rand(3, generator=found.generator), torch.rand(3, generator=again.generator))


def test_a_probe_compares_what_the_policy_drew_with_what_chance_drew() -> None:
    found = by_roles(("policy", "uncertainty", "policy", "uniform"), (0.75, 9.0, 0.25, 0.125))
    assert found == Comparison(0.5, 0.125, None)
    assert by_roles(("policy", "policy"), (1.0, 1.0)) is None
    assert by_roles(("policy", "uniform"), (1.0, math.nan)) is None


def measuring(**options: object) -> tuple[Paying, Shadows]:
    shadows = Shadows(4, (), torch.Generator().manual_seed(1), None, Sides(8), Sides(8))
    return Paying(AdvantageSettings(window=8, **options), torch.Generator().manual_seed(0), shadows), shadows


def noted_effects(found: Shadows, chosen: float, uniform: float, predicted: tuple[float, float], times: int) -> int:
    return sum(found.note(Effect(predicted[0], chosen), Effect(predicted[1], uniform)) for _ in range(times))


def test_what_is_measured_decides_over_what_is_predicted() -> None:
    found, shadows = measuring()
    noted(found, *[(3.0, 1.0)] * 8)
    assert (found.pays, found.measured_advantage) == (True, None)
    noted_effects(shadows, 1.0, 1.0, (3.0, 1.0), 7)
    assert not found.judge(), "the window of what is measured is not full"
    noted_effects(shadows, 1.0, 1.0, (3.0, 1.0), 1)
    assert found.judge()
    assert found.pays is False
    assert found.advantage == pytest.approx(1)
    assert found.predicted.advantage == pytest.approx(3)
    noted(found, *[(3.0, 1.0)] * 8)
    assert found.pays is False


def test_it_is_said_once_when_measured_effects_speak_against_predicted_ones() -> None:
    _, shadows = measuring()
    assert noted_effects(shadows, 1.0, 2.0, (3.0, 1.0), 7) == 0
    assert noted_effects(shadows, 1.0, 2.0, (3.0, 1.0), 20) == 1
    assert shadows.disagree
    assert noted_effects(shadows, 2.0, 1.0, (3.0, 1.0), 30) == 0
    assert not shadows.disagree


def test_noise_does_not_disagree() -> None:
    chance, (_, shadows) = random.Random(0), measuring()
    for _ in range(200):
        measured = chance.gauss(0, 1)
        noted_effects(shadows, measured, 0.0, (3.0, 1.0), 1)
    assert not shadows.disagree


def test_steps_are_measured_every_so_often_and_a_fallback_looks_then() -> None:
    found, shadows = measuring(every_steps=None, when_not_paying="uniform")
    noted_effects(shadows, 1.0, 1.0, (1.0, 1.0), 8)
    found.judge()
    due = []
    for _ in range(9):
        due.append(found.rests and found.looks)
        found.turn(scored=found.looks)
    assert due == [True, False, False, False] * 2 + [True]


def test_the_state_of_shadows_comes_back_whole_and_may_be_missing() -> None:
    found, shadows = measuring()
    noted_effects(shadows, 1.0, 2.0, (3.0, 1.0), 9)
    found.turn(scored=True)
    torch.rand(3, generator=shadows.generator)
    again, same = measuring()
    again.load_state_dict(found.state_dict())
    assert same.state_dict()["measured"] == shadows.state_dict()["measured"]
    assert (same.disagree, same.due) == (True, False)
    assert torch.equal(torch.rand(3, generator=same.generator), torch.rand(3, generator=shadows.generator))
    plain = paying()
    plain.load_state_dict(found.state_dict())
    fresh, afresh = measuring()
    fresh.load_state_dict(plain.state_dict())
    assert afresh.measured.comparisons == 0
