"""Train variants of a recipe: every combination of the values given, one run each, all of them below one run in MLflow.

One after another here, or as files for a cluster: a Slurm array, or a Kubernetes indexed job, of one task a variant. The same
command goes on where it was stopped; variants that are trained are passed over.

  vaescale sweep recipes/digits/optimal.yaml likelihood.sigma=optimal,0.3,predicted seed=0,1
  vaescale sweep recipes/digits/optimal.yaml optimizer.lr=1e-3,2e-3 --launch "accelerate launch --config_file recipes/backends/cpu2.yaml"
  vaescale sweep recipes/imagenet64/ladder.yaml objective.beta=0.5,1,2 --write slurm
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from vaescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE, values, how they are run."""
    parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="a YAML file, such as recipes/digits/optimal.yaml"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=A,B,C",
        nargs="+",
        help="values of a recipe key, each with every other key's; one value alone goes for all",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of the sweep, and what its runs' names begin with; default: the recipe's, with -sweep for the sweep itself",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help='what starts each run, such as "accelerate launch --multi_gpu --num_processes 8"; default: one process',
    )
    parser.add_argument(
        "--write",
        choices=("slurm", "kubernetes"),
        help="instead of training: files for a cluster, to RUNS/NAME/",
    )
    parser.add_argument(
        "--image",
        default="vaescale:latest",
        help="of the containers of --write kubernetes; default: %(default)s",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the variants and stop")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all, or write the files. Returns the variants."""
    from vaescale.commands import sweep as sweeping
    from vaescale.recipe import load_recipe

    base = load_recipe(arguments.recipe)
    name = arguments.name or f"{base.name}-sweep"
    if name != sweeping.slug(name) or name.startswith("."):
        raise UserError(f"--name {name!r} is no file name; take letters, digits and dashes")
    variants = sweeping.variants(arguments.overrides, arguments.name or base.name)
    recipes = [load_recipe(arguments.recipe, variant.overrides) for variant in variants]  # faults come first
    listed: list[dict[str, Any]] = [
        {"name": recipe.name, "run_dir": recipe.run_dir, "overrides": variant.overrides}
        for variant, recipe in zip(variants, recipes, strict=True)
    ]
    folder = Path("runs") / name
    result: dict[str, Any] = {"sweep": name, "variants": listed}
    if arguments.dry_run:
        return result
    if arguments.write:
        launch = arguments.launch or "accelerate launch"
        files = sweeping.cluster_files(
            arguments.write,
            arguments.recipe,
            sweeping.begin(arguments.recipe, variants, recipes, folder),
            [recipe.run_dir for recipe in recipes],
            name=name,
            launch=launch,
            image=arguments.image,
        )
        for file_name, content in files.items():
            (folder / file_name).write_text(content)
        return {**result, "files": [str(folder / file_name) for file_name in files]}
    codes = sweeping.train_all(
        arguments.recipe, variants, recipes, folder, launch=shlex.split(arguments.launch)
    )
    for one, code in zip(listed, codes, strict=True):
        one["exit_code"] = code
    return {**result, "folder": str(folder)}


def exit_code(result: dict[str, Any]) -> int:
    """Of the first variant that failed."""
    return next((one["exit_code"] for one in result["variants"] if one.get("exit_code")), 0)


def show(result: dict[str, Any]) -> None:
    """The variants, and what to do next."""
    from vaescale.system.console import say, table

    def words(one: dict[str, Any]) -> str:
        failed = f"   exit code {one['exit_code']}" if one.get("exit_code") else ""
        return f"{' '.join(one['overrides'][:-1])}{failed}"

    table(result["sweep"], [(one["name"], words(one)) for one in result["variants"]])
    if "files" in result:
        table("files", [(Path(path).name, path) for path in result["files"]])
    elif "folder" in result:
        say(f"next: vaescale compare-runs {result['folder']}")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
