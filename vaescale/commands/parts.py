"""Build the parts of a training run from a recipe and a launch: model, data, objective and guard."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vaescale import comm
from vaescale.adversaries.config import AdversarialConfig
from vaescale.adversaries.discriminators import Discriminators
from vaescale.commands import initial_weights
from vaescale.commands.second_stage import origin_of
from vaescale.conditions.config import ClassCondition
from vaescale.conditions.embedding import VectorEmbedding
from vaescale.data.classes import count_classes, refuse_other_classes
from vaescale.data.clipping import refuse_clipping
from vaescale.data.loader import refuse_small_cache
from vaescale.data.mixed_plan import MixedPlan
from vaescale.data.plan import Plan, rank_slots
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.training_sets import (
    as_drawn,
    describe_mixture,
    open_training,
    refuse_held_out,
    tell_repeated,
    training_plan,
)
from vaescale.data.vectors import refuse_other_vectors
from vaescale.errors import UserError
from vaescale.kernels import kernels_run
from vaescale.models.vae import VAE
from vaescale.networks.config import LadderConfig
from vaescale.networks.stages import suggested
from vaescale.objectives.base import Objective, discriminators_of, distance_of
from vaescale.recipe import Recipe, steps_of
from vaescale.runs import checkpoint
from vaescale.runs.class_table import ClassTable
from vaescale.runs.identity import identity_tags
from vaescale.system.console import say
from vaescale.system.uncompiled import checkpoint_uncompiled
from vaescale.trained import build_model, build_objective, device_name, noun_of, shape_text
from vaescale.training import cuda_graphs
from vaescale.training import launch as backends
from vaescale.training.averages import MAIN, averages_of
from vaescale.training.config import TrainingConfig
from vaescale.training.guard import Guard
from vaescale.training.memory import estimate
from vaescale.training.optimizer import build_optimizer
from vaescale.training.rival import FILES, Rival, optimizer_of
from vaescale.training.skips import Skips
from vaescale.training.step import AUTOCAST
from vaescale.training.strategies import strategy_class
from vaescale.training.strategies.base import Strategy


@dataclass(frozen=True)
class Parts:
    """The parts of a training run. tags: the identity of the run; checkpoint_shapes: shapes of its checkpoints' tensors.

    first_weights, beginning: sha256 of the weights that `init_from` gave, and the sentence on them, if training begins with them.
    classes: the classes of the training images, of a conditional model.
    """

    recipe: Recipe
    launch: backends.Launch
    model: VAE
    objective: Objective
    guard: Guard
    skips: Skips
    train_reader: ShardReader
    val_reader: ShardReader
    plan: Plan | MixedPlan
    tags: dict[str, Any]
    checkpoint_shapes: dict[str, checkpoint.Shapes]
    first_weights: str | None = None
    beginning: str | None = None
    classes: ClassTable | None = None

    @property
    def folder(self) -> Path:
        """The run folder, `run_dir` of the recipe."""
        return Path(self.recipe.run_dir)

    @property
    def layout(self) -> str:
        """The way training divides the model over processes: `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`."""
        return backends.layout(self.launch.strategy)


def build_parts(recipe: Recipe, launch: backends.Launch) -> Parts:
    """Build the model and open the data. Writes nothing. Raises UserError and DataError on all ranks."""
    parts = comm.together(lambda: _build(recipe, launch))
    if isinstance(recipe.condition, ClassCondition):
        refuse_other_classes(parts.train_reader, recipe.condition.classes)
        refuse_other_classes(parts.val_reader, recipe.condition.classes)
        counts = count_classes(as_drawn(parts.train_reader, parts.plan), recipe.condition.classes)
        names = counts.names(parts.train_reader.index.class_names)
        parts = replace(parts, classes=ClassTable(names, counts.frequencies))
    if recipe.data.vectors is not None:
        moments = refuse_other_vectors(parts.train_reader, recipe.data.vectors)
        refuse_other_vectors(parts.val_reader, recipe.data.vectors)
        assert isinstance(parts.model.embedding, VectorEmbedding)
        parts.model.embedding.measured(*map(torch.from_numpy, moments))
    tags = comm.on_main(
        lambda: identity_tags(
            recipe_hash=recipe.hash,
            data_hash=parts.train_reader.index.data_hash,
            val_data_hash=parts.val_reader.index.data_hash,
            plan_hash=parts.plan.hash,
            world_size=launch.accelerator.num_processes,
            layout=parts.layout,
        )
    )
    if recipe.data.holds in ("latents", "codes"):
        tags["latents_of"] = comm.together(lambda: origin_of(parts.train_reader, parts.val_reader))
    if parts.first_weights:
        tags["init_weights_hash"] = parts.first_weights
    tags |= {name: one["words"] for name, one in drawing_of(parts).items()}
    if distance := distance_of(parts.objective):
        tags["perceptual_hash"] = distance.identity
    return replace(parts, tags=tags)


def _build(recipe: Recipe, launch: backends.Launch) -> Parts:
    """Build the parts without tags, which only the main process can compute."""
    config, data, device = recipe.training, recipe.data, launch.accelerator.device
    world_size = launch.accelerator.num_processes
    rank_slots(data.global_batch, rank=0, world_size=world_size, accumulation=config.accumulation)
    model = build_model(recipe)
    first_weights, beginning = initial_weights.prepare(model, recipe, Path(recipe.run_dir))
    model = model.to(device)
    objective = build_objective(recipe, model)
    _refuse_partitioned_layer(discriminators_of(objective), backends.layout(launch.strategy))
    val_reader = open_reader(data.val, data)
    train_reader = open_training(data, val_reader.index.class_names)
    refuse_held_out(train_reader, val_reader)
    if data.holds == "images":
        tell_repeated([train_reader, val_reader], data.channels)
    plan = training_plan(train_reader, data, recipe.seed)
    for reader in (train_reader, val_reader):
        refuse_clipping(reader)
    refuse_small_cache(train_reader, plan, data)
    _refuse_other_epochs(config, plan)
    guard = build_guard(recipe, device)
    return Parts(
        recipe=recipe,
        launch=launch,
        model=model,
        objective=objective,
        guard=guard,
        skips=Skips(epoch_images=len(train_reader), most=data.max_skipped, device=device),
        train_reader=train_reader,
        val_reader=val_reader,
        plan=plan,
        tags={},
        checkpoint_shapes={
            **checkpoint.shapes_of_training(model, averages=averages_of(config)),
            **_rival_shapes(discriminators_of(objective)),
            "guard": {"state": ("F64", [len(guard.state.to_tensor())])},
        },
        first_weights=first_weights,
        beginning=beginning,
    )


def _refuse_other_epochs(config: TrainingConfig, plan: Plan | MixedPlan) -> None:
    """Raise UserError where epochs and steps of a recipe contradict each other. Says how many steps the epochs are."""
    if config.epochs is None:
        return
    steps = steps_of(config.epochs, plan.steps_per_epoch)
    if steps != config.steps:
        raise UserError(
            f"training.epochs (={config.epochs:g}) is {steps} steps of these images, and training.steps is {config.steps}; set one of them "
            "to null"
        )
    if comm.is_main():
        say(f"training.epochs (={config.epochs:g}) is {steps} steps, {plan.steps_per_epoch} an epoch")


def _refuse_partitioned_layer(discriminators: Discriminators | None, layout: str) -> None:
    """Raise UserError where an adaptive weight would differentiate behind the back of a layout that counts its backward passes."""
    config = discriminators and discriminators.config
    if isinstance(config, AdversarialConfig) and config.adaptive and layout != "ddp":
        raise UserError(
            f"objective.adversarial.adaptive takes gradients of the decoder's last layer before the backward pass, which {layout} does not "
            "allow; set it to false, or take ddp"
        )


def _rival_shapes(discriminators: Discriminators | None) -> dict[str, checkpoint.Shapes]:
    if discriminators is None:
        return {}
    averages = () if discriminators.config.ema_decay is None else (MAIN,)
    shapes = checkpoint.shapes_of_training(discriminators, averages=averages)
    return {FILES[part]: of_part for part, of_part in shapes.items()}


def build_guard(recipe: Recipe, device: torch.device) -> Guard:
    """The guard that a recipe asks for."""
    return Guard(
        skip_factor=recipe.optimizer.skip_factor,
        skip_norm=recipe.optimizer.skip_norm,
        clip_norm=recipe.optimizer.clip_norm,
        max_non_finite=recipe.training.max_non_finite,
        scaled=recipe.training.precision == "fp16",
        device=device,
    )


def lay_out(recipe: Recipe, launch: backends.Launch, model: VAE, objective: Objective) -> Strategy:
    """Divide the model and its optimizer over the processes, in the precision of the recipe, compiled or captured as it says."""
    config, device = recipe.training, launch.accelerator.device
    backends.set_precision(config.precision)
    if device.type == "cuda":
        kernels_run()  # what is compiled or captured reads the answer
    if backends.takes_channels_last(config, device, model, launch.strategy):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        backends.refuse_to_compile(launch.strategy)
        model.compile()
    else:
        checkpoint_uncompiled()
    _set_precision(objective, config)
    layout = strategy_class(launch.strategy)
    build = partial(build_optimizer, config=recipe.optimizer, kinds=layout.optimizers)
    strategy = layout(launch.accelerator, model, build, averages=averages_of(config))
    if config.cuda_graphs and device.type == "cuda":
        _capture(strategy, recipe, objective)
    return strategy


def build_rival(recipe: Recipe, launch: backends.Launch, objective: Objective) -> Rival | None:
    """The objective's second player, whose precision `lay_out` has set; None without one."""
    discriminators = discriminators_of(objective)
    if discriminators is None:
        return None
    optimizer = optimizer_of(discriminators.config, recipe.optimizer)
    return Rival(launch.accelerator, discriminators, optimizer)


def _set_precision(objective: Objective, config: TrainingConfig) -> None:
    """Set the precision of the networks that an objective has."""
    for network in (distance_of(objective), discriminators_of(objective)):
        if network is not None:
            network.autocast = AUTOCAST[config.precision]


def _capture(strategy: Strategy, recipe: Recipe, objective: Objective) -> None:
    """Replay a step's passes as CUDA graphs, if that is possible. Says so, or why not."""
    autocast = AUTOCAST[recipe.training.precision]
    why = cuda_graphs.capture(
        strategy,
        images=recipe.data.global_batch,
        seed=recipe.seed,
        options=(objective.importance_samples, objective.doubly_reparameterized, autocast),
        accumulation=recipe.training.accumulation,
    )
    how = "replayed as CUDA graphs" if why is None else f"not replayed as CUDA graphs: {why}"
    if comm.is_main():
        say(f"each step's passes are {how}")


def opening(parts: Parts, start: int) -> str:
    """The sentence with which training begins: what is trained, on what, how far, and where it is written. start: steps done."""
    recipe, config, processes = parts.recipe, parts.recipe.training, parts.launch.accelerator.num_processes
    weights = sum(parameter.numel() for parameter in parts.model.parameters())
    epoch = parts.plan.steps_per_epoch
    begins = f" from step {start}" if start else ""
    noun = noun_of(parts.train_reader)
    return (
        f"train {recipe.name} into {parts.folder}{begins}: {len(parts.train_reader)} {noun} {shape_text(parts.train_reader)} of {recipe.data.train_words} and "
        f"{len(parts.val_reader)} held out; {weights:,} parameters ({recipe.network.kind}, {recipe.likelihood.kind}); "
        f"{device_name(parts.launch.accelerator.device)}, {processes} process{'es' * (processes > 1)}, {parts.layout}, "
        f"{config.precision}; {config.steps} steps of {recipe.data.global_batch} {noun.partition(' ')[0]}, {epoch} to an epoch"
    )


def drawing_of(parts: Parts) -> dict[str, Any]:
    """How training images are drawn and changed, where that is more than each once an epoch as it is; each with a sentence."""
    augment, drawing = parts.recipe.data.augment, dict[str, Any]()
    if isinstance(parts.plan, MixedPlan):
        drawing["mixture"] = describe_mixture(parts.train_reader, parts.plan)
    if augment:
        drawing["augmentation"] = {
            "words": f"training images have {augment.words}: the density of this run is of such augmented images, and held-out images are "
            "evaluated as they are"
        }
    return drawing


def plan_of(parts: Parts) -> dict[str, Any]:
    """The plan that a dry run prints: processes, data, steps, parameters and memory."""
    recipe, config, processes = parts.recipe, parts.recipe.training, parts.launch.accelerator.num_processes
    per_rank = recipe.data.global_batch // processes
    frozen = sum(p.numel() for p in parts.model.parameters() if not p.requires_grad)
    _set_precision(parts.objective, config)
    memory = estimate(
        parts.model,
        images=per_rank // config.accumulation,
        averages=len(averages_of(config)),
        precision=config.precision,
        importance_samples=parts.objective.importance_samples,
        objective=parts.objective,
        accumulation=config.accumulation,
        layout=parts.layout,
        processes=processes,
    )
    discriminators = discriminators_of(parts.objective)
    rival = sum(p.numel() for p in discriminators.parameters()) if discriminators else 0
    return {
        "layout": parts.layout,
        "processes": processes,
        "device": str(parts.launch.accelerator.device),
        "train_images": len(parts.train_reader),
        "train_shards": len(parts.train_reader.index.shards),
        "val_images": len(parts.val_reader),
        "steps": config.steps,
        "steps_per_epoch": parts.plan.steps_per_epoch,
        **({"mixture_sets": drawing["sets"]} if (drawing := drawing_of(parts).get("mixture")) else {}),
        "epochs": round(config.steps / parts.plan.steps_per_epoch, 2),
        "images_per_process_and_step": per_rank,
        **_ladder(recipe),
        "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        **({"discriminator_parameters": rival} if rival else {}),
        **({"frozen_parameters": frozen} if frozen else {}),
        **({"init_from": parts.beginning} if parts.beginning else {}),
        **{f"memory_{name}_bytes": size for name, size in memory.items()},
        "memory_images_bytes": parts.train_reader.memory_bytes + parts.val_reader.memory_bytes,
        **parts.tags,
    }


def _ladder(recipe: Recipe) -> dict[str, str]:
    """The stages of a ladder, also where the recipe leaves them to the image size."""
    network = recipe.network
    if not isinstance(network, LadderConfig):
        return {}
    down, up = suggested(recipe.data.sides)
    stages = {"encoder": network.encoder or down, "decoder": network.decoder or up}
    return {f"ladder_{name}": ",".join(words) for name, words in stages.items()}
