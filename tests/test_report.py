"""tools/report.py: the paper's numbers, what is read from runs, statistics, tables, kept logs."""

import csv
import itertools
import json
import re
import shutil
import statistics
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import runs
import scipy.stats
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D

import main
import utils
from datasets.spec import load_spec
from engine.flags import parse_args, setting_names
from engine.folder import to_toml
from tools import figures, plan
from tools.experiments import experiments
from tools.runs import read_folder, read_runs, results_of

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

pytestmark = pytest.mark.usefixtures("in_tmp")


RENDER = figures.save


@pytest.fixture(autouse=True)
def unrendered(monkeypatch):
    """Draw figures but leave their files empty: rendering takes most of a report's time."""
    monkeypatch.setattr(figures, "save", lambda _figure, _handles, path: path.touch())


def run(line: str) -> int:
    return runs.run(*line.split(), tool=experiments)


def error_line(capsys, line: str) -> str:
    return runs.error_line(capsys, *line.split(), tool=experiments)


def make_run(
    name: str, seed: int = 0, mious=(0.5,), *, dataset="acdc", ratio=0.1, scale="reduced",
    finished=True, changes=None, digest="", versions=None, **settings,
) -> Path:  # fmt: skip
    """A run's folder with its last evaluations, one per epoch of 10 steps.

    `changes` of the [dataset] table, `digest`: the hash of its split, `versions`: its manifest,
    `settings`: those that are not the plan's, None to leave one out.
    """
    ratio = 1.0 if name == "full" else ratio
    experiment = name if name in plan.EXPERIMENTS else "ours"
    args = parse_args(plan.command_flags((dataset, experiment, ratio), scale, seed, []))
    settings = args.settings | settings | {"data_root": "/home/me/data", "workers": 3}
    spec = load_spec(dataset)
    folder = Path(f"checkpoints/{scale}/{spec.name}_{name}_{ratio:g}_s{seed}")
    folder.mkdir(parents=True)
    table = to_toml(asdict(spec) | (changes or {}))
    (folder / "config.toml").write_text(f"{to_toml(settings)}[dataset]\n{table}")
    split = {"labeled": ["a"] * (3 + seed), "unlabeled": ["b"] * 5, "val": ["c"] * 2}
    split["hash"] = digest or f"{ratio} {seed}"
    (folder / "split.json").write_text(json.dumps(split))
    manifest = {"command": "main.py --data-root /home/me/data", "platform": "mine"}
    (folder / "manifest.json").write_text(json.dumps(manifest | (versions or {"torch": "2"})))
    first = args.epochs - len(mious) + 1 if finished else 1
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch, miou in enumerate(mious, first):
            iou = {label: (miou or 0) + k / 1000 for k, label in enumerate(spec.classes)}
            line = {"epoch": epoch, "step": 10 * epoch, "miou": miou, "iou": iou, "answers": {}}
            file.write(json.dumps(line) + "\n")
    return folder


def write_test(folder: Path, **changes) -> None:
    """Write the metrics.json of a run's last checkpoint."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    test = {"epoch": last["epoch"], "miou": last["miou"]} | changes
    (results_of(folder) / "metrics.json").write_text(json.dumps(test))


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
    assert plan.paper_scores() == expected
    assert plan.EXPERIMENTS["ours"]["table2"] == {"voc": {"0.2": 0.2981}}


def test_columns_of_tables_3_and_4_average_to_table_1_except_in_three_cells():
    iou, scores = plan.paper_iou(), plan.paper_scores()
    assert len(iou) == 2 * 2 * 3
    assert {key[0]: len(values) for key, values in iou.items()} == {"voc": 20, "cityscapes": 19}
    off = {key: round(1e4 * (statistics.mean(iou[key]) - scores[key]), 1) for key in iou}
    assert {key: units for key, units in off.items() if abs(units) > 2} == {
        ("voc", 0.3, "ours"): 19.8,
        ("voc", 0.1, "ours"): 3.5,
        ("cityscapes", 0.2, "ours"): -3.6,
    }


# Tables


def test_scores_are_over_seeds_beside_the_papers_number():
    for seed, mious in enumerate([[0.2, 0.6, 0.5], [0.7, 0.6, 0.6], [0.1, 0.2, 0.85]]):
        make_run("partial", seed, mious)
    make_run("ours", 0, [0.1, None])  # without a scored class
    make_run("partial", 0, [0.75], ratio=0.2)
    make_run("full", 0, [0.1, 0.2, 0.9])
    rows = table_of(report_of(), "### mIoU")
    assert list(rows) == ["full", "partial", "ours"]
    assert list(rows["full"].values())[1:4] == ["-", "-", "0.9000 (n = 1); paper 0.8982"]
    assert rows["ours"]["10%"] == "0.0000 (n = 1); paper 0.8463"
    assert rows["partial"] == {
        "experiment": "partial", "10%": "0.6500 ± 0.1803 (n = 3); paper 0.8418",
        "20%": "0.7500 (n = 1); paper 0.8642", "100%": "-", "flags": "`--method supervised`",
    }  # fmt: skip
    row = rows_of_csv("reduced.csv")[0]
    keys = ("last", "last_sd", "best", "labeled", "unlabeled", "val", "steps")
    expected = ["0.65", f"{0.0325**0.5:.6f}", "0.716667", "3 to 5", "5", "2", "500"]
    assert [row[key] for key in keys] == expected


def test_differences_are_paired_by_seed():
    for seed, miou in {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}.items():
        make_run("partial", seed, [0.9, miou], ratio=0.2)
    for seed, miou in {1: 0.25, 2: 0.39, 3: 0.5, 4: 0.0}.items():
        make_run("ours", seed, [0.5, miou], ratio=0.2)
    make_run("partial", 0, [0.4, 0.5], ratio=0.5)
    make_run("ours_kernel3", 0, [0.4, 0.47], ratio=0.5)
    rows = table_of(report_of(), "### Difference to partial")
    scale = scipy.stats.sem([0.05, 0.09, 0.1])
    low, high = scipy.stats.t.interval(0.95, 2, loc=0.08, scale=scale)
    overlap = (2 + 2 + 2) / (9 + 10 + 11)  # validation images to training images, three seeds
    reach = (high - 0.08) * (1 + 3 * overlap) ** 0.5  # Nadeau and Bengio's
    expected = f"+0.0800 [{low:+.4f}, {high:+.4f}], corrected "
    expected += f"[{0.08 - reach:+.4f}, {0.08 + reach:+.4f}] (n = 3); paper +0.0046"
    assert rows["ours minus partial"]["20%"] == expected
    assert rows["ours minus partial"]["50%"] == "-"
    assert rows["ours_kernel3 minus partial"]["50%"] == "-0.0300 (n = 1)"
    assert len(rows) == 2
    row = next(row for row in rows_of_csv("reduced_differences.csv") if row["ratio"] == "0.2")
    found = [row[key] for key in ("name", "minus", "n", "last", "best")]
    assert found == ["ours", "partial", "3", "0.08", "-0.4"]


def test_experiments_are_compared_with_those_of_the_plan():
    control, itself = "meanteacher_labeled", "the same without --augment"
    for scale, name, expected in [
        ("reduced", "ours", {"partial": "partial"}),
        ("reduced", "partial", {}),
        ("reduced", "meanteacher", {"partial": "partial", control: control}),
        ("exams", "ours_sum", {"partial": "partial", control: control}),
        ("exams", "partial_augment", {control: f"{control}_augment", itself: "partial"}),
        ("exams", "ours_augment", {"partial": "partial_augment", control: f"{control}_augment",
                                   itself: "ours"}),
    ]:  # fmt: skip
        assert plan.references(name, scale) == expected, (scale, name)


def test_classes_are_beside_those_of_tables_3_and_4():
    for seed, miou in enumerate([0.3, 0.4]):
        make_run("ours", seed, [0.9, miou], dataset="cityscapes")
    make_run("partial", dataset="voc", ratio=0.3)
    page = report_of()
    ours = table_of(page, "### IoU of each class (Table 4)")["ours, 10%"]
    assert list(ours)[1:] == list(load_spec("cityscapes").classes[:19])
    assert (ours["road"], ours["bicycle"]) == ("0.3500 (0.9369)", "0.3680 (0.2611)")
    partial = table_of(page, "### IoU of each class (Table 3)")["partial, 30%"]
    assert list(partial)[1] == "aeroplane"  # Table 3 has no background
    assert partial["aeroplane"] == "0.5010 (0.5798)"


def test_a_class_that_does_not_occur_is_left_out_of_its_mean():
    for seed in range(2):
        path = make_run("partial", seed, dataset="phantom") / "metrics.jsonl"
        line = json.loads(path.read_text())
        line["iou"] |= {"myocardium": None, "left ventricle": None if seed else 0.25}
        path.write_text(json.dumps(line))
    row = table_of(report_of(), "### IoU of each class")["partial, 10%"]
    assert row["myocardium"] == "-"
    assert row["left ventricle"] == "0.2500 (n = 1)"
    classes = {row["class"]: row["n"] for row in rows_of_csv("reduced_classes.csv")}
    assert [classes[name] for name in ("background", "myocardium", "left ventricle")] == [*"201"]


def test_a_section_has_the_shared_flags_the_commits_and_the_unfinished_runs():
    make_run("partial", 0, [0.5, 0.6, 0.7, 0.8], versions={"commit": None})
    make_run("partial", 1, [0.1, 0.2], finished=False, versions={"commit": "c" * 40 + "-dirty"})
    make_run("ours_kernel3", 0, [0.3], finished=False, versions={"commit": "a" * 40})
    make_run("ours_kernel3", 1, versions={"commit": "b" * 40})
    make_run("hung", 0, [], finished=False)
    page = report_of()
    assert "\nAll runs: `--size 64 64 --epochs 50 --decay-epoch 12 --ngf 16 --ndf 16`\n" in page
    commits = "hung unknown; partial unknown, ccccccc-dirty; ours_kernel3 aaaaaaa, bbbbbbb"
    assert f"\nCommits: {commits}\n" in page
    names = "acdc_hung_0.1_s0 (epoch 0 of 50), acdc_partial_0.1_s1 (epoch 2 of 50), "
    names += "acdc_ours_kernel3_0.1_s0 (epoch 1 of 50)"
    assert f"\nUnfinished, and in no mean: {names}\n" in page
    rows = table_of(page, "### mIoU")
    assert {name: (row["10%"], row["flags"]) for name, row in rows.items()} == {
        "partial": ("0.8000 (n = 1); paper 0.8418", "`--method supervised`"),
        "ours_kernel3": ("0.5000 (n = 1)", "`--method cyclegan --disc-kernel 3`"),
    }


def test_scores_of_whole_volumes_are_over_the_seeds_that_have_them():
    for seed, dice in enumerate([0.5, 0.7, None]):
        folder = make_run("partial", seed)
        results_of(folder).mkdir(parents=True)
        mean = {"dice": dice, "hd95_mm": 12.0 + seed, "assd_mm": None}
        classes = {"a": {"n": 22, "missed": 3 + seed, "invented": 2}, "b": {"n": 20, "missed": 0}}
        scores = {"all": {"mean": mean, "classes": classes}}
        write_test(folder, volumes={} if dice is None else scores)
    row = table_of(report_of(), "### Scores of whole volumes")["partial, 10%"]
    assert row == {
        "experiment": "partial, 10%", "n": "2", "Dice": "0.6000 ± 0.1414",
        "HD95, mm": "12.50 ± 0.71", "ASSD, mm": "-", "missed": "8.8%",
    }  # fmt: skip
    assert rows_of_csv("reduced_volumes.csv")[0]["dice"] == "0.6"


def test_volumes_of_which_none_is_complete_have_no_scores():
    folder = make_run("partial")
    results_of(folder).mkdir(parents=True)
    mean = dict.fromkeys(("dice", "hd95_mm", "assd_mm"))
    write_test(folder, volumes={"all": {"mean": mean, "classes": {"a": {"n": 0, "missed": 0}}}})
    row = table_of(report_of(), "### Scores of whole volumes")["partial, 10%"]
    assert {*row.values()} == {"partial, 10%", "1", "-"}


# Settings


def test_runs_that_are_not_the_scales_are_refused(capsys):
    make_run("full")
    make_run("partial", 1, size=[32, 32])
    make_run("ours_kernel3", 1, disc_kernel=1)
    error = error_line(capsys, "report --scale reduced --out out")
    wrong = "acdc_partial_0.1_s1: --size is [32, 32], expected [64, 64]; "
    wrong += "acdc_ours_kernel3_0.1_s1: --disc-kernel is 1, expected 3"
    assert error.endswith(f"not runs of scale reduced: {wrong}")
    assert not Path("out").exists()


def test_reports_and_kept_logs_are_beside_their_runs_or_log():
    folder = make_run("ours", scale="smoke").parent
    assert run("report --scale smoke") == run("keep --scale smoke") == 0
    assert {"smoke.md", "smoke.csv"} < {path.name for path in folder.iterdir()}
    Path("kept").mkdir()
    (folder / "smoke.jsonl").rename("kept/smoke.jsonl")
    assert run("report --from kept/smoke.jsonl") == 0
    assert Path("kept/smoke.md").is_file()


def test_runs_share_labels_split_and_what_neither_scale_nor_experiment_sets(capsys):
    make_run("partial")
    changes = {"void": 3, "scored": [0, 1, 2], "ignore": 9, "orientation": "fixed"}
    make_run("ours", changes=changes, digest="other")
    make_run("partial", dataset="tiny.toml")
    make_run("ours", dataset="tiny.toml", lr=0.5)
    error = error_line(capsys, "report --scale reduced --out out")
    assert "acdc_partial_0.1_s0 and acdc_ours_0.1_s0 differ in [dataset] scored (" in error
    keys = re.findall(r"differ in (.*?) \(", error)
    found = ["[dataset] scored", "[dataset] ignore", "[dataset] void", "[dataset] orientation"]
    assert keys == [*found, "split.json's hash", "lr"]
    assert not Path("out").exists()


def test_a_run_with_flags_that_no_longer_exist_names_its_commit(capsys):
    make_run("ours", ema=0.5, cycle_input="softmax", versions={"commit": "abc123"})
    error = error_line(capsys, "report --scale reduced")
    words = "--cycle-input --ema no longer exist; read it with commit abc123"
    assert error.endswith(f"acdc_ours_0.1_s0: {words}")


def test_a_flag_that_a_run_is_older_than_has_its_default():
    folder = make_run("ours", pool_size=None)
    make_run("ours", 1)
    assert read_folder(folder).settings["pool_size"] == 0
    report_of()


def test_labels_by_exam_are_numbers_of_exams_and_not_beside_the_papers_numbers():
    make_run("ours", scale="exams")
    make_run("ours", scale="exams", ratio=0.04)
    make_run("full", scale="exams")
    page = report_of("exams")
    titles = list(table_of(page, "### mIoU")["ours"])
    assert titles == ["experiment", "3 exams", "8 exams", "100%", "flags"]
    assert "paper 0" not in page


def test_folders_without_an_experiments_name_are_listed_and_left_out(capsys):
    folder = make_run("ours")
    folder.rename(folder.with_name("acdc_ours_0.3_s0"))
    make_run("ours", 1, ratio=0.2)
    config = Path("checkpoints/reduced/acdc_ours_0.2_s1/config.toml")
    config.write_text(config.read_text().replace("ratio = 0.2\n", ""))  # of a split file
    make_run("mine", ema=0.5)
    make_run("partial")
    assert list(table_of(report_of(), "### mIoU")) == ["partial"]
    names = "acdc_mine_0.1_s0; acdc_ours_0.2_s1; acdc_ours_0.3_s0"
    expected = f"left out, not named as runs of experiments: {names}\n"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("file", ["metrics.jsonl", "split.json", "manifest.json", "config.toml"])
def test_a_damaged_file_is_named(capsys, file):
    path = make_run("ours") / file
    path.write_text('{"epoch": 1, "st')
    assert str(path) in error_line(capsys, "report --scale reduced --out out")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("report", "checkpoints/paper: no run"),
        ("report --from torn.jsonl --scale reduced", "torn.jsonl: line 2"),
        ("report --from other.jsonl", "unknown scale 'other'; give --scale"),
        ("report --from twice.jsonl", "twice.jsonl: line 2 repeats acdc_ours_0.1_s0"),
        *(
            (f"report --from {key}.jsonl", f"{key}.jsonl: line 1 is not a kept run")
            for key in ("hash", "iou", "miou", "classes", "versions", "name")
        ),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, line, named):
    make_run("ours")
    assert run("keep --scale reduced --out .") == 0
    text = Path("reduced.jsonl").read_text()
    Path("other.jsonl").write_text(text)
    Path("torn.jsonl").write_text(text + '{"name": "ours"}\n')
    Path("twice.jsonl").write_text(2 * text)
    for key in "hash", "iou", "miou", "classes", "versions", "name":
        Path(f"{key}.jsonl").write_text(text.replace(f'"{key}": ', f'"no {key}": '))
    assert named in error_line(capsys, line)
    assert not list(Path("checkpoints").glob("[ps]*"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("evaluations", -1, "miou"), "0.5"),
        (("evaluations", -1, "miou"), 10**30),
        (("evaluations", -1, "miou"), 87.5),  # in %
        (("evaluations", -1, "miou"), -0.1),
        (("volumes", "all", "mean", "dice"), 1.5),
        (("evaluations", -1, "epoch"), None),
        (("split", "labeled"), "3"),
        (("versions", "commit"), 7),
        (("dataset", "name"), 7),
        (("dataset", "name"), ["acdc"]),
        (("dataset", "name"), "../acdc"),
        (("settings", "seed"), "0"),
        (("volumes", "all", "mean", "dice"), {}),
        (("volumes", "all", "classes", "a", "missed"), 10**400),
        (("volumes", "all", "classes"), "a"),
        (("volumes",), 7),
    ],
)
def test_a_kept_line_with_a_value_of_another_type_is_named(capsys, place, value):
    make_run("ours")
    assert run("keep --scale reduced --out .") == 0
    line = json.loads(Path("reduced.jsonl").read_text())
    means = dict.fromkeys(("dice", "hd95_mm", "assd_mm"), 0.5)
    line["volumes"] = {"all": {"mean": means, "classes": {"a": {"n": 2, "missed": 1}}}}
    Path("reduced.jsonl").write_text(json.dumps(line))
    assert run("report --from reduced.jsonl --out good") == 0
    table = line
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    Path("reduced.jsonl").write_text(json.dumps(line))
    error = error_line(capsys, "report --from reduced.jsonl --out out")
    assert "reduced.jsonl: line 1 is not a kept run" in error


def test_a_log_to_which_another_command_adds_runs_is_waited_for(monkeypatch):
    make_run("ours")
    assert run("keep --scale reduced --out kept") == 0
    make_run("ours", 1)
    asked = []

    @contextmanager
    def exclusive(folder, seconds):
        asked.append((folder, seconds))
        text = Path("kept/reduced.jsonl").read_text()  # a run that the other command adds
        other = json.loads(text) | {"run": "acdc_ours_0.1_s7"}
        other["settings"]["seed"] = 7
        Path("kept/reduced.jsonl").write_text(f"{text}{json.dumps(other)}\n")
        yield True

    monkeypatch.setattr("utils.exclusive", exclusive)
    assert run("keep --scale reduced --out kept") == 0
    assert asked == [(Path("kept"), utils.PATIENCE)]
    lines = Path("kept/reduced.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["seed"] for line in lines] == [0, 1, 7]


# Figures


def test_lines_of_a_figure_are_the_runs(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: drawn.append(figure))
    make_run("full", 0, [0.6, 0.7])
    for seed in range(2):
        make_run("partial", seed, [0.1, 0.3])
        make_run("ours", seed, [0.1, 0.2][: 2 - seed], finished=seed == 0)
        make_run("ours", seed, [0.1, 0.2], ratio=0.2)
    make_run("partial_augment", 0, [0.2, 0.4])
    make_run("ours_augment", 0, [0.2, 0.9])
    found, _ = read_runs(Path("checkpoints/reduced"), "reduced")
    caption = figures.draw_curves(found, Path())
    assert "shows Partial, the experiment, Full. Panels of experiments with --augment" in caption
    panels = {axes.get_title(): axes.lines for axes in drawn[0].axes if axes.lines}
    panel = {"0.6": 1, "tab:blue": 2, "tab:red": 2}
    assert {title: Counter(map(Line2D.get_color, lines)) for title, lines in panels.items()} == {
        "ours, 10%": panel,
        "ours, 20%": {"0.6": 1, "tab:red": 2},
        "partial_augment, 10%": {"0.6": 1, "tab:blue": 2, "tab:red": 1},
        "ours_augment, 10%": {"0.6": 1, "tab:blue": 1, "tab:red": 1},
    }
    for axes in drawn[0].axes:
        assert all(line.get_ydata().max() <= axes.get_ylim()[1] for line in axes.lines)
    styles = [line.get_linestyle() for line in panels["ours, 10%"]]
    assert Counter(styles) == {"-": 4, "--": 1}


def test_the_chart_is_the_mean_score_of_each_method_by_labeled_exams(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda *parts: drawn.append(parts))
    for seed in range(2):
        for ratio in 0.1, 0.04:
            for name in "partial", "ours":
                make_run(name, seed, [ratio + seed / 10], scale="exams", ratio=ratio)
    make_run("full", 0, [0.75], scale="exams")
    make_run("partial", 2, [0.9], scale="exams", finished=False)
    variant = "ours_sum_without_cycle_I"  # exists with --augment only
    make_run(f"{variant}_augment", 0, [0.5], scale="exams")
    found, _ = read_runs(Path("checkpoints/exams"), "exams")
    assert figures.draw_labels(found, Path())
    figure, handles, _ = drawn[0]
    axes, augmented = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["no augmentation", "--augment"]
    assert augmented.containers[0].lines[0].get_ydata() == pytest.approx([0.5])
    lines = [container.lines[0] for container in axes.containers]
    for line in lines:
        assert line.get_xdata() == pytest.approx([3, 8], abs=0.1)
        assert line.get_ydata() == pytest.approx([0.09, 0.15])
    (bars,) = axes.containers[0].lines[2]
    ends = [segment[:, 1] for segment in bars.get_segments()]
    assert ends[1] == pytest.approx([0.15 - 0.005**0.5, 0.15 + 0.005**0.5])
    assert axes.lines[-1].get_ydata() == [0.75, 0.75]
    titles = ["Partial", "Ours", "Full", "Ours, sums, without L_cycle^I"]
    assert [handle.get_label() for handle in handles] == titles
    assert figures.draw_labels([run for run in found if run.n_exams == 8], Path()) == ""


def test_each_line_of_the_chart_looks_different(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, handles, _: drawn.append(handles))
    names = [name for name in plan.EXPERIMENTS if name != "full" and "augment" not in name]
    for name, ratio in itertools.product(names, (0.04, 0.1)):
        make_run(name, scale="exams", ratio=ratio)
    figures.draw_labels(read_runs(Path("checkpoints/exams"), "exams")[0], Path())
    looks = {(to_rgba(line.get_color()), line.get_marker()) for line in drawn[0]}
    assert len(looks) == len(names) > 10


def test_two_ratios_that_label_as_many_exams_are_refused(capsys):
    for ratio in 0.1, 0.107:
        make_run("partial", scale="exams", ratio=ratio)
    error = error_line(capsys, "report --scale exams")
    assert "acdc_partial_0.1_s0 and acdc_partial_0.107_s0 differ in ratio (0.1, 0.107)" in error


def test_a_report_leaves_no_table_or_figure_of_an_earlier_one():
    make_run("partial")
    other = make_run("ours")
    report_of()
    assert Path("out/reduced_differences.csv").is_file()
    shutil.rmtree(other)
    Path("out/reduced_acdc_labels.png").touch()
    report_of()
    assert {path.name for path in Path("out").iterdir()} == {
        "reduced.md", "reduced.csv", "reduced_classes.csv", "reduced_acdc_curves.png",
    }  # fmt: skip


def test_a_linked_folder_has_the_scale_of_its_own_name():
    make_run("partial")
    Path("checkpoints/reduced").rename("moved")
    Path("checkpoints/reduced").symlink_to(Path("moved").resolve())
    assert run("report --from checkpoints/reduced --out out") == 0


# Kept logs


def test_a_report_from_a_kept_log_is_the_same_bytes(monkeypatch):
    monkeypatch.setattr("tools.figures.save", RENDER)
    for seed in 0, 1:
        make_run("partial", seed, [0.5, 0.6 + seed / 10])
        make_run("ours_argmax", seed, [0.5, 0.7 - seed / 10])
        make_run("meanteacher", seed, [0.4, 0.7], dataset="phantom")
    figures = re.findall(r"!\[.*?\]\((.*?)\)", report_of())
    assert figures == ["reduced_acdc_curves.png", "reduced_phantom_curves.png"]
    assert run("keep --scale reduced --out kept") == 0
    assert run("report --from kept/reduced.jsonl --out again") == 0
    files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    tables = {"reduced.csv", "reduced_classes.csv", "reduced_differences.csv"}
    assert files.keys() == {"reduced.md", *tables, *figures}
    assert files == {path.name: path.read_bytes() for path in Path("again").iterdir()}


def test_a_kept_line_has_what_a_report_needs_and_no_path():
    folder = make_run("ours")
    results_of(folder).mkdir(parents=True)
    of_others = {"epoch": 48}, {"miou": 0.1}  # an older checkpoint; a deleted run of this name
    for other in *of_others, {}:
        write_test(folder, **{"volumes": {"dice": 0.6}} | other)
        assert run("keep --scale reduced --out kept") == 0
        text = Path("kept/reduced.jsonl").read_text()
        assert json.loads(text)["volumes"] == ({} if other else {"dice": 0.6})
    shutil.rmtree("results")
    assert run("keep --scale reduced --out kept") == 0
    assert Path("kept/reduced.jsonl").read_text() == text
    assert "/home" not in text
    line = json.loads(text)
    assert list(line) == "name run settings dataset evaluations versions split volumes".split()
    assert line["settings"].keys() == set(setting_names())
    assert line["split"] == {"labeled": 3, "unlabeled": 5, "val": 2, "hash": "0.1 0"}
    assert line["versions"] == {"torch": "2"}
    assert list(line["evaluations"][0]) == ["epoch", "step", "miou", "iou"]


def test_keep_adds_finished_runs_and_replaces_those_that_it_has(capsys):
    make_run("ours")
    assert run("keep --scale reduced --out kept") == 0
    Path("checkpoints").rename("first")
    make_run("ours", 0, [0.75])
    make_run("partial")
    make_run("partial", 1, [], finished=False)
    assert run("keep --scale reduced --out kept") == 0
    lines = [json.loads(line) for line in Path("kept/reduced.jsonl").read_text().splitlines()]
    found = [(line["run"], line["evaluations"][0]["miou"]) for line in lines]
    assert found == [("acdc_partial_0.1_s0", 0.5), ("acdc_ours_0.1_s0", 0.75)]
    Path("checkpoints").rename("second")
    make_run("partial", digest="other")
    before = Path("kept/reduced.jsonl").read_bytes()
    error = error_line(capsys, "keep --scale reduced --out kept")
    assert "differ in split.json's hash" in error
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
