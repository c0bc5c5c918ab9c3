"""Collect the wheels that a machine without a network lacks: `make offline-wheels PYTHON=3.12 HAVE=freeze.txt`.

The other machine is Linux on x86_64; its Python need not be installed here. The walk over the requirements begins at setup.py,
leaves out what HAVE lists (`pip list --format=freeze` there), and takes the versions of constraints.txt where they have a wheel
for that Python. A source distribution without one is built here, which is refused where the result is not pure Python.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from email.parser import BytesParser
from pathlib import Path
from typing import NamedTuple

from requirements import constants

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import canonicalize_name, parse_wheel_filename
    from packaging.version import Version
except ModuleNotFoundError as error:
    raise SystemExit(f"offline_wheels.py: {error.name} is not installed: pip install packaging") from None

ROOT = Path(__file__).parents[1]
SOURCES = (
    "vaescale",
    "tools",
    "recipes",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)
GLIBC = 28  # glibc 2.28, of RHEL 8 and Debian 10: older systems do not run torch's wheels either
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)


class Wheel(NamedTuple):
    """What the walk reads of a wheel: its version and the lines of Requires-Dist."""

    version: Version
    requires: tuple[str, ...]


# From requirements such as {"numpy": ("numpy==2.4.6", "numpy>=2")}, the preferred one first, to their wheels, by name.
Fetch = Callable[[dict[str, tuple[str, ...]]], dict[str, Wheel]]


def environment_of(python: str) -> dict[str, str]:
    """The values of environment markers on CPython `python` (3.12 or 3.12.1), Linux and x86_64. Raises SystemExit."""
    try:
        release = Version(python).release
    except ValueError:
        release = ()
    if len(release) not in (2, 3) or release < (3, 11):
        raise SystemExit(
            f"PYTHON (={python}) must be the other machine's version, at least 3.11: PYTHON=3.12"
        )
    full = ".".join(map(str, (*release, 0)[:3]))
    return {
        "python_version": f"{release[0]}.{release[1]}",
        "python_full_version": full,
        "implementation_version": full,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }


def versions_in(lines: Iterable[str]) -> dict[str, Version | None]:
    """The packages of `pip list --format=freeze` or of constraints.txt; None for a version that is not told."""
    versions: dict[str, Version | None] = {}
    for line in lines:
        name, equals, version = line.partition("#")[0].partition(" @ ")[0].strip().partition("==")
        if name and not name.startswith("-"):
            versions[canonicalize_name(name)] = Version(version) if equals else None
    return versions


def missing(
    wanted: Iterable[str],
    *,
    have: dict[str, Version | None],
    pins: dict[str, Version | None],
    environment: dict[str, str],
    fetch: Fetch,
) -> dict[str, Version]:
    """What `wanted` needs beyond `have`, with the versions taken. Raises SystemExit where no set of versions fits.

    A package that is there in an unsuitable version is taken, too, but torch never is. What an installed package itself needs is
    taken to be there, except for its extras, such as fsspec[http].
    """
    taken: dict[str, Wheel] = {}
    seen: set[tuple[str, str]] = set()  # a name and one of its extras; "" for the package itself
    wave = [Requirement(line) for line in wanted]
    while wave:
        needed = [
            one for one in wave if one.marker is None or one.marker.evaluate({**environment, "extra": ""})
        ]
        together: dict[str, SpecifierSet] = {}
        lines: dict[str, tuple[str, ...]] = {}
        fresh: list[tuple[str, str]] = []
        for requirement in needed:
            name = canonicalize_name(requirement.name)
            there = name in have and _suits(have[name], requirement.specifier)
            if name == "torch" and not there:
                raise SystemExit(f"{requirement} is needed, and the other machine has torch {have.get(name)}")
            fresh += [(name, extra) for extra in ("", *requirement.extras) if not there or extra]
            allowed = together[name] = together.get(name, SpecifierSet()) & requirement.specifier
            version = have.get(name) if there else pins.get(name)
            fits = version is not None and _suits(version, allowed)
            lines[name] = (*((f"{name}=={version}",) if fits else ()), f"{name}{allowed}")
        fresh = [pair for pair in dict.fromkeys(fresh) if pair not in seen]
        seen.update(fresh)
        unread = {name: lines[name] for name, _ in fresh if name not in taken}
        wheels = taken | (fetch(unread) if unread else {})
        taken |= {name: wheels[name] for name, extra in fresh if not extra}
        for requirement in needed:
            wheel = taken.get(canonicalize_name(requirement.name))
            if wheel is not None and not _suits(wheel.version, requirement.specifier):
                raise SystemExit(
                    f"{requirement} is needed, and {wheel.version} was taken: constraints.txt must pin another"
                )
        wave = [line for name, extra in fresh for line in _requirements(wheels[name], extra, environment)]
    return {name: wheel.version for name, wheel in sorted(taken.items())}


def _suits(version: Version | None, specifier: SpecifierSet) -> bool:
    return version is None or specifier.contains(version, prereleases=True)


def _requirements(wheel: Wheel, extra: str, environment: dict[str, str]) -> list[Requirement]:
    """What a wheel needs in this environment; with an extra, what it needs for that extra. The markers are removed."""
    found = []
    for line in wheel.requires:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        plain = marker is None or marker.evaluate({**environment, "extra": ""})
        for_extra = marker is not None and not plain and marker.evaluate({**environment, "extra": extra})
        if for_extra if extra else plain:
            found.append(requirement)
    return found


class Downloads:
    """Wheels from pip's index in a folder: the `fetch` of `missing`."""

    def __init__(self, folder: Path, python: str) -> None:
        self.paths: dict[str, Path] = {}
        self._folder, self._python = folder, python
        release = Version(python).release[:2]
        compiled = cpython_tags(release, platforms=PLATFORMS)
        self._tags = {*compiled, *compatible_tags(release, f"cp{release[0]}{release[1]}", PLATFORMS)}

    def __call__(self, requirements: dict[str, tuple[str, ...]]) -> dict[str, Wheel]:
        """Download or build one wheel for each requirement. Raises SystemExit where there is none."""
        if not self._download([lines[0] for lines in requirements.values()]):  # all at once
            for lines in requirements.values():
                if not any(self._download([line]) for line in lines):
                    self._build(lines[0])
        return {name: self._read(name) for name in requirements}

    def _download(self, lines: list[str]) -> bool:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        options = ["--no-deps", "--only-binary", ":all:", "--implementation", "cp", *platforms]
        return self._pip("download", *options, "--python-version", self._python, *lines)

    def _build(self, line: str) -> None:
        sys.stderr.write(f"{line} has no wheel for Python {self._python}: building one\n")
        if not self._pip("wheel", "--no-deps", line, folder_option="--wheel-dir"):
            raise SystemExit(f"{line} has no wheel for Python {self._python}, and cannot be built here")

    def _pip(self, *words: str, folder_option: str = "--dest") -> bool:
        """Call pip with a folder of its own, and move the wheels from there. Returns whether it succeeded."""
        with tempfile.TemporaryDirectory(dir=self._folder) as fresh:
            command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
            done = subprocess.run(
                [*command, folder_option, fresh], capture_output=True, text=True, check=False
            )
            if done.returncode:
                return False
            for path in Path(fresh).glob("*.whl"):
                self.paths[parse_wheel_filename(path.name)[0]] = path.replace(self._folder / path.name)
        return True

    def _read(self, name: str) -> Wheel:
        path = self.paths[name]
        _, version, _, tags = parse_wheel_filename(path.name)
        if not tags & self._tags:
            raise SystemExit(
                f"{path.name} does not run on Python {self._python} of another machine, and no other was found"
            )
        with zipfile.ZipFile(path) as archive:
            (metadata,) = [
                one for one in archive.namelist() if one.count("/") == 1 and one.endswith("/METADATA")
            ]
            message = BytesParser().parsebytes(archive.read(metadata))
        return Wheel(version, tuple(message.get_all("Requires-Dist", ())))

    def build_project(self) -> None:
        """Build vaescale's wheel from a copy of the sources, beside which setuptools writes its folders."""
        with tempfile.TemporaryDirectory() as copy:
            for source in SOURCES:
                put = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                put(ROOT / source, Path(copy, source))
            if not self._pip("wheel", "--no-deps", copy, folder_option="--wheel-dir"):
                raise SystemExit("vaescale's wheel cannot be built here; try `pip wheel --no-deps .`")


def main() -> None:
    """Collect the wheels, write their list, print their sizes and the command that installs them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the wheels")
    parser.add_argument("--python", required=True, help="version of the other machine's Python, such as 3.12")
    parser.add_argument(
        "--have", type=Path, help="its `pip list --format=freeze`; default: torch and nothing else"
    )
    parser.add_argument("--extras", nargs="*", default=[], help="extras of setup.py, such as deepspeed")
    parser.add_argument(
        "--without", nargs="*", default=[], help="packages to leave out, such as mlflow datasets"
    )
    arguments = parser.parse_args()
    environment = environment_of(arguments.python)
    given = constants(ROOT / "setup.py")
    wanted = given["DEPENDENCIES"] + [line for extra in arguments.extras for line in given["EXTRAS"][extra]]
    left_out = {canonicalize_name(name) for name in arguments.without}
    have = versions_in(arguments.have.read_text().splitlines() if arguments.have else ["torch"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    downloads = Downloads(arguments.out, environment["python_version"])
    versions = missing(
        [line for line in wanted if canonicalize_name(Requirement(line).name) not in left_out],
        have=have,
        pins=versions_in((ROOT / "constraints.txt").read_text().splitlines()),
        environment=environment,
        fetch=downloads,
    )
    downloads.build_project()
    _show(arguments.out, [*versions, "vaescale"], downloads)


def _show(folder: Path, names: list[str], downloads: Downloads) -> None:
    for name in set(downloads.paths) - set(names):  # read for its extras only
        downloads.paths[name].unlink()
    paths = sorted((downloads.paths[name] for name in names), key=lambda path: -path.stat().st_size)
    pinned = [f"{name}=={parse_wheel_filename(downloads.paths[name].name)[1]}" for name in names]
    (folder / "requirements.txt").write_text("\n".join(pinned) + "\n")
    for path in paths:
        sys.stdout.write(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}\n")
    total = sum(path.stat().st_size for path in paths)
    place = shlex.quote(os.path.normpath(folder))
    sys.stdout.write(
        f"{total / 1e6:8.2f} MB in {len(paths)} wheels; copy {place} to the other machine and type\n"
        f"python -m pip install --no-index --no-deps --find-links {place} -r {place}/requirements.txt\n"
    )


if __name__ == "__main__":
    main()
