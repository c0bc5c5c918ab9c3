"""The starter recipe for sequences that `new-recipe` writes: the stochastic video model with the optimal sigma. Imports no torch."""

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vaescale.config import Size, size_of, size_text
from vaescale.data.index import ShardIndex
from vaescale.data.sequences import lengths_of, lengths_text
from vaescale.errors import DataError

FRAMES, CONTEXT_SHARE = 15, 3  # of the paper on moving digits and on robots' hands: 5 are given, 10 follow
LARGEST = 128  # of frames that the starter's network takes
LEAST_MAP = 4
WIDTHS = (16, 32, 64, 64, 64)
BATCH, LEAST_STEPS = 16, 10  # sequences in a step; steps in an epoch
STEPS, MOST_EPOCHS = 1000, 100
MEMORY_BYTES = 2 << 30  # of all sequences, up to which they are kept in memory
CLIP = 3  # nats per dimension
LATENTS = 10


class SuggestedSequences(NamedTuple):
    """What the index of sequences suggests. frames: of a sample, `context` and those that are predicted."""

    image_size: Size
    channels: int
    frames: int
    context: int
    widths: tuple[int, ...]
    latent_dim: int
    global_batch: int
    epochs: float
    steps: int
    in_memory: bool


def suggest_sequences(index: ShardIndex) -> SuggestedSequences:
    """Sizes of a starter recipe for these training sequences. Raises DataError for frames that the network does not take."""
    lengths = lengths_of(index)
    assert index.image is not None
    height, width, channels = index.image
    halvings, common, side = 0, math.gcd(height, width), min(height, width)
    while common % 2 == 0 and side // 2 >= LEAST_MAP and halvings < len(WIDTHS):
        halvings, common, side = halvings + 1, common // 2, side // 2
    if not halvings or max(height, width) > LARGEST:
        raise DataError(
            f"{index.place} has frames of {height}x{width} pixels, for which there is no starter recipe; write them again with "
            "--size 64"
        )
    batch = BATCH
    while batch > 2 and index.num_samples // batch < LEAST_STEPS:
        batch //= 2
    batch = min(batch, index.num_samples)
    per_epoch = index.num_samples // batch
    epochs = min(MOST_EPOCHS, max(1, round(STEPS / per_epoch)))
    frames = min(FRAMES, min(lengths))
    total = sum(length * number for length, number in lengths.items())
    return SuggestedSequences(
        image_size=size_of(height, width),
        channels=channels,
        frames=frames,
        context=max(1, frames // CONTEXT_SHARE),
        widths=WIDTHS[:halvings],
        latent_dim=LATENTS,
        global_batch=batch,
        epochs=epochs,
        steps=epochs * per_epoch,
        in_memory=total * math.prod(index.image) <= MEMORY_BYTES,
    )


def text_of_sequences(
    path: Path,
    place: str,
    name: str,
    held_out: str,
    train: ShardIndex,
    val: ShardIndex,
    *,
    quoted: Callable[[str], str],
) -> str:
    """The recipe with a comment for each choice. quoted: a text as YAML has it."""
    one = suggest_sequences(train)
    height, width, _ = train.image or (0, 0, 0)
    every = max(1, one.steps // 5)
    cache, kept = ("cache: memory", "all sequences stay in memory")
    if not one.in_memory:
        cache, kept = ("workers: 2", "processes that read while the model trains")
    return f"""\
# {name}: {train.num_samples:,} training and {val.num_samples:,} held-out sequences ({held_out}) of {lengths_text(lengths_of(train))}, {height}x{width}.
# Written by `vaescale new-recipe {shlex.quote(place)}`: a starting point. Change what you like; docs/recipe_reference.md lists every key.
#
#   vaescale train {shlex.quote(str(path))}
#   vaescale evaluate runs/{name}
#   vaescale sample runs/{name}
name: {quoted(name)}
seed: 0

# frames: of a sample; of a longer sequence, each step takes as many at another place. {cache.partition(":")[0]}: {kept}.
data:
  train: {quoted(f"{place}/train")}
  val: {quoted(f"{place}/{held_out}")}
  holds: sequences
  frames: {one.frames}
  image_size: {size_text(one.image_size)}
  channels: {one.channels}
  global_batch: {one.global_batch}
  {cache}

# context: the frames that are given; horizon: those that are predicted. prior: learned is SVG-LP, fixed is SVG-FP (Denton & Fergus 2018), whose
# widths are [64, 128, 256, 512], features 128 and hidden 256.
network:
  kind: svg
  context: {one.context}
  horizon: {one.frames - one.context}
  prior: learned
  widths: [{", ".join(map(str, one.widths))}]
  features: 64
  hidden: 128
  latent_dim: {one.latent_dim}
posterior: {{kind: diagonal}}

# sigma: optimal is the maximum-likelihood noise level, which calibrates prediction against KL without a weight (docs/decoders.md).
likelihood: {{kind: gaussian, sigma: optimal}}
objective: {{kind: elbo, beta: 1.0}}
optimizer: {{kind: adamw, lr: 2e-3, warmup_steps: {min(50, max(1, one.steps // 10))}, clip_norm_per_dimension: {CLIP}}}

# epochs: {one.epochs:g} passes are {one.steps:,} steps. A short trial: `vaescale train RECIPE training.epochs=null training.steps=100`.
training: {{epochs: {one.epochs:g}, precision: bf16, log_every: {max(1, min(50, one.steps // 20))}, evaluate_every: {every}, checkpoint_every: {every}}}
tracking: {{mlflow: "sqlite:///runs/mlflow.db", experiment: {quoted(name)}}}
"""
