"""Scale `study` of tools/experiments.py: its commands, and its report on runs that differ in some flags."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import scipy.stats
from conftest import Parts, make_tiny
from PIL import Image

import main
from data_utils import load_spec
from tools import experiments, study


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny(20, 4)


def run(line: str, *extra: str) -> int:
    return main.main([*line.split(), *(["--", *extra] if extra else [])], experiments.experiments)


def make_run(variant: str, seed: int, miou: float, dataset: str = "phantom", ratio: float = 0.05, more=()) -> Path:
    """A finished run of two evaluations, with what --diagnose leaves."""
    flags = study.flags_of(dataset, variant if variant in study.VARIANTS else "paper", ratio, seed)
    name = f"{dataset}_{variant}_{ratio:g}_s{seed}"
    args, spec = main.parse_args([*flags, "--epochs", "2", *more, "--name", name]), load_spec(dataset)
    folder = Path(args.checkpoints) / args.name
    folder.mkdir(parents=True)
    main.make_run_folder(folder, args, spec, Parts())
    lines = []
    for n, value in enumerate([0.1, miou], 1):
        line = {"epoch": n, "step": 10 * n, "miou": value, "iou": dict.fromkeys(spec.classes, value)}
        if args.method == "cyclegan":
            line |= {
                "gradients": {"gen_S": 0.5 / n, "gen_I": 0.0, "disc_S": 2.0},
                "answers": {"D_S(y)": n / 2, "b": 0.1},
            }
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def rows_of(page: str, heading: str) -> list[list[str]]:
    table = re.search(rf"^## {re.escape(heading)}\n\n.*\n\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    return [[each.strip() for each in line[1:-1].split("|")] for line in table.splitlines()][2:]


def report_of() -> str:
    assert run("report --scale study --out out") == 0
    return Path("out/study.md").read_text()


@pytest.mark.parametrize("dataset", ["phantom", "acdc", "tiny.toml"])
def test_every_variant_is_a_command_of_its_regime(capsys, dataset):
    assert run(f"list --scale study --dataset {dataset} --ratios 0.1 0.2") == 0
    lines, found, short = capsys.readouterr().out.splitlines(), [], Path(dataset).stem
    for line in lines:
        name, _, _, *flags = shlex.split(line)
        args = main.parse_args(flags)
        found.append(name)
        assert (args.name, args.checkpoints) == (name, "checkpoints/study")
        assert (args.precision, args.diagnose) == ("bf16", True)
        weights = [getattr(args, f"lambda{k}") for k in range(1, 7)]
        if "_paper_" in name:
            assert weights == [1, 0.05, 1, 1, 1, 0]
        if re.match(rf"{short}_without_", name):
            assert weights.count(0) == 2
        if re.match(rf"{short}_best_0", name):
            assert (args.method, args.cutmix_on, args.ramp_up, weights[-1]) == ("meanteacher", "both", 0.25, 1)
        if re.match(rf"{short}_labels_cycle_0", name):
            assert weights == [1, 1, 0, 0, 0, 1]
            assert (args.method, args.confidence, args.cycle_s_trains) == ("cyclegan", 0.7, "G_IS")
    expected = [f"{short}_full_1_s0"]
    expected += [f"{short}_{name}_{r}_s0" for r in ("0.1", "0.2") for name in study.VARIANTS if name != "full"]
    assert sorted(found) == sorted(expected)


def test_a_study_runs_the_variants_that_are_asked_for_seed_by_seed(capsys, monkeypatch):
    monkeypatch.setattr(experiments, "run_all", None)
    line = "run --dry-run --scale study --dataset tiny.toml --variants best partial --seeds 0 1 --data-root here"
    assert run(line, "--lr", "0.5") == 0
    runs = [main.parse_args(shlex.split(line)[2:]) for line in capsys.readouterr().out.splitlines()]
    names = [f"tiny_{name}_0.1_s{seed}" for seed in (0, 1) for name in ("partial", "best")]
    assert [args.name for args in runs] == names
    assert {(args.lr, args.data_root) for args in runs} == {(0.5, "here")}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("run --scale study", "--dataset"),
        ("run --scale study --dataset phantom --variants other", "--variants other"),
        ("run --scale study --dataset phantom --methods cyclegan", "--variants"),
        ("run --scale small --dataset phantom --variants best", "--variants"),
        ("list --scale study --dataset nothere", "nothere"),
        ("report --scale study", "checkpoints/study"),
        ("keep --scale study", "checkpoints/study"),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, monkeypatch, line, named):
    monkeypatch.setattr(experiments, "run_all", None)
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    assert named in err


def test_the_report_compares_with_partial_of_the_same_seeds():
    for seed, miou in enumerate([0.5, 0.6, 0.7]):
        make_run("partial", seed, miou)
    for seed, miou in {0: 0.56, 1: 0.62, 3: 0.1}.items():
        make_run("best", seed, miou)
    make_run("mine", 0, 0.4, more=["--lambda4", "0.25"])
    make_run("meanteacher_labeled", 1, 0.65)
    make_run("full", 0, 0.9, ratio=1)
    make_run("partial", 0, 0.8, ratio=0.5)
    make_run("paper", 0, 0.2, dataset="acdc")
    unfinished = make_run("hung", 0, 0.2)
    (unfinished / "metrics.jsonl").write_text((unfinished / "metrics.jsonl").read_text().splitlines()[0])
    for config in Path("checkpoints/study").glob("*/config.toml"):  # a flag that is no longer there
        value = '"new"' if "mine" in config.parent.name else '"old"'
        config.write_text(f"tried = {value}\n{config.read_text()}")
    page = report_of()
    low, high = scipy.stats.t.interval(0.95, 1, loc=0.04, scale=0.02)  # of 0.06 and 0.02
    flags = "--method meanteacher --cutmix-on both --ramp-up 0.25"
    gain = f"+0.0400 [{low:+.4f}, {high:+.4f}] (n = 2)"
    of_5 = [
        ["full", "0.9000", "-", "-", "1", "20", "`--method supervised`"],
        ["partial", "0.6000 ± 0.1000", "-", "-0.0500 (n = 1)", "3", "20", "`--method supervised`"],
        ["meanteacher_labeled", "0.6500", "+0.0500", "-", "1", "20", f"`{flags.replace('both', 'labeled')}`"],
        ["best", "0.4267 ± 0.2845", gain, "-0.0300 (n = 1)", "3", "20", f"`{flags}`"],
        ["mine", "0.4000", "-0.1000", "-", "1", "20", "`--tried new --lambda4 0.25`"],
    ]
    assert rows_of(page, "phantom, 5 % labeled") == of_5
    assert [row[0] for row in rows_of(page, "phantom, 50 % labeled")] == ["full", "partial"]
    assert rows_of(page, "ACDC, 5 % labeled") == [["paper", "0.2000", "-", "-", "1", "20", ""]]
    table = list(csv.DictReader(Path("out/study.csv").read_text().splitlines()))
    (best,) = [row for row in table if row["variant"] == "best"]
    assert [best[key] for key in ("n", "partial_n", "last", "partial")] == ["3", "2", "0.426667", "0.04"]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert pictures == [f"study_{name}_{kind}.png" for name in ("acdc", "phantom") for kind in ("gradients", "answers")]
    for name in pictures:
        with Image.open(Path("out", name)) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize("flag", ["--lr", "--lambda4"])
def test_runs_that_differ_do_not_stand_in_one_row_or_regime(capsys, flag):
    make_run("paper", 0, 0.5)
    make_run("paper", 1, 0.5, more=[flag, "0.5"])
    assert run("report --scale study --out out") == 2
    key = flag[2:]
    assert f"phantom_paper_0.05_s0 and phantom_paper_0.05_s1 differ in {key} (" in capsys.readouterr().err
    assert not Path("out/study.md").exists()


def test_a_report_from_kept_files_is_the_same_bytes():
    for variant, seed in ("partial", 0), ("paper", 0), ("paper", 1):
        folder = make_run(variant, seed, 0.5)
        (folder / "manifest.json").write_text('{"command": "main.py"}')
    page = report_of()
    assert run("keep --scale study --out kept") == 0
    assert run("report --checkpoints kept/study --out again") == 0
    for path in Path("out").iterdir():
        assert path.suffix == ".png" or path.read_bytes() == Path("again", path.name).read_bytes()
    assert "from 3 runs" in page
