"""Stage words, published parameter counts, and what does not fit."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from vaescale.errors import UserError
from vaescale.models.build import build_vae
from vaescale.networks.config import LadderConfig
from vaescale.networks.ladder import LadderNetwork
from vaescale.networks.stages import Block, parse_decoder, parse_encoder, suggested
from vaescale.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def test_words_become_blocks() -> None:
    assert parse_encoder(("8x2", "8d2", "4d4", "1"), image_size=(8, 8)) == (
        *(Block(8, 8), Block(8, 8)),
        Block(8, 8, pools=2),
        Block(4, 4, pools=4),
        Block(1, 1),
    )
    groups = parse_decoder(("1", "4m1", "4x2", "8m4"), image_size=(8, 8), resolutions={8, 4, 1})
    assert groups == (Block(1, 1), Block(4, 4, mixes=1), Block(4, 4), Block(4, 4), Block(8, 8, mixes=4))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 15, 28, 30, 32, 64, 96, 256])
def test_every_size_has_a_suggested_ladder(size: int) -> None:
    down, up = suggested((size, size))
    blocks = parse_encoder(down, image_size=(size, size))
    resolutions = {one for block in blocks for one in (block.resolution, block.resolution // block.pools)}
    groups = parse_decoder(up, image_size=(size, size), resolutions=resolutions)
    assert groups[0].resolution == 1
    assert groups[-1].resolution == size
    assert {group.resolution for group in groups} == resolutions


REFUSED = {
    "it is no word": ({"encoder": "8x"}, "'8x' is not a stage; write RESOLUTIONxCOUNT or RESOLUTIONdFACTOR"),
    "another resolution": ({"encoder": "8x2,4x1"}, "'4x1' is given where the map is 8x8; write 8x1"),
    "pooling that does not divide": ({"encoder": "8d3"}, r"does not pool 8x8; pool it by 2 or 4 or 8"),
    "another image": ({"encoder": "32x2,32d2"}, "is given where the map is 8x8"),
    "a resolution that is not there": (
        {"encoder": "8d2,4x1", "decoder": "2x1"},
        r"'2x1' is at a resolution that the encoder does not have; it has \[4, 8\]",
    ),
    "a leap": ({"encoder": "8d2,4d4,1", "decoder": "1,4x1,8m4"}, "follows 1x1; write 4m1 before it, or 1x1"),
    "mixing what is not before": ({"encoder": "8d2,4", "decoder": "4,8m2"}, "write 8m4"),
    "an end below the image": ({"encoder": "8d2,4d4,1", "decoder": "1,4m1"}, "end it with a group at 8"),
    "a start above the smallest map": ({"decoder": "4x1,8m4"}, "begin with 1x1, the encoder's smallest map"),
    "groups that lead nowhere": ({"decoder": "1x1,4m1,8m4,4x1"}, "'4x1' follows 8x8"),
    "a branch that is left behind": ({"decoder": "1x1,4m1,8m1"}, "write 8m4"),
    "a bare number": ({"decoder": 5}, "'5' is at a resolution that the encoder does not have"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_said(name: str) -> None:
    keys, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        LadderNetwork(LadderConfig(**keys), image_size=(8, 8), channels=1, encoder_out=32, out_channels=1)


def test_a_string_and_a_list_are_the_same() -> None:
    words = LadderConfig(encoder="8x2, 8d2,4", decoder=["4", "8m4"])
    assert words == LadderConfig(encoder=("8x2", "8d2", "4"), decoder="4,8m4")


def test_widths_are_refused_when_narrow() -> None:
    with pytest.raises(ValidationError, match="a width must be at least 4"):
        LadderConfig(widths={8: 2})


@pytest.mark.parametrize(
    ("path", "millions", "groups"),
    [
        ("cifar10/ladder.yaml", 39, 43),
        ("imagenet32/ladder.yaml", 119, 78),
        ("imagenet64/ladder.yaml", 125, 75),
        ("ffhq256/ladder.yaml", 115, 66),
    ],
)
def test_the_published_configurations_have_the_published_size(path: str, millions: int, groups: int) -> None:
    """Child 2021, table 1 and the authors' README: 39M, 119M, 125M and 115M parameters."""
    recipe = load_recipe(ROOT / "recipes" / path)
    with torch.device("meta"):
        model = build_vae(
            recipe.network,
            recipe.posterior,
            recipe.likelihood,
            image_size=recipe.data.sides,
            channels=recipe.data.channels,
        )
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    assert len(model.group_sizes) == groups


def test_ends_start_as_in_the_paper() -> None:
    """The prior's last convolution at zero; a block's last one at 1 / sqrt(blocks) of its usual scale."""
    torch.manual_seed(0)
    config = LadderConfig(width=64, encoder="8x16", decoder="8x16")
    network = LadderNetwork(config, image_size=(8, 8), channels=1, encoder_out=32, out_channels=1)
    for group in network.groups:
        assert group.prior_body.c4.weight.abs().max() == 0
        prior, _ = group.prior(torch.randn(2, 64, 8, 8))
        assert prior.abs().max() == 0, "the prior starts as N(0, 1)"
    for block in network.encoder:
        usual = 1 / 16**0.5 / 3**0.5  # uniform in +- 1 / sqrt(fan in)
        assert float(block.body.c4.weight.detach().std()) == pytest.approx(usual / 16**0.5, rel=0.1)
