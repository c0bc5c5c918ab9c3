"""A Gaussian mixture with full covariances, fitted by expectation-maximization. Dempster, Laird & Rubin 1977.

Legend: z [N, Z], K components, weights [K], means [K, Z], covariances [K, Z, Z]; float64 throughout.
Start: k-means from k-means++ centres (Arthur & Vassilvitskii 2007), scikit-learn's.
"""

import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from vaescale.errors import UserError
from vaescale.files import write_whole

FORMAT = {"format": "vaescale-gmm", "version": 1, "covariance": "full"}


class Mixture(NamedTuple):
    """Weights [K], means [K, Z], covariances [K, Z, Z], float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


def fit(
    z: Tensor,
    num_components: int,
    *,
    seed: int,
    ridge: float = 1e-6,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> tuple[Mixture, list[float]]:
    """Fit a mixture to z [N, Z]. Returns it with the mean log-likelihood in nats before each iteration.

    ridge: added to the covariances' diagonals. Stops when an iteration gains less than `tolerance` nats.
    Raises UserError when there are fewer points than components or when the points are constant.
    """
    if len(z) < num_components:
        raise UserError(f"{len(z)} latents cannot feed {num_components} components; lower --components")
    if (z.var(dim=0) < 1e-12).all():
        raise UserError("the latents are constant: the posterior has collapsed and there is nothing to fit")
    mixture = _maximization(z, _kmeans(z, num_components, seed), ridge)
    history: list[float] = []
    for _ in range(max_iterations):
        joint = _log_joint(mixture, z)
        evidence = torch.logsumexp(joint, dim=1)
        history.append(float(evidence.mean()))
        if len(history) > 1 and history[-1] - history[-2] < tolerance:
            break
        responsibilities = torch.exp(joint - evidence[:, None])
        # Denormal numbers make the products that follow many times slower and change nothing.
        mixture = _maximization(z, torch.where(responsibilities > 1e-100, responsibilities, 0.0), ridge)
    return mixture, history


def log_density(mixture: Mixture, z: Tensor) -> Tensor:
    """Log density of z [N, Z] in nats, [N]."""
    return torch.logsumexp(_log_joint(mixture, z), dim=1)


def standard_normal_log_density(z: Tensor) -> Tensor:
    """Log density of N(0, I) at z [N, Z] in nats, [N]."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)


def save(mixture: Mixture, folder: Path, details: dict[str, object]) -> None:
    """Write mixture.safetensors and mixture.json to `folder`."""
    tensors = to_bytes({name: value.contiguous() for name, value in mixture._asdict().items()})
    write_whole(folder / "mixture.safetensors", tensors)
    write_whole(folder / "mixture.json", (json.dumps({**FORMAT, **details}, indent=1) + "\n").encode())


def load(folder: Path) -> Mixture:
    """The mixture in `folder`. Raises UserError when there is none or it is not a mixture."""
    if not (folder / "mixture.json").is_file():
        raise UserError(f"{folder} holds no fitted mixture; fit one with `vaescale fit-gmm {folder.parent}`")
    try:
        details = dict(json.loads((folder / "mixture.json").read_text()))
        tensors = load_file(folder / "mixture.safetensors")
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise UserError(
            f"the mixture in {folder} is damaged ({error}); fit it again with `vaescale fit-gmm`"
        ) from error
    if any(details.get(key) != value for key, value in FORMAT.items()) or set(tensors) != set(
        Mixture._fields
    ):
        raise UserError(f"{folder} holds no mixture of this version; fit it again with `vaescale fit-gmm`")
    return Mixture(**tensors)


def _log_joint(mixture: Mixture, z: Tensor) -> Tensor:
    """log weight_k + log N(z_n; mean_k, covariance_k), [N, K]."""
    cholesky = torch.linalg.cholesky(mixture.covariances)
    columns = []
    for weight, mean, factor in zip(mixture.weights, mixture.means, cholesky, strict=True):
        whitened = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)
        log_det = factor.diagonal().log().sum()
        columns.append(weight.log() - log_det - 0.5 * whitened.square().sum(0))
    return torch.stack(columns, dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def _maximization(z: Tensor, responsibilities: Tensor, ridge: float) -> Mixture:
    counts = responsibilities.sum(0) + 10 * torch.finfo(z.dtype).eps
    means = (responsibilities.T @ z) / counts[:, None]
    identity = torch.eye(z.shape[1], dtype=z.dtype)
    covariances = []
    for column, mean, count in zip(responsibilities.T, means, counts, strict=True):
        centred = z - mean
        covariances.append((centred * column[:, None]).T @ centred / count + ridge * identity)
    return Mixture(counts / counts.sum(), means, torch.stack(covariances))


def _kmeans(z: Tensor, num_components: int, seed: int) -> Tensor:
    """Responsibilities [N, K] of zeros and ones: the best of four k-means runs."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than components: EM copes
        labels = KMeans(num_components, n_init=4, random_state=seed).fit(z.numpy()).labels_
    return torch.nn.functional.one_hot(torch.from_numpy(labels).long(), num_components).to(z)
