"""KNN-KDE: against the published problem solved as a linear programme, and densities by brute force."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from gradient_selectors.draw.knn_kde import KnnKde, densities, transported
from gradient_selectors.features.traits import Traits
from torch import Tensor
from torch.nn import functional as F

SIZE = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_units(seed: int, count: int) -> Tensor:
    return F.normalize(torch.randn(count, SIZE, generator=seeded(seed)), dim=1)


def traits_of(embeddings_Md: Tensor) -> list[Traits]:
    return [Traits(np.array([0]), embedding_d) for embedding_d in embeddings_Md]


def dense_densities(embeddings_Md: Tensor, bandwidth: float) -> list[float]:
    return [
        sum(max(0.0, 1 - (float((one - other).norm()) / bandwidth) ** 2) for other in embeddings_Md.double())
        for one in embeddings_Md.double()
    ]


def dense_distances(targets_Td: Tensor, embeddings_Md: Tensor) -> Tensor:
    rows = [[(a - b).norm() for b in embeddings_Md.double()] for a in targets_Td.double()]
    return torch.tensor(rows, dtype=torch.float64)


def solved(distances_TM: Tensor, densities_M: Tensor, alpha: float) -> Tensor:
    """The plan's mass of each candidate, by a solver."""
    targets, candidates = distances_TM.shape
    plan_TM = cp.Variable((targets, candidates), nonneg=True)
    weighted_TM = cp.multiply(densities_M.numpy()[None].repeat(targets, 0), plan_TM)
    cost = alpha * cp.sum(cp.multiply(distances_TM.numpy(), plan_TM)) + (1 - alpha) * targets * cp.max(weighted_TM)
    cp.Problem(cp.Minimize(cost), [cp.sum(plan_TM, axis=1) == 1 / targets]).solve(solver=cp.CLARABEL)
    assert plan_TM.value is not None
    return torch.from_numpy(plan_TM.value.sum(0))


@pytest.mark.parametrize("alpha", [0.02, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("targets", [1, 4])
def test_masses_solve_the_published_problem(alpha: float, targets: int) -> None:
    for seed in range(3):
        generator = seeded(seed)
        distances_TM = torch.rand(targets, 12, generator=generator, dtype=torch.float64)
        densities_M = 1 + 3 * torch.rand(12, generator=generator, dtype=torch.float64)
        found_M = transported(distances_TM, densities_M, alpha)
        assert float(found_M.sum()) == pytest.approx(1)
        torch.testing.assert_close(found_M, solved(distances_TM, densities_M, alpha), atol=1e-5, rtol=0)


def test_densities_by_brute_force() -> None:
    embeddings_Md = F.normalize(random_units(0, 8).repeat(3, 1) + 0.1 * random_units(1, 24), dim=1)
    for bandwidth in (0.05, 0.25, 1.5):
        squares_MM = dense_distances(embeddings_Md, embeddings_Md).square()
        expected = torch.tensor(dense_densities(embeddings_Md, bandwidth), dtype=torch.float64)
        torch.testing.assert_close(densities(squares_MM, bandwidth), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_masses_of_waiting_samples_from_embeddings_alone(alpha: float) -> None:
    embeddings_Md = F.normalize(random_units(0, 6).repeat(3, 1) + 0.1 * random_units(1, 18), dim=1)
    targets_Td = random_units(2, 3)
    found_M = KnnKde(7 * targets_Td, seeded(), alpha, bandwidth=0.4).masses(traits_of(embeddings_Md))
    densities_M = torch.tensor(dense_densities(embeddings_Md, 0.4), dtype=torch.float64)
    assert (densities_M > 1.2).any()
    expected_M = solved(dense_distances(targets_Td, embeddings_Md), densities_M, alpha)
    torch.testing.assert_close(found_M, expected_M, atol=1e-5, rtol=0)


def test_copies_share_what_one_sample_gets() -> None:
    """Nine copies have together what the tenth sample has alone, at the same distance."""
    kinds = torch.tensor([[0.8, 0.6, 0.0], [0.8, -0.6, 0.0], [0.0, 0.0, 1.0]])
    masses_M = KnnKde(torch.eye(3)[:1], seeded(), alpha=0.5).masses(traits_of(kinds[[0] * 9 + [1, 2, 2]]))
    assert float(masses_M[:9].sum()) == pytest.approx(float(masses_M[9]), rel=1e-6)
    wide = KnnKde(torch.eye(3)[:1], seeded(), alpha=0.5, bandwidth=1e-6).masses(traits_of(kinds[[0] * 9 + [1, 2, 2]]))
    assert float(wide[:9].sum()) == pytest.approx(float(masses_M[:9].sum()), rel=1e-6), "copies are at no distance"


def test_alpha_goes_from_the_nearest_alone_to_all_alike() -> None:
    embeddings_Md, targets_Td = random_units(0, 10), random_units(1, 1)
    order = dense_distances(targets_Td, embeddings_Md)[0].argsort().tolist()
    spread = []
    for alpha in (1.0, 0.9, 0.5, 0.1, 1e-9):
        masses_M = KnnKde(targets_Td, seeded(), alpha, bandwidth=1e-3).masses(traits_of(embeddings_Md))
        spread.append(int((masses_M > 1e-9).sum()))
        assert (masses_M[order].diff() <= 1e-12).all(), "the nearer, the more"
    assert spread == sorted(spread)
    assert spread[0] == 1
    torch.testing.assert_close(masses_M, torch.full((10,), 0.1, dtype=torch.float64), atol=1e-6, rtol=0)


def test_every_target_sample_has_its_share() -> None:
    """Though one kind of the target is met far more often among those that wait."""
    waiting = traits_of(torch.eye(SIZE)[[0] * 20 + [1] + [2] * 10])
    masses_M = KnnKde(torch.eye(SIZE)[:2], seeded(), alpha=0.9).masses(waiting)
    assert masses_M[:20].sum() == pytest.approx(0.5, abs=1e-6)
    assert masses_M[20] == pytest.approx(0.5, abs=1e-6)


def test_samples_are_drawn_by_their_mass() -> None:
    waiting = traits_of(random_units(0, 8))
    draw, counts = KnnKde(random_units(1, 3), seeded(), alpha=0.3), torch.zeros(8, dtype=torch.float64)
    for _ in range(2000):
        counts[draw.draw(waiting, 1)] += 1
    masses_M = draw.masses(waiting)
    assert (masses_M > 0.05).sum() >= 3
    assert ((counts / 2000 - masses_M).abs() <= 4.5 * (masses_M * (1 - masses_M) / 2000).sqrt() + 1e-9).all()


def test_draws_are_distinct_ascending_and_as_many_as_asked() -> None:
    """Those without mass come after all others."""
    draw = KnnKde(random_units(9, 1), seeded(), alpha=0.9)
    for count, size in ((6, 24), (24, 24), (30, 24), (5, 1), (0, 4), (3, 0)):
        found = draw.draw(traits_of(random_units(count, size)), count)
        assert found == sorted(set(found))
        assert len(found) == min(count, size)
    waiting = traits_of(random_units(0, 12))
    some = set((draw.masses(waiting) > 1e-9).nonzero().flatten().tolist())
    assert 0 < len(some) < 12
    seen = [set(draw.draw(waiting, len(some) + 1)) for _ in range(60)]
    assert all(some < found for found in seen)
    assert len(set.union(*seen)) == 12, "any of the rest"


def test_an_interrupted_stream_goes_on_bit_for_bit() -> None:
    steps = [traits_of(random_units(seed, 16)) for seed in range(10)]
    targets_Td = random_units(99, 4)
    whole, first = (KnnKde(targets_Td, seeded()) for _ in range(2))
    expected = [whole.draw(waiting, 4) for waiting in steps]
    for waiting in steps[:4]:
        first.draw(waiting, 4)
        first.learn(waiting)
    saved = first.state_dict()
    first.draw(steps[4], 4)  # what was saved is a copy
    resumed = KnnKde(targets_Td, seeded(99))
    resumed.load_state_dict(saved)
    assert [resumed.draw(waiting, 4) for waiting in steps[4:]] == expected[4:]
    assert torch.equal(resumed.state_dict()["generator"], whole.state_dict()["generator"])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="targets_Td has 0 samples"):
        KnnKde(torch.empty(0, SIZE), seeded())
    for alpha in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha is"):
            KnnKde(random_units(0, 2), seeded(), alpha)
    for bandwidth in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bandwidth is"):
            KnnKde(random_units(0, 2), seeded(), bandwidth=bandwidth)
