"""Samplers over a room where samples wait: what leaves and when, and what each way to draw is told."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from gradient_selectors import ClusterUcb, StreamOptions
from gradient_selectors.draw.dsir import Dsir
from gradient_selectors.draw.learned import LearnedDraw, LearnedOptions
from gradient_selectors.draw.nearest import NearRandom
from gradient_selectors.features.columns import Columns, ColumnTable
from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.features.ngrams import NgramImportance
from gradient_selectors.features.traits import Traits, describe

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.settings.schema import BufferSettings
from stream_trainer.training.draw.pools import PoolSampler, SequentialSampler, UniformSampler
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler, RivalSampler, WaitingRoom
from tests.helpers.fakes import step_report, varied

FEATURES = EmbeddingFeatures(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).bfloat16())


def never() -> bool:
    return False


def described(samples: Sequence[Sample]) -> list[Traits]:
    return describe(samples, FEATURES)


def waiting_room(buffer: Buffer, capacity: int = 12, intake: int = 4) -> WaitingRoom:
    return WaitingRoom(buffer, described, capacity, intake, wait_s=0.01)


def room_of(buffer: Buffer, capacity: int = 12, intake: int = 4, num_drawn: int = 3) -> BanditSampler:
    bandit = ClusterUcb(StreamOptions(num_clusters=3), 0, torch.ones(8))
    return BanditSampler(waiting_room(buffer, capacity, intake), bandit, num_drawn)


def learned_of(buffer: Buffer) -> LearnedSampler:
    table = ColumnTable(Columns(), described([varied(900)]))
    return LearnedSampler(
        waiting_room(buffer), "learned", LearnedDraw(LearnedOptions(batch_size=2, probe_size=4), table, 0)
    )


def near_random_of(buffer: Buffer) -> RivalSampler:
    draw = NearRandom(torch.ones(8), torch.Generator().manual_seed(0))
    return RivalSampler(waiting_room(buffer), "near_random", draw, 3)


def dsir_of(buffer: Buffer) -> RivalSampler:
    importance = NgramImportance([traits.tokens for traits in described([varied(900)])])
    return RivalSampler(waiting_room(buffer), "dsir", Dsir(importance, torch.Generator().manual_seed(0)), 3)


def buffer_of(offsets: Iterable[int]) -> Buffer:
    buffer = Buffer(BufferSettings())
    for offset in offsets:
        buffer.put(varied(offset))
    return buffer


def step(room: PoolSampler) -> tuple[list[int], list[int]]:
    """Offsets drawn, and offsets that left undrawn."""
    pool = room.next(never)
    utilities = [float(s.offset % 7) for s in pool] if room.scores else None
    undrawn = room.feedback(step_report([1.0 + s.offset % 3 for s in pool], utilities)) if pool else []
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
    buffer.put(varied(7))
    assert step(room)[1] == []
    buffer.end()
    drawn, undrawn = step(room)
    assert (len(drawn), undrawn, room.waiting) == (2, [], 0)
    assert room.next(never) == []


@pytest.mark.parametrize("make", [room_of, learned_of, near_random_of, dsir_of])
def test_what_waits_is_the_same_when_it_is_read_again(make: Callable[[Buffer], PoolSampler]) -> None:
    """A checkpoint after a step holds the draw; the samples come from the stream, those decided left out."""
    room = make(buffer_of(range(120)))
    decided: set[int] = set()
    for _ in range(6):
        decided.update(*step(room))
    resumed = make(buffer_of(offset for offset in range(120) if offset not in decided))
    resumed.load_state_dict(room.state_dict())
    for _ in range(14):
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
    room.feedback(step_report([1.0] * len(pool), [float(i) for i in range(len(pool))]))
    for arm in set(arms):
        mean = room.bandit.moments.means_K[arm]
        assert mean != pytest.approx(0.0) or arms.index(arm) == 0


def test_a_state_of_other_sizes_is_refused() -> None:
    room, other = room_of(buffer_of(range(12))), room_of(buffer_of(range(12)))
    other.bandit = ClusterUcb(StreamOptions(num_clusters=5), 0, torch.ones(8))
    with pytest.raises(ValueError, match="does not fit"):
        room.load_state_dict(other.state_dict())


def test_a_learned_draw_scores_its_probes_and_trains_on_the_rest() -> None:
    sampler = learned_of(buffer_of(range(120)))
    seen = []
    for _ in range(17):
        scores, (drawn, _) = sampler.scores, step(sampler)
        seen.append((scores, len(drawn)))
    assert seen == [*[(False, 2)] * 8, (True, 4), *[(False, 2)] * 7, (True, 4)]


def test_the_state_of_another_sampler_is_dropped() -> None:
    """Each begins afresh where another one was on when the checkpoint was made."""
    samplers: list[Any] = [
        SequentialSampler(buffer_of(range(24)), 3, 0.01),
        UniformSampler(buffer_of(range(24)), 8, 3, 0.01, torch.Generator().manual_seed(0)),
        *(make(buffer_of(range(24))) for make in (room_of, learned_of, near_random_of, dsir_of)),
    ]
    drawn = [step(sampler) for sampler in samplers]
    fresh: list[Any] = [
        SequentialSampler(buffer_of(range(24)), 3, 0.01),
        UniformSampler(buffer_of(range(24)), 8, 3, 0.01, torch.Generator().manual_seed(0)),
        *(make(buffer_of(range(24))) for make in (room_of, learned_of, near_random_of, dsir_of)),
    ]
    for number, sampler in enumerate(fresh):
        for other in samplers[:number] + samplers[number + 1 :]:
            sampler.load_state_dict(other.state_dict())
    assert [step(sampler) for sampler in fresh] == drawn
