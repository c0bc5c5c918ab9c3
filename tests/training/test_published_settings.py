"""The settings with which a ladder trains as its authors' code does (github.com/openai/vdvae), each against what that code computes."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from vaescale.likelihoods.config import DiscretizedLogisticMixtureConfig
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.ladder import LadderVAE
from vaescale.networks.config import NETWORKS, LadderConfig, Standardize
from vaescale.networks.layers import standardized
from vaescale.recipe import load_recipe
from vaescale.training.averages import Average
from vaescale.training.config import OptimizerConfig
from vaescale.training.guard import Guard
from vaescale.training.optimizer import build_optimizer, learning_rate
from vaescale.training.strategies.base import Strategy, Verdict

RECIPES = Path(__file__).parents[2] / "recipes"
# Of 8-bit values: the shift and the scale of the authors' data.py; clip and skip in nats per dimension of their hps.py.
MOMENTS = {
    "cifar10": (120.63838, 64.16736, 200, 400),
    "imagenet32": (116.2373, 69.37404, 200, 300),
    "imagenet64": (115.92961967, 69.37404, 220, 380),
    "ffhq256": (112.8666757481, 69.84780273, 130, 180),
}
EARLIER = {  # the hashes that ladder.yaml had before the authors' settings
    "cifar10": "fc1e43bee5d4",
    "imagenet32": "a247af95d689",
    "imagenet64": "83ed9691c49a",
    "ffhq256": "70eff6f72984",
}


def ladder(posterior: DiagonalConfig, likelihood: DiscretizedLogisticMixtureConfig) -> LadderVAE:
    network = LadderConfig(width=8, latent_dim=2, standardize=Standardize(mean=0.4, sigma=0.2))
    model = build_vae(network, posterior, likelihood, image_size=8, channels=3)
    assert isinstance(model, LadderVAE)
    return model


@pytest.mark.parametrize("name", MOMENTS)
def test_the_ladders_have_the_authors_numbers_and_their_variants_the_earlier_hash(name: str) -> None:
    recipe = load_recipe(RECIPES / name / "ladder.yaml")
    mean, sigma, clip, skip = MOMENTS[name]
    moments = recipe.network.model_dump()["standardize"]
    assert 255 * moments["mean"] == pytest.approx(mean, abs=2e-5)
    assert 255 * moments["sigma"] == pytest.approx(sigma, abs=2e-5)
    dimensions = 3 * recipe.data.image_size**2
    assert recipe.optimizer.clip_norm == clip * dimensions
    assert recipe.optimizer.skip_norm == skip * dimensions
    assert recipe.optimizer.epsilon == pytest.approx(1e-8 * dimensions, rel=1e-6)
    assert load_recipe(RECIPES / name / "ladder_bounded.yaml").hash.startswith(EARLIER[name])


def test_what_decays() -> None:
    model = ladder(DiagonalConfig(), DiscretizedLogisticMixtureConfig())
    for decay, undecayed in (("all", 0), ("kernels", sum(p.ndim < 2 for p in model.parameters()))):
        config = OptimizerConfig(lr=1e-3, weight_decay=0.1, decay=decay, epsilon=1e-3)
        groups = build_optimizer(model, config).param_groups
        rates = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert len(rates) == len(list(model.parameters()))
        biases = len(model.network.biases) if decay == "kernels" else 0
        assert sum(rate == 0 for rate in rates.values()) == undecayed + biases
        assert {group["eps"] for group in groups} == {1e-3}


@pytest.mark.parametrize("start", [0, 50])
def test_a_warm_up_from_zero_has_the_rate_of_the_step_s_share(start: int) -> None:
    config = OptimizerConfig(
        lr=2.0, schedule="constant", warmup_steps=4, warmup_from_zero=True, schedule_start=start
    )
    rates = [learning_rate(start + step, config, total_steps=100) for step in range(6)]
    assert rates == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_an_average_without_warm_up_has_its_decay_from_the_first_step() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = ladder(DiagonalConfig(), DiscretizedLogisticMixtureConfig())
    build = partial(build_optimizer, config=OptimizerConfig(lr=0.1))
    strategy = Strategy(Accelerator(cpu=True), model, build, averages={"ema": Average(0.9, warmup=False)})
    weight = model.network.gain
    expected = weight.detach().clone()
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        strategy.step(step, lambda norm: Verdict(norm, torch.ones(()), torch.zeros(())))
        expected = 0.9 * expected + 0.1 * weight.detach()
    with strategy.averaged():
        torch.testing.assert_close(weight.detach(), expected)
    assert (weight.detach() - expected).abs().min() > 0.1


def test_a_fixed_norm_skips_from_the_first_step_on() -> None:
    guard = Guard(skip_norm=4.0, max_non_finite=3, device=torch.device("cpu"))
    norms = (3.9, 4.1, 100.0, 1.0, math.nan)
    skipped = [
        bool(guard.judge(torch.tensor(1.0), torch.tensor(norm), step=step).found_inf)
        for step, norm in enumerate(norms)
    ]
    assert skipped == [False, True, True, False, True]
    assert guard.metrics() == {"train/skipped_steps": 3}
    assert guard.is_well


@pytest.mark.parametrize("bounded", [True, False])
def test_log_sigma_of_posteriors_and_priors_is_bounded_or_not(bounded: bool) -> None:
    model = ladder(DiagonalConfig(bounded=bounded), DiscretizedLogisticMixtureConfig()).eval()
    with torch.no_grad():
        top = model.network.groups[0]
        for layer, latents in ((top.posterior_body.c4, 4), (top.prior_body.c4, 4)):
            layer.weight.zero_()
            layer.bias[:latents] = 20.0
        largest = 8 * math.tanh(20 / 8) if bounded else 20.0
        assert torch.allclose(model.prior().log_sigma, torch.tensor(largest))
        assert torch.allclose(model.posterior(torch.rand(2, 3, 8, 8)).log_sigma, torch.tensor(largest))


def test_the_mixture_begins_at_its_first_scale_and_has_no_ceiling_without_one() -> None:
    config = DiscretizedLogisticMixtureConfig(components=1, first_scale=1.0, scale_ceiling=None)
    mixture = config.implement(image_shape=(1, 1, 1))
    x = torch.tensor([0.0, 100.0, 255.0]).double().view(3, 1, 1, 1) / 255
    for raw in (0.0, math.log(100.0)):
        params = torch.tensor([0.0, 0.3, raw]).view(1, 3, 1, 1).expand(3, -1, -1, -1).double()
        mass = mixture.log_prob(x, params, torch.ones(3, dtype=torch.bool)).exp()
        edges = (2 * x.flatten() - 1)[:, None] + torch.tensor([-1 / 255, 1 / 255]).double()
        below = torch.sigmoid((edges - 0.3) / math.exp(raw))
        below = torch.where(edges < -1, 0.0, torch.where(edges > 1, 1.0, below))
        torch.testing.assert_close(mass, below[:, 1] - below[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["conv", "resnet", "ladder"])
def test_moments_standardize_the_encoder_s_input(kind: str) -> None:
    """The same weights infer from x with moments what they infer without them from the image with the same standardized values."""
    size = {} if kind == "conv" else {"width": 8}
    sections = [
        NETWORKS[kind].model_validate({"latent_dim": 2, **size, "standardize": moments})
        for moments in ({"mean": 0.4, "sigma": 0.2}, None)
    ]
    models = []
    for section in sections:
        torch.manual_seed(0)
        models.append(
            build_vae(
                section, DiagonalConfig(), DiscretizedLogisticMixtureConfig(), image_size=16, channels=3
            )
            .eval()
            .double()
        )
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(standardized(x, None), 2 * x - 1)
    with torch.no_grad():
        q, other = models[0].posterior(x), models[1].posterior(((x - 0.4) / 0.2 + 1) / 2)
        torch.testing.assert_close(q.mu, other.mu, rtol=1e-9, atol=1e-15)
        assert not torch.allclose(q.mu, models[1].posterior(x).mu, rtol=1e-3, atol=0)
