"""Where pools come from: in order, at random, or by the rank of their loss."""

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.settings.schema import BufferSettings
from stream_trainer.training.draw.pools import LossSampler, PoolSampler, SequentialSampler, UniformSampler
from tests.helpers.fakes import sample, step_report


def never() -> bool:
    return False


def buffer_of(offsets: Iterable[int]) -> Buffer:
    buffer = Buffer(BufferSettings())
    for offset in offsets:
        buffer.put(sample(offset))
    return buffer


def step(sampler: PoolSampler) -> tuple[list[int], list[int]]:
    """Offsets drawn, and offsets that left undrawn."""
    pool = sampler.next(never)
    undrawn = sampler.feedback(step_report([1.0] * len(pool))) if pool else []
    return [s.offset for s in pool], [s.offset for s in undrawn]


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
    assert (sampler.waiting, sampler.feedback(step_report([])), sampler.state_dict()) == (0, [], {})
    sampler.buffer.end()
    assert [s.offset for s in sampler.next(never)] == [3, 4]


def by_hand(samples: Sequence[Sample]) -> Tensor:
    """Losses that fall with every other offset; one is not a number."""
    return torch.tensor([torch.nan if s.offset == 1 else float(s.offset * 7 % 8) for s in samples])


@pytest.mark.parametrize(("rank", "expected"), [("lowest", [0, 6, 7]), ("middle", [4, 5, 6])])
def test_samples_are_drawn_by_the_rank_of_their_loss(rank: str, expected: list[int]) -> None:
    """Losses are 0, nan, 6, 5, 4, 3, 2, 1: in order 0, 7, 6, 5, 4, 3, 2, 1."""
    kind = LossSampler(buffer_of(range(8)), 8, 3, 0.01, rank, by_hand)  # type: ignore[arg-type]
    drawn, undrawn = step(kind)
    assert drawn == expected
    assert sorted(drawn + undrawn) == list(range(8))
    kind.buffer.end()
    assert step(kind) == ([], [])
