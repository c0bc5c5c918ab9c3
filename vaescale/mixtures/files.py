"""Files of a fitted mixture: mixture.safetensors (weights, means, covariances, float64) and mixture.json."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from vaescale.errors import UserError
from vaescale.mixtures.gaussian import KINDS, Mixture
from vaescale.system.files import strict_json, write_whole

FORMAT = {"format": "vaescale-gmm", "version": 1}
TENSORS, DETAILS = "mixture.safetensors", "mixture.json"
HASH = "tensors_sha256"
MOST_BYTES = 1 << 34
READ_AGAIN, SECONDS_TO_SAVE = 10, 0.2


def save(mixture: Mixture, folder: Path, details: Mapping[str, object]) -> None:
    """Write both files to `folder`. details: further entries of the JSON, which also has the hash of the other file: a fit that is killed
    between the two leaves no mixture, in place of the new one under the old one's name.
    """
    names = ("weights", "means", "covariances")
    tensors = to_bytes({name: getattr(mixture, name).contiguous() for name in names})
    if HASH not in read_details(folder):
        # Of an earlier version, which cannot tell which tensors it belongs to.
        (folder / DETAILS).unlink(missing_ok=True)
    write_whole(folder / TENSORS, tensors)
    content = {**FORMAT, "covariance": mixture.kind, **details, HASH: _hash(tensors)}
    write_whole(folder / DETAILS, (strict_json(content, indent=1) + "\n").encode())


def read_details(folder: Path) -> dict[str, object]:
    """The content of mixture.json, unchecked; {} where it is missing or not a JSON object."""
    try:
        return dict(json.loads((folder / DETAILS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def sha256(mixture: Mixture) -> str:
    """The hash of a mixture's kind, sizes and numbers."""
    weights, means, covariances, kind = mixture
    digest = hashlib.sha256(f"{kind} {list(means.shape)}".encode())
    for tensor in (weights, means, covariances):
        digest.update(tensor.numpy().astype("<f8").tobytes())
    return digest.hexdigest()


def compared(folder: Path) -> list[int]:
    """The numbers of components that were compared in a run's gmm folder, from the names components-K, ascending."""
    suffixes = (path.name.removeprefix("components-") for path in folder.glob("components-*"))
    return sorted(int(number) for number in suffixes if number.isdecimal())


def load(folder: Path | str, **expected: object) -> Mixture:
    """The mixture in `folder`. expected: details that it must have been saved with, such as the step.

    Raises UserError when the mixture is missing or damaged, or was saved with other details.
    """
    folder = Path(folder)
    if not (folder / DETAILS).is_file():
        raise UserError(f"{folder} holds no fitted mixture; fit one with `vaescale fit-gmm RUN`")
    try:
        details, content = _read(folder)
        if (
            any(details.get(key) != value for key, value in FORMAT.items())
            or details.get("covariance") not in KINDS
        ):
            raise UserError(
                f"{folder} holds no mixture of this version; fit it again with `vaescale fit-gmm`"
            )
        tensors = from_bytes(content)
    except UserError:
        raise
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    if set(tensors) != {"weights", "means", "covariances"}:
        raise _damaged(folder, f"it holds {sorted(tensors)}")
    mixture = Mixture(tensors["weights"], tensors["means"], tensors["covariances"], details["covariance"])
    if fault := _fault(mixture):
        raise _damaged(folder, fault)
    for name, value in expected.items():
        if name not in details:
            raise UserError(
                f"the mixture in {folder} was saved by an earlier version without its {name}; fit it "
                f"again with `vaescale fit-gmm`"
            )
        if details[name] != value:
            raise UserError(
                f"the mixture in {folder} was fitted with {name} {details[name]}, this is {value}; fit it again with "
                f"`vaescale fit-gmm`"
            )
    return mixture


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The details and the tensors' bytes. Both are of one fit, unless a fit was killed between them: while one is saved, they are read again."""
    for _ in range(READ_AGAIN):
        details = dict(json.loads((folder / DETAILS).read_bytes()))
        if (folder / TENSORS).stat().st_size > MOST_BYTES:
            raise ValueError(f"{TENSORS} is larger than {MOST_BYTES} bytes")
        content = (folder / TENSORS).read_bytes()
        if details.get(HASH) in (None, _hash(content)):
            return details, content
        time.sleep(SECONDS_TO_SAVE)
    raise ValueError(f"{DETAILS} is of another fit than {TENSORS}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fault(mixture: Mixture) -> str:
    """The fault of a mixture's tensors, or "" for a sound mixture."""
    weights, means, covariances, kind = mixture
    if any(tensor.dtype != torch.float64 or not torch.isfinite(tensor).all() for tensor in mixture[:3]):
        return "its numbers are not finite float64"
    if weights.ndim != 1 or means.ndim != 2 or len(weights) != len(means) or not means.numel():
        return f"weights {list(weights.shape)} do not fit means {list(means.shape)}"
    components, size = means.shape
    shape = {
        "full": (components, size, size),
        "tied": (size, size),
        "diag": (components, size),
        "spherical": (components,),
    }[kind]
    if covariances.shape != shape:
        return f"covariances {list(covariances.shape)} are not {list(shape)}"
    if (weights < 0).any() or abs(float(weights.sum()) - 1) > 1e-6:
        return "the weights do not sum to 1"
    if kind in ("diag", "spherical"):
        return "" if (covariances > 0).all() else "a variance is not positive"
    sound = not torch.linalg.cholesky_ex(covariances).info.any()
    return "" if sound else "a covariance is not positive definite"


def _damaged(folder: Path, fault: str) -> UserError:
    return UserError(f"the mixture in {folder} is damaged ({fault}); fit it again with `vaescale fit-gmm`")
