"""Evaluate a run: bounds with the running sigma, what reconstructions are like, and whether the decoder's noise is what it says.

Each image counts once. Writes RUN/evaluation/NAME.json with the protocol beside the numbers, and to RUN/figures the originals with
reconstructions, errors and sigma, and the calibration of p(x|z). Runs on any number of processes:

  vaescale evaluate runs/digits-optimal --importance-samples 1000
  accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale evaluate runs/digits-optimal --data data/other/test
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaescale.data.reader import ShardReader
    from vaescale.trained import Trained

IWAE_PROTOCOL = (
    "-log of the mean importance weight of importance_samples draws, per image; falls with their number. "
    "effective_samples, (sum w)^2 / sum w^2, says how many of them carry it; importance_neg_elbo_nats is the ELBO of the same images "
    "by the same draws, neg_iwae_standard_error the spread over images, not the error of sampling"
)
SHOWN = 12  # images in the picture
FEW_EFFECTIVE = 10
MOST = 10_000_000  # draws, or images
TAKEN = ("val", "train", "val-raw", "train-raw", "latents", "baselines")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, of which images, with which weights, how tightly."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument("--split", choices=("val", "train"), help="default: val")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="other shards than the recipe's, a folder or URL; of the same kind of images",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of what is written, RUN/evaluation/NAME.json (NAME-raw.json of raw weights); default: the split, or data- and the data's folder",
    )
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
    from vaescale.errors import UserError
    from vaescale.training import launch as backends

    for name in ("importance_samples", "importance_images"):
        given = getattr(arguments, name)
        if given is not None and not 1 <= given <= MOST:
            raise UserError(f"--{name.replace('_', '-')} (={given}) must be from 1 to {MOST}")
    if arguments.importance_images and not arguments.importance_samples:
        raise UserError(
            "--importance-images is of how many images the bound is; give --importance-samples too"
        )
    if arguments.data and arguments.split:
        raise UserError("--data and --split both say which images; give one of them")
    arguments.split = arguments.split or "val"
    name = _name(arguments)
    with backends.joined():
        return _evaluate(arguments, name)


def _name(arguments: argparse.Namespace) -> str:
    """Of what is written. Raises UserError for what is no file name, or another result's."""
    from vaescale.errors import UserError

    own = arguments.split
    if arguments.data:
        own = "data-" + Path(arguments.data.partition("?")[0]).name
    name = str(arguments.name or own)
    if name != Path(name).name or name.startswith(".") or name == "data-":
        raise UserError(f"--name {name!r} is no file name; take letters, digits and dashes")
    if name != own and (name in TAKEN or name.startswith("quality-")):
        raise UserError(f"--name {name} is another result's; take another one")
    return name + ("-raw" if arguments.weights == "raw" else "")


def _evaluate(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    from vaescale import comm
    from vaescale.errors import UserError
    from vaescale.evaluation.importance import IMPORTANCE, importance_weighted
    from vaescale.evaluation.likelihood import evaluate, protocol
    from vaescale.evaluation.reconstruction import PROTOCOL, reconstruction
    from vaescale.runs import folder as run_folder
    from vaescale.runs.identity import git_revision
    from vaescale.system.console import say
    from vaescale.system.secrets import redact
    from vaescale.trained import in_order, open_split, open_trained

    trained = open_trained(arguments.run, weights=arguments.weights)
    reader = comm.together(lambda: open_split(trained.recipe, arguments.split, place=arguments.data))
    data, seed, hashed = trained.recipe.data, trained.recipe.seed, reader.index.data_hash
    code = comm.on_main(git_revision)
    earlier = comm.on_main(lambda: run_folder.read_json(trained.folder / "evaluation" / f"{name}.json"))
    if arguments.data and earlier.get("data_hash", hashed) != hashed:
        raise UserError(f"{trained.folder}/evaluation/{name}.json is of other images; give these a --name")
    before = earlier.get("metrics", {}).get("importance_samples", 0)
    if comm.is_main() and before > (arguments.importance_samples or before):
        say(
            f"the bound of {before:.0f} importance samples in evaluation/{name}.json will be replaced by a looser one"
        )
    metrics = evaluate(
        trained.model, in_order(reader, workers=data.workers), seed=seed, max_skipped=data.max_skipped
    )
    words = protocol(trained.model.likelihood)
    if arguments.importance_samples:
        metrics |= importance_weighted(
            trained.model,
            in_order(reader, workers=data.workers),
            seed=seed,
            samples=arguments.importance_samples,
            most_images=arguments.importance_images,
        )
    elif all(
        earlier.get(key) == own
        for key, own in (("weights_hash", trained.weights_hash), ("data_hash", hashed), ("code", code))
    ):  # what took minutes is kept
        metrics |= {key: own for key, own in earlier["metrics"].items() if key in IMPORTANCE}
    measured = {f"evaluation/{name}/": f"images {hashed[:12]}"}
    if "importance_samples" in metrics:
        words["neg_iwae_nats"] = IWAE_PROTOCOL
        bound = f"{metrics['importance_samples']:.0f} importance samples of {metrics['importance_images']:.0f} images"
        measured |= {f"evaluation/{name}/{key}": bound for key in IMPORTANCE}
    pictures = reconstruction(trained.model, in_order(reader, workers=data.workers), seed=seed)
    metrics |= pictures.metrics
    words |= {name: text for name, text in PROTOCOL.items() if any(key.startswith(name) for key in metrics)}
    result = {
        "run": str(trained.folder),
        "data": redact(arguments.data or arguments.split),
        **trained.identity,
        "data_hash": hashed,
        "code": code,
        "protocol": words,
        "measured": measured,
        "metrics": metrics,
        "coverage": pictures.coverage,
    }
    return comm.on_main(lambda: _save(trained, reader, name, result))


def _save(trained: "Trained", reader: "ShardReader", name: str, result: dict[str, Any]) -> dict[str, Any]:
    """JSON, metrics, pictures, MLflow. Returns the result with the pictures' paths."""
    from vaescale import figures
    from vaescale.runs.folder import append_metrics, write_json
    from vaescale.runs.tracking import push

    write_json(trained.folder / "evaluation" / f"{name}.json", result)
    # What is of no split of the recipe has metrics of its own name.
    numbers = {f"evaluation/{name}/{key}": value for key, value in result["metrics"].items()}
    append_metrics(trained.folder, trained.step, numbers)
    suffix = "" if name == "val" else f"-{name}"
    folder = trained.folder / "figures"
    made = [folder / f"reconstructions{suffix}.png"]
    figures.image_rows(
        made[0],
        _rows(trained, reader),
        title=trained.title(f"{result['data']} images, decoded means of q(z|x)'s mean"),
    )
    if result["coverage"]:
        made.append(folder / f"calibration{suffix}.png")
        label = f"{trained.recipe.name}, step {trained.step}"
        title = f"calibration of p(x|z), {Path(result['data']).name} images"
        figures.calibration(made[-1], [(label, result["coverage"])], title=title)
    push(trained.folder, trained.recipe.tracking)
    return {**result, "figures": [str(path) for path in made]}


def _rows(trained: "Trained", reader: "ShardReader") -> list[tuple[str, Any]]:
    """The first images, their reconstructions, the errors, and where it differs from place to place, sigma."""
    import numpy as np
    import torch

    from vaescale import noise
    from vaescale.data.batch import Request

    model = trained.model
    device = next(model.parameters()).device
    numbers = np.arange(min(2 * SHOWN, len(reader)))
    got = reader.__getitems__(Request(numbers, refill=False))
    with torch.no_grad():
        images = got.images[got.usable][:SHOWN].to(device)
        slots = torch.from_numpy(numbers)[got.usable][:SHOWN].to(device)
        originals = model.target(images, noise.Stream(trained.recipe.seed, 0, slots))
        params = model.reconstruct(originals)
        means = model.likelihood.mean(params).float()
        error = (originals - means).abs()
        rows = [("original", originals), ("decoded", means), _scaled("|error|", error)]
        deviation = model.likelihood.deviation(params)
        if deviation is not None and deviation.numel() > 1:
            rows.append(_scaled("sigma", deviation.float().expand_as(means)))
    return [(name, part.float().cpu().numpy()) for name, part in rows]


def _scaled(name: str, values: Any) -> tuple[str, Any]:
    """As black and white, white the largest value."""
    largest = float(values.max())
    return f"{name}, 0 to {largest:.2g}", values.mean(1, keepdim=True) / max(largest, 1e-12)


def show(result: dict[str, Any]) -> None:
    """The numbers as a table."""
    from vaescale.system.console import say, table

    few = result["metrics"].get("effective_samples", FEW_EFFECTIVE)
    if few < FEW_EFFECTIVE:
        say(
            f"of the importance samples {few:.1f} count on average: log p(x) lies noticeably above this bound"
        )
    if result["protocol"]["bound"].startswith("none"):
        say(f"bound: {result['protocol']['bound']}")
    table(
        f"{result['run']}, step {result['step']}, {result['data']} ({result['weights']} weights)",
        [(name, f"{value:.6g}") for name, value in result["metrics"].items()]
        + [("figure", path) for path in result["figures"]],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
