"""The sum of the layers' largest singular values, a loss term that keeps the KL of a deep hierarchy bounded.

    L + lambda sum_i s_i                                                       Vahdat & Kautz 2020, section 3.2

s_i by power iteration on each kernel as a matrix [out, rest] (Yoshida & Miyato 2017), one iteration in each forward pass
from the singular vector of the pass before.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrize import is_parametrized

FIRST_ITERATIONS = 30
Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


class SpectralSum(nn.Module):
    """The largest singular values of a network's layers. The left singular vectors are buffers, saved with the run."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._layers = [
            layer for layer in network.modules() if isinstance(layer, Layer) and not is_parametrized(layer)
        ]
        for number, layer in enumerate(self._layers):
            left = normalize(torch.randn(len(kernel_matrix(layer))), dim=0)
            self.register_buffer(f"left_{number}", left.to(layer.weight))
        for _ in range(FIRST_ITERATIONS):
            self._iterate()

    def forward(self) -> Tensor:
        """The sum of s_i [], float32 or wider, with gradient u v^T for each kernel. Iterates only in training mode."""
        if self.training:
            self._iterate()
        total = torch.zeros((), device=self._layers[0].weight.device)
        for number, layer in enumerate(self._layers):
            matrix, left = kernel_matrix(layer), self._left(number)
            with torch.no_grad():
                right = normalize(matrix.T @ left, dim=0)
            total = total + left @ matrix @ right
        return total

    def _left(self, number: int) -> Tensor:
        left: Tensor = getattr(self, f"left_{number}")
        return left

    @torch.no_grad()
    def _iterate(self) -> None:
        for number, layer in enumerate(self._layers):
            matrix, left = kernel_matrix(layer), self._left(number)
            left.copy_(normalize(matrix @ normalize(matrix.T @ left, dim=0), dim=0))


def kernel_matrix(layer: Layer) -> Tensor:
    """The kernel as a matrix [out, rest]: each row holds the weights of one output channel.

    torch stores the kernel of a transposed convolution as [in, out / groups, h, w], that of other layers as [out, ...].
    """
    if isinstance(layer, nn.ConvTranspose2d):
        return rearrange(layer.weight, "(g i) o h w -> (g o) (i h w)", g=layer.groups)
    return layer.weight.flatten(1)
