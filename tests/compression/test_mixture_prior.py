"""A mixture as the prior of the code: images come back, and their code is as long as the mixture's density says."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as torch_distributions

from tests.compression.conftest import sampled_levels, small_model
from vaescale import noise
from vaescale.compression.bins import latents
from vaescale.compression.bits_back import Codec
from vaescale.compression.masses import Code, Coded, digits_of, from_digits, received
from vaescale.compression.mixture_prior import MixturePrior
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import KINDS, Kind, Mixture

SIZE, NUMBER = 3, 6  # of latents, and of components: 16 symbols stand for 6


def mixture_of(kind: Kind, *, size: int = SIZE, seed: int = 0) -> Mixture:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = normal(NUMBER, size, size) * 0.3 + 0.4 * torch.eye(size)
    matrices = factors @ factors.mT + 0.1 * torch.eye(size)
    covariances = {
        "full": matrices,
        "tied": matrices[0],
        "diag": matrices.diagonal(dim1=-2, dim2=-1),
        "spherical": matrices[:, 0, 0],
    }
    weights = torch.arange(NUMBER, dtype=torch.float64)  # the first is never drawn
    return Mixture(weights / weights.sum(), normal(NUMBER, size), covariances[kind], kind)


def density(mixture: Mixture, z: torch.Tensor) -> torch.Tensor:
    """log p(z) [B] by torch.distributions, with a full matrix for each component."""
    of_kind = {
        "full": lambda one: one,
        "tied": lambda one: one.expand(NUMBER, -1, -1),
        "diag": torch.diag_embed,
        "spherical": lambda one: one[:, None, None] * torch.eye(SIZE, dtype=torch.float64),
    }
    components = torch_distributions.MultivariateNormal(
        mixture.means, of_kind[mixture.kind](mixture.covariances)
    )
    weights = torch_distributions.Categorical(mixture.weights)
    log_density: torch.Tensor = torch_distributions.MixtureSameFamily(weights, components).log_prob(z)
    return log_density


@pytest.mark.parametrize("kind", KINDS)
def test_images_come_back_and_cost_the_elbo_under_the_mixture(kind: Kind) -> None:
    chunks = pytest.importorskip("vaescale.compression.chunks")
    pytest.importorskip("constriction")
    model = small_model("bernoulli", scale=0.9)
    mixture, number = mixture_of(kind), 130
    codec = Codec(model, mixture=mixture)
    levels = sampled_levels(model, number)
    coding = chunks.encode_chunk(codec, levels)
    assert np.array_equal(chunks.decode_chunk(codec, coding), levels)
    bits = float(coding.lengths.total.sum()) + 32 * coding.initial_words
    assert 32 * len(coding.words) == pytest.approx(bits, rel=1e-4, abs=96)

    few = levels[: codec.batch].astype(np.int64)
    stream = noise.Stream(0, 0, torch.arange(len(few)))
    bins = list[np.ndarray]()

    class Seen(MixturePrior):
        def coded(self, of_images, take):
            bins.append(of_images)
            return super().coded(of_images, take)

    codec.mixture = Seen(mixture, codec.latent_bits)
    lengths = codec.lengths(few, stream)
    z = torch.from_numpy(latents(bins[0], None, codec.latent_bits))
    mu, log_sigma = torch.from_numpy(codec.outputs(few, bins[0]).posterior).chunk(2, dim=1)
    log_q = torch_distributions.Normal(mu, log_sigma.exp()).log_prob(z).sum(1)
    paid = (lengths.prior - lengths.back) * math.log(2)
    assert paid == pytest.approx((log_q - density(mixture, z)).numpy(), abs=0.1), "of each image"
    assert paid.mean() == pytest.approx(float((log_q - density(mixture, z)).mean()), abs=5e-3)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_a_symbol_that_stands_for_no_component_is_coded_too(kind: Kind) -> None:
    """It is popped about once in 10^7 images."""
    prior = MixturePrior(mixture_of(kind), 8)
    bins = np.random.default_rng(0).integers(0, 256, (5, SIZE))
    symbols = digits_of(np.array([0, NUMBER - 1, NUMBER, 15, 1]), prior.levels)

    def forced(code: Code) -> Coded:
        waiting = iter(symbols)
        return received(code, lambda _: next(waiting))

    coded = prior.coded(bins, forced)
    assert np.isfinite(coded.bits).all()
    tables, columns = iter(coded.bins.tables), iter(coded.bins.symbols)

    def known(table: np.ndarray) -> np.ndarray:
        assert np.array_equal(table, next(tables)), "the decoder sees the same masses"
        return next(columns)

    back = received(prior.bins_code(from_digits(coded.components.symbols)), known)
    assert np.array_equal(prior.bins_of(back), bins)


def test_the_bits_of_a_mixture_are_known() -> None:
    """Another processor, numpy or LAPACK must give these tables too: files depend on them."""
    means = torch.tensor([[0.5, -0.25, 0.125], [-1.0, 0.75, 0.0]], dtype=torch.float64)
    matrix = torch.tensor([[0.5, 0.2, -0.1], [0.2, 0.3, 0.05], [-0.1, 0.05, 0.4]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    prior = MixturePrior(Mixture(weights, means, torch.stack([matrix, matrix * 0.3])), 4)
    coded = prior.coded(
        np.array([[3, 9, 12]]), lambda code: received(code, lambda _: np.array([1], np.int32))
    )
    (of_component,) = received(
        prior.component_code(np.array([[3, 9, 12]])), lambda _: np.array([1], np.int32)
    ).tables
    rows = [row for table in (of_component, *coded.bins.tables) for row in table.astype(int).tolist()]
    assert rows == KNOWN


KNOWN = [
    [14600390, 2176822, 0, 0],
    [13416333, 3278476, 82275, 128],
    [1760916, 5559722, 5574141, 3882433],
    [0, 9103, 4360109, 12408000],
    [220854, 1120593, 4184370, 11251395],
    [1947157, 11773984, 3034103, 21968],
    [15235274, 1496766, 45090, 82],
]


def test_models_whose_prior_no_mixture_replaces_are_refused() -> None:
    ladder = small_model("bernoulli", network={"kind": "ladder", "width": 8, "latent_dim": 2})
    with pytest.raises(UserError, match="this run is a ladder"):
        Codec(ladder, mixture=mixture_of("full"))
    with pytest.raises(UserError, match="runs without a condition"):
        Codec(small_model("bernoulli", condition={"classes": 3, "width": 4}), mixture=mixture_of("full"))
    singular = mixture_of("tied")._replace(covariances=torch.ones(SIZE, SIZE, dtype=torch.float64))
    with pytest.raises(UserError, match="not positive definite"):
        Codec(small_model("bernoulli"), mixture=singular)
