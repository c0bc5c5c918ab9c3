"""The perceptual distance against one written plainly, against the lpips package, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

from vaescale.errors import UserError
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.perceptual import classifier
from vaescale.perceptual.backbones import ALEX, VGG, Layer
from vaescale.perceptual.classifier import Classifier, Shape
from vaescale.perceptual.config import PerceptualConfig
from vaescale.perceptual.distance import Distance, open_distance

CPU = torch.device("cpu")


def weights_of(layers: tuple[Layer, ...]) -> dict[str, Tensor]:
    """Random weights with the names of the lpips package."""
    generator = torch.Generator().manual_seed(0)
    tensors, channels, compared = {}, 3, 0
    for layer in layers:
        name = f"net.slice{layer.slice}.{layer.number}"
        shape = (layer.width, channels, layer.kernel, layer.kernel)
        tensors[f"{name}.weight"] = (
            torch.randn(shape, generator=generator) / (channels * layer.kernel**2) ** 0.5
        )
        tensors[f"{name}.bias"] = torch.randn(layer.width, generator=generator) / 10
        channels = layer.width
        if layer.compared:
            tensors[f"lin{compared}.model.1.weight"] = torch.rand(1, layer.width, 1, 1, generator=generator)
            compared += 1
    return tensors


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(weights_of(ALEX), path)
    return path


def opened(features: Path | str, shape: tuple[int, int, int] = (3, 32, 32), **keys: Any) -> Distance:
    return open_distance(PerceptualConfig(features=str(features), **keys), shape, CPU)


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(shape)
    return x, (x + 0.1 * torch.randn(shape)).clamp(0, 1).requires_grad_()


def test_alexnet_written_plainly(alex: Path) -> None:
    w = {name: value.double() for name, value in weights_of(ALEX).items()}

    def maps(image: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
        h = (2 * image.double() - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
        found = [relu(conv2d(h, w["net.slice1.0.weight"], w["net.slice1.0.bias"], 4, 2))]
        h = max_pool2d(found[-1], 3, 2)
        found.append(relu(conv2d(h, w["net.slice2.3.weight"], w["net.slice2.3.bias"], 1, 2)))
        h = max_pool2d(found[-1], 3, 2)
        found.append(relu(conv2d(h, w["net.slice3.6.weight"], w["net.slice3.6.bias"], 1, 1)))
        for name in ("net.slice4.8", "net.slice5.10"):
            found.append(relu(conv2d(found[-1], w[f"{name}.weight"], w[f"{name}.bias"], 1, 1)))
        return found

    x, y = pair((3, 3, 32, 32))
    expected = torch.zeros(3, dtype=torch.float64)
    for number, (a, b) in enumerate(zip(maps(x), maps(y.detach()), strict=True)):
        lengths = [torch.linalg.vector_norm(each, dim=1, keepdim=True) + 1e-10 for each in (a, b)]
        squared = (a / lengths[0] - b / lengths[1]) ** 2
        expected += (squared * w[f"lin{number}.model.1.weight"]).sum(1).mean((1, 2))
    torch.testing.assert_close(opened(alex)(x, y).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(opened(alex)(x, x), torch.zeros(3))


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equal_to_the_lpips_package(net: str, tmp_path: Path) -> None:
    lpips = pytest.importorskip("lpips", reason="lpips is not installed (pip install lpips torchvision)")
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    tensors = {name: value.contiguous() for name, value in theirs.state_dict().items() if "lins." not in name}
    save_file(tensors, tmp_path / "lpips.safetensors")
    x, y = pair((2, 3, 64, 64))
    ours = opened(tmp_path / "lpips.safetensors", (3, 64, 64))(x, y)
    torch.testing.assert_close(ours, theirs(x, y, normalize=True).flatten(), rtol=1e-5, atol=0)


def test_the_names_of_vgg(tmp_path: Path) -> None:
    save_file(weights_of(VGG), tmp_path / "vgg.safetensors")
    distance = opened(tmp_path / "vgg.safetensors", (3, 16, 16))
    x, y = pair((2, 3, 16, 16))
    distance(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert (distance(x, y) > 0).all()
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_gradient_is_finite_where_a_map_is_zero(tmp_path: Path) -> None:
    tensors = weights_of(ALEX)
    tensors["net.slice5.10.bias"] -= 100.0  # every last map is 0
    save_file(tensors, tmp_path / "dead.safetensors")
    x, y = pair((2, 3, 32, 32))
    opened(tmp_path / "dead.safetensors")(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()


def test_a_classifier_s_maps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = Shape(channels=1, size=8, classes=10, width=8)
    model = Classifier(shape)
    classifier.save(model, shape, tmp_path, {})
    x, y = pair((2, 1, 8, 8))
    stem = [model.stem(2 * image - 1) for image in (x, y.detach())]
    stage = [model.stages[0](each) for each in stem]
    units = [[each / each.norm(dim=1, keepdim=True) for each in maps] for maps in (stem, stage)]
    expected = sum((a - b).square().sum(1).mean((1, 2)) for a, b in units)
    torch.testing.assert_close(opened(tmp_path, (1, 8, 8))(x, y), expected)


class Two(nn.Module):
    """Maps by name, of colour images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        return {"fine": h, "coarse": self.second(h.relu())}


def test_an_exported_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = Two().eval(), tmp_path / "two.pt2"
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (torch.rand(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    x, y = pair((3, 1, 8, 8))
    trusted = {"trusted": True, "repeat_channels": True}
    both = opened(path, (1, 8, 8), **trusted)(x, y)
    parts = [opened(path, (1, 8, 8), **trusted, layers=[name])(x, y) for name in ("fine", "coarse")]
    torch.testing.assert_close(both, parts[0] + parts[1])
    with pytest.raises(UserError, match=r"has no middle; it has coarse, fine"):
        opened(path, (1, 8, 8), **trusted, layers=["middle"])
    with pytest.raises(UserError, match="does not take 2 images of 1x8x8"):
        opened(path, (1, 8, 8), trusted=True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"features": "x.pt2"}, "is a program and could do anything"),
        ({"features": "x", "trusted": True}, "layers and trusted are for programs"),
        ({"features": "x", "layers": ["a"]}, "layers and trusted are for programs"),
        ({"features": "x.pt2", "trusted": True, "layers": ["a", "a"]}, "must be different names"),
    ],
)
def test_sections_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PerceptualConfig(**keys)


def test_files_and_images_are_refused(alex: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        opened(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="is no safetensors file"):
        opened(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="has no weights of LPIPS"):
        opened(tmp_path / "other.safetensors")
    tensors = weights_of(ALEX)
    del tensors["lin4.model.1.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"lin4.model.1.weight is missing"):
        opened(tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="for images of at least 32x32, these have 16x16"):
        opened(alex, (3, 16, 16))
    with pytest.raises(UserError, match="images with 3 channels, these have 1; set objective"):
        opened(alex, (1, 32, 32))
    assert opened(alex, (1, 32, 32), repeat_channels=True)(*pair((2, 1, 32, 32))).shape == (2,)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no features"):
        opened(tmp_path / "empty")


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_every_likelihood_s_mean_has_a_gradient(name: str) -> None:
    likelihood = LIKELIHOODS[name](kind=name).implement(image_shape=(1, 4, 4))
    params = torch.randn(2, likelihood.num_params(1), 4, 4, requires_grad=True)
    likelihood.mean(params).square().sum().backward()
    assert params.grad is not None
    assert params.grad.abs().sum() > 0


def test_identities_tell_files_and_settings_apart(alex: Path, tmp_path: Path) -> None:
    tensors = weights_of(ALEX)
    tensors["lin0.model.1.weight"] = tensors["lin0.model.1.weight"] * 2
    save_file(tensors, tmp_path / "other.safetensors")
    identities = {
        opened(alex).identity,
        opened(tmp_path / "other.safetensors").identity,
        opened(alex, (1, 32, 32), repeat_channels=True).identity,
    }
    assert len(identities) == 3
    assert json.dumps(sorted(identities))
