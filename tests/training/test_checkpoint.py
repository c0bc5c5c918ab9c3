"""Checkpoints: whole or absent, verified, and never fewer sound ones than before."""

import json
import os
from pathlib import Path

import pytest
import torch

from vaescale.errors import UserError
from vaescale.training import checkpoint
from vaescale.training.checkpoint import MANIFEST, newest, verify, write


def save(folder: Path, step: int, *, keep: int = 2, value: float | None = None) -> checkpoint.Checkpoint:
    weights = {"w": torch.full((3,), float(step) if value is None else value), "n": torch.tensor(7)}
    return write(folder, step, {"model": weights, "optimizer": {}}, {"recipe_hash": "abc"}, keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 5
    tensors = found.tensors("model")
    assert tensors["w"].tolist() == [5, 5, 5]
    assert tensors["n"].item() == 7
    assert not found.has("ema")
    assert found.state() == {"step": 5, "recipe_hash": "abc"}
    assert sorted(path.name for path in found.folder.iterdir()) == [
        MANIFEST,
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_float64_and_bf16_survive(tmp_path: Path) -> None:
    tensors = {
        "a": torch.rand(3, dtype=torch.float64),
        "b": torch.rand(3).bfloat16(),
        "c": torch.rand(4, 4).T,
    }
    write(tmp_path, 1, {"model": tensors, "optimizer": {}}, {}, keep=1)
    for name, value in newest(tmp_path).tensors("model").items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]
    assert newest(tmp_path).step == 10


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    assert newest(tmp_path) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": lambda folder: flip(folder / "model.safetensors"),
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 20),
    "missing file": lambda folder: (folder / "model.safetensors").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "cut manifest": lambda folder: os.truncate(folder / MANIFEST, 10),
    "manifest is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "changed state": lambda folder: (folder / "state.json").write_text('{"step": 99}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, capsys, damage: str) -> None:
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2).folder)
    assert newest(tmp_path).step == 1
    assert "passing over checkpoint" in capsys.readouterr().err


def test_the_last_good_one_outlives_newer_damaged_ones(tmp_path: Path) -> None:
    save(tmp_path, 200)
    for step in (400, 600):
        flip(save(tmp_path, step, keep=3).folder / "model.safetensors")
    assert newest(tmp_path).step == 200
    save(tmp_path, 300)  # trained on from step 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000200", "step-000000300"]
    assert newest(tmp_path).step == 300


def test_when_none_is_sound_starting_over_is_a_decision(tmp_path: Path) -> None:
    flip(save(tmp_path, 1).folder / "model.safetensors")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        newest(tmp_path)


def test_a_renamed_or_emptied_one_does_not_verify(tmp_path: Path) -> None:
    folder = save(tmp_path, 2).folder
    renamed = folder.rename(tmp_path / "step-000000900")
    assert "holds step 2" in verify(renamed)
    (renamed / MANIFEST).write_text('{"files": {}}')
    assert "lacks model.safetensors" in verify(renamed)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, 1).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "outside" in verify(folder)


def test_an_unfinished_write_is_not_seen_and_is_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000000002.tmp-123").mkdir()
    assert newest(tmp_path).step == 1
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_failed_write_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, keep=1)
    assert newest(tmp_path).step == 1


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1, value=1.0)
    save(tmp_path, 1, value=2.0)
    assert newest(tmp_path).tensors("model")["w"].tolist() == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, kind) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        return model, kind(model.parameters(), lr=0.1)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(8, 3, generator=generator)).square().mean().backward()
            optimizer.step()

    straight, optimizer = fresh()
    steps(straight, optimizer, range(6))
    first, optimizer = fresh()
    steps(first, optimizer, range(3))
    groups = {"model": first.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer, first)}
    write(tmp_path, 3, groups, {}, keep=1)
    second, optimizer = fresh()
    found = newest(tmp_path)
    second.load_state_dict(found.tensors("model"))
    checkpoint.load_optimizer(optimizer, second, found.tensors("optimizer"))
    steps(second, optimizer, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_another_network_are_one_sentence(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    found = write(tmp_path, 1, {"model": model.state_dict(), "optimizer": {}}, {}, keep=1)
    checkpoint.load_weights(model, found, "model")
    for other in (torch.nn.Linear(4, 2), torch.nn.Linear(3, 2, bias=False)):
        with pytest.raises(UserError, match=r"does not fit the recipe's model.*(weight|bias)") as caught:
            checkpoint.load_weights(other, found, "model")
        assert "\n" not in str(caught.value)
