"""Every decoder from its recipe through training, evaluation, mixture and samples; the study over them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vaescale.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes/digits").glob("*.yaml") if path.stem != "base")
SHORT = (
    "training.steps=4",
    "training.evaluate_every=4",
    "training.checkpoint_every=4",
    "tracking.mlflow=null",
)
MASSES = {
    "bernoulli",
    "categorical",
    "bitwise",
    "discretized_logistic",
    "discretized_logistic_mixture",
    "autoregressive",
}
WITHOUT_SIGMA = MASSES | {"continuous_bernoulli", "structured"}
CODES = ("vq_vae", "fsq")
GAMES = ("vae_gan", "alpha_gan", "veegan")  # without a likelihood of images
# Recipes that are about something else than the decoder, and what they may change besides.
OTHERS = {
    **{name: {"objective"} for name in ("annealed", "free_bits", "capacity", "iwae", "dip")},
    **{name: {"posterior"} for name in ("isotropic", "fixed_posterior")},
    "wae_mmd": {"objective", "posterior"},
    "resnet": {"network"},
    **{name: {"data", "training"} for name in ("augmented", "sixteen_bits", "with_mnist")},
    "frozen_encoder": {"network", "init_from"},
    **{name: {"network", "posterior"} for name in CODES},
    **{name: {"objective"} for name in ("adversarial", "perceptual")},
    "aae": {"objective", "posterior"},
    **{name: {"objective", "optimizer", "posterior"} for name in GAMES},
    "ladder": {"network", "posterior", "optimizer"},
    "conditional_ladder": {"network", "posterior", "optimizer", "condition"},
    "second_stage": {"network", "data", "optimizer", "training"},
    "linear": {"network", "data", "optimizer", "training"},
}
# A mixture is fitted to what the encoder gives: it does not depend on the decoder.
WITH_MIXTURE = OTHERS.keys() - {
    "frozen_encoder",
    "conditional_ladder",
    "adversarial",
    "perceptual",
    *GAMES,
    *CODES,
}
WITH_MIXTURE |= {"optimal"}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_evaluates_and_samples(vaescale, digits: Path, tmp_path: Path, path: Path) -> None:
    run = tmp_path / "run"
    if path.stem == "sixteen_bits":
        digits = tmp_path / "digits16"
        assert vaescale("make-shards", "digits", digits, "--dtype", "uint16").code == 0
    keys = (*(f"data.{split}={digits / split}" for split in ("train", "val")), f"run_dir={run}", *SHORT)
    keys += ("likelihood.handover.at_step=2",) if path.stem == "two_stage" else ()
    if path.stem == "frozen_encoder":  # of a run that it begins from
        source = tmp_path / "source"
        words = ("train", path.with_stem("optimal"), *keys, f"run_dir={source}")
        assert vaescale(*words).code == 0
        keys += (f"init_from.path={source}",)
    keys += ("objective.adversarial.start_step=2",) if path.stem == "adversarial" else ()
    if path.stem == "perceptual":
        classes = (
            "train-features",
            digits / "train",
            "--out",
            tmp_path / "features",
            "--steps",
            2,
            "--width",
            4,
        )
        assert vaescale(*classes).code == 0
        keys += (f"objective.perceptual.features={tmp_path / 'features'}",)
    outcome = vaescale("train", path, *keys)
    assert outcome.code == 0, outcome.err
    evaluated = vaescale("evaluate", run, "--json")
    assert evaluated.code == 0, evaluated.err
    metrics, protocol = evaluated.json["metrics"], evaluated.json["protocol"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    if path.stem == "optimal_per_image":
        assert protocol["bound"].startswith("none: sigma is fitted to each image itself")
        assert "neg_profile_elbo_nats" in outcome.out
        assert "neg_elbo" not in outcome.out + outcome.err
        assert not {"neg_elbo_nats", "bits_per_dim"} & metrics.keys()
        assert "no bound: sigma is fitted to each image" in outcome.err
        assert not {"log_px_nats"} & metrics.keys()
        assert not {"train/neg_elbo_nats", "val/neg_elbo_nats", "train/bits_per_dim"} & names
        assert "bound: none" in vaescale("evaluate", run).err + vaescale("evaluate", run).out
    elif path.stem in GAMES:
        assert not {"neg_elbo_nats", "bits_per_dim", "log_px_nats"} & metrics.keys()
        assert not {"train/neg_elbo_nats", "val/neg_elbo_nats", "train/bits_per_dim"} & names
        assert {"mse", "kl_nats"} <= metrics.keys()
    else:
        per_dimension = metrics["neg_elbo_nats"] / 64 / 0.6931471805599453
        added = 0 if path.stem in MASSES else 16 if path.stem == "sixteen_bits" else 8
        assert metrics["bits_per_dim"] == pytest.approx(per_dimension + added)
        assert ("not comparable with densities" in protocol["bits_per_dim"]) == (path.stem in MASSES)
        assert ("a mass over 2 levels" in protocol["bits_per_dim"]) == (path.stem == "bernoulli")
        assert ("no code length" in protocol["bits_per_dim"]) == (path.stem not in MASSES)
    assert ("sigma" in metrics) == (path.stem not in WITHOUT_SIGMA)
    assert ("train/handover" in names) == (path.stem == "two_stage")
    assert ("train/sigma" in names) == (path.stem not in WITHOUT_SIGMA)
    if path.stem in WITH_MIXTURE:
        assert vaescale("fit-gmm", run, "--components", 2).code == (2 if path.stem == "ladder" else 0)
    sampled = vaescale("sample", run, "--count", 4)
    assert sampled.code == 0, sampled.err


def test_the_recipes_differ_in_what_they_are_about_alone() -> None:
    for folder in ("digits", "fashion_mnist"):
        paths = [path for path in (ROOT / "recipes" / folder).glob("*.yaml") if path.stem != "base"]
        base = load_recipe(next(path for path in paths if path.stem == "optimal")).identity()
        for path in paths:
            identity = load_recipe(path).identity()
            allowed = {"likelihood"} | OTHERS.get(path.stem, set())
            assert {k for k in base if base[k] != identity[k]} <= allowed, path
            keys = {
                line.split(":")[0] for line in path.read_text().splitlines() if line and line[0].isalpha()
            }
            assert path.stem in OTHERS or keys == {"base", "name", "likelihood"}, path


def test_the_study_compares_recipes_that_differ_in_the_decoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.studies import decoders

    monkeypatch.chdir(ROOT)
    differs = {name for name, changes in OTHERS.items() if changes - {"likelihood"}}
    names = {path.stem for path in decoders.RECIPES.glob("*.yaml")} - {"base"}
    assert set(decoders.recipes()) == names - differs


def test_the_study_runs(
    vaescale, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, its trainings too."""
    from tools.studies import decoders, runs

    monkeypatch.chdir(tmp_path)
    trained = []

    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "vaescale", "train"]
        trained.append(command[4])
        outcome = vaescale(*command[3:])
        return subprocess.CompletedProcess(command, outcome.code)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=train))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    words = ["--no-mlflow", "--only", "optimal_per_image,bitwise,bernoulli,fixed"]
    keys = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", "data.image_size=8", *SHORT[:3]]
    monkeypatch.setattr(sys, "argv", ["decoders.py", *words, *keys])
    printed = []
    for _ in range(2):
        capfd.readouterr()
        decoders.main()
        printed.append(capfd.readouterr().out)
    assert len(trained) == 4, "the second time, runs are used again"
    for title in ("density of 8-bit", "mass over 256", "mass of binary", "no bound", "sigma^2 = beta"):
        assert all(title in words for words in printed)
    (out,) = (tmp_path / "runs").glob("fashion_mnist-decoders-part-*")
    assert {path.name for path in out.iterdir()} == {"table.md", "rate_distortion.png", "decoders.png"}
