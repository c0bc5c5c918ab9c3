"""Conditional models: they begin as unconditional ones, read the class everywhere, and hide it by position."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vaescale import noise
from vaescale.conditions.config import ClassCondition, VectorCondition
from vaescale.conditions.embedding import NONE, VectorEmbedding
from vaescale.errors import UserError
from vaescale.likelihoods.config import GaussianConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.flat import FlatVAE
from vaescale.models.vae import VAE
from vaescale.networks.config import (
    ConvConfig,
    LadderConfig,
    LinearConfig,
    MlpConfig,
    NetworkConfig,
    ResnetConfig,
)

NETWORKS: dict[str, NetworkConfig] = {
    "conv": ConvConfig(latent_dim=3, widths=(8, 8)),
    "map": ConvConfig(latent_dim=2, widths=(8,), latent_map=True),
    "preset": ConvConfig(latent_dim=3, preset="infogan"),
    "resnet": ResnetConfig(latent_dim=2, width=8, multipliers=(1, 2)),
    "ladder": LadderConfig(latent_dim=2, width=8, checkpointing=True),
    "mlp": MlpConfig(latent_dim=2, widths=(8, 6)),
    "linear": LinearConfig(latent_dim=2),
}
Y = torch.tensor([0, 1, 2, 0])
IMAGES = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
STREAM, MASK = noise.Stream(3, 5, torch.arange(4)), torch.ones(4, dtype=torch.bool)


def model_of(name: str, **condition: Any) -> VAE:
    torch.manual_seed(0)
    given = ClassCondition(classes=3, width=4, **condition) if condition else None
    likelihood = GaussianConfig(sigma="shared")
    return build_vae(
        NETWORKS[name], DiagonalConfig(), likelihood, image_size=8, channels=1, condition=given
    ).eval()


def changed(model: VAE) -> VAE:
    """The same with other weights, in which the class makes a difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_it_begins_as_the_unconditional_model_and_then_reads_the_class(name: str) -> None:
    plain, model = model_of(name), model_of(name, dropout=0.5, prior=name != "ladder")
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    expected, terms = plain(IMAGES, STREAM, MASK), model(IMAGES, STREAM, MASK, condition=Y)
    assert torch.equal(terms.log_px, expected.log_px)
    assert torch.equal(terms.kl, expected.kl)

    changed(model)
    terms = model(IMAGES, STREAM, MASK, condition=Y)
    (terms.kl.sum() - terms.log_px.sum()).backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    other = model(IMAGES, STREAM, MASK, condition=torch.tensor([0, 1, 1, NONE]))
    assert torch.equal(other.log_px[:2], terms.log_px[:2])
    assert not (other.log_px[2:] == terms.log_px[2:]).any()
    given, x = model.given(Y), model.target(IMAGES, STREAM)
    for number in range(4):  # one image alone
        alone = model.given(Y[number : number + 1]).reconstruct(x[number : number + 1])
        torch.testing.assert_close(alone[0], given.reconstruct(x)[number], rtol=1e-4, atol=1e-5)
    drawn = given.from_prior(STREAM)
    assert not torch.allclose(drawn[0], model.given(Y.flip(0) * 0 + 1).from_prior(STREAM)[0])


def test_the_prior_of_a_class_is_in_the_kl_in_the_weights_and_in_the_samples() -> None:
    model = changed(model_of("conv", prior=True))
    assert isinstance(model, FlatVAE)
    x, given = model.target(IMAGES, STREAM), model.given(Y)
    q, p = given.posterior(x), given.prior()
    assert not torch.equal(p.mu[0], p.mu[1])
    assert torch.equal(p.mu[0], p.mu[3])
    distributions = [Independent(Normal(one.mu, one.log_sigma.exp()), 1) for one in (q, p)]
    terms = model(IMAGES, STREAM, MASK, condition=Y)
    torch.testing.assert_close(terms.kl[:, 0], kl_divergence(*distributions), rtol=1e-4, atol=1e-4)
    z = q.mu
    torch.testing.assert_close(given.prior_log_density(z), distributions[1].log_prob(z), rtol=1e-4, atol=1e-4)
    drawn = given.infer(q, STREAM, 5, False)
    assert drawn.draws is not None
    draws = drawn.draws.view(4, 5, -1).transpose(0, 1)
    ratio = (distributions[1].log_prob(draws) - distributions[0].log_prob(draws)).T
    torch.testing.assert_close(drawn.log_ratio, ratio, rtol=1e-3, atol=1e-3)
    epsilon = noise.normal(STREAM, noise.PRIOR, (3,))
    expected = given.decode(p.mu + p.log_sigma.exp() * epsilon)
    torch.testing.assert_close(given.from_prior(STREAM), expected)


def test_a_class_is_hidden_by_the_position_in_the_global_batch() -> None:
    model = changed(model_of("conv", dropout=0.5)).train()
    slots, y = torch.arange(64), torch.arange(64) % 3
    images = IMAGES.repeat(16, 1, 1, 1)
    mask = torch.ones(64, dtype=torch.bool)

    def log_px(rows: Tensor) -> Tensor:
        stream = noise.Stream(7, 2, slots[rows])
        whole: Tensor = model(images[rows], stream, mask[rows], condition=y[rows]).log_px
        return whole

    whole = log_px(slots)
    torch.testing.assert_close(
        torch.cat([log_px(slots[:24]), log_px(slots[24:])]), whole, rtol=1e-5, atol=1e-4
    )
    told, hidden = (
        model.eval()(images, noise.Stream(7, 2, slots), mask, condition=labels).log_px
        for labels in (y, torch.full_like(y, NONE))
    )
    is_hidden = (whole - hidden).abs() < (whole - told).abs()
    assert 16 < int(is_hidden.sum()) < 48
    torch.testing.assert_close(torch.where(is_hidden, hidden, told), whole, rtol=1e-5, atol=1e-4)


def test_a_class_in_part_is_between_the_classes() -> None:
    model = changed(model_of("conv", dropout=0.5))
    x = model.target(IMAGES, STREAM)
    whole = torch.nn.functional.one_hot(Y, 3).float()
    torch.testing.assert_close(model.given(whole).reconstruct(x), model.given(Y).reconstruct(x))
    half = model.given(whole / 2 + whole.roll(1, dims=1) / 2).reconstruct(x)
    assert not torch.allclose(half, model.given(Y).reconstruct(x))


@pytest.mark.parametrize("name", ["conv", "resnet", "ladder"])
def test_a_one_hot_vector_is_the_class(name: str) -> None:
    of_class = changed(model_of(name, dropout=0.5, prior=name != "ladder"))
    condition = VectorCondition(
        size=3, member="npy", width=4, standardize=False, dropout=0.5, prior=name != "ladder"
    )
    likelihood = GaussianConfig(sigma="shared")
    model = build_vae(
        NETWORKS[name], DiagonalConfig(), likelihood, image_size=8, channels=1, condition=condition
    )
    state = model.state_dict() | of_class.state_dict()
    for part in ("embedding", "class_prior"):
        if (table := state.pop(f"{part}.table.weight", None)) is not None:
            inside = f"{part}.map"
            state |= {f"{inside}.linear.weight": table[:3].T, f"{inside}.none.weight": table[3:]}
    model.load_state_dict(state)
    one_hot = torch.nn.functional.one_hot(Y, 3).float()
    absent = torch.where(torch.tensor([False, True, False, False])[:, None], torch.nan, one_hot)
    for training in (False, True):  # in which some are hidden
        model.train(training), of_class.train(training)
        for y, vectors in ((Y, one_hot), (torch.tensor([0, NONE, 2, 0]), absent)):
            expected = of_class(IMAGES, STREAM, MASK, condition=y)
            terms = model(IMAGES, STREAM, MASK, condition=vectors)
            torch.testing.assert_close(terms.log_px, expected.log_px, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(terms.kl, expected.kl, rtol=1e-5, atol=1e-5)
    drawn, expected_draws = model.given(one_hot).from_prior(STREAM), of_class.given(Y).from_prior(STREAM)
    torch.testing.assert_close(drawn, expected_draws, rtol=1e-5, atol=1e-5)


def test_vectors_are_standardized_and_others_refused() -> None:
    condition = VectorCondition(size=2, member="npy", width=4)
    model = build_vae(
        NETWORKS["conv"], DiagonalConfig(), GaussianConfig(), image_size=8, channels=1, condition=condition
    )
    assert isinstance(model.embedding, VectorEmbedding)
    vectors = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [2.0, 7.0]])
    plain = model.embedding(vectors - torch.tensor([2.0, 5.0]))
    model.embedding.measured(torch.tensor([2.0, 5.0]), torch.tensor([0.5, 0.0]))
    standardized = model.eval().given(vectors).embedded(4)
    assert standardized is not None
    weight = model.embedding.map.linear.weight
    torch.testing.assert_close(
        standardized - plain, (vectors[:, :1] - 2) * weight[:, 0], msg="0 is not divided by"
    )
    for bad, words in (
        (vectors[:, :1], r"shape \[4, 1\], and this model takes 2 values"),
        (torch.where(vectors > 5, torch.nan, vectors), "hold NaN or infinite"),
        (torch.full((4, 2), torch.nan), "some images have no vector"),
        (Y, "takes 2 values"),
    ):
        with pytest.raises(UserError, match=words):
            model(IMAGES, STREAM, MASK, condition=bad)


@pytest.mark.parametrize(
    ("dropout", "labels", "words"),
    [
        (0.0, [0, 1, 2, 3], "class 3 is not one of the model's 3 classes"),
        (0.0, [0, 1, 2, NONE], "some images have no class"),
        (0.5, None, "none is given"),
    ],
)
def test_other_labels_are_refused(dropout: float, labels: list[int] | None, words: str) -> None:
    model = model_of("conv", dropout=dropout, prior=False)
    y = None if labels is None else torch.tensor(labels)
    with pytest.raises(UserError, match=words):
        model(IMAGES, STREAM, MASK, condition=y)
    if y is None:
        with pytest.raises(UserError, match=words):
            model.from_prior(STREAM)
