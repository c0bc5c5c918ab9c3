"""Export a trained run for others to use: an MLflow model in a folder, weights in safetensors, no pickle and no code in it.

OUT holds the recipe, the weights of the newest checkpoint (averaged ones, if the run has them) and the mixture; it is a run folder
too, which `vaescale sample OUT/data/run` reads. With --log it also becomes a model of the run in MLflow.

  vaescale export runs/digits-optimal exported/digits
  python -c 'import mlflow, numpy; m = mlflow.pyfunc.load_model("exported/digits"); print(m.predict(numpy.zeros((4, 1, 8, 8), "uint8"), params={"mode": "sample"}).shape)'
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, OUT, weights."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that is not there yet")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="default: ema, if the run has them"
    )
    parser.add_argument("--log", action="store_true", help="also log it to the run's MLflow")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write it. Returns where, and the model's URI in MLflow if it was logged."""
    import shutil
    import tempfile

    from vaescale.mixtures import files as mixture_files
    from vaescale.runs import checkpoint
    from vaescale.runs import folder as run_folder
    from vaescale.runs.mlflow import log_model, save_model
    from vaescale.runs.tracking import TrackingConfig
    from vaescale.system.console import say
    from vaescale.system.files import write_whole
    from vaescale.trained import open_trained

    if arguments.out.exists():
        raise UserError(f"{arguments.out} is there already; delete it or choose another OUT")
    trained = open_trained(arguments.run, weights=arguments.weights)
    uri, known = trained.recipe.tracking.mlflow, run_folder.read_json(trained.folder / "mlflow.json")
    if arguments.log and not (uri and known):
        raise UserError(
            f"{trained.folder} is in no MLflow store; `vaescale sync {trained.folder}` first, or leave --log out"
        )
    shape = trained.model.image_shape
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "run"
        data.mkdir()
        # What is done with an exported run is no run of the experiment.
        alone = trained.recipe.model_copy(update={"tracking": TrackingConfig(mlflow=None)})
        write_whole(data / run_folder.RECIPE, alone.to_yaml().encode())
        tensors = {name: value.cpu() for name, value in trained.model.state_dict().items()}
        state = {
            "recipe_hash": trained.recipe.hash,
            "exported_weights": trained.weights,
            "exported_weights_hash": trained.weights_hash,
        }
        checkpoint.write(
            data / "checkpoints",
            trained.step,
            {"model": tensors, "optimizer": {}},
            state,
            keep=checkpoint.Keep(1, None, None),
        )
        fitted = trained.folder / "gmm"
        if fitted.is_dir() and mixture_files.words(fitted).get("weights", trained.weights) != trained.weights:
            say(f"{fitted} is left out: it was fitted to other weights than the {trained.weights} ones")
        elif fitted.is_dir():
            mixture_files.load(fitted, **trained.identity)
            (data / "gmm").mkdir()
            for name in (mixture_files.TENSORS, mixture_files.WORDS):
                shutil.copyfile(fitted / name, data / "gmm" / name)
        details = {"run": trained.recipe.name, "step": trained.step, "weights": trained.weights}
        save_model(arguments.out, data, shape, details)
        logged = log_model(known, uri, data, shape, details) if arguments.log and uri else None
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    return {"out": str(arguments.out), **details, "bytes": size, **({"model_uri": logged} if logged else {})}


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
