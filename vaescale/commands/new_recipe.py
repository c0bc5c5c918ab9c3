"""Write a starter recipe for shards: a convolutional VAE with the optimal sigma, in sizes that their index suggests; of sequences see
`sequence_recipe.py`.

The sizes are those of the recipes in `recipes/` with measured numbers: widths that halve the image down to 4 pixels, as in CelebA's and
CIFAR-10's; they are a beginning, not a search. Imports no torch.
"""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.commands.sequence_recipe import SuggestedSequences, suggest_sequences, text_of_sequences
from vaescale.commands.signature import checked
from vaescale.config import Size, option_of, sides, size_of, size_text
from vaescale.data.index import CODES, LATENTS, SEQUENCES, ShardIndex
from vaescale.data.indexes import open_index
from vaescale.errors import DataError, UserError
from vaescale.recipe import load_recipe
from vaescale.system.files import write_whole

HELD_OUT = ("val", "test")
LARGEST = 128  # of images that the starter's network takes as they are
SMALLER = 64  # the size to which others are resized
LEAST_MAP, MOST_MAP = 4, 16
BATCH, LEAST_STEPS = 128, 10  # images in a step; steps in an epoch
STEPS, MOST_EPOCHS = 3000, 100
MEMORY_BYTES = 2 << 30  # of decoded images, up to which they are kept in memory
CLIP = 10  # nats per dimension
WINDOW = "values outside are clipped, so widen it to what images may have"
WIDTHS = (32, 64, 128, 256, 256, 256)


class Suggested(NamedTuple):
    """What the index suggests. crop: None where the images already have the size; widths: of `network: conv`."""

    image_size: Size
    channels: int
    crop: str | None
    widths: tuple[int, ...]
    latent_dim: int
    global_batch: int
    epochs: float
    steps: int
    in_memory: bool


@checked
def new_recipe(data: str, *, out: Path | None = None, name: str | None = None) -> dict[str, Any]:
    """Write a recipe for DATA/train and DATA/val (or DATA/test), as make-shards writes them, to `out`, by default NAME.yaml.

    name: of the run, by default the folder's. Returns the path, what was found and what was chosen. Raises UserError where the file exists,
    DataError where the shards are missing.
    """
    place = data.rstrip("/")
    found = _name_of(place) if name is None else name
    path = out or Path(f"{found}.yaml")
    if path.exists():
        raise UserError(f"{path} already exists; delete it, or choose another file with -o")
    train, (held_out, val) = _open(place, "train"), _open_held_out(place)
    suggested: Suggested | SuggestedSequences
    if train.made.get("kind") == SEQUENCES:
        suggested = suggest_sequences(train)
        text = text_of_sequences(path, place, found, held_out, train, val, quoted=_yaml)
    else:
        suggested = suggest(train)
        text = _text(path, place, found, held_out, train, val, suggested)
    write_whole(path, text.encode())
    try:
        load_recipe(path)
    except UserError:
        path.unlink()
        raise
    chosen = {key: value for key, value in suggested._asdict().items() if key != "in_memory"}
    return {
        "recipe": str(path),
        "name": found,
        "train_images": train.num_samples,
        "val_images": val.num_samples,
        "stored": "x".join(map(str, train.image)) if train.image else "several sizes",
        "classes": len(train.class_names),
        **chosen,
        "widths": list(suggested.widths),
    }


def suggest(index: ShardIndex) -> Suggested:
    """Sizes of a starter recipe for these training images."""
    height, width, channels = index.image or (0, 0, 3)
    side = min(height, width)
    halvings = len(_widths((height, width))) if index.image else 0
    as_stored = halvings > 0 and max(height, width) <= min(LARGEST, MOST_MAP << halvings)
    square = min(SMALLER, 1 << (side.bit_length() - 1)) if side >= 8 else SMALLER
    size = size_of(height, width) if as_stored else square
    images = index.num_samples
    batch = BATCH
    while batch > 16 and images // batch < LEAST_STEPS:
        batch //= 2
    batch = min(batch, images)
    per_epoch = images // batch
    epochs = min(MOST_EPOCHS, max(1, round(STEPS / per_epoch)))
    latents = (
        16 if min(sides(size)) <= 16 else 32 if channels == 1 else 64 if min(sides(size)) >= SMALLER else 128
    )
    return Suggested(
        image_size=size,
        channels=channels,
        crop=None if as_stored else "square",
        widths=_widths(sides(size)),
        latent_dim=latents,
        global_batch=batch,
        epochs=epochs,
        steps=epochs * per_epoch,
        in_memory=images * channels * math.prod(sides(size)) <= MEMORY_BYTES,
    )


def _yaml(text: str) -> str:
    """The text as YAML reads it back: quoted where it is not plain."""
    is_plain = re.fullmatch(r"[A-Za-z_./~][A-Za-z0-9_./~-]*", text) is not None
    return text if is_plain else json.dumps(text)


def _widths(size: tuple[int, int]) -> tuple[int, ...]:
    """Channels after each halving: down to a map of 4 pixels, or of at least 2 for small images."""
    common, side, halvings = math.gcd(*size), min(size), 0
    while common % 2 == 0 and (side // 2 >= LEAST_MAP or (halvings < 2 and side // 2 >= 2)):
        common, side, halvings = common // 2, side // 2, halvings + 1
    return WIDTHS[1 : halvings + 1] if halvings <= 2 else WIDTHS[:halvings]


def _name_of(place: str) -> str:
    """A name of a run from the last part of a folder or URL."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.rsplit("/", 1)[-1]).strip("-._")
    return name or "mine"


def _open(place: str, split: str) -> ShardIndex:
    try:
        index = open_index(f"{place}/{split}")
    except DataError as error:
        if "://" not in place and (Path(place) / "index.json").is_file():
            above = Path(place).parent
            raise DataError(
                f"{place} is one split; give the folder that holds train and val, such as {above}, or write both recipe keys yourself"
            ) from None
        raise error
    if index.made.get("kind") == CODES:
        raise DataError(f"{place}/{split} holds codes, not images; `vaescale fit-prior RUN` trains on them")
    if index.made.get("kind") == LATENTS:
        raise DataError(
            f"{place}/{split} holds latents, not images; docs/latents_for_diffusion.md has a recipe for these"
        )
    return index


def _open_held_out(place: str) -> tuple[str, ShardIndex]:
    """The name and index of the held-out split: val, or else test."""
    try:
        return HELD_OUT[0], _open(place, HELD_OUT[0])
    except DataError as error:
        missing = error
    try:
        return HELD_OUT[1], _open(place, HELD_OUT[1])
    except DataError:
        raise DataError(
            f"{place} has neither val nor test to evaluate on ({missing}); write it again with `vaescale make-shards ... --holdout 0.05`"
        ) from None


def _text(
    path: Path, place: str, name: str, held_out: str, train: ShardIndex, val: ShardIndex, suggested: Suggested
) -> str:
    """The recipe with a comment for each choice."""
    stored = f"{train.image[0]}x{train.image[1]}" if train.image else "several sizes"
    colours = {1: "grey", 3: "colour"}.get(suggested.channels, f"{suggested.channels} channels")
    values = train.values
    is_deep = values.dtype != "uint8"
    depth = f"\n  dtype: {values.dtype}\n  range: [{values.low:g}, {values.high:g}]" if is_deep else ""
    of_range = (
        f"\n# range: the stored values that become 0 and 1, here those of the training images; {WINDOW}"
        if is_deep
        else ""
    )
    classes = f", {len(train.class_names)} classes" if train.class_names else ""
    dimensions = suggested.channels * math.prod(sides(suggested.image_size))
    small = [side // 2 ** len(suggested.widths) for side in sides(suggested.image_size)]
    every = max(1, suggested.steps // 5)
    crop = f", crop: {suggested.crop}" if suggested.crop else ""
    resized = (
        f"\n# crop: the largest centre square of each image ({stored} stored), resized to {sides(suggested.image_size)[0]}x{sides(suggested.image_size)[1]} whenever it is read; "
        f"`vaescale make-shards ... --size {option_of(suggested.image_size)}`\n#   does so once. Larger sizes: image_size, and a width more for each doubling."
        if suggested.crop
        else ""
    )
    cache = "cache: memory" if suggested.in_memory else "workers: 2"
    kept = (
        "all decoded images stay in memory"
        if suggested.in_memory
        else "processes that read while the model trains"
    )
    return f"""\
# {name}: {train.num_samples:,} training and {val.num_samples:,} held-out images ({held_out}), {stored}, {colours}{classes}.
# Written by `vaescale new-recipe {shlex.quote(place)}`: a starting point. Change what you like; docs/recipe_reference.md lists every key.
#
#   vaescale train {shlex.quote(str(path))} --dry-run --time-steps      the plan, memory and seconds of a step
#   vaescale train {shlex.quote(str(path))}
#   vaescale evaluate runs/{name}
name: {_yaml(name)}
seed: 0

# global_batch: images of a step over all processes. {cache.partition(":")[0]}: {kept}.
# flip: true mirrors a random half: for photographs, not for letters or digits.{resized}{of_range}
data:
  train: {_yaml(f"{place}/train")}
  val: {_yaml(f"{place}/{held_out}")}
  image_size: {size_text(suggested.image_size)}{crop and f"{chr(10)}  {crop.removeprefix(', ')}"}
  channels: {suggested.channels}{depth}
  global_batch: {suggested.global_batch}
  flip: false
  {cache}

# Each width halves the image: {option_of(suggested.image_size)} to {option_of(size_of(*small))} pixels. More latent_dim: sharper reconstructions, a prior that is harder to match.
network: {{kind: conv, latent_dim: {suggested.latent_dim}, widths: [{", ".join(map(str, suggested.widths))}]}}
posterior: {{kind: diagonal}}

# sigma: optimal is the maximum-likelihood noise level, which calibrates reconstruction against KL without a weight (docs/decoders.md).
# `predicted` has one for each pixel; kind: bernoulli is for black and white.
likelihood: {{kind: gaussian, sigma: optimal}}
objective: {{kind: elbo, beta: 1.0}}

# clip_norm_per_dimension: the loss is in nats per image of {dimensions} values, so the gradient norm is clipped at {CLIP} times that, {CLIP * dimensions:,}.
optimizer: {{kind: adamw, lr: 1e-3, warmup_steps: {min(100, max(1, suggested.steps // 10))}, clip_norm_per_dimension: {CLIP}}}

# epochs: {suggested.epochs:g} passes are {suggested.steps:,} steps. Train longer if figures/curves.png still falls at its end;
# a short trial: `vaescale train RECIPE training.epochs=null training.steps=300`.
training: {{epochs: {suggested.epochs:g}, precision: bf16, log_every: {max(1, min(50, suggested.steps // 20))}, evaluate_every: {every}, checkpoint_every: {every}}}
tracking: {{mlflow: "sqlite:///runs/mlflow.db", experiment: {_yaml(name)}}}
"""
