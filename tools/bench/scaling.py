"""Scaling of a data-parallel training step: measured on two processes, and projected to many devices.

    python -m tools.bench.scaling recipes/cifar10/ladder_bounded.yaml --images 16 network.width=64
    python -m tools.bench.scaling recipes/mnist/conv.yaml --images 128 --link 200
    python -m tools.bench.scaling --project

Without --project, measures three cases in turn, in the same two processes with one thread each: one process steps while the other
waits; both step without communication (they share the machine); both take a training step (they exchange gradients, sigma and
metrics). Prints the efficiency, and what `projection.py` says from the second case and the measured times of an all-reduce.
--link MBIT puts the processes into two network namespaces with a cable of this speed between them (as root, on Linux).

--project prints, for each recipe in recipes/, how long a step must take so that the exchange costs at most 5% on 8, 64 and 512
devices, from the exchanges counted in such a step and from the links of a cluster (--inside, --between, --latency).

Uses random images, so no data is needed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tools.bench.projection import (
    SHARE,
    Cluster,
    Compute,
    Exchanges,
    Link,
    all_reduce_seconds,
    least_step,
    step_seconds,
)
from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.recipe import load_recipe
from vaescale.system.host import keep_freed_pages
from vaescale.trained import build_model
from vaescale.training import launch as backends
from vaescale.training.averages import averages_of
from vaescale.training.guard import Guard
from vaescale.training.optimizer import build_optimizer
from vaescale.training.step import AUTOCAST, train_step
from vaescale.training.strategies import strategy_class

MODULE = ("-m", "tools.bench.scaling")
STEPS = 5
SIZES = (8, 1 << 22)  # bytes of the all-reduces that are timed
TRIED = 20  # all-reduces of each size
RECIPES = Path(__file__).parents[2] / "recipes"
PROJECTED = (
    *("mnist/conv", "mnist/ladder", "fashion_mnist/optimal", "cifar10/conv", "cifar10/ladder_bounded"),
    *(
        "celeba64/conv",
        "celeba64/optimal",
        "imagenet32/ladder_bounded",
        "imagenet64/ladder_bounded",
        "ffhq256/ladder_bounded",
    ),
)
NARROW = {"ladder": ["network.width=16"]}  # by kind of network; others are small enough
FIRST_BUCKET = 1 << 20  # bytes, and
MEBIBYTES_OF_A_BUCKET = 25  # torch's default, which the strategies keep
DEVICES = (8, 64, 512)
ADDRESSES, PORT = ("10.78.0.1", "10.78.0.2"), 29517


def main() -> None:
    """Start two processes, or run as one of them, or project."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?")
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
    parser.add_argument("--link", type=float, metavar="MBIT", help="a cable of so many Mbit/s; default: none")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--project", action="store_true", help="project every recipe to many devices")
    add = parser.add_argument_group("the cluster of --project").add_argument
    add("--per-node", type=int, default=8, help="devices in a node; default: 8")
    add("--inside", type=float, default=360, metavar="GB/S", help="of a device in its node; default: 360")
    add("--between", type=float, default=40, metavar="GB/S", help="of a device between nodes; default: 40")
    add("--latency", type=float, default=20, metavar="US", help="of one message; default: 20")
    arguments = parser.parse_intermixed_args()
    if arguments.project:
        project(arguments)
    elif arguments.count:
        count(arguments)
    elif arguments.recipe is None:
        parser.error("a RECIPE, or --project")
    elif "WORLD_SIZE" in os.environ:
        measure(arguments)
    elif arguments.link:
        with cable(arguments.link) as spaces:
            start_apart(spaces)
    else:
        config = Path("recipes/backends") / f"{arguments.backend}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        subprocess.run([*launcher, "--num_processes", "2", *MODULE, *sys.argv[1:]], check=True)


@contextmanager
def cable(megabits: float) -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, and their names."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    spaces = [f"scaling{os.getpid() % 10000}{end}" for end in "ab"]
    devices = [f"sc{os.getpid() % 10000}{end}" for end in "xy"]
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for space, device, address in zip(spaces, devices, ADDRESSES, strict=True):
            ip("link", "set", device, "netns", space)
            ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            for each in (device, "lo"):
                ip("-n", space, "link", "set", each, "up")
            shape = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms"]
            shaper = ["tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *shape]
            subprocess.run(shaper, check=True)
        yield [f"{space} {device}" for space, device in zip(spaces, devices, strict=True)]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)


def start_apart(spaces: list[str]) -> None:
    """Run this script in both namespaces, as the two ranks."""
    ranks = []
    for rank, (space, device) in enumerate(each.split() for each in spaces):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": device,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        command = ["ip", "netns", "exec", space, sys.executable, *MODULE, *sys.argv[1:]]
        ranks.append(subprocess.Popen(command, env={**os.environ, **variables}))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a rank failed")


class Setting(NamedTuple):
    """What the cases need: steps of one process alone, and of all together. backward: seconds of the former's backward pass."""

    alone: Callable[[], None]
    together: Callable[[], None]
    backward: Callable[[], float]
    parameters: int
    layout: str


def build(arguments: argparse.Namespace) -> Setting:
    """A plain step and a training step of a recipe on random images."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    launch = backends.start()
    device, count = launch.accelerator.device, arguments.images
    # A fixed sigma has no all-reduce, so the step without communication has none at all.
    fixed = ["likelihood.sigma=0.1"] if hasattr(recipe.likelihood, "sigma") else []
    plain = build_model(load_recipe(arguments.recipe, [*arguments.overrides, *fixed])).to(device).train()
    objective, optimizer = recipe.objective.implement(plain), build_optimizer(plain, recipe.optimizer)
    model = build_model(recipe).to(device)
    strategy = strategy_class(launch.strategy)(
        launch.accelerator,
        model,
        partial(build_optimizer, config=recipe.optimizer),
        averages=averages_of(recipe.training),
    )
    strategy.wrapped.train()
    own_objective = recipe.objective.implement(model)
    guard = Guard(max_non_finite=10, device=device)
    images = torch.randint(0, 256, (count, *model.image_shape), dtype=torch.uint8)
    slots = torch.arange(count) + count * comm.rank()
    mask = torch.ones(count, dtype=torch.bool)
    batch, steps = Batch(images, torch.zeros(count), slots, mask), iter(range(1 << 30))
    last_backward = 0.0

    def alone() -> None:
        nonlocal last_backward
        stream = noise.Stream(0, 0, slots.to(device))
        terms = plain(
            images.to(device), stream, mask.to(device), 0, False, AUTOCAST[recipe.training.precision]
        )
        loss: Tensor = objective(terms, stream)[0]
        start = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        last_backward = time.perf_counter() - start
        torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    def together() -> None:
        step = next(steps)
        comm.at_step(step)
        train_step(
            strategy,
            [batch],
            objective=own_objective,
            judge=partial(guard.judge, step=step),
            precision=recipe.training.precision,
            seed=0,
            step=step,
        )

    parameters = sum(parameter.numel() for parameter in plain.parameters())
    return Setting(alone, together, lambda: last_backward, parameters, backends.layout(launch.strategy))


def measure(arguments: argparse.Namespace) -> None:
    """Measure all three cases in turn; the first process prints."""
    keep_freed_pages()  # as every verb does
    torch.set_num_threads(1)
    setting = build(arguments)

    def seconds(work: Callable[[], None], *, both: bool) -> float:
        comm.gather_object(0)
        start = time.perf_counter()
        for _ in range(STEPS if both or comm.is_main() else 0):
            work()
        return max(comm.gather_object(time.perf_counter() - start)) / STEPS

    cases: dict[str, Callable[[], float]] = {
        "one process": lambda: seconds(setting.alone, both=False),
        "two that exchange nothing": lambda: seconds(setting.alone, both=True),
        "two that train together": lambda: seconds(setting.together, both=True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    backwards: list[float] = []
    for number in range(-1, arguments.rounds):
        for name, case in cases.items():
            seconds_of_step = case()
            if number >= 0:
                times[name].append(seconds_of_step)
                backwards += [setting.backward()] if name == "two that exchange nothing" else []
    exchanges, link = exchanges_of(setting.together), measured_link()
    if comm.is_main():
        show(times, setting, arguments.images)
        compute = Compute(statistics.median(times["two that exchange nothing"]), statistics.median(backwards))
        show_projection(compute, exchanges, link, statistics.median(times["two that train together"]))
    comm.gather_object(0)
    os._exit(0)


def exchanges_of(step: Callable[[], None]) -> Exchanges:
    """What a step exchanges, as torch's profiler sees it."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    sums = [
        event for event in recorded.events() or () if event.name in ("gloo:all_reduce", "nccl:all_reduce")
    ]
    elements = [sum(torch.Size(shape).numel() for shape in event.input_shapes) for event in sums]
    return Exchanges.of(elements)


def measured_link() -> Link:
    """Latency and speed between two processes, from the times of a small and a large all-reduce."""
    medians = []
    for size in SIZES:
        values, times = torch.ones(size // 4), []
        for _ in range(TRIED):
            start = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    # Two devices send each value once and receive it once, in two steps of a message each.
    return Link(medians[0] / 2, (SIZES[1] - SIZES[0]) / (medians[1] - medians[0]))


def show(times: dict[str, list[float]], setting: Setting, images: int) -> None:
    """Print the seconds per step, and the throughput as a share of twice that of one process."""
    one, apart, together = times.values()
    lines = [
        f"{setting.layout}, {setting.parameters / 1e6:.1f}M parameters, {images} images a process and step"
    ]
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


def show_projection(compute: Compute, exchanges: Exchanges, link: Link, measured: float) -> None:
    """Print what the model says of the measured step."""
    cluster = Cluster(1, link, link)
    projected = step_seconds(compute, exchanges, 2, cluster)
    sizes = sum(exchanges.buckets)
    sys.stdout.write(
        f"  link: {link.latency * 1e6:.0f} us a message, {link.speed / 1e6:.0f} MB/s; exchanged: {sizes / 1e6:.2f} MB of gradients in "
        f"{len(exchanges.buckets)} buckets ({1e3 * sum(all_reduce_seconds(each, 2, cluster) for each in exchanges.buckets):.1f} ms), "
        f"{exchanges.small} small sums\n"
        f"  projected {projected:.3f} s a step, measured {measured:.3f}: {projected / measured:.2f}\n"
    )
    sys.stdout.flush()


def project(arguments: argparse.Namespace) -> None:
    """Print the shortest steps of every recipe whose exchange costs at most 5%."""
    link = partial(Link, arguments.latency / 1e6)
    cluster = Cluster(arguments.per_node, link(arguments.inside * 1e9), link(arguments.between * 1e9))
    sys.stdout.write(
        f"{arguments.per_node} devices a node, {arguments.inside:.0f} GB/s in it, {arguments.between:.0f} GB/s between nodes, "
        f"{arguments.latency:.0f} us a message; ms of a step from which {SHARE:.0%} of its speed remain, and of the exchange alone\n"
        f"{'recipe':27s}{'gradients':>12s}{'sums':>6s}"
        + "".join(f"{number:>18d}" for number in DEVICES)
        + "\n"
    )
    small = small_sums()
    for name in PROJECTED:
        exchanges = Exchanges(buckets_of(name), small[name])
        row = [f"{name:27s}{sum(exchanges.buckets) / 1e6:>9.1f} MB{exchanges.small:>6d}"]
        for number in DEVICES:
            whole = sum(all_reduce_seconds(each, number, cluster) for each in exchanges.buckets)
            whole += exchanges.small * all_reduce_seconds(8, number, cluster)
            row.append(f"{1e3 * least_step(exchanges, number, cluster):>9.1f} ({1e3 * whole:5.1f})")
        sys.stdout.write("".join(row) + "\n")
        sys.stdout.flush()


def buckets_of(name: str) -> tuple[int, ...]:
    """The bytes of the buckets in which DDP exchanges a recipe's gradients, the last layers first."""
    weights: list[Any] = [*build_model(load_recipe(RECIPES / f"{name}.yaml")).parameters()][::-1]
    limits = [FIRST_BUCKET, MEBIBYTES_OF_A_BUCKET << 20]
    grouped, _ = dist._compute_bucket_assignment_by_size(weights, limits)  # type: ignore[attr-defined]
    return tuple(sum(weights[number].numel() * 4 for number in group) for group in grouped)


def small_sums() -> dict[str, int]:
    """The number of small sums in a step of each recipe, counted in a step of two processes with narrow networks."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    config = str(RECIPES / "backends" / "cpu2.yaml")
    command = [*launcher, config, "--num_processes", "2", *MODULE, "--count"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def count(arguments: argparse.Namespace) -> None:
    """Print the number of small sums in a step of each recipe as JSON."""
    found = {}
    for name in PROJECTED:
        arguments.recipe, arguments.images = RECIPES / f"{name}.yaml", 1
        kind = load_recipe(arguments.recipe).network.kind
        arguments.overrides = NARROW.get(kind, [])
        found[name] = exchanges_of(build(arguments).together).small
    if comm.is_main():
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    comm.gather_object(0)
    os._exit(0)


if __name__ == "__main__":
    main()
