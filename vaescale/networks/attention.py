"""Attention with one head over the places of a map. Vaswani et al. 2017, eq. 1.

Legend: N places, W channels; query, key, value [B, N, W].
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

WIDEST_FUSED_HEAD = 256
MOST_EXPLICIT_PLACES = 4096
HALF = (torch.bfloat16, torch.float16)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(W)) V, [B, N, W].

    On CUDA, heads wider than torch's flash kernels allow take matrix products instead, if the places are few: the kernel that
    torch would use has a slow gradient. The products keep B N^2 weights for the gradient, in float32 and in the value's dtype.
    """
    width, places = query.shape[-1], query.shape[-2]
    if query.is_cuda and query.dtype in HALF and width > WIDEST_FUSED_HEAD and places <= MOST_EXPLICIT_PLACES:
        return explicit_attention(query, key, value)
    return scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by matrix products of bf16 or fp16 factors, with logits and softmax in float32."""
    with torch.autocast(query.device.type, enabled=False):
        logits: Tensor = _Logits.apply(query, key)  # type: ignore[no-untyped-call]
        return torch.softmax(logits, dim=2).to(value.dtype) @ value


class _Logits(torch.autograd.Function):
    """Q K^T / sqrt(W) in float32; in bf16, large logits would lose their units. The gradient's factors are in the dtype of Q."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor) -> Tensor:
        context.save_for_backward(query, key)
        across = key.transpose(1, 2)
        if query.is_cuda:
            logits = torch.bmm(query, across, out_dtype=torch.float32)
        else:  # no CPU kernel has another output dtype
            logits = query.float() @ across.float()
        # Not in place: torch 2.11 would compile this to a gradient of zero.
        scaled: Tensor = logits * query.shape[-1] ** -0.5
        return scaled

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        query, key = context.saved_tensors
        gradient = (gradients[0] * query.shape[-1] ** -0.5).to(query.dtype)
        return gradient @ key, gradient.transpose(1, 2) @ query
