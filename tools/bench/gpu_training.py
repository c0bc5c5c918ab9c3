"""Time, memory and kernels of whole training steps on a GPU, for `gpu.py`: vaescale's step beside a plain loop of the same network."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vaescale import noise
from vaescale.commands.parts import build_guard, lay_out
from vaescale.data.batch import Batch
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe, load_recipe
from vaescale.trained import build_model
from vaescale.training import launch as backends
from vaescale.training.memory import estimate
from vaescale.training.step import AUTOCAST, train_step
from vaescale.training.utilization import flops_of_an_image

RECIPES = Path(__file__).parents[2] / "recipes"
RESNET_F8 = """
name: resnet-f8
seed: 0
data: {train: none, val: none, image_size: 256, channels: 3, global_batch: 16}
network: {kind: resnet, latent_dim: 4, width: 128, multipliers: [1, 2, 4, 4]}
likelihood: {kind: gaussian, sigma: optimal}
optimizer: {lr: 1e-4, clip_norm: 1000000}
training: {steps: 1000, precision: bf16}
"""
WARM_UP, STEPS, ROUNDS = 4, 4, 3


class Case(NamedTuple):
    """A network and the number of images in a step. recipe: a file below recipes/, or the text of one."""

    recipe: str
    images: int
    variants: tuple[str, ...] = ("plain eager loop", "without graphs", "recipe")


CASES = {
    "celeba64 conv": Case("celeba64/conv.yaml", 512),
    "resnet f8 at 256": Case(RESNET_F8, 16),
    "cifar10 ladder": Case("cifar10/ladder_bounded.yaml", 32),
    "imagenet64 ladder": Case("imagenet64/ladder_bounded.yaml", 16),
}
PLAIN = "plain eager loop"
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "without graphs": ("training.cuda_graphs=false",),
    "recipe": (),
    "compile": ("training.compile=true",),
}


class Measured(NamedTuple):
    """One variant of a case. seconds: of a step, the median over rounds; busy: share of it in which kernels run."""

    seconds: float
    spread: float
    images: int
    flops: float
    launches: int
    busy: float
    peak_bytes: int
    estimated_bytes: int
    start_seconds: float
    top: list[tuple[str, int, float]]


def measure(
    case: Case, variants: list[str], folder: Path, device: torch.device
) -> Iterator[tuple[str, Measured]]:
    """Measure each variant by itself: the card's memory may hold one model only."""
    flops = 0.0
    for name in variants:
        recipe = _recipe(case, VARIANTS[name], folder)
        if not flops:
            with _fresh(device):
                flops = case.images * flops_of_an_image(build_model(recipe).to(device))
        build = _plain if name == PLAIN else _ours
        with _fresh(device):
            yield name, _measured(recipe, case.images, build, flops, device)


def _recipe(case: Case, options: tuple[str, ...], folder: Path) -> Recipe:
    path = RECIPES / case.recipe
    if "\n" in case.recipe:
        path = folder / "recipe.yaml"
        path.write_text(case.recipe)
    sizes = (f"data.global_batch={case.images}",)
    return load_recipe(path, [*options, *sizes])


def _measured(
    recipe: Recipe,
    images: int,
    build: Callable[[Recipe, int, torch.device], tuple[VAE, Callable[[int], object]]],
    flops: float,
    device: torch.device,
) -> Measured:
    begin = time.perf_counter()
    model, step = build(recipe, images, device)
    step(0)
    _wait(device)
    start_seconds = time.perf_counter() - begin
    for number in range(1, WARM_UP):
        step(number)
    _wait(device)
    times = []
    for round_ in range(ROUNDS):
        begin = time.perf_counter()
        for number in range(STEPS):
            step(WARM_UP + round_ * STEPS + number)
        _wait(device)
        times.append((time.perf_counter() - begin) / STEPS)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = statistics.median(times)
    launches, in_kernels, top = _kernels(step, device)
    expected = estimate(model, images=images, averages=1, precision=recipe.training.precision)["peak"]
    return Measured(
        seconds=seconds,
        spread=(max(times) - min(times)) / seconds,
        images=images,
        flops=flops,
        launches=launches,
        busy=in_kernels / seconds,
        peak_bytes=peak,
        estimated_bytes=expected,
        start_seconds=start_seconds,
        top=top,
    )


def _batch(model: VAE, images: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *model.image_shape), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, torch.zeros(images), torch.arange(images), torch.ones(images, dtype=torch.bool))
    if torch.cuda.is_available():
        batch = batch._replace(
            images=batch.images.pin_memory(), slots=batch.slots.pin_memory(), mask=batch.mask.pin_memory()
        )
    return batch


def _ours(recipe: Recipe, images: int, device: torch.device) -> tuple[VAE, Callable[[int], object]]:
    """vaescale's step, as `vaescale train` builds it."""
    launch = backends.start(processes=1)
    model = build_model(recipe).to(device)
    guard, objective = build_guard(recipe, device), recipe.objective.implement(model)
    strategy = lay_out(recipe, launch, model, objective)
    strategy.wrapped.train()
    batch = _batch(model, images)

    def step(number: int) -> object:
        judge = partial(guard.judge, step=number)
        result = train_step(
            strategy,
            [batch],
            objective=objective,
            judge=judge,
            scale=guard.scale,
            precision=recipe.training.precision,
            seed=recipe.seed,
            step=number,
            logged=False,
        )
        guard.reports(wait=False)
        return result

    return model, step


def _plain(recipe: Recipe, images: int, device: torch.device) -> tuple[VAE, Callable[[int], object]]:
    """What a script of one's own does: torch's random numbers, autocast, clipping, AdamW as it comes, averaged weights."""
    model = build_model(recipe).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr)
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    batch, clip = _batch(model, images), recipe.optimizer.clip_norm or float("inf")

    def draw(stream: noise.Stream, numbers: Mapping[int, int]) -> Iterator[Tensor]:
        return (torch.randn(len(stream.slots), count, device=device) for count in numbers.values())

    def step(number: int) -> object:
        x, slots, mask = (t.to(device, non_blocking=True) for t in (batch.images, batch.slots, batch.mask))
        with mock.patch.object(noise, "normals", draw):
            terms = model(
                x, noise.Stream(0, number, slots), mask, 0, False, AUTOCAST[recipe.training.precision], False
            )
        loss = (terms.kl.sum(1) - terms.log_px).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in model.parameters()], 0.001)
        model.likelihood.end_step()
        return loss

    return model, step


def _kernels(
    step: Callable[[int], object], device: torch.device
) -> tuple[int, float, list[tuple[str, int, float]]]:
    """Kernels of a step: their number, their seconds together, and those that take longest (name, number, seconds)."""
    if device.type != "cuda":
        return 0, 0.0, []
    steps = 2
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for number in range(steps):
            step(1000 + number)
        _wait(device)
    rows = [
        (event.key, event.count / steps, event.self_device_time_total / 1e6 / steps)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]
    rows.sort(key=lambda row: -row[2])
    top = [(name[:110], round(count), seconds) for name, count, seconds in rows[:25]]
    return round(sum(row[1] for row in rows)), sum(row[2] for row in rows), top


@contextmanager
def _fresh(device: torch.device) -> Iterator[None]:
    """Begin and end with an empty card."""
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
    finally:
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def as_json(measured: Measured) -> dict[str, Any]:
    """The numbers of a variant for a file."""
    return measured._asdict()
