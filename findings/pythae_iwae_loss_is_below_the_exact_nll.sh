#!/usr/bin/env bash
# pythae 0.1.2
# Expected: the loss of IWAE is the importance-weighted bound, never below the exact negative log-likelihood on average.
# Seen: it is the mean of log w under the normalized weights. Its gradient is that of the bound; its value is lower, by
#       up to log(number_samples), and can be below the exact value. It does not compare with an ELBO.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 pythae==0.1.2 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import math

import torch
from pythae.models import IWAE, IWAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder


class StandardNormalEncoder(BaseEncoder):
    def forward(self, x):
        return ModelOutput(embedding=torch.zeros(len(x), 1), log_covariance=torch.zeros(len(x), 1))


class IdentityDecoder(BaseDecoder):
    def forward(self, z):
        return ModelOutput(reconstruction=z)


torch.manual_seed(0)
config = IWAEConfig(input_dim=(1,), latent_dim=1, number_samples=50)
model = IWAE(config, StandardNormalEncoder(), IdentityDecoder())
x = torch.full((20_000, 1), 2.0)
loss = model({"data": x}).loss.item() + 0.5 * math.log(2 * math.pi)  # pythae leaves the Gaussian's constant out
log_weights = torch.distributions.Normal(torch.randn(20_000, 50), 1.0).log_prob(x)  # q is the prior: w = p(x|z)
bound = (math.log(50) - log_weights.logsumexp(1)).mean().item()
exact = -torch.distributions.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()  # p(x) = N(0, 1 + 1)
print(f"pythae's loss {loss:.3f}, the bound {bound:.3f}, exact negative log-likelihood {exact:.3f}")
assert bound > exact
assert loss < exact - 0.3, "the behaviour changed"
PYTHON
