"""A small convolutional classifier. The average of its last map over the places is the features of an image.

Its features give Frechet distances and similar scores for images that are unlike Inception's training images (digits, clothes).
Distances are comparable only with the same features.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from vaescale.config import Size, sides
from vaescale.data.batch import Batch
from vaescale.errors import DataError, UserError
from vaescale.system.files import strict_json, write_whole
from vaescale.system.uncompiled import AdamW

FORMAT = {"format": "vaescale-features", "version": 1}
TENSORS, DETAILS = "features.safetensors", "features.json"
SMALLEST_MAP, MOST_STAGES = 4, 4
MOST_WIDTH, MOST_CLASSES, MOST_SIZE = 512, 100_000, 4096


class Shape(NamedTuple):
    """The shape of a classifier: channels and size of the images, classes, and channels of the first map."""

    channels: int
    size: Size
    classes: int
    width: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, *sides(self.size))


class Classifier(nn.Module):
    """A network from images [B, C, H, W] in [0, 1] to features [B, F] and logits [B, classes]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        stages = max(1, min(MOST_STAGES, int(math.log2(max(1, min(sides(shape.size)) / SMALLEST_MAP)))))
        widths = [shape.width * 2**stage for stage in range(stages + 1)]
        self.size = widths[-1]
        self.stem = _Block(shape.channels, widths[0], stride=1)
        blocks = [
            nn.Sequential(_Block(before, after, stride=2), _Block(after, after, stride=1))
            for before, after in itertools.pairwise(widths)
        ]
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(self.size, shape.classes)

    def features(self, x: Tensor) -> Tensor:
        """The features [B, F] of images [B, C, H, W] in [0, 1]."""
        maps: Tensor = self.stages(self.stem(2 * x - 1))
        return maps.mean((2, 3))

    def map_before_last(self, x: Tensor) -> Tensor:
        """The map [B, F / 2, h, w] that the last stage reads, of images [B, C, H, W] in [0, 1]."""
        maps: Tensor = self.stages[:-1](self.stem(2 * x - 1))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, classes] of images [B, C, H, W] in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Maps(nn.Module):
    """The maps of a classifier by name, `stem` and stage0 on, from images [B, C, H, W] in [0, 1]."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each map [B, F, h, w]."""
        x = self.model.stem(2 * x - 1)
        maps = {"stem": x}
        for number, stage in enumerate(self.model.stages):
            x = maps[f"stage{number}"] = stage(x)
        return maps


class _Block(nn.Module):
    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(8, after), after)

    def forward(self, x: Tensor) -> Tensor:
        return silu(self.norm(self.convolution(x)))


def train(
    shape: Shape,
    batches: Iterable[list[Batch]],
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    report: Callable[[int, float], None] | None = None,
) -> Classifier:
    """Train a classifier by AdamW with a cosine schedule over `steps` batches, in float32.

    report: called after each step with the number of steps done and the loss in nats per image. Raises DataError for images without a class, or with a class that `shape` does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(shape)
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for done, (batch,) in enumerate(batches, start=1):
        loss = cross_entropy(model(batch.images.float() / 255), classes_of(batch, shape.classes))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if report is not None:
            report(done, float(loss.detach()))
    return model.eval()


class Accuracy(NamedTuple):
    """The share of images whose most probable class is correct, its mean over the classes, the share of the largest class, and
    the number of images.
    """

    plain: float
    balanced: float
    majority_share: float
    images: int


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], classes: int, batches: Iterable[Batch]) -> Accuracy:
    """The accuracy of a classifier, of images or sequences to logits. Raises DataError when there are no images."""
    right = torch.zeros(classes, dtype=torch.float64)
    counts = torch.zeros_like(right)
    for batch in batches:
        labels = classes_of(batch, classes)[batch.mask]
        predicted = model(batch.images[batch.mask].float() / 255).argmax(1)
        right += torch.bincount(labels[predicted == labels], minlength=len(right))
        counts += torch.bincount(labels, minlength=len(counts))
    images = int(counts.sum())
    if not images:
        raise DataError("there are no images to measure the accuracy on; give --val a data set with images")
    balanced = (right / counts)[counts > 0].mean()
    return Accuracy(int(right.sum()) / images, float(balanced), float(counts.max()) / images, images)


def save(model: Classifier, shape: Shape, folder: Path, details: dict[str, Any]) -> str:
    """Write features.safetensors and features.json. Returns the sha256 of the former."""
    content, sha256 = weights_of(model)
    write_whole(folder / TENSORS, content)
    text = strict_json({**FORMAT, **shape._asdict(), "sha256": sha256, **details}, indent=1)
    write_whole(folder / DETAILS, (text + "\n").encode())
    return sha256


def weights_of(model: nn.Module) -> tuple[bytes, str]:
    """The content of the file of a network's weights, and its sha256."""
    content = to_bytes({name: value.contiguous() for name, value in model.state_dict().items()})
    return content, hashlib.sha256(content).hexdigest()


def load(folder: Path) -> tuple[Classifier, Shape, dict[str, Any]]:
    """The classifier that `save` wrote. Raises UserError when it is absent or damaged."""
    try:
        details = dict(json.loads((folder / DETAILS).read_bytes()))
        content = (folder / TENSORS).read_bytes()
        tensors = from_bytes(content)
        size = details["size"]
        size = (size[0], size[1]) if isinstance(size, list) else size
        shape = Shape(details["channels"], size, details["classes"], details["width"])
        numbers = (*shape.image_shape, shape.classes, shape.width)
    except OSError:
        raise UserError(
            f"{folder} holds no features; train some with `vaescale train-features DIR --out {folder}`"
        ) from None
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise damaged(folder, str(error)) from error
    if any(details.get(key) != value for key, value in FORMAT.items()):
        raise damaged(folder, "it is of another version")
    most = (16, MOST_SIZE, MOST_SIZE, MOST_CLASSES, MOST_WIDTH)
    if not all(type(value) is int and 0 < value <= bound for value, bound in zip(numbers, most, strict=True)):
        raise damaged(folder, f"its shape {shape} is invalid")
    if hashlib.sha256(content).hexdigest() != details.get("sha256"):
        raise damaged(folder, "the hash of the weights is not that in features.json")
    model = Classifier(shape)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise damaged(folder, "the weights do not fit the network") from None
    return model.eval(), shape, details


def damaged(folder: Path, fault: str) -> UserError:
    """What to raise for features that cannot be read."""
    return UserError(f"the features in {folder} are damaged ({fault}); train them again")


def classes_of(batch: Batch, classes: int) -> Tensor:
    """The classes of a batch. Raises DataError for samples without one, or with one that is not below `classes`."""
    labels = batch.labels
    if bool((labels[batch.mask] < 0).any()):
        raise DataError("these images have no classes; train features on a labelled data set")
    if bool((labels[batch.mask] >= classes).any()):
        raise DataError(f"an image has class {int(labels.max())}, the training images have {classes} classes")
    return labels
