"""The time of a training step, measured by a few steps that leave nothing behind."""

import time
from contextlib import closing
from functools import partial

import torch

from vaescale import comm
from vaescale.commands.parts import Parts, build_rival, lay_out
from vaescale.data.loader import training_batches
from vaescale.system.console import Progress
from vaescale.training.step import train_step

TIMED = 2  # steps, after a first one that compiles, allocates and starts readers


def time_steps(parts: Parts) -> dict[str, float]:
    """Train three steps and time the last two, their reading included. All ranks call it. Changes the weights in memory; writes nothing.

    Returns seconds_per_step, the largest of the ranks', and training_seconds of the recipe's steps, without evaluations and checkpoints.
    """
    recipe, device = parts.recipe, parts.launch.accelerator.device
    strategy = lay_out(recipe, parts.launch, parts.model, parts.objective)
    rival = build_rival(recipe, parts.launch, parts.objective)
    batches = training_batches(
        parts.train_reader,
        parts.plan,
        steps=range(1 + TIMED),
        rank=comm.rank(),
        world_size=parts.launch.accelerator.num_processes,
        accumulation=recipe.training.accumulation,
        workers=recipe.data.workers,
        flip=recipe.data.flip,
        augment=recipe.data.augment,
    )
    strategy.wrapped.train()
    begin, shown = 0.0, comm.is_main()
    with closing(batches), Progress("time steps", 1 + TIMED, unit="steps", shown=shown) as progress:
        for step, micro_batches in enumerate(parts.skips.counting(batches)):
            comm.at_step(step)
            train_step(
                strategy,
                micro_batches,
                objective=parts.objective,
                judge=partial(parts.guard.judge, step=step, asked_to_stop=False),
                scale=parts.guard.scale,
                rival=rival,
                precision=recipe.training.precision,
                seed=recipe.seed,
                step=step,
                logged=recipe.training.compile,  # a compiled model has one graph for all steps
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            progress.update(step + 1)
            if step == 0:
                begin = time.perf_counter()
    seconds = max(comm.gather_object((time.perf_counter() - begin) / TIMED))
    return {"seconds_per_step": seconds, "training_seconds": seconds * recipe.training.steps}
