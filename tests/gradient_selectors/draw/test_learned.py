"""The learned draw in streams whose useful samples are known."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_selectors.draw.learned import LearnedDraw, LearnedOptions
from gradient_selectors.draw.stream_draw import Found
from gradient_selectors.features.columns import Columns, ColumnTable
from gradient_selectors.features.hashing import shingles
from gradient_selectors.features.relevance import exchanges_of
from gradient_selectors.features.traits import Traits
from torch import Tensor

OPTIONS = LearnedOptions(batch_size=4, probe_size=8)


def samples(rng: np.random.Generator, kinds: Sequence[int], sources: Sequence[str]) -> list[Traits]:
    """Kinds differ in their tokens and embeddings."""
    drawn = [
        (rng.integers(50 * kind, 50 * kind + 50, 40), np.eye(4)[kind] + 0.3 * rng.normal(size=4)) for kind in kinds
    ]
    directions_Me = torch.from_numpy(np.stack([direction for _, direction in drawn])).float()
    embeddings_Me = torch.nn.functional.normalize(directions_Me, dim=1)
    hashes = shingles([tokens for tokens, _ in drawn])
    return [
        Traits(tokens, embedding_e, (("source", source),), shingles=own)
        for (tokens, _), embedding_e, source, own in zip(drawn, embeddings_Me, sources, hashes, strict=True)
    ]


def sample(rng: np.random.Generator, kind: int = 0, source: str = "a") -> Traits:
    return samples(rng, [kind], [source])[0]


def room(rng: np.random.Generator, count: int = 64) -> list[Traits]:
    """A quarter of each kind, each source alike."""
    return samples(rng, [i % 4 for i in range(count)], ["abcd"[(i // 4) % 4] for i in range(count)])


def draw_of(options: LearnedOptions = OPTIONS, seed: int = 0) -> LearnedDraw:
    target = [sample(np.random.default_rng(99), kind=0) for _ in range(4)]
    return LearnedDraw(options, ColumnTable(Columns(), target), seed)


def found(losses_n: Tensor, utilities_n: Tensor | None, trained: Sequence[int]) -> Found:
    coefficients_n = torch.zeros(len(losses_n))
    coefficients_n[[i for i in trained if i < len(losses_n)]] = 1.0
    return Found(losses_n, coefficients_n, utilities_n)


def kind_of(traits: Traits) -> int:
    return int(traits.tokens[0]) // 50


def source_of(traits: Traits) -> str:
    return traits.fields[0][1]


def steps(draw: LearnedDraw, count: int, rng: np.random.Generator, useful: int = 0, bad: str = "") -> list[Traits]:
    """Each step from a fresh room; samples of one kind are useful, the loss of one source's is higher."""
    drawn: list[Traits] = []
    for _ in range(count):
        waiting, probes = room(rng), draw.probes
        now = [waiting[i] for i in draw.draw(waiting, draw.count)]
        noise = torch.from_numpy(rng.normal(size=(2, len(now))))
        utilities_n = torch.tensor([1.0 if kind_of(t) == useful else 0.0 for t in now]) + 0.3 * noise[0]
        losses_n = torch.tensor([3.0 if source_of(t) == bad else 2.0 for t in now]) + 0.5 * noise[1]
        draw.observe(found(losses_n, utilities_n if probes else None, range(4)))
        draw.learn(waiting)
        drawn += [] if probes else now
    return drawn


def test_it_begins_with_what_is_like_the_target() -> None:
    draw, waiting = draw_of(), room(np.random.default_rng(0))
    kinds = [kind_of(waiting[i]) for _ in range(10) for i in draw.draw(waiting, 4)]
    assert kinds.count(0) > 36


def test_answers_to_other_prompts_are_seldom_drawn() -> None:
    """Three of ten tokens of an answer are its prompt's; every other sample has the answer of the one before."""
    rng = np.random.default_rng(0)
    prompts, others = rng.integers(0, 10**5, (2, 72, 10))
    answers = np.concatenate([prompts[:, :3], others[:, 3:]], axis=1)
    answers[1:64:2] = answers[:64:2]
    exchanges = exchanges_of(list(np.concatenate([prompts, answers], axis=1)), [np.arange(20) >= 10] * 72)
    whole = [replace(sample(rng), exchange=exchange) for exchange in exchanges]
    draw = LearnedDraw(OPTIONS, ColumnTable(Columns(), whole[64:]), seed=0)
    drawn = [i for _ in range(25) for i in draw.draw(whole[:64], 4)]
    assert sum(i % 2 for i in drawn) < len(drawn) // 5


def test_samples_of_which_little_carries_loss_are_seldom_drawn() -> None:
    """Half the room: 10 of its 40 tokens. So has half the target."""

    def cut(of: list[Traits]) -> list[Traits]:
        return [replace(one, counted=np.arange(40) >= 30 * (i // 4 % 2)) for i, one in enumerate(of)]

    rng = np.random.default_rng(6)
    target = cut([sample(rng) for _ in range(8)])
    drawn: list[Traits] = []
    for seed in range(30):
        waiting = cut(room(rng))
        draw = LearnedDraw(OPTIONS, ColumnTable(Columns(), target), seed)
        drawn += [waiting[i] for i in draw.draw(waiting, 4)]
    assert sum(kind_of(one) == 0 for one in drawn) > 110
    assert sum(len(one.answer) == 40 for one in drawn) > 90


def test_gradients_teach_it_another_kind() -> None:
    """Likeness misleads: samples of kind 2 are those that help."""
    drawn = steps(draw_of(), 120, np.random.default_rng(1), useful=2)
    late = [kind_of(traits) for traits in drawn[-100:]]
    assert late.count(2) > 60


def test_rewards_of_one_kind_alone_say_nothing_of_the_others() -> None:
    """They are relative to their own mean: that the prior promised more is no reason to leave the target's kind."""
    draw, rng = draw_of(), np.random.default_rng(8)
    for _ in range(200):
        waiting, probes = room(rng), draw.probes
        now = [waiting[i] for i in draw.draw(waiting, draw.count)]
        ours_n = torch.tensor([kind_of(traits) == 0 for traits in now])
        utilities_n = torch.where(ours_n, torch.from_numpy(rng.normal(size=len(now))), math.nan)
        draw.observe(found(torch.full((len(now),), 2.0), utilities_n if probes else None, range(4)))
    drawn = [kind_of(waiting[i]) for _ in range(20) for waiting in [room(rng)] for i in draw.draw(waiting, 4)]
    assert drawn.count(0) > 76


def test_the_loss_tells_it_which_source_is_bad() -> None:
    draw = draw_of()
    late = [source_of(traits) for traits in steps(draw, 120, np.random.default_rng(2), bad="c")[-100:]]
    assert late.count("c") < 10
    coefficients = dict(zip(draw.table.names, draw.coefficients_d.tolist(), strict=True))
    assert coefficients["source=c"] < min(coefficients[f"source={name}"] for name in "abd") - 0.3


def test_without_the_weight_of_the_loss_sources_are_alike() -> None:
    counts = []
    for seed in range(4):
        draw = draw_of(replace(OPTIONS, loss_weight=0.0), seed)
        counts.append([source_of(t) for t in steps(draw, 60, np.random.default_rng(seed), bad="c")].count("c"))
    assert sum(counts) > 100  # of about 800; a quarter of what waits


def test_a_low_loss_of_a_subject_is_no_merit() -> None:
    """Kinds whose loss is low are not drawn for it: it may be because they are easy, or known already."""
    draw, rng = draw_of(), np.random.default_rng(3)
    for _ in range(60):
        waiting, probes = room(rng), draw.probes
        now = [waiting[i] for i in draw.draw(waiting, draw.count)]
        losses_n = torch.tensor([3.0 if kind_of(t) == 0 else 0.5 for t in now])
        utilities_n = torch.tensor([1.0 if kind_of(t) == 0 else 0.0 for t in now])
        draw.observe(found(losses_n, utilities_n if probes else None, [0]))
        draw.learn(waiting)
    kinds = [kind_of(waiting[i]) for _ in range(10) for i in draw.draw(waiting, 4)]
    assert kinds.count(0) > 30


@pytest.mark.parametrize("first", [0, *(pytest.param(later, marks=pytest.mark.slow) for later in (3, 8))])
def test_probes_come_ever_later_while_they_find_no_news(first: int) -> None:
    draw, rng = draw_of(replace(OPTIONS, first_probe=first)), np.random.default_rng(4)
    probed = []
    for step in range(160):
        probed += [step] if draw.probes else []
        steps(draw, 1, rng)
    assert probed[:2] == [first, first + OPTIONS.probe_every]
    gaps = np.diff(probed)
    assert max(gaps) > OPTIONS.probe_every
    assert max(gaps) <= OPTIONS.max_probe_every


def test_no_two_slots_are_filled_with_copies_while_there_is_something_else() -> None:
    rng = np.random.default_rng(5)
    one = sample(rng, kind=0)
    waiting = [one, one, one, one, *(sample(rng, kind=1) for _ in range(8))]
    for seed in range(10):
        drawn = draw_of(seed=seed).draw(waiting, 4)
        assert sum(i < 4 for i in drawn) <= 1
    assert draw_of().draw([one, one, one], 2) in ([0, 1], [0, 2], [1, 2])


def test_fewer_may_wait_than_are_asked_for_and_none() -> None:
    draw, rng = draw_of(), np.random.default_rng(6)
    assert draw.draw([], 4) == []
    assert draw.draw([sample(rng), sample(rng)], 8) == [0, 1]


def test_what_is_not_finite_teaches_nothing() -> None:
    draw, waiting = draw_of(), room(np.random.default_rng(7))
    before = draw.utility.mean_d
    drawn = draw.draw(waiting, 8)
    draw.observe(found(torch.full((8,), torch.nan), torch.full((8,), torch.inf), []))
    assert len(drawn) == 8
    assert torch.equal(draw.utility.mean_d, before)
    assert bool(draw.coefficients_d.isfinite().all())


@pytest.mark.parametrize("after", [1, 5, 30])
def test_it_goes_on_as_it_would_have(after: int) -> None:
    whole = draw_of()
    steps(whole, after, np.random.default_rng(8))
    resumed = draw_of(seed=5)
    resumed.load_state_dict(whole.state_dict())

    def course(draw: LearnedDraw) -> list[list[int]]:
        rng = np.random.default_rng(9)
        return [traits.tokens.tolist() for traits in steps(draw, 20, rng)]

    assert course(resumed) == course(whole)
    found: list[Tensor] = [draw.coefficients_d for draw in (resumed, whole)]
    assert torch.equal(*found)
