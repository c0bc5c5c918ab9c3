"""Bits back: every image comes back equal, and its code is as long as the negative ELBO says."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.compression.conftest import CODED, random_levels, sampled_levels, small_model
from vaescale import noise
from vaescale.compression.bins import latents
from vaescale.compression.bits_back import Codec, Lengths
from vaescale.compression.code_length import CodeLength
from vaescale.compression.masses import coded
from vaescale.data.batch import Batch
from vaescale.errors import DataError, UserError
from vaescale.evaluation.measures import Seen
from vaescale.models.posterior import kl

SHAPES = [(1, 8, 8), (3, 4, 6), (2, 6, 4)]
VECTORS: dict[str, Any] = {"kind": "vector", "size": 2, "member": "json:angle", "width": 4}
LADDER: dict[str, Any] = {"kind": "ladder", "width": 8, "latent_dim": 2}
NETWORKS: list[dict[str, Any]] = [
    {},
    {"latent_map": True},
    {"kind": "resnet", "width": 4, "multipliers": [1], "blocks": 1, "attention": False},
    {"kind": "mlp", "widths": [8]},
    LADDER,
]


def stream_of(number: int) -> noise.Stream:
    return noise.Stream(0, 0, torch.arange(number))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(CODED)),
    st.sampled_from(SHAPES),
    st.sampled_from(NETWORKS),
    st.integers(1, 70),
    st.sampled_from([4, 8, 12, 16]),
    st.booleans(),
)
def test_images_come_back(
    kind: str,
    shape: tuple[int, int, int],
    network: dict[str, Any],
    number: int,
    latent_bits: int,
    isotropic: bool,
) -> None:
    chunks = pytest.importorskip("vaescale.compression.chunks")
    pytest.importorskip("constriction")
    model = small_model(
        kind, shape=shape, network=network, isotropic=isotropic and network.get("kind") != "mlp"
    )
    codec = Codec(model, latent_bits=latent_bits)
    levels = random_levels(number, shape, codec.pixels.levels)
    coding = chunks.encode_chunk(codec, levels)
    assert np.array_equal(chunks.decode_chunk(codec, coding), levels)
    bits = float(coding.lengths.total.sum()) + 32 * coding.initial_words
    assert 32 * len(coding.words) == pytest.approx(bits, rel=1e-4, abs=96), "the masses are what is coded"


@pytest.mark.parametrize(
    ("network", "condition"),
    [
        (LADDER, None),
        (LADDER, {"classes": 3, "width": 4}),
        ({}, {"classes": 3, "width": 4, "dropout": 0.1}),
        ({}, {"classes": 3, "width": 4, "prior": True}),
        ({}, {**VECTORS, "prior": True}),
        (LADDER, {**VECTORS, "standardize": False}),
    ],
)
def test_priors_that_depend_on_the_groups_above_or_on_the_class(
    network: dict[str, Any], condition: dict[str, Any] | None
) -> None:
    chunks = pytest.importorskip("vaescale.compression.chunks")
    pytest.importorskip("constriction")
    model = small_model("discretized_logistic", network=network, condition=condition)
    codec = Codec(model, latent_bits=8)
    assert (codec.groups > 3) == (network == LADDER)
    levels = random_levels(30, (1, 8, 8), 256)
    given = np.arange(30) % 3
    if codec.vector_size:
        given = np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32)
    coding = chunks.encode_chunk(codec, levels, condition=given)
    assert max(coding.batches) > 1
    assert np.array_equal(chunks.decode_chunk(codec, coding, condition=given), levels)
    bits = float(coding.lengths.total.sum()) + 32 * coding.initial_words
    assert 32 * len(coding.words) == pytest.approx(bits, rel=1e-4, abs=96)
    assert coding.lengths.prior == pytest.approx(codec.latents * 8), "each bin of a prior has the same mass"
    alone = codec.lengths(levels[4:5].astype(np.int64), stream_of(1), given[4:5]).total
    assert alone == pytest.approx(
        codec.lengths(levels[4:9].astype(np.int64), stream_of(5), given[4:9]).total[:1]
    )
    if condition is not None:
        other = codec.lengths(levels[4:5].astype(np.int64), stream_of(1), given[5:6]).total
        assert abs(float(other[0] - alone[0])) > 0.1, "the class matters"
        with pytest.raises(DataError, match="checksums differ"):
            chunks.decode_chunk(codec, coding, condition=np.roll(given, 1, 0))
        wrong = np.full_like(given[:1], 3 if codec.classes else np.inf)
        with pytest.raises(UserError, match=r"class 3 is not one|hold NaN or infinite"):
            codec.lengths(levels[:1].astype(np.int64), stream_of(1), wrong)


@pytest.mark.parametrize("kind", ["bernoulli", "bitwise"])
def test_many_initial_words_hold_the_first_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = pytest.importorskip("vaescale.compression.chunks")
    pytest.importorskip("constriction")
    codec = Codec(small_model(kind, network=LADDER), latent_bits=4)
    number = 50 if kind == "bernoulli" else 20
    levels = np.random.default_rng(0).integers(0, codec.pixels.levels, (number, 1, 8, 8), dtype=np.uint8)
    plain = chunks.encode_chunk(codec, levels)
    monkeypatch.setattr(chunks, "MOST_EMPTY_WORDS", 8)
    coding = chunks.encode_chunk(codec, levels)
    assert plain.first_images == 0 < coding.first_images < number
    assert coding.images == number == coding.first_images + len(coding.grids.pixels)
    assert len(coding.words) < len(plain.words)
    assert np.array_equal(chunks.decode_chunk(codec, coding), levels)
    few = coding.first_images
    assert chunks.encode_chunk(codec, levels[:few]).first_images == 0, "too few to fill the words"
    with pytest.raises(DataError, match="they hold images"):
        chunks.decode_chunk(codec, coding._replace(words=coding.words[5:]))


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)])
def test_pixels_cost_their_log_probability(kind: str, shape: tuple[int, int, int]) -> None:
    codec = Codec(small_model(kind, shape=shape))
    bins = np.random.default_rng(1).integers(0, 1 << codec.latent_bits, (6, codec.latents))
    with torch.no_grad():
        params = codec.model.decode(torch.from_numpy(latents(bins, None, codec.latent_bits)), stream_of(6))
        likelihood = codec.model.likelihood
        x = likelihood.sample(params, stream_of(6))
        log_px = likelihood.log_prob(x, params, torch.ones(6, dtype=torch.bool))
    levels = (x * (codec.pixels.levels - 1)).round().long().numpy()
    one = coded(codec._pixel_code(codec.outputs(levels, bins).pixels), codec.pixels.symbols(levels))
    bits = np.sum([row.reshape(6, -1).sum(1) for row in one.bits], axis=0)
    assert bits * math.log(2) == pytest.approx(-log_px.numpy(), rel=2e-3)
    assert np.array_equal(codec.pixels.levels_of(codec.pixels.symbols(levels)), levels)


@pytest.mark.parametrize("kind", ["categorical", "discretized_logistic", "discretized_logistic_mixture"])
def test_the_masses_of_all_levels_add_up(kind: str) -> None:
    """Of the last channel given those before, at 256 places that differ in it alone."""
    model = small_model(kind, shape=(2, 16, 16))
    codec = Codec(model)
    nothing = np.zeros((1, *codec.image_shape), np.int64)
    p = codec.outputs(nothing, np.full((1, codec.latents), 700)).pixels
    shape = codec._parameters_shape
    same = np.broadcast_to(p.reshape(1, *shape)[:, :, 5:6, 7:8], (1, *shape))
    levels = np.stack([np.full((16, 16), 93), np.arange(256).reshape(16, 16)])[None]
    one = coded(codec.pixels.code(np.ascontiguousarray(same)), codec.pixels.symbols(levels))
    of_last = np.sum(one.bits[len(one.bits) // 2 :], axis=0)
    assert (2.0**-of_last).sum() == pytest.approx(1, abs=1e-6)


def test_latents_cost_their_divergence() -> None:
    """A linear encoder: the posterior is Gaussian in closed form, and a decoder that ignores z codes each bit in one."""
    model = small_model("bernoulli", shape=(1, 4, 4), network={"kind": "linear", "latent_dim": 5})
    with torch.no_grad():
        model.network.decoder.weight.zero_()
        model.network.decoder.bias.zero_()
        model.network.log_sigma.copy_(torch.tensor([-3.0, -2.0, -1.0, -0.3, 0.1]))
    codec = Codec(model, latent_bits=16)
    number = 1500
    levels = random_levels(number, (1, 4, 4), 2).astype(np.int64)
    parts = [
        codec.lengths(levels[first : first + 50], noise.Stream(3, 0, torch.arange(first, first + 50)))
        for first in range(0, number, 50)
    ]
    lengths = Lengths(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    assert lengths.pixels == pytest.approx(16, rel=1e-5)
    with torch.no_grad():
        exact = kl(model.double().posterior(torch.from_numpy(levels).double())).sum(1).numpy() / math.log(2)
    paid = lengths.prior - lengths.back
    error = (paid - exact).std() / math.sqrt(number)
    assert abs((paid - exact).mean()) < 4 * error
    assert error < 0.01 * exact.mean(), "the test can tell 4%"


@pytest.mark.parametrize(
    ("kind", "network", "condition"),
    [
        ("bernoulli", {}, None),
        ("discretized_logistic_mixture", {}, None),
        ("bitwise", LADDER, {"classes": 3, "width": 4}),
        ("bernoulli", {}, {"classes": 3, "width": 4, "prior": True}),
    ],
)
def test_the_code_length_is_the_negative_elbo(
    kind: str, network: dict[str, Any], condition: dict[str, Any] | None
) -> None:
    model = small_model(kind, network=network, condition=condition, scale=0.9)
    labels = torch.arange(200) % 3
    images = torch.from_numpy(sampled_levels(model.given(labels), 200)) * (
        1 if model.likelihood.levels == 256 else 255
    )
    numbers = torch.arange(200)
    batch = Batch(images, labels, numbers, numbers != 7)
    seen = Seen(model, batch, seed=0)
    measure = CodeLength(model, seed=0)
    with torch.no_grad():
        measure.add(seen, lambda _: None)
        terms = seen.model.terms(seen.x, seen.drawn, seen.mask)
    metrics = measure.metrics()
    bound = (terms.kl.sum(1) - terms.log_px)[seen.mask].mean().item()
    assert metrics["code_length_nats"] == pytest.approx(bound, rel=0.02)
    assert metrics["code_length_bits_per_dim"] == pytest.approx(
        metrics["code_length_nats"] / 64 / math.log(2)
    )


def test_the_length_of_an_image_does_not_depend_on_its_batch() -> None:
    codec = Codec(small_model("bitwise"))
    levels = random_levels(11, (1, 8, 8), 256).astype(np.int64)
    together = codec.lengths(levels, stream_of(11)).total
    apart = [
        float(codec.lengths(levels[n : n + 1], noise.Stream(0, 0, torch.tensor([n]))).total[0])
        for n in range(11)
    ]
    assert together.tolist() == apart


def test_the_model_itself_stays_as_it_is() -> None:
    model = small_model("bernoulli")
    threads = torch.get_num_threads()
    Codec(model).lengths(random_levels(2, (1, 8, 8), 2).astype(np.int64), stream_of(2))
    assert next(model.parameters()).dtype == torch.float32
    assert torch.get_num_threads() == threads


def test_models_without_a_code_are_refused() -> None:
    with pytest.raises(UserError, match="has no lossless code"):
        Codec(small_model("gaussian"))
    sequences = {"kind": "svg", "context": 2, "horizon": 2, "features": 4, "hidden": 4, "widths": [4]}
    with pytest.raises(UserError, match="a run of sequences"):
        Codec(small_model("bernoulli", network=sequences))
    model = small_model("bernoulli")
    model.has_bound = False
    with pytest.raises(UserError, match="trains no likelihood"):
        Codec(model)
    with pytest.raises(UserError, match=r"gaussian.*is a density"):
        CodeLength(small_model("gaussian"), seed=0)
