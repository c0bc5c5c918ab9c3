"""The number of ATen operations of one training step, by the part of vaescale that calls them.

    python tools/bench/operations.py recipes/cifar10/ladder_bounded.yaml recipes/mnist/conv.yaml

Counts what torch dispatches below autograd, so the backward pass is included and a fused optimizer is one operation for each
group of tensors. A view is an operation without a kernel. The second step is counted, of random images: neither data nor a
clock is needed, and the counts do not depend on the number of images. `step` is a step that writes no row of metrics, as most
do; `logged` is one that does.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vaescale
from vaescale.commands.parts import build_guard, lay_out
from vaescale.data.batch import Batch
from vaescale.recipe import Recipe, load_recipe
from vaescale.trained import build_model
from vaescale.training import launch as backends
from vaescale.training.step import step_metrics, train_step

PACKAGE = str(Path(vaescale.__file__).parent)
RECIPES = ("cifar10/ladder_bounded", "mnist/ladder", "cifar10/conv", "digits/optimal")
# The innermost call that one of these describes is an operation's source: a file or folder of the package, and a function.
SOURCES = (
    ("training/strategies/base.py", "backward", "backward"),
    ("training/strategies/base.py", "_grad_norm", "gradient norm"),
    ("training/gradient_norm.py", "", "gradient norm"),
    ("training/strategies/base.py", "_average", "average of weights"),
    ("training/strategies/base.py", "", "optimizer"),
    ("likelihoods", "end_step", "end_step"),
    ("models/vae.py", "_moments", "errors and variances"),
    ("evaluation/likelihood.py", "column_sums", "column sums"),
    ("noise/__init__.py", "", "noise"),
    ("networks", "", "network"),
    ("likelihoods", "", "likelihood"),
    ("models", "", "latents and KL"),
    ("objectives", "", "objective"),
    ("training/step.py", "step_metrics", "metrics"),
    ("training/guard.py", "", "guard"),
    ("training/outliers.py", "", "guard"),
    ("training/loss_scale.py", "", "guard"),
    ("training/later.py", "", "guard"),
    ("training/half_weights.py", "", "copies of weights"),
    ("training", "", "step"),
)


class Counts(NamedTuple):
    """Operations, and those of them that are no views, by source."""

    operations: Counter[str]
    kernels: Counter[str]


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by source while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counts = Counts(Counter(), Counter())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = _source(sys._getframe(1))
        self.counts.operations[source] += 1
        self.counts.kernels[source] += not func.is_view
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Count for each recipe and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", type=Path, nargs="*", help="default: " + ", ".join(RECIPES))
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="*", default=[], help="recipe keys to override")
    parser.add_argument("--images", type=int, default=2, help="number of images of the step; default: 2")
    arguments = parser.parse_intermixed_args()
    for path in arguments.recipes or [Path(f"recipes/{name}.yaml") for name in RECIPES]:
        recipe = load_recipe(path, arguments.set)
        step, logged = (count(recipe, images=arguments.images, logged=logged) for logged in (False, True))
        sys.stdout.write(f"{recipe.name}\n{table(step, logged)}")


def count(recipe: Recipe, *, images: int = 2, logged: bool = False) -> Counts:
    """The counts of the second step of a recipe's training on one process. logged: whether it writes a row of metrics."""
    launch = backends.start(processes=1)
    model = build_model(recipe).to(launch.accelerator.device)
    guard, objective = build_guard(recipe, launch.accelerator.device), recipe.objective.implement(model)
    strategy = lay_out(recipe, launch, model, objective)
    strategy.wrapped.train()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *model.image_shape), dtype=torch.uint8, generator=generator)
    batch = Batch(
        pixels,
        torch.zeros(images, dtype=torch.int64),
        torch.arange(images),
        torch.ones(images, dtype=torch.bool),
        (),
    )
    run_step = partial(
        train_step, strategy, [batch], objective=objective, precision=recipe.training.precision, seed=0
    )
    run_step(judge=partial(guard.judge, step=0), scale=guard.scale, step=0)
    with Counting() as counting:
        result = run_step(judge=partial(guard.judge, step=1), scale=guard.scale, step=1, logged=logged)
        if logged:
            step_metrics(result, strategy.model)
    counts: Counts = counting.counts
    return counts


def table(step: Counts, logged: Counts) -> str:
    """Rows of sources, largest first, and their sums."""
    lines = [f"  {'':22s}{'step':>8s}{'kernels':>9s}{'logged':>8s}"]
    for source, number in logged.operations.most_common():
        lines.append(f"  {source:22s}{step.operations[source]:8,d}{step.kernels[source]:9,d}{number:8,d}")
    totals = (step.operations.total(), step.kernels.total(), logged.operations.total())
    lines.append("  {:22s}{:8,d}{:9,d}{:8,d}".format("all", *totals))
    return "\n".join(lines) + "\n"


def _source(frame: FrameType | None) -> str:
    """The source of a call, from the innermost frame of the package that SOURCES describes."""
    source = ""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(PACKAGE):
            within = file.removeprefix(PACKAGE).lstrip("/")
            for place, name, title in SOURCES:
                if within.startswith(place) and name in ("", function):
                    if title == "backward" or not source:
                        source = title
                    break
        frame = frame.f_back
    return source or "other"


if __name__ == "__main__":
    main()
