"""Draw samples from a run: z from the prior and, once fitted, the mixture; decoded as mean and as ancestral samples.

A decoder mean is E[x|z]; an ancestral sample adds the decoder's noise, as the model says images come about.
Writes RUN/figures/samples.png. Sample number i is the same whatever --count is.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, count and seed."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument(
        "--count", type=int, default=64, metavar="N", help="samples of each kind; default: 64"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="times the prior's standard deviations, of every group (the mixture's stay what they are); default: 1",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw and write the picture. Returns where it is."""
    import torch

    from vaescale import figures, noise
    from vaescale.aggregate import gmm, samplers
    from vaescale.console import say
    from vaescale.models.flat import FlatVAE
    from vaescale.run import open_run
    from vaescale.training.tracking import push

    if arguments.count < 1:
        raise UserError(f"--count (={arguments.count}) must be at least 1")
    if not 0 < arguments.temperature <= 10:
        raise UserError(f"--temperature (={arguments.temperature}) must be above 0 and at most 10")
    if arguments.seed < 0:
        raise UserError(f"--seed (={arguments.seed}) must be at least 0")
    opened = open_run(arguments.run)
    model = opened.model
    slots = torch.arange(arguments.count, device=next(model.parameters()).device)
    stream = noise.Stream(arguments.seed, 0, slots)
    panels = []
    with torch.no_grad():
        at = "" if arguments.temperature == 1 else f" at temperature {arguments.temperature:g}"
        decoded = {f"prior{at}": model.from_prior(stream, arguments.temperature)}
        if not isinstance(model, FlatVAE):
            say(f"{opened.recipe.network.kind} networks are sampled from their prior alone")
        elif (opened.folder / "gmm").is_dir():
            decoded["mixture"] = model.decode(
                samplers.sample_mixture(stream, gmm.load(opened.folder / "gmm"))
            )
        else:
            say(f"no mixture in {opened.folder}; `vaescale fit-gmm {opened.folder}` adds its samples")
        for name, params in decoded.items():
            panels.append((f"{name}, decoder mean", model.likelihood.mean(params).cpu().numpy()))
            panels.append((f"{name}, ancestral", model.likelihood.sample(params, stream).cpu().numpy()))
    path = opened.folder / "figures" / "samples.png"
    figures.sample_panels(
        path, panels, title=f"{opened.recipe.name}, step {opened.step}, {opened.weights} weights: samples"
    )
    push(opened.folder, opened.recipe.tracking)
    drawn = {"priors": list(decoded), "count": arguments.count, "seed": arguments.seed}
    return {"run": str(opened.folder), "step": opened.step, **drawn, "figure": str(path)}


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
