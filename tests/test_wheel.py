"""The wheel holds the recipes and the verbs, and works where the sources are not."""

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vaescale import __version__
from vaescale.cli import VERBS

ROOT = Path(__file__).parents[1]
BUILT = ("vaescale", "tools", "recipes", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from vaescale.cli import main
from vaescale.system.shipped import shipped_folder
assert str(shipped_folder()).startswith(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, where setuptools writes its folders."""
    if any(importlib.util.find_spec(name) is None for name in ("setuptools", "wheel")):
        pytest.skip("setuptools or wheel is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(source, folder / name)
    build = "import sys; from setuptools.build_meta import build_wheel; sys.stdout.write(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_recipes_and_verbs(wheel: Path) -> None:
    assert wheel.name == f"vaescale-{__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "recipes").rglob("*"):
        if path.suffix in (".yaml", ".md", ".sbatch", ".sh"):
            assert f"vaescale/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in held
    for path in (ROOT / "vaescale").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in held
    for verb in VERBS:
        assert f"vaescale/tools/{verb.replace('-', '_')}.py" in held
    assert {"vaescale/py.typed", "vaescale/networks/normalization.cpp", "vaescale/system/vectors.h"} <= held
    assert {f"vaescale/figures/browser/{name}" for name in ("page.css", "table.js", "charts.js")} <= held
    assert not [
        name for name in held if name.startswith(("tests", "tools", "recipes", "vaescale/tools/bench"))
    ]


def test_what_is_unpacked_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    words = ["sweep", "vaescale:digits/optimal", "seed=0,1", "--dry-run", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "site"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["variants"]) == 2


def test_a_folder_that_holds_a_clone_is_no_package(tmp_path: Path) -> None:
    """Python would take the clone's own folder for a package without __init__.py before it asks what an editable install tells."""
    (tmp_path / "vaescale" / "vaescale").mkdir(parents=True)
    words = [sys.executable, "-c", "import vaescale, vaescale.tools; print(vaescale.__file__)"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "vaescale" / "__init__.py"
