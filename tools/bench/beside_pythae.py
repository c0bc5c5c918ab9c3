"""Beside pythae's VAE, VQ-VAE, VAE-GAN and AAE with its own MNIST networks: the time of a step, and losses of the same weights and images.

    python -m tools.bench.beside_pythae ENVIRONMENT/bin/python --images 64

ENVIRONMENT is one of its own with pythae, as it comes from PyPI, and safetensors. Its models and trainers run there as they are, in
float32; the twins here have the same layers. First both compute one forward pass of the same weights, images and draws, whose losses stand
beside each other; then steps are timed, each row in a process of its own, in turn, several rounds: medians, and the median over
rounds of pythae's time over ours. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = ("vae", "vq_vae", "vae_gan", "aae")


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="interpreter of an environment with pythae")
    parser.add_argument("--images", type=int, default=64, help="of a step; default: 64, pythae's")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a round; default: 12")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", choices=KINDS, help="one kind")
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else KINDS
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            _print_losses(arguments, kind, Path(folder))
    for kind in kinds:
        _print_times(arguments, kind)


def _print_losses(arguments: argparse.Namespace, kind: str, folder: Path) -> None:
    """One forward pass on both sides, from the weights, images and draws that pythae's side writes."""
    job = {"kind": kind, "images": arguments.images, "folder": str(folder)}
    theirs = _run(arguments, "pythae", job)
    ours = _run(arguments, "fp32", job)
    sys.stdout.write(f"{kind}, losses of the same weights, images and draws (nats per image, float32)\n")
    for name, value in theirs.items():
        own = ours.get(name)
        difference = "" if own is None else f"{own:14.5f}{abs(own - value) / abs(value):12.1e}"
        sys.stdout.write(f"  {name:44s}{value:14.5f}{difference}\n")
    for name in ours.keys() - theirs.keys():
        sys.stdout.write(f"  {name:44s}{'':14s}{ours[name]:14.5f}\n")


def _print_times(arguments: argparse.Namespace, kind: str) -> None:
    job = {"kind": kind, "images": arguments.images, "steps": arguments.steps}
    rows = ("pythae", "fp32", "bf16")
    found: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(arguments.rounds):
        for row in rows:
            found[row].append(_run(arguments, row, job)["seconds"])
    sys.stdout.write(f"{kind}, a step of {arguments.images} images\n")
    for row, seconds in found.items():
        ratio = statistics.median(one / own for one, own in zip(found["pythae"], seconds, strict=True))
        spread = ", ".join(f"{1e3 * value:.1f}" for value in seconds)
        name = "pythae, fp32" if row == "pythae" else f"this build, {row}"
        sys.stdout.write(f"  {name:32s}{ratio:6.2f}   ({spread} ms)\n")


def _run(arguments: argparse.Namespace, row: str, job: dict[str, object]) -> dict[str, float]:
    """What one side prints as its last line."""
    is_pythae = row == "pythae"
    interpreter = arguments.python if is_pythae else sys.executable
    file = Path(__file__).with_name("pythae_peer.py" if is_pythae else "pythae_twin.py")
    done = subprocess.run(
        [interpreter, str(file), json.dumps({**job, "precision": row})],
        env={**os.environ, "PYTHONPATH": "" if is_pythae else str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{row}: {done.stderr.strip()}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


if __name__ == "__main__":
    main()
