"""Density, draws and conversions against scipy and scikit-learn."""

import json
import struct
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import multivariate_normal
from torch.utils._python_dispatch import TorchDispatchMode

from tests.aggregate.known import draws, known
from vaescale import noise
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import (
    KINDS,
    Kind,
    Mixture,
    diagonals,
    from_scikit_learn,
    log_density,
    moments,
    sample,
    to_scikit_learn,
)


def matrices(kind: Kind) -> list[np.ndarray]:
    """The components' covariances, written out."""
    mixture = known(kind)
    if kind in ("full", "tied"):
        return list(np.broadcast_to(mixture.covariances.numpy(), (3, 3, 3)))
    return [np.diag(row) for row in diagonals(mixture).numpy()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_scipy_s(kind: Kind) -> None:
    mixture = known(kind)
    z = draws(mixture, 50)
    parts = zip(mixture.weights.numpy(), mixture.means.numpy(), matrices(kind), strict=True)
    densities = sum(weight * multivariate_normal(mean, matrix).pdf(z) for weight, mean, matrix in parts)
    np.testing.assert_allclose(log_density(mixture, z), np.log(densities), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_mixture_s_moments(kind: Kind) -> None:
    z = draws(known(kind), 100_000)
    mean, covariance = moments(known(kind))
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(z.T), covariance, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_seed_and_slot_alone(kind: Kind) -> None:
    mixture = known(kind)
    everything = sample(mixture, noise.Stream(3, 0, torch.arange(20)))
    some = sample(mixture, noise.Stream(3, 0, torch.tensor([17, 4])))
    assert torch.equal(everything[[17, 4]], some)


def of_size(components: int, size: int) -> Mixture:
    """A mixture of random full covariances."""
    generator = torch.Generator().manual_seed(size)
    factors = torch.randn(components, size, size, generator=generator, dtype=torch.float64)
    means = torch.randn(components, size, generator=generator, dtype=torch.float64)
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    return Mixture(weights, means, factors @ factors.mT + torch.eye(size))


@pytest.mark.parametrize("size", [3, 20, 64])
def test_draws_are_those_of_one_matrix_for_each_draw(size: int) -> None:
    """The formula of earlier versions, which needs B Z^2 numbers: the same bits on the CPU."""
    mixture, stream = of_size(5, size), noise.Stream(3, 0, torch.arange(100))
    uniform = noise.uniform(stream, noise.MIXTURE, ()).double()
    component = torch.searchsorted(mixture.weights.cumsum(0), uniform, right=True).clamp_max(4)
    white = noise.normal(stream, noise.PRIOR, (size,)).double()
    factors = torch.linalg.cholesky(mixture.covariances)
    expected = mixture.means[component] + 0.5 * torch.einsum("nij,nj->ni", factors[component], white)
    drawn = sample(mixture, stream, temperature=0.5)
    assert torch.equal(drawn, expected.float())
    assert torch.equal(drawn[[7]], sample(mixture, noise.Stream(3, 0, torch.tensor([7])), temperature=0.5))


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any operation inside returns; a view has its base's."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for value in results if isinstance(results, tuple | list) else [results]:
            if isinstance(value, torch.Tensor):
                self.num_bytes = max(self.num_bytes, value.untyped_storage().nbytes())
        return results


def test_drawing_needs_no_matrix_for_each_draw() -> None:
    components, size, draws = 4, 64, 512
    mixture = of_size(components, size)
    with Largest() as largest:
        sample(mixture, noise.Stream(0, 0, torch.arange(draws)))
    own = 8 * components * size * size  # the covariances, of which one is a view
    assert 0 < largest.num_bytes <= max(8 * draws * size, own)


def test_temperature_is_the_components_own() -> None:
    mixture = known("full")
    cold = sample(mixture, noise.Stream(0, 0, torch.arange(200)), temperature=0.0).double()
    distances = torch.cdist(cold, mixture.means)
    assert (distances.min(1).values < 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scikit_learn_takes_it_and_gives_it_back(kind: Kind) -> None:
    mixture = known(kind)
    model = to_scikit_learn(mixture)
    z = draws(mixture, 100)
    np.testing.assert_allclose(model.score_samples(z.numpy()), log_density(mixture, z), atol=1e-8)
    assert model.sample(5)[0].shape == (5, 3)
    back = from_scikit_learn(model)
    assert back.kind == kind
    assert all(torch.equal(one, other) for one, other in zip(back[:3], mixture[:3], strict=True))
    assert mixture.num_parameters == model._n_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_from_disk(kind: Kind, tmp_path: Path) -> None:
    mixture_files.save(known(kind), tmp_path, {"seed": 3})
    loaded = mixture_files.load(tmp_path)
    assert loaded.kind == kind
    assert all(torch.equal(one, other) for one, other in zip(loaded[:3], known(kind)[:3], strict=True))
    assert json.loads((tmp_path / "mixture.json").read_text())["seed"] == 3


def test_another_step_s_mixture_is_refused(tmp_path: Path) -> None:
    mixture_files.save(known("full"), tmp_path, {"step": 3})
    assert mixture_files.load(tmp_path, step=3).kind == "full"
    with pytest.raises(UserError, match="with step 3, this is 4"):
        mixture_files.load(tmp_path, step=4)


def test_a_fit_that_was_killed_between_its_files_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = tmp_path / "mixture.json"
    mixture_files.save(known("full"), tmp_path, {"step": 3})
    before = details.read_bytes()
    mixture_files.save(known("diag"), tmp_path, {"step": 4})
    after = details.read_bytes()
    details.write_bytes(before)
    monkeypatch.setattr(mixture_files.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="is of another fit than"):
        mixture_files.load(tmp_path, step=3)
    # A fit that is still saving: the details come while the mixture is read.
    monkeypatch.setattr(mixture_files.time, "sleep", lambda _: details.write_bytes(after))
    assert mixture_files.load(tmp_path, step=4).kind == "diag"


def test_a_damaged_mixture_is_refused(tmp_path: Path) -> None:
    tensors_path = tmp_path / "mixture.safetensors"

    def saved(**changes: torch.Tensor) -> None:
        mixture_files.save(known("full"), tmp_path, {})
        save_file({**load_file(tensors_path), **changes}, tensors_path)
        details = mixture_files.read_details(tmp_path)
        (tmp_path / "mixture.json").write_text(
            json.dumps({**details, mixture_files.HASH: sha256(tensors_path.read_bytes()).hexdigest()})
        )

    with pytest.raises(UserError, match="vaescale fit-gmm"):
        mixture_files.load(tmp_path)
    wrong = {
        "finite float64": {"means": torch.full((3, 3), torch.nan, dtype=torch.float64)},
        "float64": {"means": torch.zeros(3, 3)},
        "sum to 1": {"weights": torch.ones(3, dtype=torch.float64)},
        "do not fit": {"weights": torch.ones(1, dtype=torch.float64)},
        "are not": {"covariances": torch.ones(3, 2, 2, dtype=torch.float64)},
        "positive definite": {"covariances": -torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)},
        "holds": {"more": torch.zeros(1)},
    }
    for words, changes in wrong.items():
        saved(**changes)
        with pytest.raises(UserError, match=words):
            mixture_files.load(tmp_path)
    saved()
    tensors_path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(UserError, match="damaged"):
        mixture_files.load(tmp_path)
    (tmp_path / "mixture.json").write_text('{"format": "vaescale-gmm", "version": 9}')
    with pytest.raises(UserError, match="no mixture of this version"):
        mixture_files.load(tmp_path)
