"""The evidence lower bound and its family: the loss by keys of the recipe.

beta       -log p(x|z) + beta KL             Kingma & Welling 2014, eq. 3; Higgins et al. 2017, eq. 4
free_bits  -log p(x|z) + beta sum_j max(nats, E[KL_j])                   Kingma et al. 2016, eq. 15
capacity   -log p(x|z) + gamma |E[KL] - C|                               Burgess et al. 2018, eq. 8
balancing  -log p(x|z) + beta sum_g gamma_g KL_g                         Vahdat & Kautz 2020, appendix A
mmd        ... + lambda MMD(q(z), p(z)); with beta 0 the WAE             Tolstikhin et al. 2018, algorithm 2
dip        ... + lambda_od sum C_ij^2 + lambda_d sum (C_ii - 1)^2        Kumar et al. 2018, eq. 6 and 7
spectral   ... + lambda sum_i s_i, the layers' singular values           Vahdat & Kautz 2020, section 3.2
adversarial  ... + w g, a discriminator's judgement                      Esser et al. 2021, eq. 7; see adversarial.py
perceptual   ... + lambda d(x, E[x|z]) in the maps of a frozen network   Zhang et al. 2018, eq. 1; see perceptual/distance.py
equivariance   ... - lambda log p(Tx|Tz), T a scaling and rotation       Kouzelis et al. 2025, eq. 5
codes      ... + what a codebook adds: its distance from the encoder     van den Oord et al. 2017, eq. 3
"""

from torch import Tensor

from vaescale import noise
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.adversarial import AdversarialTerm, shown_in
from vaescale.objectives.config import ElboConfig
from vaescale.objectives.dip import dip
from vaescale.objectives.mmd import mmd
from vaescale.objectives.rates import (
    balanced,
    capacity,
    capacity_nats,
    free_bits,
    group_shares,
)
from vaescale.perceptual.distance import open_distance
from vaescale.schedules import Annealing, annealed


class Elbo:
    """The ELBO objective, as a rank's share; the mean over ranks is the loss of the global batch."""

    importance_samples = 0
    doubly_reparameterized = False

    def __init__(self, config: ElboConfig, model: VAE) -> None:
        self.config, self._alpha = config, group_shares(model.group_places)
        self._adversarial = AdversarialTerm(config.adversarial, model) if config.adversarial else None
        self.discriminators = self._adversarial.discriminators if self._adversarial else None
        self.distance = None
        if config.perceives:
            device = next(model.parameters()).device
            self.distance = open_distance(config.perceives, model.image_shape, device)

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [] in nats per image; and the terms mmd, spectral, equivariance, adversarial and perceptual without their
        weights, dip, and commitment_nats.
        """
        config, pieces = self.config, dict[str, Tensor]()
        nll = -terms.log_px.mean()
        if self.distance is not None and config.perceptual and stream.step >= config.perceptual.start_step:
            seen = shown_in(terms)
            pieces["perceptual"] = self.distance(seen.x, seen.reconstructed).mean()
            nll = nll + config.perceptual.weight * pieces["perceptual"]
        loss = self._rate(terms, stream.step) + nll
        if config.mmd:
            pieces["mmd"] = mmd(terms.z, stream, config.mmd)
            loss = loss + config.mmd.weight * pieces["mmd"]
        if config.dip:
            pieces["dip"] = dip(terms.mu, terms.log_sigma, config.dip)
            loss = loss + pieces["dip"]
        if config.spectral:
            pieces["spectral"] = terms.spectral.mean()
            loss = loss + config.spectral * pieces["spectral"]
        if config.transforms:
            pieces["equivariance"] = -terms.transformed_log_px.mean()
            loss = loss + config.transforms.weight * pieces["equivariance"]
        if terms.code_cost.ndim == 1:
            pieces["commitment_nats"] = terms.code_cost.mean()
            loss = loss + pieces["commitment_nats"]
        if self._adversarial and stream.step >= self._adversarial.config.start_step:
            term, judged = self._adversarial(terms, stream, nll)
            loss, pieces = loss + term, pieces | judged
        return loss, pieces

    def progress(self, step: int) -> dict[str, float]:
        """The value that changes over training, for the curves: beta or the capacity."""
        if self.config.capacity:
            return {"capacity_nats": capacity_nats(self.config.capacity, step)}
        return {"beta": annealed(self.config.beta, step)}

    def _rate(self, terms: Terms, step: int) -> Tensor:
        config, beta = self.config, annealed(self.config.beta, step)
        if config.capacity:
            return capacity(terms.kl, config.capacity, step)
        if config.free_bits:
            return beta * free_bits(terms.latent_kl, terms.kl, config.free_bits)
        if config.balancing == "always" or (
            config.balancing == "while_annealing" and self._is_annealing(step)
        ):
            self._alpha = self._alpha.to(terms.kl)  # moves to the device once
            return beta * balanced(terms.kl, self._alpha)
        return beta * terms.kl.sum(1).mean()

    def _is_annealing(self, step: int) -> bool:
        return isinstance(self.config.beta, Annealing) and step < self.config.beta.steps
