"""Half-precision copies of weights against autocast's own: the same bits, and never those of an earlier step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vaescale.networks.layers import recomputed
from vaescale.training.half_weights import HalfWeights

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A layer of each kind; the last convolution is recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 4, stride=2)
        self.norm, self.again = nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1, bias=False)
        self.last = nn.Linear(2 * 14 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.first(x).contiguous(memory_format=torch.channels_last)))
        return self.last(recomputed(self.again, x).flatten(1))


def loss(net: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x).float().square().mean()


def pair() -> tuple[Net, Net, list[torch.optim.Optimizer]]:
    """A net, and the same one with copies."""
    plain, other = Net(), Net()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1, fused=True) for net in (plain, other)]
    HalfWeights(other, other, optimizers[1])
    return plain, other, optimizers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_losses_gradients_and_weights_have_the_bits_of_autocast(memory_format: torch.memory_format) -> None:
    plain, other, optimizers = pair()
    for net in (plain, other):
        net.to(memory_format=memory_format)
    for _ in range(3):
        losses = [loss(net) for net in (plain, other)]
        assert torch.equal(*losses)
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        for weight, copied in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.equal(weight.grad, copied.grad)
            assert copied.grad.dtype == torch.float32
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, plain.parameters(), other.parameters()))


def test_weights_changed_in_any_way_are_seen() -> None:
    plain, other, _ = pair()
    loss(other).backward()
    with torch.no_grad():
        for net in (plain, other):
            net.last.weight.mul_(2)
            net.first.weight.data.add_(1)
    assert torch.equal(loss(plain), loss(other))
    other.double().float()
    assert torch.equal(loss(plain), loss(other))


def test_layers_have_their_weights_outside_of_their_calls() -> None:
    _, other, optimizers = pair()
    loss(other).backward()
    assert other.first.weight is other.first._parameters["weight"]
    assert set(other.state_dict()) == set(Net().state_dict())
    with pytest.raises(RuntimeError, match="expected input"):
        loss(other, X[:, :2])
    assert other.first.weight is other.first._parameters["weight"]
    optimizers[1].step()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert other(X).dtype == torch.bfloat16
    assert other(X).dtype == torch.float32


def test_a_backward_pass_after_a_later_forward_pass_is_refused() -> None:
    """Its copies would be those of other weights."""
    _, other, _ = pair()
    first = loss(other)
    loss(other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()
