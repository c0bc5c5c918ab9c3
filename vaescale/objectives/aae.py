"""The adversarial autoencoder: a discriminator of latents draws the aggregate posterior to the prior. Makhzani et al. 2015 (1511.05644).

E, G   minimize  E[-log p(x|z)] + a f+(c(E(x)))
C      minimizes f+(c(z_p)) + f-(c(sg E(x)))

with f+(u) = -log sigmoid(u) and f-(u) = -log sigmoid(-u). There is no KL in the loss. E is deterministic or Gaussian (section 2), here
`posterior.kind`: fixed with a small sigma, or diagonal. Read in the paper; there the two losses are minimized in turn ("phases"), here in one
step, from the same weights. The reported bounds are bounds of the model, which the loss does not minimize, as with the WAE.
"""

from torch import Tensor

from vaescale import noise
from vaescale.adversaries import losses
from vaescale.adversaries.discriminators import Match
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.adversarial import of_model, shown_in
from vaescale.objectives.config import AaeConfig

LATENTS = Match(data=("prior_z",), fakes=(("z",),))


class Aae:
    """The adversarial autoencoder's objective, as a rank's share; the mean over ranks is the loss of the global batch."""

    importance_samples = 0
    doubly_reparameterized = False

    def __init__(self, config: AaeConfig, model: VAE) -> None:
        self.config = config
        self.discriminators = of_model(config.discriminator, {"latent": LATENTS}, model)

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [] in nats per image; and latent_adversarial, f+(c(E(x))), without its weight a."""
        loss = -terms.log_px.mean()
        if stream.step < self.config.discriminator.start_step:
            return loss, {}
        (logits,) = self.discriminators.logits("latent", LATENTS.fakes, shown_in(terms), stream)
        term = losses.fooling(self.config.discriminator.loss, logits)
        return loss + self.config.weight * term, {"latent_adversarial": term}

    def progress(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Empty, because no value changes over training."""
        return {}
