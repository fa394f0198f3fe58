"""What the settings of memory stand for, from the settings to a step's report."""

from pathlib import Path
from typing import Any

import pytest
from gradient_selectors.views.pieces import Budget

from stream_trainer.settings.schema import Settings
from stream_trainer.training.build import make_budget
from tests.helpers.steps import make_samples, setup_of


def settings(selection: dict[str, Any], **others: Any) -> Settings:
    return Settings.model_validate(
        {
            "source": {"kind": "jsonl", "jsonl": {"path": "none.jsonl"}},
            "model": {"name": "none"},
            "target": {"path": "none.jsonl"},
            "selection": selection,
            **others,
        }
    )


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (settings({}), Budget(4096, 4_000_000_000)),
        (settings({"micro_tokens": None}, memory={"factors_gb": None}), Budget()),
        (settings({"micro_tokens": 100}, memory={"factors_gb": 0.5}), Budget(100, 500_000_000)),
        (settings({"scoring": "rank_one"}), Budget()),
    ],
)
def test_settings_of_memory_are_the_engines_budget(given: Settings, budget: Budget) -> None:
    assert make_budget(given) == budget


def test_a_step_in_pieces_reports_them(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, {"weigh": "equal", "route": "gast", "micro_tokens": 1, "batch_size": 4})
    setup.step(make_samples(4))
    assert setup.engine.last is not None
    assert setup.engine.last.pieces == 4
    assert setup.engine.last.padding == 0
