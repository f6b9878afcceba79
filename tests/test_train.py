"""One epoch of training, evaluation, the learning rate, and losses that are not finite."""

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_voc, same, write_indexed
from PIL import Image
from runs import TINY, error_line, evaluations, last_state, record_steps, run, tiny_on

import model
from engine import checkpoint
from engine.signals import stop
from engine.train import evaluate
from model import METHODS
from utils import IGNORE

pytestmark = pytest.mark.usefixtures("in_tmp")


def test_methods_train_and_know_how_much_of_the_run_is_done(monkeypatch):
    seen = record_steps(monkeypatch, "advsemi", lambda model, *_: (model.training, model.progress))
    assert run("--training", *TINY, "--method", "advsemi", "--epochs", "2") == 0
    assert seen == [(True, step / 8) for step in range(8)]


# Evaluation


class ToyModel(torch.nn.Linear):
    """Its logits are its input."""

    def segment(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return x


def test_evaluation_counts_truth_by_rows_over_all_batches_and_shows_each_to_visit():
    maps = torch.eye(3)[torch.tensor([[[0, 1], [2, 2]], [[1, 1], [0, 0]]])].permute(0, 3, 1, 2)
    y = torch.tensor([[[0, 2], [2, IGNORE]], [[0, 1], [IGNORE, IGNORE]]])
    batches, visited = [*zip(maps.split(1), y.split(1), strict=True)], []
    counts = evaluate(ToyModel(1, 1), batches, 3, lambda *batch: visited.append(batch))
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert same(visited, [(x, truth, x) for x, truth in batches])


def test_a_signal_during_an_evaluation_ends_it_and_the_resumed_run_evaluates_again(
    capsys, monkeypatch
):
    flags = ["--training", *TINY, "--epochs", "2", "--batch-size", "2"]
    assert run(*flags, "--name", "whole") == 0
    capsys.readouterr()
    segment, calls = METHODS["cyclegan"].segment, []

    def interrupted(self, x):
        if not self.training:
            calls.append(1)
            if len(calls) == 1:
                stop.signum = signal.SIGUSR1
        return segment(self, x)

    monkeypatch.setattr(METHODS["cyclegan"], "segment", interrupted)
    assert run(*flags, "--name", "cut") == 128 + signal.SIGUSR1
    assert len(calls) == 1  # of two validation batches
    assert "epoch 1/2" not in capsys.readouterr().out
    assert Path("checkpoints/cut/last.pt").is_file()
    assert not Path("checkpoints/cut/best.pt").exists()
    stop.signum = 0
    assert run(*flags, "--name", "cut") == 0
    printed = capsys.readouterr().out
    assert "resuming at epoch 2, step 0" in printed
    assert "epoch 1/2: mIoU" in printed
    assert same(last_state("whole"), last_state("cut"))
    assert evaluations("whole") == evaluations("cut")


@pytest.mark.parametrize(
    ("ignored", "labels"), [("skip", {3, 7, IGNORE}), ("background", {0, 3, 7})]
)
def test_ignored_pixels_may_train_as_background_and_are_never_scored(monkeypatch, ignored, labels):
    root = make_voc(Path("voc"), 8)
    for path in (root / "VOCdevkit/VOC2012/SegmentationClassAug").iterdir():
        values = np.array(Image.open(path))
        classes = np.where(np.arange(values.shape[1]) < 9, 3, 7)
        write_indexed(path, np.where(values == 255, 255, classes))
    seen = record_steps(monkeypatch, "supervised", lambda model, x, y: {*y.unique().tolist()})
    flags = [*tiny_on("voc"), "--method", "supervised", "--epochs", "1", "--ratio", "0.5"]
    assert run("--training", *flags, "--ignored", ignored, "--data-root", root) == 0
    assert set.union(*seen) == labels
    (line,) = evaluations("voc_supervised_0.5_s0")
    assert line["iou"]["background"] in (None, 0)  # no pixel's truth


# The learning rate


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ([], [1] * 8 + [2 / 3] * 4 + [1 / 3] * 4),  # 4 steps per epoch; from epoch 1 to 0 at 4
        (["--decay-epoch", "0"], [1] * 4 + [3 / 4] * 4 + [2 / 4] * 4 + [1 / 4] * 4),
    ],
)
def test_learning_rates_follow_the_schedule(monkeypatch, decay, factors):
    def rates(model, x, y) -> list[float]:
        return [optimizer.param_groups[0]["lr"] for optimizer in model.optimizers.values()]

    seen = record_steps(monkeypatch, "advsemi", rates)
    flags = ["--method", "advsemi", "--epochs", "4", "--lr", "0.1", *decay]
    assert run("--training", *TINY, *flags) == 0
    assert seen == [[pytest.approx(0.1 * factor)] * 2 for factor in factors]


# Losses that are not finite


def break_loss(monkeypatch, term: str, call: int) -> None:
    """Let the call-th value of a loss function be nan."""
    function, calls = getattr(model, term), []

    def failing(*tensors, **more):
        calls.append(1)
        return function(*tensors, **more) * (math.nan if len(calls) == call else 1)

    monkeypatch.setattr(model, term, failing)


@pytest.mark.parametrize(
    ("method", "function", "calls_per_step", "term"),
    [
        ("supervised", "gen_S", 1, "gen_S"),
        ("cyclegan", "cycle_I", 1, "cycle_I"),
        ("advsemi", "bce", 4, "adv"),
        ("meanteacher", "cutmix", 1, "cutmix"),
        ("cyclegan", "disc", 2, "D_S"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    capsys, monkeypatch, method, function, calls_per_step, term
):
    break_loss(monkeypatch, function, 6 * calls_per_step + 1)
    steps = record_steps(monkeypatch, method, lambda *_: None)
    flags = ["--training", *TINY, "--method", method, "--epochs", "3"]
    error = error_line(capsys, *flags, code=1)
    assert error.startswith("error: epoch 2, step 3: a loss is not finite (")
    assert f"{term} nan" in error
    last = Path(f"checkpoints/tiny_{method}_0.2_s0/last.pt")
    assert f"the last good checkpoint is {last}; try a lower --lr" in error
    assert len(steps) == 7
    assert checkpoint.load(last)["epoch"] == 1


def test_a_loss_that_is_not_finite_at_once_leaves_no_checkpoint(capsys, monkeypatch):
    break_loss(monkeypatch, "disc", 1)
    error = error_line(capsys, "--training", *TINY, "--epochs", "1", code=1)
    assert "epoch 1, step 1: a loss is not finite (D_S nan, D_I" in error
    assert "no checkpoint exists" in error
