"""The buffer: order, limits, and when a take returns what."""

import threading
import time
from collections.abc import Callable

import pytest

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.settings.schema import BufferSettings
from tests.helpers.fakes import sample

LONG_S = 60.0  # longer than any of these tests may take


def never() -> bool:
    return False


def buffer_of(offsets: range, **limits: int) -> Buffer:
    buffer = Buffer(BufferSettings(**limits))
    for offset in offsets:
        buffer.put(sample(offset))
    return buffer


def offsets_taken(buffer: Buffer, n: int, wait_s: float = LONG_S, stopped: Callable[[], bool] = never) -> list[int]:
    return [taken.offset for taken in buffer.take(n, wait_s, stopped)]


def in_background(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_samples_come_out_in_order_and_sizes_follow() -> None:
    buffer = Buffer(BufferSettings())
    for offset in range(5):
        buffer.put(sample(offset, size=10, num_tokens=3))
    assert (buffer.records, buffer.bytes, buffer.tokens) == (5, 50, 15)
    assert offsets_taken(buffer, 2) == [0, 1]
    assert (buffer.records, buffer.bytes, buffer.tokens) == (3, 30, 9)
    assert offsets_taken(buffer, 3) == [2, 3, 4]
    assert (buffer.records, buffer.bytes, buffer.tokens) == (0, 0, 0)


@pytest.mark.parametrize("limits", [{"max_records": 4}, {"max_bytes": 40}, {"max_tokens": 12}])
def test_each_limit_makes_it_full_and_half_of_it_makes_it_low(limits: dict[str, int]) -> None:
    buffer = Buffer(BufferSettings(**limits))
    states = []
    for offset in range(4):
        buffer.put(sample(offset, size=10, num_tokens=3))
        states.append((buffer.full, buffer.low))
    assert states == [(False, True), (False, False), (False, False), (True, False)]
    buffer.take(2, LONG_S, never)
    assert (buffer.full, buffer.low) == (False, False)
    buffer.take(1, LONG_S, never)
    assert (buffer.full, buffer.low) == (False, True)


def test_put_beyond_the_limit_drops_nothing_and_changes_no_step() -> None:
    """How many samples came beyond the limit depends on the fetches: a step must not."""
    buffer = buffer_of(range(10), max_records=4)
    assert [offsets_taken(buffer, n) for n in (10, 3)] == [[0, 1, 2, 3], [4, 5, 6]]
    buffer.end()
    assert offsets_taken(buffer, 10) == [7, 8, 9]


def test_an_end_by_an_error_comes_after_what_was_put_before() -> None:
    buffer = buffer_of(range(3))
    buffer.end(ValueError("cut"))
    assert offsets_taken(buffer, 2) == [0, 1]
    assert [sample.offset for sample in buffer.take(2, LONG_S, never, or_none=True)] == [2]
    assert buffer.take(2, LONG_S, never, or_none=True) == []
    with pytest.raises(ValueError, match="cut"):
        buffer.take(2, LONG_S, never)


def test_a_take_waits_for_all_it_wants() -> None:
    buffer = buffer_of(range(1))

    def put() -> None:
        buffer.put(sample(1))
        buffer.put(sample(2))

    thread = in_background(put)
    assert offsets_taken(buffer, 3) == [0, 1, 2]
    thread.join()


def test_a_take_makes_do_with_fewer_after_the_wait() -> None:
    assert offsets_taken(buffer_of(range(2)), 3, wait_s=0.01) == [0, 1]
    assert offsets_taken(buffer_of(range(2)), 3, wait_s=0) == [0, 1]


def test_the_wait_begins_with_the_first_sample() -> None:
    buffer = Buffer(BufferSettings())
    wait_s = 0.3
    put_at = []

    def put() -> None:
        time.sleep(2 * wait_s)
        put_at.append(time.monotonic())
        buffer.put(sample(0))

    thread = in_background(put)
    assert offsets_taken(buffer, 2, wait_s) == [0]
    assert time.monotonic() - put_at[0] >= wait_s
    thread.join()


def test_a_take_does_not_wait_for_more_than_fits() -> None:
    assert offsets_taken(buffer_of(range(3), max_records=3), 5) == [0, 1, 2]


def test_a_waiting_take_asks_for_more_even_above_half() -> None:
    buffer = buffer_of(range(3), max_records=4)
    assert not buffer.low
    thread = in_background(lambda: buffer.put(sample(9)) if wait_until(lambda: buffer.low) else None)
    assert offsets_taken(buffer, 4) == [0, 1, 2, 9]
    thread.join()
    assert buffer.low


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LONG_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_end_of_stream_releases_what_is_left_then_nothing() -> None:
    buffer = buffer_of(range(2))
    ended_before = buffer.ended
    thread = in_background(buffer.end)
    assert offsets_taken(buffer, 3) == [0, 1]
    assert offsets_taken(buffer, 3) == []
    thread.join()
    assert (ended_before, buffer.ended) == (False, True)
    with pytest.raises(AssertionError):
        buffer.put(sample(2))


def test_a_stop_interrupts_a_take_and_takes_nothing() -> None:
    buffer = buffer_of(range(1))
    stop = threading.Event()
    thread = in_background(stop.set)
    assert offsets_taken(buffer, 2, stopped=stop.is_set) == []
    thread.join()
    assert buffer.records == 1


def test_a_failure_is_raised_to_the_taker_now_and_later() -> None:
    buffer = buffer_of(range(3))
    thread = in_background(lambda: buffer.fail(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        buffer.take(4, LONG_S, never)
    thread.join()
    with pytest.raises(RuntimeError, match="broken"):
        buffer.take(1, LONG_S, never)


def test_as_many_are_taken_as_were_planned_however_late_they_come() -> None:
    buffer = Buffer(BufferSettings(max_records=4))
    buffer.plan(6)
    taken: list[list[Sample]] = []
    thread = threading.Thread(target=lambda: taken.append(buffer.take(3, 0.0, lambda: False)))
    thread.start()
    samples = [sample(number) for number in range(8)]
    for one in samples:
        buffer.put(one)
    thread.join()
    assert taken == [samples[:6]]
    assert buffer.taken == 6
    assert buffer.last_taken == samples[5]
    buffer.plan(0)
    assert buffer.take(3, 60.0, lambda: False) == []
    buffer.plan(None)
    assert buffer.take(3, 0.0, lambda: False) == samples[6:]


def test_a_taker_that_is_stopped_leaves_what_was_planned() -> None:
    buffer = Buffer(BufferSettings())
    samples = [sample(number) for number in range(3)]
    buffer.put(*samples)
    buffer.plan(5)
    looks = iter((False, False, True))
    assert buffer.take(5, 0.0, lambda: next(looks)) == []
    assert (buffer.records, buffer.taken) == (3, 0)
    buffer.end()
    assert buffer.take(5, 0.0, lambda: False) == samples
