"""Kinds from a user's own module: the documented example, `--import`, entry points, and runs whose module is missing."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

import vaescale as package
from tests.extensions.cauchy import CauchyConfig
from tests.extensions.perceptron import PerceptronConfig
from tests.extensions.scaled import ScaledConfig
from tests.extensions.squared import SquaredConfig
from vaescale import noise
from vaescale.commands.sweep import sweep
from vaescale.data.making.sources import SOURCES
from vaescale.data.making.sources.digits import digits as digits_source
from vaescale.errors import UserError
from vaescale.evaluation.reconstruction import METRICS
from vaescale.likelihoods.config import LIKELIHOODS, LikelihoodConfig
from vaescale.models.config import POSTERIORS
from vaescale.networks.config import NETWORKS
from vaescale.objectives.config import OBJECTIVES
from vaescale.system import plugins

EXAMPLE = Path(__file__).parents[1] / "docs/examples/my_likelihood.py"


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test begins and ends without modules from outside."""
    every = (LIKELIHOODS, NETWORKS, POSTERIORS, OBJECTIVES, METRICS, SOURCES)
    before = [dict(kinds) for kinds in every]
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_imported", [])
    monkeypatch.setattr(plugins, "_installed_are_loaded", False)
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    yield
    for kinds, former in zip(every, before, strict=True):
        kinds.clear()
        kinds.update(former)
    for name in ("my_likelihood", "mine", "broken"):
        sys.modules.pop(name, None)


def imported(path: Path = EXAMPLE) -> ModuleType:
    plugins.import_named([str(path)])
    return sys.modules[path.stem]


def test_the_example_s_density_is_the_formula_and_integrates_to_one() -> None:
    example = imported()
    config = example.ShiftedLogNormalConfig(offset=0.2, initial_sigma=0.4)
    likelihood = config.implement(image_shape=(1, 2, 2))
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.random((3, 1, 2, 2)))
    params = torch.from_numpy(random.normal(size=(3, 1, 2, 2))).float()
    low, high = math.log(0.2), math.log(1.2)
    normal = torch.distributions.LogNormal(low + (high - low) * params.double().sigmoid(), 0.4)
    expected = normal.log_prob(x + 0.2).flatten(1).sum(1)
    everything = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(
        likelihood.log_prob(x, params, everything).double(), expected, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(likelihood.mean(params).double(), normal.mean - 0.2, atol=1e-5, rtol=1e-5)

    line = torch.linspace(-0.2 + 1e-9, 12, 400_001, dtype=torch.float64)
    one = config.implement(image_shape=(1, 1, 1))
    density = one.log_prob(
        line[:, None, None, None], params[:1, :, :1, :1].expand(len(line), 1, 1, 1), line > -1
    ).exp()
    assert torch.trapezoid(density.double(), line).item() == pytest.approx(1, abs=1e-4)

    stream = noise.Stream(0, 0, torch.arange(40_000))
    drawn = likelihood.sample(params[:1].expand(40_000, -1, -1, -1), stream)
    torch.testing.assert_close(drawn.mean(0), likelihood.mean(params[:1])[0], atol=0.01, rtol=0.01)


def test_the_example_trains_and_every_verb_asks_for_its_module(
    vaescale, recipe_content: dict[str, Any], recipe_file, tmp_path: Path
) -> None:
    recipe = recipe_file(recipe_content | {"likelihood": {"kind": "shifted_log_normal", "offset": 0.2}})
    vaescale("train", recipe).assert_refused(
        2, "likelihood.kind is 'shifted_log_normal'; known here: gaussian"
    )
    run = Path(recipe_content["run_dir"])
    outcome = vaescale("train", recipe, "--import", EXAMPLE)
    assert outcome.code == 0, outcome.err
    record = json.loads((run / "plugins.json").read_text())
    assert (record["likelihood"]["kind"], record["likelihood"]["module"]) == (
        "shifted_log_normal",
        "my_likelihood",
    )
    metrics = vaescale("evaluate", run, "--json").json["metrics"]
    assert 0 < metrics["contrast"] < 5, (
        "the processes that a verb starts inherit VAESCALE_IMPORT, and this is one"
    )
    assert vaescale("sample", run).code == 0
    assert vaescale("export", run, tmp_path / "graphs", "--format", "torch_export").code == 0
    assert vaescale("export", run, tmp_path / "exported").code == 0
    exported = tmp_path / "exported/data/run"
    assert json.loads((exported / "plugins.json").read_text()) == record

    del LIKELIHOODS["shifted_log_normal"]
    sys.modules.pop("my_likelihood")
    plugins.os.environ[plugins.VARIABLE] = ""
    for folder in (run, exported):
        for words in (("evaluate", folder), ("sample", folder), ("encode", folder), ("fit-gmm", folder)):
            vaescale(*words).assert_refused(
                2,
                f"{folder} has the likelihood 'shifted_log_normal' of the module my_likelihood",
                "--import my_likelihood",
            )
    with pytest.raises(
        UserError, match="add `--import my_likelihood`, or in Python `import my_likelihood` first"
    ):
        package.load(run)
    assert "my_likelihood" not in sys.modules, "a run folder causes no import"
    METRICS.pop("contrast")

    changed = tmp_path / "my_likelihood.py"
    changed.write_text(
        EXAMPLE.read_text().replace(
            'shifted_log_normal"\n    offset', 'shifted_log_normal"  # changed\n    offset'
        )
    )
    assert changed.read_text() != EXAMPLE.read_text()
    outcome = vaescale("evaluate", run, "--import", "my_likelihood")
    assert outcome.code == 0, outcome.err
    assert "was made with another version of my_likelihood (likelihood 'shifted_log_normal'" in outcome.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine", None, "--import mine: there is no such module in "),
        ("mine.py", None, "mine.py does not exist; give the name of a module"),
        ("json.py", "", "has the name of another module (json); rename the file"),
        ("broken", "1 / 0", "--import broken fails: ZeroDivisionError: division by zero ("),
        ("broken", "import nothing_like_this", "--import broken fails: ModuleNotFoundError"),
        (
            "mine",
            "import vaescale\nfrom vaescale.likelihoods.config import BernoulliConfig\n"
            "class Other(BernoulliConfig): pass\nvaescale.register(Other)",
            "likelihood.kind 'bernoulli' exists already, from vaescale.likelihoods.config; choose another name",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    vaescale, name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / f"{name.removesuffix('.py')}.py").write_text(content)
    vaescale("evaluate", "runs/none", "--import", name).assert_refused(2, message)


def test_what_cannot_be_registered_is_refused() -> None:
    class Nameless(LikelihoodConfig):
        implementation = "nothing.Here"

    class Empty(LikelihoodConfig):
        kind: str = Field(default="empty")

    for section, message in (
        (Nameless, "Nameless has no name"),
        (Empty, "Empty has no implementation"),
        (int, "cannot be registered; give a subclass of LikelihoodConfig, NetworkConfig"),
    ):
        with pytest.raises(UserError, match=message):
            package.register(section)
    with pytest.raises(UserError, match="metric 'ssim' exists already"):
        package.register_metric("ssim", lambda x, _: x, "mine")
    package.register_source("digits2", digits_source, takes="nothing")
    assert SOURCES["digits2"].takes == "nothing"


def test_each_section_goes_to_its_own_kinds() -> None:
    for section, kinds in (
        (PerceptronConfig, NETWORKS),
        (ScaledConfig, POSTERIORS),
        (SquaredConfig, OBJECTIVES),
        (CauchyConfig, LIKELIHOODS),
    ):
        kind = section.model_fields["kind"].default
        assert kind not in kinds
        assert package.register(section) is section
        assert kinds[kind] is section
        package.register(section)  # the same again


def install(folder: Path, entry: str) -> None:
    """A package's metadata, as pip leaves it."""
    info = folder / f"{entry.partition(' ')[0]}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {entry.partition(' ')[0]}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vaescale.plugins]\n{entry}\n")


def test_an_installed_package_is_imported_by_itself_and_a_broken_one_left_out(
    vaescale, recipe_content: dict[str, Any], recipe_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "my_likelihood.py").write_text(EXAMPLE.read_text())
    install(site, "mine = my_likelihood")
    install(site, "broken = broken_plugin_module")
    monkeypatch.syspath_prepend(site)
    recipe = recipe_file(recipe_content | {"likelihood": {"kind": "shifted_log_normal"}})
    outcome = vaescale("train", recipe, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("the plugin broken (broken_plugin_module) is left out: ModuleNotFoundError") == 1
    assert importlib.util.find_spec("my_likelihood") is not None


@pytest.mark.parametrize(("kind", "file"), [("slurm", "sweep.sbatch"), ("kubernetes", "sweep.yaml")])
def test_the_files_of_a_sweep_import_what_its_own_process_imported(
    kind: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported()
    recipe = Path(__file__).parents[1] / "recipes/digits/optimal.yaml"
    sweep(recipe, ["seed=0,1"], name="two", write=kind)  # type: ignore[arg-type]
    assert f"--import={EXAMPLE}" in (tmp_path / "runs/two" / file).read_text()
    assert ("must have" in capsys.readouterr().err) == (kind == "kubernetes")
