"""Where ranks decide otherwise, the first one's decision holds on all, whatever it is made of."""

from dataclasses import replace

import pytest
import torch
from gradient_selectors.weigh.agreed import agreed
from gradient_selectors.weigh.selector import Decision, SolverReport
from gradient_selectors.world.base import Alone

from tests.gradient_selectors.world.threads import ThreadWorld, on_ranks

COEFFICIENTS_N = torch.tensor([0.1, 0.0, 0.9])
WHOLE = Decision(
    COEFFICIENTS_N,
    2,
    0.25,
    SolverReport("optimal", 1.0),
    torch.tensor([[0.1, 0.0, 0.9], [0.0, 0.0, 1.0]]),
    torch.tensor([0.5, 0.7], dtype=torch.float64),
)


@pytest.mark.parametrize("decision", [Decision(COEFFICIENTS_N), Decision(COEFFICIENTS_N.double()), WHOLE])
def test_the_first_ranks_decision_holds(decision: Decision, caplog: pytest.LogCaptureFixture) -> None:
    def decide(world: ThreadWorld) -> Decision:
        other = replace(decision, coefficients_N=decision.coefficients_N + world.rank * 1e-7)
        return agreed(world, other)

    first, second = on_ranks(2, decide)
    assert "rank 1 decided otherwise than rank 0" in caplog.text
    for found in (first, second):
        assert torch.equal(found.coefficients_N, decision.coefficients_N)
        assert found.coefficients_N.dtype == decision.coefficients_N.dtype
        assert (found.num_positive, found.redundancy, found.solver) == (
            decision.num_positive,
            decision.redundancy,
            decision.solver,
        )
        for ours, wanted in (
            (found.coefficients_LN, decision.coefficients_LN),
            (found.route_entropy_L, decision.route_entropy_L),
        ):
            assert ours is wanted is None or (ours is not None and wanted is not None and torch.equal(ours, wanted))


def test_one_mind_needs_no_word(caplog: pytest.LogCaptureFixture) -> None:
    slow = replace(WHOLE, solver=SolverReport("optimal", 9.0))  # how long it took is no part of it
    first, second = on_ranks(2, lambda world: agreed(world, slow if world.rank else WHOLE))
    assert first is WHOLE
    assert second is slow
    assert agreed(Alone(), WHOLE) is WHOLE
    assert caplog.text == ""
