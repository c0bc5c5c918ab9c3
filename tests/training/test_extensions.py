"""The build of DeepSpeed's operator: one at a time, and nothing that a killed one has left stops the next."""

import os
import time
from pathlib import Path

import pytest

from vaescale.errors import UserError
from vaescale.system.files import exclusive
from vaescale.training import extensions
from vaescale.training.extensions import BUILDING, build_extensions, build_folder, building, is_built


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(extensions, "POLL_SECONDS", 0.01)


def test_a_killed_build_of_ours_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / BUILDING).touch()
    with building(tmp_path, patience=0.1):
        assert not (tmp_path / "lock").exists()
        assert (tmp_path / BUILDING).exists()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_program_is_waited_for_and_named(tmp_path: Path, capsys) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 100, time.time() - 100))
    with (
        pytest.raises(UserError, match=r"lock \(10[01] s old\) .* killed: delete the file"),
        building(tmp_path, patience=0.1),
    ):
        pass
    assert capsys.readouterr().err.count("waiting up to 0 s; if none does, delete the file") == 1
    assert lock.exists()


def test_two_processes_do_not_build_at_once(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "vaescale.lock"),
        pytest.raises(UserError, match=r"has been built in .* for 0 s"),
        building(tmp_path, patience=0.05),
    ):
        pass


def test_an_operator_that_was_installed_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's root may be read-only."""
    info = pytest.importorskip("deepspeed.git_version_info", reason="deepspeed is not installed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(info, "installed_ops", dict.fromkeys(info.installed_ops, True))
    assert build_extensions(patience=0.1) == ["deepspeed_shm_comm"]
    assert not (tmp_path / "extensions").exists()


def test_the_folder_is_the_one_that_torch_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    for root in (None, str(tmp_path)):
        if root:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", root)
        else:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
            monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path / "default"))
        assert build_folder("some_operator") == Path(
            cpp_extension._get_build_directory("some_operator", verbose=False)
        )
    folder = build_folder("some_operator")
    assert not is_built(folder, "some_operator")
    (folder / "some_operator.so").touch()
    assert is_built(folder, "some_operator")
    (folder / "lock").touch()
    assert not is_built(folder, "some_operator")
