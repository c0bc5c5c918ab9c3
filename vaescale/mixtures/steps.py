"""The two steps of expectation-maximization for a Gaussian mixture, over all ranks. Dempster, Laird & Rubin 1977.

    log weight_k + log N(z; mean_k, covariance_k) = theta_k . phi(z),      phi(z) = [z_i z_j for i <= j, z, 1]

so that the E step is one matrix product with phi. The M step needs sum_n r_nk phi(z_n), which is summed only over components
whose responsibility exceeds rounding. For a latent given by the mean and variance of its q(z|x), phi is the expectation under q,
and the steps maximize the bound

    E_q[log p(z)] >= sum_k r_k (log weight_k + E_q[log N(z; mean_k, covariance_k)] - log r_k)          r: one vector per image

Products are in float32 by default, of latents scaled to mean 0 and covariance I; sums and parameters are in float64.

Legend: z [N, Z]; K components; F features; R [N, K] responsibilities.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vaescale import comm
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Kind, Mixture, diagonals

CHUNK_VALUES = 1 << 22  # maximum number of feature values at once
KEPT_BYTES = 1 << 30  # features that are kept between the iterations
BLOCK_ROWS = 1 << 16
PAIRS_VALUES = 1 << 26  # maximum number of latent values, repeated for each component with a responsibility
NOTHING = -1e30  # log density of the components that pad the products
PROBED = 512  # latents of each rank, on which float32 is compared with float64
AGREES_NATS = 1e-3
EMPTY = 0.5  # a component with fewer latents takes half of the heaviest component


class Latents(Protocol):
    """This rank's share of the latents. size: Z. count: number of latents over all ranks."""

    size: int
    count: int

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield z [n, Z], and the variances [n, Z] if z are means of q(z|x); the same at every call."""
        ...


class Frame(NamedTuple):
    """The scaled coordinates u = factor^-1 (z - shift) of all products.

    shift: float64 [Z]. factor: float64 [Z, Z], lower triangular; diagonal for diagonal covariances, and for moments so that
    their variances stay diagonal.
    """

    shift: Tensor
    factor: Tensor

    @property
    def inverse(self) -> Tensor:
        """The inverse of the factor, [Z, Z]."""
        identity = torch.eye(len(self.shift), dtype=self.factor.dtype)
        inverse: Tensor = torch.linalg.solve_triangular(self.factor, identity, upper=False)
        return inverse

    def inward(self, means: Tensor) -> Tensor:
        """Map means [K, Z] from z to u."""
        inward: Tensor = (means - self.shift) @ self.inverse.mT
        return inward

    def outward(self, matrices: Tensor) -> Tensor:
        """Map covariances [..., Z, Z] from u to z."""
        outward: Tensor = self.factor @ matrices @ self.factor.mT
        return outward


class Sums(NamedTuple):
    """Means over all latents of r_k, r_k u and r_k u u^T (diag, spherical: r_k u^2; tied: of u u^T alone), float64."""

    weights: Tensor  # [K]
    firsts: Tensor  # [K, Z]
    seconds: Tensor  # [K, Z, Z] | [K, Z] | [Z, Z]


def expectation(
    latents: Latents, mixture: Mixture, frame: Frame, dtype: torch.dtype = torch.float64
) -> tuple[float, Sums]:
    """Run one E step: the mean log density (from moments: its bound), and the sums in the frame."""
    return Steps(latents, frame, mixture.kind, dtype, probed=0).expectation(mixture)[:2]


def standardize(latents: Latents, kind: Kind) -> Frame:
    """The frame in which the latents of all ranks have mean 0 and covariance I, or variances 1.

    A constant latent keeps its scale. Raises UserError when a latent is NaN or Inf.
    """
    total, moments = torch.zeros(latents.size + 1, dtype=torch.float64), False
    for z, variance in latents.parts():
        total += torch.cat([z.double().sum(0).cpu(), total.new_tensor([len(z)])])
        moments = variance is not None
    total = comm.all_reduce_sum(torch.cat([total, total.new_tensor([moments])]))
    if not torch.isfinite(total).all():
        raise UserError(
            "the latents hold NaN or Inf, or their sum overflows; no mixture can be fitted to them"
        )
    shift, moments = total[:-2] / total[-2], bool(total[-1])
    second = torch.zeros(latents.size, latents.size, dtype=torch.float64)
    for z, variance in latents.parts():
        centred = z.double() - shift.to(z.device)
        scatter = centred.T @ centred
        second += (scatter if variance is None else scatter + torch.diag(variance.double().sum(0))).cpu()
    second = comm.all_reduce_sum(second.flatten()).view(second.shape) / total[-2]
    variances = second.diagonal()
    constant = variances <= 1e-24 * (1 + shift.square())
    if kind in ("diag", "spherical") or moments or constant.any():
        return Frame(shift, torch.diag(torch.where(constant, 1.0, variances).sqrt()))
    return Frame(shift, torch.linalg.cholesky(_positive(second)))


def maximization(
    sums: Sums, frame: Frame, kind: Kind, ridge: float | Tensor, count: int, *, reseed: bool = True
) -> tuple[Mixture, int]:
    """Run one M step: the mixture in the scale of the latents, and the number of empty components that were replaced.

    Raises UserError when the latents are too extreme for float64.
    """
    weights = sums.weights + 10 * torch.finfo(torch.float64).eps
    centres = sums.firsts / weights[:, None]
    means = frame.shift + centres @ frame.factor.mT
    floor = torch.zeros_like(frame.shift) + ridge
    if kind == "full":
        within = sums.seconds / weights[:, None, None] - centres[:, :, None] * centres[:, None]
        covariances = _positive(frame.outward(within) + torch.diag(floor))
    elif kind == "tied":
        within = sums.seconds - (weights[:, None] * centres).T @ centres
        covariances = _positive(frame.outward(within) + torch.diag(floor))
    else:
        within = (sums.seconds / weights[:, None] - centres.square()).clamp_min(0.0)
        covariances = within * frame.factor.diagonal().square() + floor
        covariances = covariances if kind == "diag" else covariances.mean(1)
    mixture = Mixture(weights / weights.sum(), means, covariances, kind)
    empty = (sums.weights * count < EMPTY).nonzero()[:, 0].tolist() if reseed else []
    for component in empty:
        mixture = _halved(mixture, component)
    return mixture, len(empty)


def _halved(mixture: Mixture, component: int) -> Mixture:
    """Split the heaviest component in two, half a deviation apart along its longest axis, to replace an empty component."""
    weights, means, covariances = (tensor.clone() for tensor in mixture[:3])
    heaviest = int(weights.argmax())
    if mixture.kind in ("full", "tied"):
        covariance = covariances[heaviest] if mixture.kind == "full" else covariances
        lengths, axes = torch.linalg.eigh(covariance)
        axis = lengths[-1].sqrt() * axes[:, -1]
        axis = axis * torch.sign(axis[axis.abs().argmax()])  # the sign of an eigenvector is arbitrary
    else:
        deviations = diagonals(mixture)[heaviest].sqrt()
        axis = torch.where(torch.arange(len(deviations)) == deviations.argmax(), deviations, 0.0)
    weights[component] = weights[heaviest] = weights[heaviest] / 2
    means[component] = means[heaviest] - 0.5 * axis
    means[heaviest] = means[heaviest] + 0.5 * axis
    if mixture.kind != "tied":
        covariances[component] = covariances[heaviest]
    return Mixture(weights / weights.sum(), means, covariances, mixture.kind)


def _positive(covariances: Tensor) -> Tensor:
    """Make [..., Z, Z] positive definite despite rounding, by adding a growing share of the identity where needed."""
    covariances = (covariances + covariances.mT) / 2
    scale = covariances.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype)
    if not torch.isfinite(covariances).all():
        raise UserError(
            "the latents are so large that the sum of their squares overflows; no mixture can be fitted to them"
        )
    share = 1e-10
    while (bad := torch.linalg.cholesky_ex(covariances).info > 0).any():
        covariances = covariances + torch.where(bad, share * scale, 0.0)[..., None, None] * identity
        share *= 10
    return covariances


class Block(NamedTuple):
    """A block of latents: u [n, Z]; squares [n, Z] of u, plus the variances in the case of moments.

    phis: phi [m, F] in chunks, if kept. probe: every `stride`-th row in float64, for the comparison with float32.
    """

    u: Tensor
    squares: Tensor
    phis: list[Tensor] | None = None
    probe: "Block | None" = None


class Steps:
    """E steps over the same latents, whose features are computed only once if they fit in memory.

    probed: number of this rank's latents, evenly spaced, whose log densities in float32 are compared with those in float64.
    """

    def __init__(
        self, latents: Latents, frame: Frame, kind: Kind, dtype: torch.dtype, *, probed: int = PROBED
    ) -> None:
        self._latents, self._frame, self._kind, self._dtype = latents, frame, kind, dtype
        size = latents.size
        self._upper = torch.triu_indices(size, size)
        self._inverse = frame.inverse
        probes = probed if dtype == torch.float32 else 0
        self._stride = max(1, latents.count // comm.world_size() // probes) if probes else 0
        self._num_features = size + 1 + {"full": self._upper.shape[1], "tied": 0}.get(kind, size)
        self._rows = max(16, CHUNK_VALUES // self._num_features)
        bytes_here = latents.count // comm.world_size() * self._num_features * dtype.itemsize
        self._kept: list[Block] | None = None
        if bytes_here <= KEPT_BYTES // comm.ranks_on_this_node():
            self._kept = [block._replace(phis=list(self._features(block))) for block in self._blocks()]

    def expectation(self, mixture: Mixture) -> tuple[float, Sums, bool]:
        """The mean log density under the mixture, the sums for the M step, and whether the probed densities are those of float64.

        All are over all ranks.
        """
        components, size = mixture.means.shape
        theta, precision = self._theta(mixture)
        shapes = ((components,), (components, size), _seconds_shape(self._kind, components, size), (1,), (2,))
        totals = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        for block in self._blocks() if self._kept is None else self._kept:
            evidence, shares = self._shares(block, theta, precision)
            parts = (
                *self._moments(block, shares[:, :components]),
                evidence.double().sum()[None],
                self._gap(block, evidence, theta, precision),
            )
            for total, term in zip(totals, parts, strict=True):
                total += term.cpu()
        flat = comm.all_reduce_sum(torch.cat([total.flatten() for total in totals])) / self._latents.count
        split = torch.split(flat.cpu(), [total.numel() for total in totals])
        weights, firsts, seconds, value, gap = (
            total.view(shape) for total, shape in zip(split, shapes, strict=True)
        )
        return float(value), Sums(weights, firsts, seconds), bool(gap[0] <= AGREES_NATS * gap[1])

    def _gap(self, block: Block, evidence: Tensor, theta: Tensor, precision: Tensor) -> Tensor:
        """The sum of |log density - that in float64| over the probed latents of a block, and their number, [2]."""
        if block.probe is None:
            return evidence.new_zeros(2, dtype=torch.float64)
        exact, _ = self._shares(block.probe, theta, precision)
        gap = (evidence[:: self._stride].double() - exact).abs().sum()
        return torch.stack([gap, gap.new_tensor(float(len(exact)))])

    def _blocks(self) -> Iterator[Block]:
        for z, variance in self._latents.parts():
            for start in range(0, len(z), BLOCK_ROWS):
                chunk = slice(start, start + BLOCK_ROWS)
                rows, spread = z[chunk], None if variance is None else variance[chunk]
                block = self._block(rows, spread, self._dtype)
                if self._stride:
                    some = slice(None, None, self._stride)
                    probe = self._block(rows[some], None if spread is None else spread[some], torch.float64)
                    block = block._replace(probe=probe)
                yield block

    def _block(self, z: Tensor, variance: Tensor | None, dtype: torch.dtype) -> Block:
        inverse = self._inverse.to(z.device, dtype)
        u = (z.double() - self._frame.shift.to(z.device)).to(dtype) @ inverse.mT
        if variance is None:
            return Block(u, u.square())
        # The frame of moments is diagonal, so their variances stay diagonal.
        return Block(u, u.square() + variance.to(dtype) * inverse.diagonal().square())

    def _features(self, block: Block) -> Iterator[Tensor]:
        """Yield phi for a few rows at a time."""
        size, end = block.u.shape[1], self._num_features - block.u.shape[1] - 1
        pairs = zip(torch.split(block.u, self._rows), torch.split(block.squares, self._rows), strict=True)
        for u, squares in pairs:
            phi = u.new_empty(len(u), self._num_features)
            if self._kind == "full":
                start = 0
                for row in range(size):  # of the upper triangle
                    torch.mul(u[:, row:], u[:, row : row + 1], out=phi[:, start : start + size - row])
                    phi[:, start] = squares[:, row]
                    start += size - row
            elif self._kind != "tied":
                phi[:, :end] = squares
            phi[:, end:-1] = u
            phi[:, -1] = 1.0
            yield phi

    def _shares(self, block: Block, theta: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
        """The log density [n] (from moments: its bound), and the responsibilities [n, padded K]."""
        theta, precision = theta.to(block.u), precision.to(block.u)
        evidence, shares = block.u.new_empty(len(block.u)), block.u.new_empty(len(block.u), len(theta))
        features = self._features(block) if block.phis is None else block.phis
        rows = (torch.split(tensor, self._rows) for tensor in (block.u, block.squares, evidence, shares))
        for phi, u, squares, density, share in zip(features, *rows, strict=True):
            joint = phi @ theta.T
            if self._kind == "tied":  # - E[u^T precision u] / 2
                across = precision - torch.diag(precision.diagonal())
                form = (u @ across * u).sum(1) + squares @ precision.diagonal()
                joint -= 0.5 * form[:, None]
            torch.softmax(joint, dim=1, out=share)
            torch.sub(joint.amax(1), share.amax(1).log_(), out=density)
            # Denormal numbers would make the later products many times slower without changing the result.
            torch.threshold_(share, 1e-30, 0.0)
        return evidence, shares

    def _moments(self, block: Block, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of `Sums` for one block, not yet divided by the number of latents."""
        u, squares = block.u, block.squares
        weights, firsts = shares.sum(0).double(), (shares.T @ u).double()
        if self._kind == "tied":
            seconds = _with_diagonal(u.T @ u, squares.sum(0))
        elif self._kind == "full":
            seconds = torch.zeros(*firsts.shape, u.shape[1], dtype=torch.float64, device=u.device)
            rows = max(1024, PAIRS_VALUES // firsts.numel())
            for batch, share in zip(torch.split(u, rows), torch.split(shares, rows), strict=True):
                seconds += _second_moments(batch, share)
            seconds = _with_diagonal(seconds, (shares.T @ squares).double())
        else:
            seconds = shares.T @ squares
        return weights, firsts, seconds.double()

    def _theta(self, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Theta [padded K, F], and the shared precision [Z, Z] of tied covariances."""
        centres, inverse = self._frame.inward(mixture.means), self._frame.inverse
        size = centres.shape[1]
        if self._kind in ("full", "tied"):
            factors = torch.linalg.cholesky(_positive(inverse @ mixture.covariances @ inverse.mT))
            precision = torch.cholesky_inverse(factors)
            log_det = 2 * factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            linear = (precision @ centres[..., None])[..., 0] if self._kind == "full" else centres @ precision
            row, column = self._upper
            squares = -torch.where(row == column, 0.5, 1.0) * precision[..., row, column]
        else:
            precision = self._frame.factor.diagonal().square() / diagonals(mixture)
            log_det, linear, squares = -precision.log().sum(1), precision * centres, -0.5 * precision
        # log p(z) = log p(u) - log |factor|
        constant = mixture.weights.log() - 0.5 * (
            log_det + (linear * centres).sum(1) + size * math.log(2 * math.pi)
        )
        constant = constant - self._frame.factor.diagonal().log().sum()
        parts = [linear, constant[:, None]]
        theta = torch.cat(parts if self._kind == "tied" else [squares, *parts], dim=1)
        # Products of 10 columns take three times as long as those of 16, measured.
        padding = theta.new_zeros(-len(theta) % 16, theta.shape[1])
        padding[:, -1] = NOTHING
        return torch.cat([theta, padding]), precision


def _second_moments(u: Tensor, shares: Tensor) -> Tensor:
    """The sum over n of r_nk u_n u_n^T, float64 [K, Z, Z], only over responsibilities above rounding."""
    least = 0.1 * torch.finfo(u.dtype).eps
    component, row = shares.T.ge(least).nonzero().unbind(1)
    counts = torch.bincount(component, minlength=shares.shape[1]).tolist()
    right = u[row]
    left = right * shares[row, component][:, None]
    pairs = zip(torch.split(left, counts), torch.split(right, counts), strict=True)
    return torch.stack([weighted.T @ rows for weighted, rows in pairs]).double()


def _with_diagonal(matrices: Tensor, diagonals: Tensor) -> Tensor:
    """Replace the diagonals of [..., Z, Z] by [..., Z]."""
    matrices = matrices.clone()
    matrices.diagonal(dim1=-2, dim2=-1).copy_(diagonals)
    return matrices


def _seconds_shape(kind: Kind, components: int, size: int) -> tuple[int, ...]:
    return {"full": (components, size, size), "tied": (size, size)}.get(kind, (components, size))
