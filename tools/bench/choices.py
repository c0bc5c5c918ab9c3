"""Recipes' training steps beside the fixed choices: torch's operations throughout, with maps as [B, C, H, W] or as [B, H, W, C].

    python -m tools.bench.choices
    python -m tools.bench.choices recipes/mnist/conv.yaml --images 32 --rounds 9

Random images; each choice has a process of its own, and their steps are timed in turn. The last column is the faster of the two fixed
choices, in times of this build's step: below 1, a fixed choice would have been faster. The fixed choices, too, have this build's optimizer, norms of gradients and pages. Run it on a machine that does nothing else.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import torch

from tools.bench.gpu_training import _ours
from vaescale.networks import convolutions
from vaescale.recipe import load_recipe
from vaescale.system import native
from vaescale.system.host import keep_freed_pages
from vaescale.training import launch

RECIPES = {
    "digits/optimal": 120,
    "digits/ladder": 120,
    "digits/linear": 120,
    "digits/resnet": 120,
    "digits/vq_vae": 120,
    "digits/autoregressive": 120,
    "mnist/conv": 128,
    "mnist/ladder": 32,
    "fashion_mnist/optimal": 128,
    "fashion_mnist/ladder": 32,
    "phantom/optimal": 32,
    "cifar10/conv": 128,
    "cifar10/ladder_bounded": 4,
    "celeba64/conv": 100,
    "celeba64/optimal": 16,
}
FIXED = {
    "[B, C, H, W]": ("training.channels_last=false",),
    "[B, H, W, C]": ("training.channels_last=true",),
}
WARM_UP, LEAST = 6, 2  # steps before the first round, and of a round


def main() -> None:
    """Measure and print one line for each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", type=Path, help="default: one for each network")
    parser.add_argument("--images", type=int, help="of a step; default: 32, or as fits the recipe")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=1, help="of a round and choice; default: 1")
    arguments = parser.parse_args()
    root = Path(__file__).parents[2] / "recipes"
    chosen = dict.fromkeys(arguments.recipes, arguments.images or 32)
    chosen = chosen or {root / f"{name}.yaml": arguments.images or n for name, n in RECIPES.items()}
    sys.stdout.write(f"{'milliseconds':>44s}{'this build':>14s}{''.join(f'{name:>14s}' for name in FIXED)}\n")
    for path, images in chosen.items():
        line = measured(path, images, rounds=arguments.rounds, seconds=arguments.seconds)
        best = min(line[name] for name in FIXED) / line["this build"]
        name = f"{path.parent.name}/{path.stem}, {images} images"
        sys.stdout.write(
            f"{name:>44s}{''.join(f'{1e3 * value:14.1f}' for value in line.values())}{best:8.2f}\n"
        )
        sys.stdout.flush()


def measured(path: Path, images: int, *, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of a step of this build and of the fixed choices, in turn."""
    spawning = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in ("this build", *FIXED):
        pipes[name], other = spawning.Pipe()
        processes.append(spawning.Process(target=_serve, args=(other, path, images, name), daemon=True))
        processes[-1].start()
        other.close()
        pipes[name].recv()  # they build and warm up one after the other
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(seconds)
            times[name] += pipe.recv()
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return {name: statistics.median(values) for name, values in times.items()}


def _serve(pipe: Connection, path: Path, images: int, name: str) -> None:
    """Send the times of steps, for each number of seconds that comes, until None comes."""
    keep_freed_pages()
    with torchs_operations() if name in FIXED else nullcontext():
        options = (*FIXED.get(name, ()), f"data.global_batch={images}", "training.accumulation=1")
        step = _ours(load_recipe(path, list(options)), images, torch.device("cpu"))[1]
        for number in range(WARM_UP):
            step(number)
        number = WARM_UP
        pipe.send(None)
        while (seconds := pipe.recv()) is not None:
            times: list[float] = []
            while len(times) < LEAST or sum(times) < seconds:
                begin = time.perf_counter()
                step(number)
                times.append(time.perf_counter() - begin)
                number += 1
            pipe.send(times)


@contextmanager
def torchs_operations() -> Iterator[None]:
    """Use torch's operations alone, in the order of maps that the recipe asks for."""
    with (
        native.switched_off(),
        mock.patch.object(convolutions, "_is_plain", return_value=False),
        mock.patch.object(launch, "LARGE", 1 << 30),
    ):
        yield


if __name__ == "__main__":
    main()
