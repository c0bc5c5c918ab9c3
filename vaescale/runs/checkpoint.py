"""Checkpoints that are either whole or absent: safetensors and JSON, listed with their sha256 in a manifest.

    checkpoints/step-000000600/
        model.safetensors       weights and buffers, the sigma state among them
        ema.safetensors         the averaged weights, if there are any; further averages have names such as ema-0.9999
        optimizer.safetensors   NAME/exp_avg, NAME/exp_avg_sq, NAME/step for each parameter NAME
        discriminator.safetensors, discriminator-optimizer.safetensors   the second player of an adversarial objective
    guard.safetensors       the usual gradient norm, and how many steps were skipped
        state.json              step, recipe hash, plan hash, world size
        manifest.json           bytes and sha256 of each file above

An exported run has no optimizer.safetensors; its manifest says `exported`.

Tensors are stored whole and by name, whatever layout they were trained in, so every checkpoint is portable. A folder is
written under a temporary name, synced, renamed, and its parent synced; an older one is deleted only after that. No pickle
is ever read, and only tensors with the names, shapes and types of the model are loaded.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vaescale.errors import UserError
from vaescale.system.console import say
from vaescale.system.files import make_readable, strict_json, sync, write_synced

MANIFEST = "manifest.json"
REPLACED = ".replaced"
NAME = re.compile(rf"step-(\d{{9}})({REPLACED})?")
FILE = re.compile(r"[a-z]+(-[a-z0-9.-]+)?\.(safetensors|json)")
OPTIONAL = ("discriminator", "discriminator-optimizer", "discriminator-ema")  # training can begin them anew
NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}
NEEDED_EXPORTED = {"model.safetensors", "state.json"}
EXPORTED = "exported_weights"  # key of state.json: which weights an exported run has
LARGEST_JSON = 1 << 20
DAMAGE = (errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EBADMSG, errno.EUCLEAN)
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
Shapes = dict[str, tuple[str, list[int]]]


class Keep(NamedTuple):
    """The rule by which checkpoints are kept.

    last: how many of the newest; every: those whose step is a multiple of it; measured: values by step, of which the checkpoint
    with the smallest is kept.
    """

    last: int
    every: int | None = None
    measured: Mapping[int, float] = MappingProxyType({})


class Tensors(Mapping[str, Tensor]):
    """A file of tensors, each of which is read on access."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> Shapes:
        """The type and shape of each tensor, read from the header only."""
        slices: dict[str, Any] = {name: self._file.get_slice(name) for name in self._names}  # type: ignore[no-untyped-call]
        return {name: (tensor.get_dtype(), list(tensor.get_shape())) for name, tensor in slices.items()}


class Checkpoint(NamedTuple):
    """A verified checkpoint folder and its step."""

    folder: Path
    step: int

    def has(self, name: str) -> bool:
        """Whether there is a `NAME.safetensors`: `ema` is there only if weights were averaged."""
        return f"{name}.safetensors" in _read_json(self.folder / MANIFEST)["files"]

    def averages(self) -> list[str]:
        """The names of the averages of the weights that it has, the main one first."""
        names = [
            name.removesuffix(".safetensors")
            for name in _read_json(self.folder / MANIFEST)["files"]
            if name.startswith("ema")
        ]
        return sorted(names, key=lambda name: (name != "ema", name))

    def sha256(self, name: str) -> str:
        """The sha256 of `NAME.safetensors`, from the manifest."""
        return str(_read_json(self.folder / MANIFEST)["files"][f"{name}.safetensors"]["sha256"])

    def tensors(self, name: str) -> Tensors:
        """The tensors of `NAME.safetensors`."""
        return Tensors(self.folder / f"{name}.safetensors")

    def state(self) -> dict[str, Any]:
        """The content of state.json."""
        return _state(self.folder)


def write(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: Keep,
    exported: bool = False,
) -> Checkpoint:
    """Write one checkpoint into `folder`, then delete those that `keep` does not name. Only the main process calls it.

    tensors: by file and name, in this process's memory. exported: the run is for use and not for training, so the
    optimizer's tensors may be absent.
    """
    final = folder / f"step-{step:09d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {}
    for name, group in tensors.items():
        path = temporary / f"{name}.safetensors"
        _save(path, group)
        with path.open("rb") as file:
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    content = strict_json({"step": step, **state}, indent=1).encode()
    write_synced(temporary / "state.json", content)
    files["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    kind = {"exported": True} if exported else {}
    write_synced(temporary / MANIFEST, json.dumps({"version": 1, **kind, "files": files}, indent=1).encode())
    sync(temporary)
    if final.exists():  # from before a rollback; it stays valid until the new one has its name
        replaced = final.with_name(f"{final.name}{REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync(folder)
    sync(folder.parent)
    delete_surplus(folder, step, keep)
    return Checkpoint(final, step)


def delete_surplus(folder: Path, step: int, keep: Keep) -> None:
    """Delete checkpoints that `keep` does not name, and all of steps after the newest `step`: damaged, or from before a rollback."""
    finished = sorted(_finished(folder))
    upto = [path for path in finished if _step(path) <= step and not path.suffix]
    kept = set(upto[-keep.last :])
    if keep.every:
        kept |= {path for path in upto if _step(path) % keep.every == 0}
    values = [
        (value, path) for path in upto if math.isfinite(value := keep.measured.get(_step(path), math.nan))
    ]
    if values:
        kept.add(min(values)[1])
    for path in (set(finished) - kept) | set(folder.glob("step-*.tmp-*")):
        try:
            shutil.rmtree(path)
        except OSError as error:  # another process may be reading it on a network disk; the new one is safe
            say(f"{path} could not be deleted ({error}); the next checkpoint tries again")


def refuse_too_little_room(folder: Path, needed: int) -> None:
    """Raise OSError when the disk has fewer bytes free than a checkpoint needs."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} are free",
            str(folder),
        )


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None in a folder without checkpoints. Reports those that it skips.

    Raises UserError when there are checkpoints and none verifies: only the user may decide to start over.
    """
    paths = sorted(_finished(folder), key=lambda path: (_step(path), not path.suffix), reverse=True)
    for path in paths:
        fault = verify(path)
        if fault is None:
            return Checkpoint(path, _step(path))
        say(f"skipping checkpoint {path}: {fault}")
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} is sound; delete {folder} to start over"
        )
    return None


def has_any(folder: Path) -> bool:
    """Whether a folder has a checkpoint that was finished, sound or not; what a killed save leaves behind is none."""
    return bool(_finished(folder))


def sound(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints that verify, from the oldest. Reports those that it skips."""
    for path in sorted(_finished(folder), key=lambda path: (_step(path), path.suffix)):
        if path.suffix:
            continue
        if fault := verify(path):
            say(f"skipping checkpoint {path}: {fault}")
        else:
            yield Checkpoint(path, _step(path))


def verify(path: Path) -> str | None:
    """The fault of a checkpoint folder, as a phrase, or None. Reads every byte."""
    try:
        manifest = _read_json(path / MANIFEST)
        files = manifest["files"]
        needed = NEEDED_EXPORTED if manifest.get("exported") is True else NEEDED
        if missing := needed - files.keys():
            return f"the manifest lacks {', '.join(sorted(missing))}"
        for name, entry in files.items():
            if not FILE.fullmatch(name):
                return f"the manifest names {name!r}, which no checkpoint has"
            if fault := _fault_of(path / name, entry):
                return fault
        if (step := _state(path)["step"]) != _step(path):
            return f"it holds step {step}"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except OSError as error:
        # Without rights, with too many open files or with a network's error, the checkpoint may be sound.
        if error.errno not in DAMAGE:
            raise
        return f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported run's checkpoints, whose optimizer state is absent, or empty in old versions."""

    def says_exported(path: Path) -> bool:
        try:
            return EXPORTED in _state(path)
        except (OSError, ValueError, RecursionError):
            return False

    return any(says_exported(path) for path in _finished(folder))


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The type and shape of each tensor, as in a file's header."""
    return {name: (TYPES[value.dtype], list(value.shape)) for name, value in tensors.items()}


def shapes_of_training(model: nn.Module, *, averages: Iterable[str]) -> dict[str, Shapes]:
    """The shapes that training of a model saves, by file: weights and buffers, Adam's state, averages of the weights.

    averages: their names. Weights that are not trained have no state.
    """
    weights = shapes_of(model.state_dict())
    moments = {
        f"{name}/{key}": ("F32", [] if key == "step" else list(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    return {"model": weights, "optimizer": moments, **dict.fromkeys(averages, weights)}


def num_bytes(files: Mapping[str, Shapes]) -> int:
    """The size of a checkpoint on disk, rounded up a little."""
    shapes = [shape for file in files.values() for shape in file.values()]
    values = sum(math.prod(shape) * (8 if kind in ("F64", "I64") else 4) for kind, shape in shapes)
    return int(1.01 * values) + (1 << 16) + 256 * len(shapes)


def file_of(saved: Checkpoint, weights: str) -> str:
    """The name of the file of some weights: `ema`, or the raw ones where nothing was averaged; `raw`; another average by its name.

    Raises UserError for an average that the checkpoint does not have. An exported run has one kind of weights.
    """
    exported = saved.state().get(EXPORTED)
    if exported is not None:
        if weights not in ("ema", "raw", exported):
            raise UserError(
                f"{saved.folder} is exported and has {exported!r} weights only; leave --weights out"
            )
        return "model"
    if weights == "raw":
        return "model"
    known = saved.averages()
    if weights in known:
        return weights
    if weights != "ema":
        raise UserError(
            f"{saved.folder} has no weights {weights!r}; choose from {', '.join([*known, 'raw'])}"
        )
    return "model"


def refuse_unfit(saved: Checkpoint, expected: Mapping[str, Shapes]) -> None:
    """Raise UserError when a checkpoint's names, types and shapes differ from the expected ones, given by file. Those of OPTIONAL may
    be missing.
    """
    for file, shapes in expected.items():
        if file in OPTIONAL and not saved.has(file):
            continue
        if not saved.has(file):
            raise _unfit(saved, f"{file}.safetensors is missing")
        try:
            stored = saved.tensors(file).shapes()
        except SafetensorError as error:
            raise _unfit(saved, f"{file}.safetensors: {error}") from error
        if missing := shapes.keys() - stored.keys():
            raise _unfit(saved, f"{file} lacks {min(missing)}")
        if surplus := stored.keys() - shapes.keys():
            raise _unfit(saved, f"{file} has {min(surplus)}, which the model does not have")
        for name, shape in shapes.items():
            if stored[name] != shape:
                old, new = (f"{kind} {sizes}" for kind, sizes in (stored[name], shape))
                raise _unfit(saved, f"{file} has {name} as {old}, the model needs {new}")


def load_weights(model: nn.Module, saved: Checkpoint, name: str) -> None:
    """Load `NAME.safetensors` into the model. Raises UserError when it belongs to another network."""
    refuse_unfit(saved, {name: shapes_of(model.state_dict())})
    model.load_state_dict(saved.tensors(name))


def _unfit(saved: Checkpoint, why: str) -> UserError:
    return UserError(
        f"checkpoint {saved.folder} does not fit the recipe's model as this version of vaescale builds it ({why}); "
        f"use the version and the recipe that wrote it, or train again under another name"
    )


def _fault_of(path: Path, entry: dict[str, Any]) -> str | None:
    """The fault of one file, or None for a regular file as the manifest lists it."""
    kind = path.lstat()
    if not stat.S_ISREG(kind.st_mode):
        return f"{path.name} is not a regular file"
    if kind.st_size != entry["bytes"]:
        return f"{path.name} has {kind.st_size} bytes, the manifest says {entry['bytes']}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            return f"{path.name} does not match its sha256"
    return None


def _state(path: Path) -> dict[str, Any]:
    return _read_json(path / "state.json")


def _read_json(path: Path) -> dict[str, Any]:
    kind = path.lstat()
    if not stat.S_ISREG(kind.st_mode) or kind.st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is not a regular file of at most {LARGEST_JSON} bytes")
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} does not hold a JSON object")
    return content


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # the library wraps the system's error
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    make_readable(path)
    sync(path)


def _finished(folder: Path) -> list[Path]:
    paths = folder.glob("step-*") if folder.is_dir() else ()
    return [path for path in paths if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _step(path: Path) -> int:
    return int(path.name[len("step-") :][:9])
