"""Cost of a mixture compared with scikit-learn: one iteration from the same start, a whole fit, memory of the online mode.

    vaescale encode RUN && python tools/bench/gmm.py RUN                    the latents of a run's training images
    python tools/bench/gmm.py RUN --whole                                   also whole fits, which take minutes

Full covariances, one draw of each image. Rounds are interleaved. The time of an iteration is a fifth of the difference between
fits of six and of one iterations, which excludes the preparation. Both libraries start from the same mixture and take the same
number of steps; the output has the ratios of times and the held-out densities.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture

from vaescale.aggregate.latents import Drawing, ShardLatents
from vaescale.data.index import ShardIndex, ShardTable
from vaescale.data.latent_shards import open_latents
from vaescale.mixtures import em
from vaescale.mixtures.gaussian import Mixture, from_scikit_learn
from vaescale.mixtures.points import Points
from vaescale.mixtures.selection import mean_log_density
from vaescale.mixtures.starts import start
from vaescale.mixtures.stepwise import fit_stepwise

MANY, FEW = 6, 1
STEPS = 20  # after which densities are compared


def main() -> None:
    """Print the measurements for each number of components."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="a run whose latents are encoded, or a folder with train and val"
    )
    parser.add_argument(
        "--components", type=int, nargs="+", default=[10, 50, 100], metavar="K", help="numbers of components"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; default: 3")
    parser.add_argument(
        "--whole", action="store_true", help="also measure whole fits, to a tolerance of 1e-3 nats"
    )
    parser.add_argument(
        "--memory-of", type=int, help=argparse.SUPPRESS
    )  # number of shards of a measuring process
    arguments = parser.parse_args()
    folder = arguments.run / "latents" if (arguments.run / "latents").is_dir() else arguments.run
    train = ShardLatents(open_latents(folder / "train"), Drawing(1, 0))
    if arguments.memory_of:
        _peak(train, arguments.memory_of, arguments.components[0])
        return
    points, val = train.held(), ShardLatents(open_latents(folder / "val"), Drawing(1, 0)).held()
    _say(f"{points.count} x {points.size} latents, full covariance, {torch.get_num_threads()} threads")
    warnings.simplefilter("ignore")  # so few iterations do not converge, on purpose
    for components in arguments.components:
        _iterations(points, val, components, arguments.rounds)
    for components in arguments.components:
        _online(train, points, val, components)
    if arguments.whole:
        for components in arguments.components:
            _whole(points, val, components)
    _memory(arguments, len(train.shards.index.shards))


def _iterations(points: Points, val: Points, components: int, rounds: int) -> None:
    begin = start(points, components, kind="full", how="kmeans", seed=0)
    z = points.z.double().numpy()

    def ours(iterations: int) -> Mixture:
        return em.fit(points, begin, tolerance=-1e9, max_iterations=iterations).mixture

    def theirs(iterations: int) -> Mixture:
        return from_scikit_learn(_scikit_learn(begin, max_iter=iterations, tol=0.0).fit(z))

    times: dict[str, list[float]] = {"vaescale": [], "scikit-learn": []}
    for _ in range(rounds):
        for name, fit in (("vaescale", ours), ("scikit-learn", theirs)):
            times[name].append((_seconds(fit, MANY) - _seconds(fit, FEW)) / (MANY - FEW))
    seconds, reference = (statistics.median(times[name]) for name in ("vaescale", "scikit-learn"))
    densities = [mean_log_density(fit(STEPS), val) for fit in (ours, theirs)]
    _say(
        f"  K={components:<4d} an iteration {seconds:7.3f} s, scikit-learn {reference:7.3f} s: {reference / seconds:5.1f} times    "
        f"held out after {STEPS}: {densities[0]:.4f} and {densities[1]:.4f} nats",
    )


def _online(train: ShardLatents, points: Points, val: Points, components: int) -> None:
    begin = start(points, components, kind="full", how="kmeans", seed=0)
    clock = time.perf_counter()
    whole = em.fit(points, begin).mixture
    seconds, best = time.perf_counter() - clock, mean_log_density(whole, val)
    results = []
    for passes in (1, 2, 4):
        clock = time.perf_counter()
        mixture = fit_stepwise(train, begin, batch=8192, passes=passes, seed=0).mixture
        results.append(
            f"{passes}: {mean_log_density(mixture, val) - best:+.3f} nats in {time.perf_counter() - clock:.1f} s"
        )
    _say(
        f"  K={components:<4d} online against {seconds:.1f} s of full EM, by passes  {'   '.join(results)}",
    )


def _whole(points: Points, val: Points, components: int) -> None:
    def ours() -> tuple[Mixture, int]:
        fit = em.fit(points, start(points, components, kind="full", how="kmeans", seed=0))
        return fit.mixture, len(fit.history)

    def theirs() -> tuple[Mixture, int]:
        model = GaussianMixture(components, tol=1e-3, random_state=0, max_iter=500)
        model.fit(points.z.double().numpy())
        return from_scikit_learn(model), model.n_iter_

    results = []
    for fit in (ours, theirs):
        clock = time.perf_counter()
        mixture, iterations = fit()
        results.append((time.perf_counter() - clock, mean_log_density(mixture, val), iterations))
    (seconds, density, steps), (reference, other_density, other_steps) = results
    _say(
        f"  K={components:<4d} start to end {seconds:7.1f} s, {steps} iterations, {density:.3f} nats; scikit-learn "
        f"{reference:7.1f} s, {other_steps}, {other_density:.3f}: {reference / seconds:5.1f} times",
    )


def _memory(arguments: argparse.Namespace, shards: int) -> None:
    """Print the peak memory of processes with a quarter, a half and all of the shards."""
    command = [sys.executable, __file__, str(arguments.run), "--components", str(arguments.components[0])]
    for number in sorted({max(1, shards // 4), max(1, shards // 2), shards}):
        done = subprocess.run(
            [*command, "--memory-of", str(number)], capture_output=True, text=True, check=True
        )
        _say(f"  {number:4d} shards: {done.stdout.strip()}")


def _peak(train: ShardLatents, number: int, components: int) -> None:
    """Print this process's memory beyond its imports for the first shards, online and then in memory."""
    index, folder = train.shards.index, train.shards.folder
    some = ShardIndex(
        index.place, ShardTable(itertools.islice(index.shards.rows, number)), None, (), index.made
    )
    few = ShardLatents(type(train.shards)(some, folder, train.shards.shape), train.drawing)
    begin = start(few, components, kind="full", how="random", seed=0)
    _peak_since(clear=True)
    before = _peak_since(clear=True)
    fit_stepwise(few, begin, batch=8192, passes=1, seed=0)
    online = _peak_since(clear=True)
    em.fit(few.held(), begin, max_iterations=2)
    whole = _peak_since(clear=False)
    _say(f"{few.count} latents: online {online - before:.0f} MiB, in memory {whole - before:.0f} MiB")


def _peak_since(clear: bool) -> float:
    """The process's peak memory since it was last cleared, in MiB."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    if clear:
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


def _say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def _scikit_learn(begin: Mixture, **options: float) -> GaussianMixture:
    return GaussianMixture(
        len(begin.weights),
        weights_init=begin.weights.numpy(),
        means_init=begin.means.numpy(),
        precisions_init=torch.linalg.inv(begin.covariances).numpy(),
        **options,
    )


def _seconds(function: Callable[[int], Mixture], argument: int) -> float:
    clock = time.perf_counter()
    function(argument)
    return time.perf_counter() - clock


if __name__ == "__main__":
    main()
