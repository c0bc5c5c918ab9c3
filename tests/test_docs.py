"""The documents say what is there: links, commands, options, recipes, keys, messages and imports exist."""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from vaescale.tools.docs import recipe_reference

from vaescale.aggregate.information import Information
from vaescale.cli import VERBS
from vaescale.commands import baselines
from vaescale.evaluation.auroc import Auroc
from vaescale.evaluation.comparison import SCORES
from vaescale.evaluation.importance import IMPORTANCE
from vaescale.evaluation.likelihood import metric_names
from vaescale.evaluation.reconstruction import METRICS
from vaescale.evaluation.scores import COMPLEXITY, CORRECTED, RATIO
from vaescale.mixtures.selection import Candidate
from vaescale.recipe import load_recipe
from vaescale.trained import build_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LINKED = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = [ROOT / "tools/bench/README.md", *sorted((ROOT / "recipes").rglob("README.md"))]
PAGES = [README, *LINKED, *NOTES]
MOST_README_BYTES = 9000
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VERB = re.compile(rf"\bvaescale ({'|'.join(sorted(VERBS, key=len, reverse=True))})\b")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks in a language; commands have none."""
    return [content for name, content in FENCED.findall(page.read_text()) if name == language]


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text()))


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each `vaescale VERB ...` line of the fenced blocks: the verb and the words after it."""
    for line in "\n".join(blocks(page, "")).splitlines():
        if found := VERB.search(line):
            yield found[1], shlex.split(line[found.end() :], comments=True)


def parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vaescale {verb}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--import", action="append", dest="modules")
    importlib.import_module(f"vaescale.tools.{verb.replace('-', '_')}").add_arguments(parser)
    return parser


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= MOST_README_BYTES


def test_the_recipe_of_the_readme_is_the_one_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(blocks(README, "yaml")[0])
    assert load_recipe(path).identity() == load_recipe(ROOT / "recipes/digits/optimal.yaml").identity()


@every_page
def test_recipes_in_yaml_are_valid(page: Path, tmp_path: Path) -> None:
    for number, content in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content)
        load_recipe(path)


def test_every_page_is_linked_from_the_readme() -> None:
    text = README.read_text()
    assert [page.name for page in LINKED if f"({page_id(page)})" not in text] == []


@every_page
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@every_page
def test_recipes_exist(page: Path) -> None:
    for name in re.findall(r"\brecipes/[\w./-]+\.\w+", page.read_text()):
        assert "NAME" in name or (ROOT / name).is_file(), f"{page.name} names {name}"


@every_page
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, words in commands(page):
        if words == ["--help"]:
            continue
        try:
            parser = parser_of(verb)
            (parser.parse_args if verb == "launch" else parser.parse_intermixed_args)(words)
        except SystemExit:
            pytest.fail(f"{page.name}: vaescale {verb} {shlex.join(words)}\n{capsys.readouterr().err}")


@every_page
def test_options_exist(page: Path) -> None:
    for code in inline_code(page):
        if found := VERB.search(code):
            known = parser_of(found[1])._option_string_actions
            unknown = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", code[found.end() :])) - set(known)
            assert not unknown, f"{page.name}: {code}"


@every_page
def test_overrides_are_valid(page: Path) -> None:
    for verb, words in commands(page):
        recipe = next((ROOT / word for word in words if word.startswith("recipes/")), None)
        if verb == "train" and recipe and "--import" not in words:  # such a kind: test_plugins.py
            load_recipe(recipe, [word for word in words if "=" in word and not word.startswith("-")])


@every_page
def test_sections_in_braces_are_valid(page: Path) -> None:
    kinds = {section.kind: section.config for section in recipe_reference.sections() if section.kind}
    for code in inline_code(page):
        if code.startswith("{kind: "):
            content = yaml.safe_load(code.replace("e-", ".0e-"))
            kinds[content["kind"]].model_validate(content)


@every_page
def test_keys_exist(page: Path) -> None:
    keys: dict[str, set[str]] = {}
    for section in recipe_reference.sections():
        keys.setdefault(section.name, {"kind"}).update(section.config.model_fields)
    for code in inline_code(page):
        for section_name, key in re.findall(rf"^({'|'.join(keys)})\.([a-z_]+)\b", code):
            assert key in keys[section_name] | {"yaml"}, f"{page.name}: {code}"


@every_page
def test_imports_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {block}"


@every_page
def test_tests_exist(page: Path) -> None:
    for name in re.findall(r"\btests/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"


def test_every_reported_quantity_has_a_row() -> None:
    """The names of results, as the code has them, are in the first columns of the tables of docs/quantities.md."""
    page = (ROOT / "docs" / "quantities.md").read_text()
    first_cells = re.findall(r"^\| (.*?)(?<!\\) \|", page, re.MULTILINE)
    rows = {code for cell in first_cells for code in re.findall(r"`([^`]+)`", cell)}
    model = build_model(load_recipe(ROOT / "recipes/digits/optimal.yaml"))
    endings = re.compile("(_leave_one_out|_mixture)?(_error)?$")
    information = {endings.sub("", name) for name in Information._fields if not name.startswith("mixture_")}
    fits, probes = {*Candidate._fields} - {"mixture"}, {*baselines.PROTOCOL} - {"pPCA", "..._balanced"}
    evaluated = {
        *metric_names(model),
        *METRICS,
        *IMPORTANCE,
        "data_sigma",
        "sigma_gap_nats",
        "interval_coverage/50",
    }
    scores = {RATIO, COMPLEXITY, CORRECTED, *Auroc._fields}
    names = {*evaluated, *scores, *SCORES, *information, *fits, *probes}
    assert len(names) > 40
    assert names - rows == set(), "add rows to docs/quantities.md"


def test_the_recipe_reference_is_fresh() -> None:
    assert recipe_reference.PAGE.read_text() == recipe_reference.page(), (
        "run `python tools/docs/recipe_reference.py`"
    )


def spoken() -> list[str]:
    """The text of each function and constant of the code: its strings, with `...` for what an f-string puts in."""
    texts = []
    for path in [*(ROOT / "vaescale").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.Assign):
                texts.append("\n".join(literals(node)))
    return texts


def literals(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(value.value) if isinstance(value, ast.Constant) else "..." for value in node.values)
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                yield from literals(value.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


def test_messages_are_what_the_code_says() -> None:
    page = ROOT / "docs" / "when_something_goes_wrong.md"
    messages = re.findall(r"^\| `([^`]+)` \|", page.read_text(), re.MULTILINE)
    assert len(messages) > 50
    texts = spoken()
    missing = []
    for message in messages:
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        if not any(all(piece in text for piece in pieces) for text in texts):
            missing.append(message)
    assert not missing, f"no function of the code says {missing}; mend {page.name}"
