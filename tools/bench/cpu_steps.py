# mypy: disable-error-code="import-not-found,arg-type,no-untyped-call,type-arg"
"""One row of `cpu.py`: times steps in this process and prints their median in seconds. The argument is a JSON object."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

WARM_UP = 3


def main() -> None:
    """Time one kind of step."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    step = {"recipe": ours, "pythae": pythae, "vdvae": vdvae}[job["kind"]](job)
    times = []
    for number in range(WARM_UP + job["steps"]):
        begin = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begin)
    sys.stdout.write(f"\n{statistics.median(times[WARM_UP:])}\n")


def ours(job: dict[str, Any]) -> Callable[[int], object]:
    """vaescale's step. twin: of pythae's CelebA network."""
    import os

    from tools.bench import gpu_training
    from vaescale.networks.presets import PRESETS, Preset
    from vaescale.recipe import load_recipe
    from vaescale.system.host import keep_freed_pages
    from vaescale.training import launch

    if os.environ.get("VAESCALE_BENCH_PLAIN"):
        launch.LARGE = 1 << 30  # maps in torch's usual order
    if job["twin"]:
        PRESETS["wae_celeba"] = Preset(
            encoder=tuple((width, 4, 2) for width in (128, 256, 512, 1024)),
            decoder=((512, 5, 2), (256, 5, 2), (128, 5, 2)),
            last=(5, 1),
            norm="batch",
            start_activation=False,
        )
    keep_freed_pages()
    options = (*job["options"], f"data.global_batch={job['images']}")
    recipe = load_recipe(Path(job["recipe"]), list(options))
    return gpu_training._ours(recipe, job["images"], torch.device("cpu"))[1]


def pythae(job: dict[str, Any]) -> Callable[[int], object]:
    """A step of pythae's trainer, with its CelebA network."""
    import tempfile

    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.nn.benchmarks.celeba import Decoder_Conv_AE_CELEBA, Encoder_Conv_VAE_CELEBA
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    config = VAEConfig(input_dim=(3, 64, 64), latent_dim=64)
    model = VAE(config, encoder=Encoder_Conv_VAE_CELEBA(config), decoder=Decoder_Conv_AE_CELEBA(config))
    images = torch.rand(job["images"], 3, 64, 64)
    trainer = BaseTrainer(
        model=model,
        train_dataset=BaseDataset(images, torch.zeros(len(images))),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(images),
            learning_rate=1e-4,
            no_cuda=True,
        ),
    )
    trainer.prepare_training()
    return lambda number: trainer.train_step(number)


def vdvae(job: dict[str, Any]) -> Callable[[int], object]:
    """A step of the VDVAE authors' code: their modules, clipping, optimizer and averaged weights."""
    import copy

    from vaescale.networks.stages import suggested
    from vaescale.recipe import load_recipe

    recipe: Any = load_recipe(Path(job["recipe"]), job["options"])
    network, size = recipe.network, recipe.data.image_size
    sys.path.insert(0, job["vdvae"])
    for name in ("mpi4py", "apex"):  # which the modules do not use on one process
        sys.modules.setdefault(name, SimpleNamespace())
    from vae import VAE

    down, up = suggested((size, size))
    settings = SimpleNamespace(
        width=network.width,
        custom_width_str=",".join(f"{key}:{value}" for key, value in network.widths.items()),
        enc_blocks=",".join(network.encoder or down),
        dec_blocks=",".join(network.decoder or up),
        image_size=size,
        image_channels=3,
        zdim=network.latent_dim,
        bottleneck_multiple=network.bottleneck,
        no_bias_above=network.biases_up_to,
        num_mixtures=10,
        dataset="cifar10",
    )
    model = VAE(settings)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01, betas=(0.9, 0.9))
    images = torch.randint(0, 256, (job["images"], size, size, 3))
    x = (images / 255 - 0.5) * 4
    target = images.float() / 127.5 - 1

    def step(number: int) -> object:
        model.zero_grad()
        terms = model.forward(x, target)
        terms["elbo"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 200.0)
        optimizer.step()
        for own, other in zip(average.parameters(), model.parameters(), strict=True):
            own.data.mul_(0.9998).add_(other.data * 0.0002)
        return number

    return step


if __name__ == "__main__":
    main()
