"""A command as a program: errors as one line, exit codes."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

import main
import utils
from engine import program
from engine.signals import stop
from utils import InputError, TrainingError


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (MemoryError(), "out of memory; in training, halving --batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory; in training"),
        (RuntimeError("[enforce fail] not enough memory"), "out of memory; in training"),
        (PermissionError(13, "Permission denied", "a/b.png"), "a/b.png: Permission denied"),
        (TrainingError("no more"), "no more"),
        (BrokenPipeError(32, "Broken pipe"), "standard output: Broken pipe"),
        (DistNetworkError("reset"), "the connection between the processes failed (reset)"),
        (RuntimeError("gloo/a: closed\nb"), "the connection between the processes failed (gloo/a:"),
        (RuntimeError("DataLoader worker (pid 7) "), "a process that loads images ended: DataLoad"),
        (RuntimeError("Failed to find C compiler. Please"), "--compile: found no C++ compiler"),
    ],
)
def test_a_failure_of_the_machine_is_one_error_line_and_exit_code_1(capsys, raised, message):
    def failing(_argv):
        raise raised

    assert program.execute(failing, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_the_first_process_of_each_machine_prints_errors(capsys, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for local_rank, n_lines in (0, 1), (1, 0):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert main.main(["--training", "--dataset", "gone.toml"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == n_lines


@pytest.mark.parametrize(
    ("failure", "n_lines"),
    [
        (RuntimeError("DataLoader worker (pid 7) "), 1),
        (RuntimeError("gloo/a"), 0),
        (OSError(5, "Input/output error"), 1),
        (InputError("--device cuda:7: no such device", alone=True), 1),
        (InputError("--lr 0"), 0),
    ],
)
def test_other_processes_print_failures_that_only_they_have(capsys, monkeypatch, failure, n_lines):
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    for key, value in ("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"):
        monkeypatch.setenv(key, value)

    def failing(_argv):
        raise failure

    assert program.execute(failing, []) == (2 if isinstance(failure, InputError) else 1)
    assert len(capsys.readouterr().err.splitlines()) == n_lines


@pytest.mark.parametrize("bug", [ValueError("shapes differ"), RuntimeError("/data/gloomy: gone")])
def test_a_defect_of_the_program_is_a_traceback(capsys, bug):
    def failing(_argv):
        raise bug

    assert program.execute(failing, []) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith(f"{type(bug).__name__}: {bug}\n")


def test_an_error_that_names_a_file_of_two_lines_is_one_line(capsys, tmp_path):
    file = tmp_path / "a\nb.txt"
    assert program.execute(lambda _: utils.read_text(file), []) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/a\\nb.txt: No such file or directory\n"
    with pytest.raises(InputError, match="damaged$"), utils.naming(file):
        raise ValueError("damaged\nhere")
    with pytest.raises(MemoryError), utils.naming(file):  # no fault of the file
        raise MemoryError


def test_a_failure_that_a_signal_causes_is_no_defect(capsys, monkeypatch):
    monkeypatch.setattr(stop, "signum", signal.SIGINT)

    def failing(_argv):
        raise RuntimeError("g++ exited")

    assert program.execute(failing, []) == 128 + signal.SIGINT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: SIGINT: stopped within a step; checkpoints are intact"


@pytest.mark.parametrize("tool", "prepare experiments export figures benchmark diagnose".split())
def test_a_tool_ends_with_the_exit_code(monkeypatch, tool):
    monkeypatch.setattr("engine.signals.install", lambda: None)
    monkeypatch.setattr(sys, "argv", [tool, "--unknown"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(Path(main.__file__).parent / f"tools/{tool}.py"), run_name="__main__")


def test_any_file_name_can_be_printed():
    code = "from engine import program; exit(program.execute(lambda _: print('\\udcff'), []))"
    command = [sys.executable, "-c", code]
    folder = Path(main.__file__).parent
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    printed = subprocess.check_output(command, cwd=folder, env=environment, text=True)
    assert printed == "\\udcff\n"
