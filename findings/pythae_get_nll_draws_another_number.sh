#!/usr/bin/env bash
# pythae 0.1.2
# Expected: VAE.get_nll(x, n_samples=1) returns a negative log-likelihood estimated with one draw from q(z|x).
# Seen: it returns a log-likelihood (the other sign), and the number of draws is a multiple of batch_size: 100 for
#       n_samples=1 and 200 for n_samples=250. A bound with one draw is thus reported as one with 100.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 pythae==0.1.2 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder


class StandardNormalEncoder(BaseEncoder):
    def forward(self, x):
        return ModelOutput(embedding=torch.zeros(len(x), 1), log_covariance=torch.zeros(len(x), 1))


class CountingIdentityDecoder(BaseDecoder):
    draws = 0

    def forward(self, z):
        self.draws += len(z)
        return ModelOutput(reconstruction=z)


torch.manual_seed(0)
x = torch.full((1, 1), 2.0)
exact = -torch.distributions.Normal(0.0, 2**0.5).log_prob(x).item()  # p(x) = N(0, 1 + 1)
draws = {}
for requested in (1, 250):
    decoder = CountingIdentityDecoder()
    model = VAE(VAEConfig(input_dim=(1,), latent_dim=1), StandardNormalEncoder(), decoder)
    nll = model.get_nll(x, n_samples=requested)
    draws[requested] = decoder.draws
    print(f"n_samples={requested}: {decoder.draws} draws, get_nll {nll:.2f}; exact negative log-likelihood {exact:.2f}")
    assert nll < 0 < exact, "the behaviour changed"
assert draws == {1: 100, 250: 200}, "the behaviour changed"
PYTHON
