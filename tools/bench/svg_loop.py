"""SVG as a plain loop over time, in torch's own layers: what `sequences.py` compares with.

As in the code that Denton & Fergus published, each step of time calls the frame encoder, each layer of each LSTM as a cell, and the frame
decoder. The parameters have the names of `networks/svg.py`, dcgan with group normalization, so that both networks load the same weights.

Legend: B sequences; T frames; Z latents of a step; F features of a frame.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from vaescale.networks.config import SvgConfig
from vaescale.networks.svg import SvgNetwork

SLOPE = 0.2
BOUND = 8.0  # of log sigma, as in `models/posterior.py`
State = list[tuple[Tensor, Tensor]]


class Cells(nn.Module):
    """A linear layer, LSTM cells above each other, and a linear layer; one step of time a call."""

    def __init__(self, size: int, hidden: int, out: int, *, layers: int) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(size, hidden), nn.Linear(hidden, out)
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(layers))
        self.state: State = []

    def forget(self) -> None:
        """Begin a new sequence."""
        self.state = [(None, None)] * len(self.cells)  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, size] to [B, out] and go on by a step of time."""
        inner = self.embed(x)
        for number, cell in enumerate(self.cells):
            before = self.state[number]
            self.state[number] = cell(inner, None if before[0] is None else before)
            inner = self.state[number][0]
        return self.out(inner)  # type: ignore[no-any-return]


class PlainSvg(nn.Module):
    """SVG-LP with a dcgan backbone and an optimal sigma: -ELBO in nats per sequence, by a loop over time."""

    def __init__(self, network: SvgNetwork, config: SvgConfig, *, side: int, channels: int) -> None:
        super().__init__()
        widths, small = config.widths, side >> len(config.widths)
        self._small, self._context, self._latents = small, config.context, config.latent_dim
        down, up, before = [], [], channels
        for width in widths:
            down.append(_block(nn.Conv2d(before, width, 4, 2, 1)))
            before = width
        for number in range(len(widths) - 1, 0, -1):
            up.append(_block(nn.ConvTranspose2d(2 * widths[number], widths[number - 1], 4, 2, 1)))
        self.encoder: Any = nn.ModuleDict({"blocks": nn.ModuleList(down)})
        places, deepest = widths[-1] * small * small, widths[-1]
        self.encoder["last"] = nn.Linear(places, config.features)
        self.encoder["norm"] = _group_norm(network.encoder.norm, config.features)
        self.decoder: Any = nn.ModuleDict({"first": nn.Linear(config.features, places)})
        self.decoder["first_norm"] = nn.Sequential(
            _group_norm(network.decoder.first_norm[0], deepest), nn.LeakyReLU(SLOPE)
        )
        self.decoder["blocks"] = nn.ModuleList(up)
        self.decoder["head"] = nn.ConvTranspose2d(2 * widths[0], channels, 4, 2, 1)
        for blocks, ours in ((down, network.encoder.blocks), (up, network.decoder.blocks)):
            for block, other in zip(blocks, ours, strict=True):
                block[1] = _group_norm(other[1], block[0].out_channels)  # type: ignore[index]
        features, hidden, raw = config.features, config.hidden, 2 * config.latent_dim
        self.posterior = Cells(features, hidden, raw, layers=config.posterior_layers)
        self.prior = Cells(features, hidden, raw, layers=config.prior_layers)
        self.predictor = Cells(features + config.latent_dim, hidden, features, layers=config.predictor_layers)
        self.load_state_dict(by_cell(network.state_dict()))

    def forward(self, x: Tensor, epsilon: Tensor, *, again: bool = False) -> Tensor:
        """-ELBO [] in nats, the mean over sequences x [B, T, C, H, W] in [0, 1]. epsilon: [B, Z, T - 1].

        again: whether a frame is encoded both as the one to predict and as the one before, as in the published code.
        """
        for cells in (self.posterior, self.prior, self.predictor):
            cells.forget()
        before, maps = self._encoded(x[:, 0])
        self.posterior(before)
        given, nats, errors = maps, x.new_zeros(()), x.new_zeros(())
        for step in range(x.shape[1] - 1):
            if again and step:
                before, maps = self._encoded(x[:, step])
            given = maps if step < self._context else given
            now, after = self._encoded(x[:, step + 1])
            mu, log_sigma = _split(self.posterior(now))
            prior_mu, prior_log_sigma = _split(self.prior(before))
            z = mu + log_sigma.exp() * epsilon[:, :, step]
            g = torch.tanh(self.predictor(torch.cat([before, z], 1)))
            mean = self._decoded(g, given)
            errors = errors + (mean.float() - x[:, step + 1]).square().sum()
            ratio = (log_sigma - prior_log_sigma).mul(2).exp()
            square = ((mu - prior_mu) * (-prior_log_sigma).exp()).square()
            nats = nats + (0.5 * (ratio + square - 1) - log_sigma + prior_log_sigma).sum()
            before, maps = now, after
        values = x[:, 1:].numel()
        # With the sigma that maximizes the likelihood of all predicted frames, errors / (2 sigma^2) is values / 2.
        log_px = -0.5 * values * (torch.log(2 * math.pi * errors / values) + 1)
        return (nats - log_px) / len(x)

    def _encoded(self, frame: Tensor) -> tuple[Tensor, list[Tensor]]:
        inner, maps = 2 * frame - 1, []
        for block in self.encoder["blocks"]:
            inner = block(inner)
            maps.append(inner)
        return torch.tanh(self.encoder["norm"](self.encoder["last"](inner.flatten(1)))), maps

    def _decoded(self, g: Tensor, maps: list[Tensor]) -> Tensor:
        inner = self.decoder["first"](g).view(len(g), -1, self._small, self._small)
        inner = self.decoder["first_norm"](inner)
        for block, skip in zip(self.decoder["blocks"], reversed(maps), strict=False):
            inner = block(torch.cat([inner, skip], 1))
        return torch.sigmoid(self.decoder["head"](torch.cat([inner, maps[0]], 1)))


def _block(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(layer, nn.Identity(), nn.LeakyReLU(SLOPE))


def _group_norm(ours: nn.Module, width: Any) -> nn.Module:
    """torch's layer in place of `GroupNorm` of this package."""
    return nn.GroupNorm(ours.num_groups, width) if isinstance(ours, nn.GroupNorm) else nn.Identity()


def _split(raw: Tensor) -> tuple[Tensor, Tensor]:
    mu, log_sigma = raw.float().chunk(2, 1)
    return mu, BOUND * torch.tanh(log_sigma / BOUND)


def by_cell(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of LSTMs with the names of cells: `lstm.weight_ih_l0` is `cells.0.weight_ih`."""
    return {re.sub(r"lstm\.(\w+)_l(\d+)$", r"cells.\2.\1", name): value for name, value in state.items()}
