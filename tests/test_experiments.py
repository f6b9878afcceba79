"""tools/experiments.py: what is selected, the commands, and the processes that run them."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

import main
from engine.flags import parse_args
from tools import experiments
from tools.runs import read_folder, results_of

TINY = "--size 16 16 --ngf 2 --ndf 2 --n-blocks 1 --epochs 2 --workers 0 --device cpu".split()
TABLE_2 = {"ours", *(f"ours_without_{term}" for term in ("cycle_S", "cycle_I", "disc_S", "disc_I"))}
ALL = set(experiments.EXPERIMENTS)
WEIGHTS = {"lambda1": 1, "lambda2": 0.05, "lambda3": 1, "lambda4": 1, "lambda5": 1}
PAPER = WEIGHTS | {"lr": 2e-4, "betas": [0.5, 0.999], "batch_size": 5, "precision": "fp32"}

pytestmark = pytest.mark.usefixtures("in_tmp")


def run(line: str, *extra: str) -> int:
    words = [*line.split(), *(["--", *extra] if extra else [])]
    return runs.run(*words, tool=experiments.experiments)


def commands(capsys, line: str, *extra: str) -> dict[str, list[str]]:
    """main.py's flags by the name of the run, from `run --dry-run`."""
    assert run(f"run --dry-run {line}", *extra) == 0
    lines = map(shlex.split, capsys.readouterr().out.splitlines())
    trainings = [words[2 : words.index("&&")] for words in lines]
    return {parse_args(flags).name: flags for flags in trainings}


# Selection and commands


@pytest.mark.parametrize("scale", experiments.SCALES)
@pytest.mark.parametrize("dataset", ["voc", "acdc", "phantom", "tiny.toml"])
def test_every_listed_command_is_understood(capsys, scale, dataset):
    names = " ".join(experiments.EXPERIMENTS)
    assert run(f"list --scale {scale} --dataset {dataset} --ratios 0.2 --names {names}") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, name in zip(lines, experiments.EXPERIMENTS, strict=True):
        short, listed, labeled = line.split()[:3]
        program, script, *flags = shlex.split(line[line.index("python") :])
        assert (program, Path(script).resolve()) == ("python", Path(main.__file__))
        args, ratio = parse_args(flags), 1 if name == "full" else 0.2
        assert (args.checkpoints, args.ratio) == (f"checkpoints/{scale}", ratio)
        assert (listed, args.name) == (name, f"{short}_{name}_{ratio:g}_s0")
        assert labeled == f"{100 * ratio:g}%"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # scales and experiments without kept logs, whose report test_report.py makes again
        ("--dataset acdc --names ours partial",
         PAPER | {"epochs": 400, "ngf": 64, "ndf": 64, "size": [200, 200]}),
        ("--dataset camvid.toml --names ours --scale reduced",
         PAPER | {"epochs": 150, "size": [72, 96], "eval_every": 5}),
        ("--dataset phantom --names ours_without_disc_S --scale reduced", WEIGHTS | {"lambda4": 0}),
        ("--names hung", {"method": "advsemi"}),
        ("--names ours_without_gen_I", WEIGHTS | {"lambda1": 0}),
        ("--names ours_without_cycle_S", WEIGHTS | {"lambda2": 0}),
        ("--names ours_without_cycle_I", WEIGHTS | {"lambda3": 0}),
        ("--names ours_without_disc_I", WEIGHTS | {"lambda5": 0}),
        ("--names ours_sum", {"reduction": "sum", "augment": False}),
        ("--names ours_sum_augment", {"reduction": "sum", "augment": True}),
    ],
)  # fmt: skip
def test_a_scale_and_an_experiment_are_their_flags(capsys, line, expected):
    Path("camvid.toml").write_text(f"lr = 1e-3\nepochs = 12\n{Path('tiny.toml').read_text()}")
    dataset = "" if "--dataset" in line else "--dataset acdc --ratios 0.1"
    for flags in commands(capsys, f"{dataset} {line}").values():
        args = parse_args(flags)
        assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("line", "n", "names"),
    [
        ("", 30 + 4, {"full", "hung", "partial", *TABLE_2}),
        ("--table 1", 30, {"full", "hung", "partial", "ours"}),
        ("--table 2", 5, TABLE_2),
        ("--table 2 --dataset acdc --ratios 0.1 0.2", 10, TABLE_2),
        ("--table 3", 6, {"partial", "ours"}),
        ("--table 3 --scale reduced", 6, {"partial", "ours"}),
        ("--dataset phantom", len(ALL), ALL),
        ("--scale exams --dataset acdc --names full partial meanteacher", 5,
         {"full", "partial", "meanteacher"}),
    ],
)  # fmt: skip
def test_flags_select_experiments(capsys, line, n, names):
    assert run(f"list {line}") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert (len(lines), {line.split()[1] for line in lines}) == (n, names)


def test_the_listed_number_is_the_papers(capsys):
    assert run("list --dataset acdc --names full ours_argmax --ratios 0.1") == 0
    rows = [line.split()[1:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["full", "100%", "0.8982"], ["ours_argmax", "10%", "-"]]


def test_names_and_flags_of_a_run(capsys):
    line = "--scale exams --dataset acdc --names ours_without_disc_S --ratios 0.1 --seeds 2"
    found = commands(capsys, f"{line} --data-root here", "--lambda4", "3")
    assert {name: shlex.join(flags) for name, flags in found.items()} == {
        "acdc_ours_without_disc_S_0.1_s2": "--training --dataset acdc --ratio 0.1 --seed 2 "
        "--label-unit exam --ngf 16 --ndf 16 --size 64 64 --epochs 30 --eval-every 2 "
        "--data-root here --lambda4 3 --method cyclegan --lambda4 0 "
        "--checkpoints checkpoints/exams --name acdc_ours_without_disc_S_0.1_s2"
    }  # the experiment's own flags override those after --


def test_runs_are_ordered_seed_by_seed(capsys):
    found = commands(capsys, "--dataset voc --names ours partial --ratios 0.2 --seeds 0 1")
    names = "voc_partial_0.2_s0 voc_ours_0.2_s0 voc_partial_0.2_s1 voc_ours_0.2_s1"
    assert list(found) == names.split()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("list --names other", "--names other"),
        ("list --dataset voc --table 4", "--names and --ratios"),
        ("run --data-root here", "--data-root"),
        ("run --dataset phantom -- --seed 3", "--seed after --: "),
        ("run --dataset phantom -- --labeled 3", "--labeled after --: "),
        ("run --dataset phantom -- --results x", "--results after --: "),
        ("list -- --epochs 5", "flags after -- belong to run, not to list"),
        ("run --dataset phantom -- --split acdc_7of70", "--split after --: "),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, line, named):
    assert named in runs.error_line(capsys, *line.split(), tool=experiments.experiments)


# Running


class InProcess:
    """Stands for subprocess.Popen: main.py in this process, which is done at once."""

    def __init__(self, line: list[str], stdout, **_):
        text = io.TextIOWrapper(stdout, write_through=True)
        with redirect_stdout(text), redirect_stderr(text):
            self.returncode = main.main(line[2:])
        text.detach()

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_process(monkeypatch):
    """Runs take place in this process, one after the other."""
    popen = SimpleNamespace(Popen=InProcess, STDOUT=None, DEVNULL=None)
    monkeypatch.setattr(experiments, "subprocess", popen)


def test_failures_are_named_and_what_is_finished_is_left_alone(capsys, in_process):
    line = "run --scale smoke --dataset tiny.toml --names partial --ratios"
    bad, good, untested = (f"tiny_partial_{ratio}_s0" for ratio in (0.01, 0.5, 0.6))
    folder, results = Path("checkpoints/smoke"), Path("results/smoke")
    results.mkdir(parents=True)
    (results / untested).touch()  # not a folder
    assert run(f"{line} 0.01 0.5 0.6", *TINY) == 1
    out = capsys.readouterr().out
    last = json.loads((folder / good / "metrics.jsonl").read_text().splitlines()[-1])
    assert re.search(rf"^start {good}: python .*main.py --training .* --name {good}$", out, re.M)
    pattern = rf"^end   {good}: finished in 0:\d\d:\d\d, mIoU {last['miou']:.4f}, best 0\."
    assert re.search(pattern, out, re.M)
    assert re.search(rf"^end   {good}: tested in 0:", out, re.M)
    metrics = json.loads((results / good / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["miou"]) == (2, pytest.approx(last["miou"]))
    assert metrics["checkpoint"] == f"checkpoints/smoke/{good}/last.pt"
    of_run, of_test = out.splitlines()[-2:]
    assert of_run.startswith(f"failed: {bad}: exit code 2 after 0:00:")
    assert f"see {folder / bad}.log" in of_run
    assert of_test.startswith(f"failed: {untested}: test: exit code 2 after 0:")
    assert out.count("failed:") == 2

    before = {path: path.read_bytes() for path in (folder / good).iterdir()}
    (results / untested).unlink()
    assert run(f"{line} 0.5 0.6", *TINY) == 0
    out = capsys.readouterr().out
    assert f"end   {good}: was finished, mIoU {last['miou']:.4f}" in out
    assert re.findall("end   (.*): tested", out) == [untested]
    assert {path: path.read_bytes() for path in before} == before

    scores = ["--checkpoint", str(folder / good), "--results", str(results)]  # of best.pt
    assert main.main(["--testing", *scores]) == 0
    capsys.readouterr()
    assert run(f"{line} 0.5", *TINY) == 0
    assert re.findall("end   (.*): tested", capsys.readouterr().out) == [good]


def test_a_test_runs_on_the_machine_of_its_training(capsys):
    line = "run --dry-run --scale smoke --dataset tiny.toml --names partial --data-root here"
    assert run(line, "--device", "cpu", "--lr", "0.5", "--overwrite") == 0
    words = shlex.split(capsys.readouterr().out)
    test = words[words.index("&&") + 1 :]
    assert test[2:] == [
        "--testing", "--checkpoint", "checkpoints/smoke/tiny_partial_0.2_s0/last.pt",
        "--results", "results/smoke", "--device", "cpu", "--data-root", "here",
    ]  # fmt: skip
    Path("machine.toml").write_text('device = "cpu"\nworkers = 1\n')
    assert run(line, "--config", "machine.toml") == 0
    assert capsys.readouterr().out.endswith(" --device cpu --workers 1 --data-root here\n")


def signal_when(path: Path) -> None:
    """SIGTERM to this process once a file exists."""

    def wait():
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait).start()


def test_the_same_command_resumes_an_interrupted_run(capsys, request):
    line = "run --scale smoke --dataset tiny.toml --names ours --ratios 0.5"
    folder = Path("checkpoints/smoke/tiny_ours_0.5_s0")
    signal_when(folder / "metrics.jsonl")
    assert run(line, *TINY, "--epochs", "40") == 128 + signal.SIGTERM
    assert f"end   {folder.name}: exit code 143 after 0:" in capsys.readouterr().out
    assert 0 < read_folder(folder).epoch < 40
    request.getfixturevalue("in_process")
    assert run(line, *TINY, "--epochs", "40") == 0
    assert f"end   {folder.name}: finished in " in capsys.readouterr().out
    assert read_folder(folder).finished
    log = folder.with_name(f"{folder.name}.log").read_text()
    assert 0 <= log.index("SIGTERM") < log.index("resuming at epoch ")


STUB = """
import json, os, pathlib, signal, sys, time
def leave(signum, frame):
    print("saved")
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, leave)
threads, start = os.environ["OMP_NUM_THREADS"], time.time()
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
about = {"group": os.getpgrp(), "threads": threads, "start": start, "gpu": gpu}
print(json.dumps(about), flush=True)
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


def printed(name: str) -> dict:
    """The values that a job's stub has printed."""
    start, end, _ = Path(f"{name}.log").read_text().splitlines()
    return json.loads(start) | json.loads(end)


def test_simultaneous_runs_share_the_cores(capsys, monkeypatch, stub):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    lines = {name: [[name, "0.5", "3"]] for name in "abc"}
    assert experiments.run_all(lines, Path(), 2, []) == 1
    a, b, c = map(printed, "abc")
    assert a["threads"] == b["threads"] == c["threads"] == "3"
    assert max(a["start"], b["start"]) < min(a["end"], b["end"]) < c["start"]
    out = capsys.readouterr().out
    assert {line.split(":")[1] for line in out.splitlines()[-3:]} == {" a", " b", " c"}
    assert out.count(": exit code 3 after 0:00:0") == 6
    assert out.count(": the last line (see ") == 6

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    experiments.run_all({"d": [["d", "0", "3"]]}, Path(), 2, [])
    assert printed("d")["threads"] == "5"


def test_simultaneous_runs_have_a_gpu_each_and_share_them_if_there_are_fewer(stub):
    lines = {name: [[name, "0", "3"]] for name in "xyz"}
    experiments.run_all(lines, Path(), 3, ["5", "7"])
    assert [printed(name)["gpu"] for name in "xyz"] == ["5", "7", "5"]
    lines = {name: [[name, seconds, "3"]] for name, seconds in zip("abcde", "20220", strict=True)}
    experiments.run_all(lines, Path(), 4, list("0123"))
    assert [printed(name)["gpu"] for name in "abcde"] == [*"0123", "1"]  # e takes the place of b


def test_the_gpus_are_those_that_the_environment_shows(monkeypatch, stub):
    monkeypatch.setattr(experiments.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert experiments.visible_gpus() == ["0", "1", "2"]
    for value, expected in {"5, 7": ["5", "7"], "GPU-1a": ["GPU-1a"], "": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert experiments.visible_gpus() == expected
    experiments.run_all({"a": [["a", "0", "3"]]}, Path(), 1, [])
    assert printed("a")["gpu"] == ""  # as it was


def test_a_device_that_is_given_is_no_choice_of_gpus(monkeypatch):
    found = []
    monkeypatch.setattr(experiments, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(experiments, "run_all", lambda *args: found.append(args[-1]) or 0)
    line = "run --scale smoke --dataset tiny.toml --names partial"
    run(line)
    run(line, "--device", "cuda:1")
    Path("machine.toml").write_text('device = "cuda:1"')
    run(line, "--config", "machine.toml")
    assert found == [["0", "1"], [], []]


def test_a_signal_is_passed_on_and_no_other_run_starts(capsys, stub):
    before = signal.getsignal(signal.SIGTERM)
    signal_when(Path("a.ready"))
    lines = {name: [[name, "30", "0"]] for name in "ab"}
    assert experiments.run_all(lines, Path(), 1, []) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    first, *rest = Path("a.log").read_text().splitlines()
    assert rest == ["saved"]
    assert json.loads(first)["group"] != os.getpgrp()  # Ctrl-C reaches it once, through the tool
    assert not Path("b.log").exists()
    assert "SIGTERM: 1 runs interrupted, 1 not started" in capsys.readouterr().out


def test_a_run_that_failed_before_a_signal_is_not_interrupted(capsys, stub):
    signal_when(Path("b.ready"))
    lines = {"a": [["a", "0", "3"]], "b": [["b", "30", "0"]], "c": [["c", "0", "0"]]}
    assert experiments.run_all(lines, Path(), 1, []) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "failed: a: exit code 3" in out
    assert "SIGTERM: 1 runs interrupted, 1 not started" in out


def test_a_run_that_another_program_terminates_is_listed(capsys, stub):
    assert experiments.run_all({"a": [["a", "0", "143"]]}, Path(), 1, []) == 1
    assert "failed: a: exit code 143" in capsys.readouterr().out


def test_the_tool_is_a_program():
    line = [sys.executable, str(Path(experiments.__file__)), "list", "--table", "2"]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert result.stdout.count("--method cyclegan") == 5


def test_a_finished_run_that_cannot_be_read_is_no_failure_of_the_others(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/last.pt").write_bytes(b"of another version")
    finished = SimpleNamespace(returncode=0)
    result = experiments.Job("old", False, 0, finished, 0, 0.0).result(tmp_path)
    assert result.startswith("finished, but the report cannot read it: ")


def test_a_runs_missing_or_damaged_files_are_no_failure_of_the_others(tmp_path):
    killed = experiments.Job("gone", False, 0, SimpleNamespace(returncode=-9), 0, 0.0)
    assert "exit code -9" in killed.result(tmp_path)  # without its log
    run = tmp_path / "checkpoints/smoke/one"
    run.mkdir(parents=True)
    assert not experiments.is_tested(run)
    (run / "last.pt").touch()
    metrics = results_of(run) / "metrics.json"
    metrics.parent.mkdir(parents=True)
    for content, expected in (b'{"checkpoint": "a/last.pt"}', True), (b"\xff\xfe\0\0", False):
        metrics.write_bytes(content)
        os.utime(run / "last.pt", (0, 0))
        assert experiments.is_tested(run) == expected
