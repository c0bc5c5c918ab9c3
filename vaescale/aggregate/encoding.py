"""Encode every image of a data set to shards of latents, or of codes: one for each shard of images, written by one rank.

The joint q(z|x) of several groups of a ladder is not Gaussian, so for these the shards hold draws.

The latents of a shard do not depend on the rank that writes them. A note for each shard (`.NAME.json`) names its origin, so that
a second start writes only missing shards; index.json comes last. One job writes in a folder at a time, under the lock file
`.FOLDER.lock` beside it; a second job waits and uses the shards of the first.

    E[z_c] = E_x[mu_c],    Var[z_c] = E_x[mu_c^2 + sigma_c^2] - E[z_c]^2              over images, and places of a map
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.data.code_shards import MIRRORED, CodeShards, open_codes, write_codes
from vaescale.data.index import CODES, INDEX, Shard, ShardIndex
from vaescale.data.latent_shards import LatentShards, open_latents, write_latent_index, write_latents
from vaescale.errors import DataError, TrainingStopped
from vaescale.models.quantized import QuantizedVAE
from vaescale.models.units import mirrored
from vaescale.models.vae import VAE
from vaescale.system import heartbeat
from vaescale.system.console import say
from vaescale.system.files import LockHeldError, exclusive, strict_json, write_whole


class Note(NamedTuple):
    """The note of a written shard: its row, or None where no image could be used; the number of skipped images; the number of
    values of a channel, over images and places; and, by channel, their sums of mean and of mean^2 + variance, none of codes.
    """

    shard: Shard | None
    skipped: int
    values: int
    sums: list[float]
    squares: list[float]


@torch.no_grad()
def encode(
    model: VAE,
    images: ShardIndex,
    batches: Callable[[Iterable[int]], Iterable[tuple[int, Batch]]],
    folder: Path,
    *,
    seed: int,
    made: dict[str, Any],
    draw_seed: int = 0,
    groups: int = 1,
    draws: int = 0,
) -> LatentShards:
    """Write q(z|x) of every image to `folder`. All ranks call it. Existing shards of the same origin are kept.

    batches: a function from shard numbers to batches with the number of their shard. made: entries of the index that describe
    the model and the images; shards with other entries are written again. groups, draws, draw_seed: of a ladder, the number of
    first groups and of their joint draws for each image, and the seed of the draws.
    Returns them with `made` grown by latent_shape, skipped, and by channel mean and
    std of the aggregate posterior. Raises TrainingStopped when the encoder returns NaN or Inf, DataError when no image can be
    used.
    """
    if groups > 1:
        size = sum(model.group_sizes[:groups])
        made = {**made, "latent_shape": [size], "groups": groups, "draws": draws, "draw_seed": draw_seed}
    else:
        made = {**made, "latent_shape": list(model.latent_shape)}
    _encode(model, images, batches, folder, seed, made)
    return open_latents(folder)


@torch.no_grad()
def encode_codes(
    model: QuantizedVAE,
    images: ShardIndex,
    batches: Callable[[Iterable[int]], Iterable[tuple[int, Batch]]],
    folder: Path,
    *,
    seed: int,
    made: dict[str, Any],
    mirrored: bool = False,
) -> CodeShards:
    """Write the codes of every image to `folder`, as `encode` writes latents. All ranks call it.

    mirrored: after those of each image, also those of its mirror image. Returns them with `made` grown by codes, code_shape and skipped.
    """
    shape = list(model.latent_shape[1:])
    made = {**made, "kind": CODES, "codes": model.num_codes, "code_shape": shape}
    _encode(model, images, batches, folder, seed, {**made, "flip": "both" if mirrored else "none"})
    return open_codes(folder)


def _encode(
    model: VAE,
    images: ShardIndex,
    batches: Callable[[Iterable[int]], Iterable[tuple[int, Batch]]],
    folder: Path,
    seed: int,
    made: dict[str, Any],
) -> None:
    """Write latents or codes of every image, as `made` says, unless they are there."""
    if comm.on_main(lambda: is_complete(folder, made)):
        return
    with alone_in(folder):
        if comm.on_main(lambda: is_complete(folder, made)):  # another process may have written them meanwhile
            return
        comm.on_main(
            lambda: (folder / INDEX).unlink(missing_ok=True)
        )  # it would describe shards that are about to change
        notes = comm.together(lambda: _encode_shards(model, images, batches, folder, seed, made))
        every_note: dict[int, Note] = {}
        for notes_of_rank in comm.gather_object(notes):
            every_note |= notes_of_rank
        ordered = [every_note[number] for number in sorted(every_note)]
        comm.on_main(lambda: _finish(folder, ordered, images, made))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one encoding job write in a folder. Rank 0 holds the lock for all ranks, until all have written.

    Another job waits in rounds of a second, because a collective would time out before an encoding ends.
    """
    reported = False

    def hold() -> bool:
        nonlocal reported
        try:
            held.enter_context(exclusive(folder.with_name(f".{folder.name}.lock"), wait_seconds=1.0))
        except LockHeldError as error:
            if not reported:
                say(f"another process encodes to {folder} ({error.holder}); waiting until it has ended")
            reported = True
            return False
        return True

    with ExitStack() as held:
        while not comm.on_main(hold):
            heartbeat.beat("waiting for another process that encodes")
        yield


def is_complete(folder: Path, made: dict[str, Any]) -> bool:
    """Return whether the folder holds latents or codes of this origin, each file in its full size."""
    try:
        latents = open_codes(folder) if made.get("kind") == CODES else open_latents(folder)
    except DataError:
        return False
    sizes = {shard.name: shard.bytes for shard in latents.index.shards}
    sizes |= {shard.entries_name: shard.entries_bytes for shard in latents.index.shards}
    try:
        is_whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return False
    return is_whole and all(latents.index.made.get(name) == value for name, value in made.items())


def _encode_shards(
    model: VAE,
    images: ShardIndex,
    batches: Callable[[Iterable[int]], Iterable[tuple[int, Batch]]],
    folder: Path,
    seed: int,
    made: dict[str, Any],
) -> dict[int, Note]:
    """Encode the shards of this rank (rank, rank + world size, ...) that no earlier start has written."""
    mine = range(comm.rank(), len(images.shards), comm.world_size())
    notes = {number: note for number in mine if (note := _kept(folder, images.shards[number], made))}
    missing = [number for number in mine if number not in notes]
    waiting: list[tuple[Batch, Tensor]] = []
    done = 0
    for number, batch in batches(missing):
        waiting.append((batch, _moments(model, batch, seed, made)))
        done += len(batch.slots)
        if done == images.shards[number].samples:
            notes[number] = _write(folder, images.shards[number], waiting, made)
            waiting, done = [], 0
    return notes


def _moments(model: VAE, batch: Batch, seed: int, made: dict[str, Any]) -> Tensor:
    """Mean and log variance of each q(z|x), float32 [B, 2, *latent_shape] on the CPU; or draws [B, S, Z]; or codes int32 [B, V, h, w], of
    each image and, with V = 2, of its mirror image.
    """
    device = next(model.parameters()).device
    stream = noise.Stream(seed, 0, batch.slots.to(device))
    pixels = batch.images.to(device)
    model = model.given(model.condition_of(batch.labels, batch.vectors))
    if made.get("kind") == CODES:
        views = (pixels, mirrored(pixels)) if made["flip"] == "both" else (pixels,)
        codes = [model.encode(model.target(view, stream)).codes for view in views]  # type: ignore[union-attr]
        return torch.stack(codes, dim=1).int().cpu()
    x = model.target(pixels, stream)
    if made.get("draws"):
        draw_stream = stream._replace(seed=made["draw_seed"])
        moments = model.joint_draws(x, draw_stream, made["draws"], made["groups"]).float().cpu()
    else:
        q = model.posterior(x)
        both = [q.mu.expand_as(q.log_sigma), 2 * q.log_sigma.expand_as(q.mu)]
        moments = torch.stack(both, dim=1).float().cpu()
    if not torch.isfinite(moments[batch.mask]).all():
        raise TrainingStopped("the encoder returns NaN or Inf; train again with a lower optimizer.lr")
    return moments


def _write(folder: Path, source: Shard, parts: list[tuple[Batch, Tensor]], made: dict[str, Any]) -> Note:
    used = torch.cat([batch.mask for batch, _ in parts])
    moments = torch.cat([moments for _, moments in parts])[used]
    keys = [key for batch, _ in parts for key in batch.keys]
    labels = torch.cat([batch.labels for batch, _ in parts])[used]
    skipped = int((~used).sum())
    usable_keys = [key for key, usable in zip(keys, used.tolist(), strict=True) if usable]
    if made.get("kind") == CODES:
        views = moments.shape[1]
        shard = None
        if len(moments):
            shard = write_codes(
                folder,
                source.name,
                keys=[key + MIRRORED * view for key in usable_keys for view in range(views)],
                labels=np.repeat(labels.numpy(), views),
                codes=moments.flatten(0, 1).numpy(),
            )
        return _noted(folder, source, made, Note(shard, skipped, 0, [], []))
    if made.get("draws"):
        mean, square = moments.double().mean(1), moments.double().square().mean(1)
    else:
        mean, log_variance = moments.double().unbind(1)
        square = mean.square() + log_variance.exp()
    by_channel = [tensor.movedim(1, 0).flatten(1).sum(1).tolist() for tensor in (mean, square)]
    shard = None
    if len(moments):
        shard = write_latents(
            folder,
            source.name,
            keys=usable_keys,
            labels=labels.numpy(),
            moments=moments.numpy(),
            draws=bool(made.get("draws")),
        )
    places = moments[0, 0, 0].numel() if len(moments) else 0
    return _noted(folder, source, made, Note(shard, skipped, len(moments) * places, *by_channel))


def _noted(folder: Path, source: Shard, made: dict[str, Any], note: Note) -> Note:
    """Write the note beside the shard."""
    shard = note.shard
    content = {"origin": _origin(source, made), "note": note._asdict() | {"shard": shard}}
    write_whole(folder / f".{source.name}.json", strict_json(content).encode())
    return note


def _kept(folder: Path, source: Shard, made: dict[str, Any]) -> Note | None:
    """The note of an earlier start with the same origin, or None if it is missing or its shard is not complete."""
    try:
        content = json.loads((folder / f".{source.name}.json").read_bytes())
        note = Note(**content["note"])
        note = note._replace(shard=note.shard and Shard(*note.shard))
        if content["origin"] != _origin(source, made):
            return None
        if note.shard is not None:
            for name, sha256 in (
                (note.shard.name, note.shard.sha256),
                (note.shard.entries_name, note.shard.entries_sha256),
            ):
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                    return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return note


def _origin(source: Shard, made: dict[str, Any]) -> str:
    origin = json.dumps([made, source], sort_keys=True)
    return hashlib.sha256(origin.encode()).hexdigest()


def _finish(folder: Path, notes: list[Note], images: ShardIndex, made: dict[str, Any]) -> None:
    shards = [note.shard for note in notes if note.shard is not None]
    if not shards:
        raise DataError(
            f"no image of {images.place} could be used; `vaescale verify-shards {images.place} --deep` names the faults"
        )
    skipped = {"skipped": sum(note.skipped for note in notes)}
    if made.get("kind") == CODES:
        write_latent_index(folder, shards, images.class_names, made | skipped)
        _forget_notes(folder)
        return
    count = sum(note.values for note in notes)
    mean, square = (
        np.sum(list(columns), axis=0) / count
        for columns in ([note.sums for note in notes], [note.squares for note in notes])
    )
    measured = {
        **skipped,
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0.0)).tolist(),
    }
    write_latent_index(folder, shards, images.class_names, {**made, **measured})
    _forget_notes(folder)


def _forget_notes(folder: Path) -> None:
    for note in folder.glob(".*.tar.json"):
        note.unlink(missing_ok=True)
