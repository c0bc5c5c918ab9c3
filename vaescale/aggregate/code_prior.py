"""An autoregressive prior over the codes of a run: its nats, its draws, and its files prior.safetensors and prior.json.

With -log p(codes) in place of N ln K, -log p(x|z) - log p(codes) is again the length of a code for x, in the same nats as a VAE's
negative ELBO. Van den Oord et al. 2017, section 3.3.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from vaescale import comm, noise
from vaescale.errors import UserError
from vaescale.evaluation.likelihood import bits_per_dim
from vaescale.evaluation.measures import Seen
from vaescale.models.quantized import QuantizedVAE
from vaescale.models.vae import VAE
from vaescale.networks.code_transformer import CodeTransformer, Shape, nats_from_logits
from vaescale.system.console import say
from vaescale.system.files import strict_json, write_whole

FORMAT = {"format": "vaescale-code-prior", "version": 1}
FOLDER, TENSORS, DETAILS = "prior", "prior.safetensors", "prior.json"
MOST = Shape(codes=1 << 20, places=1 << 16, width=1 << 13, layers=256, heads=256)
MOST_LOGITS = 1 << 24  # of one pass without gradient
PROTOCOL = {
    "autoregressive_kl_nats": "-log p(codes) under the autoregressive prior of RUN/prior: the length of the codes",
    "autoregressive_neg_elbo_nats": "-log p(x|z) of the image's codes, plus -log p(codes)",
    "autoregressive_bits_per_dim": "of autoregressive_neg_elbo_nats, as bits_per_dim",
}


def nats_of(prior: CodeTransformer, codes: Tensor, stream: noise.Stream | None = None) -> Tensor:
    """-log p(codes) [B] in nats of codes int64 [B, N]. stream: of dropout, in training."""
    return nats_from_logits(prior(codes[:, :-1], stream), codes)


@torch.no_grad()
def nats_in_parts(prior: CodeTransformer, codes: Tensor) -> Tensor:
    """`nats_of` any number of images, float64 [B]."""
    size = max(1, MOST_LOGITS // (prior.shape.codes * prior.shape.places))
    return torch.cat([nats_of(prior, part.long()).double() for part in torch.split(codes, size)])


@torch.no_grad()
def draw(prior: CodeTransformer, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
    """Codes int64 [B, N], one image a slot, code by code from the inverse of its distribution function; logits over the temperature."""
    uniform = noise.uniform(stream, noise.CHOICE, (prior.shape.places,)).double()
    codes = torch.zeros(len(stream.slots), 0, dtype=torch.int64, device=stream.slots.device)
    for place in range(prior.shape.places):
        logits = prior(codes)[:, -1].double() / temperature
        below = torch.softmax(logits, dim=1).cumsum(1)
        drawn = torch.searchsorted(below, uniform[:, place, None] * below[:, -1:], right=True)
        codes = torch.cat([codes, drawn.clamp_max(prior.shape.codes - 1)], dim=1)
    return codes


class PriorBound:
    """The measure of all images with the autoregressive prior in place of the uniform one; see PROTOCOL."""

    def __init__(self, model: VAE, prior: CodeTransformer) -> None:
        self._model, self._prior = model, prior
        self._sums = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)

    def add(self, seen: Seen, report: Any) -> None:  # noqa: ARG002
        """Add a batch."""
        terms = self._model.terms(seen.x, seen.drawn, seen.mask, measured=False)
        nats = nats_in_parts(self._prior, terms.codes)
        columns = torch.stack([nats, terms.log_px.double(), torch.ones_like(nats)], dim=1)
        self._sums += torch.where(seen.mask[:, None], columns, 0.0).sum(0)

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks. Bits per dimension are absent where sigma is fitted to each image."""
        nats, log_px, images = comm.all_reduce_sum(self._sums).tolist()
        likelihood, dimensions = self._model.likelihood, math.prod(self._model.image_shape)
        bound = (nats - log_px) / max(1.0, images)
        metrics = {"autoregressive_kl_nats": nats / max(1.0, images)}
        if likelihood.reads_x:
            return metrics
        metrics["autoregressive_neg_elbo_nats"] = bound
        if likelihood.added_bits is not None:
            bits = bits_per_dim(bound, dimensions, likelihood.added_bits)
            metrics["autoregressive_bits_per_dim"] = bits
        return metrics


def shape_of(model: QuantizedVAE, *, width: int, layers: int, heads: int) -> Shape:
    """The shape of a prior for a model."""
    return Shape(model.num_codes, math.prod(model.latent_shape[1:]), width, layers, heads)


def save(prior: CodeTransformer, folder: Path, details: Mapping[str, object]) -> None:
    """Write both files to `folder`. details: further entries of the JSON."""
    content = to_bytes({name: value.cpu().contiguous() for name, value in prior.state_dict().items()})
    write_whole(folder / TENSORS, content)
    described = {**FORMAT, **prior.shape._asdict(), "sha256": hashlib.sha256(content).hexdigest(), **details}
    write_whole(folder / DETAILS, (strict_json(described, indent=1) + "\n").encode())


def load(run: Path, model: VAE, identity: Mapping[str, object]) -> CodeTransformer:
    """The prior of a run, on the model's device, in evaluation mode. identity: of the trained model that it must be for.

    Raises UserError when it is missing, damaged, or for another step or other weights.
    """
    folder = run / FOLDER
    try:
        details = dict(json.loads((folder / DETAILS).read_bytes()))
        content = (folder / TENSORS).read_bytes()
        shape = Shape(*(details[name] for name in Shape._fields))
    except FileNotFoundError:
        raise UserError(
            f"{run} has no prior over its codes; fit one with `vaescale fit-prior {run}`"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(run, str(error)) from error
    if any(details.get(key) != value for key, value in FORMAT.items()):
        raise _damaged(run, "it is of another version")
    for name, value in identity.items():
        if details.get(name) != value:
            raise UserError(
                f"the prior in {folder} was fitted with {name} {details.get(name)}, this is {value}; fit it again with "
                f"`vaescale fit-prior {run}`"
            )
    if not all(type(value) is int and 0 < value <= most for value, most in zip(shape, MOST, strict=True)):
        raise _damaged(run, f"its shape {tuple(shape)} is invalid")
    if hashlib.sha256(content).hexdigest() != details.get("sha256"):
        raise _damaged(run, f"{TENSORS} does not match its sha256")
    if (shape.codes, shape.places) != (model.num_codes, math.prod(model.latent_shape[1:])):
        raise _damaged(run, f"it is for {shape.codes} codes at {shape.places} places")
    prior = CodeTransformer(shape)
    try:
        prior.load_state_dict(from_bytes(content))
    except (RuntimeError, SafetensorError) as error:
        raise _damaged(run, "its tensors do not fit its shape") from error
    return prior.eval().to(next(model.parameters()).device)


def of_weights(run: Path, model: VAE, identity: Mapping[str, object]) -> CodeTransformer | None:
    """The prior of a run as `load` returns it; None where there is none, or, with a message, one for another step or other weights."""
    path = run / FOLDER / DETAILS
    if not path.is_file():
        return None
    try:
        details = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(run, str(error)) from error
    if other := [name for name, value in identity.items() if details.get(name) != value]:
        if comm.is_main():
            say(
                f"{run / FOLDER} is left out: it was fitted with another {other[0]}; `vaescale fit-prior {run}` fits it again"
            )
        return None
    return load(run, model, identity)


def _damaged(run: Path, fault: str) -> UserError:
    return UserError(
        f"the prior in {run / FOLDER} is damaged ({fault}); fit it again with `vaescale fit-prior {run}`"
    )
