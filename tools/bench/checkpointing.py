"""Peak memory and time of a training step with and without activation checkpointing, each in a process of its own.

    python tools/bench/checkpointing.py recipes/cifar10/ladder_bounded.yaml --images 8

Uses random images, so no data is needed. Memory is the peak of the process minus its memory before the first step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from vaescale import noise
from vaescale.recipe import load_recipe
from vaescale.system.host import keep_freed_pages
from vaescale.trained import build_model

STEPS = 3


def main() -> None:
    """Start two processes that measure, or run as one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a recipe with `network.kind: ladder`")
    parser.add_argument(
        "--images", type=int, default=8, help="number of images per process and step; default: 8"
    )
    parser.add_argument("--measure", choices=("true", "false"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments)) + "\n")
        return
    results = []
    for checkpointing in ("false", "true"):
        command = [sys.executable, __file__, str(arguments.recipe), "--images", str(arguments.images)]
        done = subprocess.run(
            [*command, "--measure", checkpointing], capture_output=True, text=True, check=True
        )
        results.append(json.loads(done.stdout))
        peak, seconds = results[-1]["peak_bytes"], results[-1]["seconds"]
        sys.stdout.write(
            f"checkpointing {checkpointing:5s}  {peak / 2**30:6.2f} GiB  {seconds:6.2f} s a step\n"
        )
    memory, seconds = (results[1][key] / results[0][key] for key in ("peak_bytes", "seconds"))
    sys.stdout.write(f"with checkpointing: {memory:.2f} of the memory, {seconds:.2f} of the time\n")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the peak bytes above the start, and the median seconds of a step."""
    keep_freed_pages()  # as every verb does
    recipe = load_recipe(arguments.recipe, [f"network.checkpointing={arguments.measure}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(recipe).to(device).train()
    images = torch.randint(0, 256, (arguments.images, *model.image_shape), dtype=torch.uint8, device=device)
    slots = torch.arange(arguments.images, device=device)
    mask = torch.ones(arguments.images, dtype=torch.bool, device=device)
    before, times = _peak(device), []
    for step in range(STEPS):
        start = time.perf_counter()
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            terms = model(images, noise.Stream(0, step, slots), mask)
        (terms.kl.sum(1) - terms.log_px).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"peak_bytes": _peak(device) - before, "seconds": statistics.median(times)}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
