"""TensorBoard's events, the lines of a log that is no terminal, and a run's TOML."""

import os
import time
import tomllib

import pytest
import torch
from runs import curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import summary

from engine.folder import to_toml
from engine.logs import EventLog, Logs


def test_tensorboard_reads_events_once_logged_and_forgets_those_of_a_killed_process(
    tmp_path, monkeypatch
):
    first = EventLog(tmp_path, 0)
    for step in 1, 2, 3:
        first.add(step, summary.scalar("loss/gen_S", step / 2))
    first.add(3, summary.image("validation", torch.rand(3, 8, 9).numpy()))
    assert curve(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5)]  # before it is closed
    (picture,) = EventAccumulator(str(tmp_path)).Reload().Images("validation")
    assert (picture.step, picture.width, picture.height) == (3, 9, 8)
    monkeypatch.setattr(os, "getpid", lambda: 99999999)
    second = EventLog(tmp_path, 3)  # resumes after step 2
    second.add(3, summary.scalar("loss/gen_S", 7))
    second.close()
    assert curve(tmp_path) == [(1, 0.5), (2, 1.0), (3, 7.0)]


@pytest.fixture
def clock(monkeypatch):
    """Stands for the clock: a list with the seconds since some start."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


LOSSES = {"gen_S": torch.tensor(0.25), "D_S": torch.tensor(1.5)}


def test_without_a_terminal_a_line_a_minute_has_place_losses_speed_and_remaining_time(
    tmp_path, capsys, clock
):
    logs = Logs(tmp_path, 0, n_images=4000, n_done=1000)
    for step in range(1, 61):  # 10 images in 10 seconds
        clock[0] += 10
        logs.step(f"epoch 1/2, step {step}/200", LOSSES, 10)
    clock[0] += 600  # an evaluation
    logs.step("epoch 1/2, step 61/200", LOSSES, 10)
    logs.close()
    lines = capsys.readouterr().out.splitlines()
    first = "epoch 1/2, step 6/200: gen_S 0.250, D_S 1.500, 1.0 images/s, 49:00 left"
    assert (len(lines), lines[0]) == (11, first)  # 2,940 images are left
    assert lines[1].startswith("epoch 1/2, step 12/200: ")
    # 610 images of this process took 1,200 seconds; 2,390 are left
    assert lines[-1].endswith(": gen_S 0.250, D_S 1.500, 0.0 images/s, 1:18:21 left")


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (False, "1")])
def test_no_line_is_printed_beside_a_progress_bar_or_by_another_process(
    tmp_path, capsys, clock, monkeypatch, terminal, rank
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", rank)
    logs = Logs(tmp_path, 0, 4000, 1000)
    clock[0] += 100
    logs.step("epoch 1/2, step 1/200", LOSSES, 10)
    logs.close()
    assert capsys.readouterr().out == ""


def test_toml_reads_back_as_it_was_written():
    table = {
        "text": 'say "no" \\ to C:\\new\ttabs\nand lines',
        "unicode": "cœur ♥ 𝄞",
        "control": "\x1b and \x7f",
        "yes": True,
        "small": 2e-05,
        "large": 1e22,
        "nested": [[1, 2], [], ["a", "b"]],
        "tuple": (0.5, 0.999),
    }
    read = tomllib.loads(to_toml({**table, "nothing": None}))
    assert read == {**table, "tuple": [0.5, 0.999]}
