"""TensorBoard's events and a run's TOML."""

import os
import tomllib

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import summary

from engine.folder import to_toml
from engine.logs import EventLog


def test_tensorboard_reads_events_once_logged_and_forgets_those_of_a_killed_process(
    tmp_path, monkeypatch
):
    first = EventLog(tmp_path, 0)
    for step in 1, 2, 3:
        first.add(step, summary.scalar("loss/gen_S", step / 2))
    first.add(3, summary.image("validation", torch.rand(3, 8, 9).numpy()))
    seen = EventAccumulator(str(tmp_path)).Reload()  # before it is closed
    assert [(e.step, e.value) for e in seen.Scalars("loss/gen_S")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (picture,) = seen.Images("validation")
    assert (picture.step, picture.width, picture.height) == (3, 9, 8)
    monkeypatch.setattr(os, "getpid", lambda: 99999999)
    second = EventLog(tmp_path, 3)  # resumes after step 2
    second.add(3, summary.scalar("loss/gen_S", 7))
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
