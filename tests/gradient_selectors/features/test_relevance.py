"""Relevance against vectors over the whole vocabulary."""

import math

import numpy as np
import pytest
from gradient_selectors.features.relevance import NOTHING, Exchange, exchanges_of, relevance

VOCABULARY = 40


def exchange(prompt: list[int], answer: list[int]) -> Exchange:
    tokens = np.array([*prompt, *answer], dtype=np.int64)
    return exchanges_of([tokens], [np.arange(len(tokens)) >= len(prompt)])[0]


def some(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 15, (count, 2))
    return [(rng.integers(0, VOCABULARY, a).tolist(), rng.integers(0, VOCABULARY, b).tolist()) for a, b in lengths]


def test_it_is_the_cosine_of_tf_idf_vectors() -> None:
    texts = some(30, seed=0)
    has = np.array([[token in [*prompt, *answer] for token in range(VOCABULARY)] for prompt, answer in texts])
    weights = np.log((len(texts) + 1) / np.maximum(1, has.sum(0)))
    for (prompt, answer), found in zip(texts, relevance([exchange(*text) for text in texts]), strict=True):
        asked, answered = (weights * np.isin(np.arange(VOCABULARY), side) for side in (prompt, answer))
        lengths = float(np.linalg.norm(asked)), float(np.linalg.norm(answered))
        if min(lengths) ** 2 < NOTHING:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(float(asked @ answered) / math.prod(lengths))


def test_answers_to_other_prompts_have_less_in_common_with_theirs() -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 2000, 20).tolist() for _ in range(40)]
    answers = [[*rng.choice(prompt, 5).tolist(), *rng.integers(0, 2000, 15).tolist()] for prompt in prompts]
    theirs = relevance([exchange(*pair) for pair in zip(prompts, answers, strict=True)])
    others = relevance([exchange(*pair) for pair in zip(prompts, answers[1:] + answers[:1], strict=True)])
    assert theirs.min() > others.max()


@pytest.mark.parametrize("prompt", [[], [0], [0, 1]], ids=["none", "a mark", "what all have"])
def test_a_prompt_that_says_nothing_has_no_relevance(prompt: list[int]) -> None:
    texts = [(prompt, [0, 1, *range(first, first + 8)]) for first in range(2, 200, 8)]
    assert np.isnan(relevance([exchange(*text) for text in texts])).all()


def test_there_may_be_nothing() -> None:
    assert relevance([]).tolist() == []
    assert np.isnan(relevance([exchange([], [])])).all()


def test_sets_are_those_of_each_sample_alone() -> None:
    texts = some(30, seed=2)
    tokens = [np.array([*prompt, *answer], dtype=np.int64) for prompt, answer in texts]
    counted = [np.arange(len(ids)) >= len(prompt) for ids, (prompt, _) in zip(tokens, texts, strict=True)]
    found = exchanges_of(tokens, counted)
    assert len(found) == len(texts)
    for (prompt, answer), sets in zip(texts, found, strict=True):
        assert sets.tokens_D.tolist() == sorted({*prompt, *answer})
        assert sets.tokens_D[sets.asked_D].tolist() == sorted(set(prompt))
        assert sets.tokens_D[sets.answered_D].tolist() == sorted(set(answer))
    assert exchanges_of([], []) == []
