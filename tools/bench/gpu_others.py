"""What else a GPU computes, for `gpu.py`: a mixture of a million latents, features for Frechet distances, and diffusers' AutoencoderKL."""

import importlib.util
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from vaescale.evaluation.frechet import frechet_distance, moments
from vaescale.mixtures.em import fit
from vaescale.mixtures.points import Points
from vaescale.mixtures.starts import start
from vaescale.perceptual.classifier import Classifier, Shape

T = TypeVar("T")
LATENTS, SIZE, COMPONENTS, ITERATIONS = 1_000_000, 64, 64, 100
IMAGES, AT_ONCE = 10_000, 500


def mixture(device: torch.device, latents: int = LATENTS) -> dict[str, float]:
    """Seconds of 100 EM iterations with full covariances, and the mean log density before and after them."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(COMPONENTS, SIZE, generator=generator)
    of = torch.randint(0, COMPONENTS, (latents,), generator=generator)
    z = (centres[of] + torch.randn(latents, SIZE, generator=generator)).to(device)
    points = Points(z)
    begin = start(points, COMPONENTS, kind="full", how="random", seed=0)
    fit(points, begin, tolerance=-float("inf"), max_iterations=2)
    result, seconds = _timed(
        lambda: fit(points, begin, tolerance=-float("inf"), max_iterations=ITERATIONS), device
    )
    return {
        "seconds": seconds,
        "iterations": float(len(result.history)),
        "nats_before": result.history[0],
        "nats_after": result.history[-1],
    }


def features(device: torch.device, images: int = IMAGES) -> dict[str, float]:
    """Images a second through the classifier of `vaescale train-features` at 64x64x3, and seconds of moments and distance."""
    model = Classifier(Shape(channels=3, size=64, classes=10, width=64)).to(device).eval()
    batches = [torch.rand(AT_ONCE, 3, 64, 64, device=device) for _ in range(2)]

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [model.features(batches[number % 2]).cpu() for number in range(images // AT_ONCE)]

    run()
    found, seconds = _timed(run, device)
    size = found[0].shape[1]
    half = len(found) // 2
    _, in_distance = _timed(lambda: frechet_distance(moments(found[:half]), moments(found[half:])), device)
    return {"images_per_second": images / seconds, "features": float(size), "distance_seconds": in_distance}


def autoencoder_kl(device: torch.device, images: int = 16, size: int = 256, steps: int = 12) -> float | None:
    """Seconds of a step of diffusers' AutoencoderKL with the shape of Stable Diffusion's (f8), in a plain bf16 loop.

    None where diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
    ).to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.rand(images, 3, size, size, device=device) * 2 - 1

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(x).latent_dist
            decoded = model.decode(posterior.sample()).sample
        loss = (decoded.float() - x).square().flatten(1).sum(1).mean() + posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()

    def several() -> None:
        for _ in range(steps):
            step()

    return _timed(several, device)[1] / steps


def _timed(function: Callable[[], T], device: torch.device) -> tuple[T, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin
