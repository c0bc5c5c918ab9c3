"""alpha-GAN: discriminators in place of both densities of a VAE. Rosca et al. 2017 (1706.04987), algorithm 1.

E, G  minimize   lambda |x - G(E(x))| + f+(c(E(x))) + f+(d(G(E(x)))) + f+(d(G(z_p)))
C     minimizes  f+(c(z_p)) + f-(c(sg E(x)))
D     minimizes  f+(d(x)) + f-(d(G(E(x)))) + f-(d(G(z_p)))

|.| is the mean over an image's values, and one optimizer has E and G: both read in the code of github.com/victor-shepardson/alpha-GAN, which
takes the mean of d over the two kinds of fakes, here the sum, as the paper's algorithm has it. That code updates E and G twice for each update
of D and C (`every: 2`), with lambda 10 for CIFAR-10.

prior_samples: false leaves G(z_p) out of the last terms of E, G and D. The two are our reading of the hybrids VGH++ (with) and VGH (without) of
Rosca, Lakshminarayanan & Mohamed 2018 (1802.06847): identified by the names, inferred in the formulas, no reproduction.
There is no density of images in the objective, so there is no bound on log p(x).
"""

from torch import Tensor

from vaescale import noise
from vaescale.adversaries import losses
from vaescale.adversaries.discriminators import Match
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.aae import LATENTS
from vaescale.objectives.adversarial import of_model, shown_in
from vaescale.objectives.config import AlphaGanConfig


class AlphaGan:
    """The alpha-GAN objective, as a rank's share; the mean over ranks is the loss of the global batch."""

    importance_samples = 0
    doubly_reparameterized = False

    def __init__(self, config: AlphaGanConfig, model: VAE) -> None:
        generated = (("generated",),) if config.prior_samples else ()
        self.config, self._images = config, Match(("x",), (("reconstructed",), *generated))
        matches = {"latent": LATENTS, "image": self._images}
        self.discriminators = of_model(config.discriminator, matches, model)

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss []; and absolute_error, a mean over values, latent_adversarial, and adversarial, the sum over the kinds of fakes."""
        shown, loss = shown_in(terms), self.config.discriminator.loss
        error = (shown.x - shown.reconstructed).abs().mean()
        (codes,) = self.discriminators.logits("latent", LATENTS.fakes, shown, stream)
        of_codes = losses.fooling(loss, codes)
        fakes = self.discriminators.logits("image", self._images.fakes, shown, stream)
        game = sum((losses.fooling(loss, fake) for fake in fakes), error.new_zeros(()))
        pieces = {"absolute_error": error, "latent_adversarial": of_codes, "adversarial": game}
        return self.config.reconstruction * error + of_codes + game, pieces

    def progress(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Empty, because no value changes over training."""
        return {}
