"""Latent shards: each image once, whoever encodes it and however often it was stopped; and what is read back."""

import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import on_ranks
from vaescale import noise
from vaescale.aggregate.collapse import use_of
from vaescale.aggregate.information import information
from vaescale.aggregate.latents import Drawing, ShardLatents, load
from vaescale.commands import fit_gmm as fitting
from vaescale.commands.encode import latents_of
from vaescale.data import latent_shards
from vaescale.data.latent_shards import open_latents, write_latent_index, write_latents
from vaescale.data.making.verifying import verify_shards
from vaescale.data.reader import open_reader
from vaescale.errors import DataError, UserError
from vaescale.mixtures.points import Points
from vaescale.mixtures.selection import Candidate, Spread, choose, refuse_unfit, spread_of
from vaescale.mixtures.steps import standardize
from vaescale.recipe import Recipe
from vaescale.system.files import exclusive
from vaescale.trained import Trained, build_model


@pytest.fixture
def recipe(recipe_content) -> Recipe:
    return Recipe.model_validate(recipe_content)


def opened(recipe: Recipe) -> Trained:
    return Trained(Path(recipe.run_dir), recipe, build_model(recipe).eval(), 12, "ema")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_each_image_is_encoded_once(recipe: Recipe) -> None:
    here = opened(recipe)
    shards = latents_of(here, "train")
    reader = open_reader(recipe.data.train, recipe.data)
    assert shards.shape == (4,)
    number = 0
    for place, source in enumerate(reader.index.shards):
        block = shards.read(place)
        assert len(block.keys) == source.samples
        for key, label, moments in zip(block.keys, block.labels, block.moments, strict=True):
            if number % 97 == 0:
                image = reader[number]
                stream = noise.Stream(0, 0, torch.tensor([number]))
                with torch.no_grad():
                    q = here.model.posterior(here.model.target(image.images, stream))
                np.testing.assert_allclose(moments[0], q.mu[0], atol=1e-5)
                np.testing.assert_allclose(moments[1], 2 * q.log_sigma[0], atol=1e-5)
                assert (key, label) == (image.keys[0], int(image.labels[0]))
            number += 1
    assert number == len(reader) == shards.index.num_samples
    assert verify_shards(str(shards.folder), deep=True) == (number, [])


def test_mean_and_std_are_the_aggregate_s(recipe: Recipe) -> None:
    shards = latents_of(opened(recipe), "val")
    moments = torch.from_numpy(
        np.concatenate([shards.read(n).moments for n in range(len(shards.index.shards))])
    )
    mean, variance = moments.double()[:, 0], moments.double()[:, 1].exp()
    made = shards.index.made
    np.testing.assert_allclose(made["mean"], mean.mean(0), atol=1e-9)
    np.testing.assert_allclose(made["std"], (mean.var(0, correction=0) + variance.mean(0)).sqrt(), rtol=1e-6)
    z = ShardLatents(shards, Drawing(200, 0)).held().z.double()
    np.testing.assert_allclose(made["std"], z.std(0), rtol=0.02)


def test_held_out_draws_share_no_noise_with_training_draws(recipe: Recipe) -> None:
    """Of a latent that all images have alike a mixture fitted to the one would else know the other."""
    here = opened(recipe)
    material = fitting.gather(here, groups=1, samples_per_image=2, online=False)
    noises = []
    for latents, split in ((material.drawn, "train"), (material.val, "val")):
        shards = latents_of(here, split)
        moments = np.concatenate([shards.read(n).moments for n in range(len(shards.index.shards))])
        mean, spread = (
            torch.from_numpy(part).repeat_interleave(2, 0)
            for part in (moments[:, 0], np.exp(0.5 * moments[:, 1]))
        )
        noises.append(((latents.z - mean) / spread)[:720].flatten())
    one, other = noises
    assert float(one.std()) == pytest.approx(1, abs=0.05)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.08


def test_a_second_start_writes_what_is_missing_and_the_same_bytes(recipe: Recipe) -> None:
    here = opened(recipe)
    shards = latents_of(here, "train")
    whole = hashes(shards.folder)
    (shards.folder / "index.json").unlink()
    (shards.folder / shards.index.shards[1].name).write_bytes(b"cut")
    assert hashes(latents_of(here, "train").folder) == whole
    before = (shards.folder / "index.json").stat().st_mtime_ns
    latents_of(here, "train")
    assert (shards.folder / "index.json").stat().st_mtime_ns == before, "nothing was to be done"


def test_a_lost_shard_is_encoded_again(recipe: Recipe) -> None:
    here = opened(recipe)
    shards = latents_of(here, "train")
    whole = hashes(shards.folder)
    (shards.folder / shards.index.shards[1].name).unlink()
    assert hashes(latents_of(here, "train").folder) == whole


def test_a_shard_without_a_usable_image_is_left_out(
    recipe: Recipe, recipe_content, tmp_path, make_items
) -> None:
    from vaescale.data.making.storing import Making
    from vaescale.data.making.writing import write_shards

    place = tmp_path / "broken"
    write_shards(make_items(5), place, Making(shard_samples=4))
    path = place / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[1680] ^= 255  # in the image: a class, with its header, lies before it
    path.write_bytes(content)
    recipe_content["data"] |= {"val": str(place), "max_skipped": 0.5}
    shards = latents_of(opened(Recipe.model_validate(recipe_content)), "val")
    assert [shard.name for shard in shards.index.shards] == ["shard-000000.tar"]
    assert shards.index.made["skipped"] == 1


def test_an_index_that_points_beyond_the_file_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, np.zeros((3, 2, 2), np.float32), ["a", "b", "c"])
    path = folder / "shard-000000.index.npy"
    content = bytearray(path.read_bytes())
    entries = np.frombuffer(content, np.load(path).dtype, offset=len(content) - np.load(path).nbytes).copy()
    entries["offset"] = [0, 10**12, 2 * 10**12]
    content[-entries.nbytes :] = entries.tobytes()
    path.write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    words = index["shards"][0].split(" ")
    words[0], words[4] = str(10**13), hashlib.sha256(content).hexdigest()
    index["shards"] = [" ".join(words)]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not what was indexed"):
        open_latents(folder).read(0)


def test_another_step_s_latents_are_written_anew(recipe: Recipe) -> None:
    here = opened(recipe)
    one = latents_of(here, "val").read(0).moments
    with torch.no_grad():
        next(here.model.parameters()).mul_(2)
    other = latents_of(here._replace(step=13), "val")
    assert other.index.made["step"] == 13
    assert not np.array_equal(one, other.read(0).moments)


def _encode_beside_others(content: dict, name: str, seconds: float) -> tuple[int, dict[str, str]]:
    """Encode at the same moment as another process, each file delayed. Returns how many shards were written from here, and
    the hashes of all files.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trained = opened(Recipe.model_validate(content))
    num_written, folder = 0, Path(content["run_dir"])

    def sync(path: Path) -> None:
        nonlocal num_written
        num_written += path.is_file()
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(latent_shards, "sync", sync)
        folder.mkdir(exist_ok=True)
        (folder / f"ready-{name}").touch()
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.01)
        shards = latents_of(trained, "train")
    assert all(len(shards.read(number).keys) for number in range(len(shards.index.shards)))
    return num_written, hashes(shards.folder)


@pytest.mark.slow
def test_two_processes_that_encode_one_run_share_the_work(recipe_content, tmp_path: Path) -> None:
    """Of two jobs at different speeds, the fast one ends while the slow one has temporary files."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [
            pool.submit(_encode_beside_others, recipe_content, name, seconds)
            for name, seconds in (("fast", 0.0), ("slow", 0.5))
        ]
        (fast, files_of_fast), (slow, files_of_slow) = (future.result() for future in futures)
    assert files_of_fast == files_of_slow
    assert sorted((fast, slow)) == [0, sum(name.endswith(".tar") for name in files_of_fast)]
    torch.manual_seed(0)
    recipe_content["run_dir"] = str(tmp_path / "alone")
    alone = hashes(latents_of(opened(Recipe.model_validate(recipe_content)), "train").folder)
    assert files_of_fast == alone
    assert list((tmp_path / "run" / "latents").iterdir()) == [tmp_path / "run" / "latents" / "train"]


def test_latents_that_are_there_are_used_without_a_lock(recipe: Recipe) -> None:
    """As on a disk that cannot be written."""
    trained = opened(recipe)
    folder = latents_of(trained, "val").folder
    with exclusive(folder.with_name(".val.lock")):
        assert latents_of(trained, "val").folder == folder


def _encode_on_rank(rank: int, ranks: int, content: dict) -> dict[str, int]:
    recipe = Recipe.model_validate(content)
    shards = latents_of(opened(recipe), "train")
    held = load(shards, Drawing(2, 5))
    assert isinstance(held, Points)
    wanted = torch.tensor([0, 1, 999, 1000, 2873])
    return {"rows": held.rows(wanted), "numbers": held.numbers, "count": held.count}


@pytest.mark.distributed
def test_ranks_share_the_work(recipe: Recipe, recipe_content, tmp_path: Path) -> None:
    expected = hashes(latents_of(opened(recipe), "train").folder)
    recipe_content["run_dir"] = str(tmp_path / "other")
    results = on_ranks(tmp_path, _encode_on_rank, recipe_content)
    assert hashes(tmp_path / "other/latents/train") == expected
    numbers = torch.cat([result["numbers"] for result in results])
    assert numbers.sort().values.tolist() == list(range(2 * 1437))
    alone = ShardLatents(open_latents(tmp_path / "other/latents/train"), Drawing(2, 5))
    wanted = torch.tensor([0, 1, 999, 1000, 2873])
    for result in results:
        assert result["count"] == 2874
        assert torch.equal(result["rows"], alone.rows(wanted))
    z, _ = alone.take(wanted.numpy())
    assert torch.equal(z.double(), results[0]["rows"])


def test_a_ladder_s_top_group_is_encoded(recipe_content) -> None:
    recipe_content |= {
        "network": {"kind": "ladder", "latent_dim": 2, "width": 8},
        "posterior": {"kind": "relative"},
    }
    here = opened(Recipe.model_validate(recipe_content))
    shards = latents_of(here, "val")
    assert shards.shape == here.model.latent_shape
    assert len(shards.index.made["mean"]) == 2
    assert shards.read(0).moments.shape[2] == here.model.group_sizes[0] < sum(here.model.group_sizes)


def written(folder: Path, moments: np.ndarray, keys: list[str]) -> Path:
    """A set of one shard."""
    labels = np.full(len(keys), -1)
    shard = write_latents(folder, "shard-000000.tar", keys=keys, labels=labels, moments=moments)
    write_latent_index(folder, [shard], (), {"latent_shape": list(moments.shape[2:])})
    return folder


def test_long_keys_and_maps_come_back(tmp_path: Path) -> None:
    moments = np.random.default_rng(0).normal(size=(3, 2, 2, 4, 4)).astype(np.float32)
    keys = ["a", "b" * 180, "c/d"]
    shards = open_latents(written(tmp_path, moments, keys))
    block = shards.read(0)
    assert block.keys == keys
    assert block.labels.tolist() == [-1, -1, -1]
    assert np.array_equal(block.moments, moments.reshape(3, 2, 32))
    assert shards.shape == (2, 4, 4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves it open
def test_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    moments = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    folder = written(tmp_path, moments, ["a", "b", "c"])
    found = list(webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == ["a", "b", "c"]
    assert np.array_equal(np.stack([sample["moments.npy"] for sample in found]), moments)


def test_damage_gets_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path, np.zeros((3, 2, 2), np.float32), ["a", "b", "c"])
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encode again"):
        open_latents(folder).read(0)
    path.unlink()
    with pytest.raises(DataError, match="encode the run again"):
        open_latents(folder).read(0)
    index = json.loads((folder / "index.json").read_text())
    for shape in (None, [], [0], ["2"], [-1], [True]):
        index["made"]["latent_shape"] = shape
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="holds no latents"):
            open_latents(folder)
    with pytest.raises(DataError, match="vaescale encode"):
        open_latents(tmp_path / "absent")


def test_nan_gets_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path, np.full((3, 2, 2), np.nan, np.float32), ["a", "b", "c"])
    with pytest.raises(DataError, match="NaN"):
        open_latents(folder).read(0)
    with pytest.raises(UserError, match="NaN"):
        standardize(Points(torch.full((3, 2), torch.nan)), "full")


def test_latents_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, np.zeros((3, 2, 2), np.float32), ["a", "b", "c"])
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"latent_shape": [2]', '"latent_shape": [4]'))
    with pytest.raises(DataError, match="another shape"):
        open_latents(folder).read(0)


def test_images_are_no_latents_and_latents_no_images(recipe: Recipe, digits: Path) -> None:
    with pytest.raises(DataError, match="holds no latents"):
        open_latents(digits / "train")
    folder = latents_of(opened(recipe), "val").folder
    with pytest.raises(DataError, match="holds latents"):
        open_reader(str(folder), recipe.data)


def test_collapse_is_recognised() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 0.01, 0.5])
    spread = spread_of(Points(mean, torch.full_like(mean, 0.2)))
    assert spread.collapsed.tolist() == [False, True, False]
    np.testing.assert_allclose(spread.between, mean.var(0, correction=0), rtol=1e-4)
    refuse_unfit(spread, 500, 500)
    with pytest.raises(UserError, match="lower --components"):
        refuse_unfit(spread, 501, 500)
    with pytest.raises(UserError, match="collapsed"):
        refuse_unfit(spread_of(Points(mean * 1e-3, torch.ones_like(mean))), 3, 500)
    wide = Spread(torch.ones(4096).double(), torch.ones(4096).double())
    with pytest.raises(UserError, match="--covariance diag"):
        refuse_unfit(wide, 20, 500)
    for components, gib in ((1, 6.2), (20, 29.2)):
        with pytest.raises(UserError, match=f"with full covariances of 4096 latents takes {gib} GiB"):
            refuse_unfit(wide, components, 5000)
    refuse_unfit(wide, 20, 500, "diag")
    narrow = Spread(torch.ones(64).double(), torch.ones(64).double())
    for kind in ("full", "tied"):
        with pytest.raises(UserError, match=f"57 draws of 64 latents determine no {kind} covariance"):
            refuse_unfit(narrow, 1, 57, kind, draws=57)
        refuse_unfit(narrow, 1, 57, kind)
    refuse_unfit(narrow, 1, 57, "diag", draws=57)
    with pytest.raises(UserError, match="constant"):
        refuse_unfit(Spread(torch.zeros(3).double(), torch.zeros(3).double()), 3, 500)


def test_the_spread_of_draws_is_that_of_their_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 0.0, 0.3])
    draws = mean[:, None] + 0.5 * torch.randn(4000, 4, 3, generator=generator)
    exact = spread_of(Points(mean, torch.full_like(mean, 0.25)))
    found = spread_of(Points(draws.flatten(0, 1)), 4)
    torch.testing.assert_close(found.within, exact.within, rtol=0.03, atol=0)
    torch.testing.assert_close(found.between, exact.between, rtol=0.05, atol=0.005)
    assert found.collapsed.tolist() == exact.collapsed.tolist() == [False, True, False]
    many = torch.randn(200, 4000, 2, 1, generator=generator)
    by_chance = torch.tensor([float(spread_of(Points(one.flatten(0, 1)), 2).between) for one in many])
    raw = many.mean(2).var(1, correction=0) - many.var(2).mean(1) / 2
    assert float(raw.std()) == pytest.approx(spread_of(Points(many[0].flatten(0, 1)), 2).error, rel=0.15)
    assert (by_chance >= 0).all()


def test_held_out_density_or_bic_chooses() -> None:
    one = Candidate(None, 3, True, 0, train_nats=-3.0, val_nats=-4.0, bic=10.0)  # type: ignore[arg-type]
    two = one._replace(val_nats=-3.5, bic=20.0)
    assert choose([one, two], "held-out") is two
    assert choose([one, two], "bic") is one


def test_shards_are_read_anew_when_they_do_not_fit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = latents_of(opened(recipe), "train")
    held = load(shards, Drawing(0, 0))
    monkeypatch.setattr("vaescale.aggregate.latents.HELD_BYTES", 1000)
    streamed = load(shards, Drawing(0, 0))
    assert isinstance(held, Points)
    assert isinstance(streamed, ShardLatents)
    for place in (0, 1):
        whole = torch.cat([part[place] for part in streamed.parts()])
        assert torch.equal(whole, next(held.parts())[place])
    wanted = torch.tensor([0, 499, 500, 1436])
    assert torch.equal(streamed.rows(wanted), held.rows(wanted))
    assert torch.equal(streamed.variances(wanted), held.variances(wanted))
    assert information(streamed, seed=0, queries=50) == pytest.approx(information(held, seed=0, queries=50))
    for one, other in zip(use_of(streamed), use_of(held), strict=True):
        torch.testing.assert_close(one, other)


def test_a_shard_is_hashed_once_until_its_file_changes(tmp_path: Path, monkeypatch) -> None:
    moments = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    shards = open_latents(written(tmp_path, moments, ["a", "b", "c"]))
    path = tmp_path / "shard-000000.tar"
    os.utime(path, ns=(0, 0))  # not just written
    hashed: list[int] = []
    real = hashlib.sha256

    def sha256(content: bytes | memoryview = b""):
        hashed.append(len(content))
        return real(content)

    monkeypatch.setattr(latent_shards.hashlib, "sha256", sha256)
    streamed = ShardLatents(shards, Drawing(0, 0))
    passes = [torch.cat([mean for mean, _ in streamed.parts()]) for _ in range(3)]
    assert torch.equal(passes[0], passes[2])
    assert hashed.count(path.stat().st_size) == 1
    content = bytearray(path.read_bytes())
    content[content.index(moments[1].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="not what was indexed"):
        list(streamed.parts())
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match="not what was indexed"):
        list(streamed.parts())
    assert hashed.count(path.stat().st_size) == 3


def test_a_shard_that_was_just_written_is_hashed_again(tmp_path: Path) -> None:
    """Its time may be the same after a second write."""
    shards = open_latents(written(tmp_path, np.zeros((3, 2, 2), np.float32), ["a", "b", "c"]))
    shards.read(0)
    path = tmp_path / "shard-000000.tar"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="not what was indexed"):
        shards.read(0)


def test_the_index_leaves_what_others_are_writing(tmp_path: Path) -> None:
    with latent_shards.replacing(tmp_path / "shard-000001.tar") as temporary:
        temporary.write_bytes(b"of another thread")
        (tmp_path / "shard-000002.tar").write_bytes(b"of an earlier set")
        written(tmp_path, np.zeros((3, 2, 2), np.float32), ["a", "b", "c"])
        assert temporary.exists()
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
