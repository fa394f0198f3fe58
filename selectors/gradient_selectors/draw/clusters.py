"""Cosine k-means: of a fixed set at once, and of a stream with centres that forget.

Features are compared by direction only, so everything is scaled to length one first. A zero vector has no direction;
it goes to whichever cluster comes first and pulls no centre.

Shape suffixes: N samples, K clusters, d feature dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ITERATIONS = 20  # as published for ClusterUCB
CHUNK_ROWS = 65_536  # samples compared with all centres at once
DEAD_SHARE = 0.02  # of an even share of the remembered samples: a smaller cluster's centre is put to better use
GRACE = 2.0  # a new centre begins with this many times the mass of a dead one, and fades from there
SAME_DIRECTION = 0.999  # a sample this close to a centre is no reason to found a cluster


@dataclass(frozen=True)
class Clustering:
    """A partition of N samples.

    Attributes:
        labels_N: cluster of each sample, int64.
        centres_Kd: unit vectors, float32. A cluster may be empty if there are fewer directions than clusters.
        similarities: mean cosine between samples and their centres, after each assignment; never falls.
    """

    labels_N: Tensor
    centres_Kd: Tensor
    similarities: tuple[float, ...]


def cosine_k_means(
    features_Nd: Tensor, num_clusters: int, generator: torch.Generator, iterations: int = ITERATIONS
) -> Clustering:
    """Lloyd's algorithm under the cosine: centres begin at random samples and become their members' normalised sum.

    A cluster that loses all its members starts again at the sample that fits its own cluster worst. Centres are at
    most as many as samples. Raises ValueError if there are no samples or no clusters, or a feature is not finite.
    """
    if num_clusters < 1 or len(features_Nd) == 0:
        raise ValueError(f"k-means needs samples and clusters, not {len(features_Nd)} and {num_clusters}")
    features_Nd = unit(features_Nd)
    first = torch.randperm(len(features_Nd), generator=generator)[:num_clusters]
    centres_Kd = features_Nd[first]
    history = []
    for _ in range(iterations):
        labels_N, similarities_N = nearest(features_Nd, centres_Kd)
        history.append(float(similarities_N.double().mean()))
        centres_Kd = _centres(features_Nd, labels_N, similarities_N, centres_Kd)
    labels_N, similarities_N = nearest(features_Nd, centres_Kd)
    history.append(float(similarities_N.double().mean()))
    return Clustering(labels_N, centres_Kd, tuple(history))


def _centres(features_Nd: Tensor, labels_N: Tensor, similarities_N: Tensor, centres_Kd: Tensor) -> Tensor:
    """Each cluster's new centre; one whose members cancel out keeps its old one."""
    sums_Kd = torch.zeros_like(centres_Kd).index_add_(0, labels_N, features_Nd)
    moved_Kd = torch.where(sums_Kd.norm(dim=1, keepdim=True) > 0, F.normalize(sums_Kd, dim=1), centres_Kd)
    empty = (torch.bincount(labels_N, minlength=len(centres_Kd)) == 0).nonzero().squeeze(1)
    if len(empty):
        moved_Kd[empty] = features_Nd[torch.topk(similarities_N, len(empty), largest=False).indices]
    return moved_Kd


def nearest(features_Nd: Tensor, centres_Kd: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's most similar centre, (N,) int64, and the cosine, (N,) float32; both of unit vectors."""
    found = [(chunk_Nd @ centres_Kd.T).max(dim=1) for chunk_Nd in torch.split(features_Nd, CHUNK_ROWS)]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


def unit(features_Nd: Tensor) -> Tensor:
    """Rows scaled to length one, float32; zero rows stay. Raises ValueError if one is not finite."""
    features_Nd = features_Nd.float()
    if not bool(torch.isfinite(features_Nd).all()):
        raise ValueError("a feature is not finite; leave out samples whose features cannot be computed")
    return F.normalize(features_Nd, dim=1)


class StreamClusters:
    """Spherical mini-batch k-means over a stream.

    A centre is the direction of its cluster's decayed sum of members. One sample makes all that came before it count
    `decay` times as much, so about `1 / (1 - decay)` samples are remembered; 1 forgets nothing. A cluster whose
    remembered members are few is dead: its centre is founded anew at the sample that fits its own cluster worst.

    Attributes:
        sums_Kd: decayed sums of members, float32. A row of zeros is a centre that was never founded.
        masses_K: decayed numbers of members, float64.
    """

    def __init__(self, num_clusters: int, num_features: int, decay: float = 0.999) -> None:
        self.decay = decay
        self.sums_Kd = torch.zeros(num_clusters, num_features)
        self.masses_K = torch.zeros(num_clusters, dtype=torch.float64)

    @property
    def founded(self) -> bool:
        return bool((self.masses_K > 0).any())

    @property
    def centres_Kd(self) -> Tensor:
        """Unit vectors; zero where no centre has been founded."""
        return F.normalize(self.sums_Kd, dim=1)

    def found(self, features_Nd: Tensor, generator: torch.Generator) -> None:
        """Begin with the clusters of these samples; with fewer samples than clusters, the rest is founded later."""
        clustering = cosine_k_means(features_Nd, len(self.sums_Kd), generator)
        counts = torch.bincount(clustering.labels_N, minlength=len(clustering.centres_Kd))
        used = (counts > 0).nonzero().squeeze(1)
        self.masses_K.zero_()[used] = counts[used].double()
        self.sums_Kd.zero_()[used] = clustering.centres_Kd[used] * counts[used, None]

    def assign(self, features_Nd: Tensor) -> Tensor:
        """Each sample's cluster, (N,) int64. Moves no centre."""
        return self._nearest(unit(features_Nd))[0]

    def learn(self, features_Nd: Tensor) -> list[int]:
        """Move the centres by these samples. Returns the clusters founded anew: what was known of them is void.

        Mini-batch: all are assigned before any centre moves, so their order does not matter.
        """
        features_Nd = unit(features_Nd)
        labels_N, similarities_N = self._nearest(features_Nd)
        fade = self.decay ** len(features_Nd)
        self.sums_Kd.mul_(fade).index_add_(0, labels_N, features_Nd)
        self.masses_K.mul_(fade).index_add_(0, labels_N, torch.ones(len(labels_N), dtype=torch.float64))
        return self._replace_dead(features_Nd, similarities_N)

    def _nearest(self, features_Nd: Tensor) -> tuple[Tensor, Tensor]:
        # A zero centre would be nearer than any that points the other way.
        founded = (self.masses_K > 0).nonzero().squeeze(1)
        labels_N, similarities_N = nearest(features_Nd, self.centres_Kd[founded])
        return founded[labels_N], similarities_N

    def _replace_dead(self, features_Nd: Tensor, similarities_N: Tensor) -> list[int]:
        threshold = DEAD_SHARE * float(self.masses_K.sum()) / len(self.masses_K)
        dead = (self.masses_K < threshold).nonzero().squeeze(1).tolist()
        outliers = torch.argsort(similarities_N, stable=True)[: len(dead)].tolist()
        # An outlier may be the only one of its kind; two of the same kind would found the same centre twice.
        replaced: list[int] = []
        for cluster, sample in zip(dead, outliers, strict=False):
            feature_d = features_Nd[sample]
            if not bool(feature_d.any()) or float((self.centres_Kd @ feature_d).max()) > SAME_DIRECTION:
                continue
            mass = max(1.0, GRACE * threshold)
            self.sums_Kd[cluster], self.masses_K[cluster] = mass * feature_d, mass
            replaced.append(cluster)
        return replaced
