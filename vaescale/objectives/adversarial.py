"""A discriminator's judgement of reconstructions, added to the ELBO under any likelihood. Esser et al. 2021 (VQGAN), eq. 7; Rombach et al. 2022.

    ... + w g,    g = E[-d(G(E(x)))] with the hinge loss                       w = weight, or, adaptive,
    w = weight clamp(|grad nll| / (|grad g| + 1e-4), 0, 1e4)                   nll = E[-log p(x|z)], and a perceptual term

Gradients are those of the decoder's last layer, and their means over the global batch: the norms of the mean gradients, not the mean of the
ranks' norms, so that w is the same number on any number of ranks. With training.accumulation they are the micro-batch's.

Read in the authors' code (github.com/CompVis/taming-transformers), with these differences: there the discriminator's loss has a factor 1/2, the
discriminator sees reconstructions of the updated autoencoder, nll is a mean over values (here nats per image under the likelihood), and the
loss `vanilla` keeps g = -d. The other losses' g is in `adversaries/losses.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.adversaries import losses
from vaescale.adversaries.config import AdversarialConfig, PlayerConfig
from vaescale.adversaries.discriminators import Discriminators, Match
from vaescale.errors import UserError
from vaescale.models.shown import Shown
from vaescale.models.vae import VAE, Terms

OFFSET, LARGEST = 1e-4, 1e4
MATCH = Match(data=("x",), fakes=(("reconstructed",),))


class AdversarialTerm:
    """The term and its discriminator. Raises UserError where the adaptive weight has no last layer to read."""

    def __init__(self, config: AdversarialConfig, model: VAE) -> None:
        self.config = config
        self.discriminators = of_model(config, {"image": MATCH}, model)
        self._last: Tensor | None = None
        if config.adaptive:
            self._last = model.network.get_submodule(model.network.head_name).weight
            if not self._last.requires_grad:
                raise UserError(
                    "objective.adversarial.adaptive reads the gradient of the decoder's last layer, which network.freeze takes away; "
                    "set it to false"
                )

    def __call__(self, terms: Terms, stream: noise.Stream, nll: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted term [] of a rank's images, and the pieces adversarial, g, and adversarial_weight, w. nll []: of these images."""
        (logits,) = self.discriminators.logits("image", MATCH.fakes, shown_in(terms), stream)
        g = losses.fooling(self.config.loss, logits)
        weight = g.new_tensor(self.config.weight)
        if self._last is not None:
            weight = weight * balance(nll, g, self._last)
        return weight * g, {"adversarial": g, "adversarial_weight": weight}


def of_model(config: PlayerConfig, matches: Mapping[str, Match], model: VAE) -> Discriminators:
    """The discriminators of a model's images and latents, on its device."""
    discriminators = Discriminators(
        config, matches, image_shape=model.image_shape, latent_dim=model.latent_dim
    )
    return discriminators.to(next(model.parameters()).device)


def shown_in(terms: Terms) -> Shown:
    """What the model showed in training, if it was built with it."""
    assert isinstance(terms.shown, Shown)
    return terms.shown


def balance(nll: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """clamp(|grad nll| / (|grad g| + 1e-4), 0, 1e4) of the global batch, float32 []. nll, g []: this rank's means; weight: of the last layer.

    One all-reduce of two gradients of the weight. The graph stays for the backward pass.
    """
    gradients = [torch.autograd.grad(term, weight, retain_graph=True)[0].flatten() for term in (nll, g)]
    means = comm.all_reduce_sum(torch.cat(gradients)).chunk(2)
    of_nll, of_g = (mean.norm() / comm.world_size() for mean in means)
    ratio: Tensor = of_nll / (of_g + OFFSET)
    return ratio.clamp(0, LARGEST).float()
