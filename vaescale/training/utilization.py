"""Model FLOPs utilization: the floating-point operations that the model needs, as a share of what the GPU could do meanwhile.

Convolutions and matrix products of the forward and the backward pass, two operations for a multiply-add; what the backward pass
recomputes does not count again. Chowdhery et al. 2022, "PaLM", appendix B.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vaescale import noise
from vaescale.models.units import blank
from vaescale.models.vae import VAE
from vaescale.system import native
from vaescale.training.config import Precision
from vaescale.training.memory import unchanged

# Dense operations a second by the vendor's data sheets, for bf16 and fp16, tf32, and fp32.
RATES = {
    "A100": (312e12, 156e12, 19.5e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
}


def full_speed(model: VAE, *, precision: Precision, importance_samples: int, processes: int) -> float | None:
    """Images a second of a training step at the full rate of `processes` such GPUs; None where the rate is unknown."""
    rate = peak_rate(next(model.parameters()).device, precision)
    if rate is None:
        return None
    return processes * rate / flops_of_an_image(model, importance_samples=importance_samples)


def peak_rate(device: torch.device, precision: Precision) -> float | None:
    """The device's operations a second in a precision; None for a CPU, or a GPU that RATES does not name."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for part, rates in RATES.items() if part in name), None)
    return None if rates is None else rates[{"tf32": 1, "fp32": 2}.get(precision, 0)]


def flops_of_an_image(model: VAE, *, importance_samples: int = 0) -> float:
    """The operations of a training step for one image, counted in a pass of two. Leaves the model as it was."""
    device, images = next(model.parameters()).device, 2
    pixels = blank(images, model.example_shape, model.window, device)
    stream = noise.Stream(0, 0, torch.arange(images, device=device))
    mask = torch.ones(images, dtype=torch.bool, device=device)
    # The counter sees torch's operations alone.
    with unchanged(model), native.switched_off():
        model.train()
        with FlopCounterMode(display=False) as forward:
            condition = model.any_condition(images)
            terms = model(pixels, stream, mask, importance_samples, condition=condition)
            loss = terms.kl.sum() - terms.log_px.sum() - terms.log_weights.sum()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        formulas = {operator: _unless_recomputed(formula) for operator, formula in flop_registry.items()}
        with FlopCounterMode(display=False, custom_mapping=formulas) as backward:
            torch.autograd.grad(loss, weights, allow_unused=True)
    return float(forward.get_total_flops() + backward.get_total_flops()) / images


def _unless_recomputed(formula: Callable[..., int]) -> Callable[..., int]:
    """The formula of an operator, and 0 where gradients are enabled: within a backward pass only recomputed functions enable them."""

    def count(*arguments: Any, **options: Any) -> int:
        return 0 if torch.is_grad_enabled() else formula(*arguments, **options)

    count._get_raw = True  # type: ignore[attr-defined]  # the formula makes shapes of tensors itself
    return count
