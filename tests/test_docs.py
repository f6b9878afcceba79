"""The commands, examples and links of README.md and docs/ work; the map names every file."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import make_tiny
from runs import TINY, evaluations, run

import main
import model
from datasets.spec import load_spec
from engine import flags
from engine.flags import parse_args
from tools import experiments

ROOT = Path(main.__file__).parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


COMMAND = re.compile(r"^(?:python|torchrun) .*?((?:main|tools/\w+)\.py.*)", re.MULTILINE)
COMMANDS = dict.fromkeys(COMMAND.findall("\n".join(TEXTS.values())))


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the pages' TOML files, each named by its first line."""
    monkeypatch.chdir(tmp_path)
    for language, block in FENCE.findall("\n".join(TEXTS.values())):
        if language == "toml":
            Path(re.match(r"# (\w+\.toml)", block)[1]).write_text(block)


class Understood(Exception):
    """A tool's parser has accepted a command line."""


def parse_only(parser, argv, namespace=None):
    argparse.ArgumentParser.parse_args(parser, argv, namespace)
    raise Understood


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line, examples, monkeypatch):
    line = line.partition(" > ")[0].replace("config/", f"{ROOT}/config/")
    script, *words = shlex.split(line, comments=True)
    if script == "main.py":
        parse_args(words)
    elif script == "tools/experiments.py":
        args = experiments.build_parser().parse_args(words)
        assert args.action not in ("list", "run") or experiments.select(args, args.scale or "paper")
    else:
        tool = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        command = words.pop(0) if script == "tools/diagnose.py" else Path(script).stem
        monkeypatch.setattr(flags.Parser, "parse_args", parse_only)
        with pytest.raises(Understood):
            getattr(tool, command)(words)


def test_toml_examples_describe_what_main_accepts(examples):
    assert load_spec("camvid.toml").ignore == 11
    args = parse_args("--training --dataset acdc --config small.toml".split())
    assert args.size == [64, 64]


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    prose = re.sub(r"`[^`]*`", "", FENCE.sub("", TEXTS[page]))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = folder / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_the_new_method_of_the_page_trains_and_is_tested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.METHODS, "entropy", None)  # removed afterward
    monkeypatch.setattr(flags, "build_parser", flags.build_parser.__wrapped__)  # not the cached one
    make_tiny(20, 4)
    block = dict(FENCE.findall(TEXTS["docs/extending.md"]))["python"]
    exec(block, dict(vars(model)))
    entropy = [*TINY, "--method", "entropy"]
    assert run("--training", *entropy, "--epochs", "2", "--lr", "0.01") == 0
    losses = [line["losses"] for line in evaluations("tiny_entropy_0.2_s0")]
    assert losses[0].keys() == {"gen_S", "entropy"}
    assert losses[1]["entropy"] < losses[0]["entropy"]
    assert run("--testing", *entropy) == 0


def test_the_map_names_every_file():
    page = TEXTS["docs/extending.md"]
    folder, named = "", []
    for line in page[page.index("## Map") : page.index("## From")].splitlines():
        spans = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("|") else []
        if line.startswith("| **"):
            folder = spans[0]
        else:
            named += [folder + span for span in spans]
    expected = {"tools/experiments.toml"}
    for folder in ("", "arch/", "engine/", "datasets/", "tools/"):
        expected |= {f"{folder}{path.name}" for path in (ROOT / folder).glob("*.py")}
        expected.discard(f"{folder}__init__.py")
    assert {*named} == expected
    assert len(named) == len({*named})
