"""The selector on the page about adding one: run as it stands there, in the service's own step."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.route.gast import Gast
from gradient_selectors.views.interaction import Selector

from stream_trainer.training.step import train_step
from tests.helpers.oracle import make_model
from tests.helpers.pools import block_pool, written_pool
from tests.stream_trainer.training.test_step import make_learner, make_samples

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-selector.md"


@pytest.fixture(scope="module")
def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def softmax_draw(code: str) -> Any:
    namespace: dict[str, Any] = {"__name__": "softmax_draw"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace["SoftmaxDraw"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_it_fits_on_a_page(code: str) -> None:
    assert len(code.splitlines()) < 80


def test_it_draws_the_better_ones_more_often(softmax_draw: Any) -> None:
    pool = written_pool([[3.0], [1.0], [-1.0], [2.0], [float("nan")]], [1.0])
    selector, counts = softmax_draw(1, seeded()), [0] * 5
    for _ in range(600):
        (chosen,) = selector.decide(pool).chosen
        counts[chosen] += 1
    assert counts[0] > counts[3] > counts[1] > 0
    assert counts[2] == counts[4] == 0


def test_it_chooses_nothing_where_nothing_helps(softmax_draw: Any) -> None:
    decision = softmax_draw(2, seeded()).decide(written_pool([[-1.0], [0.0]], [1.0]))
    assert decision.chosen == []


def test_the_service_runs_it_as_it_is(softmax_draw: Any) -> None:
    learner = make_learner(make_model("llama"))
    selector: Selector = softmax_draw(2, seeded())
    learner.selector = selector
    report = train_step(learner, make_samples(6))
    assert report.result == "applied"
    assert len(report.chosen) == 2


def test_it_composes_with_routing(softmax_draw: Any) -> None:
    decision = Gast(softmax_draw(3, seeded()), 1, seeded()).decide(block_pool(torch.rand(4, 6) + 1))
    assert decision.layer_weights_LN is not None
    assert decision.layer_weights_LN.sum(1).tolist() == pytest.approx([1.0] * 4)
