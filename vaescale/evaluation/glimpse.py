"""Pictures of a model during training: images, reconstructions, the decoder's sigma, and samples of the prior."""

import torch
from torch import Tensor

from vaescale import noise
from vaescale.models.vae import VAE


@torch.no_grad()
def glimpse(model: VAE, images: Tensor, *, seed: int) -> list[tuple[str, Tensor]]:
    """Named rows of pictures [B, C, H, W] in [0, 1]: originals, decoded means, sigma and means of samples.

    The row of sigma(z), divided by its maximum, exists where sigma differs between pixels. images: uint8 [B, C, H, W]. All ranks
    call it with the same images.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    stream = noise.Stream(seed, 0, torch.arange(len(images), device=device))
    x = model.target(images.to(device), stream)
    params = model.reconstruct(x)
    means = model.likelihood.mean(params)
    rows = [("original", x), ("decoded", means)]
    deviation = model.likelihood.deviation(params)
    if deviation is not None and deviation.numel() > 1:
        sigma = deviation.expand_as(means)
        rows.append((f"sigma to {float(sigma.amax()):.2g}", sigma / sigma.amax().clamp_min(1e-12)))
    rows.append(("samples", model.likelihood.mean(model.from_prior(stream))))
    model.train(was_training)
    return [(name, row.float().clamp(0, 1).cpu()) for name, row in rows]
