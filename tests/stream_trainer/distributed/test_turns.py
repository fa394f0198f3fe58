"""The order of samples does not depend on which rank has read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_trainer.distributed.turns import take_turns


@given(st.integers(1, 5), st.integers(1, 6), st.integers(-1, 6), st.integers(0, 40))
def test_the_order_is_that_of_one_process(size: int, partitions: int, last: int, count: int) -> None:
    def of_rank(rank: int, ranks: int) -> list[int]:
        own = [p for p in range(partitions) if p % ranks == rank]
        begins = [p for p in own if p > last] + [p for p in own if p <= last]
        return begins * 40

    def order(ranks: int) -> list[int]:
        ready = [of_rank(rank, ranks) for rank in range(ranks)]
        queues = [iter(queue) for queue in ready]
        return [next(queues[rank]) for rank in take_turns(ready, [False] * ranks, last, count)]

    assert order(size) == order(1)


@pytest.mark.parametrize(
    ("ready", "may_follow", "expected"),
    [
        ([[0, 0], []], [False, True], []),  # partition 1 comes first, as soon as it is there
        ([[0, 0], []], [False, False], [0, 0]),
        ([[0], [1, 1, 1]], [True, False], [0]),
        ([[], []], [True, True], []),
    ],
)
def test_nobody_is_passed_over_who_may_have_something(
    ready: list[list[int]], may_follow: list[bool], expected: list[int]
) -> None:
    assert take_turns(ready, may_follow, last=0 if ready[0] and not expected else -1, count=4) == expected
