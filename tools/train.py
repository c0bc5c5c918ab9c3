"""Train a recipe, or continue a run that stopped: the same command does both.

Any key of the recipe can be overridden: `optimizer.lr=1e-3 training.steps=2000 run_dir=runs/again`. On several
processes: `accelerate launch --config_file recipes/backends/cpu2.yaml -m vaescale train RECIPE`, or with ddp.yaml,
zero1.yaml, zero2.yaml, zero3.yaml, fsdp2.yaml or multi_node.yaml; with DDP also `torchrun --nproc-per-node 2 -m vaescale train RECIPE`. The training curve does not depend on the number of
processes, and a run may continue on another number.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

SHIPPED = "one that comes with the package, such as vaescale:digits/optimal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, overrides and options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help=f"a YAML file, or {SHIPPED}")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="recipe keys to override")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the plan, and stop"
    )
    parser.add_argument(
        "--time-steps",
        action="store_true",
        help="with --dry-run: train three steps in memory, and print the seconds of a step and of all steps",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue in the run folder although its recipe or data have changed",
    )
    parser.add_argument(
        "--expect-processes",
        type=int,
        metavar="N",
        help="refuse to run on another number of processes than N; `vaescale launch --processes N` starts so many",
    )
    # Its name in earlier versions; that of `launch` asks for processes, this one checks them.
    parser.add_argument("--processes", dest="expect_processes", type=int, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, or describe what training would do. Returns the summary, or the recipe and the plan."""
    from vaescale.errors import UserError
    from vaescale.recipe import load_recipe

    if arguments.time_steps and not arguments.dry_run:
        raise UserError("--time-steps is for --dry-run; training itself reports its seconds for each step")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    # Imports torch, which takes seconds: a wrong recipe is answered before.
    from vaescale.commands.train import describe, train

    if arguments.dry_run:
        return describe(
            recipe,
            processes=arguments.expect_processes,
            allow_changes=arguments.allow_changes,
            time_steps=arguments.time_steps,
        )
    return train(recipe, processes=arguments.expect_processes, allow_changes=arguments.allow_changes)


def show(result: dict[str, Any]) -> None:
    """Print the recipe and the plan of a dry run, or a run's held-out numbers and the next commands."""
    from vaescale.system.console import say, table

    if "plan" in result:
        import yaml

        sys.stdout.write(yaml.safe_dump(result["recipe"], sort_keys=False))
        table(
            "\nplan",
            [
                (name.removesuffix("_bytes"), _formatted(name, value))
                for name, value in result["plan"].items()
                if name != "mixture_sets"  # `mixture` says it
            ],
        )
        return
    metrics = result.get("val", {})
    if "neg_profile_elbo_nats" in metrics:
        say("no bound: sigma is fitted to each image itself, so the numbers do not apply to unseen images")
    if (reached := metrics.get("handover", 1.0)) < 1:
        say(f"the handover reached {reached:.0%}: sigma is not yet entirely the predicted one; train longer")
    rows = [(name, f"{value:.6g}") for name, value in metrics.items()]
    table(f"{result['run_dir']}: held-out data", rows)
    run = result["run_dir"]
    if "latents_of" in result:
        say(f"next: vaescale sample RUN --prior {run}, where RUN is the folder of {result['latents_of']}")
        return
    if "codes_of" in result:
        say(
            f"next: vaescale fit-prior RUN makes such a prior, where RUN is the folder of {result['codes_of']}"
        )
        return
    if any(name.endswith("_per_frame") for name in metrics):
        say(f"next: vaescale evaluate {run} --futures 20; vaescale sample {run}")
        return
    fit = "fit-prior" if "code_usage" in metrics else "fit-gmm"
    of_classes = " --per-class" if result.get("condition") == "class" else ""
    fitting = "" if result.get("condition") == "vector" else f"vaescale {fit} {run}{of_classes}; "
    say(f"next: vaescale evaluate {run}{of_classes}; {fitting}vaescale sample {run}")


def _formatted(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if name == "training_seconds":
        return f"{value / 3600:.1f} hours" if value > 3600 else f"{value:.0f}"
    return f"{value:.3g}" if name.endswith("_seconds") or name.startswith("seconds_") else str(value)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
