"""tools/report.py: the paper's numbers, what is read from runs, statistics, tables, kept logs."""

import csv
import json
import re
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import scipy.stats
from conftest import make_tiny
from matplotlib.lines import Line2D
from PIL import Image

import main
from data_utils import load_spec
from datasets.spec import CONFIG
from engine import program
from engine.flags import parse_args, setting_names
from tools import experiments, report

TABLE_1 = """
full    1   0.5543 0.5551 0.8982
hung    0.2 0.2032 0.3490 0.8063
partial 0.5 0.4108 0.4856 0.8863
partial 0.3 0.3237 0.4502 0.8785
partial 0.2 0.2688 0.4112 0.8642
partial 0.1 0.2158 0.3636 0.8418
ours    0.5 0.4197 0.4997 0.8890
ours    0.3 0.3514 0.4654 0.8804
ours    0.2 0.2981 0.4321 0.8688
ours    0.1 0.2543 0.3923 0.8463
"""
TABLE_2 = {"cycle_S": 0.2627, "cycle_I": 0.2733, "disc_S": 0.2614, "disc_I": 0.2543}
RESULTS = Path(main.__file__).parent / "docs" / "results"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny(20, 4)


def run(line: str) -> int:
    return program.run(experiments.experiments, line.split())


def toml(table: dict) -> str:
    items = {key: value for key, value in table.items() if value is not None}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in items.items())


def make_run(name: str, seed: int, mious: list[float | None], **other) -> Path:
    """A run's folder with one evaluation per epoch of 10 steps.

    `other`: dataset, ratio, scale, n_epochs, changes of the [dataset] table, hash of the split, and
    settings to record, None to leave one out.
    """
    changes, digest = other.pop("changes", {}), other.pop("hash", str(seed))
    dataset, scale = other.pop("dataset", "acdc"), other.pop("scale", "reduced")
    ratio = 1.0 if name == "full" else other.pop("ratio", 0.1)
    n_epochs = other.pop("n_epochs", len(mious))
    experiment = name if name in report.EXPERIMENTS else "ours"
    flags = experiments.run_flags((dataset, experiment, ratio), scale, seed, [])
    args = parse_args([*flags, "--epochs", str(n_epochs), "--decay-epoch", "1"])
    settings = {key: getattr(args, key) for key in setting_names()} | other
    machine = {"data_root": "/home/me/data", "workers": 3, "eval_every": args.eval_every}
    machine |= {"diagnose": False}  # of an earlier version
    spec = load_spec(dataset)
    table = asdict(spec) | changes
    folder = Path(f"checkpoints/{scale}/{spec.name}_{name}_{ratio:g}_s{seed}")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"{toml(settings | machine)}[dataset]\n{toml(table)}")
    split = {"labeled": ["a"] * (3 + seed), "unlabeled": ["b"] * 7, "val": ["c"] * 2}
    split["hash"] = f"{ratio} {digest}"
    (folder / "split.json").write_text(json.dumps(split))
    manifest = {"command": "main.py --data-root /home/me/data", "platform": "mine", "torch": "2"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = []
    for epoch, miou in enumerate(mious, 1):
        iou = {label: (miou or 0) + k / 1000 for k, label in enumerate(spec.classes)}
        line = {"epoch": epoch, "step": 10 * epoch, "miou": miou, "iou": iou, "answers": {}}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def report_of(scale: str = "reduced") -> str:
    assert run(f"report --scale {scale} --out out") == 0
    return Path(f"out/{scale}.md").read_text()


def table_of(page: str, heading: str) -> dict[str, dict[str, str]]:
    """The lines of the first table after a heading, by their first cell."""
    text = page[page.index(f"{heading}\n") :]
    lines = re.search(r"((?:^\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    titles, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def rows_of_csv(name: str) -> list[dict]:
    return list(csv.DictReader(Path("out", name).read_text().splitlines()))


# The paper's numbers


def test_scores_are_the_papers_tables_1_and_2():
    expected = {}
    for line in TABLE_1.strip().splitlines():
        name, ratio, *numbers = line.split()
        for dataset, number in zip(("voc", "cityscapes", "acdc"), numbers, strict=True):
            expected[dataset, float(ratio), name] = float(number)
    assert len(expected) == 30
    for term, number in TABLE_2.items():
        expected["voc", 0.2, f"ours_without_{term}"] = number
    assert report.paper_scores() == expected
    assert report.EXPERIMENTS["ours"]["table2"] == {"voc": {"0.2": 0.2981}}


def test_columns_of_tables_3_and_4_average_to_table_1_except_in_three_cells():
    iou, scores = report.paper_iou(), report.paper_scores()
    sizes = {key: len(values) for key, values in iou.items()}
    assert set(sizes.items()) == {
        ((dataset, ratio, name), n)
        for dataset, n in (("voc", 20), ("cityscapes", 19))
        for ratio in (0.1, 0.2, 0.3)
        for name in ("partial", "ours")
    }
    off = {key: round(1e4 * (statistics.mean(iou[key]) - scores[key]), 1) for key in iou}
    assert {key: units for key, units in off.items() if abs(units) > 2} == {
        ("voc", 0.3, "ours"): 19.8,
        ("voc", 0.1, "ours"): 3.5,
        ("cityscapes", 0.2, "ours"): -3.6,
    }
    assert iou["voc", 0.1, "partial"][:2] == (0.4236, 0.2046)
    assert iou["cityscapes", 0.3, "ours"][-1] == 0.3618


# Statistics


def test_mean_deviation_and_interval_of_a_worked_example():
    values = [0.5, 0.6, 0.85]  # mean 0.65; squares 0.0225 + 0.0025 + 0.04 = 0.065, over 2: 0.0325
    mean, sd = report.mean_and_sd(values)
    assert (mean, sd) == (pytest.approx(0.65), pytest.approx(0.0325**0.5))
    reach = 4.302653 * 0.0325**0.5 / 3**0.5  # t of 2 degrees of freedom at 97.5%
    assert report.interval(values) == (pytest.approx(0.65 - reach), pytest.approx(0.65 + reach))
    expected = scipy.stats.t.interval(0.95, 2, loc=mean, scale=scipy.stats.sem(values))
    assert report.interval(values) == pytest.approx(expected)
    assert report.mean_and_sd([0.5]) == (0.5, None)
    assert report.interval([0.5]) == (None, None)


@pytest.mark.parametrize(("values", "text"), [([3], "3"), ([5, 3, 5], "3 to 5"), ([4, 4], "4")])
def test_a_span_is_the_lowest_and_highest_value(values, text):
    assert report.span(values) == text


# Tables


def test_scores_are_over_seeds_beside_the_papers_number():
    for seed, mious in enumerate([[0.2, 0.6, 0.5], [0.7, 0.6, 0.6], [0.1, 0.2, 0.85]]):
        make_run("partial", seed, mious)
    make_run("full", 0, [0.1, 0.2, 0.9])
    rows = table_of(report_of(), "### 10% labeled")
    assert list(rows) == ["full", "partial"]
    images = "labeled / unlabeled / validation images"
    assert rows["full"] == {
        "experiment": "full", "paper": "0.8982", "last epoch": "0.9000", "best epoch": "0.9000",
        "n": "1", images: "3 / 7 / 2", "steps": "30", "flags": "`--method supervised`",
    }  # fmt: skip
    assert rows["partial"] == {
        "experiment": "partial", "paper": "0.8418", "last epoch": "0.6500 ± 0.1803",
        "best epoch": "0.7167 ± 0.1258", "n": "3", images: "3 to 5 / 7 / 2", "steps": "30",
        "flags": "`--method supervised`",
    }  # fmt: skip
    row = rows_of_csv("reduced.csv")[0]
    assert float(row["last_sd"]) == pytest.approx(0.0325**0.5, abs=1e-6)
    assert [row[key] for key in ("name", "last", "n", "paper")] == [
        "partial",
        "0.65",
        "3",
        "0.8418",
    ]


def test_differences_are_paired_by_seed():
    for seed, miou in {0: 0.1, 1: 0.2, 2: 0.3}.items():
        make_run("partial", seed, [0.9, miou], ratio=0.2)
    for seed, miou in {1: 0.25, 2: 0.39, 4: 0.0}.items():
        make_run("ours", seed, [0.5, miou], ratio=0.2)
    make_run("partial", 0, [0.4, 0.5], ratio=0.5)
    make_run("ours_kernel3", 0, [0.4, 0.47], ratio=0.5)
    page = report_of()
    low, high = scipy.stats.t.interval(0.95, 1, loc=0.07, scale=0.02)  # of 0.05 and 0.09
    ours = table_of(page, "### 20% labeled")["ours"]
    expected = f"+0.0700 [{low:+.4f}, {high:+.4f}] (n = 2); paper +0.0046"
    assert ours["minus partial"] == expected
    assert ours["minus partial, best epoch"] == "-0.4000 [-0.4000, -0.4000] (n = 2)"
    rows = table_of(page, "### 50% labeled")
    assert rows["ours_kernel3"]["minus partial"] == "-0.0300"
    assert rows["partial"]["minus partial"] == "-"
    pairs = [row for row in rows_of_csv("reduced_differences.csv") if row["ratio"] == "0.2"]
    assert [(row["name"], row["minus"], row["n"], row["last"]) for row in pairs] == [
        ("ours", "partial", "2", "0.07")
    ]


@pytest.mark.parametrize(
    ("scale", "name", "expected"),
    [
        ("reduced", "ours", ["partial"]),
        ("reduced", "labels_cycle", ["partial"]),
        ("reduced", "partial", []),
        ("reduced", "meanteacher", ["partial", "meanteacher_labeled"]),
        ("reduced", "meanteacher_labeled", ["partial"]),
        ("study", "ours", ["partial", "meanteacher_labeled"]),
        ("study", "partial", ["meanteacher_labeled"]),
        ("exams", "meanteacher_labeled", ["partial"]),
        ("small", "ours", ["partial"]),
    ],
)
def test_experiments_are_compared_with_those_of_the_plan(scale, name, expected):
    assert report.references(name, scale) == expected


def test_columns_of_differences_follow_the_references():
    for name, miou in {"partial": 0.5, "meanteacher_labeled": 0.6, "meanteacher": 0.65}.items():
        make_run(name, 0, [miou])
    rows = table_of(report_of(), "### 10% labeled")
    found = {}
    for name, row in rows.items():
        found[name] = row["minus partial"], row["minus meanteacher_labeled"]
    assert found == {
        "partial": ("-", "-"),
        "meanteacher_labeled": ("+0.1000", "-"),
        "meanteacher": ("+0.1500", "+0.0500"),
    }


def test_cells_without_runs_are_named_in_one_line_and_nowhere_else():
    make_run("ours", 0, [0.3], dataset="voc", ratio=0.2)
    make_run("ours_without_cycle_I", 0, [0.25], dataset="voc", ratio=0.2)
    page = report_of()
    (line,) = [line for line in page.splitlines() if "without a finished run: " in line]
    names = "full 100%, hung 20%, partial 50%, partial 30%, partial 20%, partial 10%, ours 50%, "
    names += "ours 30%, ours 10%, ours_without_cycle_S 20%, ours_without_disc_S 20%, "
    names += "ours_without_disc_I 20%"
    expected = f"PASCAL VOC 2012: {names}; Cityscapes: all; ACDC: all."
    assert line.partition("without a finished run: ")[2] == expected
    assert re.findall("^##+ .*", page, re.MULTILINE)[:2] == [
        "## PASCAL VOC 2012",
        "### 20% labeled",
    ]
    assert "missing" not in page
    rows = table_of(page, "### 20% labeled")
    assert {name: (row["paper"], row["last epoch"]) for name, row in rows.items()} == {
        "ours": ("0.2981", "0.3000"),
        "ours_without_cycle_I": ("0.2733", "0.2500"),
    }


def test_iou_of_a_class_is_the_mean_over_seeds_beside_tables_3_and_4():
    for seed, miou in enumerate([0.3, 0.4]):
        make_run("ours", seed, [0.9, miou], dataset="cityscapes")
    make_run("partial", 0, [0.4, 0.5], dataset="voc", ratio=0.3)
    page = report_of()
    rows = table_of(page, "### IoU of each class after the last epoch (Table 4)")
    assert list(rows) == [*load_spec("cityscapes").classes[:19], "n"]
    assert [rows[name]["ours 10%"] for name in ("road", "bicycle", "n")] == [
        "0.3500 (0.9369)", "0.3680 (0.2611)", "2"
    ]  # fmt: skip
    rows = table_of(page, "### IoU of each class after the last epoch (Table 3)")
    assert list(rows)[0] == "aeroplane"  # Table 3 has no background
    assert rows["aeroplane"]["partial 30%"] == "0.5010 (0.5798)"


def test_a_class_that_does_not_occur_is_left_out_of_its_mean():
    for seed in range(2):
        path = make_run("partial", seed, [0.5], dataset="phantom") / "metrics.jsonl"
        line = json.loads(path.read_text())
        line["iou"] |= {"myocardium": None, "left ventricle": None if seed else 0.25}
        path.write_text(json.dumps(line))
    rows = table_of(report_of(), "### IoU of each class after the last epoch")
    assert rows["myocardium"]["partial 10%"] == "-"
    assert rows["left ventricle"]["partial 10%"] == "0.2500 (n = 1)"
    assert rows["n"]["partial 10%"] == "2"
    classes = {row["class"]: row["n"] for row in rows_of_csv("reduced_classes.csv")}
    assert [classes[name] for name in ("background", "myocardium", "left ventricle")] == [*"201"]


def test_an_evaluation_without_a_scored_class_counts_as_0():
    make_run("partial", 0, [0.4, None])
    row = table_of(report_of(), "### 10% labeled")["partial"]
    assert (row["last epoch"], row["best epoch"]) == ("0.0000", "0.4000")


def test_unfinished_runs_are_named_and_in_no_mean():
    make_run("partial", 0, [0.5, 0.6, 0.7, 0.8])
    make_run("partial", 1, [0.1, 0.2], n_epochs=4)
    make_run("ours", 0, [0.3], n_epochs=4)
    make_run("hung", 0, [], n_epochs=4)
    page = report_of()
    names = "acdc_hung_0.1_s0 (epoch 0 of 4), acdc_partial_0.1_s1 (epoch 2 of 4), "
    assert f"\nUnfinished, and in no mean: {names}acdc_ours_0.1_s0 (epoch 1 of 4)\n" in page
    rows = table_of(page, "### 10% labeled")
    assert list(rows) == ["partial"]
    assert (rows["partial"]["last epoch"], rows["partial"]["n"]) == ("0.8000", "1")


# Settings


def test_flags_are_the_shared_ones_once_and_then_those_that_differ():
    make_run("partial", 0, [0.5])
    make_run("ours_kernel3", 0, [0.5])
    make_run("meanteacher", 0, [0.5], ramp_up=None)
    make_run("mine", 0, [0.5], lambda4=0.25, tried="new")
    page = report_of()
    flags = (
        "--size 64 64 --split paper --label-unit image --epochs 1 --decay-epoch 1 --batch-size 5 "
    )
    flags += "--lr 0.0002 --betas 0.5 0.999 --precision fp32 --ngf 16 --ndf 16 --n-blocks 9"
    assert f"\nAll runs: `{flags}`\n" in page
    rows = table_of(page, "### 10% labeled")
    assert {name: row["flags"] for name, row in rows.items()} == {
        "partial": "`--method supervised`",
        "ours_kernel3": "`--method cyclegan --disc-kernel 3`",
        "meanteacher": "`--method meanteacher --cutmix-on both`",
        "mine": "`--method cyclegan --lambda4 0.25 --tried new`",
    }


@pytest.mark.parametrize("recorded", [{"lambda6": 1.0, "ema": 0.99, "ramp_up": 0.25}, {}])
def test_dropped_flags_with_their_usual_value_change_nothing(recorded):
    dropped = dict.fromkeys(("lambda6", "ema", "ramp_up", "confidence", "momentum", "disc_lr"))
    make_run("meanteacher", 0, [0.5], **(dropped | recorded))
    make_run("meanteacher", 1, [0.5], **(dropped | {"disc_lr": 2e-4, "optimizer": "adam"}))
    make_run("ours", 0, [0.5], **(dropped | {"cutmix_on": "unlabeled"}))
    make_run("ours", 1, [0.5], **(dropped | {"cutmix_on": "both"}))  # of no effect there
    rows = table_of(report_of(), "### 10% labeled")
    assert [row["flags"] for row in rows.values()] == [
        "`--method cyclegan`",
        "`--method meanteacher --cutmix-on both`",
    ]


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (("ours", 0, {}), ("ours", 1, {"lambda4": 0.5}), "lambda4"),
        (("partial", 0, {}), ("ours", 1, {"lr": 0.5}), "lr"),
        (("partial", 0, {}), ("ours", 1, {"size": [32, 32]}), "size"),
        (("ours", 0, {}), ("ours", 1, {"ema": 0.5}), "ema"),
        (("meanteacher", 0, {}), ("meanteacher", 1, {"cutmix_on": "labeled"}), "cutmix_on"),
        (
            ("partial", 0, {}),
            ("ours", 1, {"changes": {"void": 3, "scored": [0, 1, 2]}}),
            "[dataset] scored",
        ),
        (("partial", 0, {}), ("ours", 1, {"changes": {"ignore": 9}}), "[dataset] ignore"),
        (
            ("meanteacher", 0, {}),
            ("meanteacher", 1, {"changes": {"orientation": "fixed"}}),
            "[dataset] orientation",
        ),
        (("partial", 1, {}), ("ours", 1, {"hash": "other"}), "split.json's hash"),
    ],
)
def test_runs_of_different_settings_are_not_in_one_table(capsys, first, second, key):
    for name, seed, settings in first, second:
        make_run(name, seed, [0.5], **settings)
    expected = f"acdc_{first[0]}_0.1_s{first[1]} and acdc_{second[0]}_0.1_s1 differ in {key} ("
    assert run("report --scale reduced --out out") == 2
    assert expected in capsys.readouterr().err
    assert not Path("out/reduced.md").exists()


def test_orientation_counts_where_it_has_an_effect():
    for name in "partial", "ours":
        make_run(name, 0, [0.5])
        make_run(name, 1, [0.5], changes={"orientation": "fixed"})
    assert "orientation" not in report_of()


def test_labels_by_exam_are_not_beside_the_papers_numbers():
    for name in "partial", "ours":
        make_run(name, 0, [0.5], scale="exams")
    rows = table_of(report_of("exams"), "### 10% labeled")
    assert [row["paper"] for row in rows.values()] == ["-", "-"]
    assert "paper" not in rows["ours"]["minus partial"]


def test_the_commits_of_each_experiment_are_listed():
    for name, seed, commit in ("ours", 0, "a" * 40), ("ours", 1, "b" * 40), ("partial", 0, None), (
        "partial", 1, "c" * 40 + "-dirty",
    ):  # fmt: skip
        path = make_run(name, seed, [0.5]) / "manifest.json"
        path.write_text(json.dumps({"commit": commit}))
    assert "\nCommits: partial unknown, ccccccc-dirty; ours aaaaaaa, bbbbbbb\n" in report_of()


def test_folders_without_an_experiments_name_are_listed_and_left_out(capsys):
    folder = make_run("ours", 0, [0.5])
    folder.rename(folder.with_name("acdc_ours_0.3_s0"))
    folder = make_run("ours", 1, [0.5])
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("ratio = 0.1\n", ""))  # of a split file
    make_run("partial", 0, [0.5])
    assert list(table_of(report_of(), "### 10% labeled")) == ["partial"]
    assert (
        "left out, not named as runs of experiments: acdc_ours_0.1_s1; acdc_ours_0.3_s0\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("file", ["metrics.jsonl", "split.json", "manifest.json", "config.toml"])
def test_a_damaged_file_is_named(capsys, file):
    path = make_run("ours", 0, [0.5]) / file
    path.write_text('{"epoch": 1, "st')
    assert run("report --scale reduced --out out") == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), str(path) in err) == (1, True)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("report", "checkpoints/paper: no run"),
        ("keep --scale smoke", "checkpoints/smoke: no run"),
        ("report --from none.jsonl", "none.jsonl: no run"),
        ("report --from torn.jsonl", "torn.jsonl: line 2"),
        ("report --from twice.jsonl", "twice.jsonl: line 2 repeats acdc_ours_0.1_s0"),
        ("report --from picture.png", "error: picture.png: "),
        ("report --scale reduced --out tiny.toml", "--out tiny.toml"),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, line, named):
    make_run("ours", 0, [0.5])
    assert run("keep --scale reduced --out .") == 0
    Path("torn.jsonl").write_text(Path("reduced.jsonl").read_text() + '{"name": "ours"}\n')
    Path("twice.jsonl").write_text(2 * Path("reduced.jsonl").read_text())
    Image.new("L", (2, 2)).save("picture.png")
    capsys.readouterr()
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    assert named in err


# Figures


def test_the_learning_rate_is_that_of_section_3_3():
    folder = make_run("ours", 0, [0.5] * 4, lr=0.3)
    steps, rates = report.learning_rate(report.read_folder(folder))
    assert steps == [0, 10, 20, 30, 40]
    assert rates == pytest.approx([0.3, 0.3, 0.2, 0.1, 0])  # falls from epoch 1 to epoch 4


def named_like(dataset: str, name: str) -> str:
    """Another dataset's TOML under a name of its own."""
    Path(f"{name}.toml").write_text((CONFIG / f"{dataset}.toml").read_text())
    return f"{name}.toml"


def test_lines_of_a_figure_are_the_runs(monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, *_: drawn.append(figure))
    make_run("full", 0, [0.6, 0.7])
    for seed in range(2):
        make_run("partial", seed, [0.1, 0.3])
        make_run("ours", seed, [0.1, 0.2][: 2 - seed], n_epochs=2)
        make_run("ours", seed, [0.1, 0.2], ratio=0.2)
    runs, _ = report.read_runs(Path("checkpoints/reduced"))
    report.draw_curves(runs, Path("curves.png"))
    report.draw_schedule(runs, Path("schedule.png"))
    curves, schedule = ([axes for axes in figure.axes if axes.lines] for figure in drawn)
    panel = {"0.6": 1, "tab:blue": 2, "tab:red": 2}
    expected = {"ours, 10%": panel, "ours, 20%": {"0.6": 1, "tab:red": 2}}
    assert {axes.get_title(): Counter(map(Line2D.get_color, axes.lines)) for axes in curves} == (
        expected
    )
    upper, lower = schedule  # 20% has no Partial
    assert Counter(map(Line2D.get_color, upper.lines)) == {"C0": 2, "C1": 2}
    styles = [line.get_linestyle() for line in upper.lines]
    assert Counter(styles) == {"-": 3, "--": 1}
    assert lower.lines[0].get_drawstyle() == "steps-post"


def test_curves_name_only_what_they_show():
    make_run("ours", 0, [0.1, 0.2])
    assert "each panel shows one experiment.\n" in report_of()
    make_run("partial", 0, [0.1, 0.2])
    assert "each panel shows one experiment, partial.\n" in report_of()


def test_a_dataset_has_its_curves_and_ours_its_schedule():
    for seed in range(2):
        for name in "partial", "ours", "ours_kernel3":
            make_run(name, seed, [0.1, 0.2 + seed / 10])
    make_run("ours", 2, [0.1], n_epochs=2)
    make_run("partial", 0, [0.1, 0.3], dataset="phantom")
    make_run("partial", 0, [0.1, 0.3], dataset=named_like("phantom", "phantom_2"))
    page = report_of()
    names = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert names == [
        "reduced_acdc_curves.png", "reduced_acdc_schedule.png", "reduced_phantom_curves.png",
        "reduced_phantom_2_curves.png",
    ]  # fmt: skip
    before = {name: Path("out", name).read_bytes() for name in names}
    for name in names:
        with Image.open(Path("out", name)) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    report_of()
    assert {name: Path("out", name).read_bytes() for name in names} == before


# Kept logs


def test_a_report_from_a_kept_log_is_the_same_bytes():
    for seed in 0, 1:
        make_run("partial", seed, [0.5, 0.6 + seed / 10])
        make_run("ours_argmax", seed, [0.5, 0.7 - seed / 10])
        make_run("meanteacher", seed, [0.4, 0.7], dataset="phantom")
    report_of()
    assert run("keep --scale reduced --out kept") == 0
    assert run("report --from kept/reduced.jsonl --out again") == 0
    files = sorted(path.name for path in Path("out").iterdir())
    assert files == sorted(path.name for path in Path("again").iterdir())
    assert len(files) == 1 + 3 + 2
    for name in files:
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes(), name


def test_a_kept_line_has_what_a_report_needs_and_no_path():
    make_run("ours", 0, [0.5], init="/home/me/checkpoints/first/best.pt")
    assert run("keep --scale reduced --out kept") == 0
    text = Path("kept/reduced.jsonl").read_text()
    assert "/home" not in text
    line = json.loads(text)
    assert list(line) == "name run settings dataset evaluations versions split".split()
    assert (line["name"], line["run"]) == ("ours", "acdc_ours_0.1_s0")
    assert line["settings"]["init"] == "first/best.pt"
    assert not {"data_root", "workers", "eval_every", "diagnose"} & line["settings"].keys()
    assert line["split"] == {"labeled": 3, "unlabeled": 7, "val": 2, "hash": "0.1 0"}
    assert line["versions"] == {"torch": "2"}
    assert list(line["evaluations"][0]) == ["epoch", "step", "miou", "iou"]


def test_keep_adds_finished_runs_and_replaces_those_that_it_has(capsys):
    make_run("ours", 0, [0.5])
    assert run("keep --scale reduced --out kept") == 0
    Path("checkpoints").rename("first")
    make_run("ours", 0, [0.75])
    make_run("partial", 0, [0.5])
    make_run("partial", 1, [], n_epochs=1)  # not finished
    assert run("keep --scale reduced --out kept") == 0
    lines = [json.loads(line) for line in Path("kept/reduced.jsonl").read_text().splitlines()]
    found = [(line["run"], line["evaluations"][0]["miou"]) for line in lines]
    assert found == [("acdc_partial_0.1_s0", 0.5), ("acdc_ours_0.1_s0", 0.75)]
    Path("checkpoints").rename("second")
    make_run("ours", 1, [0.5], lambda2=0.5)
    before = Path("kept/reduced.jsonl").read_bytes()
    assert run("keep --scale reduced --out kept") == 2
    assert "differ in lambda2" in capsys.readouterr().err
    assert Path("kept/reduced.jsonl").read_bytes() == before


@pytest.mark.parametrize("log", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_committed_report_is_that_of_the_kept_log(log):
    assert run(f"report --from {log} --out again") == 0
    rebuilt = [path for path in Path("again").iterdir() if path.suffix in (".md", ".csv")]
    kept = [path for path in RESULTS.glob(f"{log.stem}*") if path.suffix in (".md", ".csv")]
    longer = tuple(path.stem for path in RESULTS.glob(f"{log.stem}?*.jsonl"))
    kept = [path for path in kept if not path.name.startswith(longer)]
    assert sorted(path.name for path in rebuilt) == sorted(path.name for path in kept)
    for path in rebuilt:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name
    for name in re.findall(r"!\[.*?\]\((.*?)\)", (RESULTS / f"{log.stem}.md").read_text()):
        assert (RESULTS / name).is_file(), name
