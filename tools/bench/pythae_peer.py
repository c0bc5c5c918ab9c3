# mypy: disable-error-code="import-not-found,no-untyped-call,type-arg,no-any-unimported,import-untyped"
"""pythae's side of `beside_pythae.py`, run by an interpreter that has pythae. The argument is a JSON object; the last line printed is another."""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pythae import models, trainers
from pythae.data.datasets import BaseDataset
from pythae.models.nn.benchmarks.mnist import convnets, resnets
from torch import Tensor

LATENTS, CODES, CODE_WIDTH = 16, 512, 64
SHAPE = (1, 28, 28)
WARM_UP = 4


def main() -> None:
    """Print losses of one forward pass, or the median time of a step in seconds."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    torch.manual_seed(0)
    model = build(job["kind"])
    images = torch.randint(0, 256, (job["images"], *SHAPE)) / 255
    torch.set_grad_enabled("folder" not in job)
    found = exchange(job, model, images) if "folder" in job else {"seconds": timed(job, model, images)}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def build(kind: str) -> Any:
    """The model with pythae's MNIST networks; the discriminator's last convolution is the layer of the feature errors."""
    sizes: dict[str, Any] = {"input_dim": SHAPE, "latent_dim": LATENTS}
    if kind == "vq_vae":
        sizes["latent_dim"] = CODE_WIDTH
        config = models.VQVAEConfig(**sizes, num_embeddings=CODES, use_ema=True, decay=0.99)
        encoder = resnets.Encoder_ResNet_VQVAE_MNIST(config)
        return models.VQVAE(config, encoder=encoder, decoder=resnets.Decoder_ResNet_VQVAE_MNIST(config))
    if kind == "vae":
        config = models.VAEConfig(**sizes, reconstruction_loss="mse")
    elif kind == "aae":
        config = models.Adversarial_AE_Config(**sizes, reconstruction_loss="mse")
    else:
        config = models.VAEGANConfig(**sizes, reconstruction_loss="mse", reconstruction_layer=4)
    parts = {
        "encoder": convnets.Encoder_Conv_VAE_MNIST(config),
        "decoder": convnets.Decoder_Conv_AE_MNIST(config),
    }
    if kind == "vae":
        return models.VAE(config, **parts)
    if kind == "aae":
        return models.Adversarial_AE(config, **parts)
    return models.VAEGAN(config, **parts, discriminator=convnets.Discriminator_Conv_MNIST(config))


def exchange(job: dict[str, Any], model: Any, images: Tensor) -> dict[str, float]:
    """Write weights, images and draws for the twin, and return the losses."""
    from safetensors.torch import save_file

    draws = [torch.randn(len(images), LATENTS) for _ in range(2)]
    if job["kind"] == "vq_vae":  # its first codes lie at 0, all images would have one
        width = model.quantizer.embeddings.shape[1]
        model.quantizer.embeddings.normal_(std=width**-0.5)
    tensors = {f"weight.{name}": value for name, value in model.state_dict().items()}
    tensors |= {"images": images, "epsilon": draws[0], "prior": draws[1]}
    save_file(
        {key: value.clone() for key, value in tensors.items()},
        Path(job["folder"]) / f"{job['kind']}.safetensors",
    )

    model.train()
    with mock.patch.object(torch, "randn_like", side_effect=draws):
        out = model({"data": images})
    return losses(job["kind"], model, out)


def losses(kind: str, model: Any, out: Any) -> dict[str, float]:
    """The pieces of pythae's losses."""
    if kind == "vae":
        return {"reconstruction": float(out.recon_loss), "kl": float(out.reg_loss)}
    if kind == "vq_vae":
        return {"reconstruction": float(out.recon_loss), "commitment": float(out.vq_loss)}
    if kind == "aae":
        return {
            "reconstruction": float(out.recon_loss),
            "encoder's adversarial term": float(out.autoencoder_loss - out.recon_loss)
            / model.adversarial_loss_scale,
            "discriminator": float(out.discriminator_loss),
        }
    return {
        "feature errors": float(out.recon_loss),
        "kl": float(out.encoder_loss - out.recon_loss),
        "discriminator": float(out.discriminator_loss),
        "decoder's adversarial term": float(out.decoder_loss - 0.5 * out.recon_loss) / 0.5,
    }


def timed(job: dict[str, Any], model: Any, images: Tensor) -> float:
    """The median time of an epoch of one batch, the trainer's `train_step`."""
    trainer_of = {
        "aae": (trainers.AdversarialTrainer, trainers.AdversarialTrainerConfig),
        "vae_gan": (
            trainers.CoupledOptimizerAdversarialTrainer,
            trainers.CoupledOptimizerAdversarialTrainerConfig,
        ),
    }
    trainer, config = trainer_of.get(job["kind"], (trainers.BaseTrainer, trainers.BaseTrainerConfig))
    running = trainer(
        model=model,
        train_dataset=BaseDataset(images, torch.zeros(len(images))),
        training_config=config(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(images), no_cuda=True
        ),
    )
    running.prepare_training()
    times = []
    for epoch in range(1, WARM_UP + job["steps"] + 1):
        begin = time.perf_counter()
        running.train_step(epoch)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
