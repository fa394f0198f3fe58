"""A rehearsal raises what a pass would raise, and nothing tells that it was."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Decision
from gradient_selectors.state import flatten

from stream_trainer.samples.collate import collate
from tests.helpers.service import ALL_ON
from tests.helpers.steps import Setup, make_samples, setup_of

SELECTIONS: dict[str, dict[str, Any]] = {
    "scored": {},
    "routed and masked": {**ALL_ON, "draw": "all"},
    "sketched": {"scoring": "sketched", "sketch_width": 4, "when_none_helps": "uniform"},
    "plain": {"weigh": "equal", "batch_size": 8},
}


def state_of(setup: Setup) -> dict[str, Any]:
    tensors, rest = flatten({"engine": setup.engine.state_dict(), "optimizer": setup.optimizer.state_dict()})
    weights = {f"weight {name}": parameter.detach() for name, parameter in setup.parameters.items()}
    return {name: tensor.clone() for name, tensor in (tensors | weights).items()} | {"rest": repr(rest)}


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_rehearsal_leaves_no_trace(name: str, scores: bool, tmp_path: Path) -> None:
    """Before the first step, and between two refreshes of the target; its gradient is due to be refreshed, too."""
    setup = setup_of(tmp_path, SELECTIONS[name])
    for step in range(6):
        before, last = state_of(setup), setup.engine.last
        setup.engine.rehearse(collate(make_samples(5, seed=70 + step), setup.pad_id), scores=scores)
        after = state_of(setup)
        assert before.keys() == after.keys()
        assert before.pop("rest") == after.pop("rest")
        assert all(torch.equal(values, after[key]) for key, values in before.items())
        assert all(parameter.grad is None for parameter in setup.parameters.values())
        assert setup.engine.last is last
        setup.step(make_samples(8, seed=step))


@dataclass
class Picky:
    """Takes up to four samples."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def decide(self, interaction: Any) -> Decision:
        torch.rand(3, generator=self.generator)
        if interaction.num_samples > 4:
            raise ArithmeticError("too many")
        return Decision(torch.full((interaction.num_samples,), 1 / interaction.num_samples))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def test_it_raises_what_a_pass_would_raise_and_takes_its_draws_back(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, {})
    setup.engine.selector = Picky()
    setup.step(make_samples(4))
    before = setup.engine.selector.generator.get_state()
    for count in (3, 5):
        batch = collate(make_samples(count), setup.pad_id)
        if count > 4:
            with pytest.raises(ArithmeticError):
                setup.engine.rehearse(batch)
        else:
            setup.engine.rehearse(batch)
        assert torch.equal(setup.engine.selector.generator.get_state(), before)
