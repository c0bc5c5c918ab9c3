"""Export a trained run as an MLflow model, or for diffusers: a folder with weights in safetensors, without pickle or code.

OUT/data/run is a run folder with the recipe, the weights of the newest checkpoint (averaged, if the run has them) and the
mixture. `vaescale sample OUT/data/run` and the other verbs for trained runs accept it. --log also adds the model to the run in
MLflow.

--format diffusers writes a run of `network: resnet` as an AutoencoderKL: `AutoencoderKL.from_pretrained(OUT)`.
--format torch_export and onnx write encoder and decoder of any run as graphs, which need no vaescale: encode.pt2 and decode.pt2, or
encode.onnx and decode.onnx.

  vaescale export runs/digits-optimal exported/digits
  python -c 'import mlflow, numpy; m = mlflow.pyfunc.load_model("exported/digits"); print(m.predict(numpy.zeros((4, 1, 8, 8), "uint8"), params={"mode": "sample"}).shape)'
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, OUT, the format and its options."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-optimal")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--format",
        choices=("mlflow", "diffusers", "torch_export", "onnx"),
        default="mlflow",
        help="what opens it; default: mlflow",
    )
    add_weights(parser)
    scaling = "diffusers: scaling_factor and shift_factor of all channels, or latents_mean and latents_std of each; default: all"
    parser.add_argument("--scaling", choices=("all", "channel"), default="all", help=scaling)
    parser.add_argument(
        "--latent-images",
        type=integer(0),
        default=10_000,
        metavar="N",
        help="diffusers: training images whose latents give scaling_factor and the moments; 0: none; default: 10000",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also send OUT with a model card to this model repository, which is made private unless it exists",
    )
    parser.add_argument("--log", action="store_true", help="also add the model to the run in MLflow")
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the run. Returns the path, and the URI if it was added to MLflow."""
    from vaescale.commands.export import export

    return export(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print what was exported, and of diffusers' folder what a diffusion model needs to know of its latents."""
    from vaescale.system.console import table

    rows = [(name, str(value)) for name, value in result.items() if not isinstance(value, dict)]
    latents = result.get("latents") or {}
    for name in ("mean", "std") if latents else ():
        rows.append((f"latents' {name}", " ".join(f"{value:.4f}" for value in latents[name])))
    for name, value in (result.get("largest_differences") or {}).items():
        rows.append((f"largest difference of {name.replace('_', ' ')}", f"{value:.2g}"))
    table("vaescale export", rows)


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
