"""Discriminators: what they see, what the autoencoder's loss changes in them (nothing), and their penalties."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vaescale import noise
from vaescale.adversaries.augment import augmented
from vaescale.adversaries.config import AdversarialConfig, PlayerConfig
from vaescale.adversaries.discriminators import Discriminators, Match
from vaescale.errors import UserError
from vaescale.models.shown import Shown

MATCH = Match(("x",), (("reconstructed",),))
STREAM = noise.Stream(3, 5, torch.arange(6))
KINDS = ("colour", "translation", "cutout")


def images(seed: int, count: int = 6, side: int = 8, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def shown(**fields: Tensor) -> Shown:
    return Shown(**{name: torch.zeros(6, 0) for name in Shown._fields} | fields)


def make(config: PlayerConfig | None = None, **keys: Any) -> Discriminators:
    torch.manual_seed(0)
    config = config or AdversarialConfig(widths=(4, 8), **keys)
    return Discriminators(config, {"image": MATCH}, image_shape=(1, 8, 8), latent_dim=2)


def test_the_autoencoder_s_loss_leaves_them_as_they_are() -> None:
    discriminators = make(spectral_norm=True)
    before = {name: value.clone() for name, value in discriminators.state_dict().items()}
    fake = images(1).requires_grad_()
    (logits,) = discriminators.logits("image", MATCH.fakes, shown(reconstructed=fake), STREAM)
    logits.mean().backward()
    assert fake.grad is not None
    assert float(fake.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in discriminators.parameters())
    assert all(parameter.requires_grad for parameter in discriminators.parameters())
    assert all(torch.equal(value, before[name]) for name, value in discriminators.state_dict().items())
    discriminators(shown(x=images(0), reconstructed=images(1)), STREAM, 0)
    assert not all(torch.equal(value, before[name]) for name, value in discriminators.state_dict().items())


@pytest.mark.parametrize("network", ["dcgan", "patch"])
def test_an_image_s_logit_does_not_depend_on_the_others(network: str) -> None:
    discriminators = make(AdversarialConfig(widths=(8,), network=network, norm="group", augment=KINDS))
    seen = shown(x=images(0), reconstructed=images(1))
    (whole,) = discriminators.logits("image", (("x",),), seen, STREAM)
    assert whole.shape == (6, 1 if network == "dcgan" else 4)
    part = Shown(*(tensor[2:5] for tensor in seen))
    stream = STREAM._replace(slots=STREAM.slots[2:5])
    (other,) = discriminators.logits("image", (("x",),), part, stream)
    torch.testing.assert_close(other, whole[2:5])


def test_the_loss_and_its_figures_are_those_of_the_logits() -> None:
    discriminators = make(loss="hinge")
    seen = shown(x=images(0), reconstructed=images(1))
    judged = discriminators(seen, STREAM, 0)
    real, fake = (discriminators.critics["image"](2 * x - 1) for x in (seen.x, seen.reconstructed))
    expected = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    torch.testing.assert_close(judged.loss, expected)
    torch.testing.assert_close(judged.figures, torch.stack([expected, real.mean(), fake.mean(), right]))
    assert discriminators.names()[0] == "discriminator_loss"


@pytest.mark.parametrize("norm", ["none", "group"])
def test_r1_and_r2_are_half_gamma_times_the_squared_gradients(norm: str) -> None:
    seen = shown(x=images(0).double(), reconstructed=images(1).double())
    plain, penalized = make(norm=norm).double(), make(norm=norm, r1=3.0, r2=0.5).double()
    critic = plain.critics["image"]
    squares = []
    for x in (seen.x, seen.reconstructed):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(2 * x - 1).sum(), x)
        squares.append(float(gradient.square().sum()) / len(x))
    loss = penalized(seen, STREAM, 0).loss
    expected = float(plain(seen, STREAM, 0).loss.detach()) + 1.5 * squares[0] + 0.25 * squares[1]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    first = penalized.critics["image"].body[0].weight
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(2)).double()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            first.add_(direction, alpha=sign * 1e-7)
        values.append(float(penalized(seen, STREAM, 0).loss.detach()))
        with torch.no_grad():
            first.sub_(direction, alpha=sign * 1e-7)
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(float((first.grad * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_depends_on_the_position_alone_and_passes_gradients(kind: Any) -> None:
    x = (2 * images(0, channels=3) - 1).requires_grad_()
    whole = augmented(x, (kind,), STREAM, 4)
    assert not torch.equal(whole, x)
    assert not torch.equal(whole, augmented(x, (kind,), STREAM, 5)), "each set has its own draws"
    part = augmented(x[3:], (kind,), STREAM._replace(slots=STREAM.slots[3:]), 4)
    torch.testing.assert_close(part, whole[3:])
    whole.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_translation_shifts_and_cutout_removes_a_square() -> None:
    ramp = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(64, 1, 16, 16)
    stream = noise.Stream(0, 0, torch.arange(64))
    shifts = set()
    for moved in augmented(ramp, ("translation",), stream, 0):
        kept = moved[moved > 0]
        (shift,) = {int(value) for value in (ramp[0][moved > 0] - kept)}
        shifts.add(shift)
        assert len(kept) >= 14 * 14
    assert {shift % 16 for shift in shifts} == {0, 1, 2, 14, 15}
    for cut in augmented(ramp, ("cutout",), stream, 0)[:, 0]:
        gone = (cut == 0).nonzero()
        assert 16 <= len(gone) <= 64
        height, width = (gone.max(0).values - gone.min(0).values + 1).tolist()
        assert height * width == len(gone), "one rectangle"


def test_a_network_that_does_not_fit_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match="give fewer widths, or choose dcgan"):
        make(AdversarialConfig(widths=(8, 8), network="patch"))
    with pytest.raises(UserError, match="cannot be halved 4 times as the discriminator's widths ask"):
        make(AdversarialConfig(widths=(8, 8, 8, 8)))
