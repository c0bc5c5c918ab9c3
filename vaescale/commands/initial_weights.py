"""Weights to begin training from: those of a run, of a checkpoint, of an exported run, or of a safetensors file."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from vaescale.errors import UserError
from vaescale.exchange import autoencoder_kl
from vaescale.models import freezing
from vaescale.models.vae import VAE
from vaescale.networks.modulation import PARTS
from vaescale.recipe import Recipe, differences, load_recipe
from vaescale.runs import checkpoint
from vaescale.runs import folder as run_folder
from vaescale.training.config import InitConfig

EXPORTED_RUN = Path("data/run")  # of a folder that `vaescale export` wrote
NETWORK = "network."
NAMED = 4  # tensors in a sentence
ANY_DIFFERENCE = (
    "freeze",
    "checkpointing",
    "kind",
)  # keys of the network that do not change what its weights mean


class Stored(NamedTuple):
    """Weights on disk. what: a phrase for them; sections: the recipe's, of what wrote them, {} if that is unknown."""

    tensors: Mapping[str, Tensor]
    sha256: str
    what: str
    sections: Mapping[str, Any]


class Beginning(NamedTuple):
    """What a model began from. sha256: of the file of weights; sentence: what was taken, left there, and is new."""

    sha256: str
    sentence: str


def begin(model: VAE, recipe: Recipe) -> Beginning | None:
    """Load the weights that `init_from` names into a new model, or return None without it. Every rank calls it.

    A tensor that is taken must have the model's shape. Those that may differ begin as the recipe's seed has them: the layer that
    returns the likelihood's parameters, what the likelihood itself learns, unless it is the same likelihood, and what a condition adds to
    weights of an unconditional model. Raises UserError for everything else that does not fit, before the model changes.
    """
    config = recipe.init_from
    if config is None:
        return None
    stored = open_stored(Path(config.path), weights=config.weights)
    wanted = {name: value for name, value in model.state_dict().items() if _is_wanted(model, name, config)}
    head = f"{NETWORK}{model.network.head_name}."
    taken, new = {}, []
    for name, value in wanted.items():
        there = stored.tensors.get(name)
        if there is not None and there.shape == value.shape and _means_the_same(name, stored, recipe):
            taken[name] = there
        elif name.startswith(head) or not name.startswith(NETWORK):
            new.append(name)
        elif there is None and name.removeprefix(NETWORK).partition(".")[0] in PARTS:
            new.append(name)  # of a condition, which changes nothing at first
        else:
            raise UserError(_unfit(config, name, there, value))
    surplus = [
        name
        for name in stored.tensors
        if name not in wanted and name.startswith(NETWORK) and _is_wanted(model, name, config)
    ]
    if surplus and not all(name.startswith(head) for name in surplus):
        raise UserError(
            f"init_from.path (={config.path}) has {surplus[0]}, which the recipe's network does not have; take the network section "
            "of the recipe that trained it"
        )
    if not taken:
        raise UserError(f"init_from.path (={config.path}) has nothing of the recipe's {config.take}")
    _refuse_a_frozen_beginning(model, new)
    model.load_state_dict(taken, strict=False)
    left = [name for name in stored.tensors if name not in taken]
    return Beginning(stored.sha256, _sentence(model, stored, taken, left, recipe))


def open_stored(path: Path, *, weights: str) -> Stored:
    """Open the weights at a path. weights: `ema` takes the averaged ones where a run has them. Raises UserError."""
    for applies, opens in SOURCES:
        if applies(path):
            return opens(path, weights)
    what = "does not exist" if not path.exists() else "holds no weights that vaescale knows"
    raise UserError(
        f"init_from.path (={path}) {what}; name a run folder, one of its checkpoints, a folder of `vaescale export`, diffusers' "
        "AutoencoderKL, or a .safetensors file"
    )


def _of_a_run(path: Path, weights: str) -> Stored:
    recipe = load_recipe(path / run_folder.RECIPE)
    newest = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise UserError(
            f"init_from.path (={path}) has no checkpoint yet; train it first, or name another run"
        )
    return _of_a_checkpoint(newest.folder, weights, recipe=recipe)


def _of_a_checkpoint(path: Path, weights: str, *, recipe: Recipe | None = None) -> Stored:
    if fault := checkpoint.verify(path):
        raise UserError(f"init_from.path: checkpoint {path} is not sound ({fault}); name another one")
    written_by = path.parent.parent / run_folder.RECIPE
    if recipe is None and written_by.is_file():
        recipe = load_recipe(written_by)
    saved = checkpoint.Checkpoint(path, int(path.name.removeprefix("step-")))
    kind = checkpoint.file_of(saved, weights)
    named = kind if kind != "model" else str(saved.state().get(checkpoint.EXPORTED, "raw"))
    what = f"{path.parent.parent}, step {saved.step}, {named} weights"
    sections = {} if recipe is None else recipe.public()
    return Stored(saved.tensors(kind), saved.sha256(kind), what, sections)


def _of_a_file(path: Path, weights: str) -> Stored:  # noqa: ARG001
    try:
        tensors = checkpoint.Tensors(path)
    except SafetensorError as error:
        raise UserError(
            f"init_from.path (={path}) is no sound safetensors file ({error}); fetch or write it again"
        ) from error
    with path.open("rb") as file:
        return Stored(tensors, hashlib.file_digest(file, "sha256").hexdigest(), str(path), {})


def _of_an_export(path: Path, weights: str) -> Stored:
    return _of_a_run(path / EXPORTED_RUN, weights)


def _of_diffusers(path: Path, weights: str) -> Stored:  # noqa: ARG001
    read = autoencoder_kl.read(path)
    tensors = {f"{NETWORK}{name}": value for name, value in read.tensors.items()}
    sections = {
        "network": read.network.model_dump(mode="json"),
        "posterior": {"kind": "diagonal", "bounded": False},
    }
    return Stored(tensors, read.sha256, f"{path}, an {autoencoder_kl.CLASS}", sections)


SOURCES: tuple[tuple[Callable[[Path], bool], Callable[[Path, str], Stored]], ...] = (
    (lambda path: (path / run_folder.RECIPE).is_file(), _of_a_run),
    (lambda path: (path / EXPORTED_RUN / run_folder.RECIPE).is_file(), _of_an_export),
    (
        lambda path: (
            checkpoint.NAME.fullmatch(path.name) is not None and (path / checkpoint.MANIFEST).is_file()
        ),
        _of_a_checkpoint,
    ),
    (autoencoder_kl.is_folder, _of_diffusers),
    (lambda path: path.suffix == ".safetensors" and path.is_file(), _of_a_file),
)


def _is_wanted(model: VAE, name: str, config: InitConfig) -> bool:
    """Whether `take` asks for a tensor of this name."""
    if config.take == "all" or not name.startswith(NETWORK):
        return config.take == "all"
    return config.take in ("network", model.network.part_of(name.removeprefix(NETWORK)))


def _means_the_same(name: str, stored: Stored, recipe: Recipe) -> bool:
    """Whether a tensor of the same name and shape is the same quantity: what a likelihood has learned is another's no more."""
    section = name.partition(".")[0]
    if section != "likelihood":
        return True
    there, here = (dict(one.get(section) or {}) for one in (stored.sections, recipe.public()))
    there.pop("horizon_steps", None)
    here.pop("horizon_steps", None)
    return there == here


def _unfit(config: InitConfig, name: str, there: Tensor | None, value: Tensor) -> str:
    if there is None:
        return (
            f"init_from.path (={config.path}) lacks {name}; take the network section of the recipe that trained it, or only a part: "
            "init_from.take"
        )
    return (
        f"init_from.path (={config.path}) has {name} as {list(there.shape)}, and the recipe's network needs {list(value.shape)}; "
        "take the network section and image size of the recipe that trained it, or only a part: init_from.take"
    )


def _refuse_a_frozen_beginning(model: VAE, new: list[str]) -> None:
    """Raise UserError if a tensor that begins anew would be frozen so."""
    for name in new:
        parameter = dict(model.named_parameters()).get(name)
        if parameter is not None and not parameter.requires_grad:
            names = [name for name, value in model.network.named_parameters() if not value.requires_grad]
            layers = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            rest = [layer for layer in layers if not f"{model.network.head_name}.".startswith(f"{layer}.")]
            raise UserError(
                f"network.freeze would keep {name} as it begins, at random, because init_from does not give it; leave that layer out: "
                f"network.freeze={','.join(rest)}"
            )


def _sentence(
    model: VAE, stored: Stored, taken: Mapping[str, Tensor], left: list[str], recipe: Recipe
) -> str:
    """The line on what was taken, left there, and is new."""
    parameters = dict(model.named_parameters())
    number = sum(parameters[name].numel() for name in taken if name in parameters)
    new = [name for name in model.state_dict() if name not in taken]
    there, here = (_of_the_network(one) for one in (stored.sections or recipe.public(), recipe.public()))
    changed = differences(there, here)
    parts = [
        f"begins from {stored.what}: {len(taken)} tensors taken ({number:,} of {sum(p.numel() for p in parameters.values()):,} parameters)",
        f"{_listed(left)} left there" if left else "nothing left there",
        f"{_listed(new)} new" if new else "nothing new",
    ]
    return "; ".join(parts + ([f"the recipe differs in {', '.join(changed)}"] if changed else []))


def _of_the_network(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a network's weights compute."""
    network = {
        key: value for key, value in (sections.get("network") or {}).items() if key not in ANY_DIFFERENCE
    }
    return {"network": network, "posterior": sections.get("posterior")}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def prepare(model: VAE, recipe: Recipe, folder: Path) -> tuple[str | None, str | None]:
    """Freeze what the recipe freezes and, unless the run folder has a checkpoint, load what it begins from.

    Returns the sha256 of the first weights, which the run folder remembers, and the sentence on them; None without `init_from`.
    """
    freezing.freeze(model, recipe.network.freeze)
    if recipe.init_from is None:
        return None, None
    known = run_folder.read_json(folder / run_folder.TAGS).get("init_weights_hash")
    if known and checkpoint.has_any(folder / "checkpoints"):
        return str(known), None
    with torch.no_grad():
        beginning = begin(model, recipe)
    return (None, None) if beginning is None else beginning
