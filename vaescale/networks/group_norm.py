"""GroupNorm with an activation after it. Wu & He 2018; SiLU, with which it is one operation on CUDA: Elfwing et al. 2018.

On CUDA, maps in channels_last order use Triton kernels (`group_norm_kernels.py`), and the output has the dtype and the order of the
input. torch's group_norm returns another order (PyTorch issue 111824) and computes in float32 under autocast, so that each
convolution after it copies its input twice. On a CPU such maps use compiled functions (`normalization.py`). Everywhere else this
is torch's group_norm followed by torch's activation.

To compare the two: set `GroupNorm.fused = False`; or set VAESCALE_TRITON=0 (see `kernels.py`) or VAESCALE_NATIVE=0 in the environment.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from vaescale.kernels import kernels_run
from vaescale.networks import normalization
from vaescale.networks.batch_norm import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 1024
MOST_ELEMENTS = 2**31  # of one image; offsets inside an image are 32-bit


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, with an activation after it. Parameters have the names, shapes and initial values of torch's."""

    fused: ClassVar[bool] = True
    """Whether to use the kernels where they apply."""

    def __init__(self, groups: int, width: int, *, with_silu: bool = False, eps: float = 1e-5) -> None:
        super().__init__(groups, width, eps=eps)
        self.activation = "silu" if with_silu else None  # or another of ACTIVATIONS

    @property
    def with_silu(self) -> bool:
        """Whether the activation is SiLU, which the kernels for CUDA compute too."""
        return self.activation == "silu"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C] or [B, C, H, W] over groups of channels and all places."""
        if x.is_cuda and GroupNorm.fused and self._fits(x) and kernels_run():
            settings = self.num_groups, self.eps, self.with_silu
            y: Tensor = group_norm_silu(x, self.weight, self.bias, *settings)[0]
            return y if self.with_silu else _activated(y, self.activation)
        if GroupNorm.fused and normalization.take(x):
            groups, act = self.num_groups, self.activation
            return normalization.group_norm(x, self.weight, self.bias, groups, self.eps, act)
        return _activated(super().forward(x), self.activation)

    def extra_repr(self) -> str:
        """torch's, and which activation follows."""
        return f"{super().extra_repr()}, activation={self.activation}"

    def _fits(self, x: Tensor) -> bool:
        return (
            x.dim() == 4
            and x.dtype in DTYPES
            and self.num_channels <= WIDEST
            and 0 < x.numel() < MOST_ELEMENTS * len(x)
            and x.is_contiguous(memory_format=torch.channels_last)
        )


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else ACTIVATIONS[activation](y)


@torch.library.custom_op("vaescale::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, with_silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm and SiLU of x [B, C, H, W], dense as [B, H, W, C]. Statistics are float32; no second derivative.

    Returns y like x, and for the gradient the groups' means and 1 / sqrt(variance + eps), both [B, groups].
    """
    from vaescale.networks import group_norm_kernels

    x = x.contiguous(memory_format=torch.channels_last)
    return group_norm_kernels.forward(x, weight, bias, groups, eps, with_silu)


@torch.library.custom_op("vaescale::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, with_silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `group_norm_silu`: dx like x, dweight and dbias [C] in float32."""
    from vaescale.networks import group_norm_kernels

    x = x.contiguous(memory_format=torch.channels_last)
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return group_norm_kernels.backward(dy, x, weight, bias, mean, rstd, with_silu)


@group_norm_silu.register_fake
def _shapes(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    groups: int,
    eps: float,  # noqa: ARG001
    with_silu: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistic, torch.empty_like(statistic)


@group_norm_silu_backward.register_fake
def _gradient_shapes(
    dy: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    with_silu: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (torch.empty_like(vector, dtype=torch.float32) for vector in (weight, bias))
    return torch.empty_like(x, memory_format=torch.channels_last), dweight, dbias


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, int, float, bool],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, weight, bias, _, _, with_silu = inputs
    # Without zeros for the gradients of mean and rstd, which nothing reads.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.with_silu = with_silu  # type: ignore[attr-defined]


def _gradient(
    context: torch.autograd.function.FunctionCtx, dy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    if dy is None:
        return None, None, None, None, None, None
    x, weight, bias, mean, rstd = context.saved_tensors  # type: ignore[attr-defined]
    with_silu: bool = context.with_silu  # type: ignore[attr-defined]
    dx, dweight, dbias = group_norm_silu_backward(dy, x, weight, bias, mean, rstd, with_silu)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


group_norm_silu.register_autograd(_gradient, setup_context=_keep)
