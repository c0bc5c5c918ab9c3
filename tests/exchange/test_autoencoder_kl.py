"""diffusers' AutoencoderKL: its names and numbers, both ways, and folders that are none.

autoencoder_kl.json has the names and shapes of two small models, as diffusers made them. The comparison of numbers needs diffusers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vaescale.config import sides
from vaescale.errors import UserError
from vaescale.exchange import autoencoder_kl
from vaescale.exchange.folders import INDEX, WEIGHTS
from vaescale.networks.resnet import ResnetNetwork

STORED = json.loads(Path(__file__).with_name("autoencoder_kl.json").read_text())["models"]
D, A, U, V = "DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
LAYOUTS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {"block_out_channels": (32, 64, 64), "norm_num_groups": 16, "layers_per_block": 2},
    "Stable Diffusion XL": {
        "scaling_factor": 0.13025,
        "block_out_channels": (32, 64, 128),
        "norm_num_groups": 32,
    },
    "Stable Diffusion 3": {
        "latent_channels": 16,
        "block_out_channels": (32, 64),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0609,
    },
    "FLUX": {
        "latent_channels": 16,
        "block_out_channels": (32, 32),
        "down_block_types": (D, A),
        "up_block_types": (V, U),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1159,
    },
    "grey, one resolution, no attention": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32,),
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
}


def network_of(read: autoencoder_kl.Autoencoder) -> ResnetNetwork:
    network = ResnetNetwork(
        read.network,
        image_size=sides(read.image_size),
        channels=read.channels,
        encoder_out=2 * read.network.latent_dim,
        out_channels=read.channels,
    )
    network.load_state_dict(read.tensors)
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a stored model with random weights: folder(number, weights=changes, **config)."""

    def write(number: int = 0, weights: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
        model, generator = STORED[number], torch.Generator().manual_seed(0)
        tensors = {
            name: 0.1 * torch.randn(shape, generator=generator) for name, shape in model["shapes"].items()
        }
        tensors |= weights or {}
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({**model["config"], **config}))
        save_file({name: value for name, value in tensors.items() if value is not None}, path / WEIGHTS)
        return path

    return write


@pytest.mark.parametrize("number", range(len(STORED)))
def test_every_tensor_has_its_place(folder, tmp_path: Path, number: int) -> None:
    """Reading what diffusers writes, and writing it again, gives its names, shapes, values and configuration."""
    path = folder(number)
    read = autoencoder_kl.read(path)
    network = network_of(read)
    config, tensors, own = autoencoder_kl.written(
        read.network, network.state_dict(), channels=read.channels, image_size=read.image_size
    )
    assert {name: list(value.shape) for name, value in tensors.items()} == STORED[number]["shapes"]
    before = load_file(path / WEIGHTS)
    for name, value in tensors.items():
        if name == "decoder.conv_out.bias":
            torch.testing.assert_close(value, before[name], rtol=0, atol=6e-8)
        else:
            assert torch.equal(value, before[name]), name
    for key, value in STORED[number]["config"].items():
        assert config[key] == value, key
    (tmp_path / "again").mkdir()
    (tmp_path / "again/config.json").write_text(json.dumps(config))
    (tmp_path / "again/vaescale.json").write_text(json.dumps(own))
    save_file(tensors, tmp_path / "again" / WEIGHTS)
    again = autoencoder_kl.read(tmp_path / "again")
    assert again.network == read.network
    assert all(torch.equal(again.tensors[name], value) for name, value in read.tensors.items())


def test_a_bias_that_somebody_has_trained_since_counts(folder) -> None:
    """The bias in [0, 1] beside the weights is that of the weights as they were written."""
    path = folder()
    bias = load_file(path / WEIGHTS)["decoder.conv_out.bias"]
    (path / "vaescale.json").write_text(json.dumps({"unit_bias": [0.1, 0.2, 0.3]}))
    here = next(
        name
        for name, there in autoencoder_kl.names_of(autoencoder_kl.read(path).network, image_size=32).items()
        if there.endswith("r.conv_out.bias") and there.startswith("decoder")
    )
    torch.testing.assert_close(autoencoder_kl.read(path).tensors[here], (bias + 1) / 2)


def test_several_files_old_names_and_half_precision(folder) -> None:
    """As Stable Diffusion 1 was published: attention layers with other names, 16-bit weights, and an index of files."""
    path = folder()
    plain = autoencoder_kl.read(path)
    tensors = load_file(path / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in tensors.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = value.half()
    (path / WEIGHTS).unlink()
    names = sorted(renamed)
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: renamed[name] for name in names if files[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": files}))
    read = autoencoder_kl.read(path)
    for name, value in plain.tensors.items():
        torch.testing.assert_close(read.tensors[name], value, rtol=1e-3, atol=1e-4)


def test_a_pipeline_s_folder_has_it_in_vae(folder, tmp_path: Path) -> None:
    path = folder()
    (tmp_path / "pipeline").mkdir()
    path.rename(tmp_path / "pipeline/vae")
    assert autoencoder_kl.is_folder(tmp_path / "pipeline")
    assert autoencoder_kl.read(tmp_path / "pipeline").network.width == 32
    assert not autoencoder_kl.is_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "VQModel"}, "describes 'VQModel'"),
        ({"act_fn": "relu"}, "act_fn 'relu'"),
        ({"norm_type": "spatial"}, "norm_type 'spatial'"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "has the blocks"),
        ({"up_block_types": [V, U, U]}, "has the blocks"),
        ({"block_out_channels": [32, 48, 64]}, "no multiples of the first"),
        ({"block_out_channels": "32"}, "no multiples|no whole configuration"),
        ({"norm_num_groups": 24}, "norm_num_groups 24"),
        ({"norm_num_groups": 0}, "norm_num_groups 0"),
        ({"latent_channels": None}, "no whole configuration"),
        ({"latent_channels": 8}, "and its configuration asks for"),
        ({"layers_per_block": 3}, "lacks .* more tensors"),
        ({"layers_per_block": 1}, "more tensors that its configuration does not describe"),
        ({"use_quant_conv": False}, "has quant_conv"),
        ({"out_channels": 1}, "other channels in than out"),
        ({"sample_size": None}, "no sample_size"),
    ],
)
def test_other_models_are_refused(folder, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        autoencoder_kl.read(folder(**config))


def test_damaged_folders_are_refused(folder, tmp_path: Path) -> None:
    path = folder()
    (path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no sound safetensors file"):
        autoencoder_kl.read(path)
    (path / WEIGHTS).rename(path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.bin is a pickle, which is never loaded"):
        autoencoder_kl.read(path)
    for file in ("../model.safetensors", "/tmp/model.safetensors", "model.bin", 3):  # noqa: S108
        (path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(UserError, match="no safetensors file of the folder"):
            autoencoder_kl.read(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    with pytest.raises(UserError, match=r"missing\.safetensors is missing"):
        autoencoder_kl.read(path)
    (path / "config.json").write_text("[1, 2")
    with pytest.raises(UserError, match="no sound JSON"):
        autoencoder_kl.read(path)
    with pytest.raises(UserError, match=r"no config\.json"):
        autoencoder_kl.read(tmp_path)


def test_tensors_of_other_types_are_refused(folder) -> None:
    name = "encoder.conv_in.bias"
    with pytest.raises(UserError, match=rf"has {name} as I64 \[32\]"):
        autoencoder_kl.read(folder(weights={name: torch.zeros(32, dtype=torch.int64)}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_diffusers(tmp_path: Path, layout: str) -> None:
    """Means, log variances and decoded images of diffusers' own model, in both directions."""
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed (pip install 'vaescale[diffusers]')"
    )
    config = {
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "sample_size": 16,
        **LAYOUTS[layout],
    }
    for key, kind in (("down_block_types", D), ("up_block_types", U)):
        config.setdefault(key, (kind,) * len(config["block_out_channels"]))
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value += 0.05 * torch.randn_like(value)
    theirs.save_pretrained(tmp_path / "theirs")
    read = autoencoder_kl.read(tmp_path / "theirs")
    ours = network_of(read)
    x = torch.rand(3, read.channels, 16, 16)
    with torch.no_grad():
        q, (mu, log_sigma) = theirs.encode(2 * x - 1).latent_dist, ours.encode(x).chunk(2, dim=1)
        torch.testing.assert_close(mu, q.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(2 * log_sigma, q.logvar, rtol=0, atol=1e-5)
        decoded = ours.decode(mu)
        torch.testing.assert_close(2 * decoded - 1, theirs.decode(mu).sample, rtol=0, atol=1e-5)
    written, tensors, _ = autoencoder_kl.written(
        read.network, ours.state_dict(), channels=read.channels, image_size=16
    )
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(written))
    save_file(tensors, tmp_path / "ours" / WEIGHTS)
    again, loading = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        torch.testing.assert_close(again.decode(mu).sample, 2 * decoded - 1, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.encode(2 * x - 1).latent_dist.mean, mu, rtol=0, atol=1e-5)
