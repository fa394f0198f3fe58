"""The room where samples wait to be drawn: who is drawn, who leaves, and what a restart finds."""

from collections.abc import Iterable

import pytest
import torch
from gradient_selectors.draw.cluster_ucb import ClusterUcb, StreamOptions

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.settings.schema import BufferSettings
from stream_trainer.training.features import EmbeddingFeatures
from stream_trainer.training.pools import ByClusters
from tests.helpers.fakes import sample


def never() -> bool:
    return False


def room_of(buffer: Buffer, capacity: int = 12, intake: int = 4, pool_size: int = 3) -> ByClusters:
    features = EmbeddingFeatures(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).bfloat16())
    bandit = ClusterUcb(StreamOptions(num_clusters=3), 0, torch.ones(8))
    return ByClusters(buffer, bandit, features, pool_size, capacity, intake, wait_s=0.01)


def buffer_of(offsets: Iterable[int]) -> Buffer:
    buffer = Buffer(BufferSettings())
    for offset in offsets:
        buffer.put(sample(offset))
    return buffer


def step(room: ByClusters) -> tuple[list[int], list[int]]:
    """Offsets drawn, and offsets that left undrawn."""
    pool = room.pool(never)
    undrawn = room.settle([1.0] * len(pool)) if pool else []
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


def test_nobody_leaves_undrawn_while_the_stream_is_slow() -> None:
    buffer = buffer_of(range(7))
    room = room_of(buffer)
    assert step(room)[1] == []
    assert room.waiting == 4
    buffer.put(sample(7))
    assert step(room)[1] == []
    buffer.end()
    drawn, undrawn = step(room)
    assert (len(drawn), undrawn, room.waiting) == (2, [], 0)
    assert room.pool(never) == []


def test_what_waits_is_the_same_when_it_is_read_again() -> None:
    """A checkpoint after a step holds the bandit; the samples come from the stream, those decided left out."""
    room = room_of(buffer_of(range(40)))
    decided: set[int] = set()
    for _ in range(3):
        decided.update(*step(room))
    resumed = room_of(buffer_of(offset for offset in range(40) if offset not in decided))
    resumed.load_state(room.state())
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
    assert room.pool(lambda: True) == []
    assert room.waiting == 8


def test_rewards_are_those_of_the_samples_that_were_drawn() -> None:
    room = room_of(buffer_of(range(12)))
    pool = room.pool(never)
    arms = room.last_arms
    room.settle([float(i) for i in range(len(pool))])
    for arm in set(arms):
        mean = room.bandit.moments.means_K[arm]
        assert mean != pytest.approx(0.0) or arms.index(arm) == 0


def test_a_state_of_other_sizes_is_refused() -> None:
    room, other = room_of(buffer_of(range(12))), room_of(buffer_of(range(12)))
    other.bandit = ClusterUcb(StreamOptions(num_clusters=5), 0, torch.ones(8))
    with pytest.raises(ValueError, match="does not fit"):
        room.load_state(other.state())
