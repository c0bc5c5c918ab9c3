"""Folders of weights that other libraries have written: JSON, and safetensors in one file or several with an index. No pickles."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vaescale.errors import UserError
from vaescale.runs.checkpoint import Shapes, Tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LARGEST_JSON = 1 << 20


class Files:
    """The tensors of a folder, in one file or in several with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, dict[str, Tensors]()
        self._place: dict[str, str] = {}
        for file in dict.fromkeys(self._listed()):
            path = folder / file
            try:
                opened = Tensors(path)
            except FileNotFoundError:
                raise UserError(f"{path} is missing; fetch the whole folder") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is no sound safetensors file ({error}); fetch it again") from None
            self._files[file] = opened
            self._place |= dict.fromkeys((_modern(name) for name in opened), file)
        self._old = {_modern(name): name for tensors in self._files.values() for name in tensors}
        self._shapes: Shapes = {
            _modern(name): shape
            for tensors in self._files.values()
            for name, shape in tensors.shapes().items()
        }

    def _listed(self) -> Iterator[str]:
        if not (self._folder / INDEX).is_file():
            if not (self._folder / WEIGHTS).is_file():
                others = [path.name for path in self._folder.glob("*.bin")]
                pickled = f"; {others[0]} is a pickle, which is never loaded" if others else ""
                raise UserError(f"{self._folder} has no {WEIGHTS}{pickled}; fetch the safetensors files")
            yield WEIGHTS
            return
        for file in read_json(self._folder / INDEX).get("weight_map", {}).values():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{self._folder / INDEX} names {file!r}, which is no safetensors file of the folder"
                )
            yield file

    def sha256(self) -> str:
        """The sha256 of the files of weights, one after the other."""
        total = hashlib.sha256()
        for file in self._files:
            with (self._folder / file).open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
        return total.hexdigest()

    def refuse_other_names(self, wanted: set[str]) -> None:
        """Raise UserError unless the tensors are those of the configuration."""
        if missing := sorted(wanted - self._place.keys()):
            raise UserError(
                f"{self._folder} lacks {missing[0]} and {len(missing) - 1} more tensors; fetch the whole folder"
            )
        if surplus := sorted(self._place.keys() - wanted):
            raise UserError(
                f"{self._folder} has {surplus[0]} and {len(surplus) - 1} more tensors that its configuration does not describe; fetch the folder as its authors made it"
            )

    def tensor(self, name: str, shape: list[int]) -> Tensor:
        """A tensor as float32, of the network's shape: that of a linear layer is a convolution's of one place."""
        kind, stored = self._shapes[name]
        alike = stored == shape or (len(stored) == 2 and [*stored, 1, 1] == shape)
        if not alike or kind not in ("F32", "F16", "BF16", "F64"):
            raise UserError(
                f"{self._folder} has {name} as {kind} {stored}, and its configuration asks for {shape}; fetch the whole folder"
            )
        return self._files[self._place[name]][self._old[name]].float().view(shape)


def _modern(name: str) -> str:
    """The present name of a tensor; attention layers had others before 2023."""
    found = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\..*)", name)
    return f"{found[1]}{OLD_ATTENTION[found[2]]}{found[3]}" if found else name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a large or damaged one."""
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has more than {LARGEST_JSON} bytes, and is no configuration")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no sound JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return content
