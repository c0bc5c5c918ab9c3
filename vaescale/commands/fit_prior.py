"""Fit an autoregressive prior to the codes of a run: encode its images, train a transformer, keep the weights best for held-out codes.

The codes are shards, as latents are, and RUN/prior/NAME-prior is a run of its own, with the name that MLflow shows: `train` trains the
transformer as it trains any model, with a recipe that is made here. So order and dropout depend on seed, step and slot alone, any number of processes gives one curve, and
the same command continues bit by bit.
"""

import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from vaescale import comm
from vaescale.aggregate import code_prior
from vaescale.commands.encode import SPLITS, codes_of
from vaescale.commands.second_stage import OF_RUN
from vaescale.commands.signature import Count, NonNegative, PositiveReal, checked
from vaescale.commands.train import train
from vaescale.config import size_of
from vaescale.data.code_shards import CodeShards
from vaescale.errors import UserError
from vaescale.evaluation.likelihood import evaluate
from vaescale.models.quantized import QuantizedVAE
from vaescale.networks.code_transformer import CodeTransformer
from vaescale.recipe import Recipe
from vaescale.runs import folder as run_folder
from vaescale.runs.identity import git_revision
from vaescale.runs.results import save_result
from vaescale.system.console import say
from vaescale.system.files import LockHeldError, exclusive
from vaescale.trained import Split, Trained, Weights, Which, in_order, open_split, open_trained
from vaescale.training import launch as backends
from vaescale.training.config import Precision

BETAS, EPSILON, WARMUP_SHARE = (0.9, 0.95), 1e-8, 0.05
LARGEST_NORM = 1.0  # of the gradient in nats per code
MEASURED, LOGGED = 20, 100  # times in a fit
LOCK = ".prior.lock"
FORMER_CHECKPOINTS = (
    "checkpoints"  # in which earlier versions, without a run of its own, kept the state of a fit
)
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Codes = dict[Split, CodeShards]


class Fit(NamedTuple):
    """How a prior is fitted."""

    width: int
    layers: int
    heads: int
    steps: int
    batch: int
    lr: float
    weight_decay: float
    dropout: float
    precision: Precision
    seed: int


@checked
def fit_prior(
    run: Path,
    *,
    width: Count = 64,
    layers: Count = 2,
    heads: Count = 4,
    steps: Count = 1000,
    batch: Count = 128,
    lr: PositiveReal = 1e-3,
    weight_decay: Decay = 0.1,
    dropout: Share = 0.1,
    precision: Precision = "fp32",
    weights: Weights = "ema",
    seed: NonNegative = 0,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Train a causal transformer on the codes of a run's training images, and save the weights that are best for held-out codes to RUN/prior.

    All ranks call it. Where the run was trained with data.flip, the codes of mirror images are trained on, too.
    width, layers, heads: of the transformer. steps: of AdamW with `batch` images each, warm-up and a cosine; lr, weight_decay,
    dropout, precision: its options. weights: of the run, which encode. A fit that was interrupted continues if its arguments are the same. checkpoint: see `Which`.

    Returns the mean nats of training and held-out codes under the prior and under uniform codes. Raises UserError for a run without codes.
    """
    if width % heads:
        raise UserError(f"--width (={width}) must be a multiple of --heads (={heads})")
    fit = Fit(width, layers, heads, steps, batch, lr, weight_decay, dropout, precision, seed)
    with backends.launched(None) as started, ExitStack() as stack:
        if batch % (processes := started.accelerator.num_processes):
            nearest = max(1, round(batch / processes)) * processes
            raise UserError(
                f"--batch (={batch}) cannot be shared equally by {processes} processes; use {nearest}"
            )
        trained = open_trained(run, weights=weights, which=checkpoint)
        trained.announce("fit-prior")
        if not isinstance(trained.model, QuantizedVAE):
            raise UserError(
                f"fit-prior needs codes, and {run} has a Gaussian q(z|x) (posterior.kind {trained.recipe.posterior.kind!r}); fit a "
                f"mixture with `vaescale fit-gmm {run}`"
            )
        folder = trained.folder / code_prior.FOLDER
        comm.on_main(lambda: _claim(folder, stack))
        suffix = "" if weights == "ema" else f"-{weights}"
        mirrored = trained.recipe.data.flip
        codes = {
            split: codes_of(trained, split, suffix=suffix, mirrored=mirrored and split == "train")
            for split in SPLITS
        }
        images = codes["train"].index.num_samples
        if images < batch:
            raise UserError(f"--batch (={batch}) exceeds the {images} training images; lower it")
        recipe = _recipe(trained, folder, codes, fit)
        if not comm.on_main(lambda: _is_trained(folder, recipe, codes)):
            train(recipe, launch=started)
        return _saved(trained, folder, recipe, codes, fit)


def _claim(folder: Path, stack: ExitStack) -> None:
    """Hold RUN/prior until the stack is closed. Only the main process calls it."""
    folder.mkdir(exist_ok=True)
    try:
        stack.enter_context(exclusive(folder / LOCK))
    except LockHeldError as error:
        raise UserError(f"another fit-prior is writing to {folder}; wait for it, or end it") from error


def _recipe(trained: Trained, folder: Path, codes: Codes, fit: Fit) -> Recipe:
    """The recipe of the prior's training, in a folder of RUN/prior. Gradients are in nats per image, N times those per code."""
    data, (height, width) = trained.recipe.data, codes["train"].shape
    places, every = height * width, -(-fit.steps // MEASURED)
    name = f"{trained.recipe.name}-prior"
    content: dict[str, Any] = {
        "name": name,
        "seed": fit.seed,
        "run_dir": str(folder / name),
        "data": {
            "train": str(codes["train"].folder),
            "val": str(codes["val"].folder),
            "holds": "codes",
            "image_size": size_of(height, width),
            "channels": codes["train"].codes,
            "global_batch": fit.batch,
            "cache": data.cache,
            "workers": data.workers,
        },
        "network": {
            "kind": "code_transformer",
            **{name: getattr(fit, name) for name in ("width", "layers", "heads", "dropout")},
        },
        "likelihood": {"kind": "categorical"},
        "optimizer": {
            "lr": fit.lr,
            "betas": BETAS,
            "epsilon": EPSILON * places,
            "weight_decay": fit.weight_decay,
            "warmup_steps": round(WARMUP_SHARE * fit.steps),
            "clip_norm": LARGEST_NORM * places,
        },
        "training": {
            "steps": fit.steps,
            "precision": fit.precision,
            "ema_decay": 0,
            "log_every": max(1, fit.steps // LOGGED),
            "evaluate_every": every,
            "checkpoint_every": every,
            "keep_checkpoints": 1,
            "keep_best": "val/neg_elbo_nats",
            "watchdog_seconds": trained.recipe.training.watchdog_seconds,
        },
        "tracking": trained.recipe.tracking.model_copy(update={"parent": None}),
    }
    return Recipe.model_validate(content)


def _is_trained(folder: Path, recipe: Recipe, codes: Codes) -> bool:
    """Whether the prior's training has ended. What is of a fit with other settings or codes is deleted, with a message."""
    shutil.rmtree(folder / FORMER_CHECKPOINTS, ignore_errors=True)
    training = Path(recipe.run_dir)
    if not training.exists():
        return False
    if _of_this_fit(training, recipe, codes):
        is_trained = run_folder.is_trained(training, recipe.training.steps)
        if is_trained:
            say(f"{training} is trained to step {recipe.training.steps} already")
        return is_trained
    say(f"{training} is of a fit with other settings; this fit begins anew")
    shutil.rmtree(training)
    return False


def _of_this_fit(training: Path, recipe: Recipe, codes: Codes) -> bool:
    """Whether a training that has begun has these settings, codes, and weights that encoded them."""
    if not (training / run_folder.RECIPE).is_file():
        return False
    tags, train_index = run_folder.read_json(training / run_folder.TAGS), codes["train"].index
    expected = {
        "recipe_hash": recipe.hash,
        "data_hash": train_index.data_hash,
        "val_data_hash": codes["val"].index.data_hash,
        "latents_of": {name: train_index.made.get(name) for name in OF_RUN},
    }
    return all(tags.get(name) == value for name, value in expected.items())


def _saved(trained: Trained, folder: Path, recipe: Recipe, codes: Codes, fit: Fit) -> dict[str, Any]:
    """Measure and save the weights of the training's best step. Returns the result."""
    best = open_trained(Path(recipe.run_dir), which="best", of_latents=True)
    prior = best.model.network
    assert isinstance(prior, CodeTransformer)
    measured = {
        split: evaluate(best.model, in_order(open_split(recipe, split)), seed=fit.seed)["neg_elbo_nats"]
        for split in SPLITS
    }
    nats = {f"prior/{split}_code_nats": value for split, value in measured.items()}
    nats["prior/uniform_code_nats"] = prior.shape.places * math.log(prior.shape.codes)
    details = {
        **prior.shape._asdict(),
        **fit._asdict(),
        **trained.identity,
        "images": [codes[split].index.num_samples for split in SPLITS],
        "mirrored": trained.recipe.data.flip,
        "chosen_step": best.step,
        "code": git_revision(),
        **nats,
    }
    result = {"run": str(trained.folder), **details, "parameters": sum(p.numel() for p in prior.parameters())}

    def save() -> None:
        code_prior.save(prior, folder, details)
        save_result(
            trained.folder,
            f"{code_prior.FOLDER}/result.json",
            result,
            step=trained.step,
            metrics=nats,
            tracking=trained.recipe.tracking,
        )

    comm.on_main(save)
    return result
