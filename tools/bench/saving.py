"""Cost of a checkpoint to training: the pause when it is written in the background, and when training waits for it.

    python tools/bench/saving.py recipes/cifar10/ladder_bounded.yaml network.width=256

Uses random images, so no data is needed. Rounds are interleaved: steps alone, steps with a checkpoint in the background, steps
that wait for the checkpoint.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from vaescale.data.batch import Batch
from vaescale.recipe import load_recipe
from vaescale.runs.checkpoint import Keep
from vaescale.system.host import keep_freed_pages
from vaescale.trained import build_model
from vaescale.training import launch as backends
from vaescale.training.averages import averages_of
from vaescale.training.guard import Guard
from vaescale.training.optimizer import build_optimizer
from vaescale.training.step import train_step
from vaescale.training.strategies import strategy_class
from vaescale.training.writer import Writer

STEPS = 6


def main() -> None:
    """Measure the pauses in this process and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="recipe keys to override")
    parser.add_argument("--images", type=int, default=4, help="number of images per step; default: 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure; default: a temporary folder"
    )
    arguments = parser.parse_intermixed_args()
    keep_freed_pages()  # as every verb does
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    launch = backends.start(processes=1)
    model = build_model(recipe).to(launch.accelerator.device)
    objective, guard = (
        recipe.objective.implement(model),
        Guard(max_non_finite=10, device=launch.accelerator.device),
    )
    build = partial(build_optimizer, config=recipe.optimizer)
    strategy = strategy_class("ddp")(launch.accelerator, model, build, averages=averages_of(recipe.training))
    count, shape = arguments.images, model.image_shape
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(count), torch.arange(count), torch.ones(count, dtype=torch.bool))
    number = 0

    def steps() -> float:
        nonlocal number
        start = time.perf_counter()
        for _ in range(STEPS):
            number += 1
            train_step(
                strategy,
                [batch],
                objective=objective,
                judge=partial(guard.judge, step=number),
                precision=recipe.training.precision,
                seed=0,
                step=number,
            )
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in ("steps alone", "saving beside", "waiting for it")}
    pauses, written = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, Writer(Path(folder)) as writer:
        steps()
        for _ in range(arguments.rounds):
            times["steps alone"].append(steps())
            for name in ("saving beside", "waiting for it"):
                start = time.perf_counter()
                writer.save(number, strategy.state(), {}, keep=Keep(1))
                pauses.append(time.perf_counter() - start)
                if name == "waiting for it":
                    writer.wait()
                    written.append(time.perf_counter() - start)
                times[name].append(time.perf_counter() - start + steps())
                writer.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{parameters / 1e6:.1f}M parameters, {size / 2**20:.0f} MiB a checkpoint, {STEPS} steps a round"
    ]
    base = statistics.median(times["steps alone"])
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["steps alone"], strict=True))
        lines.append(f"  {name:16s}{statistics.median(values):8.2f} s{ratio:8.3f}")
    pause, whole = statistics.median(pauses), statistics.median(written)
    lines.append(
        f"  the pause: {pause:.2f} s, {pause / base * STEPS:.2f} of a step; written in {whole:.2f} s"
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
