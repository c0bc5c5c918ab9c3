"""Samples from the prior against samples from mixtures of 1, 10, 50 and 100 components: a table and one picture.

    vaescale train recipes/fashion_mnist/optimal.yaml
    vaescale fit-gmm runs/fashion_mnist-optimal --components 1,10,50,100
    python tools/studies/mixtures.py runs/fashion_mnist-optimal --out recipes/fashion_mnist

The Frechet distance is one of pixels: between Gaussians fitted to the 50 first principal components of the held-out images
(PCA of the training images). It compares rows of this table with one another, and with nothing else; no FID of Inception
features is meant. Beside it stands that of the training images, and of the model's reconstructions, which no prior can beat.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaescale import figures, noise
from vaescale.aggregate.information import evenly
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding
from vaescale.data.batch import Request
from vaescale.data.reader import ShardReader
from vaescale.errors import UserError
from vaescale.evaluation.frechet import frechet_distance, moments
from vaescale.mixtures import files
from vaescale.mixtures.gaussian import Mixture
from vaescale.run import Run, open_run, open_split

BATCH, SHOWN = 500, 16
FEATURES = 50


def main() -> int:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("runs/mixtures"), help="default: runs/mixtures")
    parser.add_argument(
        "--count", type=int, default=10_000, help="samples and images of each kind; default: 10000"
    )
    arguments = parser.parse_args()
    try:
        return _study(arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _study(arguments: argparse.Namespace) -> int:
    opened = open_run(arguments.run)
    train, val = (open_split(opened.recipe, split) for split in ("train", "val"))
    folders = sorted(
        (opened.folder / "gmm").glob("components-*"), key=lambda path: int(path.name.partition("-")[2])
    )
    if not folders:
        raise UserError(
            f"fit several mixtures first: `vaescale fit-gmm {opened.folder} --components 1,10,50,100`"
        )
    basis = _basis(torch.cat(list(_images(train, arguments.count))))
    reference = moments(_features(_images(val, arguments.count), basis))
    rows: list[tuple[str, float, float | None, float | None]] = []
    strips = []
    training = frechet_distance(moments(_features(_images(train, arguments.count), basis)), reference)
    rows.append(("training images", training, None, None))
    mixtures: list[tuple[str, Mixture | None]] = [("prior N(0, I)", None)]
    mixtures += [
        (
            f"mixture of {path.name.partition('-')[2]}",
            files.load(path, recipe_hash=opened.recipe.hash, step=opened.step),
        )
        for path in folders
    ]
    decoded = moments(_features(_reconstructions(opened, val, arguments.count), basis))
    rows.append(("reconstructions", frechet_distance(decoded, reference), None, None))
    for name, mixture in mixtures:
        mean, noisy = (
            frechet_distance(
                moments(_features(_samples(opened, mixture, how, arguments.count), basis)), reference
            )
            for how in ("mean", "ancestral")
        )
        rows.append((name, mean, noisy, _held_out(opened, mixture)))
        first = next(_samples(opened, mixture, "mean", SHOWN))
        strips.append((name, first.cpu().numpy()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = "| samples of | Frechet distance, means | ancestral | held-out log density (nats) |\n|---|---|---|---|\n"
    lines = [
        f"| {name} | {mean:.3f} | {'' if noisy is None else f'{noisy:.3f}'} | {'' if nats is None else f'{nats:.2f}'} |"
        for name, mean, noisy, nats in rows
    ]
    table = head + "\n".join(lines) + "\n"
    (arguments.out / "mixtures.md").write_text(table)
    title = f"{opened.recipe.name}, step {opened.step}: decoded means of samples"
    figures.image_strips(arguments.out / "mixtures.png", strips, title=title)
    sys.stdout.write(table)
    return 0


def _images(reader: ShardReader, count: int) -> Iterator[Tensor]:
    """At most so many, at equal distances, float [B, C, H, W] in [0, 1]."""
    for numbers in torch.split(evenly(len(reader), count), BATCH):
        got = reader.__getitems__(Request(np.asarray(numbers), refill=False))
        yield got.images[got.usable].float() / 255


@torch.no_grad()
def _reconstructions(opened: Run, reader: ShardReader, count: int) -> Iterator[Tensor]:
    device = next(opened.model.parameters()).device
    for x in _images(reader, count):
        yield opened.model.likelihood.mean(opened.model.reconstruct(x.to(device))).float()


@torch.no_grad()
def _samples(opened: Run, mixture: Mixture | None, how: str, count: int) -> Iterator[Tensor]:
    """Of seed 0, clamped to [0, 1] as a picture is."""
    device = next(opened.model.parameters()).device
    for slots in torch.split(torch.arange(count, device=device), BATCH):
        stream = noise.Stream(0, 0, slots)
        params = from_latents(opened.model, mixture, stream)
        yield image_of(opened.model.likelihood, params, parse_decoding(how), stream).float().clamp(0, 1)


def _basis(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the first principal components [D, F] of the training images."""
    x = images.flatten(1).double()
    centred = x - x.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return x.mean(0), vectors.flip(1)[:, : min(FEATURES, x.shape[1])]


def _features(images: Iterator[Tensor], basis: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    mean, vectors = basis
    for batch in images:
        yield (batch.flatten(1).double().cpu() - mean) @ vectors


def _held_out(opened: Run, mixture: Mixture | None) -> float:
    """The mean log density of held-out latents, as fit-gmm measured it."""
    from vaescale.training.folder import read_json

    if mixture is None:
        return float(read_json(opened.folder / "gmm" / "selection.json")["prior_val_nats"])
    folder = opened.folder / "gmm" / f"components-{len(mixture.weights)}"
    return float(read_json(folder / "mixture.json")["val_nats"])


if __name__ == "__main__":
    sys.exit(main())
