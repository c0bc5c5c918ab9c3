"""Export a trained run as an MLflow model: a folder with weights in safetensors, without pickle or code.

OUT/data/run is a run folder with the recipe, the weights of the newest checkpoint (averaged, if the run has them) and the
mixture. `vaescale sample OUT/data/run` and the other verbs for trained runs accept it. --log also adds the model to the run in
MLflow.

  vaescale export runs/digits-optimal exported/digits
  python -c 'import mlflow, numpy; m = mlflow.pyfunc.load_model("exported/digits"); print(m.predict(numpy.zeros((4, 1, 8, 8), "uint8"), params={"mode": "sample"}).shape)'
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, OUT, --weights and --log."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    add_weights(parser)
    parser.add_argument("--log", action="store_true", help="also add the model to the run in MLflow")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the MLflow model. Returns its path, and its URI if it was added to MLflow."""
    from vaescale.commands.export import export

    return export(arguments.run, arguments.out, weights=arguments.weights, log=arguments.log)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
