"""The docs against the code: captions, commands, links, support table, levels of imports."""

import ast
import graphlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composable import families, methods, tasks
from composable.families.base import KINDS
from tests.paths import ROOT

PACKAGE = ROOT / "composable"
REMEDY = "run python docs/make_commands.py"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted([*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *ROOT.glob("assets/*.py")])
HIDDEN = ("__init__.py", "__pycache__")
MODEL_TYPES = sorted({kind for family in families.FAMILIES for kind in family.model_types})
DEFAULT_PATHS = ("model/dense.pth", "google-t5/t5-small")


def load_maker() -> Any:
    """docs/ is no package."""
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs/make_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()


def between(path: Path, marker: str) -> str:
    """The text between `<!-- marker -->` and `<!-- /marker -->`."""
    text = path.read_text(encoding="utf-8")
    return text.split(f"<!-- {marker} -->\n", 1)[1].split(f"<!-- /{marker} -->", 1)[0]


def test_commands_are_those_of_the_scripts() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == MAKER.commands(), REMEDY


def test_the_folders_are_listed_with_their_captions() -> None:
    tree = between(ROOT / "docs" / "architecture.md", "tree")
    assert tree == f"```text\n{MAKER.tree()}```\n", REMEDY
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:-1]}
    package = {path.name for path in PACKAGE.iterdir() if path.name not in HIDDEN}
    assert listed == package


def test_every_file_has_a_caption() -> None:
    for path in SOURCES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert docstring, path
        assert len(docstring.splitlines()[0]) <= 100, path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cells(marker: str) -> list[list[str]]:
    """Rows of a table of docs/support.md, without the line below its head."""
    lines = between(ROOT / "docs" / "support.md", marker).splitlines()
    found = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [found[0], *found[2:]]


def test_support_tables_are_written_by_the_generator() -> None:
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == MAKER.support(), REMEDY


def test_support_table_is_that_of_the_registries() -> None:
    """Its cells are run by test_matrix.py."""
    (_, *heads), *body = cells("support")
    named = {family.name for family in families.FAMILIES}
    said = [head.partition(":")[0] for column in heads for head in column.split("; ")]
    assert set(said) == named
    found = [
        f"{kind}: {name}"
        for kind, names in (row[0].split(": ") for row in body)
        for name in names.split(", ")
    ]
    known = []
    for kind in KINDS:
        known += [f"{kind}: `{one.name}`" for one in methods.METHODS if kind in one.kinds]
        known += [] if kind == "linear" else [f"{kind}: rate 1"]
    assert sorted(found) == sorted(known)
    assert {cell for row in body for cell in row[1:]} == set("○◐●")


def test_model_types_and_tasks_are_those_of_the_registries() -> None:
    _, *body = cells("families")
    listed = {name: (types, done) for name, types, done in body}
    for family in families.FAMILIES:
        assert listed[family.name][0] == ", ".join(f"`{kind}`" for kind in family.model_types)
    done = {task for _, _, names in body for task in names.split(", ")}
    assert done == set(tasks.names())


def imports(path: Path) -> Iterator[str]:
    """Dotted names within the package that a file imports when it runs, e.g. `families.base`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("composable."):
                yield existing(name.removeprefix("composable."))


def existing(name: str) -> str:
    """The part of a dotted name that is a file or folder: `config.Entry` is in `config`."""
    while name and not (
        PACKAGE.joinpath(*name.split(".")).with_suffix(".py").is_file()
        or PACKAGE.joinpath(*name.split(".")).is_dir()
    ):
        name = name.rpartition(".")[0]
    return name


def dotted(path: Path) -> str:
    """`composable/families/t5.py` -> `families.t5`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def test_every_file_of_the_package_has_a_level() -> None:
    files = {dotted(path).partition(".")[0] for path in PACKAGE.rglob("*.py")} - {""}
    assert files == MAKER._levels().keys()


def test_imports_point_one_way() -> None:
    known = MAKER._levels()
    for path in PACKAGE.rglob("*.py"):
        own = dotted(path)
        folder = own.partition(".")[0]
        for name in imports(path):
            target = name.partition(".")[0]
            if target in (folder, ""):
                continue
            assert known[target] < known[folder], f"{own} imports {name}"


def test_no_circle() -> None:
    graph = {
        dotted(path): set(imports(path)) - {dotted(path), ""} for path in PACKAGE.rglob("*.py")
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_folder_has_a_caption() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    "path",
    [path for path in PACKAGE.rglob("*.py") if path.parent.name != "commands"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_commands_know_of_flags(path: Path) -> None:
    for word in code_words(path):
        assert word not in ("click", "argv"), f"{path.name} imports {word}"
        assert not re.search(r"(?<![\w-])--[a-z]", word), f"{path.name}: {word!r} names a flag"


def test_only_families_know_a_family() -> None:
    for path in SOURCES:
        if "families" in path.parts:
            continue
        names = [name for name in imports(path) if name.startswith("families.")]
        assert set(names) <= {"families.base"}, path
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and "families" in str(node.module):
                assert {alias.name for alias in node.names} == {"Module"}, path


def code_words(path: Path) -> Iterator[str]:
    """Names and strings of a file's code; docstrings and comments are not among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def test_no_model_type_outside_families() -> None:
    # also as the beginning of a class: T5ForConditionalGeneration, MT5Config; not of OPTIN
    longer = "[a-z0-9]|[A-Z]+(?![a-z])"
    mention = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(MODEL_TYPES)})(?!{longer})")
    found = [
        f"{path.relative_to(ROOT)}: {word!r}"
        for path in SOURCES
        if not {"families", "assets"} & set(path.parts)
        for word in code_words(path)
        if mention.search(word) and not (path.parent.name == "commands" and word in DEFAULT_PATHS)
    ]
    assert found == []
