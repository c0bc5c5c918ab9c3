"""The prior over codes: causal, normalized, its draws follow it, its files are refused when they do not fit."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vaescale import noise
from vaescale.aggregate import code_prior
from vaescale.aggregate.code_prior import draw, nats_in_parts, nats_of
from vaescale.errors import UserError
from vaescale.networks.code_transformer import CodeTransformer, Shape

SHAPE = Shape(codes=3, places=4, width=8, layers=2, heads=2)
EVERY = torch.tensor(list(itertools.product(range(3), repeat=4)))
IDENTITY = {"step": 5, "weights_hash": "a"}


@pytest.fixture
def prior() -> CodeTransformer:
    torch.manual_seed(0)
    prior = CodeTransformer(SHAPE, dropout=0.5).eval()
    with torch.no_grad():  # away from uniform codes
        for parameter in prior.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return prior


def test_the_probabilities_of_all_codes_sum_to_one(prior: CodeTransformer) -> None:
    nats = nats_in_parts(prior, EVERY.int())
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(nats.float(), nats_of(prior, EVERY).detach())
    assert nats.std() > 0.5


def test_at_first_codes_are_uniform() -> None:
    fresh = CodeTransformer(SHAPE)
    torch.testing.assert_close(
        nats_of(fresh, EVERY), torch.full((81,), 4 * torch.log(torch.tensor(3.0)).item())
    )


def test_a_code_changes_only_the_logits_of_later_ones(prior: CodeTransformer) -> None:
    codes = torch.tensor([[0, 1, 2]])
    for place in range(3):
        other = codes.clone()
        other[0, place] = (other[0, place] + 1) % 3
        changed = (prior(codes) - prior(other)).abs().sum(2)[0] > 1e-6
        assert changed.tolist() == [number > place for number in range(4)]


def test_draws_follow_the_prior_and_depend_on_their_slot_alone(prior: CodeTransformer) -> None:
    slots = torch.arange(20_000)
    codes = draw(prior, noise.Stream(0, 0, slots))
    index = (codes * torch.tensor([27, 9, 3, 1])).sum(1)
    share = torch.bincount(index, minlength=81).double() / len(slots)
    expected = torch.exp(-nats_in_parts(prior, EVERY))
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / len(slots)).sqrt() + 1e-4).all()
    assert torch.equal(draw(prior, noise.Stream(0, 0, slots[7:9])), codes[7:9])
    cold = draw(prior, noise.Stream(0, 0, slots[:50]), temperature=1e-3)
    assert (cold == cold[0]).all(), "the most probable code each time"


def test_dropout_is_a_function_of_the_slot(prior: CodeTransformer) -> None:
    prior.train()
    one, other = (nats_of(prior, EVERY[:6], noise.Stream(0, step, torch.arange(6))) for step in (0, 1))
    assert not torch.allclose(one, other)
    again = nats_of(prior, EVERY[2:4], noise.Stream(0, 0, torch.arange(2, 4)))
    torch.testing.assert_close(again, one[2:4])
    assert torch.equal(
        nats_of(prior.eval(), EVERY[:6], noise.Stream(0, 0, torch.arange(6))), nats_of(prior, EVERY[:6])
    )


def model() -> SimpleNamespace:
    return SimpleNamespace(num_codes=3, latent_shape=(2, 2, 2), parameters=lambda: iter([torch.zeros(1)]))


def test_its_files_come_back_or_are_refused(prior: CodeTransformer, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="has no prior over its codes; fit one with `vaescale fit-prior"):
        code_prior.load(tmp_path, model(), IDENTITY)
    assert code_prior.of_weights(tmp_path, model(), IDENTITY) is None
    code_prior.save(prior, tmp_path / "prior", IDENTITY)
    torch.testing.assert_close(
        nats_of(code_prior.load(tmp_path, model(), IDENTITY), EVERY), nats_of(prior, EVERY)
    )
    with pytest.raises(UserError, match="was fitted with step 5, this is 6"):
        code_prior.load(tmp_path, model(), IDENTITY | {"step": 6})
    assert code_prior.of_weights(tmp_path, model(), IDENTITY | {"step": 6}) is None
    assert "is left out: it was fitted with another step" in capsys.readouterr().err
    details = tmp_path / "prior" / code_prior.DETAILS
    sound = json.loads(details.read_text())
    for change in (
        {"width": 10**9},
        {"width": "8"},
        {"version": 2},
        {"sha256": "0"},
        {"layers": 1},
        {"codes": 4},
    ):
        details.write_text(json.dumps(sound | change))
        with pytest.raises(UserError, match="is damaged"):
            code_prior.load(tmp_path, model(), IDENTITY)
    details.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        code_prior.of_weights(tmp_path, model(), IDENTITY)
    shutil.rmtree(tmp_path / "prior")
