"""Compress images without loss with a run's VAE, to one file whose size is the negative ELBO: bits back.

SOURCE is a source of make-shards (digits, idx:PATH, folder:PATH, hf:NAME, ...), a folder or URL of shards, or a folder of
pictures, brought to the run's size as its own images were. For flat runs with bernoulli, bitwise, categorical, discretized_logistic,
discretized_logistic_mixture or autoregressive_logistic_mixture. Labels and keys are kept. Runs on any number of processes, which code
chunks of images. Needs the package constriction:

  vaescale compress runs/fashion_mnist-discretized_logistic_mixture data/fashion_mnist/test fashion.vsz --check
  vaescale decompress fashion.vsz fashion
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale.system.arguments import add_checkpoint, add_weights, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN, the images, the file and how it is made."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/digits-bitwise")
    add("source", metavar="SOURCE", help="the images: KIND:PATH, a folder of shards, or a folder of pictures")
    add("out", metavar="OUT", type=Path, help="file to write, such as images.vsz")
    add("--split", metavar="NAME", help="split of SOURCE; default: all")
    limit = "number of images of each split, the first; default: all"
    add("--limit", type=integer(1), metavar="N", help=limit)
    crop = "part to resize: square, whole or a number of pixels; default: as the run's images were made"
    add("--crop", metavar="CROP", help=crop)
    filters = ("box", "bilinear", "bicubic", "lanczos")
    add("--resample", choices=filters, help="filter of the resizing; default: as the run's images were made")
    binarize = "code the black and white images that a bernoulli run makes of grey ones"
    add("--binarize", action="store_true", help=binarize)
    add("--check", action="store_true", help="decode each chunk again and compare")
    each = "a checksum for each image; default: for several small ones, so that checksums take 0.2%% of the code at most"
    add("--check-each", action="store_true", help=each)
    chunk = "images of a chunk, which is decoded as a whole; default: 4096, fewer for large images"
    add("--chunk-images", type=integer(1), metavar="N", help=chunk)
    bits = "each latent has 2^N bins; default: 12, of a ladder 10"
    add("--latent-bits", type=int, choices=range(4, 17, 2), metavar="N", help=bits)
    prior = "prior of the latents: `standard` for the model's, `gmm` for the mixture of fit-gmm, of a flat run; default: standard"
    add("--prior", choices=("standard", "gmm"), default="standard", help=prior)
    add_weights(parser)
    add_checkpoint(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the file. Returns its sizes."""
    from vaescale.commands.compress import compress

    return compress(**{name: value for name, value in vars(arguments).items() if name != "json"})


def show(result: dict[str, Any]) -> None:
    """Print the sizes."""
    from vaescale.system.console import table

    sizes, bits = result["bytes_of"], result["bits_per_dim"]
    table(
        f"{result['run']}, step {result['step']}, {result['source']} ({result['weights']} weights)",
        [
            ("file", result["out"]),
            ("prior", result["prior"]),
            ("images", f"{result['images']} in {result['chunks']} chunks"),
            ("bytes", f"{result['bytes']}, {result['bytes'] / result['images']:.1f} an image"),
            ("code", f"{sizes['code']}, of them initial bits {sizes['initial_bits']}"),
            ("keys and labels", f"{sizes['names']}"),
            (
                "checksums, header, tables",
                f"{sizes['checks'] + sizes['header'] + sizes['frame'] + sizes['table']}",
            ),
            (
                "bits/dim of the file",
                f"{bits['file']:.4f}, without keys and labels {bits['without_names']:.4f}",
            ),
            ("bits/dim of the code", f"{bits['net_code']:.4f}, without initial bits"),
            ("images/s", f"{result['images_per_second']:.1f}"),
        ],
    )


if __name__ == "__main__":
    from vaescale.cli import run_tool

    sys.exit(run_tool(sys.modules[__name__]))
