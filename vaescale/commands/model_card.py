"""The model card of an exported run: what it is, how it is opened, its numbers with their protocol, data hashes and recipe."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vaescale.config import Window
from vaescale.runs import folder as run_folder
from vaescale.system.files import write_whole
from vaescale.trained import Trained

CARD, PICTURE = "README.md", "samples.png"
SHOWN = ("neg_elbo_nats", "neg_iwae_nats", "bits_per_dim", "kl_nats", "mse", "sigma")
LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx"}
OPENED = {
    "mlflow": 'mlflow.pyfunc.load_model(snapshot_download("{repository}"))',
    "diffusers": 'AutoencoderKL.from_pretrained("{repository}")',
    "torch_export": 'torch.export.load(hf_hub_download("{repository}", "encode.pt2")).module()',
    "onnx": 'onnxruntime.InferenceSession(hf_hub_download("{repository}", "encode.onnx"))',
}
OPENED_HERE = {
    "mlflow": 'mlflow.pyfunc.load_model("{folder}")',
    "diffusers": 'AutoencoderKL.from_pretrained("{folder}")',
    "torch_export": 'torch.export.load("{folder}/encode.pt2").module()',
    "onnx": 'onnxruntime.InferenceSession("{folder}/encode.onnx")',
}
IMPORTS = {
    "mlflow": "import mlflow",
    "diffusers": "from diffusers import AutoencoderKL",
    "torch_export": "import torch",
    "onnx": "import onnxruntime",
}
USE = {
    "mlflow": """The model brings its source (`code/`) and pinned requirements, so it needs no vaescale. It takes images {shape} or {shape_last}, {takes}. `params` are `mode` (`reconstruct`, `encode`, `sample`), `prior`, `decode`, `temperature` and `seed`.

```python
model.predict(images, params={{"mode": "encode"}})
```

```
mlflow models serve -m {folder} --env-manager uv --port 5001
curl localhost:5001/invocations -H 'Content-Type: application/json' -d '{{"inputs": [IMAGE, ...], "params": {{"mode": "encode"}}}}'
```""",
    "diffusers": "",
    "torch_export": "`encode.pt2` takes {graph_takes}; `decode.pt2` takes its means. `vaescale.json` describes both.",
    "onnx": "`encode.onnx` takes {graph_takes}; `decode.onnx` takes its means. `vaescale.json` describes both.",
}


def write_card(trained: Trained, out: Path, *, format: str, repository: str | None = None) -> None:  # noqa: A002
    """Write the model card into an exported folder, with the run's picture of samples if it has one."""
    picture = trained.folder / "figures" / PICTURE
    if picture.is_file():
        shutil.copyfile(picture, out / PICTURE)
    card = model_card(trained, format=format, repository=repository, folder=out.name)
    write_whole(out / CARD, card.encode())


def model_card(trained: Trained, *, format: str, repository: str | None = None, folder: str = "OUT") -> str:  # noqa: A002
    """The README.md of an exported run, in a model repository or, without one, in a folder. It names no license, which its owner chooses."""
    recipe = trained.recipe
    header = {
        "library_name": LIBRARIES.get(format, "vaescale"),
        "tags": ["variational-autoencoder", "vaescale", format.replace("_", "-")],
    }
    channels, height, width = recipe.data.image_shape
    window, shape = recipe.data.window, f"[N, {channels}, {height}, {width}]"
    takes = "uint8 or real numbers in [0, 1], and returns float32"
    graph_takes = f"float32 images {shape} in [0, 1]"
    if window != Window():
        takes = f"values of {window.text()}, and returns images as such values, latents as float32"
        graph_takes = f"images {shape} of values of {window.text()}"
    what = (
        f"A variational autoencoder of images {channels}x{height}x{width}, trained with vaescale: network `{recipe.network.kind}`, "
        f"posterior `{recipe.posterior.kind}`, likelihood `{recipe.likelihood.kind}`. Step {trained.step}, "
        f"`{trained.weights}` weights, exported as `{format}`."
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {recipe.name}",
        what,
        f"```python\n{_opened(format, repository, folder)}\n```",
        USE[format].format(
            shape=shape,
            shape_last=f"[N, {height}, {width}, {channels}]",
            folder=folder,
            takes=takes,
            graph_takes=graph_takes,
        ),
        *_data(trained),
        *_numbers(trained),
        *(
            [f"## Samples\n\n![Samples of the prior, and of the mixture if there is one]({PICTURE})"]
            if (trained.folder / "figures" / PICTURE).is_file()
            else []
        ),
        "## Hashes\n\n" + _table(("What", "sha256"), _hashes(trained)),
        f"## Recipe\n\n```yaml\n{recipe.to_yaml().strip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opened(format: str, repository: str | None, folder: str) -> str:  # noqa: A002
    """The lines of Python that open it."""
    if repository is None:
        return f"{IMPORTS[format]}\n\nmodel = {OPENED_HERE[format].format(folder=folder)}"
    call = OPENED[format].format(repository=repository)
    download = next((name for name in ("snapshot_download", "hf_hub_download") if name in call), None)
    lines = [IMPORTS[format], *([f"from huggingface_hub import {download}"] if download else [])]
    return "\n".join(lines) + f"\n\nmodel = {call}"


def _data(trained: Trained) -> Iterator[str]:
    """What the model was trained on, as far as the run knows it."""
    data, tags = trained.recipe.data, run_folder.read_json(trained.folder / run_folder.TAGS)
    changes = " A random half was mirrored." if data.flip else ""
    changes += (
        f" Random changes: {data.augment.words}; the density models these changed images."
        if data.augment
        else ""
    )
    changes += " Classes were balanced." if data.balance else ""
    batch = f"{trained.step} steps of {data.global_batch} images"
    made = (
        f", vaescale {tags['vaescale_version']}, torch {tags['torch_version']}"
        if "torch_version" in tags
        else ""
    )
    weights = [
        f", weight {one.weight:g}" if one.weight is not None and len(data.sets) > 1 else ""
        for one in data.sets
    ]
    places = [Path(one.path) for one in data.sets]
    sets = [
        f"`{place.parent.name}/{place.name}`{weight}" for place, weight in zip(places, weights, strict=True)
    ]
    yield f"## Data\n\nTrained on {' and '.join(sets)}, {batch}{made}.{changes}"


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
