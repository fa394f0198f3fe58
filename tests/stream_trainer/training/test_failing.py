"""Pauses between tries."""

import random

from stream_trainer.training.failing import LONGEST_PAUSE_S, Failing, failed_again


def test_pauses_double_up_to_a_bound_and_vary() -> None:
    generator, failing, now, pauses = random.Random(0), None, 100.0, list[float]()
    for number in range(12):
        failing = failed_again(failing, OSError(f"no {number}"), now, generator)
        assert failing.since == 100.0
        assert failing.error == f"no {number}"
        pauses.append(failing.retry_at - now)
        assert 0.5 * failing.pause_s <= pauses[-1] <= failing.pause_s
        now = failing.retry_at
    assert isinstance(failing, Failing)
    assert failing.pause_s == LONGEST_PAUSE_S
    assert pauses[0] <= 1.0
    assert len(set(pauses[-4:])) == 4
