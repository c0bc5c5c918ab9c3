"""The layers of SVG, the stochastic video model of Denton & Fergus 2018: a frame encoder and decoder, and LSTMs between them.

    h_t = enc(x_t)        g_t = LSTM_predictor(h_{t-1}, z_t)        params of x_t = dec(g_t, maps of the last frame given)      eq. 6
    q(z_t | x_1..t) from LSTM_posterior(h_t)        p(z_t | x_1..t-1) from LSTM_prior(h_{t-1}), or N(0, I)       sections 3.1, 3.2

Where all frames are known, each LSTM runs over the whole time in one call, and so do encoder and decoder over all frames.

Legend: N frames, of all sequences; B sequences; T steps of time; F features of a frame; Z latents of a step.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from vaescale.networks.config import Norm, SvgConfig
from vaescale.networks.convolutions import Conv2d
from vaescale.networks.layers import (
    conv,
    has_bias,
    nearest,
    norm,
    normed,
    refuse_indivisible,
    standardized,
)
from vaescale.networks.shared_maps import Beside, SharedConv2d, SharedConvTranspose2d

ACTIVATION = "leaky_relu"
State = tuple[Tensor, Tensor]
"""The hidden state and the cell of an LSTM, [layers, B, hidden] each."""


class SvgNetwork(nn.Module):
    """The network of `kind: svg`. Raises UserError when a frame cannot be halved once for each width."""

    def __init__(
        self,
        config: SvgConfig,
        *,
        image_size: tuple[int, int],
        channels: int,
        encoder_out: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        refuse_indivisible(
            image_size,
            1 << len(config.widths),
            f"cannot be halved {len(config.widths)} times as network.widths asks",
            "fewer widths",
        )
        self.context = config.context
        features, hidden = config.features, config.hidden
        self.encoder = FrameEncoder(config, image_size=image_size, channels=channels)
        self.posterior = Recurrent(features, hidden, encoder_out, layers=config.posterior_layers)
        self.prior: Recurrent | None = None
        if config.prior == "learned":
            self.prior = Recurrent(features, hidden, encoder_out, layers=config.prior_layers)
        self.predictor = Recurrent(
            features + config.latent_dim, hidden, features, layers=config.predictor_layers
        )
        self.decoder = FrameDecoder(config, image_size=image_size, out_channels=out_channels)

    @staticmethod
    def part_of(name: str) -> str:
        """The part, `encoder` or `decoder`, that a parameter of this name belongs to: q(z|x), or what generates."""
        return "encoder" if name.startswith(("encoder.", "posterior.")) else "decoder"

    @property
    def head_name(self) -> str:
        """The name of the layer that returns the likelihood's raw parameters."""
        return "decoder.head"

    def predicted(self, h: Tensor, z: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The features g [B, T, F] of frames, from those of the frames before them and their latents [B, T, Z]; and the next state."""
        g, state = self.predictor(torch.cat([h, z.to(h)], dim=2), state)
        return torch.tanh(g), state


class Recurrent(nn.Module):
    """A linear layer, an LSTM over time, and a linear layer."""

    def __init__(self, size: int, hidden: int, out: int, *, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(size, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, out)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map [B, T, size] to [B, T, out], from a state, zeros if None, to the next one."""
        embedded = self.embed(x)
        # In float32: the state is a sum over time, and torch's LSTM takes one type for state and input.
        with torch.autocast(x.device.type, enabled=False):
            hidden, after = self.lstm(embedded.to(self.lstm.weight_hh_l0), state)
        return self.out(hidden), after


class FrameEncoder(nn.Module):
    """A frame to its features, in (-1, 1), and its map before each halving or, of dcgan, after it."""

    def __init__(self, config: SvgConfig, *, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self._standardize, self._pools = config.standardize, config.backbone == "vgg"
        size, blocks = list(image_size), []
        for number, width in enumerate(config.widths):
            halved = [side // 2 for side in size]
            if self._pools:
                blocks.append(_vgg(channels, width, config.norm, size, number))
            else:
                blocks.append(
                    _block(conv(channels, width, 4, stride=2, before=config.norm), config.norm, halved)
                )
            size, channels = halved, width
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(channels * math.prod(size), config.features, bias=has_bias(config.norm))
        self.norm = norm(config.norm, config.features, places=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features [N, F] and the maps [N, W, S, S'], one for each width, of frames [N, C, H, W] in [0, 1]."""
        inner, maps = standardized(x, self._standardize), []
        for block in self.blocks:
            inner = block(inner)
            maps.append(inner)
            if self._pools:
                inner = max_pool2d(inner, 2)
        return torch.tanh(self.norm(self.last(inner.flatten(1)))), maps


class FrameDecoder(nn.Module):
    """Features, and the maps of a frame that was given, to the likelihood's raw parameters of a frame."""

    def __init__(self, config: SvgConfig, *, image_size: tuple[int, int], out_channels: int) -> None:
        super().__init__()
        kind, widths = config.norm, config.widths
        self._pools = config.backbone == "vgg"
        size = [side >> len(widths) for side in image_size]
        self._start = (widths[-1], *size)
        start = math.prod(self._start)
        self.first = nn.Linear(config.features, start, bias=has_bias(kind))
        self.first_norm = nn.Sequential(*normed(kind, widths[-1], ACTIVATION, places=math.prod(size)))
        blocks: list[nn.Module] = []
        for number in range(len(widths) - 1, -1, -1):
            size = [2 * side for side in size]
            width, below = widths[number], widths[max(0, number - 1)]
            if self._pools:
                blocks.append(_vgg(2 * width, below, kind, size, number, inner=width, first=SharedConv2d))
            elif number:
                blocks.append(_block(_shared_deconv(2 * width, below, kind), kind, size))
        self.blocks = nn.ModuleList(blocks)
        first = widths[0]
        self.head = (
            conv(first, out_channels, 3) if self._pools else _shared_deconv(2 * first, out_channels, "none")
        )

    def forward(self, g: Tensor, maps: list[Tensor]) -> Tensor:
        """The raw parameters [B K, S, out_channels, H, W] of features [B K, S, F] of the steps of K draws for each sequence.

        maps: those of `FrameEncoder`, [B, c, W, ...] for each width, of the frames that are given; step s has number min(s, c - 1).
        """
        steps = g.shape[1]
        inner = self.first_norm(self.first(g.flatten(0, 1)).view(-1, *self._start))
        for block, skip in zip(self.blocks, reversed(maps), strict=False):
            inner = block(nearest(inner, 2) if self._pools else inner, skip, steps)
        params: Tensor = self.head(inner) if self._pools else self.head(inner, maps[0], steps)
        return params.view(-1, steps, *params.shape[1:])


def _block(layer: nn.Conv2d | nn.ConvTranspose2d, kind: Norm, size: list[int]) -> nn.Sequential:
    return Beside(layer, *normed(kind, layer.out_channels, ACTIVATION, places=math.prod(size)))


def _shared_deconv(channels: int, width: int, kind: Norm) -> SharedConvTranspose2d:
    return SharedConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=has_bias(kind))


def _vgg(
    channels: int,
    width: int,
    kind: Norm,
    size: list[int],
    number: int,
    *,
    inner: int | None = None,
    first: type[nn.Conv2d] = Conv2d,
) -> nn.Sequential:
    """3x3 convolutions to `width` channels, through `inner` channels if given, at the resolution of this number, 0 for the frame's own.

    first: the class of the first one.
    """
    widths = [*([inner or width] * (1 if number < 2 else 2)), width]
    blocks: list[nn.Module] = []
    before = channels
    for other in widths:
        layer = (first if not blocks else Conv2d)(before, other, 3, padding=1, bias=has_bias(kind))
        blocks.append(_block(layer, kind, size))
        before = other
    return Beside(*blocks)
