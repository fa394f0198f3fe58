"""Whether selection pays: what comparisons come to, and training without it."""

import math
import random

import pytest
import torch
from gradient_selectors.views.advantage import Comparison

from stream_trainer.settings.advantage import AdvantageSettings
from stream_trainer.training.draw.paying import Paying, by_roles


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
