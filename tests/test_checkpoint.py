"""Checkpoint files: what they give back, damaged and strange ones, weights that fit."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import error_of, same
from torch import nn

from engine import checkpoint

PARTS = {"settings": {}, "dataset": {}, "data_root": "data", "split": "0", "epoch": 3, "model": {}}


def test_checkpoint_gives_back_tensors_and_plain_values(tmp_path):
    state = {
        **PARTS,
        "settings": {"size": [8, 8], "name": "é", "compile": False, "miou": 0.5, "nothing": None},
        "model": {"half": torch.rand(2).half(), "long": torch.tensor(2**40)},
        "optimizer": {"state": {0: {"exp_avg": torch.rand(3, 4)}}},
    }
    checkpoint.save(tmp_path / "a.pt", state)
    assert same(checkpoint.load(tmp_path / "a.pt"), {"format": checkpoint.FORMAT, **state})


@pytest.mark.parametrize(
    ("turned", "method", "expected"),
    [
        (True, "meanteacher", ("any", True)),  # which turned its images itself
        (True, "cyclegan", ("any", False)),
        (False, "meanteacher", ("fixed", False)),
    ],
)
def test_a_checkpoint_from_before_augment_keeps_what_its_run_did(
    tmp_path, turned, method, expected
):
    old = {"dataset": {"any_orientation": turned}, "settings": {"method": method}}
    checkpoint.save(tmp_path / "a.pt", {**PARTS, **old})
    state = checkpoint.load(tmp_path / "a.pt")
    assert (state["dataset"]["orientation"], state["settings"]["augment"]) == expected


@pytest.mark.parametrize(
    ("part", "wrong", "lacking"),
    [
        *((part, [1], part) for part in PARTS),
        ("settings", {7: 7}, "settings"),
        ("model", {"G_IS.layers.1.weight": 3}, "weights that are tensors"),
    ],
)
def test_checkpoint_that_lacks_a_part_is_an_error_that_names_it(tmp_path, part, wrong, lacking):
    checkpoint.save(tmp_path / "a.pt", {**PARTS, part: wrong})
    assert error_of(checkpoint.load, tmp_path / "a.pt").endswith(f"a.pt: lacks {lacking}")


def test_a_flipped_bit_in_a_checkpoints_tensor_is_found(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.arange(1000.0)
    checkpoint.save(path, {**PARTS, "model": {"w": weights}})
    content = bytearray(path.read_bytes())
    place = content.index(weights.numpy().tobytes()) + 2001
    content[place] ^= 4
    path.write_bytes(content)
    assert "a.pt: damaged" in error_of(checkpoint.load, path)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["SEG_TEST_MARK"],)


STRANGE = {  # each writes a file that is no checkpoint
    "gone": lambda path: None,
    "text": lambda path: path.write_text("epoch = 3\n"),
    "cut": lambda path: (torch.save(torch.rand(99), path), os.truncate(path, 700)),
    "other dict": lambda path: torch.save({"state_dict": {}}, path),
    "list": lambda path: torch.save([torch.rand(2)], path),
    "code": lambda path: torch.save({"format": checkpoint.FORMAT, "x": Code()}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Code())),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_file_that_is_no_checkpoint_is_named_and_never_run(tmp_path, monkeypatch, kind):
    path, mark = tmp_path / "best.pt", tmp_path / "mark"
    monkeypatch.setenv("SEG_TEST_MARK", str(mark))
    STRANGE[kind](path)
    assert error_of(checkpoint.load, path).startswith(f"checkpoint {path}: ")
    assert not mark.exists()


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = network[0].weight.clone()
    others = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1, bias=False), nn.Linear(1, 1))
    message = error_of(checkpoint.load_weights, network, others.state_dict(), Path("runs/a.pt"))
    assert message == (
        "runs/a.pt: does not fit the networks: 1.weight is (1, 4), expected (1, 3); "
        "1.bias is missing, expected (1,); 2.weight is (1, 1), expected none; "
        "2.bias is (1,), expected none"
    )
    assert torch.equal(network[0].weight, before)
