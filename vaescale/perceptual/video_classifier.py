"""A small classifier of sequences. The average of its last maps over places and time is the features of a video.

It reads the maps of a classifier of frames (`classifier.py`), trained before it, at the last resolution but one, where places can still
be told apart. Each block convolves the maps of two frames that follow each other, as channels beside each other:

    x_t [F, h, w]  ->  silu(norm(conv([x_t, x_t+1])))        T frames give T - 1 maps, and after two blocks T - 2

The class alone can be told without motion. A second task is therefore trained with it: are the frames in order, or permuted (Misra,
Zitnick & Hebert 2016)? Permuted frames, and movement unlike that of the training sequences, then change the features.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from vaescale import noise
from vaescale.data.batch import Batch
from vaescale.data.config import MOST_FRAMES
from vaescale.errors import DataError
from vaescale.perceptual.classifier import Classifier, Shape, classes_of, damaged, weights_of
from vaescale.system.files import strict_json, write_whole

FORMAT = {"format": "vaescale-video-features", "version": 1}
TENSORS, DETAILS = "videos.safetensors", "videos.json"
LEAST_FRAMES = 3
IN_ORDER, PERMUTED = 0, 1


class VideoClassifier(nn.Module):
    """A network from sequences [B, T, C, H, W] in [0, 1] to features [B, F], logits of classes, and logits of order and permutation.

    frame: the classifier of frames, whose weights are not trained any more. The numbers of features of both are equal.
    """

    def __init__(self, frame: Classifier, classes: int) -> None:
        super().__init__()
        self.size = frame.size
        self._frame = (frame,)  # in a tuple: its weights have a file of their own
        before = frame.size // 2
        self.blocks = nn.Sequential(_Pairs(before, before, stride=1), _Pairs(before, frame.size, stride=2))
        self.head = nn.Linear(self.size, classes)
        self.order = nn.Linear(self.size, 2)

    def features(self, x: Tensor) -> Tensor:
        """The features [B, F] of sequences [B, T, C, H, W] in [0, 1]."""
        with torch.no_grad():
            maps = self._frame[0].map_before_last(x.flatten(0, 1))
        read: Tensor = self.blocks(maps.view(*x.shape[:2], *maps.shape[1:]))
        return read.mean((1, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, classes] of sequences [B, T, C, H, W] in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits


class _Pairs(nn.Module):
    """Maps [B, T, F, h, w] to [B, T - 1, G, h / stride, w / stride]."""

    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2 * before, after, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(8, after), after)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.cat([x[:, :-1], x[:, 1:]], dim=2)
        maps: Tensor = silu(self.norm(self.convolution(pairs.flatten(0, 1))))
        return maps.view(*pairs.shape[:2], *maps.shape[1:])


def permuted(x: Tensor, stream: noise.Stream) -> Tensor:
    """Sequences [B, T, ...] with their frames in another order, which is drawn: a function of seed, step and slot."""
    order = noise.uniform(stream, noise.CHOICE, (x.shape[1],)).argsort(1)
    unchanged = (order == torch.arange(x.shape[1])).all(1)
    order[unchanged] = order[unchanged].roll(1, 1)
    return x[torch.arange(len(x))[:, None], order]


def drawn_frames(batches: Iterable[list[Batch]], *, seed: int) -> Iterator[list[Batch]]:
    """One frame of each sequence as a batch of images, drawn by (seed, step, slot)."""
    for step, (batch,) in enumerate(batches):
        stream = noise.Stream(seed, step, batch.slots)
        number = (noise.uniform(stream, noise.CHOICE, (1,))[:, 0] * batch.images.shape[1]).long()
        yield [batch._replace(images=batch.images[torch.arange(len(number)), number])]


def all_frames(batches: Iterable[Batch]) -> Iterator[Batch]:
    """All frames of the sequences as batches of images."""
    for batch in batches:
        frames = batch.images.shape[1]
        labels, mask = (each.repeat_interleave(frames) for each in (batch.labels, batch.mask))
        yield batch._replace(images=batch.images.flatten(0, 1), labels=labels, mask=mask)


def train(
    frame: Classifier,
    shape: Shape,
    batches: Iterable[list[Batch]],
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    report: Callable[[int, float], None] | None = None,
) -> VideoClassifier:
    """Train the part over time by AdamW with a cosine schedule over `steps` batches, in float32. Every other slot is permuted.

    report: called after each step with the number of steps done and the sum of both losses in nats. Raises DataError for classes that do
    not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoClassifier(frame, shape.classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step, (batch,) in enumerate(batches):
        x, order = batch.images.float() / 255, batch.slots % 2
        shuffled = permuted(x, noise.Stream(seed, step, batch.slots))
        features = model.features(torch.where((order == PERMUTED)[:, None, None, None, None], shuffled, x))
        loss = cross_entropy(model.head(features), classes_of(batch, shape.classes))
        loss = loss + cross_entropy(model.order(features), order)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, float(loss.detach()))
    return model.eval()


@torch.no_grad()
def order_accuracy(model: VideoClassifier, batches: Iterable[Batch], *, seed: int) -> float:
    """The share of sequences, each in order and permuted, of which the model says so. Raises DataError when there are none."""
    right = number = 0
    for batch in batches:
        x = batch.images[batch.mask].float() / 255
        shuffled = permuted(x, noise.Stream(seed, 0, batch.slots[batch.mask]))
        for order, shown in ((IN_ORDER, x), (PERMUTED, shuffled)):
            right += int((model.order(model.features(shown)).argmax(1) == order).sum())
            number += len(shown)
    if not number:
        raise DataError("there are no sequences to measure the accuracy on; give --val a set that has some")
    return right / number


class VideoDetails(NamedTuple):
    """What videos.json says: T of the sequences, the hash of both networks' weights, and the accuracies on held-out sequences."""

    frames: int
    identity: str
    accuracy: float
    order_accuracy: float


def save(model: VideoClassifier, folder: Path, details: dict[str, Any]) -> str:
    """Write videos.safetensors and videos.json; `classifier.save` writes the part of frames. Returns the sha256 of the former.

    details: with `frames`, T of the sequences, and both accuracies.
    """
    content, sha256 = weights_of(model)
    _, of_frames = weights_of(model._frame[0])
    write_whole(folder / TENSORS, content)
    text = strict_json({**FORMAT, "sha256": sha256, "frames_sha256": of_frames, **details}, indent=1)
    write_whole(folder / DETAILS, (text + "\n").encode())
    return sha256


def load(folder: Path, frame: Classifier, shape: Shape, sha256: str) -> tuple[VideoClassifier, VideoDetails]:
    """The part over time that `save` wrote, for the classifier of frames in the same folder. Raises UserError when it is damaged.

    sha256: of the weights of `frame`.
    """
    try:
        details = dict(json.loads((folder / DETAILS).read_bytes()))
        content = (folder / TENSORS).read_bytes()
        tensors = from_bytes(content)
        frames = details["frames"]
        known = VideoDetails(
            frames,
            hashlib.sha256(f"{details['sha256']} {sha256} {frames}".encode()).hexdigest(),
            float(details["accuracy"]),
            float(details["order_accuracy"]),
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise damaged(folder, str(error)) from error
    if any(details.get(key) != value for key, value in FORMAT.items()):
        raise damaged(folder, "the part of videos is of another version")
    if type(frames) is not int or not LEAST_FRAMES <= frames <= MOST_FRAMES:
        raise damaged(folder, f"its number of frames {frames!r} is invalid")
    if hashlib.sha256(content).hexdigest() != details["sha256"] or details.get("frames_sha256") != sha256:
        raise damaged(folder, "the hash of the weights is not that in videos.json")
    model = VideoClassifier(frame, shape.classes)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise damaged(folder, "the weights do not fit the network") from None
    return model.eval(), known
