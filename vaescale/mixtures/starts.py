"""First mixtures for expectation-maximization: components around centres from k-means or drawn at random.

Every rank starts from the same mixture: rank 0 chooses the centres among latents that all ranks have.
"""

import warnings
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from vaescale import comm
from vaescale.mixtures.gaussian import Kind, Mixture

Start = Literal["kmeans", "random"]
STARTS: tuple[Start, ...] = get_args(Start)
ROWS, ROWS_A_COMPONENT = 20_000, 200  # minimum number of latents that a start uses
SEEDS = 1 << 32  # scikit-learn accepts no larger seed


class Rows(Protocol):
    """Latents with access by number on every rank. count: number of latents over all ranks."""

    count: int

    def rows(self, wanted: Tensor) -> Tensor:
        """The latents with these numbers (int64 [M], ascending), on every rank: float64 [M, Z]."""
        ...


class Clusters(NamedTuple):
    """Centres [K, Z], and the index of the nearest centre of each latent, int64 [M]."""

    centres: Tensor
    nearest: Tensor


def start(
    latents: Rows, num_components: int, *, kind: Kind, how: Start, seed: int, ridge: float | Tensor = 1e-6
) -> Mixture:
    """A first mixture, whose weights, means and covariances are those of the latents nearest to each centre.

    how: `kmeans` takes centres of scikit-learn's k-means from k-means++ (Arthur & Vassilvitskii 2007), `random` takes random
    latents as centres.
    """
    wanted = some(latents.count, max(ROWS, ROWS_A_COMPONENT * num_components), seed)
    z = latents.rows(wanted)
    find = _kmeans if how == "kmeans" else _random
    clusters = comm.on_main(lambda: find(z, num_components, seed))
    return from_clusters(z, clusters, kind=kind, ridge=ridge)


def some(count: int, most: int, seed: int) -> Tensor:
    """At most `most` of the numbers below `count`, ascending: all of them, or a draw without repetition."""
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.unique(
        torch.randint(count, (2 * most,), generator=generator)
    )  # not a permutation, whose memory grows with count
    kept: Tensor = drawn[torch.randperm(len(drawn), generator=generator)[:most]]
    return kept.sort().values


def from_clusters(z: Tensor, clusters: Clusters, *, kind: Kind, ridge: float | Tensor) -> Mixture:
    """The weights, means and covariances of z [M, Z] by cluster; a cluster of one latent gets the spread of all clusters."""
    components, size = len(clusters.centres), z.shape[1]
    shares = torch.nn.functional.one_hot(clusters.nearest, components).to(z)
    counts = shares.sum(0)
    means = torch.where(counts[:, None] > 0, (shares.T @ z) / counts.clamp_min(1)[:, None], clusters.centres)
    centred = z - means[clusters.nearest]
    spread = z.var(dim=0, correction=0)
    floor = torch.diag(torch.zeros(size, dtype=z.dtype) + ridge)
    if kind == "tied":
        covariances = centred.T @ centred / len(z) + floor
    elif kind == "full":
        pooled = torch.diag(spread)
        covariances = torch.stack(
            [
                ((rows := centred[clusters.nearest == number]).T @ rows + (pooled if len(rows) < 2 else 0.0))
                / max(1, len(rows))
                for number in range(components)
            ]
        )
        covariances = covariances + floor
    else:
        covariances = (shares.T @ centred.square()) / counts.clamp_min(1)[:, None]
        covariances = torch.where(counts[:, None] > 1, covariances, spread) + ridge
        covariances = covariances if kind == "diag" else covariances.mean(1)
    weights = counts.clamp_min(1) / counts.clamp_min(1).sum()
    return Mixture(weights, means, covariances, kind)


def _kmeans(z: Tensor, num_components: int, seed: int) -> Clusters:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: with more, the order of its sums, and so a borderline label, would depend on the number of cores.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than components: EM copes
        model = KMeans(num_components, n_init=1, random_state=seed % SEEDS).fit(z.float().numpy())
    return Clusters(torch.from_numpy(model.cluster_centers_).double(), torch.from_numpy(model.labels_).long())


def _random(z: Tensor, num_components: int, seed: int) -> Clusters:
    generator = torch.Generator().manual_seed(seed)
    centres = z[torch.randperm(len(z), generator=generator)[:num_components]]
    return Clusters(centres, torch.cdist(z, centres).argmin(1))
