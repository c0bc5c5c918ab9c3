"""A trained run for Python programs: `run = vaescale.load("runs/digits-optimal")`, and what it makes of arrays and pictures.

Every number is that of the verbs: image i of a call has the noise of slot `first` + i, so that `elbo` of the held-out images in order is
that of `vaescale evaluate`, image by image, and sample i of a seed is sample i of `vaescale sample`.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaescale import noise
from vaescale.aggregate.sampling import from_latents, image_of, parse_decoding
from vaescale.commands.chosen_vectors import as_vectors
from vaescale.commands.sample import choice_of, sources_of
from vaescale.commands.signature import Count, NonNegative, Temperature, checked
from vaescale.conditions.config import VectorCondition
from vaescale.conditions.embedding import NONE
from vaescale.config import Window
from vaescale.data.batch import Batch
from vaescale.data.given_images import Layout, Levels, as_levels, in_layout
from vaescale.errors import UserError
from vaescale.evaluation.importance import bounds_of, most_at_once
from vaescale.evaluation.likelihood import refuse_without_bound
from vaescale.evaluation.measures import Seen
from vaescale.models.units import to_stored
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe
from vaescale.runs import class_table
from vaescale.trained import Trained, Weights, images_at_once, number_of_classes, open_trained, refuse_codes

Floats = NDArray[np.float32]
Nats = NDArray[np.float64]
Prior = Literal["standard", "gmm", "autoregressive"] | Path


class Posterior(NamedTuple):
    """q(z|x) of N images: mean and log_sigma, float32 [N, Z]; of a ladder each group's, given the means of the groups above."""

    mean: Floats
    log_sigma: Floats


class Run:
    """An opened run. Functions of verbs take it in place of its folder: `vaescale.evaluate(run)`.

    Images are arrays or tensors [N, C, H, W] or [N, H, W, C], uint8 or real numbers in [0, 1], one image of it, PIL images or lists; see
    `data/given_images.py`. Real numbers are rounded to the 256 levels of image files. A run of another depth takes the values that its shards
    hold. Results are NumPy arrays, images in [0, 1] (`stored` makes stored values of them).
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    def __fspath__(self) -> str:
        """The run folder."""
        return os.fspath(self.folder)

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        return (
            f"<Run {self.recipe.name}: {self.folder}, step {self.step}, {self.weights} weights, images {channels}x{height}x{width}, "
            f"{self.device}>"
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.trained.folder

    @property
    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        return self.trained.recipe

    @property
    def step(self) -> int:
        """The step of the opened checkpoint."""
        return self.trained.step

    @property
    def weights(self) -> str:
        """The name of the opened weights: `ema`, `raw` or another average."""
        return self.trained.weights

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.trained.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W of the images."""
        return self.trained.model.image_shape

    @property
    def window(self) -> Window:
        """The type of the images, and the stored values that are 0 and 1: uint8 from 0 to 255, unless data.dtype or data.range are others."""
        return self.trained.model.window

    def stored(self, images: Floats) -> NDArray[Any]:
        """Results in [0, 1], clamped, as the values that shards hold: uint8 from 0 to 255, or of the run's type and range."""
        return to_stored(torch.from_numpy(np.ascontiguousarray(images)), self.window).numpy()

    @checked
    def encode(
        self,
        images: Any,
        *,
        layout: Layout | None = None,
        first: NonNegative = 0,
        classes: Any = None,
        vectors: Any = None,
    ) -> NDArray[Any]:
        """The means of q(z|x), float32 [N, *latent_shape]; of a ladder those of all groups, flat [N, Z], each given the means above it.

        Of a run with codes, the codes: int64 [N, h, w]. layout: the order of axes, needed only where C = H = W. first: the slot of the
        first image, where the target has noise (see `elbo`). classes: of a conditional run, the class of each image: numbers, names, None for
        none where classes were hidden in training; or one for all images. vectors: of a run that is given vectors, those of the images: an
        array [N, V] or [V] for all, a .npy file of one, or "none".
        """
        model = self.trained.model

        def encoded(seen: Seen) -> Tensor:
            if model.num_codes:
                codes: Tensor = seen.encoded.codes  # type: ignore[union-attr]
                return codes.reshape(-1, *model.latent_shape[1:])
            if len(model.group_sizes) > 1:
                return seen.model.joint_posterior(seen.x).mu
            return seen.model.posterior(seen.x).mu.float()

        levels = self._levels(images, layout)
        return self._of_images(encoded, levels, first, (classes, vectors))

    @checked
    def posterior(
        self,
        images: Any,
        *,
        layout: Layout | None = None,
        first: NonNegative = 0,
        classes: Any = None,
        vectors: Any = None,
    ) -> Posterior:
        """q(z|x) of all latents, flat. The arguments are those of `encode`. Raises UserError for a run with codes."""
        refuse_codes(self.trained, "posterior", "take encode")
        levels = self._levels(images, layout)

        def both(seen: Seen) -> Tensor:
            q = seen.model.joint_posterior(seen.x)
            return torch.stack([q.mu.expand_as(q.log_sigma), q.log_sigma.expand_as(q.mu)], dim=1).float()

        stacked = self._of_images(both, levels, first, (classes, vectors))
        return Posterior(stacked[:, 0], stacked[:, 1])

    @checked
    def reconstruct(
        self,
        images: Any,
        *,
        layout: Layout | None = None,
        first: NonNegative = 0,
        classes: Any = None,
        vectors: Any = None,
    ) -> Floats:
        """E[x|z] at the means of q(z|x), float32 in the images' order of axes. The arguments are those of `encode`."""
        levels, likelihood = self._levels(images, layout), self.trained.model.likelihood
        means = self._of_images(
            lambda seen: likelihood.mean(seen.params).float(), levels, first, (classes, vectors)
        )
        return in_layout(means, levels.layout)

    @checked
    @torch.no_grad()
    def decode(
        self,
        z: Any,
        *,
        decode: str = "mean",
        temperature: Temperature = 1.0,
        seed: NonNegative = 0,
        layout: Layout = "NCHW",
        classes: Any = None,
        vectors: Any = None,
    ) -> Floats:
        """Images float32 [N, C, H, W] from latents or codes, as `encode` returns them.

        z: of a ladder also the first groups alone; the others are drawn from their priors, with standard deviations times `temperature`.
        decode: mean, ancestral (a draw of p(x|z)) or offset:ALPHA; noise may exceed [0, 1]. seed: of what is drawn. classes: see `encode`. Raises UserError
        for latents of another size, and NaN.
        """
        model, decoding = self.trained.model, parse_decoding(decode)
        latents = self._latents(z)
        (labels, given), batches = self._condition((classes, vectors), len(latents)), []
        for slots in self._slots(len(latents), 0):
            stream = noise.Stream(seed, 0, slots)
            rows = latents[slots.cpu()].to(self.device)
            params = (
                model.decode_codes(rows)  # type: ignore[operator]
                if model.num_codes and not rows.is_floating_point()
                else self._given(model, labels, given, slots).decode(rows, stream, temperature)
            )
            batches.append(image_of(model.likelihood, params, decoding, stream).float().cpu().numpy())
        return in_layout(np.concatenate(batches), layout)

    @checked
    def sample(
        self,
        count: Count = 64,
        *,
        prior: Prior = "standard",
        components: Count | None = None,
        decode: str = "mean",
        temperature: Temperature = 1.0,
        seed: NonNegative = 0,
        layout: Layout = "NCHW",
        class_name: str | None = None,
        vector: Any = None,
    ) -> Floats:
        """Draw `count` images, float32 [count, C, H, W]. The arguments are those of `vaescale sample`."""
        model, decoding = self.trained.model, parse_decoding(decode)
        if components is not None and prior != "gmm":
            raise UserError(
                f"components (={components}) chooses a mixture; give prior='gmm' too, or leave it out"
            )
        if model.num_codes and temperature != 1 and prior != "autoregressive":
            raise UserError(
                f"temperature (={temperature:g}) has no meaning for uniform codes; give prior='autoregressive' too, or leave it out"
            )
        ((_, source),) = sources_of(self.trained, prior, components).items()
        batches, choice = [], choice_of(self.trained, class_name, vector)
        for slots in self._slots(count, 0):
            stream = noise.Stream(seed, 0, slots)
            params = from_latents(model, source, stream, temperature, choice=choice)
            batches.append(image_of(model.likelihood, params, decoding, stream).float().cpu().numpy())
        return in_layout(np.concatenate(batches), layout)

    @checked
    def elbo(
        self,
        images: Any,
        *,
        layout: Layout | None = None,
        first: NonNegative = 0,
        classes: Any = None,
        vectors: Any = None,
    ) -> Nats:
        """The evidence lower bound of each image with one draw of z, in nats, float64 [N]; of a conditional run that on log p(x|y), with
        `classes` as in `encode`.

        first: the slot of the first image, whose noise it has: with the images of a split in order and first=0, these are the numbers whose
        mean `vaescale evaluate` prints. Raises UserError for a run without a bound.
        """
        self._refuse_without_bound("elbo")
        model, levels = self.trained.model, self._levels(images, layout)
        if not len(levels.images):
            return np.zeros(0)

        def bound(seen: Seen) -> Tensor:
            terms = model.terms(seen.x, seen.drawn, seen.mask, measured=False)
            return terms.log_px.double() - terms.kl.double().sum(1)

        return self._of_images(bound, levels, first, (classes, vectors))

    @checked
    def log_prob(
        self,
        images: Any,
        *,
        draws: Count = 1000,
        layout: Layout | None = None,
        first: NonNegative = 0,
        classes: Any = None,
        vectors: Any = None,
    ) -> Nats:
        """log p(x) of each image by importance sampling with `draws` draws of z, in nats, float64 [N]: a lower bound in expectation.

        Burda, Grosse & Salakhutdinov 2016, eq. 8, with the draws of `vaescale evaluate --importance-samples`. first: see `elbo`. Raises
        UserError for a run without a bound, and for one with codes.
        """
        self._refuse_without_bound("log_prob")
        refuse_codes(self.trained, "log_prob", "take elbo: each image has one code")
        model, levels = self.trained.model, self._levels(images, layout)
        if not len(levels.images):
            return np.zeros(0)
        at_once = most_at_once(model)
        return self._of_images(
            lambda seen: bounds_of(
                model,
                seen,
                torch.arange(len(seen.x), device=self.device),
                samples=draws,
                report=lambda _: None,
            )[0],
            levels,
            first,
            (classes, vectors),
            at_once=at_once,
        )

    def _levels(self, images: Any, layout: Layout | None) -> Levels:
        """The images as stored values, checked, and their order of axes."""
        return as_levels(images, self.image_shape, layout=layout, window=self.window)

    def _refuse_without_bound(self, name: str) -> None:
        model = self.trained.model
        refuse_without_bound(model, f"{name} has no meaning for {self.folder}")
        if model.likelihood.reads_x:
            raise UserError(
                f"the likelihood of {self.folder} fits sigma to each image, which gives no bound on log p(x); {name} has no meaning here"
            )

    def _latents(self, z: Any) -> Tensor:
        """Latents flat [N, Z], or codes int64 [N, places], on the CPU."""
        model = self.trained.model
        given = z.detach().cpu() if isinstance(z, Tensor) else torch.from_numpy(np.array(z))
        whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if given.ndim < 2:
            raise UserError(f"z has the shape {list(given.shape)}; give [N, Z], also for one latent vector")
        flat = given.reshape(len(given), -1)
        if model.num_codes and whole:
            places = math.prod(model.latent_shape[1:])
            if flat.shape[1] != places or (
                flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < model.num_codes
            ):
                raise UserError(
                    f"z holds codes of the shape {list(given.shape)}; give [N, {places}] whole numbers from 0 to {model.num_codes - 1}"
                )
            return flat.long()
        sizes = np.cumsum(model.group_sizes).tolist()
        if flat.shape[1] not in sizes:
            raise UserError(
                f"z has {flat.shape[1]} latents for each image; the model takes {' or '.join(map(str, sizes))}"
            )
        if not whole and not bool(torch.isfinite(flat).all()):
            raise UserError("z holds NaN or Inf; give finite latents")
        return flat.float()

    def _slots(self, count: int, first: int, at_once: int | None = None) -> tuple[Tensor, ...]:
        slots = torch.arange(first, first + count, device=self.device)
        return torch.split(slots, at_once or images_at_once(self.image_shape))

    def _condition(self, given: tuple[Any, Any], count: int) -> tuple[Tensor, Tensor | None]:
        """The labels of images or latents, as `_labels`, and their vectors [count, V] if the run is given some. given: classes, vectors."""
        classes, vectors = given
        condition = self.trained.model.condition
        if not isinstance(condition, VectorCondition):
            if vectors is not None:
                raise UserError(
                    f"vectors has no meaning: {self.folder} is given no vectors (condition.kind=vector); leave it out"
                )
            return self._labels(classes, count), None
        if classes is not None:
            raise UserError(
                f"classes (={classes!r}) has no meaning: {self.folder} is given {condition.words}; give vectors"
            )
        rows = as_vectors(vectors, condition)
        if len(rows) not in (1, count):
            raise UserError(
                f"vectors has {len(rows)} rows for {count} images; give one for each, or one for all"
            )
        return torch.full((count,), NONE), rows.expand(count, -1)

    def _labels(self, classes: Any, count: int) -> Tensor:
        """The label of each image or latent, int64 [count] on the CPU, NONE where none is given. Raises UserError for other classes."""
        condition = self.trained.model.condition
        if classes is None:
            return torch.full((count,), NONE)
        if condition is None:
            raise UserError(
                f"classes (={classes!r}) has no meaning: {self.folder} has no condition; leave it out"
            )
        table = class_table.read(self.folder, number_of_classes(self.trained))
        given = [classes] if isinstance(classes, str | int) else list(classes)
        numbers = [NONE if one is None else table.number_of(str(one)) for one in given]
        if len(numbers) not in (1, count):
            raise UserError(
                f"classes has {len(numbers)} entries for {count} images; give one for each, or one for all"
            )
        return torch.tensor(numbers).expand(count)

    @staticmethod
    def _given(model: VAE, labels: Tensor, vectors: Tensor | None, slots: Tensor) -> VAE:
        rows = slots.cpu()
        return model.given(model.condition_of(labels[rows], None if vectors is None else vectors[rows]))

    @torch.no_grad()
    def _of_images(
        self,
        compute: Callable[[Seen], Tensor],
        levels: Levels,
        first: int,
        given: tuple[Any, Any],
        *,
        at_once: int | None = None,
    ) -> NDArray[Any]:
        """What `compute` makes of the images, batch by batch. given: classes and vectors."""
        images, results = torch.from_numpy(levels.images), []
        labels, vectors = self._condition(given, len(images))
        for slots in self._slots(len(images), first, at_once):
            rows = slots.cpu() - first
            mask = torch.ones_like(rows, dtype=torch.bool)
            of_rows = None if vectors is None else vectors[rows]
            batch = Batch(images[rows], labels[rows], slots.cpu(), mask, vectors=of_rows)
            results.append(compute(Seen(self.trained.model, batch, seed=self.recipe.seed)).cpu().numpy())
        return np.concatenate(results)


@checked
def load(folder: Path, *, device: str | None = None, weights: Weights = "ema") -> Run:
    """Open the newest sound checkpoint of a run folder, or an exported one.

    device: `cpu`, `cuda` or `cuda:N`; None: a GPU if there is one. weights: `ema` takes the averaged weights when the run has them.
    Raises UserError when there is nothing to open, for a model of latents, and for a device that cannot be used.
    """
    return Run(open_trained(folder, weights=weights, device=device))
