"""Make a run folder of diffusers' AutoencoderKL: the verbs for trained runs open it, and `init_from` begins from it."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from vaescale import noise
from vaescale.commands.export import write_run
from vaescale.commands.export_diffusers import sigma_of
from vaescale.commands.signature import checked
from vaescale.config import Size
from vaescale.data.reader import open_reader
from vaescale.errors import UserError
from vaescale.exchange import autoencoder_kl
from vaescale.likelihoods.config import MeanConfig
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe, load_recipe
from vaescale.system.console import say
from vaescale.trained import Trained, build_model, in_order

SIGMA_IMAGES = 2000  # of the data, for the optimal sigma
DEFAULT: dict[str, Any] = {
    "name": "autoencoder",
    "data": {"train": "data/train", "val": "data/val", "global_batch": 32},
    "network": {"kind": "resnet", "latent_dim": 4},
    "posterior": {"kind": "diagonal", "bounded": False},
    "likelihood": {"kind": "gaussian", "sigma": "optimal", "mean": "identity"},
    "optimizer": {"kind": "adamw", "lr": 1e-5, "warmup_steps": 100},
    "training": {"steps": 10_000},
}


@checked
def import_autoencoder(
    folder: Path,
    out: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    data: Path | None = None,
) -> dict[str, Any]:
    """Write a run folder with the weights of the AutoencoderKL in `folder` to OUT, which must not exist. Returns what is in it.

    recipe, overrides: data, likelihood, optimizer and training of the run; its network is the folder's. data: shards whose images give
    the optimal sigma; without them, sigma is that of the run that wrote the folder, or unknown. Raises UserError for a folder that is
    no AutoencoderKL, and for a likelihood with more parameters than the mean of a pixel.
    """
    if out.exists():
        raise UserError(f"{out} already exists; delete it or choose another OUT")
    sample_size = autoencoder_kl.sample_size(folder)
    given = _given(recipe, overrides, image_size=sample_size)
    read = autoencoder_kl.read(folder, image_size=given.data.image_size)
    made = _recipe(given, read, out)
    model = build_model(made)
    model.network.load_state_dict(read.tensors)
    Trained(out, made, model, 0, "raw", read.sha256).announce(f"import {folder} as")
    known = _find_sigma(model, made, read, data)
    trained = Trained(out, made, model.eval(), 0, "raw", read.sha256)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    write_run(trained, temporary)
    temporary.rename(out)
    if not known:
        say(f"sigma is not known: give --data SHARDS, or train: vaescale train RECIPE init_from={out}")
    return {
        "out": str(out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_shape": list(model.image_shape),
        "latent_shape": list(model.latent_shape),
        "sigma": sigma_of(model) if known else None,
        "scaling_factor": read.theirs.get("scaling_factor"),
        "shift_factor": read.theirs.get("shift_factor"),
    }


def _given(recipe: Path | None, overrides: Sequence[str], *, image_size: Size | None) -> Recipe:
    """The recipe that gives everything but the network: a file's, or one that suits fine-tuning."""
    if recipe is not None:
        return load_recipe(recipe, [*overrides])
    content = {
        **DEFAULT,
        "data": {
            **DEFAULT["data"],
            **(
                {"image_size": image_size if isinstance(image_size, int) else list(image_size)}
                if image_size
                else {}
            ),
        },
    }
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_recipe(path, [*overrides])


def _recipe(given: Recipe, read: autoencoder_kl.Autoencoder, out: Path) -> Recipe:
    """The recipe with the network that was read. Raises UserError for a likelihood that it has no head for."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.name).lstrip("._-") or "autoencoder"
    content = given.model_dump(mode="json") | {"name": name, "run_dir": str(out), "init_from": None}
    content["network"] = read.network.model_dump(mode="json")
    content["posterior"] = DEFAULT["posterior"]
    content["data"] |= {"channels": read.channels}
    made = Recipe.model_validate(content)
    likelihood = made.likelihood
    if not isinstance(likelihood, MeanConfig) or likelihood.mean != "identity":
        raise UserError(
            "an AutoencoderKL's decoder returns the image itself: give a likelihood with `mean: identity`, such as likelihood.kind=gaussian "
            "likelihood.mean=identity; begin from OUT with another one afterwards (init_from)"
        )
    if likelihood.implement(image_shape=(read.channels, 1, 1)).num_params(read.channels) != read.channels:
        raise UserError(
            "an AutoencoderKL's decoder returns a mean alone, and the recipe's likelihood takes more for each value; import with "
            "likelihood.sigma=optimal, and begin from OUT with the other one (init_from)"
        )
    return made


@torch.no_grad()
def _find_sigma(model: VAE, recipe: Recipe, read: autoencoder_kl.Autoencoder, data: Path | None) -> bool:
    """Set an optimal sigma: that of the images at `data`, or that of the run that wrote the folder. Returns whether sigma is known."""
    state = model.likelihood.state_dict()
    if not state or not model.likelihood.state_dict().keys() & {"state.running"}:
        return True
    if data is not None:
        reader = open_reader(str(data), recipe.data)
        model.train()
        for batch in in_order(reader, images=SIGMA_IMAGES):
            stream = noise.Stream(recipe.seed, 0, batch.slots)
            model(batch.images, stream, batch.mask)
        model.likelihood.end_step()
        model.eval()
        return True
    kept: Any = read.own.get("likelihood_state")
    fits = isinstance(kept, dict) and all(
        isinstance(kept.get(name), list) and len(kept[name]) == value.numel() for name, value in state.items()
    )
    if fits:
        model.likelihood.load_state_dict(
            {
                name: torch.tensor(kept[name], dtype=value.dtype).view(value.shape)
                for name, value in state.items()
            }
        )
    return bool(model.likelihood.state_dict()["state.running"][0] > 0)
