"""Checkpoints: whole or absent, verified, and never fewer sound ones than before."""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch

from vaescale.errors import UserError
from vaescale.runs import checkpoint
from vaescale.runs.checkpoint import MANIFEST, Keep, newest, refuse_unfit, shapes_of, verify, write
from vaescale.training.writer import Writer


def save(folder: Path, step: int, *, keep: int = 2, value: float | None = None) -> checkpoint.Checkpoint:
    weights = {"w": torch.full((3,), float(step) if value is None else value), "n": torch.tensor(7)}
    return write(folder, step, {"model": weights, "optimizer": {}}, {"recipe_hash": "abc"}, keep=Keep(keep))


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
    write(tmp_path, 1, {"model": tensors, "optimizer": {}}, {}, keep=Keep(1))
    for name, value in newest(tmp_path).tensors("model").items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]
    assert newest(tmp_path).step == 10


def test_some_are_kept_for_ever(tmp_path: Path) -> None:
    losses: dict[int, float] = {}

    def save_all(keep: Keep, *steps: int) -> list[int]:
        for step in steps:
            weights = {"model": {"w": torch.zeros(1)}, "optimizer": {}}
            write(tmp_path, step, weights, {}, keep=keep._replace(measured=losses))
        return sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir())

    losses |= {10: 3.0, 20: 1.0, 25: 2.0, 30: 4.0, 35: 5.0}
    assert save_all(Keep(last=1, every=10), 10, 20, 25, 30, 35) == [10, 20, 30, 35]
    losses |= {37: math.nan}
    assert save_all(Keep(last=2), 37) == [20, 35, 37]
    assert save_all(Keep(last=1), 40) == [20, 40]
    losses |= {40: 0.5}
    checkpoint.delete_surplus(tmp_path, 40, Keep(last=1, measured=losses))
    assert save_all(Keep(last=1), 50) == [40, 50]


def test_writing_goes_on_beside_and_its_faults_come_back(tmp_path: Path, monkeypatch) -> None:
    weights = {"model": {"w": torch.ones(3)}, "optimizer": {}}
    written, may_go_on = [], threading.Event()
    real = checkpoint.write

    def slow(*arguments: object, **options: object) -> None:
        may_go_on.wait(10)
        real(*arguments, **options)
        written.append(arguments[1])

    monkeypatch.setattr(checkpoint, "write", slow)
    with Writer(tmp_path) as writer:
        writer.save(1, weights, {}, keep=Keep(2))
        assert written == []
        may_go_on.set()
        writer.save(2, weights, {}, keep=Keep(2))
        assert written[0] == 1
        writer.wait()
        assert written == [1, 2]

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "write", full)
        writer.save(3, weights, {}, keep=Keep(2))
        with pytest.raises(OSError, match="No space"):
            writer.save(4, weights, {}, keep=Keep(2))

        def odd(*_: object, **__: object) -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(checkpoint, "write", odd)
        writer.save(3, weights, {}, keep=Keep(2))
        with pytest.raises(MemoryError, match="no more"):
            writer.wait()
    assert newest(tmp_path).step == 2


def test_too_little_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    weights = {"model": {"w": torch.ones(3)}, "optimizer": {}}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 100))
    with (
        Writer(tmp_path / "new") as writer,
        pytest.raises(OSError, match=r"a checkpoint takes 0.1 MiB and 0.0 are free"),
    ):
        writer.save(1, weights, {}, keep=Keep(2))
    assert not (tmp_path / "new").exists()


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
    assert "skipping checkpoint" in capsys.readouterr().err


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
    for name in ("../../secret", "/etc/passwd", "weights.pt", "data.pkl"):
        manifest["files"][name] = {"bytes": 1, "sha256": "0"}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        assert f"names {name!r}" in verify(folder)
        del manifest["files"][name]


def test_links_and_huge_files_are_no_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 1).folder
    weights = (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(weights)
    assert verify(folder) == "model.safetensors is not a regular file"
    (folder / "model.safetensors").unlink()
    weights.rename(folder / "model.safetensors")
    assert verify(folder) is None
    (tmp_path / "step-000000009").symlink_to(folder)
    assert newest(tmp_path).step == 1, "a linked folder is not even looked at"
    (folder / MANIFEST).write_bytes(b"[" * (2 << 20))
    assert "at most" in verify(folder)
    (folder / MANIFEST).write_bytes(b"[" * 100_000)
    assert "RecursionError" in verify(folder)


def sealed(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint with a manifest that agrees: whoever can write there can do this too."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer)
    return buffer.getvalue()


FOREIGN = {
    "a pickle": (pickle.dumps([0.0, 0.0, 0.0]), "safetensors"),
    "torch.save": (saved_by_torch, "safetensors"),
    "a huge header": (struct.pack("<Q", 1 << 40) + b"{}", "header"),
    "a header past the end": (struct.pack("<Q", 5000) + b"{}", "header"),
    "offsets past the end": (
        lambda: header({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 1 << 40]}}),
        "safetensors",
    ),
    "another shape": (
        lambda: header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        "has w as",
    ),
    "another type": (
        lambda: header({"w": {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]}}, bytes(12)),
        "has w as",
    ),
    "a name besides": (
        lambda: header(
            {
                "v": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
                "w": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]},
            },
            bytes(24),
        ),
        "has v, which the model does not have",
    ),
}


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    words = json.dumps(entries).encode()
    return struct.pack("<Q", len(words)) + words + data


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_weights_are_refused_and_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content, words = FOREIGN[kind]
    content = content() if callable(content) else content
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a checkpoint's file is unpickled"))
    found = save(tmp_path, 1)
    sealed(found.folder, "model.safetensors", content)
    assert verify(found.folder) is None, "its manifest agrees"
    with pytest.raises(UserError, match=words):
        refuse_unfit(found, {"model": shapes_of({"w": torch.zeros(3)})})


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


def test_weights_of_another_network_are_one_sentence(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    found = write(tmp_path, 1, {"model": model.state_dict(), "optimizer": {}}, {}, keep=Keep(1))
    checkpoint.load_weights(model, found, "model")
    for other in (torch.nn.Linear(4, 2), torch.nn.Linear(3, 2, bias=False)):
        with pytest.raises(UserError, match=r"does not fit the recipe's model.*(weight|bias)") as caught:
            checkpoint.load_weights(other, found, "model")
        assert "\n" not in str(caught.value)


def test_what_cannot_be_read_now_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rights, or too many open files: the newest may be sound, and training from the one before would delete it."""
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "_fault_of", refuse)
    with pytest.raises(PermissionError):
        newest(tmp_path)


def test_what_cannot_be_deleted_does_not_spoil_the_save(tmp_path: Path, monkeypatch, capsys) -> None:
    save(tmp_path, 1, keep=1)

    def busy(*_: object, **__: object) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _, **options: None if options else busy())
        save(tmp_path, 2, keep=1)
    assert "could not be deleted" in capsys.readouterr().err
    assert newest(tmp_path).step == 2
    save(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


FILES = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "guard.safetensors",
    "state.json",
    MANIFEST,
)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path, name: str) -> None:
    """Of each file, one bit in each byte, and each length."""
    tensors = {part: {"w": torch.arange(3.0)} for part in ("model", "ema", "optimizer", "guard")}
    path = write(tmp_path, 1, tensors, {}, keep=Keep(1)).folder / name
    content = path.read_bytes()
    sound = json.loads((path.parent / MANIFEST).read_text())["files"]
    unnoticed = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        for written in (bytes(damaged), content[:place]):
            path.write_bytes(written)
            if verify(path.parent) is None:
                unnoticed.append(written)
    if name != MANIFEST:
        assert not unnoticed
    for written in unnoticed:  # what says nothing of the files, as its own version
        assert json.loads(written)["files"] == sound
    path.write_bytes(content)
    assert verify(path.parent) is None


class Name(str):
    """A name that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Name.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_reading_all_tensors_compares_each_name_once(tmp_path: Path, monkeypatch) -> None:
    number = 200

    class File:
        def keys(self) -> list[str]:
            return [Name(f"layer{index}") for index in range(number)]

        def get_tensor(self, name: str) -> torch.Tensor:
            return torch.tensor(int(name.removeprefix("layer")))

    monkeypatch.setattr(checkpoint, "safe_open", lambda *_, **__: File())
    tensors = checkpoint.Tensors(tmp_path / "model.safetensors")
    assert len(tensors) == number
    Name.comparisons = 0
    assert [int(tensors[f"layer{index}"]) for index in range(number)] == list(range(number))
    assert Name.comparisons <= 2 * number
    with pytest.raises(KeyError):
        tensors["layer"]
