"""The second player of a run: the two-player step against one written plainly, its verdict, its checkpoints."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.training.test_step import batches
from vaescale import noise
from vaescale.adversaries.config import PlayerConfig
from vaescale.adversaries.discriminators import Discriminators
from vaescale.commands.parts import build_parts, build_rival, plan_of
from vaescale.errors import UserError
from vaescale.models.vae import VAE, Terms
from vaescale.objectives.adversarial import AdversarialTerm
from vaescale.objectives.base import discriminators_of
from vaescale.perceptual.distance import Distance
from vaescale.recipe import Recipe
from vaescale.runs.checkpoint import OPTIONAL
from vaescale.trained import build_model, build_objective
from vaescale.training.guard import Guard
from vaescale.training.launch import Launch
from vaescale.training.memory import estimate
from vaescale.training.rival import Rival
from vaescale.training.step import train_step
from vaescale.training.strategies import Strategy

ADVERSARIAL = {"weight": 0.5, "widths": [4, 8], "lr": 3e-3}
STEPS = 4


def recipe_of(content: dict[str, Any], **keys: Any) -> Recipe:
    return Recipe.model_validate(content | {"objective": {"adversarial": ADVERSARIAL | keys}})


class Game:
    """Both players of a recipe in this process."""

    def __init__(self, recipe: Recipe) -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True)
        self.model = build_model(recipe)
        self.objective = build_objective(recipe, self.model)

        def build(module: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(module.parameters(), lr=2e-3, fused=True)

        self.strategy = Strategy(accelerator, self.model, build, averages={})
        rival = build_rival(recipe, Launch(accelerator, "ddp"), self.objective)
        assert rival is not None
        self.rival: Rival = rival
        self.discriminators = rival.model
        self.guard = Guard(max_non_finite=10, device=torch.device("cpu"))

    def step(self, number: int, parts: int = 1) -> Any:
        return train_step(
            self.strategy,
            batches(parts),
            objective=self.objective,
            rival=self.rival,
            judge=partial(self.guard.judge, step=number),
            precision="fp32",
            seed=0,
            step=number,
        )

    def state(self) -> dict[str, Tensor]:
        parts = (self.model.network, self.discriminators)
        return {
            f"{n}.{name}": value.clone()
            for n, part in enumerate(parts)
            for name, value in part.state_dict().items()
        }


def plainly(recipe: Recipe, steps: int) -> tuple[VAE, nn.Module, float]:
    """The same game with the non-saturating loss in a few lines of torch: both gradients, then both updates. Returns the last weight, too."""
    model = build_model(recipe).train()
    critic = build_objective(recipe, model).discriminators.critics["image"]
    optimizers = (
        torch.optim.Adam(model.parameters(), lr=2e-3),
        torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.9)),
    )
    (batch,) = batches(1)
    x, weight = batch.images.float() / 255, 0.0
    for step in range(steps):
        epsilon = noise.normal(noise.Stream(0, step, batch.slots), noise.POSTERIOR, (4,))
        mu, log_sigma = model.posterior(x)
        mean = torch.sigmoid(model.network.decode(mu + log_sigma.exp() * epsilon))
        squares = (x - mean).square().flatten(1).sum(1)
        sigma = (squares.detach().mean() / 64).sqrt()
        nll = (squares / (2 * sigma**2)).mean() + 64 * (sigma.log() + 0.5 * math.log(2 * math.pi))
        kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1).mean()
        g = softplus(-critic(2 * mean - 1)).mean()
        last = model.network.decoder[-1].weight
        norms = [float(torch.autograd.grad(term, last, retain_graph=True)[0].norm()) for term in (nll, g)]
        weight = 0.5 * norms[0] / (norms[1] + 1e-4)
        (nll + kl + weight * g).backward()
        critic.zero_grad()
        real, fake = critic(2 * x - 1), critic(2 * mean.detach() - 1)
        (softplus(-real).mean() + softplus(fake).mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, critic, weight


def test_a_game_is_the_one_written_plainly(recipe_content: dict[str, Any]) -> None:
    # A gradient that is rounding alone, such as that of biases before a norm and of the hinge's last one, Adam scales to full steps.
    recipe_content["network"] |= {"norm": "none"}
    recipe = recipe_of(recipe_content, loss="non_saturating")
    game = Game(recipe)
    for step in range(STEPS):
        result = game.step(step)
    model, critic, weight = plainly(recipe, STEPS)
    assert float(result.pieces["adversarial_weight"]) / 12 == pytest.approx(weight, rel=1e-4)
    fresh = build_model(recipe)
    for (name, got), expected, first in zip(
        game.model.network.named_parameters(),
        model.network.parameters(),
        fresh.network.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(got, first), name
    for got, expected in zip(
        game.discriminators.critics["image"].parameters(), critic.parameters(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_have_the_whole_batch_s_gradients(recipe_content: dict[str, Any]) -> None:
    content = recipe_content | {"likelihood": {"kind": "gaussian", "sigma": 0.5}}
    recipe = recipe_of(content, adaptive=False, augment=["translation"], r1=1.0, spectral_norm=False)
    whole, parts = Game(recipe), Game(recipe)
    a, b = whole.step(0), parts.step(0, 3)
    for name, value in a.pieces.items():
        assert float(b.pieces[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    for key in ("exp_avg", "exp_avg_sq"):
        for one, other in zip(
            whole.rival.optimizer.state.values(), parts.rival.optimizer.state.values(), strict=True
        ):
            torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("of", ["autoencoder", "discriminator", "an update before the last"])
def test_a_step_of_nan_changes_neither_player(recipe_content: dict[str, Any], of: str) -> None:
    updates = 2 if of == "an update before the last" else 1
    game = Game(
        recipe_of(recipe_content, spectral_norm=True, lecam=0.1, ema_decay=0.9, steps_per_step=updates)
    )
    game.step(0)
    before, moments = game.state(), [*game.rival.optimizer.state.values()]
    moments = [{key: value.clone() for key, value in state.items()} for state in moments]
    layer = (
        game.model.network.decoder[-1]
        if of == "autoencoder"
        else game.discriminators.critics["image"].head[-1]
    )
    parameter = next(layer.parameters())
    damaged: list[int] = []

    def damage(gradient: Tensor) -> Tensor:
        damaged.append(1)
        return gradient * (math.nan if len(damaged) == 1 else 1)

    hook = parameter.register_hook(damage)
    game.step(1)
    assert len(damaged) >= updates
    assert float(game.guard.state.skipped) == 1
    assert all(torch.equal(value, before[name]) for name, value in game.state().items())
    for state, old in zip(game.rival.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in state.items())
    hook.remove()
    game.step(2)
    after = game.state()
    assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))


def test_the_average_follows_the_weights_of_each_update(recipe_content: dict[str, Any]) -> None:
    game = Game(recipe_of(recipe_content, ema_decay=0.3))
    name = "critics.image.head.1.weight"
    expected = game.discriminators.state_dict()[name].clone()
    for step in range(4):
        game.step(step)
        expected = expected.lerp(
            game.discriminators.state_dict()[name], 1 - min(0.3, (1 + step) / (10 + step))
        )
    state = game.rival.state()
    torch.testing.assert_close(state["discriminator-ema"][name], expected)

    class WithoutAverage:
        def has(self, file: str) -> bool:
            return file in OPTIONAL[:2]

        def tensors(self, file: str) -> dict[str, Tensor]:
            return state[file]

    game.rival.restore(WithoutAverage())  # type: ignore[arg-type]
    assert torch.equal(game.rival.state()["discriminator-ema"][name], state["discriminator"][name])


def test_they_play_in_the_steps_that_the_recipe_names() -> None:
    config = PlayerConfig(start_step=3, every=2)
    assert [step for step in range(9) if config.plays(step)] == [4, 6, 8]


def test_before_its_first_step_there_is_neither_term_nor_update(recipe_content: dict[str, Any]) -> None:
    alone = Game(recipe_of(recipe_content, start_step=2))
    first = {name: value.clone() for name, value in alone.discriminators.state_dict().items()}
    for step in range(2):
        pieces = alone.step(step).pieces
        assert "adversarial" not in pieces
        assert "discriminator_loss" not in pieces
    assert all(torch.equal(value, first[name]) for name, value in alone.discriminators.state_dict().items())
    assert {"adversarial", "adversarial_weight", "discriminator_accuracy"} < alone.step(2).pieces.keys()


def test_a_resumed_run_is_bit_equal_and_other_verbs_ignore_the_discriminator(
    recipe_content: dict[str, Any], recipe_file: Any, vaescale: Any, tmp_path: Path
) -> None:
    keys = {
        "start_step": 2,
        "augment": ["colour", "cutout"],
        "lecam": 0.1,
        "r1": 0.1,
        "spectral_norm": True,
        "ema_decay": 0.9,
    }
    content = recipe_content | {"objective": {"adversarial": ADVERSARIAL | keys}}
    content["training"] = content["training"] | {"keep_checkpoints": 3}
    recipe = recipe_file(content)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert vaescale("train", recipe, f"run_dir={whole}").code == 0
    assert vaescale("train", recipe, f"run_dir={parts}").code == 0
    saved = parts / "checkpoints"
    (saved / "step-000000012").rename(tmp_path / "gone")
    assert vaescale("train", recipe, f"run_dir={parts}").code == 0
    for name in ("model", "ema", "optimizer", *OPTIONAL, "guard"):
        one, other = (
            load_file(folder / "checkpoints/step-000000012" / f"{name}.safetensors")
            for folder in (whole, parts)
        )
        assert all(torch.equal(one[key], other[key]) for key in one), name
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {"train/discriminator_loss", "train/discriminator_real", "train/adversarial_weight"} < rows[
        5
    ].keys()
    assert vaescale("evaluate", whole, "--json").code == 0
    assert vaescale("sample", whole).code == 0
    out = vaescale("export", whole, tmp_path / "exported")
    assert out.code == 0, out.err
    assert not list((tmp_path / "exported").rglob("discriminator*.safetensors"))


def test_a_run_without_a_discriminator_goes_on_with_a_new_one(
    trained_run: Path, recipe_content: dict[str, Any], recipe_file: Any, vaescale: Any, tmp_path: Path
) -> None:
    import shutil

    run = shutil.copytree(trained_run, tmp_path / "older")
    content = recipe_content | {"objective": {"adversarial": ADVERSARIAL}}
    content["training"] = content["training"] | {"steps": 14}
    words = ("train", recipe_file(content), f"run_dir={run}")
    vaescale(*words).assert_refused(2, "holds a run of another recipe", "objective.adversarial")
    outcome = vaescale(*words, "--allow-changes")
    assert outcome.code == 0, outcome.err
    assert "has no discriminator; it begins anew at step 12" in outcome.err
    assert (run / "checkpoints/step-000000014/discriminator.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"precision": "fp16"}}, "objective.adversarial needs a loss that is not scaled"),
        ({"training": {"compile": True}}, "objective.adversarial needs an uncompiled model"),
        ({"objective": {"adversarial": {"start_step": 12}}}, "start_step (=12) must be below training.steps"),
        ({"objective": {"adversarial": {"augment": ["colour", "colour"]}}}, "names one twice"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_recipe(
    recipe_content: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    content = recipe_content | {"objective": {"adversarial": {}}}
    for section, keys in changes.items():
        content[section] = content[section] | keys
    with pytest.raises(ValueError, match=r".") as refusal:
        Recipe.model_validate(content)
    assert words in str(refusal.value)


def test_an_adaptive_weight_needs_a_last_layer_that_is_trained(recipe_content: dict[str, Any]) -> None:
    recipe = recipe_of(recipe_content)
    model = build_model(recipe)
    model.network.decoder.requires_grad_(False)
    with pytest.raises(UserError, match=r"network.freeze takes away; set it to false"):
        build_objective(recipe, model)
    assert isinstance(
        build_objective(recipe_of(recipe_content, adaptive=False), model).discriminators, Discriminators
    )


def test_an_adaptive_weight_needs_whole_gradients_and_the_plan_counts_the_second_player(
    recipe_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    for layout in ("fsdp2", "zero1", "zero2", "zero3"):
        strategy = layout.rstrip("123") if layout != "fsdp2" else layout
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", layout[-1])
        with pytest.raises(UserError, match=rf"which {layout} does not allow; set it to false, or take ddp"):
            build_parts(recipe_of(recipe_content), Launch(accelerator, strategy))
    launch = Launch(accelerator, "fsdp2")
    parts = build_parts(recipe_of(recipe_content, adaptive=False), launch)
    plan = plan_of(parts)
    number = sum(p.numel() for p in discriminators_of(parts.objective).parameters())
    assert plan["discriminator_parameters"] == number
    assert plan["memory_discriminator_bytes"] == 16 * number
    assert plan["memory_peak_bytes"] > plan["memory_discriminator_bytes"]


class Maps(nn.Module):
    """A frozen network with two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = torch.relu(self.first(images))
        return {"first": first, "second": torch.relu(self.second(first))}


class WithDistance:
    """An objective with a perceptual term."""

    importance_samples, doubly_reparameterized = 0, False

    def __init__(self, objective: Any) -> None:
        self.objective, self.discriminators = objective, objective.discriminators
        self.distance = Distance(Maps(), identity="", weights={}, repeat=0)

    def __call__(self, terms: Terms, stream: noise.Stream) -> tuple[Tensor, dict[str, Tensor]]:
        loss, pieces = self.objective(terms, stream)
        seen = terms.shown
        return loss + self.distance(seen.x, seen.reconstructed).mean(), pieces

    def progress(self, step: int) -> dict[str, float]:
        return {}


def saved_bytes(compute: Callable[[], Any], *modules: nn.Module) -> int:
    """Bytes of the tensors that autograd saves for a backward pass, without the modules' own."""
    own = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    found: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    sizes = {place: tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own}
    del result
    return sum(sizes.values())


@pytest.mark.parametrize("wide", ["perceptual", "discriminators"])
def test_the_memory_estimate_is_what_all_networks_save(recipe_content: dict[str, Any], wide: str) -> None:
    """Of the autoencoder's pass with its loss, or of the discriminators' pass, whichever keeps more."""
    widths = {"perceptual": [4, 4], "discriminators": [96, 96]}[wide]
    recipe = recipe_of(recipe_content, widths=widths, adaptive=False, start_step=9)
    model = build_model(recipe).train()
    objective: Any = build_objective(recipe, model)
    if wide == "perceptual":
        objective = WithDistance(objective)
    (batch,) = batches(1)
    images, stream = batch.images, noise.Stream(0, 9, batch.slots)
    everything = (model, objective.discriminators, getattr(objective, "distance", None) or model)
    terms = model(images, stream, batch.mask)
    of_model, of_loss = (
        saved_bytes(compute, *everything)
        for compute in (
            lambda: model(images, stream, batch.mask),
            lambda: objective(model(images, stream, batch.mask), stream),
        )
    )
    of_judging = saved_bytes(lambda: objective.discriminators(terms.shown.detached(), stream, 0), *everything)
    assert (of_judging > of_loss) == (wide == "discriminators")
    before = {name: value.clone() for name, value in objective.discriminators.state_dict().items()}
    sizes = {
        name: estimate(model, images=len(images), averages=0, precision="fp32", objective=one)
        for name, one in {"alone": None, "all": objective}.items()
    }
    most = max(of_loss, of_judging)
    assert most > 1.5 * of_model
    assert most <= sizes["all"]["activations"] <= 1.5 * most
    assert sizes["alone"]["activations"] < sizes["all"]["activations"]
    assert ("perceptual" in sizes["all"]) == (wide == "perceptual")
    after = objective.discriminators.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("network", ["conv", "resnet", "resnet with codes", "ladder", "linear"])
def test_the_term_and_its_weight_work_with_every_network(
    recipe_content: dict[str, Any], network: str
) -> None:
    network, _, codes = network.partition(" with ")
    recipe_content["posterior"] = {"kind": "quantized", "codes": 8} if codes else {"kind": "diagonal"}
    keys = {
        "ladder": {"width": 8, "latent_dim": 2},
        "resnet": {"width": 8, "multipliers": [1, 2], "latent_dim": 2},
    }
    content = recipe_content | {"network": {"kind": network, **keys.get(network, {"latent_dim": 2})}}
    recipe = recipe_of(content, weight=1.0)
    model = build_model(recipe).train()
    objective = build_objective(recipe, model)
    (batch,) = batches(1)
    terms = model(batch.images, noise.Stream(0, 0, batch.slots), batch.mask)
    loss, pieces = objective(terms, noise.Stream(0, 0, batch.slots))
    last = model.network.get_submodule(model.network.head_name).weight
    gradients = [
        float(torch.autograd.grad(term, last, retain_graph=True)[0].norm())
        for term in (-terms.log_px.mean(), pieces["adversarial"])
    ]
    assert float(pieces["adversarial_weight"]) == pytest.approx(
        gradients[0] / (gradients[1] + 1e-4), rel=1e-5
    )
    own = AdversarialTerm(recipe.objective.adversarial, model)
    own.discriminators.load_state_dict(objective.discriminators.state_dict())
    _, doubled = own(terms, noise.Stream(0, 0, batch.slots), -2 * terms.log_px.mean())
    assert float(doubled["adversarial_weight"]) == pytest.approx(
        2 * float(pieces["adversarial_weight"]), rel=1e-4
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
