"""Recipes and backends that come with the package."""

from pathlib import Path

import pytest

from tests.launching import ROOT
from vaescale.errors import UserError
from vaescale.recipe import load_recipe
from vaescale.system.shipped import BACKENDS, shipped_file, shipped_folder


def test_names_are_files_of_the_recipes_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_folder() == ROOT / "recipes"
    assert shipped_file("vaescale:digits/optimal") == ROOT / "recipes/digits/optimal.yaml"
    assert shipped_file("vaescale:digits/optimal.yaml") == ROOT / "recipes/digits/optimal.yaml"
    assert shipped_file("zero2", BACKENDS) == ROOT / "recipes/backends/zero2.yaml"
    (tmp_path / "zero2").write_text("")
    assert shipped_file("zero2", BACKENDS) == Path("zero2"), "a file of the user comes first"


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    [
        (
            "vaescale:digits/optmal",
            "",
            r", vaescale:digits/\.\.\., .*; did you mean vaescale:digits/optimal\?$",
        ),
        ("vaescale:backends/zero2", "", "is neither a file nor one of vaescale:celeba64/"),
        ("vaescale:../setup", "", "is neither a file nor one of"),
        ("vaescale:digits/../mnist/conv", "", "is neither a file nor one of"),
        ("vaescale:/etc/hostname", "", "is neither a file nor one of"),
        ("zero4", BACKENDS, r", zero1, .*; did you mean zero\d\?$"),
    ],
)
def test_other_names_are_refused(name: str, folder: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        shipped_file(name, folder)


def test_a_recipe_is_read_by_name_and_lies_over_one_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe(Path("vaescale:digits/optimal"))
    assert shipped == load_recipe(ROOT / "recipes/digits/optimal.yaml")
    Path("mine.yaml").write_text(
        "base: vaescale:digits/base\nname: mine\nseed: 3\nlikelihood: {kind: laplace}\n"
    )
    mine = load_recipe(Path("mine.yaml"), ["optimizer.lr=1e-4"])
    assert (mine.name, mine.seed, mine.network) == ("mine", 3, shipped.network)
    Path("wrong.yaml").write_text("base: vaescale:digits/bsae\nname: wrong\n")
    with pytest.raises(UserError, match="did you mean vaescale:digits/base"):
        load_recipe(Path("wrong.yaml"))


def test_sweeps_and_dry_runs_take_names(vaescale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = vaescale("sweep", "vaescale:digits/optimal", "seed=0,1", "--dry-run", "--json")
    assert [row["name"] for row in outcome.json["variants"]] == [
        "digits-optimal-seed-0",
        "digits-optimal-seed-1",
    ]
    vaescale("train", "vaescale:digits/optmal").assert_refused(2, "did you mean vaescale:digits/optimal?")
    vaescale("train", "recipes/digits/optimal.yaml").assert_refused(2, "vaescale:digits/optimal")
