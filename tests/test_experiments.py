"""tools/experiments.py: the paper's numbers, the commands, the runs, and the report on what they left."""

import csv
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
from conftest import Parts, make_tiny
from PIL import Image

import main
from data_utils import load_spec
from tools import experiments, report

TABLE_1 = """
Full        1    0.5543 0.5551 0.8982
Hung et al. 0.2  0.2032 0.3490 0.8063
Partial     0.5  0.4108 0.4856 0.8863
Partial     0.3  0.3237 0.4502 0.8785
Partial     0.2  0.2688 0.4112 0.8642
Partial     0.1  0.2158 0.3636 0.8418
Ours        0.5  0.4197 0.4997 0.8890
Ours        0.3  0.3514 0.4654 0.8804
Ours        0.2  0.2981 0.4321 0.8688
Ours        0.1  0.2543 0.3923 0.8463
"""
TINY = "--size 16 16 --ngf 2 --ndf 2 --n-blocks 1 --epochs 2 --workers 0 --device cpu".split()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """A folder of its own, with tiny.toml: 24 phantoms, 20 to train on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.stop, "signum", 0)
    make_tiny(20, 4)


def run(line: str, *extra: str) -> int:
    return main.main([*line.split(), *(["--", *extra] if extra else [])], experiments.experiments)


def cell(dataset: str, method: str, ratio: float, without: str = "", table: int = 1) -> report.Cell:
    return report.Cell(table, dataset, method, ratio, without)


def make_run(of: report.Cell, seed: int, mious: list[float], scale: str = "small", n_epochs: int = 0, extra=()) -> Path:
    """A run's folder with the three files that a report reads: an evaluation an epoch of 10 steps."""
    n_epochs = n_epochs or len(mious)
    flags = experiments.flags_of(of, scale, seed, extra=["--epochs", str(n_epochs), *extra])
    args, spec = main.parse_args(flags), load_spec(of.dataset)
    folder = Path(args.checkpoints) / args.name
    folder.mkdir(parents=True)
    main.make_run_folder(folder, args, spec, Parts())
    lines = [
        {
            "epoch": n,
            "step": 10 * n,
            "miou": miou,
            "iou": {name: miou + k / 1000 for k, name in enumerate(spec.classes)},
        }
        for n, miou in enumerate(mious, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the report."""
    table = re.search(rf"^### {re.escape(heading)}\n\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    return [[each.strip() for each in line[1:-1].split("|")] for line in table.splitlines()][2:]


def report_of(scale: str = "small") -> str:
    assert run(f"report --scale {scale} --out out") == 0
    return Path(f"out/{scale}.md").read_text()


# The paper's numbers


def test_cells_of_table_1_are_the_papers():
    expected = {}
    for line in TABLE_1.strip().splitlines():
        ratio, *numbers = map(float, line[12:].split())
        for dataset, number in zip(("voc", "cityscapes", "acdc"), numbers, strict=True):
            expected[dataset, line[:12].strip(), ratio] = number
    cells = [cell for cell in report.paper_cells() if cell.table == 1]
    assert {(c.dataset, c.key.title, c.ratio): c.paper for c in cells} == expected
    assert len(cells) == len(expected) == 30
    assert not any(c.without for c in cells)


def test_cells_of_table_2_are_the_papers():
    numbers = {"": 0.2981, "cycle_S": 0.2627, "cycle_I": 0.2733, "disc_S": 0.2614, "disc_I": 0.2543}
    cells = experiments.select(table=2)
    assert {cell.without: cell.paper for cell in cells} == numbers
    assert {(cell.dataset, cell.method, cell.ratio) for cell in cells} == {("voc", "cyclegan", 0.2)}


def test_columns_of_tables_3_and_4_give_table_1_but_in_three_cells():
    numbers = {cell.key: cell.paper for cell in report.paper_cells() if cell.table == 1}
    cells = [cell for cell in report.paper_cells() if cell.table in (3, 4)]
    assert {(c.table, c.dataset, len(c.iou)) for c in cells} == {(3, "voc", 20), (4, "cityscapes", 19)}
    assert len({c.key for c in cells}) == len(cells) == 12
    off = {c.key: round(1e4 * (statistics.mean(c.iou) - numbers[c.key]), 1) for c in cells}
    assert {key: units for key, units in off.items() if abs(units) > 2} == {
        ("voc", "cyclegan", 0.3, ""): 19.8, ("voc", "cyclegan", 0.1, ""): 3.5,
        ("cityscapes", "cyclegan", 0.2, ""): -3.6,
    }  # fmt: skip
    rounded = {key: round(units) for key, units in off.items() if 0.5 < abs(units) <= 2}  # the last digit, rounding
    assert rounded == {
        ("voc", "supervised", 0.1, ""): -1, ("voc", "supervised", 0.2, ""): -1,
        ("cityscapes", "cyclegan", 0.1, ""): -2, ("cityscapes", "cyclegan", 0.3, ""): -1,
    }  # fmt: skip
    assert cells[0].iou[:2] == (0.4236, 0.2046)
    assert cells[-1].iou[-1] == 0.3618


# Commands


@pytest.mark.parametrize("scale", sorted(experiments.SCALES.keys() - {"study"}))
@pytest.mark.parametrize("which", ["", "--dataset phantom", "--dataset tiny.toml", "--table 2 --dataset acdc"])
def test_every_listed_command_is_understood(capsys, scale, which):
    assert run(f"list --scale {scale} {which}") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == {"": 30 + 5 + 6 + 6, "--table 2 --dataset acdc": 5}.get(which, 1 + 4 * 4)
    for line in lines:
        program, script, *flags = shlex.split(line[line.index("python") :])
        assert (program, Path(script).resolve()) == ("python", Path(main.__file__))
        args = main.parse_args(flags)
        key = report.Key(Path(args.dataset).stem, args.method, args.ratio, line[41:48].strip())
        assert key.title == line[19:31].strip()
        assert (args.checkpoints, args.name) == (f"checkpoints/{scale}", key.run(0))
        weights = {term: getattr(args, weight) for term, weight in report.ABLATIONS.items()}
        assert {term for term, weight in weights.items() if weight == 0} == {key.without} - {""}
        if scale == "paper" and key.dataset in report.TITLES:
            assert (args.epochs, args.ngf, args.lr) == (400, 64, 2e-4)


def test_cells_are_listed_in_the_papers_order():
    cells = experiments.select(table=1)
    lines = [line[:12].strip() for line in TABLE_1.strip().splitlines()]
    assert [c.key.title for c in cells] == lines * 3
    assert [c.dataset for c in cells] == ["voc"] * 10 + ["cityscapes"] * 10 + ["acdc"] * 10
    assert [c.ratio for c in cells[:10]] == [1, 0.2, *[0.5, 0.3, 0.2, 0.1] * 2]


def test_names_and_flags_of_a_run():
    flags = experiments.flags_of(cell("acdc", "cyclegan", 0.1, "disc_S"), "small", 2, "my data", ["--lambda4", "3"])
    assert shlex.join(flags) == (
        "--training --dataset acdc --method cyclegan --ratio 0.1 --seed 2 --size 64 64 --ngf 16 --epochs 4 --lr 1e-3 "
        "--data-root 'my data' --lambda4 3 --lambda4 0 "
        "--checkpoints checkpoints/small --name acdc_cyclegan_0.1_s2_without_disc_S"
    )
    assert main.parse_args(flags).lambda4 == 0  # whatever stands after --


def test_phantoms_small_scale_has_the_papers_weights():
    args = main.parse_args(experiments.flags_of(cell("phantom", "cyclegan", 0.5), "small"))
    assert [getattr(args, f"lambda{k}") for k in range(1, 6)] == [1, 0.05, 1, 1, 1]
    assert args.epochs == 16


def test_run_takes_the_cells_that_are_asked_for_and_shared_ones_once(capsys, monkeypatch):
    monkeypatch.setattr(experiments, "run_all", None)
    assert run("run --dry-run --dataset voc --methods cyclegan --ratios 0.2 0.1 --seeds 0 1", "--lr", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [main.parse_args(shlex.split(line)[2:]).name for line in lines]
    terms = [f"_without_{term}" for term in report.ABLATIONS]
    ones = [f"voc_cyclegan_{ratio}_s{seed}" for seed in (0, 1) for ratio in (0.2, 0.1)]
    assert sorted(names) == sorted([*ones, *(f"voc_cyclegan_0.2_s{seed}{term}" for seed in (0, 1) for term in terms)])
    assert all(main.parse_args(shlex.split(line)[2:]).lr == 0.5 for line in lines)
    assert [name.split("_s")[1][0] for name in names] == ["0"] * 6 + ["1"] * 6  # a whole table first
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "list|run|report|keep"),
        ("list --table 5", "--table"),
        ("list --dataset nothere", "--dataset nothere"),
        ("list --dataset none.toml", "none.toml"),
        ("run --scale large", "--scale"),
        ("run --table 4 --dataset voc", "--dataset"),
        ("run --table 1 --dataset acdc --ablations disc_S", "--ablations"),
        ("run --table 1 --dataset acdc --ratios 0.4", "--ratios"),
        ("run --ratios 0", "--ratios"),
        ("run --jobs 0", "--jobs"),
        ("run --data-root here", "--data-root"),
        ("run --dataset phantom -- --seed 3", "--seed"),
        ("run --dataset phantom -- --data-root here", "--data-root"),
        ("run --dataset phantom -- --epoch 3", "--epoch"),
        ("run --dataset phantom -- --testing", "--testing"),
        ("run --dataset wrong.toml", "'epocs'"),
        ("report", "checkpoints/paper"),
        ("report --scale small --checkpoints checkpoints/paper", "named small"),
        ("report --checkpoints torn", "metrics.jsonl"),
        ("report --checkpoints checkpoints/small --out tiny.toml", "--out tiny.toml"),
        ("keep --scale smoke", "checkpoints/smoke"),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, monkeypatch, line, named):
    monkeypatch.setattr(experiments, "run_all", None)
    Path("wrong.toml").write_text("epocs = 3\n" + Path("tiny.toml").read_text())
    folder = make_run(cell("phantom", "supervised", 0.5), 0, [0.5])
    folder.parent.rename("torn")
    Path("torn", folder.name, "metrics.jsonl").write_text('{"epoch": 1, "st')
    make_run(cell("phantom", "supervised", 0.5), 0, [0.5])
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    assert named in err


# Running


class Here:
    """Stands for subprocess.Popen: main.py in this process, which is done at once."""

    def __init__(self, line: list[str], stdout, **_):
        text = io.TextIOWrapper(stdout, write_through=True)
        with redirect_stdout(text), redirect_stderr(text):
            main.stop.signum = 0
            self.returncode = main.main(line[2:])
        text.detach()

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(Popen=Here, STDOUT=None, DEVNULL=None))


def test_the_same_command_again_skips_what_is_finished_and_goes_on_with_what_was_cut(capsys, monkeypatch, here):
    line = "run --scale smoke --dataset tiny.toml --methods supervised cyclegan --ratios 0.5 --jobs 2"
    folder, partial, ours = Path("checkpoints/smoke"), "tiny_supervised_0.5_s0", "tiny_cyclegan_0.5_s0"
    step = main.METHODS["cyclegan"].step

    def cut(self, *batch):
        main.stop.signum = signal.SIGTERM
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(main.METHODS["cyclegan"], "step", cut)
        assert run(line, *TINY) == 1
    out = capsys.readouterr().out
    last = json.loads((folder / partial / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 2
    assert re.search(rf"^start {partial}: python .*main.py --training .* --name {partial}$", out, re.MULTILINE)
    assert re.search(
        rf"^end   {partial}: finished in 0:\d\d:\d\d, mIoU {last['miou']:.4f}, best 0\.", out, re.MULTILINE
    )
    assert f"end   {ours}: exit code 143 after 0:" in out
    before = {path: path.read_bytes() for path in (folder / partial).iterdir()}

    assert run(line.replace("cyclegan ", ""), *TINY) == 0
    assert f"end   {partial}: was finished, mIoU {last['miou']:.4f}" in capsys.readouterr().out
    monkeypatch.setattr(experiments, "subprocess", subprocess)  # in a process of its own
    assert run(line.replace("supervised ", ""), *TINY) == 0
    assert f"end   {ours}: finished in " in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    log = (folder / f"{ours}.log").read_text()
    assert 0 < log.index("SIGTERM: saved") < log.index("resuming at epoch 1, step 1")
    assert report.read_run(folder / ours).finished


def test_a_failing_cell_is_named_at_the_end_and_the_others_run(capsys, here):
    assert run("run --scale smoke --dataset tiny.toml --methods supervised --ratios 0.01 0.5", *TINY) == 1
    out = capsys.readouterr().out
    assert "end   tiny_supervised_0.5_s0: finished" in out
    last = out.splitlines()[-1]
    assert last.startswith("failed: tiny_supervised_0.01_s0: exit code 2 after 0:00:")
    assert "--ratio 0.01 of 20 training images leaves no labeled image" in last
    assert out.count("failed:") == 1


STUB = """
import json, os, pathlib, signal, sys, time
def leave(signum, frame):
    print("saved")
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, leave)
print(json.dumps({"group": os.getpgrp(), "threads": os.environ["OMP_NUM_THREADS"], "start": time.time()}), flush=True)
pathlib.Path(sys.argv[1] + ".ready").touch()
time.sleep(float(sys.argv[2]))
print(json.dumps({"end": time.time()}))
print("the last line")
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def stub(monkeypatch):
    """Stands for main.py: NAME SECONDS EXIT_CODE."""
    Path("stub.py").write_text(STUB)
    monkeypatch.setattr(experiments, "MAIN", Path("stub.py").resolve())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_as_many_runs_at_once_as_asked_share_the_cores(capsys, monkeypatch, stub):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    commands = {name: [name, "0.3", "3"] for name in "abc"}
    assert experiments.run_all(commands, Path(), 2) == 1
    logs = {name: [json.loads(line) for line in Path(f"{name}.log").read_text().splitlines()[:2]] for name in commands}
    assert [start["threads"] for start, _ in logs.values()] == ["3", "3", "3"]
    (a, end_a), (b, end_b), (c, _) = logs.values()
    assert max(a["start"], b["start"]) < min(end_a["end"], end_b["end"]) < c["start"]
    out = capsys.readouterr().out
    assert {line.split(":")[1] for line in out.splitlines()[-3:]} == {" a", " b", " c"}
    assert out.count(": exit code 3 after 0:00:0") == 6
    assert out.count(": the last line (see ") == 6

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    experiments.run_all({"d": ["d", "0", "3"]}, Path(), 2)
    assert json.loads(Path("d.log").read_text().splitlines()[0])["threads"] == "5"


def test_a_signal_is_passed_on_and_nothing_more_begins(capsys, stub):
    def send():
        deadline = time.monotonic() + 20
        while not Path("a.ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    assert experiments.run_all({name: [name, "30", "0"] for name in "ab"}, Path(), 1) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    first, *rest = Path("a.log").read_text().splitlines()
    assert rest == ["saved"]
    assert json.loads(first)["group"] != os.getpgrp()  # Ctrl-C reaches it once, through the tool
    assert not Path("b.log").exists()
    assert "SIGTERM: 1 runs cut, 1 not begun" in capsys.readouterr().out


# Statistics


def test_mean_deviation_and_interval_of_a_worked_example():
    values = [0.5, 0.6, 0.85]  # mean 0.65; squares 0.0225 + 0.0025 + 0.04 = 0.065, over 2: 0.0325
    mean, sd = report.mean_and_sd(values)
    assert (mean, sd) == (pytest.approx(0.65), pytest.approx(0.0325**0.5))
    reach = 4.302653 * 0.0325**0.5 / 3**0.5  # t of 2 degrees of freedom at 97.5 %
    assert report.interval(values) == (pytest.approx(0.65 - reach), pytest.approx(0.65 + reach))
    expected = scipy.stats.t.interval(0.95, 2, loc=mean, scale=scipy.stats.sem(values))
    assert report.interval(values) == pytest.approx(expected)
    assert report.mean_and_sd([0.5]) == (0.5, None)
    assert report.interval([0.5]) == (None, None)
    assert report.mean_and_sd([]) == ("missing", None)


def test_ours_minus_partial_is_paired_by_seed():
    partial, ours = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9}, {1: 0.25, 2: 0.39, 3: 0.9, 4: 0.0}
    for seed, miou in partial.items():
        make_run(cell("acdc", "supervised", 0.2), seed, [0.9, miou], n_epochs=3 if seed == 3 else 2)  # 3 is unfinished
    for seed, miou in ours.items():
        make_run(cell("acdc", "cyclegan", 0.2), seed, [0.5, miou])
    make_run(cell("acdc", "supervised", 0.5), 0, [0.4, 0.5])
    make_run(cell("acdc", "cyclegan", 0.5), 0, [0.4, 0.47])
    make_run(cell("acdc", "cyclegan", 0.2, "disc_S"), 1, [0.0, 0.0])
    low, high = scipy.stats.t.interval(0.95, 1, loc=0.07, scale=0.02)  # of 0.05 and 0.09
    expected = [
        ["50 %", "+0.0027", "-0.0300", "-0.0300", "1"],
        ["30 %", "+0.0019", "missing", "missing", "0"],
        ["20 %", "+0.0046", f"+0.0700 [{low:+.4f}, {high:+.4f}]", "-0.4000 [-0.4000, -0.4000]", "2"],
        ["10 %", "+0.0045", "missing", "missing", "0"],
    ]
    with pytest.raises(AssertionError):  # epochs differ between the unfinished run and the others
        report_of()
    for name in "acdc_supervised_0.2_s3", "acdc_cyclegan_0.2_s3":
        Path("checkpoints/small", name).rename(name)
    assert rows_of(report_of(), "Ours - Partial") == expected


# Reports


def test_table_1_has_mean_deviation_and_number_beside_the_papers():
    for seed, mious in enumerate([[0.2, 0.6, 0.5], [0.7, 0.6, 0.6], [0.1, 0.2, 0.85]]):
        make_run(cell("acdc", "supervised", 0.1), seed, mious)
    make_run(cell("acdc", "supervised", 1), 0, [0.1, 0.2, 0.9])
    rows = rows_of(report_of(), "Table 1")
    counts = ["3", "7", "2", "30"]
    assert rows[0] == ["Full", "100 %", "0.8982", "0.9000", "0.9000", "1", *counts]
    assert rows[1] == ["Hung et al.", "20 %", "0.8063", "missing", "missing", "0", "-", "-", "-", "-"]
    assert rows[5] == ["Partial", "10 %", "0.8418", "0.6500 ± 0.1803", "0.7167 ± 0.1258", "3", *counts]
    assert [row[:3] for row in rows[2:]] == [
        [name, f"{ratio} %", paper]
        for name, numbers in {"Partial": "0.8863 0.8785 0.8642 0.8418", "Ours": "0.8890 0.8804 0.8688 0.8463"}.items()
        for ratio, paper in zip((50, 30, 20, 10), numbers.split(), strict=True)
    ]
    table = csv.DictReader(Path("out/small.csv").read_text().splitlines())
    lines = {(row["title"], row["ratio"]): row for row in table if row["dataset"] == "acdc"}
    assert float(lines["Partial", "0.1"]["last_sd"]) == pytest.approx(0.0325**0.5, abs=1e-6)
    assert [lines["Partial", "0.1"][key] for key in ("last", "n", "steps", "paper")] == ["0.65", "3", "30", "0.8418"]
    assert [lines["Ours", "0.1"][key] for key in ("last", "best", "n")] == ["missing", "missing", "0"]


def test_missing_cells_read_missing_and_never_0():
    make_run(cell("voc", "cyclegan", 0.2), 0, [0.3])
    page = report_of()
    for heading in "Table 1", "Table 2: Ours without one term":
        for row in rows_of(page, heading):
            assert (row[3] == row[4] == "missing") == (row[:2] not in (["Ours", "20 %"], ["nothing", "20 %"]))
            assert "0.0000" not in row
    assert all(cell == "0.3000" or cell.startswith(("missing (", "0.3")) for row in rows_of(
        page, "Table 3: IoU of each class after the last epoch")[:-1] for cell in row[1:])  # fmt: skip
    assert "## Cityscapes\n\nNo run: all 10 cells of Tables 1 and 2 are missing.\n" in page
    for file in Path("out").glob("*.csv"):
        for row in csv.DictReader(file.read_text().splitlines()):
            assert row["n"] == "1" or row.get("last", row.get("iou")) == "missing"


def test_table_2_stands_beside_the_run_with_all_terms():
    make_run(cell("voc", "cyclegan", 0.2), 0, [0.3])
    make_run(cell("voc", "cyclegan", 0.2, "cycle_I"), 0, [0.25])
    rows = [row[:5] for row in rows_of(report_of(), "Table 2: Ours without one term")]
    assert rows == [
        ["nothing", "20 %", "0.2981", "0.3000", "0.3000"],
        ["cycle_S", "20 %", "0.2627", "missing", "missing"],
        ["cycle_I", "20 %", "0.2733", "0.2500", "0.2500"],
        ["disc_S", "20 %", "0.2614", "missing", "missing"],
        ["disc_I", "20 %", "0.2543", "missing", "missing"],
    ]


def test_classes_are_means_over_seeds_beside_tables_3_and_4():
    for seed, miou in enumerate([0.3, 0.4]):
        make_run(cell("cityscapes", "cyclegan", 0.1), seed, [0.9, miou])
    rows = rows_of(report_of(), "Table 4: IoU of each class after the last epoch")
    spec = load_spec("cityscapes")
    assert [row[0] for row in rows] == [*spec.classes[:19], "n"]
    assert rows[0] == ["road", "missing (0.9523)", "missing (0.9453)", "missing (0.9346)",
                       "missing (0.9534)", "missing (0.9457)", "0.3500 (0.9369)"]  # fmt: skip
    assert rows[18] == ["bicycle", "missing (0.3420)", "missing (0.2948)", "missing (0.2160)",
                        "missing (0.3618)", "missing (0.2601)", "0.3680 (0.2611)"]  # fmt: skip
    assert rows[19] == ["n", "0", "0", "0", "0", "0", "2"]


def test_voc_classes_begin_after_background():
    make_run(cell("voc", "supervised", 0.3), 0, [0.5])
    rows = rows_of(report_of(), "Table 3: IoU of each class after the last epoch")
    assert [row[:2] for row in rows[:2]] == [["aeroplane", "0.5010 (0.5798)"], ["bicycle", "0.5020 (0.3328)"]]


def test_a_class_that_occurs_nowhere_is_left_out_of_its_mean():
    for seed in range(2):
        folder = make_run(cell("phantom", "supervised", 0.5), seed, [0.5])
        line = json.loads((folder / "metrics.jsonl").read_text())
        line["iou"] |= {"myocardium": None, "left ventricle": None if seed else 0.25}
        (folder / "metrics.jsonl").write_text(json.dumps(line))
    rows = rows_of(report_of(), "IoU of each class after the last epoch")
    assert rows[2:4] == [["myocardium", "-"], ["left ventricle", "0.2500"]]


def test_unfinished_runs_are_marked_and_in_no_mean():
    make_run(cell("acdc", "supervised", 0.1), 0, [0.5, 0.6, 0.7, 0.8])
    make_run(cell("acdc", "supervised", 0.1), 1, [0.1, 0.2], n_epochs=4)
    make_run(cell("acdc", "cyclegan", 0.1), 0, [0.3], n_epochs=4)
    make_run(cell("acdc", "advsemi", 0.2), 0, [], n_epochs=4)
    page = report_of()
    names = "acdc_advsemi_0.2_s0 (0 of 4 epochs), acdc_cyclegan_0.1_s0 (1 of 4 epochs), "
    assert f"\nUnfinished, and in no mean: {names}acdc_supervised_0.1_s1 (2 of 4 epochs)\n" in page
    rows = {(row[0], row[1]): row[3:6] for row in rows_of(page, "Table 1")}
    assert rows["Partial", "10 %"] == ["0.8000", "0.8000", "1, 1 unfinished"]
    assert rows["Ours", "10 %"] == ["unfinished", "unfinished", "0, 1 unfinished"]
    assert rows["Hung et al.", "20 %"] == ["unfinished", "unfinished", "0, 1 unfinished"]
    assert rows_of(page, "Ours - Partial")[3][2:] == ["missing", "missing", "0"]
    styles = {line[1] for line in report.curve_panels(report.read_runs(Path("checkpoints/small"))[0])["10 % labeled"]}
    assert styles == {"-", "--"}
    assert page.count("![") == 2
    for name in "acdc_supervised_0.1_s0", "acdc_advsemi_0.2_s0":
        Path("checkpoints/small", name).rename(name)
    assert report_of().count("![") == 1  # nothing to draw by ratio


def test_scales_never_mix(capsys):
    make_run(cell("acdc", "supervised", 0.1), 0, [0.5], "small")
    make_run(cell("acdc", "supervised", 0.1), 1, [0.7], "smoke")
    for scale, miou, flags in (("small", "0.5000", "--size 64 64 --epochs 1 --lr 0.001 --ngf 16"),
                               ("smoke", "0.7000", "--size 32 32 --epochs 1 --ngf 4 --n-blocks 1")):  # fmt: skip
        page = report_of(scale)
        assert page.startswith(f"# Results: {scale}\n")
        assert rows_of(page, "Table 1")[5][3:6] == [miou, miou, "1"]
        assert f"Settings, as recorded: supervised `{flags}`\n" in page
    Path("checkpoints/smoke/acdc_supervised_0.1_s1").rename("checkpoints/small/acdc_supervised_0.1_s1")
    capsys.readouterr()
    assert run("report --scale small --out out") == 2
    error = capsys.readouterr().err
    assert "acdc_supervised_0.1_s0 and acdc_supervised_0.1_s1 differ in size ([64, 64], [32, 32])" in error


def test_methods_may_have_settings_of_their_own_and_each_is_told():
    make_run(cell("phantom", "supervised", 0.5), 0, [0.5], "paper")
    for without in "", "disc_S", "cycle_S":
        flags = ["--disc-lr", "0.5", "--betas", "0.1", "0.2"]
        make_run(cell("phantom", "cyclegan", 0.5, without), 0, [0.5], "paper", extra=flags)
    told = re.search("Settings, as recorded: (.*)", report_of("paper"))[1]
    assert told == (
        "cyclegan `--size 64 64 --epochs 1 --lr 0.001 --betas 0.1 0.2 --ngf 16 --n-blocks 4 --disc-lr 0.5 "
        "--lambda3 0.1 --lambda4 0.1 --lambda5 0.1`; "
        "supervised `--size 64 64 --epochs 1 --lr 0.001 --ngf 16 --n-blocks 4`"
    )


def test_runs_that_are_no_cells_are_named_and_left_out(capsys):
    folder = make_run(cell("phantom", "cyclegan", 0.5), 0, [0.5])
    folder.rename(folder.with_name("phantom_cyclegan_0.3_s0"))
    make_run(cell("phantom", "cyclegan", 0.2), 0, [0.4], extra=["--lambda2", "0"])  # is another cell by its settings
    make_run(cell("phantom", "supervised", 0.5), 0, [0.5])
    assert [row[:2] for row in rows_of(report_of(), "Table 1")] == [["Partial", "50 %"]]
    out = capsys.readouterr().out
    assert "left out, as they are not named as cells: phantom_cyclegan_0.2_s0; phantom_cyclegan_0.3_s0\n" in out


def test_pictures_have_a_line_a_run_and_a_panel_a_ratio():
    for method, ratio, without in (("supervised", 1, ""), ("supervised", 0.2, ""), ("cyclegan", 0.2, ""),
                                   ("cyclegan", 0.1, ""), ("cyclegan", 0.2, "disc_I")):  # fmt: skip
        for seed in range(2):
            make_run(cell("phantom", method, ratio, without), seed, [0.1, 0.2 + seed / 10])
    runs, _ = report.read_runs(Path("checkpoints/small"))
    panels = report.curve_panels(runs)
    assert {heading: [line[0] for line in lines] for heading, lines in panels.items()} == {
        "20 % labeled": ["Full"] * 2 + ["Ours"] * 2 + ["Partial"] * 2,
        "10 % labeled": ["Full"] * 2 + ["Ours"] * 2,
        "20 % labeled, without disc_I": ["Full"] * 2 + ["Ours"] * 2,
    }
    assert panels["10 % labeled"][-1][2] == [(10, 0.1, 0), (20, 0.30000000000000004, 0)]
    (panel,) = report.ratio_panels(report.cell_rows(runs)).values()
    assert {title: [x for x, _, _ in points] for title, _, points in panel} == {
        "Full": [pytest.approx(100, abs=1)],
        "Partial": [pytest.approx(20, abs=1)],
        "Ours": [pytest.approx(20, abs=1), pytest.approx(10, abs=1)],
    }
    assert panel[0][2][0][1:] == (pytest.approx(0.25), pytest.approx(0.005**0.5))
    page = report_of()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        with Image.open(Path("out", name)) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert page.count("![") == 2


# Kept files


def test_a_report_from_kept_files_is_the_same_bytes(monkeypatch, here):
    monkeypatch.setattr(sys, "argv", [str(Path("main.py").resolve()), "--data-root", str(Path("here").resolve())])
    line = "run --scale smoke --dataset tiny.toml --methods supervised cyclegan --ratios 0.5 --data-root"
    extra = [*TINY, "--cache", str(Path("my cache").resolve()), "--results", str(Path("r").resolve())]
    argv = [*line.split(), str(Path("my data").resolve()), "--", *extra]
    assert main.main(argv, experiments.experiments) == 0
    assert run("report --scale smoke --out out") == 0
    assert run("keep --scale smoke --out docs/results") == 0
    home = Path("docs/results/smoke")
    assert {path.relative_to(home).as_posix() for path in home.rglob("*.*") if path.is_file()} == {
        f"tiny_{method}_0.5_s0/{name}"
        for method in ("supervised", "cyclegan")
        for name in ("config.toml", "metrics.jsonl", "split.json", "manifest.json")
    }
    assert run("report --checkpoints docs/results/smoke --out again") == 0
    for name in "smoke.md", "smoke.csv", "smoke_differences.csv", "smoke_classes.csv":
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()

    run_folder = Path("checkpoints/smoke/tiny_cyclegan_0.5_s0")
    kept = home / run_folder.name
    for name in "metrics.jsonl", "split.json":
        assert (kept / name).read_bytes() == (run_folder / name).read_bytes()
    for path in kept.iterdir():
        assert str(Path.cwd()) not in path.read_text()
    folders = {
        "data_root": "data/tiny",
        "cache": "data/cache",
        "results": "results",
        "checkpoints": "checkpoints/smoke",
    }
    before, after = (tomllib.loads((folder / "config.toml").read_text()) for folder in (run_folder, kept))
    assert before["data_root"].endswith("my data")
    assert after == before | folders
    assert (
        (kept / "config.toml").read_text().startswith("# python main.py --training --dataset config.toml --name NAME ")
    )
    manifest = json.loads((kept / "manifest.json").read_text())
    before = json.loads((run_folder / "manifest.json").read_text())
    del before["platform"]  # a machine's
    assert manifest == before | {"command": "main.py --data-root data/tiny"}


def test_commands_are_kept_without_a_machines_paths():
    config = {"dataset": {"name": "mine"}, "data_root": "/home/me/my data", "cache": "/scratch", "results": "results"}
    config["checkpoints"] = "checkpoints/small"
    command = "/home/me/main.py --training --dataset /home/me/mine.toml --data-root /home/me/my data --cache=/scratch"
    command += " --checkpoints checkpoints/small --init /old/checkpoints/a/best.pt --device cpu --lr 1e-3 --seed 0"
    assert report.without_paths(command, config, "small") == (
        "main.py --training --dataset mine.toml --data-root data/mine --cache=data/cache"
        " --checkpoints checkpoints/small --init best.pt --device cpu --lr 1e-3 --seed 0"
    )


def test_unfinished_runs_are_not_kept():
    make_run(cell("phantom", "supervised", 0.5), 0, [0.5], n_epochs=2)
    finished = make_run(cell("phantom", "supervised", 0.2), 0, [0.5, 0.6])
    (finished / "manifest.json").write_text('{"command": "main.py"}')
    assert run("keep --scale small --out kept") == 0
    assert [path.name for path in Path("kept/small").iterdir()] == ["phantom_supervised_0.2_s0"]


KEPT = Path(main.__file__).parent / "docs" / "results"


@pytest.mark.parametrize("folder", [path for path in KEPT.iterdir() if path.is_dir()], ids=lambda path: path.name)
def test_the_committed_report_is_that_of_the_committed_runs(folder):
    assert run(f"report --checkpoints {folder} --out again") == 0
    rebuilt = [path for path in Path("again").iterdir() if path.suffix in (".md", ".csv")]
    assert len(rebuilt) == (2 if folder.name == "study" else 4)
    for path in rebuilt:
        assert path.read_bytes() == (KEPT / path.name).read_bytes()
    assert {path.name for path in Path("again").glob("*.png")} == {p.name for p in KEPT.glob(f"{folder.name}_*.png")}
