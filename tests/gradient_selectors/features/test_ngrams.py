"""Hashed n-grams: against counting in dictionaries, and the same wherever a run is interrupted."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from gradient_selectors.draw.dsir import Dsir
from gradient_selectors.features.hashing import Tokens
from gradient_selectors.features.ngrams import NgramImportance, ngram_buckets
from gradient_selectors.features.traits import Traits

WORD = 2**64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples_of(seed: int, count: int, vocabulary: int = 60, first: int = 0, longest: int = 30) -> list[Tokens]:
    """Samples of 0 to `longest` tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(first, first + vocabulary, size=random.integers(longest + 1)) for _ in range(count)]


def traits_of(samples: list[Tokens]) -> list[Traits]:
    return [Traits(tokens, torch.ones(1)) for tokens in samples]


def mixed(value: int) -> int:
    """SplitMix64 in Python's integers."""
    value = (value + 0x9E3779B97F4A7C15) % WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def bag(tokens: list[int], buckets: int) -> Counter[int]:
    unigrams = [mixed(token) % buckets for token in tokens]
    return Counter(unigrams + [mixed((mixed(a) + b) % WORD) % buckets for a, b in pairwise(tokens)])


def dense_scores(target: list[Tokens], stream: list[Tokens], scored: list[Tokens], buckets: int) -> list[float]:
    """The formulas of the docstring, one n-gram at a time."""
    bags = [sum((bag(tokens.tolist(), buckets) for tokens in samples), Counter[int]()) for samples in (target, stream)]
    of_target, of_stream = bags
    scores = []
    for tokens in scored:
        total, own = 0.0, bag(tokens.tolist(), buckets)
        for bucket, times in own.items():
            q = (of_stream[bucket] + 1) / (of_stream.total() + buckets)
            p = (of_target[bucket] + buckets * q) / (of_target.total() + buckets)
            total += times * math.log(p / q)
        scores.append(total / max(own.total(), 1))
    return scores


def test_the_hash_is_splitmix64() -> None:
    """The generator's first number for seed 0, as published with it."""
    assert mixed(0) == 0xE220A8397B1DCDAF
    buckets = 2**62
    assert ngram_buckets(np.array([0]), buckets).tolist() == [0xE220A8397B1DCDAF % buckets]


@pytest.mark.parametrize("buckets", [1, 7, 1000])
def test_buckets_are_those_of_unigrams_and_bigrams_in_order(buckets: int) -> None:
    for sample in samples_of(1, 20):
        tokens = sample.tolist()
        found = ngram_buckets(sample, buckets)
        assert found.dtype == np.int64
        assert len(found) == max(0, 2 * len(tokens) - 1)
        assert found[: len(tokens)].tolist() == [mixed(token) % buckets for token in tokens]
        assert Counter(found.tolist()) == bag(tokens, buckets)


def test_order_matters_and_buckets_fill_evenly() -> None:
    there, back = ngram_buckets(np.array([3, 4]), 10**6), ngram_buckets(np.array([4, 3]), 10**6)
    assert there[2] != back[2]
    assert len({*there.tolist(), *back.tolist()}) == 4
    counts = np.bincount(ngram_buckets(np.arange(50_000), 100), minlength=100)
    # Binomial(99999, 0.01): a mean of 1000, a standard deviation of 31.
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("buckets", [5, 500, 10_000])
def test_scores_are_those_of_counting_in_dictionaries(buckets: int) -> None:
    target, waiting, gone = samples_of(0, 8), samples_of(1, 25, first=30), samples_of(2, 40)
    importance = NgramImportance(target, buckets)
    expected = dense_scores(target, waiting, waiting, buckets)
    np.testing.assert_allclose(importance.scores(waiting), expected, rtol=1e-9, atol=1e-12)
    importance.learn(gone[:15])
    importance.learn(gone[15:])
    expected = dense_scores(target, waiting + gone, waiting, buckets)
    np.testing.assert_allclose(importance.scores(waiting), expected, rtol=1e-9, atol=1e-12)
    lengths = [max(0, 2 * len(tokens) - 1) for tokens in waiting]
    np.testing.assert_allclose(importance.log_weights(waiting), np.multiply(expected, lengths), rtol=1e-9, atol=1e-12)


def test_a_sample_does_not_run_into_its_neighbour() -> None:
    """The score of each is the same whatever the order in which they wait."""
    target, waiting = samples_of(0, 8), samples_of(1, 25)
    importance = NgramImportance(target)
    np.testing.assert_allclose(importance.scores(waiting[::-1]), importance.scores(waiting)[::-1], rtol=1e-12)


def test_what_looks_like_the_target_scores_higher() -> None:
    target = samples_of(0, 30)
    like, other = samples_of(1, 40), samples_of(2, 40, first=1000)
    scores = NgramImportance(target).scores([*like, *other])
    filled = np.array([len(tokens) > 0 for tokens in (*like, *other)])
    assert scores[:40][filled[:40]].min() > 0 > scores[40:][filled[40:]].max()


def test_a_stream_like_the_target_says_nothing() -> None:
    """As does a token that makes up the same share of both, however rare it is."""
    tokens = np.arange(500)
    importance = NgramImportance([tokens] * 20)
    importance.learn([tokens] * 200)
    assert abs(importance.scores([tokens[:250]])).max() < 0.05


def test_it_is_the_same_whether_samples_wait_or_have_left() -> None:
    """Ratios are those of all that came in: they do not move when samples leave."""
    target, first, second = samples_of(0, 8), samples_of(1, 10), samples_of(2, 10)
    early, late = (NgramImportance(target) for _ in range(2))
    late.learn(first)
    assert np.array_equal(early.scores([*first, *second])[10:], late.scores(second))


def test_nothing_waiting_and_nothing_learned() -> None:
    importance = NgramImportance([np.array([1, 2])])
    before = importance.state_dict()
    importance.learn([])
    assert torch.equal(importance.state_dict()["gone_B"], before["gone_B"])
    assert importance.scores([]).shape == (0,)
    assert Dsir(importance, seeded()).draw([], 3) == []


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="buckets is 0"):
        NgramImportance([np.array([1])], buckets=0)
    for nothing in ([], [np.empty(0, dtype=np.int64)]):
        with pytest.raises(ValueError, match="target_tokens has no token"):
            NgramImportance(nothing)


def test_state_of_another_size_is_refused() -> None:
    tokens = [np.arange(9)]
    draw = Dsir(NgramImportance(tokens, buckets=10), seeded())
    before = draw.state_dict()
    with pytest.raises(ValueError, match="buckets is 10, the state has 20"):
        draw.load_state_dict(Dsir(NgramImportance(tokens, buckets=20), seeded(5)).state_dict())
    assert all(torch.equal(before[name], value) for name, value in draw.state_dict().items())


def follow(draw: Dsir, steps: range, waits: list[Traits]) -> list[list[int]]:
    """Four leave at each step, drawn, and as many come in; `waits` is carried on."""
    draws = []
    for step in steps:
        draws.append(draw.draw(waits, 4))
        draw.learn([waits[i] for i in draws[-1]])
        waits[:] = [traits for i, traits in enumerate(waits) if i not in draws[-1]] + traits_of(
            samples_of(100 + step, 4)
        )
    return draws


def test_an_interrupted_stream_goes_on_bit_for_bit() -> None:
    target, waits = samples_of(0, 8), traits_of(samples_of(1, 16, longest=4))
    whole, first = (Dsir(NgramImportance(target), seeded()) for _ in range(2))
    whole_waits, first_waits = list(waits), list(waits)
    expected = follow(whole, range(12), whole_waits)
    follow(first, range(5), first_waits)
    saved, resumed_waits = first.state_dict(), list(first_waits)
    follow(first, range(5, 8), first_waits)  # what was saved is a copy
    resumed = Dsir(NgramImportance(target), seeded(99))
    resumed.load_state_dict(saved)
    assert follow(resumed, range(5, 12), resumed_waits) == expected[5:]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_draws_are_distinct_ascending_and_as_many_as_asked() -> None:
    draw = Dsir(NgramImportance(samples_of(0, 8)), seeded())
    for count, waiting in ((6, 24), (24, 24), (30, 24), (5, 1), (0, 4)):
        found = draw.draw(traits_of(samples_of(count, waiting)), count)
        assert found == sorted(set(found))
        assert len(found) == min(count, waiting)


def test_draws_follow_the_weights() -> None:
    """Of two samples that are drawn one at a time, each comes as often as its weight says."""
    waiting = [np.array([token]) for token in (1, 2)]
    importance = NgramImportance([np.array([1] * 10 + [3] * 30)], buckets=50)
    weights = np.exp(importance.log_weights(waiting))
    share = float(weights[0] / weights.sum())
    assert 0.6 < share < 0.95
    draw = Dsir(importance, seeded())
    hits = sum(draw.draw(traits_of(waiting), 1) == [0] for _ in range(2000))
    assert abs(hits / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize("buckets", [7, 10_000], ids=["few buckets", "as published"])
def test_a_sample_of_the_target_is_judged_by_the_others(buckets: int) -> None:
    target, gone, waiting = samples_of(1, 6), samples_of(2, 20), samples_of(3, 10)
    target[2] = np.empty(0, dtype=np.int64)
    importance = NgramImportance(target, buckets)
    importance.learn(gone)
    expected = [
        dense_scores([*target[:i], *target[i + 1 :]], [*gone, *waiting], [own], buckets)[0]
        for i, own in enumerate(target)
    ]
    assert importance.scores_and_target_scores(waiting)[1].tolist() == pytest.approx(expected)
