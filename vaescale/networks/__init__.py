"""q(z|x) bodies and decoders. To add one, write its file, add a line to NETWORKS and write a recipe.

The contract, an nn.Module built from (config, image_size, channels, out_channels):

    encode(x) -> [B, 2 * latent_dim]                 x [B, C, H, W] in [0, 1]; raw parameters of the posterior
    decode(z) -> [B, out_channels, H, W]             z [B, latent_dim]; raw parameters of the likelihood
"""

from typing import TYPE_CHECKING

from vaescale.config import one_of
from vaescale.networks.conv import ConvConfig, ConvNetwork
from vaescale.networks.linear import LinearConfig, LinearNetwork

# kind -> (its recipe section, its module)
NETWORKS = {"conv": (ConvConfig, ConvNetwork), "linear": (LinearConfig, LinearNetwork)}

if TYPE_CHECKING:
    NetworkConfig = ConvConfig  # any of them: what all share is `kind` and `latent_dim`
else:
    NetworkConfig = one_of(config for config, _ in NETWORKS.values())
