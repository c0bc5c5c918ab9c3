"""Files are whole or absent, and one process or thread at a time holds a lock file."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vaescale.system import files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        files.write_whole(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_whole(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_threads_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written under a temporary name before either renames."""
    path, both = tmp_path / "file", threading.Barrier(2, timeout=20)
    real = files.write_synced

    def write_synced(temporary: Path, content: bytes) -> None:
        real(temporary, content)
        both.wait()

    monkeypatch.setattr(files, "write_synced", write_synced)
    contents = [b"a" * 100_000, b"b" * 100_000]
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(files.write_whole, path, content) for content in contents]:
            future.result()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_living_writers_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = files._host_hash()
    old, new = time.time() - 2 * files.ABANDONED_SECONDS, time.time()
    ages = {
        f".a.tmp-{host}-{os.getpid()}-00": old,
        f".b.tmp-{host}-{ended.pid}-00": new,
        ".c.tmp-00000000-1-00": new,
        ".d.tmp-00000000-1-00": old,
        f".e.tmp-{ended.pid}": new,  # as earlier versions called them, without the host
        f".f.tmp-{ended.pid}": old,
        "g.tar": old,
    }
    for name, seconds in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    files.remove_abandoned(tmp_path)
    assert {path.name[:2] for path in tmp_path.iterdir()} == {".a", ".c", ".e", "g."}


def test_a_line_after_one_that_was_cut_short_stands_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    files.append_line(path, "first")
    with path.open("a") as file:
        file.write("cut sho")
    for line in ("second", "third"):
        files.append_line(path, line)
    assert path.read_text() == "first\ncut sho\nsecond\nthird\n"


APPEND = """
import sys
from pathlib import Path
from vaescale.system.files import append_line
for number in range(300):
    append_line(Path(sys.argv[1]), sys.argv[2] * 20_000)
"""


def test_lines_of_two_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), letter]) for letter in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    lines = path.read_text().split()
    assert sorted(lines) == sorted(["a" * 20_000] * 300 + ["b" * 20_000] * 300)


def test_threads_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "new" / "lock", 0, 0

    def work() -> None:
        nonlocal inside, most
        with files.exclusive(path, wait_seconds=30):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result()
    assert most == 1
    assert not path.exists()


HOLD = """
import sys, time
from pathlib import Path
from vaescale.system.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_s_lock_is_waited_for_and_ends_with_it(tmp_path: Path, capsys) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(files.LockHeldError, match=f"pid {holder.pid}"), files.exclusive(path):
            pass
        with (
            pytest.raises(files.LockHeldError),
            files.exclusive(path, wait_seconds=1.5, waiting="waiting for the other"),
        ):
            pass
        assert capsys.readouterr().err.count("waiting for the other") == 1
        holder.kill()
        with files.exclusive(path, wait_seconds=30):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_is_free_though_a_forked_process_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    file = files.acquire_lock(path)
    program = [sys.executable, "-c", "input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, pass_fds=[file.fileno()]) as child:
        os.link(path, tmp_path / "same")
        files.release_lock(path, file)
        try:
            files.release_lock(tmp_path / "same", files.acquire_lock(tmp_path / "same"))
        finally:
            child.communicate(b"\n")


def test_a_file_system_without_locks_is_told_once(tmp_path: Path, monkeypatch, capsys) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    path = tmp_path / "lock"
    for _ in range(2):
        with (
            files.exclusive(path),
            pytest.raises(files.LockHeldError, match="another thread"),
            files.exclusive(path),
        ):
            pass
    assert capsys.readouterr().err.count("cannot be locked (No locks available)") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_lock_file_that_cannot_be_deleted_does_not_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def unlink(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "lock"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        if not has_locks:
            patched.setattr(files.fcntl, "flock", flock)
        with pytest.raises(PermissionError), files.exclusive(path):
            pass
    with files.exclusive(path):
        pass
    assert not path.exists()


def test_json_has_null_for_what_is_no_number() -> None:
    content = {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, None, "NaN")}], "d": 2}
    expected = {"a": None, "b": [None, 1.5, {"c": [None, None, "NaN"]}], "d": 2}
    assert json.loads(files.strict_json(content, indent=1)) == expected
    assert files.strict_json({"a": 1.5}) == '{"a": 1.5}'
