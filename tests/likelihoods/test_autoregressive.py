"""A pixel's mixture depends on near pixels before it alone, and draws, means and known images agree about it."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vaescale import noise
from vaescale.errors import UserError
from vaescale.likelihoods.autoregressive import AutoregressiveLogisticMixture, waves
from vaescale.likelihoods.config import AutoregressiveLogisticMixtureConfig
from vaescale.recipe import load_recipe


def build(
    shape: tuple[int, int, int], radius: int = 2, *, relative: bool = True
) -> AutoregressiveLogisticMixture:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoregressiveLogisticMixtureConfig(
            components=3, radius=radius, width=8, blocks=1, relative=relative
        )
        likelihood = AutoregressiveLogisticMixture(config, image_shape=shape).double().eval()
        with torch.no_grad():
            likelihood.network.last *= 4  # so that the pixels before matter
    return likelihood


def features(likelihood: AutoregressiveLogisticMixture, count: int) -> Tensor:
    shape = (count, likelihood.num_params(0), *likelihood.image_shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_all_images_of_two_pixels_sum_to_one() -> None:
    likelihood = build((1, 2, 1))
    levels = torch.arange(256.0, dtype=torch.float64) / 255
    images = torch.cartesian_prod(levels, levels).view(-1, 1, 2, 1)
    given = features(likelihood, 1)
    log_mass = torch.cat(
        [
            likelihood.log_prob(x, given.expand(len(x), -1, -1, -1), torch.ones(len(x), dtype=torch.bool))
            for x in images.split(8192)
        ]
    )
    assert float(log_mass.exp().sum()) == pytest.approx(1, abs=1e-9)
    first = log_mass.view(256, 256).logsumexp(1)
    given_first = (log_mass.view(256, 256) - first[:, None]).exp()
    assert (given_first[0] - given_first[255]).abs().max() > 1e-3, "the second pixel depends on the first"


@torch.no_grad()
@pytest.mark.parametrize(("radius", "relative"), [(1, True), (2, True), (2, False)])
def test_a_pixel_sees_the_near_pixels_before_it(radius: int, relative: bool) -> None:
    channels, height, width = shape = (2, 4, 5)
    likelihood, x = build(shape, radius, relative=relative), torch.zeros(1, *shape, dtype=torch.float64)
    given = features(likelihood, 1)
    before = likelihood.mixture_params(x, given)
    for row, column in itertools.product(range(height), range(width)):
        for channel in range(channels):
            other = x.clone()
            other[0, channel, row, column] = 1
            changed = (likelihood.mixture_params(other, given) != before).any(1)[0]
            expected = torch.zeros(height, width, dtype=torch.bool)
            for down, right in itertools.product(range(radius + 1), range(-radius, radius + 1)):
                inside = row + down < height and 0 <= column + right < width
                if inside and (down > 0 or right > 0):
                    expected[row + down, column + right] = True
            assert (changed == expected).all(), (row, column)


@torch.no_grad()
def test_draws_and_means_are_those_of_known_images() -> None:
    """What is made wave after wave is what one pass over the finished image says of each pixel."""
    likelihood = build((3, 5, 4))
    given, stream = features(likelihood, 2), noise.Stream(0, 0, torch.arange(2))
    drawn = likelihood.sample(given, stream)
    again = likelihood.mixture.draw(
        likelihood.mixture_params(drawn, given), *likelihood.mixture.uniform(stream)
    )
    assert torch.equal(drawn, again)
    assert len(drawn.unique()) > 20
    mean = likelihood.mean(given)
    exact = likelihood.mixture.mean(likelihood.mixture_params(mean, given))  # of each pixel, all its channels
    torch.testing.assert_close(mean[:, 0], exact[:, 0], rtol=0, atol=1e-4)
    again = likelihood.pixel_mean(likelihood.mixture_params(mean, given))
    torch.testing.assert_close(mean, again)


@pytest.mark.parametrize(("height", "width", "radius"), [(4, 6, 1), (6, 4, 2), (3, 2, 3)])
def test_each_wave_comes_after_what_it_depends_on(height: int, width: int, radius: int) -> None:
    order, sizes = waves(height, width, radius)
    assert sorted(order.tolist()) == list(range(height * width))
    assert len(sizes) <= width + (radius + 1) * (height - 1)
    wave_of = {}
    for number, places in enumerate(torch.split(order, sizes)):
        wave_of.update({divmod(place, width): number for place in places.tolist()})
    for (row, column), number in wave_of.items():
        for up, right in itertools.product(range(radius + 1), range(-radius, radius + 1)):
            other = (row - up, column + right)
            if other in wave_of and (up > 0 or right < 0):
                assert wave_of[other] < number


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.compile=true", "needs an uncompiled model"),
        ("objective.kind=vae_gan", "needs a decoded mean"),
        ("objective.perceptual={features: f, weight: 1}", "needs a decoded mean"),
    ],
)
def test_what_needs_a_decoded_mean_or_a_compiler_is_refused(key: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe(Path(__file__).parents[2] / "recipes/digits/autoregressive.yaml", [key])
