"""CUDA graphs: the forward and the backward pass of a step, captured once and replayed at each step.

A deep ladder launches 20,000 kernels a step, which the host takes longer to launch than the GPU to compute; a replay launches
them all at once. The kernels, their order and the values are those of a step without graphs. Everything outside the model (the
objective, the guard, the optimizer, the averages) runs as without graphs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vaescale import comm, noise
from vaescale.likelihoods.sigma import SigmaState
from vaescale.models.units import blank
from vaescale.models.vae import VAE, Terms
from vaescale.training.memory import unchanged
from vaescale.training.strategies.base import Strategy


def capture(
    strategy: Strategy, *, images: int, seed: int, options: tuple[Any, ...], accumulation: int
) -> str | None:
    """Let a strategy call a model whose passes are replayed (see GraphedForward). Returns why not, None if it does."""
    if strategy.wrapped is not strategy.model or comm.world_size() > 1:
        return "they need one process and the layout ddp"
    if strategy.model._compiled_call_impl is not None:
        return "training.compile is true"
    if accumulation > 1:
        return "training.accumulation is more than 1"
    if strategy.model.equivariance is not None:
        return "objective.equivariance scales the images of each step to another size"
    if strategy.model.of_latents:
        return "data.holds is latents or codes"
    if strategy.model.predicted_frames > 1:
        return "the model has LSTMs, whose capture is not tested"
    if strategy.model.condition is not None:
        return "the model has a condition"
    if strategy.model.num_codes:
        return "posterior.kind has codes, whose state is chosen by the host"
    if strategy.model.shows is not None:
        return "the objective reads reconstructions (adversarial, perceptual)"
    try:
        strategy.wrapped = GraphedForward(strategy.model, images=images, seed=seed, options=options)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # something in the model makes the host wait for the GPU
        return f"a part of the model makes the host wait for the GPU ({str(error).strip().splitlines()[0]})"
    return None


class GraphedForward(nn.Module):
    """A model whose passes in training are replayed; it stands in the place of the model that a strategy calls.

    In evaluation mode, without gradients, or with images of another shape it calls the model.
    """

    def __init__(self, model: VAE, *, images: int, seed: int, options: tuple[Any, ...]) -> None:
        """Capture the passes, in a few seconds and with a step's memory, which is kept.

        images: in a micro-batch. options: importance_samples, doubly_reparameterized and autocast of the model's forward. Nothing
        may allocate on the GPU in another thread meanwhile. Restores everything in the model that a pass changes.
        """
        super().__init__()
        self.model, self._seed, self._options = model, seed, options
        device = next(model.parameters()).device
        pixels = blank(images, model.example_shape, model.window, device)
        slots = torch.arange(images, device=device)
        mask = torch.ones(images, dtype=torch.bool, device=device)
        step = torch.zeros((), dtype=torch.int64, device=device)
        self._shape = pixels.shape
        with unchanged(model):
            passes = _Passes(model, seed, options).train()
            replay = torch.cuda.make_graphed_callables(
                passes, (pixels, slots, mask, step), allow_unused_input=True
            )
        self._replay = cast("Callable[..., tuple[Tensor, ...]]", replay)

    def forward(self, images: Tensor, stream: noise.Stream, mask: Tensor, *options: Any) -> Terms:
        """The Terms of the model's forward, whose arguments these are. The next call in training overwrites them.

        A replay computes the terms that only metrics read, wanted or not.
        """
        known = (
            images.shape == self._shape
            and stream.seed == self._seed
            and options[: len(self._options)] == self._options
        )
        if not (known and self.model.training and torch.is_grad_enabled()):
            terms: Terms = self.model(images, stream, mask, *options)
            return terms
        step = torch.full((), stream.step, dtype=torch.int64, device=images.device)
        outputs = self._replay(images, stream.slots, mask, step)
        count = len(Terms._fields)
        for state, total in zip(_states(self.model), outputs[count:], strict=True):
            state.put_sums([total.detach().clone()])
        return Terms(*outputs[:count])  # type: ignore[arg-type]


class _Passes(nn.Module):
    """A model's forward pass with tensors alone as arguments and results: the Terms, then a total for each sigma state."""

    def __init__(self, model: VAE, seed: int, options: tuple[Any, ...]) -> None:
        super().__init__()
        self.model, self._seed, self._options = model, seed, options

    def forward(self, images: Tensor, slots: Tensor, mask: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        terms = self.model(images, noise.Stream(self._seed, 0, slots, step), mask, *self._options)
        return *terms, *(total for state in _states(self.model) for total in state.take_sums())


def _states(model: VAE) -> list[SigmaState]:
    """The states that collect sums in a forward pass."""
    return [module for module in model.modules() if isinstance(module, SigmaState) and module.collects]
