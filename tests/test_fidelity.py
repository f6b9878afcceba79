"""Every function, test, file and flag of docs/fidelity.md exists."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import main
from datasets.spec import read_toml
from engine.flags import build_parser

ROOT = Path(main.__file__).parent
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
MODULES = ["main", "model", "data_utils", "utils"]
for package in ("arch", "engine", "datasets"):
    MODULES += [f"{package}.{path.stem}" for path in ROOT.glob(f"{package}/*.py")]
TEXT = re.sub(r"^```\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")]


def table_rows() -> list[dict[str, str]]:
    """The rows of all tables of the page, by column title."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        titles, _, *rows = map(cells, block.splitlines())
        found += [dict(zip(titles, row, strict=True)) for row in rows]
    return found


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = table_rows()
CHECKED = [row for row in ROWS if "checked by" in row]
SPANS = sorted({*code(TEXT)})


def resolve(name: str):
    """The function or class that a dotted name means."""
    module = next(module for module in MODULES if name.startswith(f"{module}."))
    found = importlib.import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("span", SPANS)
def test_all_that_the_page_names_exists(span):
    if span.startswith("--"):
        build_parser().parse_args(shlex.split(span))
    elif "::" in span:
        path, name = span.split("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.startswith("test_")
    elif "/" in span:
        assert (ROOT / span).is_file()
    else:
        assert callable(resolve(span))


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: next(iter(row.values())))
def test_every_row_has_its_test(row):
    assert code(row["checked by"])


def test_the_page_covers_every_equation():
    titles = [row["equation"].split(":")[0] for row in ROWS if "equation" in row]
    assert set(re.findall(r"\d+", " ".join(titles))) == set("123456789")


@pytest.mark.parametrize("preset", ["official.toml", "official_partial.toml"])
def test_the_page_covers_every_flag_of_the_released_code(preset):
    keys = read_toml(ROOT / "config" / preset)
    words = " ".join(span for span in SPANS if span.startswith("--")).split()
    assert {"--" + key.replace("_", "-") for key in keys} <= set(words)
