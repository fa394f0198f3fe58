"""Draws by likeness: what is near comes first, copies come last, and an interrupted stream goes on."""

from itertools import combinations

import numpy as np
import pytest
import torch
from gradient_selectors.draw.nearest import Nearest, NearRandom, likeness
from gradient_selectors.features.traits import Traits
from torch import Tensor
from torch.nn import functional as F

SIZE = 6
TARGET = torch.arange(1.0, SIZE + 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def traits_of(embeddings_Md: Tensor) -> list[Traits]:
    return [Traits(np.array([0]), embedding_d) for embedding_d in F.normalize(embeddings_Md, dim=1)]


def random_traits(seed: int, count: int) -> list[Traits]:
    return traits_of(torch.randn(count, SIZE, generator=seeded(seed)))


def cosine(one_d: Tensor, other_d: Tensor) -> float:
    return float(F.cosine_similarity(one_d.double(), other_d.double(), dim=0))


def nearest_first(waiting: list[Traits]) -> list[int]:
    return sorted(range(len(waiting)), key=lambda i: -cosine(waiting[i].embedding_d, TARGET))


def ends(draw: NearRandom, waiting: list[Traits], count: int) -> set[int]:
    """Everything that is ever drawn."""
    return {index for _ in range(200) for index in draw.draw(waiting, count)}


@pytest.mark.parametrize("count", [1, 7, 20, 30])
def test_nearest_takes_the_largest_cosines(count: int) -> None:
    for seed in range(5):
        waiting = random_traits(seed, 20)
        assert Nearest(TARGET).draw(waiting, count) == sorted(nearest_first(waiting)[:count])
        assert Nearest(100 * TARGET).draw(waiting, count) == Nearest(TARGET).draw(waiting, count)


def test_of_equals_the_first_is_nearest() -> None:
    far = torch.randn(40, 57, generator=seeded())
    rows = [3, 8, 17, 22, 31, 38]
    target_d = torch.randn(57, generator=seeded(1))
    far[rows] = target_d + 0.01
    waiting = traits_of(far)
    assert len(set(likeness(torch.stack([waiting[i].embedding_d for i in rows]), target_d).tolist())) == 1
    for count in range(1, 7):
        assert Nearest(target_d).draw(waiting, count) == rows[:count]


def test_nothing_waits() -> None:
    for draw in (Nearest(TARGET), NearRandom(TARGET, seeded())):
        assert draw.draw([], 3) == []
        assert draw.draw(random_traits(0, 4), 0) == []
        draw.learn([])


@pytest.mark.parametrize(("share", "size"), [(0.25, 6), (0.5, 12), (1.0, 24), (0.05, 3)])
def test_near_random_draws_any_of_the_nearest_share(share: float, size: int) -> None:
    """And of as many as it draws, where the share is smaller."""
    waiting = random_traits(0, 24)
    draw = NearRandom(TARGET, seeded(), share, copies=None)
    assert ends(draw, waiting, count=3) == set(nearest_first(waiting)[:size])


def test_near_random_draws_evenly() -> None:
    waiting, counts = random_traits(0, 16), torch.zeros(16)
    draw = NearRandom(TARGET, seeded(), share=0.5, copies=None)
    for _ in range(800):
        counts[draw.draw(waiting, 2)] += 1
    # Binomial(800, 0.25): a mean of 200, a standard deviation of 12.
    found = counts[counts > 0]
    assert len(found) == 8
    assert found.min() > 140
    assert found.max() < 260


def test_draws_are_distinct_ascending_and_as_many_as_asked() -> None:
    for copies in (None, 0.97, -1.0):
        draw = NearRandom(TARGET, seeded(), copies=copies)
        for count, size in ((6, 24), (24, 24), (30, 24), (5, 1), (0, 4)):
            found = draw.draw(random_traits(count, size), count)
            assert found == sorted(set(found))
            assert len(found) == min(count, size)


def test_no_copies_within_a_draw() -> None:
    """Ten samples twelve times over, a little noise on each: four of ten, never two of one."""
    kinds = torch.randn(10, SIZE, generator=seeded(3)).repeat(12, 1)
    waiting = traits_of(kinds + 0.01 * torch.randn(120, SIZE, generator=seeded(4)))
    for seed in range(20):
        found = NearRandom(TARGET, seeded(seed), share=1.0).draw(waiting, 4)
        assert all(cosine(waiting[a].embedding_d, waiting[b].embedding_d) <= 0.97 for a, b in combinations(found, 2))
        assert len({index % 10 for index in found}) == 4
    repeated = [NearRandom(TARGET, seeded(seed), share=1.0, copies=None).draw(waiting, 4) for seed in range(20)]
    assert any(len({index % 10 for index in found}) < 4 for found in repeated)


def test_copies_are_taken_where_too_few_others_are_left() -> None:
    """Both in the share and after all that wait have been drawn before."""
    waiting = traits_of(torch.eye(SIZE)[[5] * 8 + [4] * 8])
    first = NearRandom(TARGET, seeded(), share=1.0).draw(waiting, 4)
    assert {index // 8 for index in first} == {0, 1}
    draw = NearRandom(TARGET, seeded(), share=1.0)
    draw.draw(waiting, 2)
    assert draw.draw(waiting, 3) == [0, 1, 2], "all are copies now: the nearest"


def test_no_copies_of_what_was_drawn_lately() -> None:
    """Each kind once, the nearest first, while there are others; the share is of those that are left."""
    waiting = traits_of(torch.eye(SIZE).repeat(3, 1))
    draw = NearRandom(TARGET, seeded(), share=0.01)
    kinds = [draw.draw(waiting, 1)[0] % SIZE for _ in range(SIZE)]
    assert kinds == [5, 4, 3, 2, 1, 0]
    assert NearRandom(TARGET, seeded(), share=0.01, copies=None).draw(waiting, 1) == [5]


def test_the_share_is_of_those_that_are_no_copies() -> None:
    waiting = traits_of(torch.eye(SIZE)[[5, 5, 5, 5, 5, 5, 4, 3, 2, 1]])
    seen = set()
    for seed in range(40):
        draw = NearRandom(TARGET, seeded(seed), share=0.5)
        draw.draw(waiting[:1], 1)
        seen |= set(draw.draw(waiting, 1))
    assert seen == {6, 7}


def test_what_was_drawn_long_ago_is_forgotten() -> None:
    waiting = traits_of(torch.eye(SIZE))
    draw = NearRandom(TARGET, seeded(), share=0.01, recent=2)
    assert [draw.draw(waiting, 1)[0] for _ in range(6)] == [5, 4, 3, 5, 4, 3]
    assert len(draw.state_dict()["recent_Rd"]) == 2


@pytest.mark.parametrize(("copies", "drawn"), [(0.95, [1]), (0.96, [0])])
def test_copies_are_told_by_the_limit(copies: float, drawn: list[int]) -> None:
    """Two samples with a cosine of 0.955: the nearest was drawn, and the next is like it or not."""
    waiting = traits_of(torch.tensor([[0.3, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    assert 0.95 < cosine(waiting[0].embedding_d, waiting[2].embedding_d) < 0.96
    draw = NearRandom(torch.tensor([0.0, 1.0, 0.1]), seeded(), share=0.01, copies=copies)
    assert draw.draw(waiting, 1) == [2]
    assert draw.draw(waiting, 1) == drawn


@pytest.mark.parametrize("copies", [None, 0.9])
def test_an_interrupted_stream_goes_on_bit_for_bit(copies: float | None) -> None:
    steps = [random_traits(seed, 24) for seed in range(12)]
    whole, first = (NearRandom(TARGET, seeded(), copies=copies, recent=9) for _ in range(2))
    expected = [whole.draw(waiting, 4) for waiting in steps]
    for waiting in steps[:5]:
        first.draw(waiting, 4)
    saved = first.state_dict()
    for waiting in steps[5:8]:
        first.draw(waiting, 4)  # what was saved is a copy
    resumed = NearRandom(TARGET, seeded(99), copies=copies, recent=9)
    resumed.load_state_dict(saved)
    assert [resumed.draw(waiting, 4) for waiting in steps[5:]] == expected[5:]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_what_was_drawn_lately_is_in_the_state() -> None:
    """With another memory, the next draw is another one."""
    waiting = traits_of(torch.eye(SIZE))
    draw, fresh = (NearRandom(TARGET, seeded(), share=0.01) for _ in range(2))
    draw.draw(waiting, 1)
    fresh.load_state_dict(draw.state_dict())
    assert fresh.draw(waiting, 1) == [4]


def test_state_of_another_model_is_refused() -> None:
    draw = NearRandom(TARGET, seeded())
    before = draw.state_dict()
    with pytest.raises(ValueError, match="embeddings have 6 dimensions, the state's 3"):
        draw.load_state_dict(NearRandom(torch.ones(3), seeded(5)).state_dict())
    assert all(torch.equal(before[name], value) for name, value in draw.state_dict().items())


def test_wrong_settings_are_refused() -> None:
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share is"):
            NearRandom(TARGET, seeded(), share=share)
    with pytest.raises(ValueError, match="recent is 0"):
        NearRandom(TARGET, seeded(), recent=0)
