"""Folders have an order: a module imports from folders below its own, and inside a folder imports form no circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top. Rooms on one line do not know each other.
ORDER = (
    ("tools",),
    ("__main__",),
    ("cli", "serving"),
    ("commands",),
    ("trained",),
    ("recipe",),
    ("training",),
    ("aggregate", "compression"),
    ("evaluation",),
    ("objectives", "mixtures"),
    ("adversaries", "perceptual"),
    ("exchange", "models"),
    ("conditions", "networks", "likelihoods"),
    ("runs", "figures"),
    ("data",),
    ("comm", "noise", "schedules"),
    ("kernels",),
    ("recipe_faults",),
    ("config",),
    ("system",),
    ("errors",),
    ("vaescale",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MOST_ROOT_MODULES = 10
# Libraries that only these rooms import, whether at the top of a module, in a function or for types.
KEPT = {
    "mlflow": ("vaescale/runs/", "vaescale/commands/export.py"),
    "tensorboard": ("vaescale/runs/",),
    "trackio": ("vaescale/runs/",),
    "wandb": ("vaescale/runs/",),
    "accelerate": ("vaescale/training/",),
    "deepspeed": ("vaescale/training/",),
    "triton": ("vaescale/kernels.py", "vaescale/noise/kernel.py", "vaescale/networks/group_norm_kernels.py"),
    "webdataset": ("vaescale/data/",),
    "datasets": ("vaescale/data/",),
    "fsspec": ("vaescale/data/",),
    "h5py": ("vaescale/data/",),
    "av": ("vaescale/data/",),
    "lmdb": ("vaescale/data/",),
    "matplotlib": ("vaescale/figures/",),
    "onnx": ("vaescale/commands/export_onnx.py",),
    "onnxruntime": ("vaescale/commands/export_onnx.py",),
    "onnxscript": ("vaescale/commands/export_onnx.py",),
    "constriction": ("vaescale/compression/", "vaescale/commands/compress.py"),
    "huggingface_hub": ("vaescale/commands/hub.py",),
    # The digits are a data set of scikit-learn's.
    "sklearn": (
        "vaescale/evaluation/",
        "vaescale/mixtures/",
        "vaescale/aggregate/",
        "vaescale/data/making/sources/digits.py",
    ),
    "torchmetrics": ("vaescale/evaluation/", "vaescale/mixtures/", "vaescale/aggregate/"),
}
BENCHES = "tools/bench/"  # compare vaescale with these libraries
FILES = sorted([*(ROOT / "vaescale").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


def name_of(path: Path) -> str:
    """`vaescale/data/plan.py` to `vaescale.data.plan`; a package has its folder's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


@cache
def imported(path: Path) -> tuple[str, ...]:
    """The full name of everything that a module imports anywhere: `vaescale.data.plan.Plan`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(names)


def own_modules(module: str) -> set[str]:
    """The modules of this project that one imports: the longest part of each name that is a module."""
    names = {name.replace("vaescale.tools", "tools") for name in imported(MODULES[module])}
    candidates = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return {name for name in candidates if name in MODULES}


def room_of(module: str) -> str:
    """`vaescale.data.plan` to `data`, `vaescale` and `tools.train` to their own names."""
    parts = module.split(".")
    return parts[1] if parts[0] == "vaescale" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    here = room_of(module)
    for other in own_modules(module):
        there = room_of(other)
        assert there == here or LEVEL[there] > LEVEL[here], f"{module} imports {other}, which is not below"


def test_imports_inside_a_room_form_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join([*path, module])}"
        if module not in done:
            for other in sorted(own_modules(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


@pytest.mark.parametrize("library", KEPT)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    for path in FILES:
        place = path.relative_to(ROOT).as_posix()
        used = {name.partition(".")[0] for name in imported(path)}
        allowed = (*KEPT[library], BENCHES)
        assert library not in used or place.startswith(allowed), (
            f"{place} imports {library}, kept to {allowed}"
        )


def test_implementations_stand_beside_their_sections() -> None:
    """Recipe sections name what they configure as text, which the graph of imports does not show."""
    named = [
        (path, ast.literal_eval(node.value))
        for path in FILES
        for section in ast.walk(ast.parse(path.read_text()))
        if isinstance(section, ast.ClassDef)
        for node in section.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "implementation"
    ]
    assert len(named) > 15
    for path, name in named:
        module = name.rpartition(".")[0]
        assert MODULES[module].parent == path.parent, f"{path} names {name}, which is not in its room"


def test_every_room_has_a_place_in_the_order() -> None:
    assert {room_of(module) for module in MODULES} == set(LEVEL)


def test_few_modules_stand_at_the_root() -> None:
    loose = [path.stem for path in (ROOT / "vaescale").glob("*.py") if not path.stem.startswith("__")]
    assert len(loose) <= MOST_ROOT_MODULES, loose
