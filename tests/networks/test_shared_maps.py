"""Convolutions beside shared maps, against torch's of joined maps in float64."""

import pytest
import torch
from torch import nn

from vaescale.networks.shared_maps import Beside, SharedConv2d, SharedConvTranspose2d

SEQUENCES, DRAWS, STEPS, MAPS = 2, 3, 4, 2


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_convolutions_of_joined_maps(transposed: bool, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    settings = (
        {"kernel_size": 4, "stride": 2, "padding": 1} if transposed else {"kernel_size": 3, "padding": 1}
    )
    shared, plain = (SharedConvTranspose2d, nn.ConvTranspose2d) if transposed else (SharedConv2d, nn.Conv2d)
    layer, reference = (kind(5, 9, **settings).double().to(memory_format=order) for kind in (shared, plain))
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(SEQUENCES * DRAWS * STEPS, 3, 6, 4, dtype=torch.float64).contiguous(memory_format=order)
    skip = torch.randn(SEQUENCES, MAPS, 2, 6, 4, dtype=torch.float64)
    inputs = [[each.clone().requires_grad_() for each in (x, skip)] for _ in range(2)]
    y = Beside(layer, nn.Tanh())(*inputs[0], STEPS)
    number = torch.arange(STEPS).clamp_max(MAPS - 1)
    of_draws = inputs[1][1][:, number].repeat_interleave(DRAWS, 0).flatten(0, 1)
    expected = torch.tanh(reference(torch.cat([inputs[1][0], of_draws], 1)))
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(expected)
    y.backward(dy), expected.backward(dy)
    for found, right in zip(
        [*inputs[0], *layer.parameters()], [*inputs[1], *reference.parameters()], strict=True
    ):
        torch.testing.assert_close(found.grad, right.grad)
