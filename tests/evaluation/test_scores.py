"""The scores of each image: the means of `evaluate`, whatever the network and the likelihood, and the corrections by hand."""

import io
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.likelihoods import test_contract as likelihoods
from tests.networks import test_every_network as networks
from vaescale.config import OneOf
from vaescale.data.batch import Batch, Fault
from vaescale.errors import UserError
from vaescale.evaluation.glimpse import error_maps
from vaescale.evaluation.likelihood import Bound, bits_per_dim, evaluate
from vaescale.evaluation.measures import measure
from vaescale.evaluation.scores import Background, Extremes, Rows, Scores, refuse_background, score_names
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import POSTERIORS
from vaescale.models.vae import VAE
from vaescale.networks.config import NETWORKS

LN2 = math.log(2)
PER_IMAGE = {"kind": "gaussian", "sigma": "optimal_per_image"}
# A case of each kind of network, and the likelihoods whose sigma differs between values.
EACH_NETWORK = {network["kind"]: name for name, (network, *_) in reversed(networks.CASES.items())}
MAPPED = {
    *("optimal_per_channel", "optimal_per_pixel", "predicted", "handover", "laplace, predicted"),
    *("student", "student, fixed", "student, one predicted"),
}


def tiny(likelihood: dict[str, Any], *, seed: int = 0, channels: int = 3, size: int = 6) -> VAE:
    torch.manual_seed(seed)
    return build_vae(
        OneOf(NETWORKS).validate({"kind": "linear", "latent_dim": 2}),
        OneOf(POSTERIORS, default="diagonal").validate({}),
        OneOf(LIKELIHOODS).validate(likelihood),
        image_size=size,
        channels=channels,
    ).eval()


def batches_of(model: VAE, *sizes: int) -> Iterator[Batch]:
    """Batches of random images; the third image of the first one cannot be used."""
    start, generator = 0, torch.Generator().manual_seed(1)
    for size in sizes:
        images = torch.randint(0, 256, (size, *model.image_shape), generator=generator, dtype=torch.uint8)
        numbers = torch.arange(start, start + size)
        faults = (Fault(2, "damaged", "image 2: cut"),) if start == 0 else ()
        names = tuple(f"image {number}" for number in numbers.tolist())
        yield Batch(images, numbers % 3, numbers, numbers != 2, names, faults)
        start += size


def scored(model: VAE, *sizes: int, seed: int = 4, **options: Any) -> tuple[list[str], np.ndarray, dict]:
    """The names and the scores of all usable images, by score."""
    rows: list[Rows] = []
    bound = Bound(model)
    scores = Scores(model, lambda found, _: rows.append(found), bound=bound, **options)
    assert measure(model, batches_of(model, *sizes), [scores], seed=seed) == {}
    names = score_names(model.likelihood, **options)
    values = np.concatenate([one.values for one in rows])
    assert [fault.number for one in rows for fault in one.faults] == [2]
    return (
        [name for one in rows for name in one.names],
        dict(zip(names, values.T, strict=True)),
        bound.metrics(),
    )


def assert_means(model: VAE) -> None:
    names, scores, metrics = scored(model, 5, 4)
    assert names == [f"image {number}" for number in range(9) if number != 2]
    expected = evaluate(model, batches_of(model, 5, 4), seed=4)
    assert metrics == expected
    assert (expected["images"], expected["skipped"]) == (8, 1)
    of = "profile_" if model.likelihood.reads_x else ""
    assert -scores.pop(f"neg_{of}log_px_nats").mean() == pytest.approx(expected[f"{of}log_px_nats"], rel=1e-6)
    for name, values in scores.items():
        assert values.mean() == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", EACH_NETWORK.values(), ids=EACH_NETWORK.keys())
def test_means_are_those_of_evaluate_for_every_network(name: str) -> None:
    assert_means(networks.build(name).eval())


def test_every_likelihood_has_a_case() -> None:
    assert {case["kind"] for case in likelihoods.CASES.values()} == set(LIKELIHOODS)


@pytest.mark.parametrize("name", [*likelihoods.CASES, "optimal_per_image"])
def test_means_are_those_of_evaluate_for_every_likelihood(name: str) -> None:
    model = tiny(likelihoods.CASES.get(name, PER_IMAGE))
    assert_means(model)
    images = next(batches_of(model, 3)).images
    rows = error_maps(model, images, torch.arange(3), seed=0)
    assert [label.partition(",")[0] for label, _ in rows[:3]] == ["original", "decoded", "|error|"]
    assert all(torch.isfinite(pictures).all() for _, pictures in rows)
    levels = {label.partition(",")[0] for label, _ in rows[3:]}
    structured = name.startswith("structured")
    assert levels == ({"sigma given later pixels"} if structured else {"sigma"} if name in MAPPED else set())


def test_company_does_not_matter() -> None:
    model = tiny({"kind": "gaussian", "sigma": 0.2})
    _, together, _ = scored(model, 9)
    _, apart, _ = scored(model, 3, 3, 3)
    for name, values in together.items():
        np.testing.assert_allclose(apart[name], values, rtol=1e-5)


def test_a_likelihood_ratio_is_the_difference_of_two_bounds() -> None:
    model, other = tiny({"kind": "gaussian", "sigma": 0.2}), tiny({"kind": "laplace", "sigma": 0.3}, seed=1)
    _, scores, _ = scored(model, 6, background=Background(other, seed=9))
    _, background, _ = scored(other, 6, seed=9)
    expected = scores["neg_elbo_nats"] - background["neg_elbo_nats"]
    np.testing.assert_allclose(scores["likelihood_ratio_nats"], expected, rtol=1e-12)
    _, same, _ = scored(model, 6, background=Background(model, seed=4))
    assert (same["likelihood_ratio_nats"] == 0).all()


@pytest.mark.parametrize("likelihood", [{"kind": "gaussian", "sigma": 0.2}, {"kind": "categorical"}])
def test_the_complexity_is_the_length_of_a_lossless_file(likelihood: dict[str, Any]) -> None:
    model = tiny(likelihood)
    _, scores, _ = scored(model, 6, complexity="png")
    usable = np.arange(6) != 2
    lengths = []
    for image in next(batches_of(model, 6)).images[usable]:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        lengths.append(8 * len(file.getvalue()))
    assert scores["complexity_bits"].tolist() == lengths
    measured = [
        bits_per_dim(nll, 108, model.likelihood.added_bits or 0.0) * 108 for nll in scores["neg_elbo_nats"]
    ]
    np.testing.assert_allclose(scores["corrected_complexity_bits"], np.array(measured) - lengths, rtol=1e-12)
    _, webp, _ = scored(model, 6, complexity="webp")
    assert (webp["complexity_bits"] != scores["complexity_bits"]).all()


def test_a_black_and_white_model_compresses_what_it_models() -> None:
    """Its images are binarized: the grey ones are longer files."""
    model = tiny({"kind": "bernoulli", "binarize": "threshold"}, channels=1, size=16)
    _, scores, _ = scored(model, 4, complexity="png")
    grey = next(batches_of(model, 4)).images[torch.arange(4) != 2]
    for image, bits in zip(grey, scores["complexity_bits"], strict=True):
        assert bits < 8 * len(zlib.compress(image.numpy().tobytes()))


def test_what_does_not_compare_is_refused() -> None:
    gaussian, per_image = tiny({"kind": "gaussian", "sigma": 0.2}), tiny(PER_IMAGE)
    refuse_background(gaussian, tiny({"kind": "laplace", "sigma": 0.2}))
    refuse_background(tiny({"kind": "bitwise"}), tiny({"kind": "categorical"}))
    for other, words in (
        (tiny({"kind": "categorical"}), "a mass over 256 levels and RUN a density"),
        (tiny({"kind": "gaussian", "sigma": 0.2}, size=5), "a model of 3x5x5 images and RUN one of 3x6x6"),
        (per_image, "fits sigma to each image"),
    ):
        with pytest.raises(UserError, match=words):
            refuse_background(gaussian, other)
    with pytest.raises(UserError, match="256 levels and RUN a mass over 2 levels"):
        refuse_background(tiny({"kind": "bernoulli"}), tiny({"kind": "categorical"}))
    with pytest.raises(UserError, match="leave --complexity out"):
        score_names(per_image.likelihood, complexity="png")
    with pytest.raises(UserError, match="leave --background out"):
        score_names(per_image.likelihood, background=Background(gaussian, 0))


def test_the_extremes_of_many_batches_are_those_of_all() -> None:
    model = tiny({"kind": "gaussian", "sigma": 0.2})
    kept = [Extremes(3), Extremes(3)]
    scores = np.random.default_rng(0).normal(size=24)
    scores[5] = math.nan
    start, images = 0, {}
    for number, batch in enumerate(batches_of(model, 5, 5, 5, 10)):
        count = int(batch.mask.sum())
        names = [name for name, used in zip(batch.keys, batch.mask.tolist(), strict=True) if used]
        kept[number % 2].add(scores[start : start + count], names, batch)
        images |= dict(zip(batch.keys, batch.images, strict=True))
        start += count
    merged = Extremes(3)
    merged.merge(kept)
    order = np.argsort(scores)  # NaN last
    numbers = [number for number in range(25) if number != 2]
    lowest, highest = merged.lowest(), merged.highest()
    assert [one[1] for one in lowest] == [numbers[place] for place in order[:3]]
    assert [one[1] for one in highest] == [numbers[place] for place in order[::-1][:3]]
    for _, slot, name, image in [*lowest, *highest]:
        assert name == f"image {slot}"
        assert torch.equal(image, images[name])
    assert merged._kept[0][3].untyped_storage().nbytes() == 108, "not the whole batch"


def test_no_image_is_kept_where_no_picture_is_drawn() -> None:
    kept = Extremes(0)
    (batch,) = batches_of(tiny(PER_IMAGE), 5)
    kept.add(
        np.arange(int(batch.mask.sum())),
        [name for name, used in zip(batch.keys, batch.mask, strict=True) if used],
        batch,
    )
    assert kept._kept == [], "memory does not grow with the images"
