"""Training steps on a CPU: this build beside torch's operations alone and beside other projects' own trainers.

    python -m tools.bench.cpu recipes/celeba64/conv.yaml --images 100
    python -m tools.bench.cpu recipes/celeba64/optimal.yaml --images 32 --pythae ENVIRONMENT/bin/python
    python -m tools.bench.cpu recipes/cifar10/ladder_bounded.yaml --images 8 --vdvae CLONE --set network.width=64

Random images; each row is a process of its own, in turn, several rounds; medians of steps, and the ratio of the medians of each
round. Run it on a machine that does nothing else. pythae: its CelebA network, model and trainer as they come, from an environment
of its own, against the same layers here. CLONE: https://github.com/openai/vdvae, with the recipe's stages and widths, its modules and
its training step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "cpu_steps.py"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, required=True, help="of a step")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="*", default=[], help="recipe keys to override")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round; default: 8")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--pythae", metavar="PYTHON", help="interpreter of an environment with pythae")
    parser.add_argument("--vdvae", metavar="CLONE", help="folder of the authors' code")
    arguments = parser.parse_args()
    rows = {
        "torch's operations": ("recipe", {"VAESCALE_NATIVE": "0", "VAESCALE_BENCH_PLAIN": "1"}, "bf16"),
        "this build": ("recipe", {}, "bf16"),
        "this build, fp32": ("recipe", {}, "fp32"),
    }
    if arguments.pythae:
        rows["pythae, fp32"] = ("pythae", {}, "fp32")
    if arguments.vdvae:
        rows["the VDVAE authors' code, fp32"] = ("vdvae", {}, "fp32")
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, (kind, variables, precision) in rows.items():
            found[name].append(_seconds(arguments, kind, variables, precision))
    first = found[next(iter(rows))]
    for name, seconds in found.items():
        ratio = statistics.median(one / other for one, other in zip(first, seconds, strict=True))
        rate = arguments.images / statistics.median(seconds)
        spread = ", ".join(f"{1e3 * value:.0f}" for value in seconds)
        sys.stdout.write(f"  {name:32s}{rate:9.1f} images/s  {ratio:6.2f}   ({spread} ms a step)\n")


def _seconds(arguments: argparse.Namespace, kind: str, variables: dict[str, str], precision: str) -> float:
    """The median time of a step, measured in a new process."""
    interpreter = arguments.pythae if kind == "pythae" else sys.executable
    job = {
        "kind": kind,
        "recipe": str(arguments.recipe),
        "options": [*arguments.set, f"training.precision={precision}"],
        "images": arguments.images,
        "steps": arguments.steps,
        "vdvae": arguments.vdvae,
        "twin": bool(arguments.pythae),
    }
    path = "" if kind == "pythae" else str(ROOT)
    done = subprocess.run(
        [interpreter, str(HERE), json.dumps(job)],
        env={**os.environ, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{kind}: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
