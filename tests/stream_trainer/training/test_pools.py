"""Where pools come from: in order, at random, or from a room where samples wait, a bandit drawing among them."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from gradient_selectors import ClusterUcb, StreamOptions
from gradient_selectors.draw.features import EmbeddingFeatures

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.settings.schema import BufferSettings
from stream_trainer.training.pools import BanditSampler, PoolSampler, SequentialSampler, UniformSampler
from tests.helpers.fakes import sample


def never() -> bool:
    return False


def room_of(buffer: Buffer, capacity: int = 12, intake: int = 4, num_drawn: int = 3) -> BanditSampler:
    features = EmbeddingFeatures(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).bfloat16())
    bandit = ClusterUcb(StreamOptions(num_clusters=3), 0, torch.ones(8))
    return BanditSampler(buffer, bandit, features, num_drawn, capacity, intake, wait_s=0.01)


def buffer_of(offsets: Iterable[int]) -> Buffer:
    buffer = Buffer(BufferSettings())
    for offset in offsets:
        buffer.put(sample(offset))
    return buffer


def step(room: PoolSampler) -> tuple[list[int], list[int]]:
    """Offsets drawn, and offsets that left undrawn."""
    pool = room.next(never)
    undrawn = room.feedback([1.0] * len(pool)) if pool else []
    return [s.offset for s in pool], [s.offset for s in undrawn]


def test_the_oldest_leave_undrawn_as_new_ones_come_in() -> None:
    room = room_of(buffer_of(range(24)))
    seen: set[int] = set()
    for count in range(4):
        drawn, undrawn = step(room)
        assert (len(drawn), len(undrawn), room.waiting) == (3, 1, 8)
        assert seen.isdisjoint(drawn + undrawn)
        seen.update(drawn + undrawn)
        assert max(undrawn) < 12 + 4 * count
    assert len(seen) == 16


def test_samples_leave_drawn_only_while_the_stream_is_slow() -> None:
    buffer = buffer_of(range(7))
    room = room_of(buffer)
    assert step(room)[1] == []
    assert room.waiting == 4
    buffer.put(sample(7))
    assert step(room)[1] == []
    buffer.end()
    drawn, undrawn = step(room)
    assert (len(drawn), undrawn, room.waiting) == (2, [], 0)
    assert room.next(never) == []


def test_what_waits_is_the_same_when_it_is_read_again() -> None:
    """A checkpoint after a step holds the bandit; the samples come from the stream, those decided left out."""
    room = room_of(buffer_of(range(40)))
    decided: set[int] = set()
    for _ in range(3):
        decided.update(*step(room))
    resumed = room_of(buffer_of(offset for offset in range(40) if offset not in decided))
    resumed.load_state_dict(room.state_dict())
    for _ in range(4):
        assert step(resumed) == step(room)


def test_all_of_a_full_room_may_leave_at_once() -> None:
    room = room_of(buffer_of(range(8)), capacity=4, intake=4)
    drawn, undrawn = step(room)
    assert sorted(drawn + undrawn) == [0, 1, 2, 3]
    assert room.waiting == 0


def test_a_stop_draws_nothing_and_keeps_what_waits() -> None:
    room = room_of(buffer_of(range(12)))
    step(room)
    assert room.next(lambda: True) == []
    assert room.waiting == 8


def test_rewards_are_those_of_the_samples_that_were_drawn() -> None:
    room = room_of(buffer_of(range(12)))
    pool = room.next(never)
    arms = room.last_arms
    room.feedback([float(i) for i in range(len(pool))])
    for arm in set(arms):
        mean = room.bandit.moments.means_K[arm]
        assert mean != pytest.approx(0.0) or arms.index(arm) == 0


def test_a_state_of_other_sizes_is_refused() -> None:
    room, other = room_of(buffer_of(range(12))), room_of(buffer_of(range(12)))
    other.bandit = ClusterUcb(StreamOptions(num_clusters=5), 0, torch.ones(8))
    with pytest.raises(ValueError, match="does not fit"):
        room.load_state_dict(other.state_dict())


def uniform_of(buffer: Buffer, pool_size: int = 8, num_drawn: int = 3, seed: int = 0) -> UniformSampler:
    return UniformSampler(buffer, pool_size, num_drawn, 0.01, torch.Generator().manual_seed(seed))


def test_a_uniform_draw_takes_so_many_of_each_pool_and_the_others_leave() -> None:
    sampler = uniform_of(buffer_of(range(20)))
    for first in (0, 8):
        drawn, undrawn = step(sampler)
        assert len(drawn) == 3
        assert drawn == sorted(drawn)
        assert sorted(drawn + undrawn) == list(range(first, first + 8))
        assert sampler.waiting == 0
    sampler.buffer.end()
    drawn, undrawn = step(sampler)
    assert (len(drawn), sorted(drawn + undrawn)) == (3, [16, 17, 18, 19])
    assert step(sampler) == ([], [])


def test_every_sample_has_the_same_chance_in_a_uniform_draw() -> None:
    """3 of 8, 400 times: 150 expected of each place, with a standard deviation under 10."""
    counts = torch.zeros(8)
    sampler = uniform_of(buffer_of([]))
    for _ in range(400):
        for offset in range(8):
            sampler.buffer.put(sample(offset))
        counts[step(sampler)[0]] += 1
    assert (counts - 150).abs().max() < 50


def test_a_uniform_draw_goes_on_as_it_would_have() -> None:
    whole = uniform_of(buffer_of(range(80)))
    first = [step(whole) for _ in range(4)]
    resumed = uniform_of(buffer_of(range(32, 80)), seed=7)
    resumed.load_state_dict(whole.state_dict())
    assert [step(resumed) for _ in range(6)] == [step(whole) for _ in range(6)]
    assert len({tuple(offset % 8 for offset in drawn) for drawn, _ in first}) > 1


def test_in_order_every_sample_is_a_candidate_and_nothing_is_held_back() -> None:
    sampler = SequentialSampler(buffer_of(range(5)), 3, 0.01)
    assert [s.offset for s in sampler.next(never)] == [0, 1, 2]
    assert (sampler.waiting, sampler.feedback(None), sampler.state_dict()) == (0, [], {})
    sampler.buffer.end()
    assert [s.offset for s in sampler.next(never)] == [3, 4]


def test_the_state_of_another_sampler_is_dropped() -> None:
    """Each begins afresh where another one was on when the checkpoint was made."""
    samplers: list[Any] = [
        SequentialSampler(buffer_of(range(24)), 3, 0.01),
        uniform_of(buffer_of(range(24))),
        room_of(buffer_of(range(24))),
    ]
    drawn = [step(sampler) for sampler in samplers]
    fresh: list[Any] = [
        SequentialSampler(buffer_of(range(24)), 3, 0.01),
        uniform_of(buffer_of(range(24))),
        room_of(buffer_of(range(24))),
    ]
    for number, sampler in enumerate(fresh):
        for other in samplers[:number] + samplers[number + 1 :]:
            sampler.load_state_dict(other.state_dict())
    assert [step(sampler) for sampler in fresh] == drawn
