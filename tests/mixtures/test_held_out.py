"""Mixtures beside the prior and simpler covariances of the same components, where there are too few latents."""

import pytest
import torch

from tests.aggregate.known import draws, known
from vaescale.errors import UserError
from vaescale.mixtures.em import fit
from vaescale.mixtures.gaussian import KINDS, Kind, Mixture
from vaescale.mixtures.held_out import HeldOut, held_out
from vaescale.mixtures.points import Points
from vaescale.mixtures.selection import mean_log_density
from vaescale.mixtures.simpler import SIMPLER, simpler
from vaescale.mixtures.starts import start
from vaescale.mixtures.steps import Frame, expectation, maximization


@pytest.mark.parametrize("kind", KINDS)
def test_a_simpler_form_is_the_m_step_of_that_form_from_the_same_shares(kind: Kind) -> None:
    z = draws(known("full"), 500)
    frame = Frame(z.mean(0), torch.eye(3).double())
    mixture = start(Points(z), 4, kind=kind, how="kmeans", seed=0)
    _, sums = expectation(Points(z), mixture, frame)
    moved, _ = maximization(sums, frame, kind, 0.0, len(z), reseed=False)
    forms = simpler(moved)
    assert tuple(form.kind for form in forms) == SIMPLER[kind]
    if kind == "tied":
        return  # its sums have no second moments of each component
    diagonal = sums.seconds.diagonal(dim1=1, dim2=2) if kind == "full" else sums.seconds
    for form in forms:
        seconds = sums.seconds.sum(0) if form.kind == "tied" else diagonal
        wanted, _ = maximization(sums._replace(seconds=seconds), frame, form.kind, 0.0, len(z), reseed=False)
        torch.testing.assert_close(form.covariances, wanted.covariances)


def judged(kind: Kind, images: int, components: int, size: int = 64) -> HeldOut:
    """A mixture fitted to few draws of N(0, I), judged on others."""
    generator = torch.Generator().manual_seed(0)
    z, val = (torch.randn(count, size, generator=generator).double() for count in (images, 200))
    begin = start(Points(z), components, kind=kind, how="kmeans", seed=0)
    mixture = fit(Points(z), begin, dtype=torch.float64).mixture
    prior = Mixture(
        torch.ones(1).double(), torch.zeros(1, size).double(), torch.ones(1, size).double(), "diag"
    )
    nats, prior_nats = (mean_log_density(one, Points(val)) for one in (mixture, prior))
    return held_out(mixture, Points(val), nats=nats, prior_nats=prior_nats, images=images)


@pytest.mark.parametrize(
    ("kind", "images", "components"), [("full", 57, 1), ("tied", 57, 1), ("full", 200, 8)]
)
def test_covariances_of_too_few_images_are_refused_with_the_numbers(
    kind: Kind, images: int, components: int
) -> None:
    """57 latents of 64 values end at -4 million nats, those of the prior are -91."""
    found = judged(kind, images, components)
    assert found.nats < -1e6 < found.prior_nats
    assert found.short > 0
    assert found.fewest <= 64
    assert -100 < found.simpler_nats["diag"] < -90
    assert len(found.notes()) == 3
    with pytest.raises(UserError, match=r"no more images than latents .* -\d{7,} nats .* nothing is saved"):
        found.refuse_singular()


def test_a_sound_mixture_has_no_notes() -> None:
    found = judged("full", 20_000, 1, size=4)
    found.refuse_singular()
    assert found._replace(prior_nats=found.nats - 1).notes() == []
    assert len(found._replace(prior_nats=found.nats + 1).notes()) == 1
