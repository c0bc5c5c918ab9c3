#!/usr/bin/env bash
# pythae 0.1.2
# Expected: with use_mss, BetaTCVAE weights a sample's own posterior, on the diagonal, by 1/N (Chen et al. 2018,
#           appendix C), so that latents that identify the image have a mutual information of log N.
# Seen: 1/N is written into the first column. A sample's own posterior gets 1/(batch - 1), and the mutual information is
#       that of a data set as small as the batch: 4.7 nats in place of 11.0 for N = 60,000 in batches of 100.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 pythae==0.1.2 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import math

import torch
from pythae.models import BetaTCVAE, BetaTCVAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder


class NarrowEncoder(BaseEncoder):
    def forward(self, x):
        return ModelOutput(embedding=x, log_covariance=torch.full_like(x, -10.0))


class IdentityDecoder(BaseDecoder):
    def forward(self, z):
        return ModelOutput(reconstruction=z)


images, batch = 60_000, 100
x = 100 * torch.arange(batch).float().reshape(batch, 1)  # posteriors that do not overlap
only_information = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0, "use_mss": True}
config = BetaTCVAEConfig(input_dim=(1,), latent_dim=1, **only_information)
model = BetaTCVAE(config, NarrowEncoder(), IdentityDecoder())
torch.manual_seed(0)
information = model({"data": x}, dataset_size=images).reg_loss.item()
print(f"mutual information {information:.2f} nats; log N {math.log(images):.2f}, log(batch - 1) {math.log(batch - 1):.2f}")
expected_if_unchanged = ((batch - 1) * math.log(batch - 1) + math.log(images)) / batch
assert abs(information - expected_if_unchanged) < 0.2, "the behaviour changed"
PYTHON
