"""The negative ELBO and its beta-weighted form. Kingma & Welling 2014, eq. 3; Higgins et al. 2017, eq. 4."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from vaescale.config import Config
from vaescale.models.vae import Terms


class ElboConfig(Config):
    """-log p(x|z) + beta KL."""

    kind: Literal["elbo"] = "elbo"
    beta: float = Field(default=1.0, ge=0)


def elbo_loss(terms: Terms, *, beta: float) -> Tensor:
    """-E_q[log p(x|z)] + beta KL(q(z|x) || p(z)) in nats, averaged over the batch. Returns []."""
    return (beta * terms.kl.sum(dim=1) - terms.log_px).mean()
