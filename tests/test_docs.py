"""The commands, TOML examples and links of README.md and docs/ work."""

import re
import shlex
from pathlib import Path

import pytest

import main
from datasets.spec import load_spec
from engine.flags import parse_args
from tools import experiments

ROOT = Path(main.__file__).parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> dict[str, str]:
    """The page of each command line of main.py and tools/experiments.py, also under torchrun."""
    found = {}
    for page, text in TEXTS.items():
        for _, block in FENCE.findall(text):
            for line in block.splitlines():
                if re.match(r"(python|torchrun) .*(main|experiments)\.py", line):
                    found[line] = page
    return found


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the pages' TOML files, each named by its first line."""
    monkeypatch.chdir(tmp_path)
    for text in TEXTS.values():
        for language, block in FENCE.findall(text):
            if language == "toml":
                Path(re.match(r"# (\w+\.toml)", block)[1]).write_text(block)


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line, examples):
    line = line.partition(" > ")[0].replace("config/", f"{ROOT}/config/")
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1 :]
    if script == "main.py":
        parse_args(flags)
        return
    assert script == "tools/experiments.py"
    args = experiments.build_parser().parse_args(flags)
    assert args.action not in ("list", "run") or experiments.select(args, args.scale or "paper")


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
