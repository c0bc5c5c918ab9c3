"""Where z comes from when a model is sampled otherwise than from its prior: a fitted mixture, a function of (seed, number) alone."""

import torch
from torch import Tensor

from vaescale import noise
from vaescale.aggregate.gmm import Mixture


def sample_mixture(stream: noise.Stream, mixture: Mixture) -> Tensor:
    """Draws from the mixture, float32 [B, Z], one a slot."""
    edges = mixture.weights.cumsum(0) / mixture.weights.sum()
    place = noise.uniform(stream, noise.MIXTURE, ()).double().cpu()
    component = torch.searchsorted(edges, place, right=True).clamp_max(len(edges) - 1)
    white = noise.normal(stream, noise.PRIOR, (mixture.means.shape[1],)).double().cpu()
    factor = torch.linalg.cholesky(mixture.covariances)[component]
    z = mixture.means[component] + torch.einsum("nij,nj->ni", factor, white)
    return z.float().to(stream.slots.device)
