"""TensorBoard's events, a run's TOML and the lock of its folder."""

import multiprocessing
import os
import time
import tomllib
from pathlib import Path

import torch
from conftest import error_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.logs import EventLog
from engine.run import locked, to_toml


def test_tensorboard_reads_events_once_logged_and_forgets_those_of_a_killed_process(
    tmp_path, monkeypatch
):
    first = EventLog(tmp_path, 0)
    for step in 1, 2, 3:
        first.scalar("loss/gen_S", step / 2, step)
    first.image("validation", torch.rand(3, 8, 9), 3)
    seen = EventAccumulator(str(tmp_path)).Reload()  # before it is closed
    assert [(e.step, e.value) for e in seen.Scalars("loss/gen_S")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (picture,) = seen.Images("validation")
    assert (picture.step, picture.width, picture.height) == (3, 9, 8)
    monkeypatch.setattr(os, "getpid", lambda: 99999999)
    second = EventLog(tmp_path, 3)  # resumes after step 2
    second.scalar("loss/gen_S", 7, 3)
    second.close()
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("loss/gen_S")] == [(1, 0.5), (2, 1.0), (3, 7.0)]


def test_toml_reads_back_as_it_was_written():
    table = {
        "text": 'say "no" \\ to C:\\new\ttabs\nand lines',
        "unicode": "cœur ♥ 𝄞",
        "empty": "",
        "yes": True,
        "no": False,
        "whole": -3,
        "small": 2e-05,
        "large": 1e22,
        "nested": [[1, 2], [], ["a", "b"]],
        "tuple": (0.5, 0.999),
        "mixed": [True, False],
    }
    read = tomllib.loads(to_toml({**table, "nothing": None}))
    assert read == {**table, "tuple": [0.5, 0.999]}
    assert read["yes"] is True
    assert read["no"] is False


def try_lock(folder: Path) -> None:
    with locked(folder, "--checkpoints"):
        pass


def hold(folder: Path, held) -> None:
    with locked(folder, "--checkpoints"):
        held.set()
        time.sleep(60)


def test_a_held_lock_is_refused_with_its_holder_and_a_killed_one_holds_nothing(tmp_path):
    folder, fork = tmp_path / "run", multiprocessing.get_context("fork")
    held = fork.Event()
    holder = fork.Process(target=hold, args=(folder, held))
    holder.start()
    assert held.wait(20)
    assert error_of(try_lock, folder).startswith(f"{folder}: process {holder.pid} on ")
    (folder / ".last.pt.tmp").write_text("half a file")
    holder.kill()
    holder.join()
    with locked(folder, "--checkpoints"):
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not folder.exists()  # nothing else was in it


def test_a_lock_leaves_a_folder_with_files(tmp_path):
    with locked(tmp_path / "run", "--checkpoints"):
        (tmp_path / "run" / "last.pt").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.pt"]


def test_folder_that_cannot_be_locked_is_named_with_its_flag(tmp_path):
    (tmp_path / "a").write_text("in the way")
    assert error_of(try_lock, tmp_path / "a").startswith(f"--checkpoints {tmp_path / 'a'}: ")
