"""The discriminators of an objective: one module, so that one wrapper averages all their gradients over the ranks.

Each compares pairs of inputs of which it should accept one kind, `data`, and refuse the others, `fakes`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaescale import noise
from vaescale.adversaries import losses
from vaescale.adversaries.augment import augmented
from vaescale.adversaries.config import (
    ImagePlayerConfig,
    LatentPlayerConfig,
    PairPlayerConfig,
    PlayerConfig,
)
from vaescale.adversaries.networks import ImageCritic, LatentCritic, PairCritic
from vaescale.likelihoods.sigma import wide
from vaescale.models.shown import Shown

IMAGES = frozenset({"x", "reconstructed", "held", "generated"})
SETS = 8  # of inputs that a step draws augmentations for: the autoencoder's, then those of each update


class Match(NamedTuple):
    """What a discriminator compares, as names of Shown's fields: the inputs that it should accept, and those that it should refuse."""

    data: tuple[str, ...]
    fakes: tuple[tuple[str, ...], ...]


class Judged(NamedTuple):
    """A rank's share of an update. loss []; figures [4 K] of the K discriminators: loss without regularization, mean logit of data, of
    fakes, and the accuracy, the mean of the shares of data with a positive and of fakes with a negative logit.
    """

    loss: Tensor
    figures: Tensor


class Discriminators(nn.Module):
    """The second player. matches: what each of `image`, `latent` and `pair` compares."""

    def __init__(
        self,
        config: PlayerConfig,
        matches: Mapping[str, Match],
        *,
        image_shape: tuple[int, int, int],
        latent_dim: int,
    ) -> None:
        super().__init__()
        self.config, self.matches = config, dict(matches)
        self.autocast: torch.dtype | None = None
        self.critics = nn.ModuleDict()
        for name in matches:
            self.critics[name] = _critic(name, config, image_shape, latent_dim)
            if config.lecam:
                self.register_buffer(f"{name}_running", torch.zeros(2, dtype=torch.float64))

    def forward(self, shown: Shown, stream: noise.Stream, update: int) -> Judged:
        """The loss of one update. shown: as constants; update: its number within the step."""
        total, figures = shown.x.new_zeros(()), []
        for name, match in self.matches.items():
            loss, of_critic = self._judge(name, match, shown, stream, 1 + update)
            total = total + loss
            figures.append(of_critic)
        return Judged(total, torch.cat(figures))

    def logits(
        self, name: str, inputs: tuple[tuple[str, ...], ...], shown: Shown, stream: noise.Stream
    ) -> tuple[Tensor, ...]:
        """A discriminator's logits [B, P] of several inputs, named as fields of shown, for the autoencoder's loss: with gradients for
        what is shown, and none for the discriminator, whose state does not change.
        """
        with self._constant():
            return self._logits(name, inputs, self._seen(inputs, shown, stream, 0))

    def features(self, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The image discriminator's features [B, F] of images [B, C, H, W], with gradients for the images alone."""
        critic = self.critics["image"]
        assert isinstance(critic, ImageCritic)
        with self._constant(), self._precision(images[0]):
            maps = critic.features(2 * torch.cat(images) - 1)
        return wide(maps).chunk(len(images))

    def names(self) -> list[str]:
        """The names of Judged.figures."""
        prefixes = ["" if len(self.matches) == 1 else f"{name}_" for name in self.matches]
        return [
            f"{prefix}discriminator_{figure}"
            for prefix in prefixes
            for figure in ("loss", "real", "fake", "accuracy")
        ]

    def _judge(
        self, name: str, match: Match, shown: Shown, stream: noise.Stream, number: int
    ) -> tuple[Tensor, Tensor]:
        config, inputs = self.config, (match.data, *match.fakes)
        if penalized := config.r1 > 0 or config.r2 > 0:
            fields = {field: getattr(shown, field) for names in inputs for field in names}
            shown = shown._replace(
                **{field: value.detach().requires_grad_() for field, value in fields.items()}
            )
        logits = self._logits(name, inputs, self._seen(inputs, shown, stream, number))
        loss = losses.on_data(config.loss, logits[0])
        loss = loss + sum(losses.on_fakes(config.loss, fake) for fake in logits[1:])
        fakes = torch.cat(logits[1:])
        right = ((logits[0] > 0).float().mean() + (fakes < 0).float().mean()) / 2
        figures = torch.stack([loss, logits[0].mean(), fakes.mean(), right]).detach()
        if penalized:
            gammas = (config.r1, *[config.r2 for _ in match.fakes])
            for gamma, names, logit in zip(gammas, inputs, logits, strict=True):
                if gamma:
                    loss = loss + gamma / 2 * _steepness(logit, [getattr(shown, field) for field in names])
        if config.lecam:
            running = self.get_buffer(f"{name}_running")
            loss = loss + config.lecam * losses.lecam(logits[0], fakes, running).to(loss)
        return loss, figures

    def _seen(
        self, inputs: tuple[tuple[str, ...], ...], shown: Shown, stream: noise.Stream, number: int
    ) -> list[Tensor]:
        """The arguments of a discriminator, all inputs in one batch; images in [-1, 1] and augmented."""
        kinds = getattr(self.config, "augment", ())
        arguments: list[list[Tensor]] = [[] for _ in inputs[0]]
        for place, names in enumerate(inputs):
            for argument, field in zip(arguments, names, strict=True):
                value = getattr(shown, field)
                if field in IMAGES:
                    value = augmented(2 * value - 1, kinds, stream, SETS * number + place)
                argument.append(value)
        return [torch.cat(argument) for argument in arguments]

    def _logits(
        self, name: str, inputs: tuple[tuple[str, ...], ...], arguments: list[Tensor]
    ) -> tuple[Tensor, ...]:
        with self._precision(arguments[0]):
            logits: Tensor = self.critics[name](*arguments)
        return wide(logits).chunk(len(inputs))

    @contextmanager
    def _precision(self, like: Tensor) -> Iterator[None]:
        exact = self.config.r1 > 0 or self.config.r2 > 0
        dtype = None if exact else self.autocast
        with torch.autocast(like.device.type, dtype, enabled=dtype is not None):
            yield

    @contextmanager
    def _constant(self) -> Iterator[None]:
        """Within the block weights get no gradient, and spectral norms do not advance their estimates."""
        self.requires_grad_(False).eval()
        try:
            yield
        finally:
            self.requires_grad_(True).train()


def _critic(name: str, config: PlayerConfig, image_shape: tuple[int, int, int], latent_dim: int) -> nn.Module:
    if name == "image":
        assert isinstance(config, ImagePlayerConfig)
        return ImageCritic(config, image_shape)
    if name == "latent":
        assert isinstance(config, LatentPlayerConfig)
        return LatentCritic(config, latent_dim)
    assert isinstance(config, PairPlayerConfig)
    return PairCritic(config, latent_dim, image_shape)


def _steepness(logits: Tensor, inputs: list[Tensor]) -> Tensor:
    """The mean over examples of |gradient of an example's mean logit for its inputs|^2, [], with a gradient."""
    gradients = torch.autograd.grad(logits.mean(1).sum(), inputs, create_graph=True)
    return torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).mean()
