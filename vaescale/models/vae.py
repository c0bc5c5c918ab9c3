"""The variational autoencoder: everything that has a gradient happens in `VAE.forward`.

Data-parallel wrappers see only calls of the wrapped module's forward, so the loss is built from its Terms and never calls
submodules directly. `flat.py` and `ladder.py` implement the inference of z.

Legend: B images, K draws of z for each, G groups of latents, L latents, where a latent is one number of a vector or one
channel of a map, its KL summed over the places.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from vaescale import noise
from vaescale.conditions.config import ClassCondition, ConditionConfig, VectorCondition
from vaescale.conditions.embedding import NONE, ClassEmbedding, VectorEmbedding
from vaescale.config import Window
from vaescale.errors import UserError
from vaescale.likelihoods.base import Likelihood
from vaescale.likelihoods.config import LikelihoodConfig
from vaescale.models.config import EquivarianceConfig, Shows
from vaescale.models.equivariance import drawn
from vaescale.models.posterior import Gaussian
from vaescale.models.quantizer import Quantized
from vaescale.models.shown import Shown, shown
from vaescale.models.units import to_unit
from vaescale.networks.config import NetworkConfig
from vaescale.networks.spectral import SpectralSum

Encoded = Gaussian | Quantized | dict[int, Tensor]
"""What `VAE.encode` makes of B images: q(z|x) of a flat model, or codes; the maps of a ladder's encoder, [B, W, R, R'] by resolution R."""

Choose = Callable[[int, Gaussian | None, Callable[[Any], Gaussian]], Tensor]
"""How `VAE.descend` asks for the latents z [B, Z, ...] of a group: from its number, its prior given the latents above, None for N(0, I), and
a function from `VAE.encode`'s result to q(z|x) given the latents above."""


class Terms(NamedTuple):
    """Per-example pieces of the objective, in nats where they are logarithms; means over the K draws where there are several.

    log_px [B]; kl [B, G], summed over a group's latents, and latent_kl [B, L]; squared_error and variance [B], summed over
    pixels: (x - E[x|z])^2, and Var[x|z] if it depends on z (else NaN). unit_mean and unit_square [B, L]: the posterior's
    mean, as deviation from the prior's in its standard deviations, and the square of that, averaged over the places of a map.
    mu, log_sigma and z [B, Z] of a single latent vector, z its first draw; [B, 0] in a ladder.
    log_weights [B, K] = log p(x, z) - log q(z|x); [B, 0] without importance samples. spectral [B]: the network's sum of
    singular values, the same for each example; [B, 0] unless the model was built with it. transformed_log_px [B]: see
    `equivariance.py`; [B, 0] in evaluation, and unless the model was built with it. squared_error, variance, unit_mean and
    unit_square, which only metrics read, are [B, 0] unless they were wanted. codes int64 [B, N], and code_cost [B], what a
    quantizer adds to the loss in nats; each [B, 0] in a model without. shown: what discriminators see, empty in evaluation, and unless
    the model was built with it.
    """

    log_px: Tensor
    kl: Tensor
    latent_kl: Tensor
    squared_error: Tensor
    variance: Tensor
    unit_mean: Tensor
    unit_square: Tensor
    mu: Tensor
    log_sigma: Tensor
    z: Tensor
    log_weights: Tensor
    spectral: Tensor
    transformed_log_px: Tensor
    codes: Tensor
    code_cost: Tensor
    shown: Shown | tuple[()] = ()


class Inferred(NamedTuple):
    """The result of drawing z from q(z|x). params [B K, ...]: the likelihood's raw parameters; log_ratio [B, K] =
    log p(z) - log q(z|x), [B, 0] if it was not wanted; draws [B K, ...]: z itself, or None in a ladder; unit: unit_mean and
    unit_square of Terms. The other fields are those of Terms.
    """

    params: Tensor
    kl: Tensor
    latent_kl: Tensor
    unit: tuple[Tensor, Tensor]
    mu: Tensor
    log_sigma: Tensor
    log_ratio: Tensor
    draws: Tensor | None
    codes: Tensor | None = None
    code_cost: Tensor | None = None


class VAE(nn.Module):
    """x -> q(z|x) -> z -> p(x|z). Override `encode`, `infer`, `decode_means`, `posterior`, `joint_means`, `joint_posterior`, `prior`, `decode`
    and `from_prior`."""

    latent_shape: tuple[int, ...]
    """The shape of the latents that `posterior` infers from x: all of a flat model, the top group of a ladder."""

    latent_dim: int
    """The number of values in `latent_shape`."""

    group_sizes: tuple[int, ...]
    """The number of values in each group."""

    group_maps: tuple[tuple[int, ...], ...]
    """Height and width of the map of each group; () for a vector, and the number of steps of time of a model of sequences."""

    of_latents: bool
    """Whether x is the latent, or the codes, of another model, and no image."""
    predicted_frames: int = 1
    """The number of frames that the bound of an example is of; 1 for images."""
    num_codes: int = 0
    """The number K of codes of a place; 0 for a model without codes."""

    def __init__(
        self,
        network: NetworkConfig,
        likelihood: LikelihoodConfig,
        *,
        encoder_out: int,
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        super().__init__()
        self.image_shape = (channels, *image_size)
        self.likelihood: Likelihood = likelihood.implement(image_shape=self.image_shape)
        self.network: Any = network.implement(
            image_size=image_size,
            channels=channels,
            encoder_out=encoder_out,
            out_channels=self.likelihood.num_params(channels),
        )
        self.condition: ConditionConfig | None = None
        self.embedding: ClassEmbedding | VectorEmbedding | None = None
        self._given: Tensor | None = None  # of a view, see `given`
        self.spectral: SpectralSum | None = None
        self.equivariance: EquivarianceConfig | None = None
        self.of_latents = False
        self.shows: Shows | None = None
        self.has_bound = True  # whether evaluation may report bounds on log p(x)
        self.frozen: tuple[nn.Module, ...] = ()  # layers that stay in evaluation mode (see `freezing.py`)

    def train(self, mode: bool = True) -> "VAE":
        """Set training or evaluation mode; frozen layers stay in the latter."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @property
    def window(self) -> Window:
        """The type of the stored images, and the values that are 0 and 1."""
        return self.likelihood.window

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one stored example: that of an image, or of a sequence."""
        return self.image_shape

    @property
    def dimensions(self) -> int:
        """The number D of values of x that the bound is of."""
        return math.prod(self.image_shape)

    @property
    def group_places(self) -> tuple[int, ...]:
        """The number of places in the map of each group; 1 for a vector."""
        return tuple(math.prod(places) for places in self.group_maps)

    @property
    def num_latents(self) -> int:
        """The number L of columns of Terms.latent_kl."""
        return sum(size // places for size, places in zip(self.group_sizes, self.group_places, strict=True))

    def forward(
        self,
        images: Tensor,
        stream: noise.Stream,
        mask: Tensor,
        importance_samples: int = 0,
        doubly_reparameterized: bool = False,
        autocast: torch.dtype | None = None,
        measured: bool = True,
        condition: Tensor | None = None,
    ) -> Terms:
        """Compute the Terms of images, see `target`, one slot of the stream each; mask bool [B] is false for padding.

        importance_samples: number K of draws of z with log weights; 0 is one draw without weights. doubly_reparameterized: log
        weights whose gradient for the encoder passes through z only, weighted once more (see `objectives/iwae.py`). autocast:
        precision of the networks, None for that of the weights. It begins here because DeepSpeed ends an outer autocast.
        measured: whether to compute the terms that only metrics read. condition: of each image, as in `given`; in training a share of
        them is hidden, as the recipe says.
        """
        if self.condition is not None and self._given is None:
            if condition is not None and self.training:
                condition = self._hidden(condition, stream)
            given = self.given(condition)
            return given.forward(
                *(images, stream, mask, importance_samples, doubly_reparameterized, autocast, measured)
            )
        x = self.target(images, stream)
        with nullcontext() if autocast is None else torch.autocast(x.device.type, autocast):
            encoded = self.encode(x)
            inferred = self.infer(
                encoded,
                stream,
                max(1, importance_samples),
                doubly_reparameterized,
                weighted=importance_samples > 0,
                measured=measured,
            )
            terms = self.terms(x, inferred, mask, doubly_reparameterized, measured=measured)
            if self.training and self.num_codes:
                self.collect(encoded, stream, mask)
            if self.shows is not None and self.training:
                seen = shown(self, self.shows, x, inferred.params, inferred.draws, stream)
                terms = terms._replace(shown=seen)
            if self.equivariance is None or not self.training:
                return terms
            return terms._replace(transformed_log_px=self._transformed_log_px(x, inferred, stream, mask))

    def add_condition(self, condition: ConditionConfig) -> None:
        """Make it a conditional model: p(x|z, y) and q(z|x, y). Called once, after the layers have their first weights."""
        self.condition = condition
        self.embedding = condition.implement()
        self.network.add_condition(condition.width)

    def given(self, condition: Tensor | None) -> "VAE":
        """A view of a conditional model whose functions have the condition y of each image or draw; of another model, the model itself.

        condition: int64 [B], NONE where the class is hidden or unknown, or, between classes, their shares [B, K]; of a model of vectors
        float [B, V], rows of NaN where they are; on any device. The view shares weights and state, and keeps no graph. Raises
        UserError for NONE and NaN in a model that always had a condition, for vectors of another size, and for no condition.
        """
        if self.condition is None:
            return self
        if condition is None:
            raise UserError(
                f"this model has a condition ({self.condition.words}), and none is given; give that of each image"
            )
        condition = condition.to(next(self.parameters()).device)
        # Training has checked its labels before, and a graph has no values yet.
        is_checked = self.training or torch.compiler.is_exporting()
        if isinstance(self.embedding, VectorEmbedding):
            if not is_checked:
                self._refuse_unfit(condition)
            condition = self.embedding.standardized(condition.float())
        elif not is_checked and not condition.is_floating_point() and len(condition):
            self._refuse_unknown(int(condition.min()), int(condition.max()))
        return self._view(condition)

    def _view(self, condition: Tensor) -> "VAE":
        view: VAE = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.__dict__["_given"] = condition
        return view

    def _refuse_unfit(self, vectors: Tensor) -> None:
        """Raise UserError for vectors that the model does not take."""
        assert isinstance(self.condition, VectorCondition)
        size = self.condition.size
        if not vectors.is_floating_point() or vectors.dim() != 2 or vectors.shape[1] != size:
            raise UserError(
                f"vectors have the shape {list(vectors.shape)}, and this model takes {size} values for each image; give [N, {size}]"
            )
        missing, absent = vectors.isnan(), vectors.isnan().all(1)
        if bool(vectors.isinf().any()) or bool((missing.any(1) & ~absent).any()):
            raise UserError("some vectors hold NaN or infinite values; give finite ones")
        if bool(absent.any()) and not self.condition.dropout:
            raise UserError(
                "some images have no vector, and the model was always told one (condition.dropout is 0); give images with vectors"
            )

    def _refuse_unknown(self, least: int, most: int) -> None:
        """Raise UserError for labels that the model does not have."""
        assert isinstance(self.condition, ClassCondition)
        if most >= self.condition.classes:
            raise UserError(
                f"class {most} is not one of the model's {self.condition.classes} classes, 0 to {self.condition.classes - 1}"
            )
        if least < 0 and not self.condition.dropout:
            raise UserError(
                "some images have no class, and the model was always told one (condition.dropout is 0); give images with classes"
            )

    @property
    def num_given(self) -> int:
        """The number of conditions of a view; 0 of a model that is none."""
        return 0 if self._given is None else len(self._given)

    def given_rows(self, rows: int) -> Tensor:
        """The condition of B K rows, as `given` takes it: that of each of B images for its K draws. Raises UserError where none is given."""
        if self._given is None:
            self.given(None)
        assert self._given is not None
        if rows == self._given.shape[0]:  # not len(), which torch.export takes for a constant
            return self._given
        return self._given.repeat_interleave(rows // self._given.shape[0], 0)

    def given_of(self, rows: Tensor) -> "VAE":
        """The view of some of a view's images; the model itself without a condition. rows: their indices, or a mask [B]."""
        return self if self._given is None else self._view(self._given[rows])

    def embedded(self, rows: int) -> Tensor | None:
        """The condition's embedding of B K rows, [B K, E]; None for a model without a condition."""
        if self.embedding is None:
            return None
        embedded: Tensor = self.embedding(self.given_rows(rows))
        return embedded

    def any_condition(self, rows: int) -> Tensor | None:
        """The condition of images that do not matter, such as those of an estimate of memory; None for a model without one."""
        device = next(self.parameters()).device
        if isinstance(self.condition, VectorCondition):
            return torch.zeros(rows, self.condition.size, device=device)
        return None if self.condition is None else torch.zeros(rows, dtype=torch.int64, device=device)

    def condition_of(self, labels: Tensor, vectors: Tensor | None) -> Tensor | None:
        """The condition of images with these labels, int64 [B], or vectors [B, V], on the model's device; None for a model without one."""
        if self.condition is None:
            return None
        given = vectors if isinstance(self.condition, VectorCondition) else labels
        return None if given is None else given.to(next(self.parameters()).device)

    def _hidden(self, condition: Tensor, stream: noise.Stream) -> Tensor:
        """The condition, NONE for a share of the slots that depends on seed, step and slot."""
        assert self.condition is not None
        if not self.condition.dropout:
            return condition
        hides = noise.uniform(stream, noise.CONDITION, (1,))[:, 0] < self.condition.dropout
        if condition.is_floating_point():
            return torch.where(hides[:, None], torch.nan, condition)
        return torch.where(hides, NONE, condition)

    def terms(
        self,
        x: Tensor,
        inferred: Inferred,
        mask: Tensor,
        doubly_reparameterized: bool = False,
        *,
        measured: bool = True,
    ) -> Terms:
        """Compute the Terms of x from `target` and of what `infer` drew for it; the other arguments are those of `forward`."""
        draws, weighted = len(inferred.params) // len(x), inferred.log_ratio.shape[1] > 0
        # Autocast ends here: log-probabilities are never computed in half precision.
        with torch.autocast(x.device.type, enabled=False):
            xs, masks = (tensor.repeat_interleave(draws, 0) if draws > 1 else tensor for tensor in (x, mask))
            log_px = self.log_px(xs, inferred.params, masks)
            nothing = log_px.new_zeros(len(x), 0)
            log_weights = (
                rearrange(log_px, "(b k) -> b k", k=draws) + inferred.log_ratio if weighted else nothing
            )
            if doubly_reparameterized and inferred.draws is not None and inferred.draws.requires_grad:
                share = torch.softmax(log_weights.detach(), dim=1).view(
                    -1, *(1 for _ in inferred.draws.shape[1:])
                )
                inferred.draws.register_hook(lambda gradient: gradient * share.to(gradient))  # type: ignore[no-untyped-call]
            moments = (nothing, nothing)
            if measured:
                error, variance = self._moments(xs, inferred.params.detach())
                moments = (_over_draws(error, draws), _over_draws(variance, draws))
            first = inferred.draws if draws == 1 or inferred.draws is None else inferred.draws[::draws]
            return Terms(
                log_px=_over_draws(log_px, draws),
                kl=inferred.kl,
                latent_kl=inferred.latent_kl,
                squared_error=moments[0],
                variance=moments[1],
                unit_mean=inferred.unit[0],
                unit_square=inferred.unit[1],
                mu=inferred.mu,
                log_sigma=inferred.log_sigma,
                z=nothing if first is None else first.flatten(1),
                log_weights=log_weights,
                spectral=self.spectral().expand(len(x)) if self.spectral else nothing,
                transformed_log_px=nothing,
                codes=nothing if inferred.codes is None else inferred.codes,
                code_cost=nothing if inferred.code_cost is None else inferred.code_cost,
            )

    def log_px(self, x: Tensor, params: Tensor, mask: Tensor) -> Tensor:
        """log p(x|z) [B K] in nats of x [B K, ...] from `target`; mask bool [B K]."""
        return self.likelihood.log_prob(x, params, mask)

    def images_of(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The images that the bound is of, and their parameters, [N, ...] each: x and params, or the predicted frames of sequences."""
        return x, params

    def collect(self, encoded: Any, stream: noise.Stream, mask: Tensor) -> None:
        """Keep what the state of a quantizer needs of a forward pass in training. encoded: from `encode`."""

    def end_step(self, skipped: Tensor) -> None:  # noqa: ARG002
        """Update the model's state from the step's forward passes; called once per optimizer step, on every rank.

        skipped []: 1 where the step moves no weights, else 0.
        """
        self.likelihood.end_step()

    def _transformed_log_px(
        self, x: Tensor, inferred: Inferred, stream: noise.Stream, mask: Tensor
    ) -> Tensor:
        """log p(Tx|Tz) [B] with the step's transformation T of image and latent map."""
        assert self.equivariance is not None
        assert inferred.draws is not None
        height, width = self.latent_shape[1:]
        transformation = drawn(self.equivariance, (height, width), stream)
        params = self.network.decode(transformation(inferred.draws))
        with torch.autocast(x.device.type, enabled=False):
            target = transformation(x, self.image_shape[-1] // width)
            return self.likelihood.transformed_log_prob(target, params, mask)

    def target(self, images: Tensor, stream: noise.Stream) -> Tensor:
        """The target [B, C, H, W] that is encoded and modelled: images in [0, 1], binarized or dequantized if the likelihood does so,
        or draws of latents.

        images: as stored [B, C, H, W], uint8 or of another window, or the mean and log variance of latents, float32 [B, 2, C, H, W].
        """
        dtype = next(self.parameters()).dtype
        if images.ndim == 5:
            mean, log_variance = images.to(dtype).unbind(1)
            epsilon = noise.normal(stream, noise.LATENT, tuple(mean.shape[1:])).to(mean)
            return mean + torch.exp(0.5 * log_variance) * epsilon
        return self._unit_target(images, stream)

    def _unit_target(self, images: Tensor, stream: noise.Stream) -> Tensor:
        """`target` of stored images of any shape."""
        dtype = next(self.parameters()).dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = to_unit(images, self.window, dtype=wide)
        return self.likelihood.target(x, stream)

    def encode(self, x: Tensor) -> Encoded:
        """What the encoder makes of x from `target`, from which `infer` and `decode_means` go on."""
        raise NotImplementedError

    def infer(
        self,
        encoded: Any,
        stream: noise.Stream,
        draws: int,
        detached: bool,
        *,
        weighted: bool = True,
        measured: bool = True,
    ) -> Inferred:
        """Draw z from q(z|x). encoded: from `encode`. detached: log_ratio holds q's own parameters constant. weighted: whether log_ratio is wanted;
        measured: whether unit_mean and unit_square are.
        """
        raise NotImplementedError

    def posterior(self, x: Tensor) -> Gaussian:
        """The posterior q(z|x), float32 or float64 [B, *latent_shape]. x from `target`."""
        raise NotImplementedError

    def prior(self) -> Gaussian:
        """The prior p(z) of the latents of `posterior`, [*latent_shape] each."""
        raise NotImplementedError

    def joint_draws(self, x: Tensor, stream: noise.Stream, draws: int, groups: int) -> Tensor:
        """Joint draws from q(z|x) of the first `groups` groups of a ladder, [B, draws, Z] flat. x from `target`."""
        raise NotImplementedError

    def joint_means(self, x: Tensor, groups: int) -> Tensor:
        """The means of q(z|x) of the first `groups` groups, each given the means above it, [B, Z] flat. x from `target`."""
        raise NotImplementedError

    def joint_posterior(self, x: Tensor) -> Gaussian:
        """q(z|x) of all latents, flat [B, Z]; of a ladder each group's, given the means of the groups above. x from `target`."""
        raise NotImplementedError

    def prior_log_density(self, z: Tensor) -> Tensor:
        """Log density [B] in nats of z [B, Z] under the model's prior: z of `latent_dim` or of a ladder's first groups."""
        prior = self.prior()
        return prior.log_density(z.view(len(z), *self.latent_shape).to(prior.mu)).flatten(1).sum(1)

    def decode(self, z: Tensor, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
        """The likelihood's raw parameters from z [B, Z], flat, of `latent_dim` or of a ladder's first groups; lower groups
        are drawn from their priors, with standard deviations times `temperature`. A flat model ignores the stream.
        """
        raise NotImplementedError

    def decode_means(self, encoded: Any) -> Tensor:
        """The likelihood's raw parameters from the posterior's means. encoded: from `encode`. For use without a gradient."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor:
        """The likelihood's raw parameters from the posterior's means. x from `target`. For use without a gradient."""
        return self.decode_means(self.encode(x))

    def descend(self, rows: int, choose: Choose) -> Tensor:
        """The likelihood's raw parameters from the latents of `rows` images that `choose` returns, group by group from the top."""
        raise NotImplementedError

    def from_prior(self, stream: noise.Stream, temperature: float = 1.0) -> Tensor:
        """The likelihood's raw parameters from draws of the prior, one per slot, with standard deviations times
        `temperature`. For use without a gradient.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _moments(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        squared_error = (x - self.likelihood.mean(params)).square().flatten(1).sum(1)
        variance = self.likelihood.variance(params)
        if variance is None:
            return squared_error, torch.full_like(squared_error, torch.nan)
        return squared_error, x[0].numel() * variance.flatten(1).mean(1).to(squared_error).expand(len(x))


def rows_of(encoded: Any, rows: Tensor) -> Any:
    """The part of `VAE.encode`'s result that belongs to some of the images, or sequences. rows: their indices, or a mask [B]."""
    if isinstance(encoded, Tensor):
        return encoded[rows]
    if isinstance(encoded, dict):
        return {name: rows_of(values, rows) for name, values in encoded.items()}
    if isinstance(encoded, list):
        return [rows_of(values, rows) for values in encoded]
    return None if encoded is None else type(encoded)(*(rows_of(values, rows) for values in encoded))


def unit_moments(unit: Tensor) -> tuple[Tensor, Tensor]:
    """unit_mean and unit_square [B, L] of Terms, from a mean in the prior's standard deviations, [B, Z] or [B, Z, H, W]."""
    unit = unit.detach()
    places = tuple(range(2, unit.ndim))
    return (unit.mean(places), unit.square().mean(places)) if places else (unit, unit.square())


def _over_draws(values: Tensor, draws: int) -> Tensor:
    """The mean over the draws of each image: [B K] to [B]."""
    return values if draws == 1 else reduce(values, "(b k) -> b", "mean", k=draws)
