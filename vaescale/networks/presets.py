"""Published convolutional networks as tables of their layers, from each paper or its authors' code.

A layer is (width, kernel, stride); `hidden` are fully connected layers between the maps and z. A stride of 2 halves the map
in the encoder and doubles it in the decoder, whose last convolution, to the image, is `last`.
"""

from typing import NamedTuple

Layer = tuple[int, int, int]


class Preset(NamedTuple):
    """A published network. encoder, decoder: convolutions with norm and activation; the decoder uses `hidden` in reverse."""

    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    last: tuple[int, int]  # kernel and stride of the convolution to the raw parameters
    hidden: tuple[int, ...] = ()
    norm: str = "none"
    first_norm: bool = True  # a norm after the encoder's first convolution
    start_norm: bool = False  # a norm on the first map of the decoder
    start_activation: bool = True
    activation: str = "relu"
    decoder_activation: str = "relu"
    spectral: bool = False  # spectral normalization of the encoder


PRESETS = {
    # Rybkin, Daniilidis & Levine 2021, the network of the authors' PyTorch code (there for 28x28 images and 20 latents).
    "sigma_vae_svhn": Preset(
        encoder=((32, 3, 1), (64, 4, 2), (128, 5, 2)),
        decoder=((64, 6, 2), (32, 6, 2)),
        last=(5, 1),
        start_activation=False,
    ),
    # Tolstikhin et al. 2018, appendix C.2 (64 latents at 64x64). Ghosh et al. 2020 have it without the ReLU at the start
    # of the decoder.
    "wae_celeba": Preset(
        encoder=((128, 5, 2), (256, 5, 2), (512, 5, 2), (1024, 5, 2)),
        decoder=((512, 5, 2), (256, 5, 2), (128, 5, 2)),
        last=(5, 1),
        norm="batch",
    ),
    # Chen et al. 2016, appendix C.1, as Dai & Wipf 2019 take it for all data sets, with their encoder's spectral norm.
    "infogan": Preset(
        encoder=((64, 4, 2), (128, 4, 2)),
        decoder=((64, 4, 2),),
        last=(4, 2),
        hidden=(1024,),
        norm="batch",
        first_norm=False,
        start_norm=True,
        activation="leaky_relu",
        spectral=True,
    ),
}
