"""Score each image of any source under a run: -ELBO, -log p(x|z), KL, squared error, and how well each tells odd images.

SOURCE is a source of make-shards (digits, idx:PATH, folder:PATH, hf:NAME, ...), a folder or URL of shards, or a folder of
pictures. Images are brought to the run's size as its own were; the result says how. Of each score, a larger value means odd. The
numbers are those of `evaluate` for the same images. Writes only the files that are asked for. Runs on any number of processes:

  vaescale score runs/digits-optimal photos --out scores.csv --maps scored
  vaescale score runs/digits-optimal digits --split val --odd idx:fashion_mnist --odd-split test --complexity png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, the images, the odd ones, the corrections and the files."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    add("source", metavar="SOURCE", help="the images: KIND:PATH, a folder of shards, or a folder of pictures")
    add("--split", metavar="NAME", help="split of SOURCE; default: all")
    add("--odd", metavar="SOURCE2", help="second source, whose images are odd: gives the AUROC of each score")
    add("--odd-split", metavar="NAME", help="split of SOURCE2; default: all")
    odd_class = "class of SOURCE whose images are odd; may be given several times"
    add("--odd-class", metavar="NAME", action="append", default=[], help=odd_class)
    background = "run to divide the likelihood by, trained on perturbed or on general images"
    add("--background", type=Path, metavar="RUN2", help=background)
    complexity = "compressor for the input complexity, which is subtracted from the bound in bits"
    add("--complexity", choices=("png", "webp"), help=complexity)
    sort = "score to sort by, the highest first, or `none` for the source's order; default: negative bound"
    add("--sort", metavar="SCORE", help=sort)
    add(
        "--limit",
        type=integer(1),
        metavar="N",
        help="number of images of each split, the first; default: all",
    )
    crop = "part to resize: square, whole or a number of pixels; default: as the run's images were made"
    add("--crop", metavar="CROP", help=crop)
    filters = ("box", "bilinear", "bicubic", "lanczos")
    add("--resample", choices=filters, help="filter of the resizing; default: as the run's images were made")
    add_weights(parser)
    add("--out", type=Path, metavar="FILE", help="file with a row for each image, .csv or .parquet")
    maps = "folder for pictures of the images with the highest and the lowest score: decoded, error, sigma"
    add("--maps", type=Path, metavar="DIR", help=maps)
    add("--maps-images", type=integer(1, 100), default=8, metavar="N", help="images in each; default: 8")
    add("--histograms", type=Path, metavar="FILE", help="picture of the scores of usual and odd images, .png")
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score the images. Returns the means, the AUROC, and the images of both ends."""
    from vaescale.commands.score import score

    return score(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print what `run` returns."""
    from vaescale.system.console import say, table

    for note in result["notes"]:
        say(note)
    rows = []
    for kind, splits in result["sizing"].items():
        rows += [(f"sizing of {kind}, {split}", _words(how)) for split, how in splits.items()]
    for kind, metrics in result["metrics"].items():
        rows += [(f"{kind}: {name}", f"{value:.6g}") for name, value in metrics.items()]
    for reason, one in result["skipped"].items():
        rows.append((f"cannot be used: {reason}", f"{one['images']}, first: {one['first']}"))
    for one in result["auroc"]:
        value = f"{one['auroc']:.4f}, standard error {one['standard_error']:.4f}"
        rows.append((f"AUROC of {one['score']}", value))
    by = result["sort"] or result["scores"][0]
    for end in ("highest", "lowest"):
        rows += [(f"{end} {by}", f"{row[by]:.6g}  {row['name']}") for row in result[end]]
    paths = [result.get("table"), *result.get("maps", []), result.get("histograms")]
    rows += [("file", path) for path in paths if path]
    table(f"{result['run']}, step {result['step']}, {result['source']} ({result['weights']} weights)", rows)


def _words(sizing: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizing.items() if value is not None)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
