"""Exponential moving average of the weights. Polyak & Juditsky 1992."""

import copy

import torch

from vaescale.models.vae import VAE


class Ema:
    """An averaged copy of a model. Early on the horizon grows with the steps: decay_t = min(decay, (1+t)/(10+t)).

    Buffers (the sigma state) are copied, not averaged: they are averages already.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, source: VAE, step: int) -> None:
        """Move towards `source` after optimizer step `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(source.parameters()), weight)
        for own, other in zip(self.model.buffers(), source.buffers(), strict=True):
            own.copy_(other)
