"""Compare the adversarial and the quantized autoencoders with the VAE of optimal sigma, at equal steps: a table and a picture.

    vaescale make-shards idx:DOWNLOADED_FOLDER data/mnist --holdout 0
    vaescale train-features data/mnist/train --out features/mnist
    python -m tools.studies.hybrids mnist

    vaescale make-shards stacked:DOWNLOADED_FOLDER data/stacked_mnist --holdout 0
    python -m tools.studies.hybrids stacked_mnist         1,000 modes; its channels are judged by features/mnist

    vaescale make-shards hf:uoft-cs/cifar10 data/cifar10 --size 32
    vaescale train-features data/cifar10/train --out features/cifar10 --width 16 --steps 500
    python -m tools.studies.hybrids cifar10

Trains each recipe of recipes/hybrids for each seed by `vaescale train`, then calls `evaluate`, and `fit-gmm` or, for codes, `fit-prior`, and
`quality`. Finished runs and their results are reused. Writes table.md and samples.png to --out.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.studies import modes
from tools.studies.runs import Trained, call, train
from vaescale import figures, noise
from vaescale.aggregate import code_prior
from vaescale.aggregate.sampling import Prior, from_latents
from vaescale.config import Window
from vaescale.errors import UserError
from vaescale.evaluation.comparison import to_levels
from vaescale.mixtures import files as mixture_files
from vaescale.models.units import to_unit
from vaescale.perceptual import classifier
from vaescale.runs.folder import read_json, write_json
from vaescale.trained import Trained as Opened
from vaescale.trained import in_order, open_split, open_trained

RECIPES = Path("recipes/hybrids")
CODES = ("vq_vae", "fsq")
KINDS = ("optimal", "adversarial", "aae", "vae_gan", "alpha_gan", "veegan", *CODES)
SHOWN = 12
STACKED, EVALUATED = "stacked_mnist", "evaluation/val.json"
SCORES = ("frechet", "precision", "recall")
# Rows of `quality`.
HELD_OUT, RECONSTRUCTIONS, PRIOR, AUTOREGRESSIVE = (
    "held-out images",
    "reconstructions",
    "prior",
    "autoregressive prior",
)
COLOUR = ("data.channels=3",)


class Setting(NamedTuple):
    """A data set of the study. keys: overrides of all recipes; of_vectors, of_codes: of those with Gaussian latents and with codes.

    kinds: labels, with a recipe and overrides each.
    """

    kinds: dict[str, tuple[str, tuple[str, ...]]]
    keys: tuple[str, ...] = ()
    of_vectors: tuple[str, ...] = ()
    of_codes: tuple[str, ...] = ()


def of_set(name: str) -> tuple[str, str]:
    """The overrides that choose a data set of this name."""
    return f"data.train=data/{name}/train", f"data.val=data/{name}/test"


def steps(number: int) -> tuple[str, ...]:
    """The overrides for another length of training."""
    return tuple(f"training.{key}={number}" for key in ("steps", "evaluate_every", "checkpoint_every"))


ALL: dict[str, tuple[str, tuple[str, ...]]] = {kind: (kind, ()) for kind in KINDS}
SETTINGS = {
    "mnist": Setting(ALL),
    "cifar10": Setting(
        ALL | {"adversarial": ("adversarial", ("objective.adversarial.start_step=120",))},
        (*of_set("cifar10"), *COLOUR, "data.image_size=32", "optimizer.clip_norm=100000", *steps(400)),
        ("network.widths=[24,48,96]", "network.latent_dim=64"),
        ("network.widths=[48,96]",),
    ),
    STACKED: Setting(
        {
            "optimal": ("optimal", ()),
            "gan": ("vae_gan", ("objective.gamma=1e-6",)),
            "veegan": ("veegan", ()),
        },
        (*of_set("stacked_mnist"), *COLOUR),
        ("network.latent_dim=64",),
    ),
}


def main() -> None:
    """Train and judge the missing runs, then write the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("set", choices=SETTINGS, help="data set")
    add("--out", type=Path, help="folder to write to; default: runs/hybrids-SET, with a suffix for overrides")
    add("--only", metavar="KIND,KIND", help="only these kinds")
    add("--seeds", default="0,1", metavar="N,N", help="seeds of training; default: 0,1")
    add("--features", metavar="DIR", help="features of `quality`; default: features/SET")
    add("--digits", type=Path, default="features/mnist", help="classifier of stacked_mnist's channels")
    add("--count", type=int, default=4000, metavar="N", help="samples of each kind; default: 4000")
    add(
        "--mode-count", type=int, default=26000, metavar="N", help="samples to count modes of; default: 26000"
    )
    add("--components", type=int, default=50, metavar="K", help="components of the mixtures; default: 50")
    add(
        "--prior-steps",
        type=int,
        default=1000,
        metavar="S",
        help="training steps of `fit-prior`; default: 1000",
    )
    add("--no-mlflow", action="store_true", help="do not log the runs")
    add("overrides", nargs="*", metavar="key=value", help="recipe keys to override in all runs")
    arguments = parser.parse_intermixed_args()
    try:
        study(arguments)
    except UserError as error:
        sys.stderr.write(f"hybrids.py: {error}\n")
        sys.exit(error.exit_code)


def study(arguments: argparse.Namespace) -> None:
    """Train and judge the runs of each kind and seed, then write the table and the figure."""
    setting = SETTINGS[arguments.set]
    changed = "".join(f"-{re.sub('[^A-Za-z0-9._]+', '_', override)}" for override in arguments.overrides)
    out: Path = arguments.out or Path(f"runs/hybrids-{arguments.set}{changed}")
    kinds = arguments.only.split(",") if arguments.only else list(setting.kinds)
    if unknown := [kind for kind in kinds if kind not in setting.kinds]:
        raise UserError(f"--only {unknown[0]} is unknown; {arguments.set} has {', '.join(setting.kinds)}")
    runs: dict[str, list[Trained]] = {kind: [] for kind in kinds}
    for seed in arguments.seeds.split(
        ","
    ):  # all kinds of a seed first: a study that is stopped has whole seeds
        for kind in kinds:
            runs[kind].append(train_and_judge(arguments, kind, int(seed), changed))
    out.mkdir(parents=True, exist_ok=True)
    if arguments.set == STACKED:
        text = table_of_modes({kind: modes_of(runs[kind], arguments) for kind in kinds})
    else:
        text = table({kind: [results(run) for run in runs[kind]] for kind in kinds})
    (out / "table.md").write_text(text)
    sys.stdout.write(text)
    draw(out / "samples.png", {kind: runs[kind][0] for kind in kinds}, title=f"{arguments.set}, seed {seed}")


def train_and_judge(arguments: argparse.Namespace, kind: str, seed: int, changed: str) -> Trained:
    """A run of the study. What fit-gmm, fit-prior, evaluate and quality have written is reused."""
    setting = SETTINGS[arguments.set]
    recipe, keys_of_kind = setting.kinds[kind]
    keys = [f"name=hybrids-{arguments.set}-{kind}-{seed}{changed}", f"seed={seed}", *setting.keys]
    keys += [*(setting.of_codes if recipe in CODES else setting.of_vectors), *keys_of_kind]
    keys += [*(["tracking.mlflow=null"] if arguments.no_mlflow else []), *arguments.overrides]
    run = train(kind, RECIPES / f"{recipe}.yaml", keys)
    folder = str(run.folder)
    if not (run.folder / EVALUATED).exists():
        if recipe in CODES:
            call("fit-prior", folder, "--steps", str(arguments.prior_steps))
        else:
            call("fit-gmm", folder, "--components", str(arguments.components))
        call("evaluate", folder)
    features = arguments.features or f"features/{arguments.set}"
    if arguments.set != STACKED and not judged(run.folder):
        call("quality", folder, "--features", features, "--count", str(arguments.count), "--decode", "mean")
    return run


def judged(folder: Path) -> list[Path]:
    """The results of `quality` of a run."""
    return sorted((folder / "evaluation").glob("quality-*.json"))


def results(run: Trained) -> dict[str, dict[str, float]]:
    """The numbers of a run by what they are of: images, reconstructions, and samples of each prior. Bounds are with their prior."""
    (path,) = judged(run.folder)
    rows = {row["of"]: {score: float(row[score]) for score in SCORES} for row in read_json(path)["rows"]}
    metrics = read_json(run.folder / EVALUATED)["metrics"]
    rows[RECONSTRUCTIONS]["psnr_db"] = metrics["psnr_db"]
    for source, prefix in ((PRIOR, ""), (AUTOREGRESSIVE, "autoregressive_")):
        if f"{prefix}bits_per_dim" in metrics:
            rows[source] |= {name: metrics[prefix + name] for name in ("neg_elbo_nats", "bits_per_dim")}
    return rows


def table(runs: Mapping[str, Sequence[dict[str, dict[str, float]]]]) -> str:
    """The table as Markdown: means over seeds, and half the range."""
    lines = [
        "| kind | pictures | Frechet distance | precision | recall | -bound (nats) | bits/dim | PSNR (dB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, (kind, seeds) in enumerate(runs.items()):
        for source in seeds[0]:
            if number and source == HELD_OUT:
                continue
            columns = (
                *((score, 3) for score in SCORES),
                ("neg_elbo_nats", 1),
                ("bits_per_dim", 3),
                ("psnr_db", 1),
            )
            cells = [spread([seed[source].get(name) for seed in seeds], digits) for name, digits in columns]
            lines.append(f"| {'' if source == HELD_OUT else kind} | {source} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None], digits: int) -> str:
    """The mean and, of several values, half their range; empty where a value is absent."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    half = (max(known) - min(known)) / 2
    return f"{statistics.fmean(known):.{digits}f}" + (f" +- {half:.{digits}f}" if len(known) > 1 else "")


def modes_of(runs: Sequence[Trained], arguments: argparse.Namespace) -> dict[str, list[modes.Modes]]:
    """The modes of held-out images and of the samples of each prior, one for each run. Results are kept in the run folders."""
    digits, shape, _ = classifier.load(arguments.digits)
    possible = shape.classes**3
    found: dict[str, list[modes.Modes]] = {}
    for run in runs:
        for source, pictures in pictures_of(run, arguments.mode_count).items():
            kept = run.folder / f"evaluation/modes-{source.replace(' ', '-')}-{arguments.mode_count}.json"
            if not kept.exists():
                labels = torch.cat([modes.stacked(to_levels(batch, Window()), digits) for batch in pictures])
                write_json(kept, modes.of_labels(labels, possible)._asdict())
            found.setdefault(source, []).append(modes.Modes(**read_json(kept)))
    return found


def table_of_modes(kinds: Mapping[str, Mapping[str, Sequence[modes.Modes]]]) -> str:
    """The table of modes as Markdown: means over seeds, and half the range."""
    lines = ["| kind | samples of | samples | modes found | KL to uniform (nats) |", "|---|---|---|---|---|"]
    for number, (kind, sources) in enumerate(kinds.items()):
        for source, seeds in sources.items():
            if number and source == HELD_OUT:
                continue
            count = spread([float(each.found) for each in seeds], 0 if len(seeds) == 1 else 1)
            nats = spread([each.kl_nats for each in seeds], 3)
            lines.append(
                f"| {'' if source == HELD_OUT else kind} | {source} | {seeds[0].samples} | {count} of {seeds[0].possible} | {nats} |"
            )
    return "\n".join(lines) + "\n"


def pictures_of(run: Trained, count: int) -> dict[str, Iterator[Tensor]]:
    """Held-out images, at most `count`, and as many decoded means of samples of each prior, in batches [B, C, H, W]."""
    opened = open_trained(run.folder)
    images = (to_unit(batch.images[batch.mask]) for batch in in_order(open_split(opened.recipe, "val")))
    return {HELD_OUT: images} | {
        source: _means(opened, prior, count) for source, prior in priors_of(opened).items()
    }


def priors_of(opened: Opened) -> dict[str, Prior]:
    """The model's prior, and the mixture of fit-gmm or the prior of fit-prior."""
    if opened.model.num_codes:
        return {PRIOR: None, AUTOREGRESSIVE: code_prior.load(opened.folder, opened.model, opened.identity)}
    mixture = mixture_files.load(opened.folder / "gmm", **opened.identity)
    return {PRIOR: None, f"mixture of {len(mixture.weights)}": mixture}


@torch.no_grad()
def _means(opened: Opened, prior: Prior, count: int) -> Iterator[Tensor]:
    for first in range(0, count, modes.BATCH):
        stream = noise.Stream(0, 0, torch.arange(first, min(count, first + modes.BATCH)))
        yield opened.model.likelihood.mean(from_latents(opened.model, prior, stream))


def draw(path: Path, runs: Mapping[str, Trained], *, title: str) -> None:
    """Draw held-out images, and of each kind their reconstructions and samples of both priors, as decoded means."""
    rows: list[tuple[str, NDArray[np.float32]]] = []
    for kind, run in runs.items():
        opened = open_trained(run.folder)
        images = next(in_order(open_split(opened.recipe, "val"))).images[:SHOWN]
        strips = {"images": to_unit(images), "reconstructions": _reconstructed(opened, images)}
        strips |= {source: next(_means(opened, prior, SHOWN)) for source, prior in priors_of(opened).items()}
        white = torch.ones_like(strips["images"][:1])
        rows = rows or [(HELD_OUT, strips["images"].numpy())]
        joined = torch.cat(
            [part for name, strip in strips.items() if name != "images" for part in (strip, white)][:-1]
        )
        rows.append((kind, joined.clamp(0, 1).float().numpy()))
    heading = (
        f"{title}: reconstructions | samples of the prior | of the mixture or the autoregressive prior; means"
    )
    figures.image_strips(path, rows, title=heading)


@torch.no_grad()
def _reconstructed(opened: Opened, images: Tensor) -> Tensor:
    x = opened.model.target(images, noise.Stream(0, 0, torch.arange(len(images))))
    means: Tensor = opened.model.likelihood.mean(opened.model.reconstruct(x))
    return means


if __name__ == "__main__":
    main()
