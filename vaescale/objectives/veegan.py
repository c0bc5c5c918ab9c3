"""VEEGAN: one discriminator of pairs of latents and images, and a reconstructor of latents. Srivastava et al. 2017 (1705.07761), algorithm 1.

z ~ p, x_g = G(z);    x ~ data, z_g ~ F(x)             F is the encoder, here named E elsewhere; G is the decoder's mean
D  minimizes  f+(j(z, x_g)) + f-(j(z_g, x))
F  minimizes  |z - F(x_g)|^2
G  minimizes  j(z, x_g) + |z - F(x_g)|^2

Read in the paper. F and G have one loss here, which is the same: F is no part of j(z, x_g). Inferred: F(x_g) in the squared distance is the mean of
q(z|x_g), and z_g a draw. There is no loss on images, so there is no bound on log p(x); the mean squared error of reconstructions is measured only.
"""

from torch import Tensor

from vaescale import noise
from vaescale.adversaries.discriminators import Match
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.adversarial import of_model, shown_in
from vaescale.objectives.config import VeeganConfig

PAIRS = Match(data=("prior_z", "generated"), fakes=(("z", "x"),))


class Veegan:
    """The VEEGAN objective, as a rank's share; the mean over ranks is the loss of the global batch."""

    importance_samples = 0
    doubly_reparameterized = False

    def __init__(self, config: VeeganConfig, model: VAE) -> None:
        self.discriminators = of_model(config.discriminator, {"pair": PAIRS}, model)

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss []; and latent_error, |z - F(G(z))|^2 summed over latents, and adversarial, j(z, G(z))."""
        shown = shown_in(terms)
        error = (shown.prior_z - shown.recovered).square().sum(1).mean()
        (logits,) = self.discriminators.logits("pair", (PAIRS.data,), shown, stream)
        game = logits.mean()
        return error + game, {"latent_error": error, "adversarial": game}

    def progress(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Empty, because no value changes over training."""
        return {}
