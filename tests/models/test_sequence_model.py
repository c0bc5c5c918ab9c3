"""A model of sequences: one call over time equals a loop over time, and every likelihood, noise and sigma know what a frame is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.likelihoods.test_contract import CASES as LIKELIHOOD_CASES
from vaescale import noise
from vaescale.config import OneOf
from vaescale.errors import UserError
from vaescale.evaluation.futures import LEVEL, strips
from vaescale.evaluation.likelihood import column_sums, model_metrics
from vaescale.likelihoods.base import LocationScale
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.models.posterior import Gaussian, kl
from vaescale.models.sequence_model import Encoded, SequenceModel
from vaescale.networks.config import NETWORKS
from vaescale.training.memory import estimate
from vaescale.training.utilization import flops_of_an_image

CONTEXT, HORIZON, SIZE = 2, 3, (8, 12)
FRAMES, STEPS = CONTEXT + HORIZON, CONTEXT + HORIZON - 1
SECTION = {
    "kind": "svg",
    "context": CONTEXT,
    "horizon": HORIZON,
    "latent_dim": 3,
    "features": 12,
    "hidden": 10,
}
ALL = torch.ones(3, dtype=torch.bool)


def build(likelihood: dict[str, Any] | None = None, **keys: Any) -> SequenceModel:
    torch.manual_seed(0)
    model = build_vae(
        OneOf(NETWORKS).validate({**SECTION, "widths": [6, 8], **keys}),
        DiagonalConfig(),
        OneOf(LIKELIHOODS).validate(likelihood or {"kind": "gaussian", "sigma": "optimal"}),
        image_size=SIZE,
        channels=1,
    )
    assert isinstance(model, SequenceModel)
    return model


def sequences(frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, frames, 1, *SIZE), generator=generator, dtype=torch.uint8)


def stream(step: int = 0) -> noise.Stream:
    return noise.Stream(0, step, torch.arange(3))


def one_step_at_a_time(model: SequenceModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters [B, S, P, H, W] and KL [B, S] by the paper's loop: each LSTM is called once for each step."""
    network, epsilon = model.network, noise.normal(stream(), noise.POSTERIOR, (STEPS, 3))
    states: list[Any] = [None, None, None]
    _, states[0] = network.posterior(network.encoder(x[:, 0])[0][:, None], None)
    params, costs = [], []
    for step in range(STEPS):
        before, maps = network.encoder(x[:, step])
        if step < CONTEXT:
            given = [each[:, None] for each in maps]
        now, _ = network.encoder(x[:, step + 1])
        raw, states[0] = network.posterior(now[:, None], states[0])
        q, p = model.gaussian(raw), None
        if network.prior is not None:
            raw, states[1] = network.prior(before[:, None], states[1])
            p = model.gaussian(raw)
        z = q.sample(epsilon[:, step, :, None])
        g, states[2] = network.predicted(before[:, None], z.transpose(1, 2), states[2])
        params.append(network.decoder(g, given)[:, 0])
        costs.append(kl(q, p).flatten(1).sum(1))
    return torch.stack(params, 1), torch.stack(costs, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "prior", "norm"), [("dcgan", "learned", "group"), ("vgg", "fixed", "none")]
)
def test_one_call_over_time_is_the_loop_over_time(backbone: str, prior: str, norm: str) -> None:
    model = build(backbone=backbone, prior=prior, norm=norm).eval()
    x = model.target(sequences(), stream())
    encoded = model.encode(x)
    drawn = model.infer(encoded, stream(), 1, False, weighted=False)
    params, costs = one_step_at_a_time(model, x)
    torch.testing.assert_close(drawn.params, params)
    torch.testing.assert_close(model.frame_kl(encoded), costs, rtol=1e-4, atol=1e-6)
    terms = model(sequences(), stream(), ALL)
    torch.testing.assert_close(terms.kl[:, 0], costs.sum(1), rtol=1e-4, atol=1e-6)
    by_frame = [model.likelihood.log_prob(x[:, step + 1], params[:, step], ALL) for step in range(STEPS)]
    torch.testing.assert_close(terms.log_px, torch.stack(by_frame).sum(0))


@torch.no_grad()
@pytest.mark.parametrize(("prior", "context"), [("learned", 2), ("fixed", 1)])
def test_what_it_generates_is_what_it_predicts_from_its_own_frames(prior: str, context: int) -> None:
    """With the generated means in the place of the frames, and the same latents, teacher forcing gives these means."""
    model = build({"kind": "gaussian"}, prior=prior, context=context, horizon=FRAMES - context).eval()
    x = model.target(sequences(), stream())
    generated = model.generate(x, stream())
    x[:, context:] = model.means(generated)
    encoded: Encoded = model.encode(x)
    of_prior, of_posterior = (
        noise.normal(stream(), purpose, (STEPS, 3)).transpose(1, 2)
        for purpose in (noise.PRIOR, noise.POSTERIOR)
    )
    p = encoded.p or Gaussian(torch.zeros_like(of_prior), torch.zeros_like(of_prior))
    z = p.sample(of_prior)
    z[:, :, : context - 1] = encoded.q.sample(of_posterior)[:, :, : context - 1]
    again = model._decoded(encoded, z)[:, context - 1 :]
    torch.testing.assert_close(again, generated, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_longer_horizon_begins_like_a_shorter_one() -> None:
    short, long = build(), build(horizon=HORIZON + 2)
    long.load_state_dict(short.state_dict())
    short.eval(), long.eval()
    x = long.target(sequences(FRAMES + 2), stream())
    params = [
        model.infer(model.encode(x[:, : model.frames]), stream(), draws, False).params
        for model in (short, long)
        for draws in (1, 2)
    ]
    for short_params, long_params in zip(params[:2], params[2:], strict=True):
        torch.testing.assert_close(long_params[:, :STEPS], short_params)
    generated = short.generate(x, stream(5), frames=HORIZON + 2)
    torch.testing.assert_close(generated[:, :HORIZON], short.generate(x, stream(5)))
    first, other = (short.frame_draws(params[0], stream(step)) for step in (0, 1))
    assert not torch.equal(
        first[:, 0] - short.means(params[0])[:, 0], first[:, 1] - short.means(params[0])[:, 1]
    )
    assert not torch.equal(first, other)
    torch.testing.assert_close(short.frame_draws(params[0][:, 1:], stream()), first[:, 1:])


def test_no_frame_sees_what_comes_after_it() -> None:
    model = build({"kind": "gaussian"}).eval()
    x = model.target(sequences(), stream()).requires_grad_()
    drawn = model.infer(model.encode(x), stream(), 1, False)
    model.means(drawn.params)[:, 1].sum().backward()  # of the third frame
    assert x.grad is not None
    seen = x.grad.abs().flatten(2).sum(2) > 0
    assert seen[:, :3].all(), "its latents see the frame itself"
    assert not seen[:, 3:].any()


@pytest.mark.parametrize("name", LIKELIHOOD_CASES)
def test_every_likelihood_decodes_frames(name: str) -> None:
    model = build(LIKELIHOOD_CASES[name]).train()
    terms = model(sequences(), stream(), ALL)
    (terms.kl.sum() - terms.log_px.mean()).backward()
    assert torch.isfinite(terms.log_px).all()
    assert all(parameter.grad is not None for parameter in model.network.parameters())
    model.end_step(torch.zeros(()))
    model.eval()
    with torch.no_grad():
        params = model.generate(model.target(sequences(), stream()), stream())
        drawn = model.frame_draws(params, stream())
        assert model.means(params).shape == drawn.shape == (3, HORIZON, 1, *SIZE)
        x, mask = model.target(sequences(), stream()), torch.tensor([True, False, True])
        encoded = model.infer(model.encode(x), stream(), 1, False).params
        alone = model.likelihood.log_prob(x[0, 1:], encoded[0], torch.ones(STEPS, dtype=torch.bool))
        torch.testing.assert_close(model.log_px(x, encoded, mask)[0], alone.sum(), rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_sigma_is_that_of_all_predicted_frames_without_padding() -> None:
    model = build().train()
    mask = torch.tensor([True, False, True])
    x = model.target(sequences(), stream())
    terms = model(sequences(), stream(), mask)
    means = model.means(model.infer(model.encode(x), stream(), 1, False).params)
    error = (x[:, 1:] - means).square()
    model.end_step(torch.zeros(()))
    assert isinstance(model.likelihood, LocationScale)
    sigma = error[mask].mean().sqrt()
    assert float(model.likelihood.sigma or 0) == pytest.approx(float(sigma), rel=1e-5)
    constant = error[0].numel() * (sigma.log() + 0.5 * math.log(2 * math.pi))
    expected = -constant - error.flatten(1).sum(1) / (2 * sigma**2)
    torch.testing.assert_close(terms.log_px, expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(terms.squared_error, error.flatten(1).sum(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_metrics_are_per_sequence_and_per_frame() -> None:
    model = build({"kind": "bitwise"}).eval()
    terms = model(sequences(), stream(), ALL)
    metrics = model_metrics(model, column_sums(terms, ALL)[:-1] / 3)
    nats, values = metrics["neg_elbo_nats"], STEPS * SIZE[0] * SIZE[1]
    assert nats == pytest.approx(float((terms.kl.sum(1) - terms.log_px).mean()))
    assert metrics["neg_elbo_nats_per_frame"] == pytest.approx(nats / STEPS)
    assert metrics["bits_per_dim"] == pytest.approx(nats / (values * math.log(2)))
    assert metrics["active_units"] <= 3, "a latent over time is one unit"


@torch.no_grad()
def test_the_weighted_bound_is_higher_with_more_draws() -> None:
    model = build({"kind": "gaussian", "sigma": 0.3}).eval()
    one, many = (model(sequences(), stream(), ALL, draws).log_weights for draws in (1, 50))
    assert (many.logsumexp(1) - math.log(50) > many.mean(1)).all()
    terms = model(sequences(), stream(), ALL)
    ratio = one[:, 0] - terms.log_px
    assert ratio.abs().max() > 0
    torch.testing.assert_close(many.mean(1), terms.log_px - terms.kl[:, 0], rtol=0.05, atol=3.0)


@pytest.mark.parametrize("sigma", ["predicted", "optimal_per_image", "optimal"])
def test_strips_show_sigma_where_it_differs(sigma: str) -> None:
    model = build({"kind": "gaussian", "sigma": sigma}).eval()
    drawn = strips(model, sequences(), torch.arange(3), seed=0)
    levels = [frames for rows in drawn.rows for name, frames in rows if name == LEVEL]
    if sigma == "optimal":
        assert (drawn.level, levels) == (None, [])
        return
    x = model.target(sequences(), stream())
    params = model.reconstruct(x).detach()
    expected = model.likelihood.deviation(params.flatten(0, 1))
    if sigma == "optimal_per_image":
        error = (x[:, 1:] - model.means(params)).square().flatten(2).mean(2).sqrt()
        expected = error[..., None, None, None].expand(-1, -1, 1, *SIZE)
    assert expected is not None
    shown = torch.stack(levels)
    assert shown[:, 0].isnan().all(), "of the first frame, which is given"
    torch.testing.assert_close(shown[:, 1:], expected.reshape(3, STEPS, 1, *SIZE), rtol=1e-4, atol=1e-5)


def test_memory_and_operations_are_those_of_whole_sequences() -> None:
    model = build().train()
    keys = {"averages": 0, "precision": "fp32", "layout": "ddp", "processes": 1}
    activations = estimate(model, images=2, **keys)["activations"]
    longer = estimate(build(horizon=2 * FRAMES).train(), images=2, **keys)["activations"]
    assert longer > 1.5 * activations
    assert flops_of_an_image(build(horizon=2 * FRAMES)) > 2 * flops_of_an_image(model)


def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="fewer widths"):
        build(widths=[4, 4, 4, 4])
    with pytest.raises(UserError, match="at most 256 frames"):
        build(horizon=255)
    with pytest.raises(UserError, match="has the bound alone"):
        build_vae(
            OneOf(NETWORKS).validate(SECTION),
            DiagonalConfig(),
            OneOf(LIKELIHOODS).validate({"kind": "gaussian"}),
            image_size=(32, 32),
            channels=1,
            has_bound=False,
        )
