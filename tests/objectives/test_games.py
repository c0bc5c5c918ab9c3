"""The objectives that are games of two players: each against its formulas written apart, for the gradients of each network."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vaescale import noise
from vaescale.adversaries.discriminators import Discriminators
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe
from vaescale.trained import build_model, build_objective

SMALL = {"widths": [4, 8]}
KINDS: dict[str, dict[str, Any]] = {
    "aae": {"weight": 3.0, "discriminator": {"latent_widths": [8]}},
    "vae_gan": {"gamma": 0.25, "discriminator": SMALL},
    "vae_gan, vanilla": {"gamma": 4.0, "discriminator": SMALL | {"loss": "vanilla"}},
    "vae_gan, batch normalization": {"gamma": 2.0, "discriminator": SMALL},
    "alpha_gan": {"reconstruction": 5.0, "discriminator": SMALL | {"latent_widths": [8]}},
    "alpha_gan, reconstructions alone": {
        "prior_samples": False,
        "discriminator": SMALL | {"latent_widths": [8]},
    },
    "veegan": {"discriminator": SMALL | {"hidden": 8}},
}
IMAGES = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
STREAM = noise.Stream(0, 7, torch.arange(6))


def accept(u: Tensor) -> Tensor:
    return -logsigmoid(u).mean()


def refuse(u: Tensor) -> Tensor:
    return -logsigmoid(-u).mean()


class Sides:
    """The pieces of all formulas, from the networks themselves. Encoder and decoder are differentiated apart."""

    def __init__(self, model: VAE, discriminators: Discriminators) -> None:
        self.network, self.critics = model.network, discriminators.critics
        self.x = IMAGES.float() / 255
        self.q = model.posterior(self.x)
        epsilon = noise.normal(STREAM, noise.POSTERIOR, (4,))
        self.z = self.q.mu + self.q.log_sigma.exp() * epsilon
        self.prior = noise.normal(STREAM, noise.GENERATED, (4,))
        self.generated = self.decode(self.prior)
        self.recovered = model.posterior(self.generated).mu

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.network.decode(z))

    def d(self, x: Tensor) -> Tensor:
        logits: Tensor = self.critics["image"](2 * x - 1)
        return logits

    def features(self, x: Tensor) -> Tensor:
        return self.critics["image"].body(2 * x - 1).flatten(1)

    def c(self, z: Tensor) -> Tensor:
        logits: Tensor = self.critics["latent"](z)
        return logits

    def j(self, z: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.critics["pair"](z, 2 * x - 1)
        return logits


def losses_of(kind: str, config: Any, sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of E, G and the discriminators, as the papers write them."""
    s, kl = (
        sides,
        0.5 * (sides.q.mu**2 + (2 * sides.q.log_sigma).exp() - 1 - 2 * sides.q.log_sigma).sum(1).mean(),
    )
    reconstructed = s.decode(s.z)
    if kind == "aae":
        error = (s.x - reconstructed).square().flatten(1).sum(1).mean() / (2 * 0.3**2)
        loss = error + config.weight * accept(s.c(s.z))
        return loss, loss, accept(s.c(s.prior)) + refuse(s.c(s.z.detach()))
    if kind == "vae_gan":
        like = 0.5 * (s.features(s.x) - s.features(reconstructed)).square().sum(1).mean()
        of_d = accept(s.d(s.x)) + refuse(s.d(s.generated)) + refuse(s.d(reconstructed))
        fool = accept(s.d(s.generated)) + accept(s.d(reconstructed))
        of_g = config.gamma * like + (fool if config.discriminator.loss == "non_saturating" else -of_d)
        return kl + like, of_g, of_d
    if kind == "alpha_gan":
        loss = (
            config.reconstruction * (s.x - reconstructed).abs().mean()
            + accept(s.c(s.z))
            + accept(s.d(reconstructed))
        )
        of_d = (
            accept(s.c(s.prior)) + refuse(s.c(s.z.detach())) + accept(s.d(s.x)) + refuse(s.d(reconstructed))
        )
        if config.prior_samples:
            loss, of_d = loss + accept(s.d(s.generated)), of_d + refuse(s.d(s.generated))
        return loss, loss, of_d
    distance = (s.prior - s.recovered).square().sum(1).mean()
    of_d = accept(s.j(s.prior, s.generated)) + refuse(s.j(s.z, s.x))
    return distance, s.j(s.prior, s.generated).mean() + distance, of_d


def gradients(loss: Tensor, part: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*part.parameters()], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, part.parameters(), strict=True)]


def game(content: dict[str, Any], name: str) -> tuple[Recipe, VAE, Any]:
    kind = name.partition(",")[0]
    posterior = {"kind": "fixed", "sigma": 0.2} if kind == "veegan" else {"kind": "diagonal"}
    likelihood = {"kind": "gaussian", "sigma": 0.3}
    norm = "batch" if "batch" in name else "group"
    recipe = Recipe.model_validate(
        content
        | {"network": content["network"] | {"norm": norm}}
        | {"objective": {"kind": kind, **KINDS[name]}, "posterior": posterior, "likelihood": likelihood}
    )
    model = build_model(recipe).train()
    return recipe, model, build_objective(recipe, model)


@pytest.mark.parametrize("name", KINDS)
def test_each_network_gets_the_gradient_of_its_paper(recipe_content: dict[str, Any], name: str) -> None:
    recipe, model, objective = game(recipe_content, name)
    terms = model(IMAGES, STREAM, torch.ones(6, dtype=torch.bool))
    loss, pieces = objective(terms, STREAM)
    sides = Sides(model, objective.discriminators)
    of_e, of_g, of_d = losses_of(recipe.objective.kind, recipe.objective, sides)
    for expected, part in ((of_e, model.network.encoder), (of_g, model.network.decoder)):
        for got, value in zip(gradients(loss, part), gradients(expected, part), strict=True):
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    judged = objective.discriminators(terms.shown.detached(), STREAM, 0)
    torch.testing.assert_close(judged.loss, of_d)
    for got, value in zip(
        gradients(judged.loss, objective.discriminators),
        gradients(of_d, objective.discriminators),
        strict=True,
    ):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)
    assert all(value.ndim == 0 for value in pieces.values())


@pytest.mark.parametrize("name", ["vae_gan", "alpha_gan", "veegan"])
def test_a_game_without_a_likelihood_reports_no_bound(
    recipe_content: dict[str, Any], name: str, recipe_file: Any, vaescale: Any
) -> None:
    recipe, _, _ = game(recipe_content, name)
    content = recipe.model_dump(mode="json")
    content["training"] |= {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
    outcome = vaescale("train", recipe_file(content), "--json")
    assert outcome.code == 0, outcome.err
    row = outcome.json["val"]
    assert "mse" in row
    assert not {"neg_elbo_nats", "log_px_nats", "bits_per_dim"} & row.keys()
    if name != "veegan":
        return
    run = content["run_dir"]
    evaluated = vaescale("evaluate", run, "--json").json
    assert "neg_elbo_nats" not in evaluated["metrics"]
    assert evaluated["protocol"]["bound"].startswith("this objective trains no likelihood of images")
    refused = vaescale("evaluate", run, "--importance-samples", "2")
    refused.assert_refused(2, "trains no likelihood of images", "leave importance samples out")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("aae", {"network": {"kind": "ladder"}}, "needs a single latent vector or map"),
        (
            "vae_gan",
            {"likelihood": {"kind": "gaussian", "sigma": "predicted"}},
            "needs a decoder of the mean alone",
        ),
        ("alpha_gan", {"likelihood": {"kind": "bernoulli"}}, "choose gaussian or laplace"),
        ("veegan", {"posterior": {"kind": "diagonal"}}, "needs constant standard deviations"),
        (
            "vae_gan",
            {"objective": {"kind": "vae_gan", "discriminator": {"start_step": 3}}},
            "has nothing to minimize",
        ),
    ],
)
def test_wrong_combinations_are_refused_in_one_sentence(
    recipe_content: dict[str, Any], kind: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        Recipe.model_validate(recipe_content | {"objective": {"kind": kind}} | changes)
    assert words in str(refusal.value)
