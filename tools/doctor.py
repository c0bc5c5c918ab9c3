"""Print versions, devices, how processes were launched, and what is missing.

Run it the way you run training, for example under `accelerate launch --config_file recipes/backends/cpu2.yaml`, to
see what training would see.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

NEEDED = (
    *(
        "torch",
        "accelerate",
        "webdataset",
        "datasets",
        "mlflow",
        "einops",
        "numpy",
        "scikit-learn",
        "matplotlib",
    ),
    *("pydantic", "omegaconf", "pyyaml", "safetensors", "pillow", "simplejpeg", "fsspec", "filelock", "rich"),
)
OPTIONAL = {"deepspeed": "DeepSpeed ZeRO", "transformers": "accelerate's DeepSpeed path"}
PROGRAMS = {"g++": "DeepSpeed's operators", "git": "the git revision of runs"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:  # noqa: ARG001
    """Look around. Returns versions, devices, launch and missing parts."""
    import vaescale
    from vaescale.cores import cores

    versions = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    gpus, bf16 = _gpus() if versions["torch"] else ([], False)
    missing = [f"{name}: pip install -c constraints.txt {name}" for name in NEEDED if versions[name] is None]
    missing += [f"{name} (for {use}): optional" for name, use in OPTIONAL.items() if versions[name] is None]
    missing += [
        f"{name} (for {use}): optional" for name, use in PROGRAMS.items() if shutil.which(name) is None
    ]
    return {
        "vaescale": vaescale.__version__,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cores": cores(),
        "gpus": gpus,
        "bf16": bf16,
        "launch": _launch(),
        "missing": missing,
    }


def show(result: dict[str, Any]) -> None:
    """A table; lists in one line each."""
    from vaescale.console import table

    def words(name: str, value: Any) -> str:
        if isinstance(value, list):
            return "; ".join(value) or ("none: training runs on the CPU" if name == "gpus" else "nothing")
        return "not installed" if value is None else str(value)

    table("vaescale doctor", [(name, words(name, value)) for name, value in result.items()])


def _gpus() -> tuple[list[str], bool]:
    """The GPUs' names, and whether the device that training takes computes in bf16."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return names, torch.cuda.is_bf16_supported() if names else True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _launch() -> str:
    """How this process came about, in words."""
    from vaescale.errors import UserError

    try:
        from vaescale.training.backends import refuse_lost_processes

        refuse_lost_processes(os.environ)
    except (UserError, ImportError) as error:
        return str(error)
    if "WORLD_SIZE" in os.environ:
        return f"process {os.environ.get('RANK', '0')} of {os.environ['WORLD_SIZE']}, started by a launcher"
    return "one process"


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
