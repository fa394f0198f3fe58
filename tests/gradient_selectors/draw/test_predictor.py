"""The predictor against the posterior written out, and against what forgetting must come to."""

import numpy as np
import pytest
import torch
from gradient_selectors.draw.predictor import NOISE_PRIOR, Predictor, Standardiser
from torch import Tensor

D = 5


def observations(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_nd = torch.randn(count, D, generator=generator, dtype=torch.float64)
    theta_d = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    return x_nd, x_nd @ theta_d + 0.1 * torch.randn(count, generator=generator, dtype=torch.float64)


def prior() -> Tensor:
    return torch.tensor([0.5, 0.0, 0.0, 0.0, -0.5], dtype=torch.float64)


def predictor_of(precision: float, discount: float) -> Predictor:
    return Predictor(prior(), torch.full((D,), precision, dtype=torch.float64), discount)


def test_the_mean_is_that_of_ridge_regression_around_the_prior() -> None:
    """By an augmented least-squares problem: the prior is D further rows."""
    predictor = predictor_of(4.0, 1.0)
    x_nd, r_n = observations(7)
    predictor.observe(x_nd[:3], r_n[:3])
    predictor.observe(x_nd[3:], r_n[3:])
    rows = np.vstack([x_nd.numpy(), 2.0 * np.eye(D)])
    values = np.concatenate([r_n.numpy(), 2.0 * prior().numpy()])
    expected = np.linalg.lstsq(rows, values, rcond=None)[0]
    np.testing.assert_allclose(predictor.mean_d.numpy(), expected, rtol=1e-9)


def test_earlier_observations_count_less_by_the_discount_and_the_weight() -> None:
    """Again by least squares: rows scaled by the root of what is left of them."""
    predictor = predictor_of(1.0, 0.5)
    x_nd, r_n = observations(6)
    predictor.observe(x_nd[:4], r_n[:4])
    predictor.observe(x_nd[4:], r_n[4:], weight=2.0)
    left = torch.tensor([0.25] * 4 + [2.0] * 2, dtype=torch.float64).sqrt()[:, None]
    rows = np.vstack([(left * x_nd).numpy(), np.eye(D)])
    values = np.concatenate([(left.squeeze(1) * r_n).numpy(), prior().numpy()])
    expected = np.linalg.lstsq(rows, values, rcond=None)[0]
    np.testing.assert_allclose(predictor.mean_d.numpy(), expected, rtol=1e-9)


def test_what_is_no_longer_observed_falls_back_to_the_prior() -> None:
    predictor = predictor_of(4.0, 0.5)
    predictor.observe(*observations(20))
    away = float((predictor.mean_d - prior()).norm())
    nothing = torch.zeros(1, D, dtype=torch.float64)
    for _ in range(40):
        predictor.observe(nothing, torch.zeros(1, dtype=torch.float64))
    assert float((predictor.mean_d - prior()).norm()) < 1e-6 * away


def test_draws_have_the_posterior_s_moments() -> None:
    predictor = predictor_of(2.0, 1.0)
    x_nd, r_n = observations(5)
    predictor.observe(x_nd, r_n)
    precision_dd = 2.0 * np.eye(D) + x_nd.numpy().T @ x_nd.numpy()
    errors = r_n - x_nd @ prior()
    noise = (NOISE_PRIOR + float(errors.square().sum())) / (NOISE_PRIOR + 5)
    covariance = noise * np.linalg.inv(precision_dd)
    draws = predictor.sample(40_000, torch.Generator().manual_seed(1)).numpy()
    np.testing.assert_allclose(draws.mean(0), predictor.mean_d.numpy(), atol=5 * np.sqrt(covariance.max() / 40_000))
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.05 * covariance.max())
    np.testing.assert_allclose(predictor.deviations_d.numpy(), np.sqrt(np.diag(covariance)), rtol=1e-9)
    wider = predictor.sample(40_000, torch.Generator().manual_seed(1), inflation=3.0).numpy()
    np.testing.assert_allclose(wider - wider.mean(0), 3 * (draws - draws.mean(0)), atol=1e-9)


def test_a_predictor_goes_on_from_its_state() -> None:
    one, other = (predictor_of(4.0, 0.9) for _ in range(2))
    one.observe(*observations(6))
    other.load_state_dict(one.state_dict())
    for predictor in (one, other):
        predictor.observe(*observations(4, seed=2), weight=0.5)
    assert torch.equal(one.mean_d, other.mean_d)
    first, second = (p.sample(3, torch.Generator().manual_seed(0)) for p in (one, other))
    assert torch.equal(first, second)


def test_a_state_of_other_features_is_refused_and_changes_nothing() -> None:
    predictor = predictor_of(4.0, 0.9)
    state = Predictor(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 0.9).state_dict()
    with pytest.raises(ValueError, match="2 features, not 5"):
        predictor.load_state_dict(state)
    assert torch.equal(predictor.mean_d, predictor_of(4.0, 0.9).mean_d)


def test_numbers_are_standardised_by_their_discounted_moments() -> None:
    scale, rng = Standardiser(discount=0.5), np.random.default_rng(0)
    first, second = rng.normal(3, 2, size=4), rng.normal(5, 1, size=3)
    scale(torch.from_numpy(first))
    found = scale(torch.from_numpy(second))
    weights, values = np.repeat([0.5, 1.0], [4, 3]), np.concatenate([first, second])
    mean = np.average(values, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    np.testing.assert_allclose(found.numpy(), (second - mean) / deviation, rtol=1e-9)


def test_one_wild_number_is_cut_and_equal_numbers_say_nothing() -> None:
    scale = Standardiser(discount=1.0)
    scale(torch.linspace(-1, 1, 50, dtype=torch.float64))
    assert scale(torch.tensor([1e9], dtype=torch.float64)).tolist() == [4.0]
    assert Standardiser(0.9)(torch.full((3,), 7.0, dtype=torch.float64)).tolist() == [0.0] * 3
