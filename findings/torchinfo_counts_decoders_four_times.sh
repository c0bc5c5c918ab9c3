#!/usr/bin/env bash
# torchinfo 1.8.0 and thop 0.1.1.post2209072238, multiplications of transposed convolutions (decoders of VAEs and GANs)
# Expected: a transposed convolution costs what the convolution that it transposes costs: k*k*C_in*C_out for each pixel of its *input*.
# Seen: both count k*k*C_in*C_out for each pixel of the output, so a layer with stride 2 counts four times. A count of all products, from a
#       weight of ones, gives 0.94 of the first number (borders are cropped); torch's own FlopCounterMode and fvcore agree with that.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchinfo==1.8.0 fvcore==0.1.5.post20221221
venv/bin/pip install --quiet --disable-pip-version-check --no-deps thop==0.1.1.post2209072238

cat > count.py <<'PYTHON'
import sys
import warnings

import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("ignore")
import thop  # noqa: E402


def counts(layer: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Products of values and weights by each counter, before thop adds its own buffers to the layer."""
    with FlopCounterMode(display=False) as counter:
        layer(x)
    found = {"torch": counter.get_total_flops() / 2, "fvcore": FlopCountAnalysis(layer, x).unsupported_ops_warnings(False).total()}
    found["torchinfo"] = torchinfo.summary(layer, input_data=x, verbose=0).total_mult_adds
    found["thop"] = thop.profile(layer, (x,), verbose=False)[0]
    return found


down = nn.Conv2d(4, 8, 4, stride=2, padding=1, bias=False)
up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, bias=False)
with torch.no_grad():
    ones = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, bias=False)
    ones.weight.fill_(1.0)
    products = ones(torch.ones(1, 8, 16, 16)).sum().item()  # each output counts the products that it sums
forward, transposed = counts(down, torch.rand(1, 4, 32, 32)), counts(up, torch.rand(1, 8, 16, 16))
print("convolution 32x32 to 16x16:", forward)
print("its transpose 16x16 to 32x32:", transposed, "products:", products)
same = all(transposed[name] == forward[name] for name in ("torch", "fvcore"))
fourfold = all(transposed[name] == 4 * forward[name] for name in ("torchinfo", "thop"))
sys.exit(0 if same and fourfold and 0.9 < products / transposed["torch"] < 1 else 1)
PYTHON
venv/bin/python count.py
