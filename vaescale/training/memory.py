"""What a training step keeps in memory, before anything is trained."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaescale import noise
from vaescale.models.vae import VAE

BUCKET = 4 << 24  # bytes that DeepSpeed reduces at a time (see `strategies/zero.py`)
LIVE = 4 * ((1 << 25) + (1 << 23))  # of ZeRO-3's weights, those that are gathered, and those fetched ahead


def estimate(
    model: VAE,
    *,
    images: int,
    ema: bool,
    precision: str,
    importance_samples: int = 0,
    accumulation: int = 1,
    layout: str = "ddp",
    processes: int = 1,
) -> dict[str, int]:
    """Bytes per process: weights, gradients, Adam's two moments, averaged weights, and activations; `total` at the peak.

    layout: `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`. images: per process and micro-batch. The activations are what is
    alive between the forward and the backward pass, measured with one and two images and extended in a straight line; buffers
    that kernels use for a moment are not in it. Gradients that a step begins without take the activations' place in the
    backward pass, so the larger of the two counts.
    """
    one, two = (
        _saved_bytes(model, images=n, precision=precision, importance_samples=importance_samples)
        for n in (1, 2)
    )
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    part, bucket = -(-whole // processes), min(whole, BUCKET)
    # DeepSpeed keeps a second copy of its part: the one that the optimizer moves.
    weights, gradients = {
        "ddp": (whole, whole),
        "zero1": (whole + part, whole + part + bucket),
        "zero2": (whole + part, part + 2 * bucket),
        "zero3": (2 * part + min(whole, LIVE), part + 2 * bucket),
        "fsdp2": (part, part),
    }[layout]
    own = whole if layout == "ddp" else part
    activations = one + (images - 1) * (two - one)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * own,
        "ema": own if ema else 0,
        "activations": activations,
    }
    # DDP's buckets are the gradients; ZeRO-3 keeps its part's.
    stay = accumulation > 1 or layout == "zero3" or (layout == "ddp" and processes > 1)
    shared = 0 if stay else min(gradients, activations)
    return {**parts, "total": sum(parts.values()) - shared}


def _saved_bytes(model: VAE, *, images: int, precision: str, importance_samples: int) -> int:
    """What is alive after a forward pass beside the parameters: what autograd saved, and what checkpointed blocks keep."""
    device = next(model.parameters()).device
    batch = torch.zeros(images, *model.image_shape, dtype=torch.uint8, device=device)
    stream = noise.Stream(0, 0, torch.zeros(images, dtype=torch.int64, device=device))
    mask = torch.ones(images, dtype=torch.bool, device=device)
    model = copy.deepcopy(model).train()  # as in training, but its running averages stay what they are
    made = _Made()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), made:
        terms = model(batch, stream, mask, importance_samples)
    alive = made.alive_bytes()
    del terms
    return alive


class _Made(TorchDispatchMode):
    """Remembers every storage that an operation made, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storages[storage._cdata] = (reference, storage.nbytes())
        return result

    def alive_bytes(self) -> int:
        """Of the storages made, those that something still holds."""
        held = [size for reference, size in self._storages.values() if not reference.expired()]  # type: ignore[no-untyped-call]
        return sum(held)
