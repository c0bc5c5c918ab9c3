"""Codes against what their papers say, computed apart: nearest vectors, gradients, averages, k-means, restarts, levels."""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vaescale import noise
from vaescale.config import OneOf
from vaescale.evaluation.likelihood import column_sums, model_metrics
from vaescale.models import quantizer
from vaescale.models.codebook import Codebook, kmeans
from vaescale.models.config import POSTERIORS, FiniteScalarConfig, QuantizedConfig
from vaescale.models.finite_scalar import FiniteScalar
from vaescale.models.quantizer import nearest, rotated, straight_through
from vaescale.recipe import Recipe
from vaescale.trained import build_model

GO, SKIP = torch.tensor(0.0), torch.tensor(1.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_the_nearest_code_is_the_nearest(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(quantizer, "MOST_DISTANCES", at_once)
    points, codebook = random(50, 3), random(7, 3, seed=1)
    by_hand = [min(range(7), key=lambda k: float((point - codebook[k]).square().sum())) for point in points]
    assert nearest(points, codebook).tolist() == by_hand
    assert nearest(points[:1], codebook[[2, 2, 2]]).tolist() == [0]


def test_straight_through_has_the_value_of_the_code_and_its_gradient() -> None:
    vectors, codes, weights = (
        random(4, 3, 2, 2).requires_grad_(),
        random(4, 3, 2, 2, seed=1),
        random(4, 3, 2, 2, seed=2),
    )
    z = straight_through(vectors, codes)
    torch.testing.assert_close(z, codes)
    (z * weights).sum().backward()
    assert torch.equal(vectors.grad, weights)
    assert straight_through(vectors.detach(), codes) is codes


def test_the_rotation_turns_the_vector_to_its_code_and_the_gradient_with_it() -> None:
    """Fifty et al. 2024: q = lambda R e with a rotation R, which is a constant of the gradient."""
    vectors, codes, weights = (random(5, 4, seed=seed).double() for seed in range(3))
    given = vectors.clone().requires_grad_()
    z = rotated(given, codes)
    torch.testing.assert_close(z, codes)
    (z * weights).sum().backward()
    for e, q, of_q, of_e in zip(
        vectors.numpy(), codes.numpy(), weights.numpy(), given.grad.numpy(), strict=True
    ):
        unit, unit_of_code = e / np.linalg.norm(e), q / np.linalg.norm(q)
        # The rotation of the plane of both: the composition of two reflections.
        middle = unit + unit_of_code
        middle /= np.linalg.norm(middle)
        reflect = lambda axis: np.eye(4) - 2 * np.outer(axis, axis)  # noqa: E731
        matrix = reflect(middle) @ reflect(unit)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(4), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)
        np.testing.assert_allclose(matrix @ unit, unit_of_code, atol=1e-12)
        scale = np.linalg.norm(q) / np.linalg.norm(e)
        np.testing.assert_allclose(of_e, scale * matrix.T @ of_q, atol=1e-12)
        cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
        assert cosine(of_e, e) == pytest.approx(cosine(of_q, q)), "the gradient keeps its angle"


def test_a_vector_of_zeros_has_a_finite_gradient() -> None:
    for e, q in itertools.product(
        (torch.zeros(1, 3), torch.ones(1, 3)), (torch.zeros(1, 3), -torch.ones(1, 3))
    ):
        given = e.clone().requires_grad_()
        z = rotated(given, q)
        z.sum().backward()
        assert torch.isfinite(given.grad).all()
        assert torch.equal(z, q)


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5), (4, 4, 4)])
def test_levels_are_all_there_and_the_nearest_is_taken(levels: tuple[int, ...]) -> None:
    scalar = FiniteScalar(FiniteScalarConfig(levels=levels), len(levels))
    every = torch.arange(scalar.num_codes).view(-1, 1, 1)
    vectors = scalar.vectors_of(every)[:, :, 0, 0]
    grids = [np.linspace(-1, 1, count) for count in levels]
    by_hand = np.array([values[::-1] for values in itertools.product(*reversed(grids))])
    np.testing.assert_allclose(vectors.numpy(), by_hand, atol=1e-6)
    assert scalar.num_codes == math.prod(levels)
    assert sum(scalar.channel_nats) == pytest.approx(math.log(scalar.num_codes))
    raw = 2 * random(200, len(levels), 1, 1)
    found = scalar(raw)
    distances = (np.tanh(raw[:, None, :, 0, 0].numpy()) - by_hand) ** 2
    assert found.codes.flatten().tolist() == distances.sum(2).argmin(1).tolist()
    torch.testing.assert_close(found.z, scalar.vectors_of(found.codes))
    assert found.cost.shape == (200, 0)


def test_the_gradient_of_rounding_is_one_and_of_the_bound_tanh_s() -> None:
    scalar = FiniteScalar(FiniteScalarConfig(levels=(3, 4)), 2)
    raw, weights = random(5, 2, 2, 2).requires_grad_(), random(5, 2, 2, 2, seed=1)
    (scalar(raw).z * weights).sum().backward()
    torch.testing.assert_close(raw.grad, weights * (1 - torch.tanh(raw.detach()) ** 2))


def codebook(**keys: object) -> Codebook:
    return Codebook(QuantizedConfig(codes=4, **keys), 2)


def stream(step: int, slots: Tensor | None = None) -> noise.Stream:
    return noise.Stream(0, step, torch.arange(6) if slots is None else slots)


def step(
    state: Codebook,
    raw: Tensor,
    number: int,
    *,
    parts: int = 1,
    mask: Tensor | None = None,
    skipped: Tensor = GO,
) -> None:
    """One optimizer step of maps [6, 2, 3, 3], in micro-batches."""
    mask = torch.ones(6, dtype=torch.bool) if mask is None else mask
    for maps, slots, used in zip(
        raw.chunk(parts), torch.arange(6).chunk(parts), mask.chunk(parts), strict=True
    ):
        state.collect(state(maps), stream(number, slots), used)
    state.end_step(skipped)


def buffers(state: Codebook) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.state_dict().items()}


def started(**keys: object) -> Codebook:
    state = codebook(**keys)
    step(state, random(6, 2, 3, 3), 0)
    assert float(state.ready) == 1
    return state


def test_averages_follow_the_encoder_as_the_paper_says() -> None:
    """Appendix A.1 of van den Oord et al. 2017, in numpy: N_k, m_k and their quotient; images of padding do not count."""
    state = started(decay=0.8, restart_below=0)
    numbers, sums = state.counts.numpy().copy(), state.sums.numpy().copy()
    mask = torch.tensor([True, True, False, True, True, True])
    for number in range(1, 6):
        raw = random(6, 2, 3, 3, seed=number)
        points = raw[mask].permute(0, 2, 3, 1).reshape(-1, 2).numpy().astype(np.float64)
        vectors = state.vectors.numpy()
        codes = np.array([((vectors - point) ** 2).sum(1).argmin() for point in points])
        step(state, raw, number, mask=mask)
        for k in range(4):
            numbers[k] = 0.8 * numbers[k] + 0.2 * (codes == k).sum()
            sums[k] = 0.8 * sums[k] + 0.2 * points[codes == k].sum(0)
        np.testing.assert_allclose(state.counts.numpy(), numbers, rtol=1e-12)
        np.testing.assert_allclose(state.sums.numpy(), sums, rtol=1e-12)
        np.testing.assert_allclose(state.vectors.numpy(), sums / numbers[:, None], rtol=1e-6)


def test_micro_batches_are_one_batch() -> None:
    whole, parts = (
        codebook(start_step=2, restart_every=2, restart_below=0.9),
        codebook(start_step=2, restart_every=2, restart_below=0.9),
    )
    for number in range(7):
        raw = random(6, 2, 3, 3, seed=number)
        step(whole, raw, number)
        step(parts, raw, number, parts=3)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert float(whole.ready) == (number >= 1)


@pytest.mark.parametrize("number", [0, 1, 50])
def test_a_skipped_step_changes_nothing(number: int) -> None:
    """At the start, at a step, and where codes restart; the start is then made up for where the next restart is due."""
    state = codebook(restart_below=0.99) if number == 0 else started(restart_below=0.99)
    before = buffers(state)
    step(state, random(6, 2, 3, 3, seed=3), number, skipped=SKIP)
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())
    broken = random(6, 2, 3, 3, seed=3)
    broken[1, 0, 0, 0] = torch.nan
    step(state, broken, number, skipped=SKIP)
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())
    step(state, random(6, 2, 3, 3, seed=3), 50)
    assert not torch.equal(state.vectors, before["vectors"])
    assert float(state.ready) == 1


def in_order(raw: Tensor, number: int) -> np.ndarray:
    """The vectors of maps [6, 2, 3, 3] by their noise, float64 [54, 2]."""
    drawn = noise.uniform(stream(number), noise.CODES, (9, 2)).double().numpy().reshape(-1, 2)
    points = raw.permute(0, 2, 3, 1).reshape(-1, 2).double().numpy()
    return points[np.lexsort((drawn[:, 1], drawn[:, 0]))]


def test_it_starts_at_the_means_of_k_means() -> None:
    raw = random(6, 2, 3, 3)
    points = in_order(raw, 0)
    centres = points[:4].copy()
    for _ in range(10):
        codes = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        centres = np.array([points[codes == k].mean(0) for k in range(4)])
    codes = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
    state = started()
    np.testing.assert_allclose(state.vectors.numpy(), centres, rtol=1e-6)
    np.testing.assert_allclose(state.counts.numpy(), np.bincount(codes), rtol=1e-12)


def test_k_means_of_fewer_points_than_codes_repeats_them() -> None:
    points = random(3, 2).double()
    centres, sizes = kmeans(points, 5)
    torch.testing.assert_close(centres, points[[0, 1, 2, 0, 1]])
    assert sizes.tolist() == [1, 1, 1, 0, 0]


def test_until_it_starts_z_is_the_encoder_s() -> None:
    raw = random(6, 2, 3, 3)
    found = codebook()(raw)
    assert torch.equal(found.z, raw)
    assert not found.cost.any()


def test_codes_that_are_hardly_used_restart_at_vectors_of_the_batch_in_order_of_noise() -> None:
    state = started(restart_below=0.5, restart_every=10, decay=0.9)
    with torch.no_grad():
        state.counts.copy_(torch.tensor([20.0, 0.01, 30.0, 0.01], dtype=torch.float64))
        state.vectors[[1, 3]] = 100.0  # nothing is near
        state.sums.copy_(state.vectors.double() * state.counts[:, None])
    raw = random(6, 2, 3, 3, seed=5)
    step(state, raw, 9)
    assert (state.vectors[[1, 3]] > 50).all(), "not due"
    step(state, raw, 10)
    first = in_order(raw, 10)[:2]
    np.testing.assert_allclose(state.vectors[[1, 3]].numpy(), first, rtol=1e-6)
    assert state.counts[1] == state.counts[3]
    torch.testing.assert_close(
        state.sums / state.counts[:, None], state.vectors.double(), rtol=1e-6, atol=1e-6
    )


def test_a_learned_codebook_has_the_gradient_of_the_squared_distance() -> None:
    """Eq. 3: the codebook is drawn to the encoder, and with weight beta the encoder to the codebook. Finite differences."""
    state = started(codebook="gradient", commitment=0.5)
    raw = random(6, 2, 3, 3, seed=1).requires_grad_()
    found = state(raw)
    found.cost.sum().backward()
    codes, vectors = found.codes, state.vectors.detach().double()

    def distance(e: Tensor, table: Tensor) -> float:
        return float((e.double() - table[codes].permute(0, 3, 1, 2)).square().sum())

    for k, channel in itertools.product(range(4), range(2)):
        step_size = torch.zeros_like(vectors)
        step_size[k, channel] = 1e-4
        slope = (
            distance(raw.detach(), vectors + step_size) - distance(raw.detach(), vectors - step_size)
        ) / 2e-4
        assert float(state.vectors.grad[k, channel]) == pytest.approx(slope, rel=1e-3, abs=1e-3)
    torch.testing.assert_close(
        raw.grad, raw.detach() - state.vectors_of(codes).detach()
    )  # 0.5 times the gradient 2 (e - q)
    torch.testing.assert_close(found.cost, 1.5 * (raw - state.vectors_of(codes)).square().flatten(1).sum(1))


def test_its_state_keeps_its_precision() -> None:
    state = started()
    before = buffers(state)
    state.bfloat16()
    assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())


CODES = {
    "quantized": {"kind": "quantized", "codes": 16, "restart_every": 4},
    "finite_scalar": {"kind": "finite_scalar", "levels": [4, 3]},
}


@pytest.fixture
def with_codes(recipe_content):
    def content(kind: str, **changes: object) -> dict:
        network = {"kind": "conv", "latent_dim": 2, "widths": [8], "latent_map": True}
        return recipe_content | {"network": network, "posterior": CODES[kind]} | changes

    return content


@pytest.mark.parametrize("kind", CODES)
def test_the_bound_is_the_length_of_the_codes_and_of_the_image_given_them(with_codes, kind: str) -> None:
    model = build_model(Recipe.model_validate(with_codes(kind))).train()
    images = torch.randint(
        0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    mask = torch.ones(6, dtype=torch.bool)
    model(images, stream(0), mask)
    model.end_step(GO)
    model.eval()
    with torch.no_grad():
        terms = model(images, stream(1), mask)
        assert terms.codes.shape == (6, 16)
        torch.testing.assert_close(terms.kl, torch.full((6, 1), 16 * math.log(model.num_codes)))
        torch.testing.assert_close(terms.latent_kl.sum(1, keepdim=True), terms.kl)
        x = model.target(images, stream(1))
        params = model.decode_codes(terms.codes)
        torch.testing.assert_close(params, model.reconstruct(x))
        torch.testing.assert_close(model.likelihood.log_prob(x, params, mask), terms.log_px)
        drawn = model.from_prior(noise.Stream(0, 0, torch.arange(64)))
        torch.testing.assert_close(
            model.from_prior(noise.Stream(0, 0, torch.arange(9, 11))), drawn[9:11], rtol=1e-4, atol=1e-5
        )


def test_perplexity_and_usage_are_those_of_all_codes_of_used_images(with_codes) -> None:
    model = build_model(Recipe.model_validate(with_codes("finite_scalar"))).eval()
    images = torch.randint(
        0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    mask = torch.tensor([True, True, False, True, True, False])
    with torch.no_grad():
        terms = model(images, stream(0), mask)
    sums = column_sums(terms, mask, codes=12)
    metrics = model_metrics(model, sums[:-1] / sums[-1])
    share = np.bincount(terms.codes[mask].flatten().numpy(), minlength=12) / (4 * 16)
    share = share[share > 0]
    assert metrics["code_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert metrics["code_usage"] == len(share) / 12
    assert metrics["kl_nats"] == pytest.approx(16 * math.log(12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"kind": "conv", "latent_dim": 2, "widths": [8]}}, "needs a single latent map.*network.latent_map: true"),
        ({"network": {"kind": "ladder", "latent_dim": 2}}, "needs a single latent map"),
        ({"network": {"kind": "linear", "latent_dim": 2}}, "needs a single latent map"),
        ({"posterior": {"kind": "quantized", "codes": 1}}, "codes"),
        ({"posterior": {"kind": "finite_scalar", "levels": [4, 4, 4]}}, "levels .* has 3 numbers for network.latent_dim .=2.*give one for each"),
        ({"posterior": {"kind": "finite_scalar", "levels": [1, 4]}}, "levels"),
        ({"posterior": {"kind": "finite_scalar", "levels": [1024, 1025]}}, "levels"),
        ({"posterior": {"kind": "finite_scalar", "levels": []}}, "levels"),
        ({"objective": {"kind": "iwae", "samples": 2}}, "objective.kind .='iwae'. needs a Gaussian"),
        ({"objective": {"beta": 0.5}}, "objective.beta needs a Gaussian q"),
        ({"objective": {"free_bits": {"nats": 1}}}, "objective.free_bits needs a Gaussian"),
        ({"objective": {"mmd": {"weight": 1}}}, "objective.mmd needs a Gaussian"),
        ({"objective": {"kind": "aae"}}, "objective.kind .='aae'. needs a Gaussian"),
        ({"objective": {"equivariance": {}}}, "objective.equivariance needs a Gaussian"),
    ],
)  # fmt: skip
def test_recipes_that_codes_do_not_fit_are_refused(with_codes, changes, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(with_codes("quantized", **changes))


def test_too_many_codes_are_refused() -> None:
    with pytest.raises(ValidationError, match="make 1,049,600 codes; at most 1,048,576 are counted"):
        OneOf(POSTERIORS).validate({"kind": "finite_scalar", "levels": [1024, 41, 25]})
