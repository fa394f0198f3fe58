"""Hashes against Python's integers, and shingles against sets of runs."""

import numpy as np
from gradient_selectors.features.hashing import BASE, mix, shingles

MASK = 2**64 - 1


def by_hand(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_mix_is_splitmix64() -> None:
    values = [0, 1, 77, 2**63, MASK]
    assert mix(np.array(values, dtype=np.uint64)).tolist() == [by_hand(value) for value in values]


def test_shingles_are_the_smallest_hashes_of_the_runs_of_each_sample() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 50, size) for size in (20, 3, 0, 8, 60)]
    samples.append(np.tile(np.arange(10), 9))  # the same ten runs over and over
    for tokens, found in zip(samples, shingles(samples, length=8, kept=12), strict=True):
        runs = set()
        for start in range(len(tokens) - 7):
            value = 0
            for token in tokens[start : start + 8].tolist():
                value = (value * int(BASE) + by_hand(token)) & MASK
            runs.add(by_hand(value))
        expected = sorted(runs)[:12]
        assert found.tolist() == expected[: len(found)]
        assert len(found) == min(len(expected), len(set(found.tolist())))


def test_a_near_copy_shares_most_and_another_text_nothing() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, 1000, 300)
    near = np.delete(text, [50, 150, 250])
    whole, copy, other = shingles([text, near, rng.integers(0, 1000, 300)])
    assert np.isin(copy, whole).mean() > 0.7
    assert not np.isin(other, whole).any()


def test_only_runs_that_end_in_what_counts_are_looked_at() -> None:
    rng = np.random.default_rng(2)
    prompt, answers = rng.integers(0, 1000, 90), rng.integers(0, 1000, (2, 30))
    texts = [np.concatenate([prompt, answer]) for answer in answers]
    counted = [np.arange(len(text)) >= len(prompt) for text in texts]
    whole = shingles(texts)
    assert np.isin(whole[0], whole[1]).mean() > 0.5
    first, second = shingles(texts, counted)
    assert len(first) == len(second) == 30
    assert not np.isin(first, second).any()
    short = shingles([prompt, prompt[:5]], [np.arange(90) == 89, np.arange(5) == 4])
    assert [len(found) for found in short] == [1, 0]
