"""What reconstructions are like, and whether p(x|z) says how far off they are.

A reconstruction is the decoded mean at the posterior's mean. Calibration is of p(x|z) with z drawn from q(z|x): over the values
of all images, P(|X - mean| <= |x - mean|) is uniform on [0, 1] if the decoder's noise is what it says. The share of values at
which it is below 0.9 is the coverage of the central 90% intervals (Kuleshov, Fenner & Ermon 2018, section 3.1).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vaescale import comm, noise
from vaescale.data.batch import Batch
from vaescale.errors import DataError
from vaescale.likelihoods.base import LocationScale
from vaescale.models.vae import VAE

LEVELS = 100  # of coverage, in equal steps
SHOWN_LEVELS = (50, 90, 99)
LEAST_SSIM_SIZE = 11  # pixels of SSIM's window
LEAST_SQUARED_ERROR = 1e-10  # of a value: 100 dB at most

PROTOCOL = {
    "reconstruction_mse": "decoded mean at the posterior's mean, clamped to [0, 1], per value",
    "psnr_db": "10 log10(1 / MSE) of each image's reconstruction, at most 100, mean over images",
    "ssim": f"of each image's reconstruction, range 1, Gaussian window of {LEAST_SSIM_SIZE} pixels with sigma 1.5 (Wang et al. 2004), mean over images",
    "data_sigma": "the sigma that maximizes the likelihood of these very images: a check, and in no bound",
    "coverage": "share of all values within the central interval of p(x|z) of that many percent, z drawn from q(z|x)",
}


class Reconstruction(NamedTuple):
    """metrics as in PROTOCOL; coverage: of the levels 1% to 100%, or None where p(x|z) has no central intervals."""

    metrics: dict[str, float]
    coverage: list[float] | None


@torch.no_grad()
def reconstruction(model: VAE, batches: Iterable[Batch], *, seed: int) -> Reconstruction:
    """Of all images over all ranks, in float32. The noise of an image depends on (seed, its number) alone.

    ssim is absent for images smaller than its window, data_sigma where a global sigma is no choice of the likelihood, coverage
    where there is no noise around a mean. Raises DataError when no image can be used.
    """
    was_training = model.training
    model.eval()
    likelihood, dimensions = model.likelihood, math.prod(model.image_shape)
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, MSE, PSNR, SSIM
    powered = torch.zeros(dimensions, dtype=torch.float64, device=device)
    counts = torch.zeros(LEVELS, dtype=torch.float64, device=device)
    for batch in batches:
        mask = batch.mask.to(device)
        if not mask.any():
            continue
        images, slots = batch.images.to(device)[mask], batch.slots.to(device)[mask]
        stream = noise.Stream(seed, 0, slots)
        x = model.target(images, stream)
        sums += _pictures(x, likelihood.mean(model.reconstruct(x)).float().clamp(0, 1))
        params = model.infer(x, stream, 1, False).params
        if isinstance(likelihood, LocationScale):
            error = (x - likelihood.mean(params)).abs()
            powered += error.double().pow(likelihood.state.power).sum(0).flatten()
        inside = likelihood.central_mass(x, params)
        if inside is not None:
            level = (inside.flatten() * LEVELS).ceil().clamp(1, LEVELS).long() - 1
            counts += torch.bincount(level, minlength=LEVELS).double()
    model.train(was_training)
    total = comm.all_reduce_sum(torch.cat([sums, powered, counts]))
    sums, powered, counts = torch.split(total, [len(sums), dimensions, LEVELS])
    used = float(sums[0])
    if not used:
        raise comm.known_to_all(
            DataError(
                "no image could be used; `vaescale verify-shards DIR --deep` names what is wrong with them"
            )
        )
    mse, psnr, ssim = (sums[1:] / used).tolist()
    metrics = {"reconstruction_mse": mse, "psnr_db": psnr}
    if min(model.image_shape[1:]) >= LEAST_SSIM_SIZE:
        metrics["ssim"] = ssim
    if isinstance(likelihood, LocationScale) and not likelihood.state.predicts:
        metrics["data_sigma"] = float(likelihood.state.fitted(powered.view(model.image_shape) / used))
    if not counts.any():
        return Reconstruction(metrics, None)
    coverage = (counts.cumsum(0) / counts.sum()).tolist()
    metrics |= {f"coverage/{level}": coverage[level - 1] for level in SHOWN_LEVELS}
    return Reconstruction(metrics, coverage)


def _pictures(x: Tensor, means: Tensor) -> Tensor:
    """Float64 [4]: images, and the sums of their MSE, PSNR and SSIM (0 for small ones)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    mse = (x - means).square().flatten(1).mean(1).double()
    psnr = -10 * torch.log10(mse.clamp_min(LEAST_SQUARED_ERROR))
    ssim = mse.new_zeros(1)
    if min(x.shape[2:]) >= LEAST_SSIM_SIZE:
        of_each = structural_similarity_index_measure(means, x.float(), data_range=1.0, reduction="none")
        assert isinstance(of_each, Tensor)
        ssim = of_each.double()
    return torch.stack([mse.new_tensor(float(len(x))), mse.sum(), psnr.sum(), ssim.sum()])
