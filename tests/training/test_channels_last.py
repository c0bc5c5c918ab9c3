"""Where weights and maps are stored as [B, H, W, C]."""

from typing import Any

import pytest
import torch

from vaescale.errors import UserError
from vaescale.models.vae import VAE
from vaescale.networks import normalization
from vaescale.recipe import Recipe
from vaescale.trained import build_model
from vaescale.training.launch import takes_channels_last

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def built(content: dict[str, Any], size: int, **training: Any) -> tuple[Recipe, VAE]:
    data = content["data"] | {"image_size": size}
    recipe = Recipe.model_validate(content | {"data": data, "training": content["training"] | training})
    return recipe, build_model(recipe)


@pytest.mark.parametrize("size", [8, 32])
def test_on_a_cpu_large_maps_of_a_normalized_network_are(recipe_content: dict[str, Any], size: int) -> None:
    recipe, model = built(recipe_content, size)
    expected = size == 32 and normalization.are_usable()
    assert takes_channels_last(recipe.training, CPU, model, "ddp") == expected


@pytest.mark.parametrize("strategy", ["zero", "fsdp2"])
def test_weights_that_a_layout_divides_never_are(recipe_content: dict[str, Any], strategy: str) -> None:
    recipe, model = built(recipe_content, 32, precision="bf16")
    assert takes_channels_last(recipe.training, GPU, model, "ddp")
    assert not takes_channels_last(recipe.training, CPU, model, strategy)
    assert not takes_channels_last(recipe.training, GPU, model, strategy)
    asked, model = built(recipe_content, 32, channels_last=True)
    with pytest.raises(UserError, match="divides weights in torch's usual order alone"):
        takes_channels_last(asked.training, CPU, model, strategy)
