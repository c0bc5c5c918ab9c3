"""Recipes: what is read, and what is refused, each with one sentence and the remedy."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import ValidationError

from vaescale.config import Config, one_of
from vaescale.errors import UserError
from vaescale.recipe import Recipe, differences, load_recipe
from vaescale.recipe_faults import sentence

ROOT = Path(__file__).parents[1]


def load(recipe_file: Callable[..., str], content: dict[str, Any], *overrides: str) -> Recipe:
    return load_recipe(Path(recipe_file(content)), list(overrides))


RECIPES = [
    path
    for folder in (
        "digits",
        "moving_mnist",
        "fashion_mnist",
        "mnist",
        "cifar10",
        "imagenet32",
        "imagenet64",
        "ffhq256",
        "celeba64",
    )
    for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))
    if path.name != "base.yaml"
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run_dir == f"runs/{recipe.name}"


def test_every_recipe_opens_with_its_command_cost_and_number() -> None:
    for path in RECIPES:
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"vaescale train recipes/{path.parent.name}/{path.name}" in line for line in header), path
        assert any(re.match(r"# cost:.*\d", line) for line in header), path
        assert any(re.match(r"# expect:.*\d", line) for line in header), path


def test_overrides_interpolation_and_numbers(recipe_file, recipe_content) -> None:
    del recipe_content["run_dir"]
    recipe = load(
        recipe_file,
        recipe_content,
        "optimizer.lr=1e-3",
        "name=other",
        "likelihood.sigma=.5",
        "network.widths=[4,8]",
    )
    assert recipe.optimizer.lr == 1e-3
    assert recipe.run_dir == "runs/other"
    assert recipe.likelihood.sigma == 0.5
    assert recipe.network.widths == (4, 8)


def test_1e_3_in_the_file_is_a_number(tmp_path, recipe_file, recipe_content) -> None:
    text = yaml.safe_dump(recipe_content).replace("lr: 0.002", "lr: 1e-3")
    assert "1e-3" in text
    (tmp_path / "plain.yaml").write_text(text)
    assert load_recipe(tmp_path / "plain.yaml").optimizer.lr == 1e-3


def test_a_name_of_digits_stays_as_it_is_typed(tmp_path, recipe_file, recipe_content) -> None:
    """YAML 1.1 reads 20261127_142530 as one number and 012 as 10: two runs would share a folder."""
    del recipe_content["run_dir"]
    file = tmp_path / "number.yaml"
    for name in ("20261127_142530", "012", "1_0", "1e3", "12e4567", "yes", "2026-11-27"):
        file.write_text(yaml.safe_dump(recipe_content).replace("name: tiny", f"name: {name}"))
        assert load_recipe(file).run_dir == f"runs/{name}"
        recipe = load(recipe_file, recipe_content, f"name={name}", f"tracking.experiment={name}")
        assert (recipe.name, recipe.run_dir, recipe.tracking.experiment) == (name, f"runs/{name}", name)
    assert load(recipe_file, recipe_content, "name=012", "name=7", "seed=5", "seed=6").seed == 6
    for number, text in ((2**53 + 1, str(2**53 + 1)), (1000, "1_000")):
        assert load(recipe_file, recipe_content, f"seed={text}").seed == number
    file.write_text(yaml.safe_dump(recipe_content).replace("steps: 12", "steps: 1:30"))
    with pytest.raises(UserError, match=r"training.steps: 1:30 in .*number.yaml is 90 in YAML 1.1; write"):
        load_recipe(file)
    file.write_text("name: &a a\ndata: &b {train: *a, val: [*b]}\n")  # an alias within its own value
    with pytest.raises(UserError):
        load_recipe(file)
    saved = load(recipe_file, recipe_content, "name=012").to_yaml()
    (tmp_path / "saved.yaml").write_text(saved)
    assert load_recipe(tmp_path / "saved.yaml").name == "012"


BASE = "seed: 3\nnetwork: {kind: conv, latent_dim: 4, widths: [8]}\n"


def test_a_recipe_lies_over_its_base(tmp_path: Path, recipe_file, recipe_content) -> None:
    del recipe_content["network"]
    (tmp_path / "base.yaml").write_text(BASE)
    recipe = load(recipe_file, recipe_content | {"base": "base.yaml"})
    assert (recipe.seed, recipe.network.widths) == (3, (8,))
    over = {"base": "base.yaml", "seed": 5, "network": {"latent_dim": 7}}
    recipe = load(recipe_file, recipe_content | over, "network.widths=[16]")
    assert (recipe.seed, recipe.network.latent_dim, recipe.network.widths) == (5, 7, (16,))
    other = load(
        recipe_file, recipe_content | {"base": "base.yaml", "network": {"kind": "linear", "latent_dim": 2}}
    )
    assert other.network.kind == "linear", "a section of another kind replaces the base's"
    assert "base" not in other.to_yaml()


def test_interpolations_reach_into_the_base(tmp_path: Path, recipe_file, recipe_content) -> None:
    (tmp_path / "base.yaml").write_text("tracking: {experiment: shapes}\ntraining: {steps: 9}\n")
    del recipe_content["training"]["steps"]
    over = {
        "base": "base.yaml",
        "run_dir": "runs/${tracking.experiment}/${name}",
        "seed": "${training.steps}",
    }
    recipe = load(recipe_file, recipe_content | over)
    assert (recipe.run_dir, recipe.seed) == ("runs/shapes/tiny", 9)


@pytest.mark.parametrize(
    "over", [{"network": [1]}, {"likelihood": {"kind": "${nope}"}}, {"base": "${oc.env:NOPE}"}, {"data": 3}]
)
def test_faults_over_a_base_are_one_sentence(tmp_path: Path, recipe_file, recipe_content, over) -> None:
    (tmp_path / "base.yaml").write_text(BASE + "data: {image_size: 8}\n")
    with pytest.raises(UserError) as caught:
        load(recipe_file, recipe_content | {"base": "base.yaml"} | over)
    assert "\n" not in str(caught.value)


def test_an_override_of_another_kind_replaces_the_section(recipe_file, recipe_content) -> None:
    """Where the kinds have keys of their own: all optimizers have the same."""
    assert load(recipe_file, recipe_content, "optimizer.kind=adam").optimizer.lr == 2e-3
    recipe = load(recipe_file, recipe_content, "likelihood.kind=bernoulli", "likelihood.binarize=threshold")
    assert recipe.likelihood.model_dump() == {"kind": "bernoulli", "binarize": "threshold"}
    same = load(recipe_file, recipe_content, "likelihood.kind=gaussian", "likelihood.horizon_steps=7")
    assert (same.likelihood.sigma, same.likelihood.horizon_steps) == ("optimal", 7)


def test_a_handover_that_never_comes_is_refused(recipe_file, recipe_content) -> None:
    recipe_content["likelihood"] = {"kind": "gaussian", "sigma": "predicted", "handover": {"at_step": 12}}
    with pytest.raises(UserError, match=r"handover.at_step \(=12\) must be below training.steps \(=12\)"):
        load(recipe_file, recipe_content)
    assert load(recipe_file, recipe_content, "training.steps=13").likelihood.handover.at_step == 12


@pytest.mark.parametrize(
    "base",
    ["../base.yaml", "/etc/passwd", "nowhere.yaml", "recipe.yaml", "chain.yaml", "list.yaml", 3, ["a"]],
)
def test_a_base_lies_beside_its_recipe_and_has_none_itself(
    tmp_path: Path, recipe_file, recipe_content, base: object
) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "chain.yaml").write_text("base: base.yaml\n" + BASE)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="base is ") as caught:
        load(lambda content: recipe_file(content, "recipe.yaml"), recipe_content | {"base": base})
    assert "\n" not in str(caught.value)


REFUSED = {
    "objective.beta.schedule=linear": "objective.beta.steps is missing; add it to the recipe",
    "objective.beta.schedule=linar objective.beta.steps=3": "objective.beta.schedule is 'linar'; did you mean linear?",
    "objective.beta.schedule=linear objective.beta.steps=4 objective.beta.rising=0.3": "objective.beta.rising (=0.3)",
    "objective.free_bits.natz=1": "unknown key objective.free_bits.natz (=1); did you mean objective.free_bits.nats?",
    "objective.free_bits=3": "it is a section with keys of its own: nats, per",
    "objective.capacity.nats=3 objective.capacity.steps=3 objective.beta=3": "objective.capacity replaces beta",
    "objective.kind=iwae": "objective.samples is missing",
    "objective.dip.variant=iii": "objective.dip.variant is 'iii'; did you mean ii?",
    "posterior.kind=fixed posterior.sigma.first=1": "posterior.sigma.last is missing",
    "posterior.kind=fixed posterior.sigma=[1,2]": "posterior.sigma has 2 numbers for network.latent_dim (=4)",
    "posterior.kind=relative": (
        "posterior.kind (='relative') needs groups of latents, which the network section (kind 'conv') does not have; "
        "choose diagonal"
    ),
    "network.kind=ladder posterior.kind=isotropic": (
        "posterior.kind (='isotropic') needs a single latent vector or map, which the network section (kind 'ladder') does "
        "not have; choose diagonal or relative"
    ),
    "network.kind=ladder posterior.kind=fixed": "posterior.kind (='fixed') needs a single latent vector or map",
    "network.kind=ladder objective.mmd.weight=3": "objective.mmd needs a single latent vector or map",
    "network.kind=ladder objective.dip.variant=i": "objective.dip needs a single latent vector or map",
    "network.kind=ladder likelihood.sigma=1 objective.kind=iwae objective.samples=3 objective.gradient=doubly_reparameterized": (
        "objective.gradient (='doubly_reparameterized') needs a single latent vector or map"
    ),
    "objective.kind=iwae objective.samples=3": (
        "objective.kind (='iwae') needs a sigma that is not fitted to the mean over draws, which the likelihood section "
        "(kind 'gaussian') does not have; set likelihood.sigma to shared"
    ),
    "objective.balancing=always": "objective.balancing (='always') needs groups of latents",
    "objective.mmd.weight=1 data.global_batch=4 training.accumulation=4": "a micro-batch has 1",
    "objective.beta=high": "objective.beta is 'high'; give a number or a schedule, {schedule: linear, steps: 1000}",
    "network.kind=ladder network.preset=infogan": "unknown key network.preset (='infogan'), which network.kind conv has; known here: ",
    "network.preset=infogan": "network.preset (=infogan) sets its own widths; leave network.widths out",
    "seeed=1": "unknown key seeed (=1); did you mean seed?",
    "training.stepz=3": "unknown key training.stepz (=3); did you mean training.steps?",
    "likelihood.sigmaa=1": "unknown key likelihood.sigmaa (=1); did you mean likelihood.sigma?",
    "data.kind=foo": "unknown key data.kind (='foo'); known here: train, val",
    "seed=012": "override seed=012 is 10 in YAML 1.1; write the number as 10",
    "seed=1:30": "override seed=1:30 is 90 in YAML 1.1",
    "seed=0x10": "override seed=0x10 is 16 in YAML 1.1; write the number as 16",
    "objective={kind: elbo, beta: {schedule: linear, steps: 012}}": "is 10 in YAML 1.1",
    "optimizer.schedule_start=12": "optimizer.schedule_start (=12) must be below training.steps (=12)",
    "optimizer.clip_norm=None": "unable to parse string as a number; YAML's word for none is null",
    "network.kind=[a]": "network.kind is \"['a']\"; known here: conv",
    "data.cache=no": "data.cache (=False) is a truth value",
    "data.xyzzy=1": "unknown key data.xyzzy (=1); known here: train, val, image_size",
    "optimizer.lr=nan": "optimizer.lr is 'nan'; input should be a finite number",
    "optimizer.lr=.inf": "optimizer.lr is inf; input should be a finite number",
    "optimizer.lr=-1": "optimizer.lr is -1; input should be greater than 0",
    "optimizer.lr=fast": "optimizer.lr is 'fast'; input should be a valid number",
    "network.widths=[8,-4]": "network.widths.1 is -4; input should be greater than 0",
    "network.widths=[]": "network.widths is []",
    "network.kind=convv": "network.kind is 'convv'; did you mean conv?",
    "training.precision=bf32": "training.precision is 'bf32'; did you mean",
    "likelihood.sigma=optimum": "likelihood.sigma is 'optimum'; did you mean optimal?",
    "likelihood.sigma=-0.1": "likelihood.sigma is -0.1; input should be greater than 0",
    "likelihood.sigma=.nan": "likelihood.sigma is nan; input should be a finite number",
    "training.steps=yes": "training.steps (=True) is a truth value",
    "training.steps=2.5": "training.steps is 2.5; input should be a valid integer",
    "data=3": "data is 3; it is a section with keys of its own: train, val",
    "data.global_batch=0": "data.global_batch is 0; input should be greater than 0",
    "name=../escape": "name is '../escape'",
    "run_dir=runs/${nme}": "with run_dir=runs/${nme} does not resolve",
    "network=conv": "network is 'conv'; it is a section with keys of its own: kind, latent_dim",
    "network.widths=64": "network.widths is 64; it is a list, such as [64]",
    "data.image_size=48x96": "data.image_size is '48x96'; give the side in pixels, or [height, width], such as [48, 96]",
    "data.image_size=[48,-96]": "data.image_size is [48, -96]; give the side in pixels, or [height, width]",
    "data.image_size=[48,96,3]": "data.image_size is [48, 96, 3]; give the side in pixels, or [height, width]",
    "data.range=5": "data.range is 5; give the two stored values that become 0 and 1",
    "data.range=[0]": "data.range is [0]; give the two stored values that become 0 and 1",
    "figures.channels=[1,2]": "figures.channels is [1, 2]; name one channel, or three as red, green and blue",
    "likelihood={kind:laplace}": "unknown key likelihood.kind:laplace; YAML needs a space after the colon: kind: laplace",
    "name=my run": "name is 'my run'; use letters, digits",
    "training.precision=fp8": "training.precision is 'fp8'; known here: fp32, tf32, bf16, fp16",
    "tracking.mlflow=nonsense://x": "tracking.mlflow is 'nonsense://x'; an MLflow store begins with one of sqlite:///",
    "tracking.mlflow=sqlite:///": "is 'sqlite:///'; write sqlite:///mlflow.db for a file below the working folder, or sqlite:////",
    "tracking.mlflow=sqlite:////": "is 'sqlite:////'; write sqlite:///mlflow.db for",
    "tracking.mlflow=sqlite:///runs/": "; write sqlite:///runs/mlflow.db for",
    "tracking.mlflow='sqlite:///:memory:'": "; write sqlite:///mlflow.db for",
    "tracking.mlflow=sqlite://runs/x.db": "; write sqlite:///runs/x.db for a file below the working folder, or sqlite:////",
    "tracking.mlflow=./mlruns": "a database, not a folder of files; write sqlite:///mlruns/mlflow.db for",
    "tracking.mlflow=file:///a/mlruns": "or sqlite:////a/mlruns/mlflow.db for an absolute path",
    "tracking.mlflow='localhost:5000'": "write http://localhost:5000",
    "network.widths=[64,128": "does not resolve",
    "optimizer.lr": "is not key=value",
    "=3": "is not key=value",
    "[=1": "is not key=value",
    "optimizer.betas=[1.5,0.9]": "optimizer.betas.0 is 1.5; input should be less than 1",
    "data.channels=17": "data.channels (=17) must be at most 16",
    "data.train=[]": "data.train is an empty list",
    "data.train=[a,b,a]": "data.train names a twice; name each set once",
    "data.train=[{pth: a}]": "unknown key data.train.0.pth (='a'); did you mean data.train.0.path?",
    "data.train=[{weight: 2}]": "data.train.0.path is missing",
    "data.train=[{path: a, weight: -1}]": "data.train.0.weight is -1; input should be greater than or equal to 0",
    "data.train=[{path: a, weight: 0}, {path: b, weight: 0}]": "data.train has 2 sets whose weights sum to 0; give one of them",
    "data.train=[{path: a, weight: 1}, b, c]": "data.train has 2 of 3 sets without a weight; give each one a weight, or none",
    "data.train=[a,b] data.holds=latents": "data.train mixes 2 sets, which needs images",
    "data.balance=clas": "data.balance.kind is 'clas'; did you mean class?",
    "data.balance.power=2": "data.balance.power is 2; input should be less than or equal to 1",
    "data.augment={}": "data.augment.shift, crop, turns and jitter change nothing",
    "data.augment.shift=8": "data.augment.shift (=8) moves images of 8x8 pixels out of sight",
    "data.augment.turns=quarter data.image_size=[8,12]": "needs square images, and image_size is [8, 12]; set it to half",
    "data.augment.jitter.hue=0.1": "data.augment.jitter.hue needs RGB images, and channels is 1; set it to 0",
    "data.augment.crop.scale=[0.5,2]": "data.augment.crop.scale (=[0.5, 2.0]) must be two numbers in (0, 1]",
    "data.augment.crop.aspect=[2,1]": "data.augment.crop.aspect (=[2.0, 1.0]) must be two positive numbers",
}


def test_weights_and_balance_are_the_recipe_s_and_paths_are_not(recipe_file, recipe_content) -> None:
    def recipe(*overrides: str) -> Recipe:
        return load(recipe_file, recipe_content, *overrides)

    plain, one = recipe(), recipe("data.train=[{path: 0123, weight: 2}]")
    assert one.data.sets[0].path == "0123", "a path stays text in a list"
    assert plain.hash == one.hash
    mixed = [
        recipe(f"data.train=[{{path: {a}, weight: 1}}, {{path: {b}, weight: {weight}}}]")
        for a, b, weight in (("a", "b", 2), ("c", "d", 2), ("a", "b", 3))
    ]
    assert plain.hash != mixed[0].hash == mixed[1].hash != mixed[2].hash
    assert differences(mixed[0].settings(), mixed[2].settings()) == [
        "data.train_weights: [1.0, 2.0] -> [1.0, 3.0]"
    ]
    assert recipe("data.balance=class").hash != plain.hash
    again = Recipe.model_validate(mixed[0].public())
    assert again == mixed[0]


@pytest.mark.parametrize("override", REFUSED)
def test_refusals_are_one_sentence_with_the_value(recipe_file, recipe_content, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe_file, recipe_content, *re.split(r" (?=[\w.]+=)", override))
    assert REFUSED[override] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


class Narrow(Config):
    kind: Literal["narrow"] = "narrow"
    width: int = 1


class Wide(Config):
    kind: Literal["wide"] = "wide"
    height: float = 1.0


class Two(Config):
    """A recipe with a section of two kinds."""

    part: one_of([Narrow, Wide])


TWO_KINDS = {
    "an unknown kind": ({"kind": "wid"}, "part.kind is 'wid'; did you mean wide?"),
    "no kind": ({"width": 3}, "part.kind is missing"),
    "the other kind's key": (
        {"kind": "wide", "width": 3},
        "unknown key part.width (=3), which part.kind narrow has; known here: kind, height",
    ),
    "a mistyped key": (
        {"kind": "narrow", "widht": 3},
        "unknown key part.widht (=3); did you mean part.width?",
    ),
    "a bad value": ({"kind": "narrow", "width": "x"}, "part.width is 'x'; input should be a valid integer"),
}


@pytest.mark.parametrize("case", TWO_KINDS)
def test_sections_of_several_kinds_name_the_right_keys(case: str) -> None:
    part, words = TWO_KINDS[case]
    with pytest.raises(ValidationError) as caught:
        Two.model_validate({"part": part})
    assert words in sentence(caught.value, {"part": part}, Two)
    assert Two.model_validate({"part": {"kind": "wide", "height": 2}}).part == Wide(height=2)


def test_a_missing_section_is_named(recipe_file, recipe_content) -> None:
    del recipe_content["optimizer"]
    with pytest.raises(UserError, match="optimizer is missing"):
        load(recipe_file, recipe_content)
    del recipe_content["data"]["train"]
    recipe_content["optimizer"] = {"lr": 1e-3}
    with pytest.raises(UserError, match=r"data\.train is missing"):
        load(recipe_file, recipe_content)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "name: [", "3", "a: b: c", "name: !!python/tuple [x]"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_the_resolved_recipe_loads_to_itself(tmp_path: Path, recipe_file, recipe_content) -> None:
    recipe = load(recipe_file, recipe_content)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_the_hash_is_that_of_the_numbers(recipe_file, recipe_content) -> None:
    recipe = load(recipe_file, recipe_content)
    for same in (
        "name=b",
        "run_dir=elsewhere",
        "data.cache=none",
        "training.log_every=7",
        "tracking.experiment=x",
        "optimizer.schedule_start=0",
    ):
        assert load(recipe_file, recipe_content, same).hash == recipe.hash, same
    for other in (
        "seed=1",
        "optimizer.lr=1e-4",
        "training.steps=13",
        "likelihood.sigma=1",
        "data.global_batch=32",
        "optimizer.schedule_start=3",
    ):
        assert load(recipe_file, recipe_content, other).hash != recipe.hash, other


def test_recipes_are_frozen(recipe_file, recipe_content) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(recipe_file, recipe_content).seed = 1


def test_differences_name_the_keys() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    assert differences(old, {"a": 1, "b": {"c": 5, "d": 3}}) == ["b.c: 2 -> 5"]
    assert differences(old, old) == []


def test_reading_every_recipe_imports_no_torch() -> None:
    """Torch takes seconds to import, and a recipe is read by verbs that compute nothing."""
    read = (
        "import sys; from pathlib import Path; from vaescale.recipe import load_recipe\n"
        "for path in Path('recipes').glob('*/*.yaml'):\n"
        "    if path.parent.name not in ('backends', 'kubernetes') and path.name != 'base.yaml': load_recipe(path)\n"
        "sys.stdout.write(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False"


@pytest.mark.parametrize(("steps", "horizon"), [(5, 1), (400, 40), (1000, 100), (20_000, 100)])
def test_the_horizon_of_the_running_sigma_is_a_tenth_of_training(
    recipe_content, steps: int, horizon: float
) -> None:
    recipe_content["training"]["steps"] = steps
    recipe_content["likelihood"] = {"kind": "gaussian", "sigma": "optimal"}
    own = Recipe.model_validate(recipe_content)
    assert own.likelihood.horizon_steps == horizon
    recipe_content["likelihood"]["horizon_steps"] = 7
    assert Recipe.model_validate(recipe_content).likelihood.horizon_steps == 7
    again = Recipe.model_validate(
        own.model_dump(mode="json") | {"training": {**recipe_content["training"], "steps": 77}}
    )
    assert again.likelihood.horizon_steps == horizon, "a saved recipe keeps its number"


def test_hashes_of_recipes_without_a_running_sigma_are_those_of_earlier_versions(recipe_content) -> None:
    """Which saved the former default, 100, whether it had a meaning or not."""
    recipe_content["likelihood"] = {"kind": "gaussian", "sigma": 0.1}
    own = Recipe.model_validate(recipe_content)
    assert own.likelihood.horizon_steps is None
    saved = own.model_dump(mode="json")
    saved["likelihood"]["horizon_steps"] = 100.0
    assert Recipe.model_validate(saved).hash == own.hash
    assert own.identity()["likelihood"]["horizon_steps"] == 100.0
