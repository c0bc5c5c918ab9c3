"""A mixture's components with covariances of fewer parameters: the M step's covariances of that form, from the same shares."""

from vaescale.mixtures.gaussian import Kind, Mixture, diagonals

SIMPLER: dict[Kind, tuple[Kind, ...]] = {
    "full": ("tied", "diag", "spherical"),
    "tied": ("diag", "spherical"),
    "diag": ("spherical",),
    "spherical": (),
}


def simpler(mixture: Mixture) -> list[Mixture]:
    """The same weights and means with each simpler form of covariances.

    After an M step, these are the covariances that the M step of the simpler form returns for the same responsibilities: the
    weighted mean of full covariances (tied), their diagonals (diag), and the mean of the diagonals (spherical).
    """
    weights, means, covariances, kind = mixture
    variances = diagonals(mixture)
    forms = {"diag": variances.contiguous(), "spherical": variances.mean(1)}
    if kind == "full":
        forms["tied"] = (weights[:, None, None] * covariances).sum(0)
    return [Mixture(weights, means, forms[form], form) for form in SIMPLER[kind]]
