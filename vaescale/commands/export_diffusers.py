"""Write a run of `network: resnet` as a folder that diffusers' `AutoencoderKL.from_pretrained` opens."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vaescale import noise
from vaescale.config import Window
from vaescale.errors import UserError
from vaescale.exchange import autoencoder_kl
from vaescale.exchange.autoencoder_kl_names import names_of
from vaescale.exchange.folders import WEIGHTS
from vaescale.likelihoods.config import MeanConfig
from vaescale.models.config import DiagonalConfig, FixedConfig, IsotropicConfig
from vaescale.models.posterior import Gaussian
from vaescale.models.vae import VAE
from vaescale.networks.config import ResnetConfig
from vaescale.system.console import Progress, say
from vaescale.system.files import strict_json, write_whole
from vaescale.trained import Trained, in_order, open_split, refuse_condition

LARGEST_DIFFERENCE = 1e-5  # of what diffusers computes from the run's own, without a word
Scaling = Literal["all", "channel"]
COMPARED = 64  # images on which the two are compared


def export_diffusers(
    trained: Trained, out: Path, *, latent_images: int, scaling: Scaling = "all"
) -> dict[str, Any]:
    """Write config.json, the weights and vaescale.json to OUT. Returns what the last one says of latents and differences.

    latent_images: number of training images whose latents give the factors; 0: none, a factor of 1. scaling: `all` gives one factor and
    shift for all channels, `channel` the moments of each. Raises UserError for a run whose encoder or decoded mean an AutoencoderKL cannot have.
    """
    refuse_condition(trained, "AutoencoderKL", "export --format mlflow or torch_export takes it")
    network = trained.recipe.network
    if not isinstance(network, ResnetConfig):
        raise UserError(
            f"network.kind is {network.kind!r}, and AutoencoderKL is the network of `kind: resnet`; export --format mlflow "
            "takes every kind"
        )
    likelihood, channels = trained.recipe.likelihood, trained.recipe.data.channels
    if not isinstance(likelihood, MeanConfig) or likelihood.mean != "identity":
        how = (
            f"likelihood.mean (={likelihood.mean!r})"
            if isinstance(likelihood, MeanConfig)
            else f"likelihood.kind (={likelihood.kind!r})"
        )
        raise UserError(
            f"AutoencoderKL's decoder returns the image itself, which {how} does not; train the decoder for it: vaescale train RECIPE "
            f"init_from={trained.folder} network.freeze=encoder likelihood.kind=gaussian likelihood.mean=identity"
        )
    tensors = _as_diagonal(trained, channels)
    config, theirs, own = autoencoder_kl.written(
        network, tensors, channels=channels, image_size=trained.recipe.data.image_size
    )
    latents, differences = _measure(trained, latent_images) if latent_images else ({}, {})
    config |= _factors(latents, scaling)
    details = {
        "format": "vaescale-autoencoder",
        "version": 1,
        "run": trained.recipe.name,
        **trained.identity,
        "recipe": trained.recipe.public(),
        "images": "[-1, 1]; (x + 1) / 2 is in [0, 1], where sigma and the likelihood are"
        + (
            ""
            if trained.model.window == Window()
            else f"; stored values are {trained.model.window.text()} there"
        ),
        "sigma": sigma_of(trained.model),
        "likelihood_state": {
            name: value.double().flatten().tolist()
            for name, value in trained.model.likelihood.state_dict().items()
        },
        "latents": latents,
        "largest_differences": differences,
        **own,
    }
    out.mkdir(parents=True)
    write_whole(out / autoencoder_kl.CONFIG, strict_json(config, indent=2).encode())
    write_whole(out / WEIGHTS, save(theirs, metadata={"format": "pt"}))
    write_whole(out / autoencoder_kl.OWN, strict_json(details, indent=2).encode())
    if max(differences.values(), default=0.0) > LARGEST_DIFFERENCE:
        listed = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in differences.items())
        say(f"diffusers' numbers differ from the run's own by up to: {listed}; {_remedy(trained)}")
    shown = ("run", "step", "weights", "sigma", "latents", "largest_differences")
    return {name: details[name] for name in shown} | {
        name: config[name] for name in ("scaling_factor", "shift_factor")
    }


def _as_diagonal(trained: Trained, channels: int) -> dict[str, Tensor]:
    """The network's tensors, with means and log sigmas of each latent channel as the encoder's output and the means as the decoder's."""
    model, posterior = trained.model, trained.recipe.posterior
    tensors = {name: value.detach().float().cpu() for name, value in model.network.state_dict().items()}
    latents = trained.recipe.network.latent_dim
    names = names_of(trained.recipe.network, image_size=trained.recipe.data.image_size)  # type: ignore[arg-type]
    here = {there: name for name, there in names.items()}
    quant, out = (
        here[f"{layer}.weight"].removesuffix(".weight") for layer in ("quant_conv", "encoder.conv_out")
    )
    weight, bias = tensors[f"{quant}.weight"], tensors[f"{quant}.bias"]
    if isinstance(posterior, IsotropicConfig):
        rows = [*range(latents), *[latents] * latents]
        weight, bias = weight[rows], bias[rows]
    elif isinstance(posterior, FixedConfig):
        logs = torch.tensor(posterior.sigmas(latents)).log()
        weight, bias = torch.cat([weight, torch.zeros_like(weight)]), torch.cat([bias, logs])
    elif not isinstance(posterior, DiagonalConfig):
        raise UserError(
            f"posterior.kind (={posterior.kind!r}) has no mean and variance of its own, as AutoencoderKL has"
        )
    missing = 2 * latents - weight.shape[1]
    tensors[f"{quant}.weight"] = nn.functional.pad(weight, (0, 0, 0, 0, 0, missing))
    tensors[f"{quant}.bias"] = bias
    for part in ("weight", "bias"):
        value = tensors[f"{out}.{part}"]
        tensors[f"{out}.{part}"] = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
        head = f"{model.network.head_name}.{part}"
        tensors[head] = tensors[head][:channels]  # of a predicted sigma, the means come first
    return tensors


@torch.no_grad()
def _measure(trained: Trained, images: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The moments of the training images' latents, by channel, and how far diffusers' arithmetic is from the run's."""
    model, reader = trained.model, open_split(trained.recipe, "train")
    total, square, number = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    differences: dict[str, float] = {}
    goal = min(images, len(reader))
    with Progress("latents", goal, unit="images") as progress:
        for batch in in_order(reader, workers=trained.recipe.data.workers, images=images):
            stream = noise.Stream(trained.recipe.seed, 0, batch.slots.to(trained.device))
            x = model.target(batch.images.to(trained.device), stream)[batch.mask.to(trained.device)]
            q: Gaussian = model.posterior(x)
            sigma = torch.exp(q.log_sigma.expand_as(q.mu)).double().cpu()
            mu = q.mu.double().cpu()
            total = total + mu.sum((0, 2, 3))
            square = square + (mu.square() + sigma.square()).sum((0, 2, 3))
            number += mu[:, 0].numel()
            differences = differences or _differences(
                trained, x[:COMPARED], Gaussian(*(one[:COMPARED] for one in q))
            )
            progress.update(min(goal, int(number) // mu[0, 0].numel()))
    mean = total / number
    deviation = (square / number - mean.square()).sqrt()
    overall = float((square.sum() / (number * len(mean)) - mean.mean().square()).sqrt())
    latents = {
        "images": int(number) // math.prod(model.latent_shape[1:]),
        "data_hash": reader.index.data_hash,
        "mean": mean.tolist(),
        "std": deviation.tolist(),
        "overall_mean": float(mean.mean()),
        "overall_std": overall,
    }
    return latents, differences


def _differences(trained: Trained, x: Tensor, q: Gaussian) -> dict[str, float]:
    """The largest differences of means, log variances and decoded values in [-1, 1], for a norm's epsilon and without bounds."""
    network = copy.deepcopy(trained.model.network)
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.eps = autoencoder_kl.EPSILON
    raw, latents = network.encode(x), trained.recipe.network.latent_dim
    mu = raw[:, :latents]
    log_variance = 2 * q.log_sigma
    if not isinstance(trained.recipe.posterior, FixedConfig):
        log_variance = (2 * raw[:, latents:]).clamp(-30, 20)
    channels = trained.recipe.data.channels
    decoded = [one.decode(q.mu)[:, :channels] for one in (network, trained.model.network)]
    return {
        "mean": float((mu - q.mu).abs().max()),
        "log_variance": float((log_variance - 2 * q.log_sigma).abs().max()),
        "decoded": 2 * float((decoded[0] - decoded[1]).abs().max()),
    }


def _remedy(trained: Trained) -> str:
    network, posterior = trained.recipe.network, trained.recipe.posterior
    keys = []
    if getattr(network, "norm_epsilon", autoencoder_kl.EPSILON) != autoencoder_kl.EPSILON:
        keys.append("network.norm_epsilon=1e-6")
    if getattr(posterior, "bounded", False):
        keys.append("posterior.bounded=false")
    elif isinstance(posterior, IsotropicConfig):
        keys.append("posterior.kind=diagonal posterior.bounded=false")
    return f"a run with {' '.join(keys)} is the same in both" if keys else "float32 rounds so"


def _factors(latents: Mapping[str, Any], scaling: Scaling) -> dict[str, Any]:
    """The configuration's factors: pipelines take (z - shift_factor) scaling_factor or, where both are given, (z - latents_mean)
    scaling_factor / latents_std. So a factor for all channels and moments of each exclude each other.
    """
    nothing: dict[str, Any] = {
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }
    if not latents:
        return nothing
    if scaling == "channel":
        return nothing | {"latents_mean": latents["mean"], "latents_std": latents["std"]}
    return nothing | {"scaling_factor": 1 / latents["overall_std"], "shift_factor": latents["overall_mean"]}


def sigma_of(model: VAE) -> float | None:
    """The standard deviation of p(x|z) in [0, 1] if it is one number, else None."""
    sigma = getattr(model.likelihood, "sigma", None)
    return None if sigma is None else float(sigma)
