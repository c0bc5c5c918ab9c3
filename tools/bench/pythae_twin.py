"""This build's side of `beside_pythae.py`: pythae's MNIST networks in vaescale's layers. The argument is a JSON object, as is what is printed."""

import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.adversaries.discriminators import Discriminators
from vaescale.adversaries.networks import ImageCritic
from vaescale.commands.parts import build_guard, build_rival, lay_out
from vaescale.data.batch import Batch
from vaescale.models.codebook import Codebook
from vaescale.models.flat import FlatVAE
from vaescale.models.posterior import LOG_SIGMA_BOUND
from vaescale.models.quantized import QuantizedVAE
from vaescale.models.vae import VAE
from vaescale.networks.base import FlatNetwork
from vaescale.networks.config import NetworkConfig
from vaescale.networks.convolutions import ConvTranspose2d
from vaescale.networks.layers import conv, deconv, normed
from vaescale.objectives.base import Objective
from vaescale.recipe import Recipe, load_recipe
from vaescale.system.host import keep_freed_pages
from vaescale.training import launch as backends
from vaescale.training.step import train_step

LATENTS, CODES, CODE_WIDTH = 16, 512, 64
WARM_UP = 4
RECIPE = """
name: twin
seed: 0
data: {train: none, val: none, image_size: 28, channels: 1}
network: {kind: conv, latent_dim: 16, widths: [8]}
likelihood: {kind: gaussian, sigma: 1.0}
optimizer: {kind: adam, lr: 1e-4, warmup_steps: 0}
training: {steps: 1000}
"""
SECTIONS = {
    "vae": [],
    "vq_vae": [
        f"network={{kind: conv, latent_dim: {CODE_WIDTH}, widths: [8], latent_map: true}}",
        f"posterior={{kind: quantized, codes: {CODES}, restart_every: 1000, start_step: 1}}",
    ],
    "aae": ["objective={kind: aae, discriminator: {latent_widths: [256], lr: 1e-4}}"],
    "vae_gan": ["objective={kind: vae_gan, discriminator: {widths: [8], lr: 1e-4}}"],
}


class Flat(FlatNetwork):
    """pythae's Encoder_Conv_VAE_MNIST and Decoder_Conv_AE_MNIST: maps of 14, 7, 3, 1 rows, and of 4, 7, 14, 28."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shape = (LATENTS,)
        widths = (1, 128, 256, 512, 1024)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(
                    conv(width, following, 4, stride=2, padding=1, before="batch"),
                    *normed("batch", following, "relu", places=1),
                )
                for width, following in itertools.pairwise(widths)
            ),
            nn.Flatten(1),
            nn.Linear(1024, 2 * LATENTS),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 1024 * 16),
            nn.Unflatten(1, (1024, 4, 4)),
            ConvTranspose2d(1024, 512, 3, stride=2, padding=1, bias=False),
            *normed("batch", 512, "relu", places=1),
            deconv(512, 256, 3, before="batch"),
            *normed("batch", 256, "relu", places=1),
            deconv(256, 1, 3),
        )

    def encode(self, x: Tensor) -> Tensor:
        """The mean and the log of sigma; pythae's layer returns the log of sigma^2, and has no bound."""
        mean, log_variance = self.encoder(x).float().chunk(2, dim=1)
        return torch.cat([mean, LOG_SIGMA_BOUND * torch.atanh(log_variance / 2 / LOG_SIGMA_BOUND)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """The logits of the mean."""
        logits: Tensor = self.decoder(z)
        return logits


class Block(nn.Module):
    """pythae's ResBlock."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = conv(128, 32, 3), conv(32, 128, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add two convolutions of the rectified maps."""
        more: Tensor = self.outer(self.inner(x.relu()).relu())
        return x + more


class Mapped(FlatNetwork):
    """pythae's Encoder_ResNet_VQVAE_MNIST and Decoder_ResNet_VQVAE_MNIST: a latent map of 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shape = (CODE_WIDTH, 4, 4)
        self.encoder = nn.Sequential(
            conv(1, 64, 4, stride=2, padding=1),
            conv(64, 128, 4, stride=2, padding=1),
            conv(128, 128, 3, stride=2, padding=1),
            Block(),
            Block(),
            conv(128, CODE_WIDTH, 1),
        )
        self.decoder = nn.Sequential(
            ConvTranspose2d(CODE_WIDTH, 128, 1),
            ConvTranspose2d(128, 128, 3, stride=2, padding=1),
            Block(),
            Block(),
            nn.ReLU(),
            deconv(128, 64, 3),
            nn.ReLU(),
            deconv(64, 1, 3),
        )

    def encode(self, x: Tensor) -> Tensor:
        """The vectors of the map."""
        vectors: Tensor = self.encoder(x)
        return vectors

    def decode(self, z: Tensor) -> Tensor:
        """The logits of the mean."""
        logits: Tensor = self.decoder(z)
        return logits


class TwinConfig(NetworkConfig):
    """The section of both: kind `map` or `vector`."""

    def implement(self, *_: object, **__: object) -> FlatNetwork:
        """The network."""
        return Mapped() if self.kind == "map" else Flat()


class Critic(ImageCritic):
    """pythae's Discriminator_Conv_MNIST, of images in [-1, 1] here. It has no sigmoid: losses here are of logits."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 128, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(128, 256, 4, stride=2, padding=1), nn.Tanh()),
            *(nn.Conv2d(256, 512, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(512, 1024, 4, stride=2, padding=1), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.Flatten(1), nn.Linear(1024, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 1]."""
        logits: Tensor = self.head(self.body((x + 1) / 2))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """The last maps [B, 1024]."""
        maps: Tensor = self.body((x + 1) / 2).flatten(1)
        return maps


def main() -> None:
    """Print losses of one forward pass, or the median time of a step in seconds."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    keep_freed_pages()
    torch.manual_seed(0)
    recipe, model, objective = build(job)
    if "folder" in job:
        with torch.no_grad():
            found = losses(job, model, objective)
    else:
        found = {"seconds": timed(job, recipe, model, objective)}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def build(job: dict[str, Any]) -> tuple[Recipe, VAE, Objective]:
    """The recipe of a kind, and its model and objective with pythae's networks in place of the recipe's."""
    options = [f"training.precision={job['precision']}", f"data.global_batch={job['images']}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(RECIPE)
        recipe: Any = load_recipe(file, [*SECTIONS[job["kind"]], *options])
    is_map = job["kind"] == "vq_vae"
    section = (
        {"kind": "map", "latent_dim": CODE_WIDTH} if is_map else {"kind": "vector", "latent_dim": LATENTS}
    )
    kind = QuantizedVAE if is_map else FlatVAE
    model = kind(TwinConfig(**section), recipe.posterior, recipe.likelihood, image_size=(28, 28), channels=1)
    model.shows, model.has_bound = recipe.objective.shows, recipe.objective.has_bound
    objective = recipe.objective.implement(model)
    players: Any = getattr(objective, "discriminators", None)
    if job["kind"] == "aae":
        players.critics["latent"] = nn.Sequential(nn.Linear(LATENTS, 256), nn.ReLU(), nn.Linear(256, 1))
    elif job["kind"] == "vae_gan":
        players.critics["image"] = Critic()
    return recipe, model, objective


def losses(job: dict[str, Any], model: VAE, objective: Any) -> dict[str, float]:
    """The pieces of the loss for the weights, images and draws in the folder, under pythae's names for them."""
    from safetensors.torch import load_file

    tensors = load_file(Path(job["folder"]) / f"{job['kind']}.safetensors")
    fill(model, objective, tensors)
    draws = {noise.POSTERIOR: tensors["epsilon"], noise.GENERATED: tensors["prior"]}
    batch = batch_of((tensors["images"] * 255).round().to(torch.uint8))
    stream = noise.Stream(0, 1, batch.slots)
    with (
        mock.patch.object(noise, "normals", lambda _, numbers: (draws[purpose] for purpose in numbers)),
        mock.patch.object(noise, "normal", lambda _, purpose, __: draws[purpose]),
    ):
        terms = model.train()(batch.images, stream, batch.mask)
        pieces = objective(terms, stream)[1]
        constant = (
            0.5 * 28 * 28 * torch.log(torch.tensor(2 * torch.pi)).item()
        )  # of the density, which pythae leaves out
        error = float(-terms.log_px.mean()) - constant
        if job["kind"] == "vae":
            return {"reconstruction": error, "kl": float(terms.kl.sum(1).mean())}
        if job["kind"] == "vq_vae":
            elements = terms.codes.shape[1] * CODE_WIDTH
            return {
                "reconstruction": 2 * error,  # pythae has no 1/2 here
                "commitment": float(terms.code_cost.mean()) / elements,  # and a mean in place of a sum
            }
        players: Discriminators = objective.discriminators
        shown: Any = terms.shown
        if job["kind"] == "aae":
            return {
                "reconstruction": error,
                "encoder's adversarial term": float(pieces["latent_adversarial"]),
                "discriminator": float(players(shown.detached(), stream, 0).loss),
            }
        fake = players.critics["image"](2 * shown.held - 1)
        held = float(nn.functional.softplus(fake).mean())
        return {
            "feature errors": float(pieces["feature_error"]),
            "kl": float(terms.kl.sum(1).mean()),
            "discriminator": float(players(shown.detached(), stream, 0).loss) - held,
            "discriminator, of reconstructions": held,
        }


def fill(model: VAE, objective: Any, tensors: dict[str, Tensor]) -> None:
    """Copy pythae's weights. Biases before batch normalization have no effect, and no place here."""
    theirs = {
        key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")
    }
    if "encoder.embedding.weight" in theirs:
        for part in ("weight", "bias"):
            pieces = [theirs.pop(f"encoder.{layer}.{part}") for layer in ("embedding", "log_var")]
            theirs[f"encoder.z.{part}"] = torch.cat(pieces)
    critics = getattr(objective, "discriminators", None)
    sides = {"encoder": model.network.encoder, "decoder": model.network.decoder, "discriminator": critics}
    for side, module in sides.items():
        prefixes = [
            key.removesuffix(".weight") for key in theirs if key.startswith(side) and key.endswith(".weight")
        ]
        layers = [layer for layer in (module.modules() if module else ()) if hasattr(layer, "weight")]
        for prefix, layer in zip(sorted(prefixes, key=_order), layers, strict=True):
            layer.weight.data.copy_(theirs[f"{prefix}.weight"])
            if layer.bias is not None:
                layer.bias.data.copy_(theirs[f"{prefix}.bias"])
    if isinstance(model, QuantizedVAE) and isinstance(model.quantizer, Codebook):
        model.quantizer.vectors.copy_(theirs["quantizer.embeddings"])
        model.quantizer.ready.fill_(1.0)


def _order(prefix: str) -> tuple[object, ...]:
    """Layers in the order of their numbers; what has no number, such as the last layer of an encoder, comes last."""
    _, first, *others = prefix.split(".")
    numbers = [int(part) for part in others if part.isdigit()]
    return (first != "layers", *numbers)


def batch_of(images: Tensor) -> Batch:
    """A batch of images uint8 [B, 1, 28, 28]."""
    count = len(images)
    return Batch(images, torch.zeros(count), torch.arange(count), torch.ones(count, dtype=torch.bool))


def timed(job: dict[str, Any], recipe: Recipe, model: VAE, objective: Objective) -> float:
    """The median time of vaescale's own step."""
    launch = backends.start(processes=1)
    guard = build_guard(recipe, torch.device("cpu"))
    rival = build_rival(recipe, launch, objective)
    strategy = lay_out(recipe, launch, model, objective)
    strategy.wrapped.train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (job["images"], 1, 28, 28), dtype=torch.uint8, generator=generator)
    times = []
    for number in range(WARM_UP + job["steps"]):
        begin = time.perf_counter()
        train_step(
            strategy,
            [batch_of(images)],
            objective=objective,
            judge=partial(guard.judge, step=number),
            scale=guard.scale,
            rival=rival,
            precision=recipe.training.precision,
            seed=0,
            step=number,
            logged=False,
        )
        guard.reports(wait=False)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
