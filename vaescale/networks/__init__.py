"""q(z|x) bodies and decoders. To add one, write its file, add a line to NETWORKS and write a recipe.

The contract, an nn.Module built from (config, image_size, channels, encoder_out, out_channels), whose config has `kind` and
`latent_dim`:

    latent_shape                          (Z,) for a vector, (Z, h, w) for a map, with Z = config.latent_dim
    encode(x) -> [B, encoder_out, ...]    x [B, C, H, W] in [0, 1]; raw parameters of the posterior, mean first
    decode(z) -> [B, out_channels, H, W]  z [B, *latent_shape]; raw parameters of the likelihood

Those of HIERARCHICAL have groups instead; `ladder.LadderNetwork` says what they offer. Convolutions and norms come from
`layers.py`.
"""

from typing import TYPE_CHECKING, Any

from vaescale.config import Config, one_of
from vaescale.networks.conv import ConvConfig, ConvNetwork
from vaescale.networks.ladder import LadderConfig, LadderNetwork
from vaescale.networks.linear import LinearConfig, LinearNetwork
from vaescale.networks.resnet import ResnetConfig, ResnetNetwork

# kind -> (its recipe section, its module)
NETWORKS: dict[str, tuple[type[Config], Any]] = {
    "conv": (ConvConfig, ConvNetwork),
    "resnet": (ResnetConfig, ResnetNetwork),
    "ladder": (LadderConfig, LadderNetwork),
    "linear": (LinearConfig, LinearNetwork),
}
HIERARCHICAL = {"ladder"}

if TYPE_CHECKING:
    NetworkConfig = ConvConfig  # any of them: what all share is `kind` and `latent_dim`
else:
    NetworkConfig = one_of(config for config, _ in NETWORKS.values())
