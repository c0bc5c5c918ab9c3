"""A Gaussian mixture over latents: its density, its draws, and conversion to and from scikit-learn.

Legend: z [N, Z], K components, weights [K], means [K, Z], all float64. Covariances have scikit-learn's shapes:

    full [K, Z, Z]     one matrix for each component
    tied [Z, Z]        one matrix for all of them
    diag [K, Z]        one variance for each component and latent
    spherical [K]      one variance for each component
"""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vaescale import noise

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

Kind = Literal["full", "tied", "diag", "spherical"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Mixture(NamedTuple):
    """The mixture sum_k weights_k N(means_k, covariances_k)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor
    kind: Kind = "full"

    @property
    def num_parameters(self) -> int:
        """The number of free parameters in BIC: K - 1 weights, the means and the covariances."""
        components, size = self.means.shape
        matrix = size * (size + 1) // 2
        covariances = {"full": components * matrix, "tied": matrix, "diag": components * size}
        return components - 1 + components * size + covariances.get(self.kind, components)


def on(mixture: Mixture, device: torch.device) -> Mixture:
    """Move a mixture to a device."""
    weights, means, covariances = (tensor.to(device) for tensor in mixture[:3])
    return Mixture(weights, means, covariances, mixture.kind)


def log_density(mixture: Mixture, z: Tensor) -> Tensor:
    """Log density of z [N, Z] in nats, [N]."""
    return torch.logsumexp(log_joint(mixture, z), dim=1)


def log_joint(mixture: Mixture, z: Tensor) -> Tensor:
    """The log joint density log weight_k + log N(z_n; mean_k, covariance_k) in nats, [N, K]."""
    if mixture.kind in ("full", "tied"):
        factors = torch.linalg.cholesky(mixture.covariances)
        columns = []
        for number, mean in enumerate(mixture.means):
            factor = factors[number] if mixture.kind == "full" else factors
            whitened = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)
            columns.append(-factor.diagonal().log().sum() - 0.5 * whitened.square().sum(0))
        log_normal = torch.stack(columns, dim=1)
    else:
        deviations = diagonals(mixture).sqrt()
        log_normal = torch.stack(
            [
                -deviation.log().sum() - 0.5 * ((z - mean) / deviation).square().sum(1)
                for mean, deviation in zip(mixture.means, deviations, strict=True)
            ],
            dim=1,
        )
    return mixture.weights.log() + log_normal - 0.5 * z.shape[1] * math.log(2 * math.pi)


def diagonals(mixture: Mixture) -> Tensor:
    """The variance of each component along each latent, [K, Z]."""
    covariances, shape = mixture.covariances, mixture.means.shape
    if mixture.kind in ("full", "tied"):
        return covariances.diagonal(dim1=-2, dim2=-1).expand(shape)
    return covariances if mixture.kind == "diag" else covariances[:, None].expand(shape)


def sample(mixture: Mixture, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
    """Draws float32 [B, Z], one per slot: a function of (seed, step, slot) only.

    temperature: factor of the components' standard deviations. Memory: O(B Z + Z^2), for any number of components.
    """
    edges = mixture.weights.cumsum(0) / mixture.weights.sum()
    uniform = noise.uniform(stream, noise.MIXTURE, ()).double().to(edges.device)
    component = torch.searchsorted(edges, uniform, right=True).clamp_max(len(edges) - 1)
    white = noise.normal(stream, noise.PRIOR, (mixture.means.shape[1],)).to(edges)
    if mixture.kind == "full":
        coloured = torch.empty_like(white)
        for k in component.unique().tolist():  # type: ignore[no-untyped-call]
            rows = component == k
            factor = torch.linalg.cholesky(mixture.covariances[k])
            # A batch of matrix-vector products, not one product of matrices: a draw's bits must not depend on other draws.
            each = factor.expand(int(rows.sum()), *factor.shape)  # a view
            coloured[rows] = torch.einsum("nij,nj->ni", each, white[rows])
    elif mixture.kind == "tied":
        coloured = white @ torch.linalg.cholesky(mixture.covariances).T
    else:
        coloured = diagonals(mixture)[component].sqrt() * white
    return (mixture.means[component] + temperature * coloured).float().to(stream.slots.device)


def moments(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """The mean [Z] and covariance [Z, Z] of the whole mixture."""
    weights, means = mixture.weights, mixture.means
    mean = weights @ means
    if mixture.kind == "full":
        within = torch.einsum("k,kij->ij", weights, mixture.covariances)
    elif mixture.kind == "tied":
        within = mixture.covariances
    else:
        within = torch.diag(weights @ diagonals(mixture))
    centred = means - mean
    return mean, within + (weights[:, None] * centred).T @ centred


def to_scikit_learn(mixture: Mixture) -> "GaussianMixture":
    """The same mixture as a fitted scikit-learn GaussianMixture: score_samples, predict and sample work on it."""
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(len(mixture.weights), covariance_type=mixture.kind)
    model.weights_, model.means_ = mixture.weights.numpy(), mixture.means.numpy()
    model.covariances_ = mixture.covariances.numpy()
    if mixture.kind in ("full", "tied"):
        inverse = torch.linalg.inv(torch.linalg.cholesky(mixture.covariances))
        model.precisions_cholesky_ = inverse.mT.contiguous().numpy()
        model.precisions_ = (inverse.mT @ inverse).numpy()
    else:
        model.precisions_cholesky_ = mixture.covariances.rsqrt().numpy()
        model.precisions_ = mixture.covariances.reciprocal().numpy()
    model.converged_, model.n_iter_, model.n_features_in_ = True, 0, mixture.means.shape[1]
    return model


def from_scikit_learn(model: "GaussianMixture") -> Mixture:
    """Convert a fitted scikit-learn GaussianMixture to a Mixture with the same parameters."""
    parts = (model.weights_, model.means_, model.covariances_)
    weights, means, covariances = (torch.as_tensor(array, dtype=torch.float64) for array in parts)
    return Mixture(weights, means, covariances, model.covariance_type)
