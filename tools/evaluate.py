"""Evaluate a run: ELBO with the running sigma, and pictures of originals beside their reconstructions.

Writes RUN/evaluation/val.json with the protocol beside the numbers, and RUN/figures/reconstructions.png; other splits
and weights get files of their own.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

IWAE_PROTOCOL = (
    "-log of the mean importance weight of importance_samples draws, per image; falls with their number"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, split and weights."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="default: val")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="default: ema, if the run has them"
    )
    parser.add_argument(
        "--importance-samples",
        type=int,
        metavar="K",
        help="also bound log p(x) with K draws for each image (IWAE); 1000 is usual, and takes K decodings of the data",
    )
    parser.add_argument(
        "--importance-images", type=int, metavar="N", help="of the first N images alone; default: all"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, write, draw. Returns the numbers with their protocol."""
    import torch

    from vaescale import figures, noise
    from vaescale.errors import UserError
    from vaescale.evaluation.importance import importance_weighted
    from vaescale.evaluation.likelihood import evaluate, protocol
    from vaescale.run import in_order, open_run, open_split
    from vaescale.training.folder import write_json
    from vaescale.training.tracking import push

    for name in ("importance_samples", "importance_images"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} (={given}) must be at least 1")
    opened = open_run(arguments.run, weights=arguments.weights)
    reader = open_split(opened.recipe, arguments.split)
    data = opened.recipe.data
    batches = in_order(reader, workers=data.workers)
    metrics = evaluate(opened.model, batches, seed=opened.recipe.seed, max_skipped=data.max_skipped)
    if arguments.importance_samples:
        metrics |= importance_weighted(
            opened.model,
            in_order(reader, workers=data.workers),
            seed=opened.recipe.seed,
            samples=arguments.importance_samples,
            most_images=arguments.importance_images,
        )
    result = {
        "run": str(opened.folder),
        "split": arguments.split,
        "step": opened.step,
        "weights": opened.weights,
        "recipe_hash": opened.recipe.hash,
        "data_hash": reader.index.data_hash,
        "protocol": protocol(opened.model.likelihood)
        | ({"neg_iwae_nats": IWAE_PROTOCOL} if arguments.importance_samples else {}),
        "metrics": metrics,
    }
    name = arguments.split + ("-raw" if arguments.weights == "raw" else "")
    write_json(opened.folder / "evaluation" / f"{name}.json", result)
    with torch.no_grad():
        first = next(in_order(reader))
        shown, device = first.mask, next(opened.model.parameters()).device
        images, slots = (part[shown][:24].to(device) for part in (first.images, first.slots))
        originals = opened.model.target(images, noise.Stream(opened.recipe.seed, 0, slots))
        means = opened.model.likelihood.mean(opened.model.reconstruct(originals))
    title = f"{opened.recipe.name}, step {opened.step}, {opened.weights} weights: {arguments.split} images, decoded means"
    path = (
        opened.folder
        / "figures"
        / ("reconstructions.png" if name == "val" else f"reconstructions-{name}.png")
    )
    figures.reconstructions(path, originals.cpu().numpy(), means.cpu().numpy(), title=title)
    push(opened.folder, opened.recipe.tracking)
    return {**result, "figure": str(path)}


def show(result: dict[str, Any]) -> None:
    """The numbers as a table."""
    from vaescale.console import say, table

    if result["protocol"]["bound"].startswith("none"):
        say(f"bound: {result['protocol']['bound']}")
    table(
        f"{result['run']}, step {result['step']}, {result['split']} ({result['weights']} weights)",
        [(name, f"{value:.6g}") for name, value in result["metrics"].items()]
        + [("figure", result["figure"])],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
