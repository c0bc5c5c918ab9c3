"""Training steps of SVG on a CPU: vaescale's step, with one call over time, beside a plain eager loop over time of the same network.

    python -m tools.bench.sequences
    python -m tools.bench.sequences recipes/moving_mnist/optimal.yaml --set data.global_batch=8 --rounds 9

Forward pass, backward pass, clipping, AdamW and averaged weights, bf16, random sequences, one process. The loop (`svg_loop.py`) has torch's own
layers, calls frame encoder, LSTM cells and frame decoder once for each step of time, and begins with the same weights. One row encodes each
frame once, the other twice, as the published code does. Before anything is timed, losses and gradients of both are compared in
float32 with the same noise. Then steps are timed in turn; medians, and the median of each round's ratio. Run it on a machine that does nothing else.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tools.bench.svg_loop import PlainSvg, by_cell
from vaescale import noise
from vaescale.commands.parts import build_guard, lay_out
from vaescale.data.batch import Batch
from vaescale.models.vae import VAE
from vaescale.networks.config import SvgConfig
from vaescale.recipe import Recipe, load_recipe
from vaescale.system.host import keep_freed_pages
from vaescale.trained import build_model
from vaescale.training import launch as backends
from vaescale.training.step import AUTOCAST, train_step

RECIPE = Path(__file__).parents[2] / "recipes" / "moving_mnist" / "optimal.yaml"
OURS, ONCE, TWICE = "vaescale", "loop, each frame encoded once", "loop, each frame encoded twice"
CLOSE = 1e-4  # of losses, and of gradients as a whole
WARM_UP = 2
Step = Callable[[int], object]


def main() -> None:
    """Compare losses, then time steps in turn and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="*", default=[], help="recipe keys to override")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument(
        "--profile", choices=(OURS, "loop"), help="print the operations of a step in place of times"
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, [*arguments.set, "run_dir=none"])
    keep_freed_pages()
    compare(recipe)
    batch = random_batch(recipe)
    steps: dict[str, Step] = {OURS: ours(recipe, batch)}
    steps |= {name: loop(recipe, batch, again=name == TWICE) for name in (ONCE, TWICE)}
    if arguments.profile:
        operations(steps[OURS if arguments.profile == OURS else ONCE])
        return
    times = timed(steps, steps_of_a_round=arguments.steps, rounds=arguments.rounds)
    frames = recipe.data.global_batch * model_config(recipe).frames
    precision, threads = recipe.training.precision, torch.get_num_threads()
    sys.stdout.write(
        f"{recipe.name}: {recipe.data.global_batch} sequences of {recipe.data.frames} frames a step, {precision}, {threads} threads\n"
    )
    for name, seconds in times.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, times[OURS], strict=True))
        middle, spread = statistics.median(seconds), ", ".join(f"{1e3 * value:.0f}" for value in seconds)
        sys.stdout.write(f"  {name:32s}{frames / middle:9.0f} frames/s {ratio:6.2f}   ({spread} ms a step)\n")


def timed(steps: dict[str, Step], *, steps_of_a_round: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each kind, one number for each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    number = 0
    for round_ in range(-1, rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(steps_of_a_round if round_ >= 0 else WARM_UP):
                step(number)
                number += 1
            if round_ >= 0:
                times[name].append((time.perf_counter() - begin) / steps_of_a_round)
    return times


def compare(recipe: Recipe) -> None:
    """End the program where loss or gradients of both differ, in float32 and with the same noise."""
    model, plain = networks(recipe)
    batch, config = random_batch(recipe), model_config(recipe)
    stream = noise.Stream(recipe.seed, 0, batch.slots)
    terms = model(batch.images, stream, batch.mask)
    loss = (terms.kl.sum(1) - terms.log_px).mean()
    loss.backward()
    (values,) = noise.normals(stream, {noise.POSTERIOR: (config.frames - 1) * config.latent_dim})
    epsilon = values.view(len(values), config.frames - 1, config.latent_dim).transpose(1, 2)
    for again in (False, True):
        plain.zero_grad()
        other = plain(batch.images.float() / 255, epsilon, again=again)
        other.backward()
        gradient, other_gradient = _gradient(model.network), _gradient(plain)
        loss, other = loss.detach(), other.detach()
        parts = [float((other - loss) / loss)]
        parts.append(float((gradient - other_gradient).norm() / gradient.norm()))
        what = f"loss {float(loss):.3f} and {float(other):.3f} nats, relative difference {parts[0]:.1e}, of the gradients {parts[1]:.1e}"
        if not max(map(abs, parts)) < CLOSE:
            sys.exit(f"both networks are not the same: {what}")
        sys.stdout.write(f"the same network: {what}\n")


def networks(recipe: Recipe) -> tuple[VAE, PlainSvg]:
    """vaescale's model and the loop, with the same weights, in training mode."""
    model = build_model(recipe)
    side, channels = recipe.data.sides[0], recipe.data.channels
    plain = PlainSvg(model.network, model_config(recipe), side=side, channels=channels)
    return model.train(), plain.train()


def model_config(recipe: Recipe) -> SvgConfig:
    """The recipe's network. Ends the program for one that the loop does not have."""
    network = recipe.network
    if not isinstance(network, SvgConfig) or (network.backbone, network.norm, network.prior) != (
        "dcgan",
        "group",
        "learned",
    ):
        sys.exit("the loop has a learned prior, the backbone dcgan and norm group alone")
    return network


def ours(recipe: Recipe, batch: Batch) -> Step:
    """vaescale's step, as `vaescale train` builds it."""
    launch = backends.start(processes=1)
    model = networks(recipe)[0]
    guard, objective = build_guard(recipe, torch.device("cpu")), recipe.objective.implement(model)
    strategy = lay_out(recipe, launch, model, objective)
    strategy.wrapped.train()

    def step(number: int) -> object:
        result = train_step(
            strategy,
            [batch],
            objective=objective,
            judge=partial(guard.judge, step=number),
            scale=guard.scale,
            precision=recipe.training.precision,
            seed=recipe.seed,
            step=number,
            logged=False,
        )
        guard.reports(wait=False)
        return result

    return step


def loop(recipe: Recipe, batch: Batch, *, again: bool) -> Step:
    """What a script of one's own does: torch's random numbers, autocast, clipping, AdamW as it comes, averaged weights."""
    plain, config = networks(recipe)[1], model_config(recipe)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.optimizer.lr)
    averages = [parameter.detach().clone() for parameter in plain.parameters()]
    clip, dtype = recipe.optimizer.clip_norm or float("inf"), AUTOCAST[recipe.training.precision]

    def step(_: int) -> object:
        x = batch.images.float() / 255
        epsilon = torch.randn(len(x), config.latent_dim, config.frames - 1)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = plain(x, epsilon, again=again)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in plain.parameters()], 0.01)
        return loss

    return step


def operations(step: Step) -> None:
    """Print torch's operations of a step, those that take longest first, with their shapes."""
    for number in range(WARM_UP):
        step(number)
    with torch.profiler.profile(record_shapes=True) as profiler:
        step(WARM_UP)
    events = profiler.key_averages(group_by_input_shape=True)
    sys.stdout.write(
        events.table(sort_by="self_cpu_time_total", row_limit=45, max_shapes_column_width=70) + "\n"
    )
    sys.stdout.write(f"{sum(event.count for event in events)} operations\n")


def random_batch(recipe: Recipe) -> Batch:
    """Random sequences of the recipe's size."""
    images, frames = recipe.data.global_batch, model_config(recipe).frames
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (images, frames, recipe.data.channels, *recipe.data.sides)
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels, slots = torch.full((images,), -1), torch.arange(images)
    return Batch(values, labels, slots, torch.ones(images, dtype=torch.bool))


def _gradient(network: torch.nn.Module) -> Tensor:
    """The gradient of all parameters, in the order of the loop's names."""
    named = by_cell(dict(network.named_parameters()))
    return torch.cat([one.grad.flatten() for _, one in sorted(named.items()) if one.grad is not None])


if __name__ == "__main__":
    main()
