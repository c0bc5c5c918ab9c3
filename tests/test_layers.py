"""A module imports only from layers below its own, or leaf files of its own folder."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vaescale"
# From the top. Modules on one line do not know each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("session",),
    (
        "resuming",
        "summary",
        "measuring",
        "fitting",
        "judging",
        "comparing",
        "sweeping",
        "baselines",
        "serving",
        "sampling",
    ),
    ("tours",),
    ("run",),
    ("recipe",),
    ("training",),
    ("strategies",),
    ("aggregate",),
    ("evaluation", "figures", "mixtures"),
    ("objectives",),
    ("models",),
    ("networks", "likelihoods"),
    ("sigma", "posterior"),
    ("batches",),
    ("data",),
    ("comm", "noise", "schedules"),
    ("console", "config", "cores", "errors", "files", "pages", "pulse"),
    ("secrets",),
    ("__init__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Libraries that belong to some rooms alone.
KEPT = {
    "mlflow": ("training/tracking.py", "training/stores.py"),
    "accelerate": ("training/", "strategies/"),
    "deepspeed": ("training/", "strategies/"),
    "webdataset": ("data/",),
    "fsspec": ("data/",),
}


def imports(path: Path, *, only_types: bool = True) -> list[str]:
    """`vaescale.data.reader.Batch` for each name imported; only_types: also what is imported for types alone."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    guards = [
        node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = set() if only_types else {inner for guard in guards for inner in ast.walk(guard)}
    found = [node for node in nodes if node not in skipped]
    names = [alias.name for node in found if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in found if isinstance(node, ast.ImportFrom)]
    return names + [f"{node.module}.{alias.name}" for node in froms for alias in node.names]


def room(module: str) -> str:
    """`vaescale.data.reader.Batch` to `data`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def own_modules(path: Path) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] == "vaescale"]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts
    here = place[0].removesuffix(".py")
    for module in own_modules(path):
        there = room(module)
        if there == here and len(place) > 1:
            leaf = PACKAGE / here / f"{module.split('.')[2]}.py"
            own = [name for name in own_modules(leaf) if room(name) == here] if leaf.is_file() else []
            assert place[-1] == "__init__.py" or not own, f"{path} imports {module}, which is not a leaf"
        else:
            assert LEVEL[there] > LEVEL[here], f"{path} imports {module} from a layer that is not below"


@pytest.mark.parametrize("library", KEPT)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        used = {name.split(".")[0] for name in imports(path, only_types=False)}
        assert library not in used or name.startswith(KEPT[library]), f"{library} belongs to {KEPT[library]}"


def test_every_module_has_a_layer() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(LEVEL)
