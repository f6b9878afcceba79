"""Checkpoint files: what they give back, damaged and strange ones, weights that fit."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import error_of
from torch import nn

from engine import checkpoint
from utils import InputError

PARTS = {
    "settings": {},
    "dataset": {},
    "data_root": "data",
    "split": "0",
    "epoch": 3,
    "model": {"w": torch.ones(2)},
}


def test_checkpoint_gives_back_tensors_and_plain_values(tmp_path):
    optimizer = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    state = {
        **PARTS,
        "miou": 0.5,
        "nothing": None,
        "args": {"size": [8, 8], "name": "é", "compile": False},
        "optimizer": optimizer.state_dict(),
        "weights": {
            "half": torch.rand(2).half(),
            "long": torch.tensor(2**40),
            "float": torch.rand(3, 4),
        },
    }
    checkpoint.save(tmp_path / "a.pt", state)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert {key: loaded[key] for key in ("epoch", "miou", "nothing", "args")} == {
        key: state[key] for key in ("epoch", "miou", "nothing", "args")
    }
    for key, value in state["weights"].items():
        assert loaded["weights"][key].dtype == value.dtype
        assert torch.equal(loaded["weights"][key], value)
    assert torch.equal(
        loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrong", [None, [1]])
def test_checkpoint_that_lacks_a_part_is_an_error_that_names_it(tmp_path, part, wrong):
    checkpoint.save(tmp_path / "a.pt", {**PARTS, part: wrong})
    with pytest.raises(InputError, match=f"a.pt: lacks {part}"):
        checkpoint.load(tmp_path / "a.pt")


def test_weights_that_are_no_tensors_are_an_error(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {**PARTS, "model": {"G_IS.layers.1.weight": 3}})
    with pytest.raises(InputError, match="a.pt: lacks weights"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_flipped_bit_in_a_checkpoints_tensor_is_found(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.arange(1000.0)
    checkpoint.save(path, {**PARTS, "model": {"w": weights}})
    content = bytearray(path.read_bytes())
    place = content.index(weights.numpy().tobytes()) + 2001
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.pt: damaged"):
        checkpoint.load(path)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["SEG_TEST_MARK"],)


@pytest.mark.parametrize(
    "kind",
    ["gone", "folder", "empty", "text", "bytes", "cut", "other dict", "list", "code", "pickle"],
)
def test_file_that_is_no_checkpoint_is_named_and_never_run(tmp_path, monkeypatch, kind):
    path, mark = tmp_path / "best.pt", tmp_path / "mark"
    monkeypatch.setenv("SEG_TEST_MARK", str(mark))
    write = {
        "gone": lambda: None,
        "folder": path.mkdir,
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text("epoch = 3\n"),
        "bytes": lambda: path.write_bytes(bytes(range(256)) * 40),
        "cut": lambda: (
            torch.save(torch.rand(99), path),
            path.write_bytes(path.read_bytes()[:700]),
        ),
        "other dict": lambda: torch.save({"state_dict": {}}, path),
        "list": lambda: torch.save([torch.rand(2)], path),
        "code": lambda: torch.save({"format": checkpoint.FORMAT, "x": Code()}, path),
        "pickle": lambda: path.write_bytes(
            pickle.dumps({"format": checkpoint.FORMAT, "x": Code()})
        ),
    }
    write[kind]()
    assert error_of(checkpoint.load, path).startswith(f"checkpoint {path}: ")
    assert not mark.exists()


def test_a_checkpoint_of_the_earlier_format_is_told_apart(tmp_path):
    torch.save({**PARTS, "format": 1}, tmp_path / "a.pt")
    message = error_of(checkpoint.load, tmp_path / "a.pt")
    assert message.startswith(f"checkpoint {tmp_path / 'a.pt'}: from an earlier version (format 1)")


def test_weights_are_loaded_where_they_fit():
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.load_weights(target, source.state_dict(), "a.pt")
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = network[0].weight.clone()
    weights = nn.Sequential(
        nn.Linear(2, 3), nn.Linear(4, 1, bias=False), nn.Linear(1, 1)
    ).state_dict()
    with pytest.raises(InputError) as caught:
        checkpoint.load_weights(network, weights, Path("runs/a.pt"))
    message = str(caught.value)
    assert message.startswith("runs/a.pt: ")
    assert all(
        key in message for key in ("1.weight", "(1, 4)", "(1, 3)", "1.bias", "2.weight", "2.bias")
    )
    assert "0.weight" not in message
    assert torch.equal(network[0].weight, before)


@pytest.mark.parametrize("change", ["more", "fewer", "wider"])
def test_each_difference_in_the_weights_is_an_error(change):
    weights = nn.Linear(2, 3).state_dict()
    if change == "more":
        weights["scale"] = torch.ones(1)
    elif change == "fewer":
        del weights["bias"]
    else:
        weights["weight"] = torch.ones(3, 3)
    named = {"more": "scale", "fewer": "bias", "wider": "weight"}[change]
    with pytest.raises(InputError, match=f"a.pt: .*{named}"):
        checkpoint.load_weights(nn.Linear(2, 3), weights, "a.pt")
