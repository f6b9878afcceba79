"""What a training prints first, and the networks that it starts with."""

from pathlib import Path

import pytest
import torch
from conftest import make_acdc
from runs import SUPERVISED, TINY, tiny_on

import main
from datasets.spec import load_spec
from engine.flags import parse_args

pytestmark = pytest.mark.usefixtures("in_tmp")


def test_processes_start_with_equal_weights_and_draw_other_numbers(monkeypatch):
    args = parse_args(["--training", *TINY])
    weights, draws = [], []
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("RANK", rank)
        model = main.build_model(args, load_spec("tiny.toml"), torch.device("cpu"))
        weights.append(torch.cat([w.flatten() for w in model.state_dict().values()]))
        draws.append(torch.rand(3))
    assert torch.equal(*weights)
    assert not torch.equal(*draws)


def test_what_augment_does_to_the_dataset_is_printed(capsys):
    table = Path("tiny.toml").read_text()
    Path("tiny.toml").write_text(table.replace('orientation = "any"', 'orientation = "mirror"'))
    assert main.main(["--training", *SUPERVISED, "--augment"]) == 0
    line = 'augment: horizontal flips (orientation = "mirror"), contrast, brightness\n'
    assert line in capsys.readouterr().out
    assert main.main(["--training", *SUPERVISED, "--overwrite"]) == 0
    assert "augment" not in capsys.readouterr().out


def test_other_counts_than_the_datasets_are_printed(capsys):
    assert main.main(["--training", *SUPERVISED]) == 0
    assert "instead of" not in capsys.readouterr().out
    flags = [*tiny_on("acdc"), *SUPERVISED[len(TINY) :], "--ratio", "0.5"]
    assert main.main(["--training", *flags, "--data-root", str(make_acdc(Path("acdc"), 4, 2))]) == 0
    about = "4 images or exams with masks instead of acdc's 100: split in the same proportions"
    assert f"acdc: {about}\n" in capsys.readouterr().out
    flags += ["--data-root", "acdc", "--split", "image", "--name", "slices"]
    assert main.main(["--training", *flags]) == 0
    assert "instead of acdc's 100: 85% are for training\n" in capsys.readouterr().out
