"""VAE-GAN: reconstruction errors in a discriminator's features, and adversarial images. Larsen et al. 2016 (1512.09300), algorithm 1.

L_llike = 1/2 |D_l(x) - D_l(G(E(x)))|^2, a Gaussian with variance 1 on the features D_l of a layer, without its constant
L_D     = f+(d(x)) + f-(d(G(z_p))) + f-(d(G(E(x))))

E  minimizes  KL + L_llike
G  minimizes  gamma L_llike + f+(d(G(z_p))) + f+(d(G(E(x)))), or with loss: vanilla gamma L_llike - L_D
D  minimizes  L_D, whose features carry no gradient from L_llike

No adversarial gradient reaches E: G(sg E(x)) is decoded for it, and L_llike is weighted as L_llike(E, G) + (gamma - 1) L_llike(sg E, G). Who
minimizes what was read in the paper; the signs of its algorithm are inconsistent, and the non-saturating form is the usual reading of its text.
p(x|z) of images is no part of the objective, so there is no bound on log p(x).
"""

from torch import Tensor

from vaescale import noise
from vaescale.adversaries import losses
from vaescale.adversaries.discriminators import Match
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.adversarial import of_model, shown_in
from vaescale.objectives.config import VaeGanConfig

IMAGES = Match(data=("x",), fakes=(("held",), ("generated",)))


class VaeGan:
    """The VAE-GAN objective, as a rank's share; the mean over ranks is the loss of the global batch."""

    importance_samples = 0
    doubly_reparameterized = False

    def __init__(self, config: VaeGanConfig, model: VAE) -> None:
        self.config = config
        self.discriminators = of_model(config.discriminator, {"image": IMAGES}, model)

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [] in nats per image; and feature_error, L_llike, and adversarial, the sum over both kinds of fakes."""
        shown, gamma = shown_in(terms), self.config.gamma
        of_x, of_reconstructed, of_held = self.discriminators.features(
            (shown.x, shown.reconstructed, shown.held)
        )
        error, held_error = (
            0.5 * (of_x - other).square().sum(1).mean() for other in (of_reconstructed, of_held)
        )
        loss = terms.kl.sum(1).mean() + error + (gamma - 1) * held_error
        fakes = self.discriminators.logits("image", IMAGES.fakes, shown, stream)
        game = sum(
            (losses.fooling(self.config.discriminator.loss, fake) for fake in fakes), loss.new_zeros(())
        )
        return loss + game, {"feature_error": error, "adversarial": game}

    def progress(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Empty, because no value changes over training."""
        return {}
