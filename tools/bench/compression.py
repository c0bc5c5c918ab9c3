"""Speed of `compress` and `decompress` on the batch path, against the forward pass alone, measured in turn in one process.

    python tools/bench/compression.py --rounds 9

The network is that of recipes/fashion_mnist, with random weights and random images: neither changes the number of operations. The forward
pass is one of the encoder and one of the decoder, in float64 on one thread as the codec runs them, and in float32 as `evaluate` does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from vaescale.compression.ans import Stack
from vaescale.compression.bits_back import BATCH, Codec, Grids
from vaescale.compression.chunks import initial_words
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.build import build_vae
from vaescale.models.config import DiagonalConfig
from vaescale.networks.config import ConvConfig
from vaescale.system.host import keep_freed_pages

LATENTS, SIZE, COMPONENTS = 32, 28, 50
KINDS: dict[str, dict[str, object]] = {
    "bernoulli": {},
    "bitwise": {},
    "discretized_logistic": {},
    "discretized_logistic_mixture": {"components": 5},
    "autoregressive_logistic_mixture": {},
}


def main() -> None:
    """Measure each likelihood."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds; default: %(default)s")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_pages()  # as the verbs do
    cases = [(kind, False) for kind in KINDS] + [("bernoulli", True)]
    for kind, is_mixed in cases:
        seconds = measure(kind, KINDS[kind], rounds, mixture=random_mixture() if is_mixed else None)
        forward = seconds["forward, float64"]
        rates = [
            f"{name} {BATCH / value:.0f} images/s ({forward / value:.2f})" for name, value in seconds.items()
        ]
        prior = f", a mixture of {COMPONENTS} as the prior" if is_mixed else ""
        line = f"{kind}{prior}: {'; '.join(rates)}; in brackets: the speed relative to the forward pass in float64"
        sys.stdout.write(line + "\n")


def random_mixture() -> Mixture:
    """A mixture with full covariances."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(COMPONENTS, LATENTS, generator=generator, dtype=torch.float64)
    covariances = torch.eye(LATENTS, dtype=torch.float64).repeat(COMPONENTS, 1, 1) + 0.1
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64)
    return Mixture(weights, means, covariances)


def measure(kind: str, keys: dict[str, object], rounds: int, *, mixture: Mixture | None) -> dict[str, float]:
    """The median seconds of a batch of each part."""
    network = ConvConfig(latent_dim=LATENTS, widths=(32, 64))
    model = build_vae(
        network, DiagonalConfig(), LIKELIHOODS[kind](**keys), image_size=SIZE, channels=1
    ).eval()
    codec = Codec(model, mixture=mixture)
    generator = np.random.default_rng(0)
    levels = generator.integers(0, codec.pixels.levels, (codec.batch, 1, SIZE, SIZE))
    bins = generator.integers(0, 1 << codec.latent_bits, (codec.batch, codec.latents))
    stack, grids = Stack(initial_words(codec.batch * LATENTS)), list[Grids]()
    x = torch.from_numpy(levels).float() / (codec.pixels.levels - 1)

    def forward() -> None:
        codec.outputs(levels, bins)

    def single() -> None:
        with torch.inference_mode():
            model.reconstruct(x)

    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: grids.append(codec.encode(stack, levels)[0]),
        "decode": lambda: codec.decode(stack, grids.pop()),
        "forward, float64": forward,
        "forward, float32": single,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(-1, rounds):  # one round to warm up
        for name, part in parts.items():
            begun = time.perf_counter()
            part()
            if number >= 0:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
