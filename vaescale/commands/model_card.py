"""The model card of an exported run: what it is, how it is opened, its numbers with their protocol, data hashes and recipe."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from vaescale.runs import folder as run_folder
from vaescale.trained import Trained

PICTURE = "samples.png"
SHOWN = ("neg_elbo_nats", "neg_iwae_nats", "bits_per_dim", "kl_nats", "mse", "sigma")
LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx"}
OPENED = {
    "mlflow": 'mlflow.pyfunc.load_model(snapshot_download("{repository}"))',
    "diffusers": 'AutoencoderKL.from_pretrained("{repository}")',
    "torch_export": 'torch.export.load(hf_hub_download("{repository}", "encode.pt2")).module()',
    "onnx": 'onnxruntime.InferenceSession(hf_hub_download("{repository}", "encode.onnx"))',
}


def model_card(trained: Trained, *, format: str, repository: str) -> str:  # noqa: A002
    """The README.md of a repository with the exported run. It names no license, which its owner chooses."""
    recipe = trained.recipe
    header = {
        "library_name": LIBRARIES.get(format, "vaescale"),
        "tags": ["variational-autoencoder", "vaescale", format.replace("_", "-")],
    }
    shape = "x".join(map(str, recipe.data.image_shape))
    what = (
        f"A variational autoencoder of images {shape}, trained with vaescale: network `{recipe.network.kind}`, "
        f"posterior `{recipe.posterior.kind}`, likelihood `{recipe.likelihood.kind}`. Step {trained.step}, "
        f"`{trained.weights}` weights, exported as `{format}`."
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {recipe.name}",
        what,
        f"```python\nmodel = {OPENED[format].format(repository=repository)}\n```",
        *_numbers(trained),
        *(
            [f"## Samples\n\n![Samples of the prior, and of the mixture if there is one]({PICTURE})"]
            if (trained.folder / "figures" / PICTURE).is_file()
            else []
        ),
        "## Hashes\n\n" + _table(("What", "sha256"), _hashes(trained)),
        f"## Recipe\n\n```yaml\n{recipe.to_yaml().strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _numbers(trained: Trained) -> Iterator[str]:
    """The last evaluation of the held-out images by the exported weights, if there is one."""
    name = "val" if trained.weights == "ema" else f"val-{trained.weights}"
    candidates = (
        run_folder.read_json(trained.folder / "evaluation" / f"{one}.json") for one in (name, "val")
    )
    for result in candidates:
        if result.get("weights_hash") == trained.weights_hash and (metrics := result.get("metrics")):
            rows = {key: f"{metrics[key]:.6g}" for key in SHOWN if isinstance(metrics.get(key), int | float)}
            protocol = (
                f"{metrics.get('images', 0):.0f} held-out images, data hash `{result.get('data_hash')}`"
            )
            yield (
                f"## Numbers\n\n{protocol}. Nats are means over images of sums over pixels and latents; images are in [0, 1].\n\n"
                + _table(("Metric", "Value"), rows)
            )
            return


def _hashes(trained: Trained) -> dict[str, str]:
    tags = run_folder.read_json(trained.folder / run_folder.TAGS)
    hashes = {
        "recipe": trained.recipe.hash,
        "weights": trained.weights_hash,
        "training data": tags.get("data_hash"),
        "held-out data": tags.get("val_data_hash"),
    }
    return {name: f"`{value}`" for name, value in hashes.items() if value}


def _table(titles: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [
        f"| {titles[0]} | {titles[1]} |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
    ]
    return "\n".join(lines)
