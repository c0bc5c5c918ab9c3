"""Cost of a calibrated decoder: the time of a whole training step, as ratios measured side by side in one run.

    python tools/bench/sigma.py                    on one process, then on two over gloo

The network is that of recipes/fashion_mnist on random images. Each round times a few steps of every decoder in turn; the
ratio to the Gaussian with a fixed sigma is the median over the rounds. The all-reduce of the sigma state is also timed
separately, as a share of the step; on two processes the time of the step includes it.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vaescale import comm
from vaescale.config import OneOf
from vaescale.data.batch import Batch
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.networks.config import ConvConfig
from vaescale.objectives.config import ElboConfig
from vaescale.objectives.elbo import Elbo
from vaescale.training import launch as backends
from vaescale.training.guard import Guard
from vaescale.training.step import train_step
from vaescale.training.strategies import Strategy

GLOBAL_BATCH, SIZE, STEPS = 128, 28, 3
FIXED = "gaussian, fixed"
DECODERS: dict[str, dict[str, object]] = {
    FIXED: {"kind": "gaussian", "sigma": 0.1},
    "gaussian, fixed (again)": {"kind": "gaussian", "sigma": 0.1},  # the difference between two equal cases
    "gaussian, optimal": {"kind": "gaussian", "sigma": "optimal"},
    "gaussian, optimal, running": {"kind": "gaussian", "sigma": "optimal", "sigma_source": "running"},
    "gaussian, optimal, gradient kept": {"kind": "gaussian", "sigma": "optimal", "sigma_gradient": "keep"},
    "gaussian, optimal per pixel": {"kind": "gaussian", "sigma": "optimal_per_pixel"},
    "gaussian, predicted": {"kind": "gaussian", "sigma": "predicted"},
    "structured gaussian, 3x3": {"kind": "structured_gaussian"},
    "structured gaussian, 5x5": {"kind": "structured_gaussian", "radius": 2},
    "student-t": {"kind": "student_t"},
    "bitwise": {"kind": "bitwise"},
    "discretized logistic": {"kind": "discretized_logistic"},
    "logistic mixture, 5": {"kind": "discretized_logistic_mixture", "components": 5},
    "logistic mixture, 10": {"kind": "discretized_logistic_mixture", "components": 10},
}


def main() -> None:
    """Measure on one process, then on two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds; default: %(default)s")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="measure only decoders whose name contains WORDS, and the fixed one",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.rounds, arguments.only)
        sys.stdout.flush()
        os._exit(0)  # as in `vaescale.cli`: a gloo thread may abort Python's shutdown
    script = [str(Path(__file__)), "--worker", "--rounds", str(arguments.rounds), "--only", arguments.only]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "recipes/backends/cpu2.yaml"]
    sys.stdout.flush()
    subprocess.run([sys.executable, *script], check=True)
    subprocess.run([sys.executable, *launcher, *script], check=True)


def measure(rounds: int, only: str) -> None:
    """Measure all decoders in turn, in this process and its peers; the first process prints."""
    accelerator = backends.start().accelerator
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    chosen = {name: keys for name, keys in DECODERS.items() if only in name or "fixed" in name}
    steps = {name: stepper(accelerator, keys) for name, keys in chosen.items()}
    order, turns = list(steps), random.Random(0)  # noqa: S311
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):  # two rounds to warm up
        turns.shuffle(order)  # the previous decoder affects caches and memory
        for name in order:
            step = steps[name]
            comm.all_reduce_sum(torch.zeros(1))  # begin together
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            if number >= 0:
                times[name].append((time.perf_counter() - start) / STEPS)
    alone = seconds_of_the_reduction()
    if comm.is_main():
        show(times, alone, accelerator.num_processes)
    backends.stop(accelerator)


def stepper(accelerator, keys: dict[str, object]) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    """Return a function that runs one optimizer step of a decoder."""
    torch.manual_seed(0)
    likelihood = OneOf(LIKELIHOODS).validate(keys)
    network = ConvConfig(latent_dim=32, widths=(32, 64))
    model = build_vae(network, DiagonalConfig(), likelihood, image_size=(SIZE, SIZE), channels=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    guard = Guard(max_non_finite=10, device=accelerator.device)
    strategy = Strategy(accelerator, model, lambda _: optimizer, averages={})
    share = GLOBAL_BATCH // accelerator.num_processes
    slots = torch.arange(share) + share * comm.rank()
    images = torch.randint(0, 256, (share, 1, SIZE, SIZE), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(share), slots, torch.ones(share, dtype=torch.bool))
    return lambda: train_step(
        strategy,
        [batch],
        objective=Elbo(ElboConfig(), model),
        judge=partial(guard.judge, step=0),
        precision="bf16",
        seed=0,
        step=0,
    )


def seconds_of_the_reduction(count: int = 300) -> float:
    """Measure the median time of the all-reduce of (number, sum)."""
    values, times = torch.ones(2, dtype=torch.float64), []
    for _ in range(count):
        start = time.perf_counter()
        comm.all_reduce_sum(values)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def show(times: dict[str, list[float]], alone: float, processes: int) -> None:
    """Print milliseconds and ratios."""
    base = times[FIXED]
    lines = [f"{processes} process{'es' if processes > 1 else ''}, global batch {GLOBAL_BATCH}, bf16"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        lines.append(f"  {name:34s}{1e3 * statistics.median(values):8.1f} ms a step{ratio:8.3f}")
    if processes > 1:
        share = alone / statistics.median(base)
        lines.append(f"  one all-reduce of (number, sum): {1e6 * alone:.0f} us, {share:.2%} of a step")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
