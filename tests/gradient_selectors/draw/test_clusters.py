"""Cosine k-means: the properties it must have at once (T7) and over a stream."""

from itertools import pairwise

import pytest
import torch
from gradient_selectors.draw.clusters import StreamClusters, cosine_k_means, nearest, unit
from torch import Tensor

KINDS = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(7)), dim=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(num_samples: int, noise: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of five kinds in eight dimensions, and the kind of each."""
    generator = seeded(seed)
    kinds_N = torch.randint(len(KINDS), (num_samples,), generator=generator)
    return KINDS[kinds_N] + noise * torch.randn(num_samples, 8, generator=generator), kinds_N


def purity(labels_N: Tensor, kinds_N: Tensor) -> float:
    hits = sum(int(torch.bincount(kinds_N[labels_N == label]).max()) for label in set(labels_N.tolist()))
    return hits / len(kinds_N)


def test_t7_similarity_never_falls() -> None:
    for seed in range(5):
        similarities = cosine_k_means(blobs(300, noise=0.5)[0], 12, seeded(seed)).similarities
        assert len(similarities) == 21
        assert all(b >= a - 1e-6 for a, b in pairwise(similarities))
        assert similarities[-1] > similarities[0] + 0.01


def test_t7_centres_are_unit_vectors_and_the_normalised_sums_of_their_members() -> None:
    features_Nd = unit(blobs(400)[0])
    found = cosine_k_means(features_Nd, 5, seeded())
    torch.testing.assert_close(found.centres_Kd.norm(dim=1), torch.ones(5))
    for cluster in range(5):
        members = features_Nd[found.labels_N == cluster].sum(0)
        torch.testing.assert_close(found.centres_Kd[cluster], members / members.norm(), atol=1e-4, rtol=0)


def test_t7_rotation_changes_nothing_but_the_centres() -> None:
    features_Nd = blobs(300)[0]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=seeded(3)))[0]
    plain, rotated = (cosine_k_means(f, 5, seeded()) for f in (features_Nd, features_Nd @ rotation))
    assert torch.equal(plain.labels_N, rotated.labels_N)
    torch.testing.assert_close(plain.centres_Kd @ rotation, rotated.centres_Kd, atol=1e-5, rtol=0)


def test_length_says_nothing_and_kinds_are_found() -> None:
    features_Nd, kinds_N = blobs(500)
    scales_N1 = torch.rand(500, 1, generator=seeded(1)) + 0.1
    found = cosine_k_means(features_Nd, 10, seeded())
    assert torch.equal(found.labels_N, cosine_k_means(features_Nd * scales_N1, 10, seeded()).labels_N)
    assert purity(found.labels_N, kinds_N) > 0.95


def test_an_empty_cluster_starts_again_at_the_sample_that_fits_worst() -> None:
    """Two starts on the same point leave one cluster without members; the outlier gets it."""
    features_Nd = torch.tensor([[1.0, 0, 0]] * 20 + [[0, 1.0, 0]] * 20 + [[0, 0, 1.0]])
    for seed in range(10):
        found = cosine_k_means(features_Nd, 3, seeded(seed))
        assert torch.bincount(found.labels_N, minlength=3).tolist().count(0) == 0
        assert found.similarities[-1] == pytest.approx(1.0)


def test_degenerate_input() -> None:
    assert len(cosine_k_means(torch.eye(3), 10, seeded()).centres_Kd) == 3
    same = cosine_k_means(torch.ones(6, 2), 4, seeded())
    assert len(set(same.labels_N.tolist())) == 1
    assert torch.isfinite(cosine_k_means(torch.zeros(4, 2), 2, seeded()).centres_Kd).all()
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(cosine_k_means(opposite, 1, seeded()).centres_Kd.norm(dim=1), torch.ones(1))
    for features, clusters in ((torch.empty(0, 2), 2), (torch.eye(2), 0)):
        with pytest.raises(ValueError, match="k-means needs"):
            cosine_k_means(features, clusters, seeded())
    with pytest.raises(ValueError, match="not finite"):
        cosine_k_means(torch.tensor([[torch.nan, 1.0]]), 1, seeded())


def test_t7_one_pass_over_a_stream_comes_close_to_all_at_once() -> None:
    features_Nd = unit(blobs(2000, noise=0.3)[0])
    stream = StreamClusters(5, 8, decay=1.0)
    stream.found(features_Nd[:100], seeded())
    for batch_Nd in torch.split(features_Nd[100:], 16):
        stream.learn(batch_Nd)
    whole = cosine_k_means(features_Nd, 5, seeded()).similarities[-1]
    streamed = float(nearest(features_Nd, stream.centres_Kd)[1].mean())
    assert streamed > 0.95 * whole


def test_decay_lets_the_centres_follow() -> None:
    """One kind that turns by 90 degrees."""
    start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    similarity = {}
    for decay in (1.0, 0.98):
        stream = StreamClusters(1, 2, decay)
        stream.found(start.expand(400, 2), seeded())
        for _ in range(20):
            stream.learn(end.expand(10, 2))
        similarity[decay] = float(stream.centres_Kd[0] @ end[0])
    assert similarity[1.0] < 0.5
    assert similarity[0.98] > 0.95


def test_a_dead_cluster_is_founded_anew_where_samples_fit_worst() -> None:
    stream = StreamClusters(2, 3, decay=0.9)
    stream.found(torch.tensor([[1.0, 0, 0]] * 5 + [[0, 1.0, 0]] * 5), seeded())
    for _ in range(8):
        assert stream.learn(torch.tensor([[1.0, 0, 0]] * 5)) == []  # the other fades, but nothing else fits badly
    first = int(stream.assign(torch.tensor([[1.0, 0, 0]]))[0])
    batch = torch.tensor([[1.0, 0, 0]] * 5 + [[0, 0, 1.0]])
    assert stream.learn(batch) == [1 - first]
    assert stream.assign(batch).tolist() == [first] * 5 + [1 - first]
    assert stream.learn(batch) == []  # a new centre has time to find members


def test_clusters_beyond_the_first_samples_are_founded_later() -> None:
    stream = StreamClusters(4, 4)
    stream.found(torch.eye(4)[:2], seeded())
    assert int((stream.masses_K > 0).sum()) == 2
    # A centre that was never founded is nobody's nearest, even for what points away from all others.
    assert float(stream.masses_K[stream.assign(-torch.ones(1, 4))]) > 0
    assert len(stream.learn(torch.eye(4)[2:])) == 2
    assert sorted(stream.assign(torch.eye(4)).tolist()) == [0, 1, 2, 3]
