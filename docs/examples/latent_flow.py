"""Train a flow in a run's latent map with diffusers' UNet2DModel, and compare its samples with those of the run's mixture.

    vaescale encode RUN --split train --dtype bf16 --flip both --standardize channel
    vaescale fit-gmm RUN
    python docs/examples/latent_flow.py RUN RUN/latents/train-bf16-both-channel 1000 FEATURES

The number is that of steps. FEATURES are those of `vaescale quality`: pixels, or a folder. Flow matching with straight paths (Lipman et al. 2023; Liu et al. 2023):
z_t = (1 - t) e + t z of noise e and a latent z. The network learns the velocity z - e; a sample follows it from t = 0 to 1.
"""

import itertools
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


def train(model: UNet2DModel, data: LatentDataset) -> None:
    """Learn the velocity, one step for each batch of the data set."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=data.steps)
    for step, batch in enumerate(DataLoader(data, batch_size=None)):
        z = pad(
            batch["latents"], (0, model.config.sample_size - data.shape[-1]) * 2
        )  # its maps have even sides
        stream = noise.Stream(SEED + 1, step, torch.arange(BATCH))
        e, t = noise.normal(stream, noise.PRIOR, z.shape[1:]), noise.uniform(stream, noise.MIXTURE, (1, 1, 1))
        loss = mse_loss(model((1 - t) * e + t * z, 1000 * t.flatten()).sample, z - e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{data.steps}  loss {loss.item():.4f}", flush=True)


def flow_samples(model: UNet2DModel, stream: noise.Stream) -> torch.Tensor:
    """Heun's method from t = 0 to 1."""
    side, time = model.config.sample_size, torch.linspace(0, 1000, HEUN_STEPS + 1)
    z = noise.normal(stream, noise.PRIOR, (model.config.in_channels, side, side))
    for now, then in itertools.pairwise(time):
        velocity = model(z, now).sample
        z = z + (velocity + model(z + velocity / HEUN_STEPS, then).sample) / (2 * HEUN_STEPS)
    return z


def main(run: Path, latents: Path, steps: int, features: str) -> None:
    """Train, draw and judge."""
    trained = open_trained(run)
    mixture = files.load(run / "gmm", **trained.identity)
    data = LatentDataset(latents, global_batch=BATCH, steps=steps, seed=SEED)
    channels, rows, columns = data.shape
    torch.manual_seed(SEED)
    model = UNet2DModel(
        sample_size=rows + rows % 2,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(WIDTH, 2 * WIDTH),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    train(model, data)
    model.eval()

    @torch.no_grad()
    def images(kind: str, numbers: torch.Tensor) -> torch.Tensor:
        stream = noise.Stream(SEED + 2, 0, numbers)
        if kind == "flow":
            z = data.unstandardized(flow_samples(model, stream)[:, :, :rows, :columns])
        else:
            z = gaussian.sample(mixture, stream).view(-1, *data.shape)
        return trained.model.likelihood.mean(trained.model.network.decode(z))

    kinds = [
        Kind(kind, "mean", JUDGED, lambda numbers, kind=kind: images(kind, numbers))
        for kind in ("flow", "mixture")
    ]
    shape, reader = trained.model.image_shape, open_split(trained.recipe, "train")
    extractor = open_extractor(features, image_shape=shape, device=trained.device)
    cache = run / "evaluation"
    references, _ = references_of(reader, extractor, trained.recipe.data, device=trained.device, cache=cache)
    for row in judge(kinds, extractor, references):
        print(f"{row['of']}: Frechet distance {row['frechet']:.3f}, coverage {row['coverage']:.3f}")
    shown = [(kind.name, kind.pictures(torch.arange(12)).clamp(0, 1).numpy()) for kind in kinds]
    image_rows(run / "figures/latent_flow.png", shown, title=f"{trained.recipe.name}: decoded samples")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
