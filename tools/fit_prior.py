"""Fit an autoregressive prior to the codes of a run with codes (posterior.kind quantized or finite_scalar): a causal transformer.

Writes RUN/prior, which `vaescale sample RUN --prior autoregressive`, `evaluate` and `quality` then use. The weights are those with the
fewest nats for held-out codes, of twenty measurements. RUN/prior/NAME-prior is the run of its training, with metrics.jsonl, rows in MLflow
and checkpoints: the same command continues a fit that was interrupted. `vaescale launch fit-prior RUN` trains on several processes.

  vaescale fit-prior runs/digits-vq_vae
  vaescale fit-prior runs/digits-vq_vae --width 256 --heads 8 --layers 8 --steps 20000
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer, real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, the transformer and its training."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-vq_vae")
    add("--width", type=integer(1), default=64, metavar="W", help="channels of the transformer; default: 64")
    add("--layers", type=integer(1), default=2, metavar="N", help="number of its blocks; default: 2")
    add("--heads", type=integer(1), default=4, metavar="H", help="heads of its attention; default: 4")
    add("--steps", type=integer(1), default=1000, metavar="S", help="training steps; default: 1000")
    add("--batch", type=integer(1), default=128, metavar="B", help="images in each step; default: 128")
    add("--lr", type=real(above=0), default=1e-3, help="highest learning rate; default: 0.001")
    decay = "weight decay of the kernels; default: 0.1"
    add("--weight-decay", type=real(least=0), default=0.1, metavar="D", help=decay)
    dropout = "share of the channels of each branch that dropout leaves out in training; default: 0.1"
    add("--dropout", type=real(least=0, below=1), default=0.1, metavar="P", help=dropout)
    precision = "precision of its training, as training.precision of a recipe; default: fp32"
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32", help=precision)
    add_weights(parser)
    add("--seed", type=integer(0), default=0, help="random seed of weights, order and dropout; default: 0")
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit the prior. Returns its nats and settings."""
    from vaescale.commands.fit_prior import fit_prior

    return fit_prior(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print the length of the codes under the prior and under uniform codes."""
    from vaescale.system.console import say, table

    rows = [
        ("held-out codes", f"{result['prior/val_code_nats']:.4g} nats"),
        ("training codes", f"{result['prior/train_code_nats']:.4g} nats"),
        ("uniform codes", f"{result['prior/uniform_code_nats']:.4g} nats"),
        ("best weights", f"step {result['chosen_step']} of {result['steps']}"),
        ("parameters", f"{result['parameters']:,}"),
    ]
    table(f"{result['run']}: prior over codes", rows)
    say(f"next: vaescale evaluate {result['run']}; vaescale sample {result['run']} --prior autoregressive")


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
