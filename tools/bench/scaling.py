"""Scaling from one process to two with the same batch per process: the speed-up and its losses.

    python tools/bench/scaling.py recipes/cifar10/ladder_bounded.yaml --images 16 network.width=64

Measures three cases in turn, in the same two processes with one thread each: one process steps while the other waits; both step
without communication (they share the machine); both take a training step (they exchange gradients, sigma and metrics). Uses
random images, so no data is needed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.recipe import load_recipe
from vaescale.system.host import keep_freed_pages
from vaescale.trained import build_model
from vaescale.training import launch as backends
from vaescale.training.guard import Guard
from vaescale.training.optimizer import build_optimizer
from vaescale.training.step import AUTOCAST, train_step
from vaescale.training.strategies import strategy_class

STEPS = 5


def main() -> None:
    """Start two processes, or run as one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="recipe keys to override")
    parser.add_argument(
        "--images", type=int, default=16, help="number of images per process and step; default: 16"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--backend",
        default="cpu2",
        help="accelerate config in recipes/backends/, without .yaml; default: cpu2",
    )
    arguments = parser.parse_intermixed_args()
    if "WORLD_SIZE" in os.environ:
        measure(arguments)
        return
    config = Path("recipes/backends") / f"{arguments.backend}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    subprocess.run([*launcher, "--num_processes", "2", *sys.argv], check=True)


def measure(arguments: argparse.Namespace) -> None:
    """Measure all three cases in turn; the first process prints."""
    keep_freed_pages()  # as every verb does
    torch.set_num_threads(1)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if hasattr(
        recipe.likelihood, "sigma"
    ):  # a fixed sigma has no all-reduce, so the step without communication has none at all
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, "likelihood.sigma=0.1"])
    launch = backends.start()
    device = launch.accelerator.device
    count = arguments.images
    plain = build_model(recipe).to(device).train()
    objective, optimizer = recipe.objective.implement(plain), build_optimizer(plain, recipe.optimizer)
    model = build_model(recipe).to(device)
    strategy = strategy_class(launch.strategy)(
        launch.accelerator,
        model,
        partial(build_optimizer, config=recipe.optimizer),
        ema_decay=recipe.training.ema_decay,
    )
    strategy.wrapped.train()
    guard = Guard(max_non_finite=10, device=device)
    images = torch.randint(0, 256, (count, *model.image_shape), dtype=torch.uint8)
    slots = torch.arange(count) + count * comm.rank()
    mask = torch.ones(count, dtype=torch.bool)
    batch, step = Batch(images, torch.zeros(count), slots, mask), 0

    def alone() -> None:
        stream = noise.Stream(0, step, slots.to(device))
        terms = plain(
            images.to(device), stream, mask.to(device), 0, False, AUTOCAST[recipe.training.precision]
        )
        objective(terms, stream)[0].backward()
        torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    def together() -> None:
        train_step(
            strategy,
            [batch],
            objective=objective,
            judge=partial(guard.judge, step=step),
            precision=recipe.training.precision,
            seed=0,
            step=step,
        )

    def seconds(work: Callable[[], None], *, both: bool) -> float:
        nonlocal step
        comm.gather_object(0)
        start = time.perf_counter()
        for _ in range(STEPS if both or comm.is_main() else 0):
            step += 1 if both else 0
            comm.at_step(step)
            work()
        return max(comm.gather_object(time.perf_counter() - start)) / STEPS

    cases: dict[str, Callable[[], float]] = {
        "one process": lambda: seconds(alone, both=False),
        "two that exchange nothing": lambda: seconds(alone, both=True),
        "two that train together": lambda: seconds(together, both=True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1, arguments.rounds):
        for name, case in cases.items():
            seconds_of_step = case()
            if number >= 0:
                times[name].append(seconds_of_step)
    if comm.is_main():
        show(times, backends.layout(launch.strategy), sum(p.numel() for p in plain.parameters()), count)
    comm.gather_object(0)
    os._exit(0)


def show(times: dict[str, list[float]], layout: str, parameters: int, images: int) -> None:
    """Print the seconds per step, and the throughput as a share of twice that of one process."""
    one, apart, together = times.values()
    lines = [f"{layout}, {parameters / 1e6:.1f}M parameters, {images} images a process and step"]
    for name, values in times.items():
        lines.append(f"  {name:28s}{statistics.median(values):8.3f} s a step")
    machine = statistics.median(a / b for a, b in zip(one, apart, strict=True))
    exchange = statistics.median(a / b for a, b in zip(apart, together, strict=True))
    whole = statistics.median(a / b for a, b in zip(one, together, strict=True))
    lines.append(
        f"  efficiency {whole:.2f} = {machine:.2f} (the machine, shared) x {exchange:.2f} (the exchange)"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
