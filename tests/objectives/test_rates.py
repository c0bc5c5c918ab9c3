"""Each form of the objective against hand-computed values."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from vaescale import noise
from vaescale.config import OneOf
from vaescale.objectives.config import OBJECTIVES, CapacityConfig, FreeBitsConfig
from vaescale.objectives.rates import balanced, capacity, capacity_nats, free_bits, group_shares

KL = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # two images, two groups
LATENT_KL = torch.tensor([[0.1, 0.9, 2.0], [0.3, 2.7, 4.0]])  # means 0.2, 1.8, 3
LOG_PX = torch.tensor([-10.0, -20.0])


def loss(make_terms, config: dict[str, object], *, step: int = 0, places: tuple[int, ...] = (1, 16)) -> float:
    objective = (
        OneOf(OBJECTIVES, default="elbo").validate(config).implement(SimpleNamespace(group_places=places))
    )
    terms = make_terms(log_px=LOG_PX, kl=KL, latent_kl=LATENT_KL)
    return float(objective(terms, noise.Stream(0, step, torch.arange(2)))[0])


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        ({}, 0, 15 + 5),
        ({"beta": 0.0}, 0, 15),
        ({"beta": 2.0}, 0, 15 + 10),
        ({"beta": {"schedule": "linear", "steps": 10}}, 0, 15),
        ({"beta": {"schedule": "linear", "steps": 10}}, 3, 15 + 0.3 * 5),
        ({"beta": {"schedule": "linear", "steps": 10, "start": 1, "end": 3}}, 10, 15 + 3 * 5),
        ({"free_bits": {"nats": 0.5}}, 0, 15 + 0.5 + 1.8 + 3),
        ({"free_bits": {"nats": 2.0, "per": "latent"}, "beta": 2.0}, 0, 15 + 2 * (2 + 2 + 3)),
        ({"free_bits": {"nats": 2.5, "per": "group"}}, 0, 15 + 2.5 + 3),
        ({"capacity": {"nats": 10, "steps": 100, "weight": 2}}, 0, 15 + 2 * 5),
        ({"capacity": {"nats": 10, "steps": 100, "weight": 2}}, 30, 15 + 2 * (5 - 3)),
        ({"capacity": {"nats": 10, "steps": 100, "weight": 2}}, 400, 15 + 2 * (10 - 5)),
        # gamma ~ (2.01 / 1, 3.01 / 16): mean 1.
        (
            {"balancing": "always"},
            0,
            15 + (2.01 * 2 + 3.01 / 16 * 3) / ((2.01 + 3.01 / 16) / 2),
        ),
        ({"balancing": "while_annealing", "beta": {"schedule": "linear", "steps": 10}}, 10, 15 + 5),
    ],
)
def test_values_by_hand(make_terms, config, step: int, expected: float) -> None:
    assert loss(make_terms, config, step=step) == pytest.approx(expected, rel=1e-6)


def test_balancing_ends_with_the_annealing(make_terms) -> None:
    annealing = {"schedule": "linear", "steps": 10, "start": 0.5, "end": 0.5}
    during = loss(make_terms, {"balancing": "while_annealing", "beta": annealing}, step=9)
    always = loss(make_terms, {"balancing": "always", "beta": 0.5})
    assert during == pytest.approx(always)
    assert during != pytest.approx(15 + 0.5 * 5)


def test_free_bits_let_go_of_what_is_below_the_floor() -> None:
    latent_kl = LATENT_KL.clone().requires_grad_()
    free_bits(latent_kl, KL, FreeBitsConfig(nats=0.5)).backward()
    assert torch.equal(latent_kl.grad, torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]))


def test_the_floor_is_of_the_batch_s_mean_not_of_an_image() -> None:
    """Kingma et al. 2016, eq. 15: an image below the floor pays when the batch is above it."""
    assert float(free_bits(torch.tensor([[0.0], [4.0]]), KL, FreeBitsConfig(nats=1.0))) == 2.0


@pytest.mark.parametrize(("nats", "sign"), [(3.0, 1.0), (7.0, -1.0)])
def test_capacity_pulls_from_both_sides(nats: float, sign: float) -> None:
    kl = KL.clone().requires_grad_()
    value = capacity(kl, CapacityConfig(nats=nats, steps=1, weight=10.0), 5)
    value.backward()
    assert float(value.detach()) == pytest.approx(10 * abs(5 - nats))
    assert torch.equal(kl.grad, torch.full((2, 2), sign * 10 / 2))


def test_the_capacity_rises_in_a_line() -> None:
    config = CapacityConfig(nats=25, steps=100)
    assert [capacity_nats(config, step) for step in (0, 50, 100, 1000)] == [0, 12.5, 25, 25]


def test_groups_of_one_size_share_their_weight() -> None:
    """Two groups of 16 places weigh 8 each against one group of one place."""
    kl = torch.full((3, 3), 0.99)
    got = float(balanced(kl, group_shares((1, 16, 16))))
    gamma = torch.tensor([1.0, 1 / 8, 1 / 8])
    assert got == pytest.approx(float((gamma / gamma.mean() * 0.99).sum()))


REFUSED = [
    ({"free_bits": {"nats": 1}, "capacity": {"nats": 1, "steps": 1}}, "both set the cost of the KL"),
    ({"free_bits": {"nats": 1}, "balancing": "always"}, "both set the cost of the KL"),
    ({"capacity": {"nats": 1, "steps": 1}, "beta": 4.0}, "leave objective.beta out"),
    ({"balancing": "while_annealing"}, "beta does not change"),
    ({"beta": {"schedule": "linear", "steps": 10, "cycles": 3}}, "belongs to `schedule: cyclical`"),
    ({"beta": -1.0}, "greater than or equal to 0"),
    ({"free_bits": {"nats": 0}}, "greater than 0"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_what_has_no_meaning_is_refused(config, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        OneOf(OBJECTIVES, default="elbo").validate(config)


def test_progress_is_what_changes(make_terms) -> None:
    model = SimpleNamespace(group_places=(1,))
    parse = OneOf(OBJECTIVES, default="elbo").validate
    annealing = {"beta": {"schedule": "linear", "steps": 10}}
    assert parse(annealing).implement(model).progress(5) == {"beta": 0.5}
    assert parse({"capacity": {"nats": 10, "steps": 10}}).implement(model).progress(5) == {"capacity_nats": 5}
    assert parse({"kind": "iwae", "samples": 3}).implement(model).progress(5) == {}
