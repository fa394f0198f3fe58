"""The target's gradient: a mean over samples, refreshed in turn; and means over any fixed set."""

from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.target import Target, TargetError, mean_gradient, mean_loss

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

LENGTHS = (12, 7, 9, 12, 5, 10, 8, 6, 11, 7, 13, 6, 9, 5, 12, 8, 10, 7, 6, 11)  # more than one micro batch


def samples_of(count: int, seed: int = 1) -> list[Batch]:
    return list(make_batch(LENGTHS[:count], seed=seed).samples())


def test_the_mean_gradient_is_a_mean_over_samples() -> None:
    """Against autograd, one sample at a time: long samples do not outweigh short ones, however they are batched."""
    model = make_model("llama")
    capture, samples = GradientCapture(model), samples_of(20)
    oracle = dense(model, make_batch(LENGTHS))
    whole = mean_gradient(capture, samples)
    assert relative_error(oracle.flat(whole).flatten(), oracle.gradients.mean(0)) < 1e-5
    assert mean_loss(capture, samples) == pytest.approx(float(oracle.losses.mean()), rel=1e-5)
    in_one = mean_gradient(capture, [make_batch(LENGTHS)])
    for name, values in whole.items():
        torch.testing.assert_close(in_one[name], values, rtol=1e-4, atol=1e-6)


def test_a_target_is_refreshed_in_turn() -> None:
    """Parts of 2 of 5 samples, in turn and around; the first ones as a plain mean, then with a decay of 0.5."""
    capture, samples = GradientCapture(make_model("llama")), samples_of(5)
    target = Target(samples, refresh_steps=1, refresh_samples=2, decay=0.5)
    expected: dict[str, torch.Tensor] = {}
    for part, share in (((0, 1), 1.0), ((2, 3), 0.5), ((4, 0), 0.5), ((1, 2), 0.5)):
        gradient, refreshed = target.current(capture)
        assert refreshed
        for name, values in mean_gradient(capture, [samples[i] for i in part]).items():
            expected[name] = share * values + (1 - share) * expected.get(name, torch.zeros_like(values))
            torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_first_refreshes_count_alike() -> None:
    """However long the decay: three parts of 2 that are the whole have the mean gradient of the whole."""
    capture, samples = GradientCapture(make_model("llama")), samples_of(6)
    target = Target(samples, refresh_steps=1, refresh_samples=2, decay=0.99)
    for _ in range(3):
        gradient, _ = target.current(capture)
    for name, values in mean_gradient(capture, samples).items():
        torch.testing.assert_close(gradient[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("count", "judges"), [(2, [(2, 3), (4, 0), (1, 2)]), (4, [(4,), (3,), (2,)])])
def test_who_judges_was_not_in_the_last_refresh(count: int, judges: list[tuple[int, ...]]) -> None:
    """Samples that an update was chosen by find it better than it is. After each of three refreshes: the next of 5."""
    capture, samples = GradientCapture(make_model("llama")), samples_of(5)
    target = Target(samples, refresh_steps=1, refresh_samples=count)
    for judge in judges:
        target.current(capture)
        found = target.next(capture)
        assert found is not None
        for name, values in mean_gradient(capture, [samples[i] for i in judge]).items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-6)


def test_nobody_judges_where_every_refresh_takes_all() -> None:
    capture = GradientCapture(make_model("llama"))
    target = Target(samples_of(5), refresh_samples=5)
    target.current(capture)
    assert target.next(capture) is None


def test_a_target_goes_on_from_its_state() -> None:
    capture, samples = GradientCapture(make_model("llama")), samples_of(5)
    target, again = (Target(samples, refresh_steps=2, refresh_samples=2, decay=0.5) for _ in range(2))
    for _ in range(3):
        target.current(capture)
    again.load_state_dict(target.state_dict())
    for _ in range(5):
        (ours, refreshed), (theirs, same) = again.current(capture), target.current(capture)
        assert refreshed == same
        for name in ours:
            assert torch.equal(ours[name], theirs[name])


def test_a_target_takes_what_data_collators_make_and_must_hold_a_sample() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    target = Target.of([{"input_ids": ids, "labels": ids, "attention_mask": mask}], refresh_samples=3)
    assert [sample.lengths for sample in target.samples] == [(3,), (2,)]
    assert target.refresh_samples == 3
    with pytest.raises(ValueError, match="the target holds no sample; give some dozens"):
        Target.of([])


# What is not finite

POISON = 299  # a token that the model has no finite embedding of


def with_poison(model: Any, number: int, count: int = 4) -> list[Batch]:
    """Samples of which one holds the token, and a model that it is poison to."""
    samples = samples_of(count)
    for sample in samples:
        sample.input_ids_NT.masked_fill_(sample.input_ids_NT == POISON, 7)
    samples[number].input_ids_NT[0, 2] = POISON
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    return samples


@pytest.mark.parametrize("refresh_samples", [1, 4])
def test_a_refresh_that_is_not_finite_leaves_the_old_gradient(refresh_samples: int) -> None:
    """Bit for bit; of all samples at once, and of a part in turn, after which the average goes on without it."""
    model = make_model("llama")
    samples = with_poison(model, 2)
    capture = GradientCapture(model)
    target = Target(samples, refresh_steps=1, refresh_samples=refresh_samples, decay=0.99)
    if refresh_samples == 4:
        target.gradient, target.age = mean_gradient(capture, samples[:2]), 1
    found = []
    for _ in range(4):
        gradient, refreshed = target.current(capture)
        found.append({name: values.clone() for name, values in gradient.items()})
        assert refreshed != target.refused
        assert target.refused == (refresh_samples == 4 or len(found) == 3)
        assert all(bool(torch.isfinite(values).all()) for values in gradient.values())
    assert all(torch.equal(values, found[1][name]) for name, values in found[2].items())
    assert (target.refreshes, target.refusals) == (4, 4 if refresh_samples == 4 else 1)
    if refresh_samples == 1:  # the plain mean of the three that were sound
        for name, values in mean_gradient(capture, [samples[i] for i in (0, 1, 3)]).items():
            torch.testing.assert_close(found[3][name], values, rtol=1e-4, atol=1e-6)


def test_a_refused_refresh_is_not_tried_again_before_its_time() -> None:
    model = make_model("llama")
    samples = with_poison(model, 1)
    target, capture = Target(samples, refresh_steps=3, refresh_samples=1), GradientCapture(model)
    refused = []
    for _ in range(8):
        target.current(capture)
        refused.append(target.refused)
    assert refused == [False, False, False, True, False, False, False, False]
    assert target.refreshes == 3


def test_a_first_refresh_that_is_not_finite_names_the_sample() -> None:
    model = make_model("llama")
    samples = with_poison(model, 2)
    with pytest.raises(TargetError, match=r"the loss of its sample 2 is nan; check that sample"):
        Target(samples).current(GradientCapture(model))


def test_an_old_state_that_is_not_finite_is_begun_afresh() -> None:
    """As it was saved before refreshes were refused; a state from then counts no refusals."""
    capture, samples = GradientCapture(make_model("llama")), samples_of(3)
    target = Target(samples, refresh_samples=3)
    target.current(capture)
    state = target.state_dict()
    state["gradient"] = {name: values.clone() for name, values in state["gradient"].items()}
    del state["refusals"]
    next(iter(state["gradient"].values())).view(-1)[0] = torch.nan
    again = Target(samples, refresh_samples=3)
    again.load_state_dict(state)
    gradient, refreshed = again.current(capture)
    assert refreshed
    assert all(torch.equal(values, gradient[name]) for name, values in mean_gradient(capture, samples).items())
