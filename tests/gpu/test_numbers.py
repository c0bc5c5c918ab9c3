"""One forward and backward pass on a GPU against the CPU in float64: noise, likelihoods, networks, objectives, precisions."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.conftest import NEEDS_GPU, ON_GPU, quiet, relative_error
from tests.likelihoods import test_contract as contract
from tests.networks import test_every_network as networks
from vaescale import noise
from vaescale.config import OneOf
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import POSTERIORS
from vaescale.models.vae import VAE
from vaescale.networks.config import NETWORKS
from vaescale.networks.group_norm import GroupNorm
from vaescale.networks.layers import GlobalBatchNorm
from vaescale.objectives.config import OBJECTIVES
from vaescale.training import launch as backends

pytestmark = NEEDS_GPU
# Float32 on the CPU against float64, over all cases below: losses 6e-7, gradients 2.3e-6. The devices' normals add 1e-6. A TF32
# product has an error of 3e-4, a bf16 product of 2e-3.
# The convolutions that cuDNN chooses for the WAE network are 8.8e-5 off (H100, cuDNN 9); TF32 is 3e-4 off and more.
LOSS, GRADIENT = 1e-5, 1.5e-4


def test_philox_has_the_same_bits(device: torch.device) -> None:
    for seed, step, first in ((3, 5, 0), (2**40 + 7, 2**21 + 1, 2**33), (0, 0, 2**31 - 8)):
        slots = torch.arange(first, first + 64)
        here, there = (noise.Stream(seed, step, place) for place in (slots, slots.to(device)))
        for purpose in (noise.POSTERIOR + 3, noise.MATCHED_PRIOR):
            for shape in ((1,), (33,), (3, 8, 8)):
                uniform = noise.uniform(there, purpose, shape).cpu()
                assert torch.equal(uniform, noise.uniform(here, purpose, shape))
                # A float32 angle below 2 pi has an error of 2.4e-7, times a radius of at most 6.7.
                normal = noise.normal(there, purpose, shape).cpu()
                torch.testing.assert_close(normal, noise.normal(here, purpose, shape), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("shape", [(1,), (4, 8, 8)])
def test_compiled_noise_is_the_same(shape: tuple[int, ...], device: torch.device) -> None:
    """Inductor fuses the rounds of a draw, with the step as a variable from its third value on."""
    with quiet():
        torch._dynamo.reset()
        uniform, normal = (torch.compile(function) for function in (noise.uniform, noise.normal))
        for step in (0, 1, 2, 3, 4, 8, 2**31 + 5):
            slots = torch.arange(32 * step, 32 * step + 32)
            here, there = (noise.Stream(7, step, place) for place in (slots, slots.to(device)))
            drawn = uniform(there, noise.POSTERIOR + 1, shape).cpu()
            assert torch.equal(drawn, noise.uniform(here, noise.POSTERIOR + 1, shape)), step
            expected = noise.normal(here, noise.POSTERIOR + 1, shape)
            torch.testing.assert_close(
                normal(there, noise.POSTERIOR + 1, shape).cpu(), expected, rtol=1e-6, atol=4e-6
            )


@pytest.mark.parametrize("name", contract.CASES)
def test_a_likelihood_has_the_value_and_the_gradient_of_float64(name: str, device: torch.device) -> None:
    """log p(x|z) and its gradient for the decoder's output and for learned numbers; then the state after the step."""
    found: list[dict[str, Tensor]] = []
    for place, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        likelihood = contract.build(name).train().to(place, dtype)
        x = contract.images(likelihood, 5).to(place, dtype)
        params = contract.decoded(likelihood, 5).to(place, dtype).requires_grad_()
        value = likelihood.log_prob(x, params, torch.tensor([1, 1, 1, 1, 0], device=place).bool())
        value[:4].sum().backward()
        likelihood.end_step()
        learned = {key: parameter.grad for key, parameter in likelihood.named_parameters()}
        state = {key: buffer.clone() for key, buffer in likelihood.named_buffers()}
        found.append({"value": value[:4], "params": params.grad[:4], **learned, **state})
    expected, there = found
    assert expected.keys() == there.keys()
    for key, value in expected.items():
        if not value.isfinite().all():  # the step at which a handover begins, before it is known
            torch.testing.assert_close(there[key].double().cpu(), value, rtol=3e-5, atol=1e-6)
            continue
        assert relative_error(there[key], value, floor=1e-6) < 3e-5, key


def passed(
    model: VAE, objective: dict[str, Any], *, scale: float = 1.0, **keys: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of six images, at step 7, and the gradient of each parameter. scale: factor of the loss in the backward pass."""
    place = next(model.parameters()).device
    loss_of = OneOf(OBJECTIVES).validate(objective).implement(model)
    images = networks.images(model).to(place)
    stream = noise.Stream(0, 7, torch.arange(6, device=place))
    mask = torch.ones(6, dtype=torch.bool, device=place)
    model.zero_grad()
    terms = model(images, stream, mask, loss_of.importance_samples, loss_of.doubly_reparameterized, **keys)
    loss, _ = loss_of(terms, stream)
    (scale * loss).backward()
    model.likelihood.end_step()
    missing = torch.zeros(())
    return loss.detach(), {
        key: missing if parameter.grad is None else parameter.grad / scale
        for key, parameter in model.named_parameters()
    }


def assert_same_pass(
    found: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    *,
    loss: float = LOSS,
    gradient: float = GRADIENT,
) -> None:
    """Relative errors of the loss, of the whole gradient and, twenty times that, of each parameter's gradient.

    A parameter whose gradient is far smaller than the whole one has a thousandth of that as floor.
    """
    assert relative_error(found[0], expected[0], floor=1.0) < loss, (found[0], expected[0])
    whole = flat(expected[1])
    assert relative_error(flat(found[1]), whole) < gradient
    for key, value in expected[1].items():
        assert relative_error(found[1][key], value, floor=1e-3 * float(whole.norm())) < 20 * gradient, key


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector, float64 on the CPU."""
    return torch.cat([value.double().cpu().flatten() for value in gradients.values()])


ELBO = {"kind": "elbo"}
# name: objective, network, posterior, likelihood
SMALL_CONV = networks.CASES["conv"][0]
LADDER = networks.SMALL_LADDER
OBJECTIVE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "beta": ({**ELBO, "beta": 4.0}, SMALL_CONV, {}, {"kind": "gaussian", "sigma": "optimal"}),
    "annealed": (
        {**ELBO, "beta": {"schedule": "sigmoid", "steps": 20}},
        SMALL_CONV,
        {},
        {"kind": "bernoulli"},
    ),
    "free bits": (
        {**ELBO, "free_bits": {"nats": 0.05}},
        SMALL_CONV,
        {"kind": "isotropic"},
        {"kind": "laplace", "sigma": "optimal"},
    ),
    "free bits of groups": (
        {**ELBO, "free_bits": {"nats": 0.05, "per": "group"}},
        LADDER,
        {"kind": "relative"},
        {"kind": "bernoulli"},
    ),
    "capacity": (
        {**ELBO, "capacity": {"nats": 5, "steps": 10}},
        SMALL_CONV,
        {},
        {"kind": "gaussian", "sigma": 1.0},
    ),
    "balancing": (
        {**ELBO, "balancing": "always"},
        LADDER,
        {"kind": "diagonal"},
        {"kind": "discretized_logistic"},
    ),
    "mmd, imq": (
        {**ELBO, "beta": 0.0, "mmd": {"weight": 10}},
        SMALL_CONV,
        {"kind": "fixed", "sigma": 0.1},
        {"kind": "gaussian", "sigma": 1.0},
    ),
    "mmd, rbf": (
        {**ELBO, "mmd": {"weight": 10, "kernel": "rbf"}},
        SMALL_CONV,
        {},
        {"kind": "student_t", "scale": "shared"},
    ),
    "dip i": ({**ELBO, "dip": {"variant": "i"}}, SMALL_CONV, {}, {"kind": "continuous_bernoulli"}),
    "dip ii": ({**ELBO, "dip": {"variant": "ii"}}, SMALL_CONV, {}, {"kind": "bitwise"}),
    "spectral": (
        {**ELBO, "spectral": 0.1},
        LADDER,
        {"kind": "relative"},
        {"kind": "gaussian", "sigma": "optimal_per_pixel"},
    ),
    "iwae": ({"kind": "iwae", "samples": 5}, LADDER, {}, {"kind": "gaussian", "sigma": "shared"}),
    "iwae, doubly": (
        {"kind": "iwae", "samples": 5, "gradient": "doubly_reparameterized"},
        SMALL_CONV,
        {},
        {"kind": "gaussian", "sigma": "predicted"},
    ),
    "dequantized": (ELBO, SMALL_CONV, {}, {"kind": "gaussian", "sigma": "optimal", "dequantize": True}),
}


def test_every_objective_and_posterior_has_a_case() -> None:
    assert {case[0]["kind"] for case in OBJECTIVE_CASES.values()} == set(OBJECTIVES)
    posteriors = [case[2] for case in OBJECTIVE_CASES.values()]
    assert {case.get("kind", "diagonal") for case in posteriors} == set(POSTERIORS)


def build_case(name: str) -> VAE:
    objective, network, posterior, likelihood = OBJECTIVE_CASES[name]
    torch.manual_seed(0)
    model = build_vae(
        OneOf(NETWORKS).validate(network),
        OneOf(POSTERIORS, default="diagonal").validate(posterior),
        OneOf(LIKELIHOODS).validate(likelihood),
        image_size=8,
        channels=1,
        spectral=objective.get("spectral", 0) > 0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize("name", OBJECTIVE_CASES)
def test_an_objective_has_the_loss_and_gradient_of_float64(name: str, device: torch.device) -> None:
    model, objective = build_case(name), OBJECTIVE_CASES[name][0]
    expected = passed(copy.deepcopy(model).double(), objective)
    assert_same_pass(passed(model.to(device), objective), expected)


@pytest.mark.parametrize("name", networks.CASES)
def test_a_network_has_the_loss_and_gradient_of_float64(name: str, device: torch.device) -> None:
    model = networks.build(name).train()
    reference, there = copy.deepcopy(model).double(), copy.deepcopy(model).to(device)
    expected = passed(reference, ELBO)
    assert_same_pass(passed(there, ELBO), expected)
    buffers = dict(there.named_buffers())
    for key, value in reference.named_buffers():  # running statistics, sigma, spectral vectors
        assert relative_error(buffers[key], value, floor=1e-6) < GRADIENT, key


# Autocast on the CPU against float64, over all cases: losses 1.2e-4 and 1.1e-4, gradients 6.9e-2 and 2.9e-2.
LOW = {"bf16": (torch.bfloat16, 2e-3, 0.2), "fp16": (torch.float16, 2e-3, 0.1)}


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", networks.CASES)
def test_half_precision_stays_near_float64(name: str, precision: str, device: torch.device) -> None:
    dtype, loss, gradient = LOW[precision]
    scale = 2.0**10 if precision == "fp16" else 1.0  # training scales the loss too
    model = networks.build(name, {"kind": "bernoulli"}).train(name not in networks.BATCH_NORM)
    reference, there = copy.deepcopy(model).double(), copy.deepcopy(model).to(device)
    expected, found = passed(reference, ELBO), passed(there, ELBO, autocast=dtype, scale=scale)
    assert relative_error(found[0], expected[0]) < loss
    error = relative_error(flat(found[1]), flat(expected[1]))
    assert 1e-5 < error < gradient, "below, it was not computed in half precision"


@pytest.mark.parametrize("name", ["conv", "resnet, attention", "ladder"])
def test_tf32_stays_near_float64(name: str, device: torch.device) -> None:
    model = networks.build(name).train()
    reference, there = copy.deepcopy(model).double(), copy.deepcopy(model).to(device)
    backends.set_precision("tf32")
    assert_same_pass(passed(there, ELBO), passed(reference, ELBO), loss=3e-3, gradient=3e-2)


@pytest.mark.parametrize("kind", ["matrix", "convolution"])
def test_precision_sets_what_products_are_computed_in(kind: str, device: torch.device) -> None:
    """TF32 rounds factors to 11 bits: the error of a product's norm is about 3e-4; that of float32 is below 1e-6 here."""
    torch.manual_seed(0)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    x, kernel = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)

    def error() -> float:
        if kind == "matrix":
            return relative_error(a.to(device) @ b.to(device), a.double() @ b.double())
        found = nn.functional.conv2d(x.to(device), kernel.to(device))
        return relative_error(found, nn.functional.conv2d(x.double(), kernel.double()))

    backends.set_precision("fp32")
    assert error() < 5e-6
    backends.set_precision("tf32")
    assert not ON_GPU or 5e-5 < error() < 2e-3
    with backends.precision_of_evaluation():
        assert error() < 5e-6
    assert not ON_GPU or 5e-5 < error() < 2e-3
    backends.set_precision("bf16")
    assert error() < 5e-6


@pytest.mark.parametrize("kind", ["group", "batch"])
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 12, 1, 1), (2, 5, 7, 7)])
@pytest.mark.parametrize("incoming", ["same", "contiguous"])
def test_a_norm_of_channels_last_maps(
    kind: Any, shape: tuple[int, ...], incoming: str, device: torch.device
) -> None:
    """Values, both gradients and the layout of the output, whatever the layout of the gradient that comes in."""
    torch.manual_seed(0)
    x, gradient = torch.randn(shape), torch.randn(shape)
    width = shape[1]
    layer = (GroupNorm(math.gcd(width, 8), width) if kind == "group" else GlobalBatchNorm(width)).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    reference = copy.deepcopy(layer).double()
    exact = x.double().requires_grad_()
    expected = reference(exact)
    expected.backward(gradient.double())
    last = x.to(device).to(memory_format=torch.channels_last).requires_grad_()
    found = layer.to(device)(last)
    coming = gradient.to(device)
    if incoming == "same":
        coming = coming.to(memory_format=torch.channels_last)
    found.backward(coming)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(last.grad, exact.grad) < 2e-5
    for parameter, other in zip(layer.parameters(), reference.parameters(), strict=True):
        assert relative_error(parameter.grad, other.grad, floor=1e-3) < 2e-5
    assert found.is_contiguous(memory_format=torch.channels_last), "a convolution would have to copy it"


@pytest.mark.parametrize("name", ["conv", "WAE", "resnet, attention", "ladder"])
def test_channels_last_changes_no_number(name: str, device: torch.device) -> None:
    model = networks.build(name).train()
    expected = passed(copy.deepcopy(model).double(), ELBO)
    model = model.to(device).to(memory_format=torch.channels_last)
    assert_same_pass(passed(model, ELBO), expected)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_recomputation_changes_no_number(autocast: torch.dtype | None, device: torch.device) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_vae(
            OneOf(NETWORKS).validate({**LADDER, "checkpointing": checkpointing}),
            OneOf(POSTERIORS, default="diagonal").validate({}),
            OneOf(LIKELIHOODS).validate({"kind": "gaussian", "sigma": "optimal"}),
            image_size=8,
            channels=1,
        )
        found.append(passed(model.train().to(device), ELBO, autocast=autocast))
    assert_same_pass(found[1], found[0], loss=1e-6, gradient=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv", "resnet", "ladder, relative"])
def test_draws_and_reconstructions_are_the_cpu_s(name: str, device: torch.device) -> None:
    model = networks.build(name).eval()
    there = copy.deepcopy(model).to(device)
    x, slots = networks.images(model), torch.arange(6)
    here, on_device = (noise.Stream(3, 2, place) for place in (slots, slots.to(device)))
    prior = there.likelihood.mean(there.from_prior(on_device))
    assert relative_error(prior, model.likelihood.mean(model.from_prior(here))) < GRADIENT
    decoded = there.reconstruct(there.target(x.to(device), on_device))
    assert relative_error(decoded, model.reconstruct(model.target(x, here))) < GRADIENT
