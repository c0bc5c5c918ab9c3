"""All measures in one pass over the data: the same numbers as apart, and each part of the model runs as often as it must."""

import pytest
import torch

from vaescale import noise
from vaescale.data.loader import evaluation_batches
from vaescale.data.reader import open_reader
from vaescale.evaluation.importance import ImportanceBound
from vaescale.evaluation.likelihood import Bound, evaluate
from vaescale.evaluation.measures import measure
from vaescale.evaluation.reconstruction import Reconstruction
from vaescale.models.vae import rows_of
from vaescale.recipe import Recipe
from vaescale.trained import build_model, in_order

LADDER = {"kind": "ladder", "latent_dim": 2, "width": 16}
NETWORKS = {"flat": {}, "ladder": {"network": LADDER, "posterior": {"kind": "relative"}}}


def opened(content, network: str):
    own = Recipe.model_validate({**content, **NETWORKS[network]})
    return build_model(own), open_reader(own.data.val, own.data)


def calls_of(monkeypatch: pytest.MonkeyPatch, model) -> dict[str, int]:
    calls = dict.fromkeys(("encode", "infer", "decode_means"), 0)

    def counted(name: str):
        original = getattr(model, name)

        def call(*arguments, **options):
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(model, name, call)

    for name in calls:
        counted(name)
    return calls


@pytest.mark.parametrize("network", NETWORKS)
def test_one_pass_gives_the_numbers_of_several(
    recipe_content, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reader = opened(recipe_content, network)

    def batches():
        return evaluation_batches(reader, batch=50, rank=0, world_size=1)

    def measures():
        return [Bound(model), ImportanceBound(model, samples=9, most_images=70), Reconstruction(model)]

    apart = evaluate(model, batches(), seed=3)
    for each in measures()[1:]:
        apart |= measure(model, batches(), [each], seed=3)
    calls = calls_of(monkeypatch, model)
    done: list[int] = []
    together = measure(model, batches(), measures(), seed=3, progress=done.append)
    assert together == pytest.approx(apart, rel=1e-6)
    # Eight batches, of which two have images among the first 70, with three groups of draws each.
    assert calls == {"encode": 8, "infer": 8 + 2 * 3, "decode_means": 8}
    assert done == sorted(done)
    assert done[-1] == 400
    assert model.training


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_of_what_was_encoded_are_those_of_the_images(recipe_content, network: str) -> None:
    model, reader = opened(recipe_content, network)
    with torch.no_grad():
        x = model.target(next(in_order(reader, images=6)).images, noise.Stream(0, 0, torch.arange(6)))
        rows = torch.tensor([4, 1])
        got = model.decode_means(rows_of(model.encode(x), rows))
    torch.testing.assert_close(got, model.reconstruct(x[rows]))


def test_the_first_images_in_equal_batches(recipe_content) -> None:
    _, reader = opened(recipe_content, "flat")
    (batch,) = in_order(reader)
    assert batch.slots.tolist() == list(range(360))
    (batch,) = in_order(reader, images=7)
    assert batch.slots.tolist() == list(range(7))
    assert batch.mask.all()
    assert len(next(in_order(reader, images=1000)).slots) == 360
