"""docs/fidelity.md names nothing that is not there: functions, quoted lines, tests, files, flags, commands."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import main

ROOT = Path(main.__file__).parent
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
MODULES = ("main", "model", "data_utils", "utils", "arch.generators", "arch.discriminators")
FENCES = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TEXT = re.sub(r"^```\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)


def tables() -> list[list[dict[str, str]]]:
    """Every table of the page, its rows by column title."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        titles, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        found.append([dict(zip(titles, row, strict=True)) for row in rows])
    return found


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


QUOTED = [row for table in tables() for row in table if "the line" in row]
LINES = {span for row in QUOTED for span in code(row["the line"])}
SPANS = sorted({span for span in code(TEXT) if span not in LINES})


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
        main.build_parser().parse_args(shlex.split(span))
    elif "::" in span:
        path, name = span.split("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.startswith("test_")
    elif "/" in span:
        assert (ROOT / span).is_file()
    else:
        assert callable(resolve(span))


@pytest.mark.parametrize("row", QUOTED, ids=lambda row: row["function"].strip("`"))
def test_every_quoted_line_stands_in_its_function(row):
    (name,), (line,) = code(row["function"]), code(row["the line"])
    assert line in inspect.getsource(resolve(name))


@pytest.mark.parametrize(
    "row", [row for table in tables() for row in table if "proved by" in row], ids=lambda r: [*r.values()][0]
)
def test_every_row_has_its_test(row):
    assert code(row["proved by"])


@pytest.mark.parametrize("command", [line for fence in FENCES for line in fence.splitlines()])
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, script, *flags = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    main.parse_args(flags)


def test_the_page_covers_every_equation_and_every_flag_of_the_official_preset():
    assert {number for row in tables()[0] for number in re.findall(r"\d+", [*row.values()][0].split(":")[0])} == set(
        "123456789"
    )
    preset = main.read_toml(ROOT / "config" / "official.toml")
    keys = {*preset, *preset["supervised"]} - {"supervised"}
    flags = {word for span in SPANS if span.startswith("--") for word in span.split() if word.startswith("--")}
    assert {"--" + key.replace("_", "-") for key in keys} <= flags
