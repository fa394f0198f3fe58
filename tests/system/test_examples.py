"""The scripts in `examples/`, run as they stand: short, and better than training on as many samples at random."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Equal, SelectionEngine

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("select_in_a_loop.py", "select_under_trainer.py")
STEPS, SELECTED = 100, 4


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that both scripts take model and samples from."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield __import__("mixture")
    sys.modules.pop("mixture", None)


def uniform_loss(mixture: Any) -> float:
    """Test loss after as many steps on as many samples as a script selects, taken as they come."""
    model = mixture.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine = SelectionEngine(model, optimizer, Equal())
    for step in range(STEPS):
        engine.backward({name: values[:SELECTED] for name, values in mixture.candidates(step).items()})
        optimizer.step()
        optimizer.zero_grad()
    return float(mixture.test_loss(model))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_fits_on_twenty_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 20


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_lowers_the_targets_loss_faster_than_uniform(
    name: str, mixture: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "test loss" in capsys.readouterr().out
    selected = mixture.test_loss(ran["model"])
    before, uniform = mixture.test_loss(mixture.make_model()), uniform_loss(mixture)
    assert selected < 0.5 * uniform < 0.5 * before
