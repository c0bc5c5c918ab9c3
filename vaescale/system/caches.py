"""Cache folders for a user without a home folder or a name, as containers and batch systems may start a job.

MLflow asks for the home folder when it is imported, torch builds extensions below `~/.cache` (in a folder called `~` where
there is no home), and matplotlib wants a folder to write in. One private folder serves all of them.
"""

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vaescale.errors import UserError
from vaescale.system.console import say

REMEDY = "set HOME or XDG_CACHE_HOME to a folder that you can write"


def provide_caches(*, shown: bool = True) -> None:
    """Set variables that name a private cache folder where libraries would find none that can be written.

    Settings of the user are kept, and the processes that this one starts inherit the variables. shown: write one line to
    stderr. Raises UserError where no private folder can be made.
    """
    home, added = _home(os.environ), missing_settings(os.environ)
    os.environ.update(added)
    if shown and (folder := added.get("HOME") or added.get("XDG_CACHE_HOME")):
        fault = (
            f"the home folder {home} cannot be written"
            if _is_usable(home)
            else "this user has no home folder"
        )
        say(f"{fault}: caches are kept in {folder}; {REMEDY} to keep them elsewhere")


def cache_home() -> Path:
    """The folder below which programs keep their caches: $XDG_CACHE_HOME or ~/.cache, or a private one."""
    environment = {**os.environ, **missing_settings(os.environ)}
    return _cache_home(environment, _home(environment))


def missing_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to an environment, so that libraries find a user name and folders that can be written.

    Makes the private folder when there is a folder to replace. Raises UserError where it cannot be made.
    """
    home = _home(environment)
    added = {} if _has_name() else {"USER": f"uid-{os.getuid()}"}
    replaced = []
    if not _is_usable(home):
        replaced = ["HOME"]  # all others follow from it
    else:
        if "XDG_CACHE_HOME" not in environment and not _can_write(_cache_home(environment, home)):
            replaced.append("XDG_CACHE_HOME")
        if not _can_write(home) and "TRITON_HOME" not in environment:
            replaced.append("TRITON_HOME")
        matplotlib = environment.get("MPLCONFIGDIR") or environment.get("XDG_CONFIG_HOME")
        if not matplotlib and not _can_write(home) and not os.path.exists(home / ".config" / "matplotlib"):
            replaced.append("MPLCONFIGDIR")
    if not replaced:
        return added
    folder = _private_folder(environment)
    folders = {"XDG_CACHE_HOME": folder / ".cache", "MPLCONFIGDIR": folder / ".config" / "matplotlib"}
    return added | {name: str(folders.get(name, folder)) for name in replaced}


def _home(environment: Mapping[str, str]) -> Path:
    """The home folder that Python's expanduser finds: HOME, the user's entry in the password file, or the text `~`."""
    return Path(environment.get("HOME") or os.path.expanduser("~"))


def _cache_home(environment: Mapping[str, str], home: Path) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or home / ".cache")


def _is_usable(home: Path) -> bool:
    """Whether libraries can look for files in a home folder."""
    return home.is_absolute() and os.path.isdir(home) and os.access(home, os.R_OK | os.X_OK)


def _can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which may have to be made itself."""
    if not folder.is_absolute():
        return False
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def _has_name() -> bool:
    try:
        return bool(getpass.getuser())
    except (KeyError, OSError, ImportError):  # of Python 3.11, of 3.13, and without a password file
        return False


def _private_folder(environment: Mapping[str, str]) -> Path:
    """Make the private folder: below XDG_CACHE_HOME where that can be written, else one per user in the temporary folder."""
    given = environment.get("XDG_CACHE_HOME")
    if given and _can_write(Path(given)):
        folder = Path(given) / "vaescale" / "home"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    try:
        folder = Path(tempfile.gettempdir()) / f"vaescale-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(f"no folder for caches can be made ({error.strerror}); {REMEDY}") from error
    # Anyone can make a folder of this name in the temporary folder, and libraries run code from their caches.
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise UserError(f"the cache folder {folder} is not private to this user; remove it, or {REMEDY}")
    return folder
