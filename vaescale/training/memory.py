"""An estimate of the memory that a training step needs, made before training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaescale import noise
from vaescale.adversaries.discriminators import Discriminators
from vaescale.models.shown import Shown
from vaescale.models.units import blank
from vaescale.models.vae import VAE, Terms
from vaescale.networks import layers
from vaescale.objectives.base import Objective, discriminators_of, distance_of
from vaescale.training.config import Precision
from vaescale.training.step import AUTOCAST

BUCKET = 4 << 24  # bytes that DeepSpeed reduces at a time (see `strategies/zero.py`)
LATE = (1 << 31) - 1  # a step at which every term of an objective has begun
LIVE = 4 * ((1 << 25) + (1 << 23))  # bytes of ZeRO-3's weights that are gathered or fetched ahead


def estimate(
    model: VAE,
    *,
    images: int,
    averages: int,
    precision: Precision,
    importance_samples: int = 0,
    objective: Objective | None = None,
    accumulation: int = 1,
    layout: str = "ddp",
    processes: int = 1,
) -> dict[str, int]:
    """Bytes per process: weights, gradients, Adam's two moments, averages of the weights, of which there are so many, and activations; `peak`, what a step
    has of them at once.

    objective: where it has discriminators or a perceptual network, their activations count, too, and their weights are `discriminator`, with
    all that their training keeps, and `perceptual`. All ranks call it, since an objective may call collectives. Weights that are not trained have neither gradients, moments nor averages.
    layout: `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`. images: per process and micro-batch. Activations are the tensors
    alive between the forward and the backward pass, and those of one recomputed block, measured with one and two images and
    extrapolated linearly; the estimate excludes temporary kernel workspace. Where gradients are freed after each step, they fill the memory that the
    backward pass frees, so that only the larger of gradients and activations counts.
    """
    one, two = (
        _saved_bytes(
            model,
            images=n,
            precision=precision,
            importance_samples=importance_samples,
            objective=objective,
        )
        for n in (1, 2)
    )
    frozen, whole = (
        sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad == trains)
        for trains in (False, True)
    )
    partition, bucket = -(-whole // processes), min(whole, BUCKET)
    # DeepSpeed keeps a second copy of its partition, which the optimizer updates. Frozen weights have none.
    weights, gradients = {
        "ddp": (whole, whole),
        "zero1": (whole + partition, whole + partition + bucket),
        "zero2": (whole + partition, partition + 2 * bucket),
        "zero3": (2 * partition + min(frozen + whole, LIVE), partition + 2 * bucket),
        "fsdp2": (partition, partition),
    }[layout]
    weights += -(-frozen // processes) if layout in ("zero3", "fsdp2") else frozen
    moment = whole if layout == "ddp" else partition
    activations = one + (images - 1) * (two - one)
    estimates = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * moment,
        "ema": averages * moment,
        "activations": activations,
    }
    # DDP's buckets hold the gradients; ZeRO-3 keeps those of its partition.
    stay = accumulation > 1 or layout == "zero3" or (layout == "ddp" and processes > 1)
    # The half-precision copies of the weights stay, too (see `half_weights.py`).
    copies = (frozen + whole) // 2 if layout == "ddp" and AUTOCAST[precision] is not None else 0
    shared = 0 if stay else min(gradients, max(0, activations - copies))
    estimates |= _networks_of(objective)
    return {**estimates, "peak": sum(estimates.values()) - shared}


def _networks_of(objective: Objective | None) -> dict[str, int]:
    """Bytes of an objective's own networks that stay: frozen weights; weights, gradients, moments and averages of discriminators, and the
    copies with which a skipped step is undone. Each rank has all of them.
    """
    sizes = {}
    if (distance := distance_of(objective)) is not None:
        sizes["perceptual"] = _bytes_of((*distance.parameters(), *distance.buffers()))
    if (discriminators := discriminators_of(objective)) is not None:
        own, config = _bytes_of(discriminators.parameters()), discriminators.config
        averages = 0 if config.ema_decay is None else 1
        kept = 4 + averages
        copies = averages + (3 + averages if config.steps_per_step > 1 else 0)
        sizes["discriminator"] = (kept + copies) * own
    return sizes


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _saved_bytes(
    model: VAE, *, images: int, precision: Precision, importance_samples: int, objective: Objective | None
) -> int:
    """Bytes alive after a forward pass besides the parameters: what autograd and checkpointed blocks keep, and what the largest of
    these blocks keeps while the backward pass computes it again. Of an objective with networks of its own the pass ends with the loss; and
    the discriminators' pass, which follows the backward pass, counts if it keeps more.
    """
    device = next(model.parameters()).device
    batch = blank(images, model.example_shape, model.window, device)
    stream = noise.Stream(0, 0, torch.zeros(images, dtype=torch.int64, device=device))
    mask = torch.ones(images, dtype=torch.bool, device=device)
    discriminators = discriminators_of(objective)
    has_networks = discriminators is not None or distance_of(objective) is not None
    with unchanged(model):
        model.train()
        with _recomputed_bytes() as blocks, _Storages() as storages:
            terms = model(
                *(batch, stream, mask, importance_samples, False, AUTOCAST[precision]),
                condition=model.any_condition(images),
            )
            late = stream._replace(step=LATE)
            loss = objective(terms, late) if objective is not None and has_networks else None
        alive: int = storages.alive_bytes() + max(blocks, default=0)
        del loss
        if discriminators is not None:
            alive = max(alive, _bytes_of_judging(discriminators, terms, late))
        del terms
    return alive


def _bytes_of_judging(discriminators: Discriminators, terms: Terms, stream: noise.Stream) -> int:
    """Bytes that the discriminators' pass keeps, with what was shown to them."""
    assert isinstance(terms.shown, Shown)
    constants = terms.shown.detached()
    with unchanged(discriminators), _Storages() as storages:
        judged = discriminators(constants, stream, 0)
        alive: int = storages.alive_bytes() + _bytes_of(constants)
        del judged
    return alive


@contextmanager
def _recomputed_bytes() -> Iterator[list[int]]:
    """Collect the bytes that each recomputed function keeps for its backward pass."""
    sizes: list[int] = []

    def measure(function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        with _Storages() as storages:
            result = function(*arguments)
        sizes.append(storages.alive_bytes())
        del result

    layers.observers.append(measure)
    try:
        yield sizes
    finally:
        layers.observers.remove(measure)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore buffers, training flags and the lists in which modules collect a step's sums. Does not copy the parameters."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lists = [
        (module, {name: [*value] for name, value in vars(module).items() if isinstance(value, list)})
        for module in model.modules()
    ]
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for module, before in lists:
            vars(module).update(before)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


class _Storages(TorchDispatchMode):
    """Records every storage that an operation allocates, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, for a second, to exclude this function from compilation."""
        return False

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
        """Bytes of the recorded storages that something still holds."""
        held = [size for reference, size in self._storages.values() if not reference.expired()]  # type: ignore[no-untyped-call]
        return sum(held)
