"""A causal transformer over the codes of an image, row by row: p(codes) = prod_i p(code_i | codes before i).

Vaswani et al. 2017, with normalization before each branch (Xiong et al. 2020). Dropout leaves out channels of a branch, the same at all
places of an image (Gal & Ghahramani 2016), by noise of the image's slot in the batch.

Legend: B images, N places, K codes, W channels.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from vaescale import noise
from vaescale.networks.config import CodeTransformerConfig

INIT = 0.02
WIDER = 4  # times W channels within a block


class Shape(NamedTuple):
    """The sizes of a transformer: codes K, places N, width W, layers, and heads, which divide the width."""

    codes: int
    places: int
    width: int
    layers: int
    heads: int


class CodeTransformer(nn.Module):
    """Logits of each code given those before it."""

    def __init__(self, shape: Shape, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self._dropout = shape, dropout
        self.codes = nn.Embedding(shape.codes + 1, shape.width)  # the last one begins an image
        self.places = nn.Parameter(INIT * torch.randn(shape.places, shape.width))
        self.blocks = nn.ModuleList(_Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.codes)
        nn.init.normal_(self.codes.weight, std=INIT)
        nn.init.zeros_(self.head.weight)  # uniform codes at first
        nn.init.zeros_(self.head.bias)

    def forward(self, before: Tensor, stream: noise.Stream | None = None) -> Tensor:
        """The logits [B, n + 1, K] of the first n + 1 codes, given the first n, int64 [B, n]. stream: of dropout, in training."""
        start = before.new_full((len(before), 1), self.shape.codes)
        inner = self.codes(torch.cat([start, before], dim=1)) + self.places[: before.shape[1] + 1]
        for number, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            inner = inner + self._dropped(block.mixed(inner), stream, 2 * number)
            inner = inner + self._dropped(block.widened(inner), stream, 2 * number + 1)
        logits: Tensor = self.head(self.norm(inner))
        return logits

    def _dropped(self, values: Tensor, stream: noise.Stream | None, number: int) -> Tensor:
        if stream is None or not self.training or self._dropout == 0:
            return values
        kept = noise.uniform(stream, noise.DROPOUT + number, (1, values.shape[2])) >= self._dropout
        return values * kept / (1 - self._dropout)


def of_config(
    config: CodeTransformerConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    encoder_out: int,  # noqa: ARG001
    out_channels: int,  # noqa: ARG001
) -> CodeTransformer:
    """The transformer of a recipe's section: image_size, of the code map; channels, the number K of codes."""
    places = image_size[0] * image_size[1]
    shape = Shape(channels, places, config.width, config.layers, config.heads)
    return CodeTransformer(shape, dropout=config.dropout)


def nats_from_logits(logits: Tensor, codes: Tensor) -> Tensor:
    """-log p(codes) [B] in nats, float32 or wider, of codes int64 [B, N] from their logits [B, N, K]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide.transpose(1, 2), codes, reduction="none").sum(1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm_of_attention, self.norm_of_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, WIDER * width), nn.Linear(WIDER * width, width)

    def mixed(self, x: Tensor) -> Tensor:
        """Causal self-attention over [B, n, W]."""
        parts = rearrange(
            self.query_key_value(self.norm_of_attention(x)), "b n (s h w) -> s b h n w", s=3, h=self._heads
        )
        heads = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        attended: Tensor = self.out(rearrange(heads, "b h n w -> b n (h w)"))
        return attended

    def widened(self, x: Tensor) -> Tensor:
        """Two layers at each place of [B, n, W]."""
        mapped: Tensor = self.down(gelu(self.up(self.norm_of_layers(x))))
        return mapped
