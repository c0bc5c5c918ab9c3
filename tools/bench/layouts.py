"""Peak memory and time of a training step in each layout, on two processes, and the estimate of a dry run.

    python tools/bench/layouts.py recipes/cifar10/ladder_bounded.yaml --images 2 network.width=512

Uses random images, so no data is needed. Memory is the peak in use of a process minus the memory in use before the model was
built, as counted by torch on a GPU and by malloc elsewhere. Resident memory is larger, because it includes freed memory that was
not returned to the system.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

BACKENDS = ("cpu2", "zero1", "zero2", "zero3", "fsdp2")
STEPS = 4


def main() -> None:
    """Start processes that measure each layout, or run as one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the recipe to train")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="recipe keys to override")
    parser.add_argument(
        "--images", type=int, default=2, help="number of images per process and step; default: 2"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=BACKENDS,
        help=f"layouts to measure, among {', '.join(BACKENDS)}; default: all",
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.measure:
        measure(arguments)
        return
    first: dict[str, Any] | None = None
    for backend in arguments.only:
        config = Path("recipes/backends") / f"{backend}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        script = [__file__, str(arguments.recipe), *arguments.overrides, "--images", str(arguments.images)]
        done = subprocess.run(
            [*launcher, *script, "--measure"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout.strip().splitlines()[-1])
        first = first or result
        peak, seconds, total = result["peak_bytes"], result["seconds"], result["estimate"]["peak"]
        sys.stdout.write(
            f"{result['layout']:6s} {result['parameters'] / 1e6:6.1f}M parameters  peak {peak / 2**30:5.2f} GiB "
            f"({peak / first['peak_bytes']:.2f} of the first)  estimate {total / 2**30:5.2f} ({total / peak:.2f} of the peak)  "
            f"{seconds:6.2f} s a step ({seconds / first['seconds']:.2f})\n"
        )
        sys.stdout.flush()


def measure(arguments: argparse.Namespace) -> None:
    """Measure one layout; the first process prints peak bytes above the start, the estimate and the median seconds of a step."""
    import torch

    from vaescale import comm
    from vaescale.data.batch import Batch
    from vaescale.recipe import load_recipe
    from vaescale.system.host import keep_freed_pages
    from vaescale.trained import build_model
    from vaescale.training import launch as backends
    from vaescale.training.averages import averages_of
    from vaescale.training.guard import Guard
    from vaescale.training.memory import estimate
    from vaescale.training.optimizer import build_optimizer
    from vaescale.training.step import train_step
    from vaescale.training.strategies import strategy_class

    keep_freed_pages()  # as every verb does
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    launch = backends.start()
    device = launch.accelerator.device
    comm.all_reduce_sum(torch.ones(1, device=device))
    if launch.strategy == "zero":
        import deepspeed  # noqa: F401  # its own memory is not the model's
    images = torch.randint(0, 256, (arguments.images, 3, 32, 32), dtype=torch.uint8)
    images = images[:, : recipe.data.channels]
    peak = Peak(device)
    before = peak.now()
    model = build_model(recipe).to(device)
    planned = estimate(
        model,
        images=arguments.images,
        averages=len(averages_of(recipe.training)),
        precision=recipe.training.precision,
        layout=backends.layout(launch.strategy),
        processes=comm.world_size(),
    )
    objective = recipe.objective.implement(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    guard = Guard(max_non_finite=10, device=device)
    strategy = strategy_class(launch.strategy)(
        launch.accelerator,
        model,
        partial(build_optimizer, config=recipe.optimizer),
        averages=averages_of(recipe.training),
    )
    strategy.wrapped.train()
    slots = torch.arange(arguments.images) + arguments.images * comm.rank()
    batch = Batch(
        images, torch.zeros(arguments.images), slots, torch.ones(arguments.images, dtype=torch.bool)
    )
    peak.reset()
    times = []
    for step in range(STEPS):
        comm.at_step(step)
        start = time.perf_counter()
        train_step(
            strategy,
            [batch],
            objective=objective,
            judge=partial(guard.judge, step=step),
            precision=recipe.training.precision,
            seed=0,
            step=step,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = {
        "layout": strategy.name,
        "parameters": parameters,
        "peak_bytes": peak.read() - before,
        "seconds": statistics.median(times[1:]),
        "estimate": planned,
    }
    if comm.is_main():
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    comm.gather_object(0)
    os._exit(0)


class Peak:
    """The peak of bytes in use since the last reset: torch's count on a GPU, else malloc's count, sampled every 2 ms."""

    def __init__(self, device: Any) -> None:
        self._on_gpu, self._most = device.type == "cuda", 0
        self._look = ctypes.CDLL(None).mallinfo2
        self._look.restype = Mallinfo
        if not self._on_gpu:
            threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        """Return the bytes in use."""
        if self._on_gpu:
            import torch

            return torch.cuda.memory_allocated()
        used = self._look()
        return int(used.uordblks + used.hblkhd)

    def reset(self) -> None:
        """Start a new measurement of the peak."""
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._most = self.now()

    def read(self) -> int:
        """Return the peak since the last reset."""
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return self._most

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, self.now())
            time.sleep(0.002)


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


if __name__ == "__main__":
    main()
