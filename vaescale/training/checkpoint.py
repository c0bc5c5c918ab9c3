"""Checkpoints that are either whole or absent: safetensors and JSON, listed with their sha256 in a manifest.

    checkpoints/step-000000600/
        model.safetensors       weights and buffers, the sigma state among them
        ema.safetensors         the averaged weights, if there are any
        optimizer.safetensors   NAME/exp_avg, NAME/exp_avg_sq, NAME/step for each parameter NAME
        guard.safetensors       which gradient norm is usual, and how many steps were skipped
        state.json              step, recipe hash, plan hash, world size
        manifest.json           bytes and sha256 of each file above

A folder is written under a temporary name, synced, renamed, and its parent synced; an older one is deleted only
after that. No pickle is ever read.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vaescale.console import say
from vaescale.errors import UserError
from vaescale.files import write_synced

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{9})")


class Checkpoint(NamedTuple):
    """A verified checkpoint folder and its step."""

    folder: Path
    step: int

    def has(self, name: str) -> bool:
        """Whether there is a `NAME.safetensors`: `ema` is there only if weights were averaged."""
        return (self.folder / f"{name}.safetensors").is_file()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `NAME.safetensors`."""
        tensors: dict[str, Tensor] = load_file(self.folder / f"{name}.safetensors")
        return tensors

    def state(self) -> dict[str, Any]:
        """What state.json says."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state


def write(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int
) -> Checkpoint:
    """Write one checkpoint into `folder` and keep the newest `keep`. Call it on the main process only."""
    final = folder / f"step-{step:09d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {
        **{f"{name}.safetensors": save(_on_cpu(group)) for name, group in tensors.items()},
        "state.json": json.dumps({"step": step, **state}, indent=1).encode(),
    }
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    files[MANIFEST] = json.dumps({"version": 1, "files": manifest}, indent=1).encode()
    for name, content in files.items():
        write_synced(temporary / name, content)
    _sync_folder(temporary)
    if final.exists():  # written before this run came back to the same step
        final.rename(folder / f"{final.name}.tmp-old-{os.getpid()}")
    temporary.rename(final)
    _sync_folder(folder)
    _delete_surplus(folder, final, keep)
    return Checkpoint(final, step)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None if there is none at all. Says why it passes over a newer one.

    Raises UserError when there are checkpoints and none verifies: starting over must be somebody's decision.
    """
    found = sorted(_finished(folder), reverse=True)
    for path in found:
        fault = verify(path)
        if fault is None:
            return Checkpoint(path, int(path.name.removeprefix("step-")))
        say(f"passing over checkpoint {path}: {fault}")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} is sound; delete {folder} to start over"
        )
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Reads every byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())["files"]
        if missing := {"model.safetensors", "optimizer.safetensors", "state.json"} - manifest.keys():
            return f"the manifest lacks {', '.join(sorted(missing))}"
        for name, entry in manifest.items():
            if name != os.path.basename(name):
                return f"the manifest names {name!r}, which is outside of the checkpoint"
            content = (path / name).read_bytes()
            if len(content) != entry["bytes"]:
                return f"{name} has {len(content)} bytes, the manifest says {entry['bytes']}"
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                return f"{name} does not match its sha256"
        if (step := json.loads((path / "state.json").read_text())["step"]) != int(
            path.name.removeprefix("step-")
        ):
            return f"it holds step {step}"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        # The fused optimizers count steps in float32, on the parameter's device.
        own = value.to(parameter.device) if key == "step" else value.to(parameter)
        optimizer.state[parameter][key] = own


def load_weights(model: nn.Module, found: Checkpoint, name: str) -> None:
    """Put `NAME.safetensors` into the model. Raises UserError when it is of another network."""
    try:
        model.load_state_dict(found.tensors(name))
    except RuntimeError as error:
        fault = " ".join(str(error).splitlines()[1].split()) if "\n" in str(error) else str(error)
        raise UserError(
            f"checkpoint {found.folder} does not fit the recipe's model as this version of vaescale builds it ({fault}); "
            f"use the version that wrote it, or train again under another name"
        ) from error


def _finished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)] if folder.is_dir() else []


def _delete_surplus(folder: Path, written: Path, keep: int) -> None:
    """Leave `written` and the `keep` - 1 before it. Later ones did not verify, or training had not come back here."""
    finished = sorted(_finished(folder))
    upto = [path for path in finished if path.name <= written.name]
    for path in set(finished) - set(upto[-keep:]):
        shutil.rmtree(path)
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
