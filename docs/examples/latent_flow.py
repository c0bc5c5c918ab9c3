"""Train a flow in a run's latent map with diffusers' UNet2DModel, and compare its samples with those of the run's mixture.

    vaescale encode RUN --split train --dtype bf16 --flip both --standardize channel
    vaescale fit-gmm RUN
    python docs/examples/latent_flow.py RUN RUN/latents/train-bf16-both-channel STEPS FEATURES

FEATURES are those of `vaescale quality`. Straight paths (Lipman et al. 2023; Liu et al. 2023): z_t = (1 - t) e + t z of noise e and a
latent z. The network learns the velocity z - e; a sample follows it from t = 0 to 1 by Heun's method.
"""

import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch.nn.functional import mse_loss, pad
from torch.utils.data import DataLoader

from vaescale import noise
from vaescale.data.latents import LatentDataset
from vaescale.evaluation.comparison import Kind, judge, references_of
from vaescale.evaluation.features import open_extractor
from vaescale.figures.images import image_rows
from vaescale.mixtures import files, gaussian
from vaescale.trained import open_split, open_trained

SEED, BATCH, WIDTH, LR, HEUN_STEPS, JUDGED = 0, 64, 32, 2e-3, 10, 1000
run, latents, steps, features = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
trained = open_trained(run)
mixture = files.load(run / "gmm", **trained.identity)
data = LatentDataset(latents, global_batch=BATCH, steps=steps, seed=SEED)
channels, side, _ = data.shape
torch.manual_seed(SEED)
unet = UNet2DModel(
    sample_size=side + side % 2,  # its maps have even sides
    in_channels=channels,
    out_channels=channels,
    block_out_channels=(WIDTH, 2 * WIDTH),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
optimizer = torch.optim.AdamW(unet.parameters())
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
for step, batch in enumerate(DataLoader(data, batch_size=None)):
    z = pad(batch["latents"], (0, side % 2) * 2)
    stream = noise.Stream(SEED + 1, step, torch.arange(BATCH))
    e, t = noise.normal(stream, noise.PRIOR, z.shape[1:]), noise.uniform(stream, noise.MIXTURE, (1, 1, 1))
    loss = mse_loss(unet((1 - t) * e + t * z, 1000 * t.flatten()).sample, z - e)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rate.step()
    if (step + 1) % 100 == 0:
        print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)


def flow(stream: noise.Stream) -> torch.Tensor:
    """Latents of the flow, one for each slot of the stream."""
    z = noise.normal(stream, noise.PRIOR, (channels, unet.config.sample_size, unet.config.sample_size))
    for step in range(HEUN_STEPS):
        velocity = unet(z, 1000 * step / HEUN_STEPS).sample
        then = unet(z + velocity / HEUN_STEPS, 1000 * (step + 1) / HEUN_STEPS).sample
        z = z + (velocity + then) / (2 * HEUN_STEPS)
    return data.unstandardized(z[:, :, :side, :side])


@torch.no_grad()
def images(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """Decoded means of the flow's or the mixture's samples with these numbers."""
    stream = noise.Stream(SEED + 2, 0, numbers)
    z = flow(stream) if name == "flow" else gaussian.sample(mixture, stream).view(-1, *data.shape)
    return trained.model.likelihood.mean(trained.model.network.decode(z))


unet.eval()
kinds = [
    Kind(name, "mean", JUDGED, lambda numbers, name=name: images(name, numbers))
    for name in ("flow", "mixture")
]
extractor = open_extractor(features, image_shape=trained.model.image_shape, device=trained.device)
reader, cache = open_split(trained.recipe, "train"), run / "evaluation"
references, _ = references_of(reader, extractor, trained.recipe.data, device=trained.device, cache=cache)
for row in judge(kinds, extractor, references):
    print(f"{row['of']}: Frechet distance {row['frechet']:.3f}, coverage {row['coverage']:.3f}")
shown = [(kind.name, kind.pictures(torch.arange(12)).clamp(0, 1).numpy()) for kind in kinds]
image_rows(run / "figures/latent_flow.png", shown, title=f"{trained.recipe.name}: decoded samples")
