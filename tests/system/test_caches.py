"""Cache folders for users without a home folder, and the settings of the others."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

from tests.nameless import UID, run_nameless
from vaescale.errors import UserError
from vaescale.system.caches import cache_home, missing_settings, provide_caches

CODE = """
import json
from vaescale.system.caches import missing_settings
import os, sys
print(json.dumps(missing_settings(os.environ)))
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this process, and a user with a name."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("USER", "ada")
    return folder


def test_a_user_with_a_home_keeps_everything(temporary: Path, tmp_path: Path) -> None:
    assert missing_settings({"HOME": str(tmp_path)}) == {}
    assert missing_settings({"HOME": str(tmp_path), "XDG_CACHE_HOME": "/nonexistent"}) == {}
    assert list(temporary.iterdir()) == []


def test_without_a_home_everything_is_in_one_private_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    folder = temporary / f"vaescale-{os.getuid()}"
    assert cache_home() == folder / ".cache"
    monkeypatch.setattr(os, "environ", dict(os.environ))
    provide_caches()
    assert Path.home() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    provide_caches()  # as a process that this one starts
    assert capsys.readouterr().err == (
        f"this user has no home folder: caches are kept in {folder}; set HOME or XDG_CACHE_HOME to a folder that you can "
        "write to keep them elsewhere\n"
    )


def test_a_cache_folder_of_the_user_holds_it(temporary: Path, tmp_path: Path) -> None:
    added = missing_settings({"HOME": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert added == {"HOME": str(tmp_path / "cache/vaescale/home")}
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("fault", ["open to others", "a link"])
def test_a_folder_that_others_can_write_is_refused(temporary: Path, fault: str) -> None:
    """Libraries run code from their caches."""
    folder = temporary / f"vaescale-{os.getuid()}"
    if fault == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(temporary / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(UserError, match=r"vaescale-\d+ is not private to this user; remove it, or set HOME"):
        missing_settings({"HOME": "/nonexistent"})


def test_no_temporary_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(UserError, match=r"no folder for caches can be made \(No such file.*\); set HOME or"):
        missing_settings({"HOME": "/nonexistent"})


def test_a_home_that_cannot_be_written_stays_home(tmp_path: Path) -> None:
    """Files of the user may be there, such as ~/.netrc."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    (home / ".config" / "matplotlib").mkdir(parents=True)
    temporary.mkdir()
    home.chmod(0o555)
    done = run_nameless(CODE, tmp_path, HOME=str(home), TMPDIR=str(temporary))
    home.chmod(0o755)
    assert done.returncode == 0, done.stderr
    folder = temporary / f"vaescale-{UID}"
    assert json.loads(done.stdout) == {
        "USER": f"uid-{UID}",
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "TRITON_HOME": str(folder),
    }
