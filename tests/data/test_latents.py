"""Latents for other models: what is stored, and batches that are the same on any number of ranks and workers."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch.utils.data import DataLoader

from vaescale import noise
from vaescale.aggregate.latents import Drawing, ShardLatents
from vaescale.aggregate.prepared import Preparation, prepare, scale_of
from vaescale.commands.encode import encode as encode_verb
from vaescale.commands.encode import latents_of
from vaescale.data.latent_shards import LatentShards, open_latents, write_latent_index, write_latents
from vaescale.data.latents import LatentDataset
from vaescale.data.making.verifying import verify_shards
from vaescale.errors import DataError, UserError
from vaescale.recipe import Recipe
from vaescale.trained import Trained, build_model, draw_seed, open_split

ROUNDING = {"float32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}


def written(folder: Path, moments: np.ndarray, **made: Any) -> LatentShards:
    """Latents of three shards of the images' moments [n, 2, C, H, W], with their statistics, as `encode` writes them."""
    shards = []
    for number, part in enumerate(np.array_split(moments, 3)):
        keys = [f"{number}-{row}" for row in range(len(part))]
        labels = np.arange(len(part)) % 4
        name = f"shard-{number:06d}.tar"
        shards.append(write_latents(folder, name, keys=keys, labels=labels, moments=part))
    mean = moments[:, 0].mean((0, 2, 3), dtype=np.float64)
    square = (moments[:, 0].astype(np.float64) ** 2 + np.exp(moments[:, 1])).mean((0, 2, 3))
    measured = {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist(), "skipped": 0}
    write_latent_index(folder, shards, ("a", "b", "c", "d"), {"latent_shape": [2, 3, 3], **measured, **made})
    return open_latents(folder)


def moments_of(seed: int, images: int = 50) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mean = generator.normal(size=(images, 2, 3, 3)) * [[[3.0]], [[0.5]]] + [[[-1.0]], [[2.0]]]
    return np.stack([mean, generator.normal(size=mean.shape) - 2], axis=1).astype(np.float32)


@pytest.fixture
def views(tmp_path: Path) -> list[LatentShards]:
    return [written(tmp_path / "train", moments_of(0)), written(tmp_path / "train-mirrored", moments_of(1))]


def all_of(shards: LatentShards) -> np.ndarray:
    return np.concatenate([shards.read(number).moments for number in range(len(shards.index.shards))])


@pytest.mark.parametrize("dtype", ["float32", "fp16", "bf16"])
def test_standardization_is_undone_by_what_the_index_keeps(views, tmp_path: Path, dtype) -> None:
    scale = scale_of(views)
    preparation = Preparation(dtype=dtype, flip="both", standardize="channel")
    shards = prepare(views, tmp_path / "out", preparation, scale=scale, draw_seed=0)
    assert shards.standardized == scale
    stored = all_of(shards).reshape(100, 2, 2, 9).astype(np.float64)
    z = stored[:, 0].transpose(1, 0, 2).reshape(2, -1)
    assert z.mean(1) == pytest.approx([0, 0], abs=1e-2)
    variance = z.var(1) + np.exp(stored[:, 1]).mean((0, 2))
    assert variance == pytest.approx([1, 1], abs=1e-2)  # that of the aggregate posterior, not of the means
    mean, std = (np.array(values)[:, None] for values in scale)
    expected = np.stack([moments_of(0), moments_of(1)], axis=1).reshape(100, 2, 2, 9)
    undone = stored[:, 0] * std + mean
    error = np.abs(undone - expected[:, 0]) - ROUNDING[dtype] * np.abs(stored[:, 0]) * std
    assert error.max() < 1e-5
    error = np.abs(stored[:, 1] + 2 * np.log(std) - expected[:, 1]) - ROUNDING[dtype] * np.abs(stored[:, 1])
    assert error.max() < 1e-5
    block = shards.read(0)
    assert block.keys[:4] == ["0-0", "0-0_mirrored", "0-1", "0-1_mirrored"]
    assert block.labels[:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert verify_shards(str(tmp_path / "out"))[1] == []


def test_a_member_in_bf16_is_a_safetensors_file(views, tmp_path: Path) -> None:
    shards = prepare(views[:1], tmp_path / "out", Preparation("bf16"), scale=scale_of(views[:1]), draw_seed=0)
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith(".cls")]
        content = tar.extractfile(names[0]).read()
    assert names[0] == "0-0.moments.safetensors"
    (tmp_path / "one.safetensors").write_bytes(content)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.get_tensor("moments").dtype == torch.bfloat16
    expected = torch.from_numpy(moments_of(0)[0]).bfloat16()
    assert torch.equal(load(content)["moments"], expected)
    assert np.array_equal(shards.read(0).moments[0].ravel(), expected.float().numpy().ravel())


def test_draws_are_those_that_a_mixture_is_fitted_to(views, tmp_path: Path) -> None:
    preparation = Preparation(draws=3)
    shards = prepare(views[:1], tmp_path / "out", preparation, scale=scale_of(views[:1]), draw_seed=7)
    fitted = ShardLatents(views[0], Drawing(3, 7)).held().rows(torch.arange(150)).float()
    assert torch.equal(torch.from_numpy(all_of(shards)).reshape(150, -1), fitted)
    assert torch.equal(ShardLatents(shards, Drawing(3, 0)).held().rows(torch.arange(150)).float(), fitted)


def test_it_is_written_once_and_again_where_something_changed(views, tmp_path: Path) -> None:
    def when(preparation: Preparation) -> int:
        prepare(views, tmp_path / "out", preparation, scale=scale_of(views), draw_seed=0)
        return (tmp_path / "out/shard-000000.tar").stat().st_mtime_ns

    first = when(Preparation("bf16", "both"))
    assert when(Preparation("bf16", "both")) == first
    assert when(Preparation("fp16", "both")) > first


def batches(place: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    return list(LatentDataset(place, global_batch=12, seed=3, steps=10, **options))


def test_batches_do_not_depend_on_ranks_workers_and_the_start(views) -> None:
    place = views[0].folder
    whole = batches(place)
    assert len(whole) == 10  # 2.5 epochs of 4 steps
    halves = [batches(place, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for name, values in batch.items():
            assert torch.equal(values, torch.cat([half[step][name] for half in halves]))
    for got, expected in zip(batches(place, start=7), whole[7:], strict=True):
        assert torch.equal(got["latents"], expected["latents"])
    loader = DataLoader(
        LatentDataset(place, global_batch=12, seed=3, steps=5), batch_size=None, num_workers=2
    )
    for got, expected in zip(loader, whole[:5], strict=True):
        assert torch.equal(got["latents"], expected["latents"])
    for epoch in (whole[:4], whole[4:8]):
        numbers = torch.cat([batch["numbers"] for batch in epoch])
        assert len(numbers.unique()) == 48  # each sample once; the partial batch is dropped


def test_each_reading_draws_z_by_image_and_epoch(views) -> None:
    data = LatentDataset(views[0].folder, global_batch=12, seed=3)
    moments, drawn = torch.from_numpy(moments_of(0)), {0: {}, 1: {}}
    for step in range(8):
        batch = data.batch(step)
        epsilon = noise.normal(noise.Stream(3, step // 4, batch["numbers"]), noise.POSTERIOR, (18,))
        mean, log_variance = moments[batch["numbers"]].unbind(1)
        expected = mean + torch.exp(0.5 * log_variance) * epsilon.view(mean.shape)
        torch.testing.assert_close(batch["latents"], expected)
        rows = (
            batch["numbers"]
            - torch.tensor([0, 17, 34])[torch.bucketize(batch["numbers"], torch.tensor([17, 34]), right=True)]
        )
        assert torch.equal(batch["labels"], rows % 4)
        drawn[step // 4] |= dict(zip(batch["numbers"].tolist(), batch["latents"], strict=True))
    both = drawn[0].keys() & drawn[1].keys()
    assert len(both) > 40
    assert not any(torch.equal(drawn[0][number], drawn[1][number]) for number in both)
    means = LatentDataset(views[0].folder, global_batch=12, seed=3, sample=False).batch(0)
    assert torch.equal(means["latents"], moments[means["numbers"], 0])
    assert data.class_names == ("a", "b", "c", "d")


def test_a_stored_draw_is_chosen_at_each_reading_and_its_scale_undone(views, tmp_path: Path) -> None:
    preparation = Preparation(draws=4, standardize="channel")
    scale = scale_of(views[:1])
    stored = prepare(views[:1], tmp_path / "out", preparation, scale=scale, draw_seed=7)
    draws = torch.from_numpy(all_of(stored)).view(50, 4, 2, 3, 3)
    plain = prepare(views[:1], tmp_path / "plain", Preparation(draws=4), scale=scale, draw_seed=7)
    unscaled = torch.from_numpy(all_of(plain)).view(50, 4, 2, 3, 3)
    data, chosen = LatentDataset(tmp_path / "out", global_batch=50), set()
    for step in range(3):
        batch = data.batch(step)
        match = (draws[batch["numbers"]] == batch["latents"][:, None]).flatten(2).all(2)
        assert match.sum(1).tolist() == [1] * 50
        chosen |= set(match.long().argmax(1).tolist())
        torch.testing.assert_close(
            data.unstandardized(batch["latents"]), unscaled[batch["numbers"]][match], rtol=1e-5, atol=1e-5
        )
    assert chosen == {0, 1, 2, 3}


def test_faults_get_one_sentence(views, tmp_path: Path) -> None:
    place, scale = views[0].folder, scale_of(views)
    with pytest.raises(UserError, match=r"rank \(=2\) must be from 0"):
        LatentDataset(place, global_batch=12, rank=2, world_size=2)
    with pytest.raises(DataError, match=r"global_batch \(=51\) exceeds the 50"):
        LatentDataset(place, global_batch=51)
    large = written(tmp_path / "large", moments_of(0) * np.float32([[[[1e5]]], [[[1.0]]]]))
    with pytest.raises(DataError, match=r"fp16 ends at 65504.*use --dtype bf16"):
        prepare([large], tmp_path / "fp16", Preparation("fp16"), scale=scale, draw_seed=0)
    other = written(tmp_path / "other", moments_of(2, images=60))
    with pytest.raises(DataError, match="of other images"):
        prepare([views[0], other], tmp_path / "two", Preparation(flip="both"), scale=scale, draw_seed=0)
    flat = scale._replace(std=(1.0, 0.0))
    with pytest.raises(DataError, match="channel 1 of the latents has no variance"):
        prepare(views, tmp_path / "flat", Preparation(standardize="channel"), scale=flat, draw_seed=0)
    scaled = prepare(views[:1], tmp_path / "s", Preparation(standardize="channel"), scale=scale, draw_seed=0)
    with pytest.raises(UserError, match="standardized latents, and the model's own are needed"):
        ShardLatents(scaled, Drawing(1, 0))
    index = tmp_path / "s/index.json"
    whole = index.read_text()
    for before, after, message in (
        ('"dtype": "float32"', '"dtype": "fp8"', "latents of dtype 'fp8', and this version reads float32"),
        ('"standardized": {"mean"', '"standardized": {"median"', "standardized in a way"),
    ):
        index.write_text(whole.replace(before, after))
        with pytest.raises(DataError, match=message):
            LatentDataset(tmp_path / "s", global_batch=12)
    path = place / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[3 * 2560 + 900 :] = bytes(len(content) - 3 * 2560 - 900)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not what was indexed; encode the run again"):
        list(LatentDataset(place, global_batch=12, steps=4))


@pytest.fixture
def trained(recipe_content) -> Trained:
    recipe = Recipe.model_validate(recipe_content)
    return Trained(Path(recipe.run_dir), recipe, build_model(recipe).eval(), 12, "ema")


def test_mirror_images_are_encoded_and_the_scale_is_the_training_set_s(trained, monkeypatch) -> None:
    monkeypatch.setattr("vaescale.commands.encode.open_trained", lambda *_, **__: trained)
    options = {"dtype": "bf16", "flip": "both", "draws": 2, "standardize": "channel"}
    result = encode_verb(trained.folder, splits=["val"], **options)["splits"]["val"]
    folder = trained.folder / "latents/val-bf16-both-draws2-channel"
    assert result["folder"] == str(folder)
    assert result["standardized"]
    shards = open_latents(folder)
    train = [latents_of(trained, "train"), latents_of(trained, "train", suffix="-mirrored", mirrored=True)]
    assert shards.standardized == scale_of(train)
    plain = latents_of(trained, "val")
    assert shards.index.num_samples == 2 * plain.index.num_samples
    images = open_split(trained.recipe, "val")[0].images
    with torch.no_grad():
        q = trained.model.posterior(trained.model.target(images.flip(-1), noise.Stream(0, 0, torch.zeros(1))))
    number = torch.tensor([plain.index.num_samples])
    epsilon = noise.normal(noise.Stream(draw_seed(trained.recipe, "val"), 1, number), noise.POSTERIOR, (4,))
    z = (q.sample(epsilon) - torch.tensor(shards.standardized.mean)) / torch.tensor(shards.standardized.std)
    stored = torch.from_numpy(shards.read(0).moments[1, 1])
    torch.testing.assert_close(stored, z[0], rtol=2.0**-7, atol=1e-4)
    assert not (trained.folder / "latents/val-mirrored-raw").exists()
