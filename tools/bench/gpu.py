"""vaescale on one GPU: the tests that need one, then speed and memory, in one command.

    make gpu
    python -m tools.bench.gpu --out FOLDER         on a node without this folder's .venv

Prints one table last, and writes gpu.json and the slowest kernels beside. Trains on random images; needs no data.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tools.bench import gpu_others as others
from tools.bench import gpu_training as training
from vaescale.training.utilization import peak_rate

TEST_SECONDS = 300


def main() -> None:
    """Run the tests, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the files; default: gpu")
    parser.add_argument("--only", default="", metavar="WORDS", help="measure only cases with these words")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(training.VARIANTS),
        help="variants to measure; default: those of each case. `compile` takes minutes",
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--seconds", type=float, default=420, help="begin no case after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this bench needs a GPU, and torch finds none")
    begin = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"machine": machine(device)}
    say(json.dumps(results["machine"]))
    failed = [] if arguments.no_tests else run_tests(arguments.out)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in training.CASES.items():
            if arguments.only not in name or time.monotonic() - begin > arguments.seconds:
                continue
            variants = arguments.variants or list(case.variants)
            try:
                for variant, measured in training.measure(case, variants, Path(folder), device):
                    results.setdefault(name, {})[variant] = training.as_json(measured)
                    lines.append(row(name, variant, measured, results))
                    say(lines[-1])
                    (arguments.out / "gpu.json").write_text(json.dumps(results, indent=1))
            except Exception:
                failed.append(name)
                say(traceback.format_exc())
    if not arguments.only:
        try:
            lines += measure_others(results, device)
        except Exception:
            failed.append("what is not training")
            say(traceback.format_exc())
    (arguments.out / "gpu.json").write_text(json.dumps(results, indent=1))
    say("\n".join([HEAD, *lines]))
    if failed:
        say(f"failed: {', '.join(failed)}")
        sys.exit(1)


HEAD = (
    f"{'network':20s}{'variant':24s}{'img/s':>9s}{'ms/step':>9s}{'spread':>8s}{'MFU':>7s}{'of peak':>9s}{'kernels':>9s}{'busy':>7s}"
    f"{'GiB':>7s}{'estimate':>9s}{'first s':>9s}"
)


def row(name: str, variant: str, measured: training.Measured, results: dict[str, Any]) -> str:
    """One line of the table. MFU: share of the datasheet's rate; of peak: share of the measured one."""
    rate = measured.flops / measured.seconds
    machine = results["machine"]
    return (
        f"{name:20s}{variant:24s}{measured.images / measured.seconds:9.0f}{1e3 * measured.seconds:9.2f}{measured.spread:8.1%}"
        f"{rate / machine['datasheet_flops']:7.1%}{rate / machine['measured_flops']:9.1%}{measured.launches:9d}"
        f"{measured.busy:7.0%}{measured.peak_bytes / 2**30:7.2f}{measured.estimated_bytes / 2**30:9.2f}{measured.start_seconds:9.1f}"
    )


def measure_others(results: dict[str, Any], device: torch.device) -> list[str]:
    """Measure what is not training: lines of the table."""
    fitted = results["mixture"] = others.mixture(device)
    found = results["features"] = others.features(device)
    peer = results["diffusers"] = others.autoencoder_kl(device)
    lines = [
        f"mixture of {others.COMPONENTS} components, {others.LATENTS:,} x {others.SIZE} latents, full: {fitted['iterations']:.0f} iterations in {fitted['seconds']:.2f} s, "
        f"{fitted['nats_before']:.3f} to {fitted['nats_after']:.3f} nats",
        f"features of 64x64x3 images: {found['images_per_second']:.0f} images/s; moments and Frechet distance of "
        f"{found['features']:.0f} features: {found['distance_seconds']:.2f} s",
    ]
    if peer:
        lines.append(
            f"diffusers' AutoencoderKL, f8 at 256, 16 images, plain bf16 loop: {1e3 * peer:.1f} ms a step"
        )
    return lines


def machine(device: torch.device) -> dict[str, Any]:
    """The card, the versions, and its measured rates of copies and of bf16 products."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    sheet = peak_rate(device, "bf16")
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _seconds(lambda: a @ b, device)
    source = torch.randn(1 << (30 if device.type == "cuda" else 20), device=device)
    copied = _seconds(source.clone, device)
    measured = 2 * size**3 / seconds
    return {
        "device": name,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "measured_flops": measured,
        "datasheet_flops": sheet or measured,
        "copy_bytes_per_second": 2 * source.numel() * 4 / copied,
    }


def _seconds(function: Any, device: torch.device, times: int = 10) -> float:
    for _ in range(3):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def run_tests(folder: Path) -> list[str]:
    """Run the tests marked gpu, whose output goes to a file too."""
    spread = ["-n", "4", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    plugins = ["-p", "no:benchmark", "-p", "no:cacheprovider"]  # the first warns beside xdist
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", *spread, *plugins, "tests"]
    path = folder / "tests.log"
    with path.open("w") as log:  # a file, so that what a stopped run wrote stays
        try:
            code = subprocess.run(
                command, stdout=log, stderr=log, timeout=TEST_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 1
            say(f"the tests took more than {TEST_SECONDS} s and were stopped")
    say("\n".join(path.read_text().splitlines()[-40:]))
    return ["tests"] if code else []


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
