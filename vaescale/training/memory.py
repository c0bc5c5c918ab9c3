"""What a training step keeps in memory, before anything is trained."""

import torch
from torch import Tensor

from vaescale import noise
from vaescale.models.vae import VAE


def estimate(model: VAE, *, images: int, ema: bool, precision: str) -> dict[str, int]:
    """Bytes per process: weights, gradients, Adam's two moments, averaged weights, and activations.

    images: per process and micro-batch. The activations are what autograd saves, measured with one and two images
    and extended in a straight line; buffers that kernels use for a moment are not in it.
    """
    one, two = (_saved_bytes(model, images=n, precision=precision) for n in (1, 2))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "ema": weights if ema else 0,
        "activations": one + (images - 1) * (two - one),
    }
    return {**parts, "total": sum(parts.values())}


def _saved_bytes(model: VAE, *, images: int, precision: str) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        keep.append(tensor)  # or its address would be used again
        return tensor

    keep: list[Tensor] = []
    device = next(model.parameters()).device
    batch = torch.zeros(images, *model.image_shape, dtype=torch.uint8, device=device)
    stream = noise.Stream(0, 0, torch.zeros(images, dtype=torch.int64, device=device))
    mask = torch.ones(images, dtype=torch.bool, device=device)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        was_training = model.training
        model.eval()(batch, stream, mask)
        model.train(was_training)
    return sum(saved.values())
