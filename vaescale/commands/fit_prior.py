"""Fit an autoregressive prior to the codes of a run: encode its images, train a transformer, keep the weights best for held-out codes.

The state of the fit is a checkpoint in RUN/prior/checkpoints, which the same command continues bit by bit. The order of the images and
dropout's noise are functions of seed, step and slot.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vaescale import noise
from vaescale.aggregate import code_prior
from vaescale.commands.signature import Count, NonNegative, PositiveReal, checked
from vaescale.data.plan import Plan
from vaescale.errors import DataError, NotFinite, UserError
from vaescale.models.quantized import QuantizedVAE
from vaescale.networks.code_transformer import CodeTransformer, Shape
from vaescale.runs import checkpoint
from vaescale.runs.identity import git_revision
from vaescale.runs.results import save_result
from vaescale.system import heartbeat
from vaescale.system.console import Progress, say
from vaescale.system.files import LockHeldError, exclusive
from vaescale.trained import Split, Trained, Weights, Which, in_order, open_split, open_trained
from vaescale.training.config import OptimizerConfig
from vaescale.training.loop import set_learning_rate
from vaescale.training.optimizer import build_optimizer, learning_rate

BETAS, WARMUP_SHARE = (0.9, 0.95), 0.05
MEASURED, SAVED = 20, 10  # times in a fit
LOCK, CHECKPOINTS = ".prior.lock", "checkpoints"
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
METRICS = ("prior/train_code_nats", "prior/val_code_nats", "prior/uniform_code_nats")


class Fit(NamedTuple):
    """How a prior is fitted."""

    steps: int
    batch: int
    lr: float
    weight_decay: float
    dropout: float
    seed: int


class State(NamedTuple):
    """The state of a fit: steps done, the best weights so far, their step and the mean nats of held-out images."""

    done: int
    best: dict[str, Tensor]
    best_step: int
    best_nats: float


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
    weights: Weights = "ema",
    seed: NonNegative = 0,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Train a causal transformer on the codes of a run's training images, and save the weights that are best for held-out codes to RUN/prior.

    width, layers, heads: of the transformer. steps: of AdamW with `batch` images each, warm-up and a cosine; lr, weight_decay,
    dropout: its options. weights: of the run, which encode. A fit that was interrupted continues if its arguments are the same. checkpoint: see `Which`.

    Returns the mean nats of training and held-out codes under the prior and under uniform codes. Raises UserError for a run without codes.
    """
    if width % heads:
        raise UserError(f"--width (={width}) must be a multiple of --heads (={heads})")
    trained = open_trained(run, weights=weights, which=checkpoint)
    trained.announce("fit-prior")
    model = trained.model
    if not isinstance(model, QuantizedVAE):
        raise UserError(
            f"fit-prior needs codes, and {run} has a Gaussian q(z|x) (posterior.kind {trained.recipe.posterior.kind!r}); fit a "
            f"mixture with `vaescale fit-gmm {run}`"
        )
    fit = Fit(steps, batch, lr, weight_decay, dropout, seed)
    shape = code_prior.shape_of(model, width=width, layers=layers, heads=heads)
    folder = trained.folder / code_prior.FOLDER
    folder.mkdir(exist_ok=True)
    try:
        with exclusive(folder / LOCK):
            return _fitted(trained, folder, shape, fit)
    except LockHeldError as error:
        raise UserError(f"another fit-prior is writing to {folder}; wait for it, or end it") from error


def _fitted(trained: Trained, folder: Path, shape: Shape, fit: Fit) -> dict[str, Any]:
    train, val = (_codes_of(trained, split) for split in ("train", "val"))
    if len(train) < fit.batch:
        raise UserError(f"--batch (={fit.batch}) exceeds the {len(train)} training images; lower it")
    settings = {**shape._asdict(), **fit._asdict(), **trained.identity, "images": [len(train), len(val)]}
    prior, state = _train(train, val, folder / CHECKPOINTS, shape, fit, settings, trained.device)
    prior.load_state_dict(state.best)
    nats = {
        "prior/train_code_nats": float(code_prior.nats_in_parts(prior, train).mean()),
        "prior/val_code_nats": float(code_prior.nats_in_parts(prior, val).mean()),
        "prior/uniform_code_nats": shape.places * math.log(shape.codes),
    }
    details = {**settings, "chosen_step": state.best_step, "code": git_revision(), **nats}
    code_prior.save(prior, folder, details)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    result = {"run": str(trained.folder), **details, "parameters": sum(p.numel() for p in prior.parameters())}
    save_result(
        trained.folder,
        f"{code_prior.FOLDER}/result.json",
        result,
        step=trained.step,
        metrics=nats,
        tracking=trained.recipe.tracking,
    )
    return result


@torch.no_grad()
def _codes_of(trained: Trained, split: Split) -> Tensor:
    """The codes of all usable images of a split, int32 [images, N]. Raises DataError without any."""
    model, reader = trained.model, open_split(trained.recipe, split)
    parts = []
    for batch in in_order(reader, workers=trained.recipe.data.workers):
        stream = noise.Stream(trained.recipe.seed, 0, batch.slots.to(trained.device))
        codes = model.encode(model.target(batch.images.to(trained.device), stream)).codes.flatten(1)  # type: ignore[union-attr]
        parts.append(codes[batch.mask.to(codes.device)].int())
    codes = torch.cat(parts)
    if not len(codes):
        raise DataError(
            f"no image of {split} can be used; `vaescale verify-shards DIR --deep` names the faults"
        )
    return codes


def _train(
    train: Tensor,
    val: Tensor,
    folder: Path,
    shape: Shape,
    fit: Fit,
    settings: dict[str, Any],
    device: torch.device,
) -> tuple[CodeTransformer, State]:
    """Train from the newest checkpoint with the same settings, or from the seed's weights. Returns the prior, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        prior = CodeTransformer(shape, dropout=fit.dropout).to(device)
    config = OptimizerConfig(
        lr=fit.lr, betas=BETAS, weight_decay=fit.weight_decay, warmup_steps=round(WARMUP_SHARE * fit.steps)
    )
    optimizer = build_optimizer(prior, config)
    state = _restored(folder, prior, optimizer, settings)
    plan = Plan(np.array([len(train)]), fit.batch, fit.seed)
    slots, first = torch.arange(fit.batch, device=device), state.done + 1
    with Progress(
        "fit-prior", fit.steps, unit="steps", start=state.done, epoch=plan.steps_per_epoch
    ) as progress:
        for step in range(state.done, fit.steps):
            heartbeat.beat("fit-prior")
            set_learning_rate(optimizer, learning_rate(step, config, total_steps=fit.steps))
            rows = torch.from_numpy(plan.samples(step)).to(device)
            prior.train()
            loss = code_prior.nats_of(prior, train[rows].long(), noise.Stream(fit.seed, step, slots)).mean()
            (loss / shape.places).backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            done = step + 1
            if done % -(-fit.steps // MEASURED) == 0 or done == fit.steps:
                _refuse_not_finite(loss, norm, done)
            optimizer.step()
            optimizer.zero_grad()
            if done % -(-fit.steps // MEASURED) == 0 or done == fit.steps:
                state = _measured(prior.eval(), val, state._replace(done=done))
                progress.update(done, f"held-out {state.best_nats:.2f} nats at step {state.best_step}")
            else:
                progress.update(
                    done,
                    "" if done > first else f"loss {float(loss.detach()) / shape.places:.3f} nats a code",
                )
            if done % -(-fit.steps // SAVED) == 0 and done < fit.steps:
                _save(folder, prior, optimizer, state._replace(done=done), settings)
    return prior.eval(), state


def _measured(prior: CodeTransformer, val: Tensor, state: State) -> State:
    """The state with these weights as the best, if held-out codes have fewer nats than before."""
    nats = float(code_prior.nats_in_parts(prior, val).mean())
    if not nats < state.best_nats:
        return state
    best = {name: value.detach().clone() for name, value in prior.state_dict().items()}
    return State(state.done, best, state.done, nats)


def _refuse_not_finite(loss: Tensor, norm: Tensor, done: int) -> None:
    if not bool(torch.isfinite(loss + norm)):
        raise NotFinite(f"loss or gradient of the prior is NaN or Inf at step {done}; lower --lr")


def _named(
    prior: CodeTransformer, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """Each parameter with its name and its state in the optimizer."""
    for name, parameter in prior.named_parameters():
        yield name, parameter, optimizer.state[parameter]


def _save(
    folder: Path,
    prior: CodeTransformer,
    optimizer: torch.optim.Optimizer,
    state: State,
    settings: dict[str, Any],
) -> None:
    moments = {
        f"{name}/{key}": value
        for name, _, values in _named(prior, optimizer)
        for key, value in values.items()
    }
    tensors = {"model": prior.state_dict(), "optimizer": moments, "best": state.best}
    content = {"settings": settings, "best_step": state.best_step, "best_nats": state.best_nats}
    checkpoint.write(folder, state.done, tensors, content, keep=checkpoint.Keep(1))


def _restored(
    folder: Path, prior: CodeTransformer, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> State:
    """Load the newest checkpoint of a fit with the same settings; of another fit, delete it."""
    saved = checkpoint.newest(folder)
    if saved is None:
        return State(0, prior.state_dict(), 0, math.inf)
    content = saved.state()
    if content.get("settings") != settings:
        say(f"{folder} is of a fit with other settings; this fit begins anew")
        shutil.rmtree(folder)
        return State(0, prior.state_dict(), 0, math.inf)
    checkpoint.load_weights(prior, saved, "model")
    moments = saved.tensors("optimizer")
    for name, parameter, values in _named(prior, optimizer):
        values |= {
            key: moments[f"{name}/{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
        }
    best = {name: value.to(next(prior.parameters()).device) for name, value in saved.tensors("best").items()}
    say(f"fit-prior continues from step {saved.step}")
    return State(saved.step, best, int(content["best_step"]), float(content["best_nats"]))
