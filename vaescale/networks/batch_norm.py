"""Batch normalization over the global batch, with the activation after it in one node of the graph.

With the batch's mean m and r = 1 / sqrt(variance + eps) of each channel, h = weight (x - m) r + bias, y = act(h), and g = dy act'(h),

    dbias = sum g        dweight = sum g x^        dx = weight r (g - M[g] - x^ M[g x^]),        x^ = (x - m) r

where the sums of dbias and dweight are over this rank's values (gradients are averaged over ranks later) and the means M over those
of all ranks. Ioffe & Szegedy 2015, section 3.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu, relu, silu

from vaescale import comm
from vaescale.networks import normalization

ACTIVATIONS = {"silu": silu, "relu": relu, "leaky_relu": lambda h: leaky_relu(h, 0.2)}


class GlobalBatchNorm(nn.Module):
    """Batch normalization with the statistics of the global batch: one curve on any number of ranks, on gloo too.

    Ioffe & Szegedy 2015, algorithm 1; evaluation uses running averages. With training.accumulation the statistics are
    those of a micro-batch. A layer costs one all-reduce of 2 width + 1 numbers forward and one of 2 width backward.
    """

    averaged_buffers = ("running_mean", "running_variance")
    """What is averaged over steps together with the weights: the averaged weights' maps have other statistics than the weights'."""

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.activation: str | None = None  # applied to the result; one of ACTIVATIONS
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))
        self.running_mean: Tensor
        self.running_variance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C] or [B, C, H, W]."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_variance + self.eps)
            return _affine(x, scale, self.bias - self.running_mean * scale, self.activation)
        with torch.no_grad():
            mean, variance, count = _global_moments(x)
            unbiased = variance * count / (count - 1).clamp_min(1)
            for running, value in ((self.running_mean, mean), (self.running_variance, unbiased)):
                # One batch of NaN must not remain in the running averages.
                running.lerp_(torch.where(value.isfinite(), value.to(running), running), self.momentum)
            rstd = torch.rsqrt(variance + self.eps)
        moments = (mean.to(self.weight), rstd.to(self.weight), count)
        y: Tensor = _Normalize.apply(x, self.weight, self.bias, *moments, self.activation)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """The width, and the activation."""
        return f"{len(self.weight)}, activation={self.activation}"


class _Normalize(torch.autograd.Function):
    """act(weight (x - mean) rstd + bias), where mean and rstd are those of the global batch of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        count: Tensor,
        act: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, rstd, count)
        ctx.act = act
        return _affine(x, weight * rstd, bias - mean * weight * rstd, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, count = ctx.saved_tensors
        scale = weight * rstd
        shift = bias - mean * scale
        compiled = normalization.take(x)
        if compiled:
            first, second = normalization.sums(dy, x, scale, shift, mean, ctx.act)
            first, second = first.double().sum(0), second.double().sum(0)
        else:
            g = _before_activation(dy, x, scale, shift, ctx.act)
            deviation = x.to(g.dtype) - _wide(mean, x)
            places = [axis for axis in range(x.ndim) if axis != 1]
            first, second = g.sum(places).double(), (g * deviation).sum(places).double()
        second = second * rstd
        of_bias, of_weight = first.to(bias), second.to(weight)
        first, second = (comm.all_reduce_sum(torch.cat([first, second])) / count).chunk(2)
        p, q = (-scale * rstd * second).to(scale), (-scale * first).to(scale)
        if compiled:
            dx = normalization.input_gradient(dy, x, scale, shift, mean, p, q, ctx.act)
        else:
            dx = (g * _wide(scale, x)).add_(deviation.mul_(_wide(p, x))).add_(_wide(q, x)).to(x.dtype)
        return dx, of_weight, of_bias, None, None, None, None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over the global batch, float64 [C], and the number of values []."""
    if normalization.take(x):
        means, deviations = (values.double() for values in normalization.moments(x))
        count = float(x.numel() // x.shape[1])
        mean = means.mean(0)
        square = deviations.sum(0) + count / len(x) * (means - mean).square().sum(0)
    else:
        rows = x.transpose(0, 1).flatten(1)  # [C, N]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        count = float(rows.shape[1])
        mean = rows.mean(1)
        square = (rows - mean[:, None]).square().sum(1).double()
        mean = mean.double()
    # Summed around zero in float64, where the cancellation that follows costs nothing.
    own = torch.cat([count * mean, square + count * mean.square(), mean.new_full((1,), count)])
    total = comm.all_reduce_sum(own)
    mean, second = (total[:-1] / total[-1]).chunk(2)
    return mean, (second - mean.square()).clamp_min(0), total[-1]


def _affine(x: Tensor, scale: Tensor, shift: Tensor, act: str | None) -> Tensor:
    """act(scale x + shift) in the dtype of x, with scale and shift [C]."""
    if not torch.is_grad_enabled() and normalization.take(x) and scale.dtype == torch.float32:
        return normalization.affine(x, scale, shift, act)
    # In float32, because a channel with a large mean would cancel in bf16.
    h = torch.addcmul(_wide(shift, x), x.to(scale.dtype), _wide(scale, x)).to(x.dtype)
    return ACTIVATIONS[act](h) if act else h


def _before_activation(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, act: str | None) -> Tensor:
    """g = dy act'(scale x + shift), in the dtype of scale."""
    dy = dy.to(scale.dtype)
    if act is None:
        return dy
    h = torch.addcmul(_wide(shift, x), x.to(scale.dtype), _wide(scale, x))
    if act == "silu":
        of_silu: Tensor = torch.ops.aten.silu_backward(dy, h)
        return of_silu
    return torch.where(h > 0, dy, dy * (0.2 if act == "leaky_relu" else 0))


def _wide(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [C] that broadcasts with x [B, C] or [B, C, H, W]."""
    return vector.view(1, -1, *(1 for _ in x.shape[2:]))
