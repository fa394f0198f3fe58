"""The columns of a learned draw, one by one, against what they are said to be."""

import math
from dataclasses import replace
from statistics import mean, pstdev

import numpy as np
import pytest
import torch
from gradient_selectors.features.columns import LIMIT, Columns, ColumnTable
from gradient_selectors.features.fluency import Fluency, disordered
from gradient_selectors.features.hashing import shingles
from gradient_selectors.features.ngrams import NgramImportance
from gradient_selectors.features.relevance import exchanges_of
from gradient_selectors.features.traits import Traits
from torch import Tensor


def sample(seed: int, size: int = 40, **others: object) -> Traits:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 60, size)
    embedding_d = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=6)).float(), dim=0)
    return Traits(tokens, embedding_d, shingles=shingles([tokens])[0], **others)  # type: ignore[arg-type]


def standardised(values: Tensor) -> Tensor:
    return ((values - values.mean()) / values.std(correction=0)).clamp(-LIMIT, LIMIT)


def column(table: ColumnTable, x_Md: Tensor, name: str) -> Tensor:
    return x_Md[:, table.names.index(name)]


WAITING = [sample(seed, size=20 + seed % 24) for seed in range(1, 41)]
TARGET = [sample(100), sample(101)]


def test_there_is_one_column_for_each_name() -> None:
    columns = Columns(components=3, values=4, own=("mine 0",))
    table = ColumnTable(columns, TARGET)
    x_Md = table.matrix([sample(seed, own_f=np.array([float(seed)])) for seed in range(9)])
    assert x_Md.shape == (9, len(table.names))
    assert len(table.prior_d) == len(table.certainty_d) == len(table.judges_quality_d) == len(table.names)
    assert table.names[:7] == ("constant", "likeness", "ngrams", "fluency", "relevance", "copy", "loss_share")
    torch.testing.assert_close(column(table, x_Md, "mine 0"), standardised(torch.arange(9.0).double()))
    assert bool((column(table, x_Md, "constant") == 1).all())


def test_likeness_is_the_cosine_of_what_sets_samples_and_target_apart_from_the_rest() -> None:
    table = ColumnTable(Columns(), TARGET)
    x_Md = table.matrix(WAITING)
    embeddings = torch.stack([traits.embedding_d for traits in WAITING]).double()
    mean = embeddings.mean(0)
    target = torch.stack([traits.embedding_d for traits in TARGET]).double().mean(0) - mean
    cosines = torch.nn.functional.cosine_similarity(embeddings - mean, target[None])
    torch.testing.assert_close(column(table, x_Md, "likeness"), standardised(cosines), rtol=1e-4, atol=1e-5)


def test_no_sample_has_more_of_the_targets_ngrams_than_is_usual_there() -> None:
    """They are of its subject then; what has still more is only like the others that have."""
    target = [
        sample(100, size=60),
        *(replace(sample(seed), tokens=sample(100, size=60).tokens[:40]) for seed in (1, 2)),
    ]
    found = NgramImportance([traits.tokens for traits in target])
    waiting = [*WAITING, target[0]]
    table = ColumnTable(Columns(), target)
    column_M = column(table, table.matrix(waiting), "ngrams")
    tokens = [traits.tokens for traits in waiting]
    scores, of_target = found.scores_and_target_scores(tokens)
    usual = of_target.mean()
    assert scores[-1] > usual > scores[:-1].max()
    torch.testing.assert_close(column_M, standardised(torch.from_numpy(np.minimum(scores, usual))))


def test_one_sample_of_the_target_says_not_what_is_usual() -> None:
    table = ColumnTable(Columns(), TARGET[:1])
    scores = NgramImportance([TARGET[0].tokens]).scores([traits.tokens for traits in WAITING])
    torch.testing.assert_close(column(table, table.matrix(WAITING), "ngrams"), standardised(torch.from_numpy(scores)))


def odds(value: float, good: list[float], spoilt: list[float]) -> float:
    """Log odds of two normal distributions for one value; one below all spoilt ones is as they are."""
    least, value = 0.2 * abs(mean(good)), max(value, mean(spoilt))
    logs = [
        -(((value - mean(values)) / max(pstdev(values), least)) ** 2) / 2 - math.log(max(pstdev(values), least))
        for values in (good, spoilt)
    ]
    against = value < mean(good) and logs[0] - logs[1] < -1.0  # less is worth no more than a bare mention
    return max(-LIMIT, logs[0] - logs[1]) if against else 0.0


def test_fluency_is_how_much_likelier_a_text_is_of_the_target_than_of_its_words_in_disorder() -> None:
    chain = [(7 * i) % 59 for i in range(40)]
    target = [replace(WAITING[0], tokens=np.array(chain[i:] + chain[:i])) for i in range(0, 12, 3)]
    table = ColumnTable(Columns(), target)
    assert not bool(column(table, table.matrix(WAITING), "fluency").any()), "nothing was counted yet"
    table.learn([*target, *WAITING])
    found = Fluency()
    found.learn([traits.tokens for traits in (*target, *WAITING)])
    good = found.scores([traits.tokens for traits in target]).tolist()
    spoilt = found.scores([disordered(traits.tokens) for traits in target]).tolist()
    expected = [odds(value, good, spoilt) for value in found.scores([traits.tokens for traits in WAITING])]
    assert column(table, table.matrix(WAITING), "fluency").tolist() == pytest.approx(expected, abs=1e-9)
    assert min(expected) < -1.0
    assert not bool(column(table, table.matrix(target), "fluency").any())


def test_shuffled_words_are_not_fluent_though_their_own_tokens_are() -> None:
    """Words have two tokens here: half of all neighbours stay where they were."""
    words = np.arange(100, 160).reshape(30, 2)
    texts = [replace(WAITING[0], tokens=np.roll(words, -2 * i, axis=0)[:20].ravel()) for i in range(15)]
    table = ColumnTable(Columns(), texts[:4])
    table.learn(texts)
    order = np.random.default_rng(0).permutation(20)
    shuffled = [replace(text, tokens=text.tokens.reshape(20, 2)[order].ravel()) for text in texts]
    assert column(table, table.matrix([*texts, *shuffled]), "fluency").tolist() == [0.0] * 15 + [-LIMIT] * 15


def test_a_target_that_the_stream_says_nothing_of_has_no_fluency() -> None:
    """No pair of its tokens can be expected, so all score 0 exactly; in disorder, one of the first sample's can."""
    tokens = np.array([[100, 1, 101, 102, 2, 103, 104, 105, 106, 107], range(100, 110)])
    target = [replace(WAITING[0], tokens=row) for row in tokens]
    table, gone = ColumnTable(Columns(), target), np.array([1, 9, 2, 9, 3, 9, 4, 9, 5])
    table.learn([replace(WAITING[0], tokens=gone)])
    assert not bool(column(table, table.matrix(WAITING), "fluency").any())


def test_ngrams_and_fluency_are_those_of_what_carries_loss() -> None:
    """A model learns to write answers; what stands in prompts is another matter."""
    counted = np.arange(40) >= 20
    target = [replace(sample(100), counted=counted) for _ in range(2)]
    table = ColumnTable(Columns(), target)
    waiting = [replace(sample(seed), counted=counted) for seed in range(1, 9)]
    others = [replace(traits, tokens=np.where(counted, traits.tokens, 59 - traits.tokens)) for traits in waiting]
    table.learn(target)
    for name in ("ngrams", "fluency"):
        assert torch.equal(*(column(table, table.matrix(samples), name) for samples in (waiting, others)))
        assert bool(column(table, table.matrix(waiting), name).any())


def asked(kept: int, seed: int, size: int = 20, marks: int = 0) -> Traits:
    """A prompt and an answer; so many of the answer's tokens are the prompt's, after marks that are always the same."""
    prompt, new = np.random.default_rng(seed).integers(10, 10**6, (2, size))
    prompt[:marks] = np.arange(marks)
    kept += marks
    tokens = np.concatenate([prompt, prompt[:kept], new[kept:]])
    return replace(sample(seed), tokens=tokens, exchange=exchanges_of([tokens], [np.arange(2 * size) >= size])[0])


def relevance_of(target: list[Traits], waiting: list[Traits]) -> Tensor:
    table = ColumnTable(Columns(), target)
    return column(table, table.matrix(waiting), "relevance")


def test_relevance_is_how_much_likelier_an_answer_is_of_its_prompt_than_of_another() -> None:
    target = [asked(kept, seed=100 + place) for place, kept in enumerate((6, 8, 10, 6, 8, 10))]
    found = relevance_of(target, [asked(kept, seed=kept) for kept in (0, 1, 3, 4, 6, 20)])
    good, spoilt = [0.3, 0.4, 0.5] * 2, [0.0] * 6
    expected = [odds(kept / 20, good, spoilt) for kept in (0, 1, 3, 4, 6, 20)]
    assert found.tolist() == pytest.approx(expected, abs=0.2)
    assert expected[0] == -LIMIT
    assert expected[3:] == [0.0, 0.0, 0.0]


def test_an_answer_with_less_of_its_prompt_than_spoilt_ones_have_is_no_better() -> None:
    """The target's prompts and answers share marks, so spoilt ones do, too, and differ little from one another."""
    target = [asked(kept, seed=100 + place, marks=6) for place, kept in enumerate((0, 0, 14, 14))]
    others = [asked(kept=5, seed=seed) for seed in range(2, 40)]
    with_marks, without, *_ = relevance_of(target, [asked(0, seed=0, marks=6), asked(0, seed=1), *others]).tolist()
    assert without == pytest.approx(with_marks, abs=0.05)
    assert without < -1.5


def test_relevance_says_nothing_where_there_is_no_prompt_or_the_target_has_none() -> None:
    waiting = [asked(kept, seed=kept) for kept in range(4)]
    target = [asked(kept, seed=100 + kept) for kept in (6, 8)]
    assert not bool(relevance_of(target, WAITING).any())
    assert not bool(relevance_of(TARGET, waiting).any())


@pytest.mark.parametrize("kept", [0, 10])
def test_where_the_targets_answers_are_no_nearer_to_their_prompts_all_may_be_so(kept: int) -> None:
    """Translations have hardly a word of what was asked; bytes are in every prompt; one sample has no other."""
    target = [asked(kept, seed=seed) for seed in range(100, 100 + (4 if kept == 0 else 1))]
    assert not bool(relevance_of(target, [asked(kept, seed=1) for kept in (0, 5)]).any())


def test_a_copy_of_what_was_trained_on_stands_out_and_so_does_its_forgetting() -> None:
    table = ColumnTable(Columns(), TARGET)
    table.trained([WAITING[3]])
    copied = column(table, table.matrix(WAITING), "copy")
    assert int(copied.argmax()) == 3
    assert float(copied[3]) == LIMIT
    table.trained([sample(seed) for seed in range(200, 500)])
    assert not bool(column(table, table.matrix(WAITING), "copy").any())


@pytest.mark.parametrize(("common", "expected"), [(1, 0.0), (4, 0.0), (7, 0.5 * LIMIT), (10, LIMIT), (20, LIMIT)])
def test_turns_of_phrase_that_a_subject_shares_make_no_copy(common: int, expected: float) -> None:
    """Of twenty runs one to four, as answers to sums share them with other ones, leave a sample as good as new."""
    table = ColumnTable(Columns(), TARGET)
    table.trained([replace(WAITING[0], shingles=np.arange(20, dtype=np.uint64))])
    alike = replace(WAITING[0], shingles=np.arange(20 - common, 40 - common, dtype=np.uint64))
    copied = column(table, table.matrix([alike, *WAITING[1:]]), "copy")
    assert copied[0] == pytest.approx(expected)
    assert not bool(copied[1:].any())


def test_components_are_those_of_the_first_samples_and_of_unit_spread() -> None:
    table = ColumnTable(Columns(components=4), TARGET)
    few = torch.stack([column(table, table.matrix(WAITING[:20]), f"component {i}") for i in range(4)])
    assert not bool(few.any()), "too few samples to found components on"
    first = torch.stack([column(table, table.matrix(WAITING), f"component {i}") for i in range(4)])
    torch.testing.assert_close(first @ first.T / len(WAITING), torch.eye(4).double(), rtol=1e-4, atol=1e-4)
    table.matrix([sample(seed) for seed in range(300, 320)])
    again = torch.stack([column(table, table.matrix(WAITING), f"component {i}") for i in range(4)])
    assert torch.equal(first, again)


def test_each_value_of_a_field_has_a_column_until_there_are_too_many() -> None:
    table = ColumnTable(Columns(values=3), TARGET)
    waiting = [sample(i, fields=(("source", name),)) for i, name in enumerate(["b", "a", "b", "c", "d", "a"])]
    x_Md = table.matrix(waiting)
    assert table.names[-3:] == ("source=b", "source=a", "other fields")
    assert x_Md[:, -3:].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]


def answering(asked: int, answered: int) -> Traits:
    """A sample whose last tokens carry loss."""
    return replace(sample(asked, size=asked + answered), counted=np.arange(asked + answered) >= asked)


def test_more_of_what_a_pass_costs_carries_loss_up_to_what_is_known_of_the_target() -> None:
    target = [answering(30, 10), answering(20, 20)]
    table = ColumnTable(Columns(), target)
    waiting = [answering(30, 10), answering(90, 30), answering(5, 15), answering(398, 2), sample(3)]
    usual = (math.log(1 / 4) + math.log(1 / 2)) / 2
    highest = math.log(1 / 2) - usual
    expected = [math.log(1 / 4) - usual, math.log(1 / 4) - usual, highest, -LIMIT, highest]
    found_M = column(table, table.matrix(waiting), "loss_share")
    torch.testing.assert_close(found_M, torch.tensor(expected, dtype=torch.float64))


def test_where_all_tokens_carry_loss_their_share_says_nothing() -> None:
    table = ColumnTable(Columns(), TARGET)
    assert column(table, table.matrix([*WAITING, sample(1, size=0)]), "loss_share").tolist() == [0.0] * 41


def test_a_feature_that_is_off_has_no_column() -> None:
    columns = Columns(simple=("length",), components=0, values=0)
    table = ColumnTable(columns, TARGET)
    assert table.names == ("constant", "length")
    assert table.matrix(WAITING).shape == (len(WAITING), 2)


def test_columns_go_on_from_a_state() -> None:
    one, other = ColumnTable(Columns(), TARGET), ColumnTable(Columns(), TARGET)
    one.matrix([*WAITING, sample(7, fields=(("source", "a"),))])
    one.learn(WAITING[:6])
    one.trained(WAITING[:3])
    other.load_state_dict(one.state_dict())
    for table in (one, other):
        table.learn(WAITING[6:8])
        table.trained(WAITING[6:7])
    later = [sample(seed, fields=(("source", "ab"[seed % 2]),)) for seed in range(400, 420)]
    assert torch.equal(one.matrix(later), other.matrix(later))
    assert one.names == other.names


def test_a_state_of_another_model_is_refused() -> None:
    state = ColumnTable(Columns(components=2), TARGET).state_dict()
    with pytest.raises(ValueError, match="components of shape"):
        ColumnTable(Columns(components=3), TARGET).load_state_dict(state)
