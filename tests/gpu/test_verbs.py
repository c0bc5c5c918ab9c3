"""The verbs after training on a GPU against the same verbs on the CPU, on copies of one run; mixtures against scikit-learn."""

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.aggregate.known import draws, known
from tests.gpu.conftest import NEEDS_GPU, ON_GPU, quiet, relative_error, without_gpu
from tests.mixtures.test_em import first, scikit_learn
from vaescale.aggregate import scatter
from vaescale.commands.baselines import baselines
from vaescale.commands.encode import encode
from vaescale.commands.evaluate import evaluate
from vaescale.commands.export import export
from vaescale.commands.fit_gmm import fit_gmm
from vaescale.commands.latents import latents
from vaescale.commands.quality import quality
from vaescale.commands.sample import sample
from vaescale.commands.served import Served
from vaescale.commands.train_features import train_features
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
from vaescale.errors import UserError
from vaescale.mixtures.em import fit
from vaescale.mixtures.gaussian import KINDS, Kind, log_density, on
from vaescale.mixtures.gaussian import sample as sample_mixture
from vaescale.mixtures.points import Points
from vaescale.noise import Stream
from vaescale.trained import open_trained

pytestmark = NEEDS_GPU
PLACES = ("cpu", "gpu")
# Of the machine or the files and not of the model.
OTHER = (
    "seconds",
    "per_second",
    "path",
    "run",
    "out",
    "folder",
    "figure",
    "hash",
    "bytes",
    "device",
    "cache",
    "picture",
)


@pytest.fixture(autouse=True)
def few_points_in_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "MOST", 120)


@pytest.fixture
def pair(trained, tmp_path: Path) -> dict[str, Path]:
    """Two copies of a run of the GPU, by the place that works on it."""
    run = trained("gpu", "training.precision=fp32")
    copies = {}
    for place in PLACES:
        folder = copies[place] = tmp_path / place
        shutil.copytree(run, folder)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"run_dir": str(folder)}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return copies


def on_both(pair: dict[str, Path], function: Callable[..., Any], **keys: Any) -> tuple[Any, Any]:
    """The results on the CPU and on the GPU."""
    results = []
    for place in PLACES:
        with without_gpu() if place == "cpu" else nullcontext():
            results.append(function(pair[place], **keys))
    return results[0], results[1]


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The numbers and words of a result by their place in it, without those of the machine."""
    if any(other in name.rpartition("/")[2] for other in OTHER):
        return {}
    if isinstance(value, dict):
        parts = [leaves(item, f"{name}/{key}") for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [leaves(item, f"{name}/{number}") for number, item in enumerate(value)]
    else:
        return {name: value}
    return {key: item for part in parts for key, item in part.items()}


def assert_same_result(cpu: Any, gpu: Any, *, rtol: float, atol: float, at_least: int = 5) -> None:
    """The same names and words, and each number within atol + rtol |number|."""
    expected, found = leaves(cpu), leaves(gpu)
    assert expected.keys() == found.keys()
    is_number = {name: isinstance(value, (int, float)) for name, value in expected.items()}
    assert sum(is_number.values()) >= at_least, expected
    far = {}
    for name, value in expected.items():
        if is_number[name] and math.isfinite(value):
            if not abs(found[name] - value) <= atol + rtol * abs(value):
                far[name] = (value, found[name])
        elif not (is_number[name] and math.isnan(value) and math.isnan(found[name])) and found[name] != value:
            far[name] = (value, found[name])
    assert not far


def test_a_trained_run_opens_on_the_gpu_and_without_it(pair) -> None:
    there = open_trained(pair["gpu"])
    assert there.device.type == ("cuda" if ON_GPU else "cpu")
    with without_gpu():
        here = open_trained(pair["cpu"])
    assert here.device.type == "cpu"
    assert here.identity == there.identity


def test_evaluate(pair) -> None:
    cpu, gpu = on_both(pair, evaluate, importance_samples=50, importance_images=40)
    assert cpu["metrics"]["images"] == 360
    assert_same_result(cpu, gpu, rtol=2e-4, atol=2e-3, at_least=15)
    nats = [result["metrics"]["neg_elbo_nats"] for result in (cpu, gpu)]
    assert nats[0] == pytest.approx(nats[1], abs=1e-3)


def test_encode(pair) -> None:
    cpu, gpu = on_both(pair, encode)
    assert_same_result(cpu, gpu, rtol=1e-3, atol=1e-4)
    means = []
    for place in PLACES:
        with without_gpu() if place == "cpu" else nullcontext():
            trained = open_trained(pair[place])
            images = torch.arange(64 * 3, dtype=torch.uint8).view(3, 1, 8, 8).to(trained.device)
            stream = Stream(0, 0, torch.arange(3, device=trained.device))
            with torch.no_grad():
                means.append(trained.model.posterior(trained.model.target(images, stream)).mu)
    assert relative_error(means[1], means[0]) < 1e-5


def test_fit_gmm_then_sample(pair, tmp_path: Path) -> None:
    cpu, gpu = on_both(pair, fit_gmm, components=(1, 3))
    assert_same_result(cpu, gpu, rtol=1e-3, atol=5e-3)
    shards = {place: tmp_path / f"samples-{place}" for place in PLACES}
    pictures = []
    for place in PLACES:
        if (
            place == "gpu"
        ):  # the CPU's mixture on both: with another fit a draw at an edge has another component
            shutil.rmtree(pair["gpu"] / "gmm")
            shutil.copytree(pair["cpu"] / "gmm", pair["gpu"] / "gmm")
        with without_gpu() if place == "cpu" else nullcontext():
            sample(pair[place], prior="gmm", decode="ancestral", count=200, shards=shards[place])
        config = DataConfig(
            train=str(shards[place]), val=str(shards[place]), image_size=8, global_batch=8, cache="memory"
        )
        reader = open_reader(str(shards[place]), config)
        pictures.append(reader.__getitems__(Request(np.arange(200), refill=False)).images.float())
    # A level of 255 may round to its neighbour.
    difference = (pictures[1] - pictures[0]).abs()
    assert float(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.01
    assert float(pictures[0].std()) > 20
    on_both(pair, sample, count=64)  # the pages
    for place in PLACES:
        assert (pair[place] / "figures" / "samples.png").stat().st_size > 1000


def test_fit_gmm_online(pair) -> None:
    cpu, gpu = on_both(pair, fit_gmm, components=(3,), online=2, online_batch=512)
    assert_same_result(cpu, gpu, rtol=1e-3, atol=5e-3)


def test_latents(pair) -> None:
    cpu, gpu = on_both(pair, latents, draws=500)
    assert_same_result(cpu, gpu, rtol=5e-3, atol=5e-3)


def test_inference_gaps(pair) -> None:
    cpu, gpu = on_both(pair, latents, draws=200, gaps=8, gap_steps=20, importance_samples=50)
    assert_same_result(cpu, gpu, rtol=1e-2, atol=3e-2)


def test_baselines(pair) -> None:
    on_both(pair, evaluate)
    cpu, gpu = on_both(pair, baselines, labels=300)
    assert_same_result(cpu, gpu, rtol=5e-3, atol=1e-2)


def test_quality_of_pixels_and_trained_features(pair, digits: Path, tmp_path: Path) -> None:
    """The features are trained once, on the GPU; the CPU reads the same file."""
    result = train_features(str(digits / "train"), out=tmp_path / "features", steps=60, width=8)
    assert leaves(result)
    for features in ("pixels", str(tmp_path / "features")):
        cpu, gpu = (
            quality_on(place, pair[place], features=features, cache=tmp_path / f"cache-{place}")
            for place in PLACES
        )
        assert_same_result(cpu, gpu, rtol=5e-3, atol=5e-3)


def quality_on(place: str, run: Path, **keys: Any) -> Any:
    with without_gpu() if place == "cpu" else nullcontext():
        result = quality(run, count=200, **keys)
    result.pop("references_from_cache")
    return result


def test_trained_features_are_the_cpu_s(digits: Path, tmp_path: Path) -> None:
    accuracies = []
    for place in PLACES:
        with without_gpu() if place == "cpu" else nullcontext():
            result = train_features(str(digits / "train"), out=tmp_path / place, steps=60, width=8)
        accuracies.append(next(value for name, value in leaves(result).items() if "accuracy" in name))
    assert accuracies[0] > 0.5
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.03)


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("origin", PLACES)
def test_exported_features_of_either_device(origin: str, pair, tmp_path: Path, device: torch.device) -> None:
    """FILE.pt2 written on a CPU has the same scores on a GPU; one written on a GPU is refused without one."""
    torch.manual_seed(0)
    where = device if origin == "gpu" else torch.device("cpu")
    file = tmp_path / "features.pt2"
    with quiet():
        batch = torch.export.Dim("batch", min=1, max=4096)
        example = (torch.rand(4, 1, 8, 8, device=where),)
        program = torch.export.export(Features().eval().to(where), example, dynamic_shapes=({0: batch},))
        torch.export.save(program, file)

    def scores(place: str) -> Any:
        cache = tmp_path / place / "cache"
        return quality_on(place, pair[place], features=str(file), trust_features=True, cache=cache)

    if origin == "gpu" and ON_GPU:  # torch cannot load it without a GPU
        with pytest.raises(UserError, match=r"CUDA.*; export it on a CPU, or use it on a machine with a GPU"):
            scores("cpu")
        assert scores("gpu")
    else:
        assert_same_result(scores("cpu"), scores("gpu"), rtol=5e-3, atol=5e-3)


@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself
@pytest.mark.parametrize("origin", PLACES)
def test_an_exported_model_serves_on_either_device(origin: str, pair, tmp_path: Path) -> None:
    with without_gpu() if origin == "cpu" else nullcontext():
        export(pair[origin], tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    answers: list[dict[str, Any]] = []
    (data,) = (path.parent for path in (tmp_path / "model").rglob("recipe.yaml"))
    for place in PLACES:
        with without_gpu() if place == "cpu" else nullcontext():
            served = Served(data)
            modes = ("reconstruct", "encode", "sample")
            answers.append({mode: served.predict(images, {"mode": mode, "seed": 3}) for mode in modes})
    for mode, expected in answers[0].items():
        assert expected.dtype == np.float32
        np.testing.assert_allclose(answers[1][mode], expected, rtol=1e-4, atol=1e-4, err_msg=mode)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # so many steps on purpose
@pytest.mark.parametrize("kind", KINDS)
def test_em_takes_scikit_learn_s_steps(kind: Kind, device: torch.device) -> None:
    z = draws(known(kind), 2000)
    begin = first(z, 4, kind)
    own = fit(Points(z.to(device)), begin, tolerance=-math.inf, max_iterations=20, dtype=torch.float64)
    reference = scikit_learn(begin, tol=0.0, max_iter=20, reg_covar=1e-6).fit(z.numpy())
    assert own.history[-1] == pytest.approx(reference.lower_bound_, abs=1e-8)
    there = log_density(on(own.mixture, device), z.to(device))
    np.testing.assert_allclose(there.cpu(), reference.score_samples(z.numpy()), atol=1e-5)
    quick = fit(Points(z.to(device).float()), begin, tolerance=-math.inf, max_iterations=20)
    np.testing.assert_allclose(quick.history, own.history, atol=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_of_moments_are_the_cpu_s(kind: Kind, device: torch.device) -> None:
    z = draws(known(kind), 2000)
    begin, variance = first(z, 3, kind), torch.full_like(z, 0.05)
    here, there = Points(z, variance), Points(z.to(device), variance.to(device))
    expected, found = (fit(points, begin, max_iterations=15, tolerance=-math.inf) for points in (here, there))
    np.testing.assert_allclose(found.history, expected.history, rtol=0, atol=5e-4)
    assert relative_error(found.mixture.means, expected.mixture.means) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_a_mixture_are_the_cpu_s(kind: Kind, device: torch.device) -> None:
    slots = torch.arange(3000)
    expected = sample_mixture(known(kind), Stream(0, 0, slots))
    found = sample_mixture(on(known(kind), device), Stream(0, 0, slots.to(device)))
    assert relative_error(found, expected) < 1e-5
    mixed = sample_mixture(known(kind), Stream(0, 0, slots.to(device)))
    assert relative_error(mixed, expected) < 1e-5
    assert mixed.device.type == device.type
