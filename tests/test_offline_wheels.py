"""What docker/offline_wheels.py collects for a machine without a network; nothing is downloaded here."""

import importlib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# An index: each wheel's requirements, by name and version.
INDEX = {
    ("a", "1.0"): ('b>=2; python_version < "3.13"', 'c; sys_platform == "win32"', 'd[fast]; extra == "more"'),
    ("a", "2.0"): (),
    ("b", "2.5"): ("numpy>=2", "torch", "A"),
    ("d", "1.0"): ("e", 'f==1.0; extra == "fast"', 'g; extra == "slow"'),
    ("e", "1.0"): (),
    ("f", "1.0"): (),
    ("h", "1.0"): ("a>=2",),
}


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    return importlib.import_module("offline_wheels")


def missing(wheels: ModuleType, *wanted: str, have: str = "", pins: str = "a==1.0 d==1.0") -> dict[str, str]:
    """The versions that the walk takes from INDEX, on Python 3.12."""

    def fetch(requirements: dict[str, tuple[str, ...]]) -> dict[str, object]:
        fetched = {}
        for name, (line, *_) in requirements.items():
            versions = [Version(version) for known, version in INDEX if known == name]
            chosen = max(v for v in versions if wheels.Requirement(line).specifier.contains(v))
            fetched[name] = wheels.Wheel(chosen, INDEX[name, str(chosen)])
        return fetched

    taken = wheels.missing(
        wanted,
        have=wheels.versions_in(have.split()),
        pins=wheels.versions_in(pins.split()),
        environment=wheels.environment_of("3.12"),
        fetch=fetch,
    )
    return {name: str(version) for name, version in taken.items()}


NODE = "torch==2.11.0+cu130 numpy==2.5.2"


def test_the_walk_takes_pins_and_what_they_need_and_leaves_what_is_there(wheels: ModuleType) -> None:
    assert missing(wheels, "A>=1", have=NODE) == {"a": "1.0", "b": "2.5"}
    assert missing(wheels, "A>=1", have=f"{NODE} B==2.0") == {"a": "1.0"}
    assert missing(wheels, "A>=1", have=f"{NODE} b==1.0") == {"a": "1.0", "b": "2.5"}, "1.0 is too old there"
    assert missing(wheels, "a>=1.5", have=NODE) == {"a": "2.0"}, "the pin does not fit"
    assert missing(wheels, "a>=1.5", "a>=1", have=NODE) == {"a": "2.0"}, "it does not fit both"


def test_extras_are_followed_also_of_what_is_there(wheels: ModuleType) -> None:
    assert missing(wheels, "d") == {"d": "1.0", "e": "1.0"}
    assert missing(wheels, "a[more]", have=NODE) == {
        "a": "1.0",
        "b": "2.5",
        "d": "1.0",
        "e": "1.0",
        "f": "1.0",
    }
    assert missing(wheels, "d[fast]", have="d==1.0") == {"f": "1.0"}


def test_what_does_not_fit_is_refused(wheels: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"torch>=2.11 is needed, and the other machine has torch 2\.9"):
        missing(wheels, "torch>=2.11", have="torch==2.9")
    with pytest.raises(SystemExit, match=r"a>=2 is needed, and 1.0 was taken"):
        missing(wheels, "a", "h", have=NODE)
    for version in ("python3", "3", "3.10", "2.7"):
        with pytest.raises(SystemExit, match=r"must be the other machine's version"):
            wheels.environment_of(version)


def test_lists_of_packages_are_read(wheels: ModuleType) -> None:
    lines = [
        "# pins",
        "NumPy==2.5.2",
        "my_tool @ file:///tmp/tool",
        "-e git+https://host/it",
        "",
        "torch==2.11.0+cu130",
    ]
    there = wheels.versions_in(lines)
    assert there == {"numpy": Version("2.5.2"), "my-tool": None, "torch": Version("2.11.0+cu130")}
    pins = wheels.versions_in((ROOT / "constraints.txt").read_text().splitlines())
    assert len(pins) > 100
    assert None not in pins.values()


def test_a_pin_without_a_wheel_gives_way_to_another_version_and_then_to_a_build(
    wheels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = wheels.Downloads(tmp_path, "3.12")
    tried: list[list[str]] = []
    there = {"a==1.0", "b>=2"}

    def download(lines: list[str]) -> bool:
        tried.append(lines)
        return there.issuperset(lines)

    monkeypatch.setattr(downloads, "_download", download)
    monkeypatch.setattr(downloads, "_build", lambda line: tried.append(["build", line]))
    monkeypatch.setattr(downloads, "_read", str)
    wanted = {"a": ("a==1.0", "a"), "b": ("b==2.0", "b>=2"), "c": ("c==3.0", "c>=3")}
    assert downloads(wanted) == {"a": "a", "b": "b", "c": "c"}
    singles = ["a==1.0", "b==2.0", "b>=2", "c==3.0", "c>=3"]
    assert tried == [["a==1.0", "b==2.0", "c==3.0"], *([line] for line in singles), ["build", "c==3.0"]]


def test_a_wheel_that_only_runs_here_is_refused(wheels: ModuleType, tmp_path: Path) -> None:
    downloads = wheels.Downloads(tmp_path, "3.12")
    for tags, fits in (
        ("py3-none-any", True),
        ("cp312-cp312-macosx_11_0_arm64", False),
        ("cp311-cp311-manylinux_2_28_x86_64", False),
        ("cp310-abi3-manylinux_2_17_x86_64", True),
    ):
        path = tmp_path / f"a-1.0-{tags}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "a-1.0.dist-info/METADATA", "Name: a\nRequires-Dist: b>=2\n\nRequires-Dist: text\n"
            )
        downloads.paths["a"] = path
        if fits:
            assert downloads._read("a") == wheels.Wheel(Version("1.0"), ("b>=2",))
        else:
            with pytest.raises(SystemExit, match=r"does not run on Python 3\.12"):
                downloads._read("a")
