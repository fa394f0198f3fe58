"""The target's gradient: a mean over samples, refreshed in turn; and means over any fixed set."""

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.target import Target, mean_gradient, mean_loss

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
