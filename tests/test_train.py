"""One epoch of training, evaluation, the learning rate, and losses that are not finite."""

import itertools
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_voc, same, write_indexed
from PIL import Image
from runs import (
    TINY,
    edit_checkpoint,
    error_line,
    evaluations,
    last_state,
    record_steps,
    run,
    tiny_on,
)

import model
from data_utils import load_data
from datasets.spec import load_spec
from engine.flags import parse_args
from engine.metrics import ConfusionMatrix
from engine.signals import stop
from engine.train import evaluate
from model import METHODS
from tools import export
from utils import IGNORE

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.mark.parametrize("augment", [False, True])
def test_images_come_in_the_order_of_seed_and_epoch_and_are_augmented_if_asked_for(
    monkeypatch, augment
):
    seen = record_steps(monkeypatch, "supervised", lambda model, x, y: y)
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "2", "--seed", "3"]
    assert run(*flags, *["--augment"] * augment) == 0
    train = load_data(parse_args(flags), load_spec("tiny.toml")).train
    items = [rows for epoch in (0, 1) for rows in train.epoch(3, epoch, 5)]
    expected = torch.stack([train[rows][1] for rows in items]).long()
    assert torch.equal(torch.cat(seen), expected) != augment


# Evaluation


class ToyModel(torch.nn.Linear):
    """Its logits are its input."""

    n_classes = 3

    def segment(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return x


def test_evaluation_counts_truth_by_rows_over_all_batches_and_shows_each_to_visit():
    maps = torch.eye(3)[torch.tensor([[[0, 1], [2, 2]], [[1, 1], [0, 0]]])].permute(0, 3, 1, 2)
    y = torch.tensor([[[0, 2], [2, IGNORE]], [[0, 1], [IGNORE, IGNORE]]])
    batches, visited = [*zip(maps.split(1), y.split(1), strict=True)], []
    counts = evaluate(ToyModel(1, 1), batches, lambda *batch: visited.append(batch))
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
def test_ignored_pixels_may_train_as_background_and_are_never_scored(
    capsys, monkeypatch, ignored, labels
):
    root = make_voc(Path("voc"), 8)
    for path in (root / "VOCdevkit/VOC2012/SegmentationClassAug").iterdir():
        values = np.array(Image.open(path))
        classes = np.where(np.arange(values.shape[1]) < 9, 3, 7)
        write_indexed(path, np.where(values == 255, 255, classes))
    truths, update = set(), ConfusionMatrix.update

    def recorded(self, prediction, truth):
        truths.update(truth.unique().tolist())
        update(self, prediction, truth)

    monkeypatch.setattr(ConfusionMatrix, "update", recorded)
    seen = record_steps(monkeypatch, "supervised", lambda model, x, y: {*y.unique().tolist()})
    flags = [*tiny_on("voc"), "--method", "supervised", "--epochs", "1", "--ratio", "0.5"]
    assert run("--training", *flags, "--ignored", ignored, "--data-root", root) == 0
    assert set.union(*seen) == labels
    assert truths == {3, 7, IGNORE}
    lacks_background = "no labeled mask contains background" in capsys.readouterr().out
    assert lacks_background == (ignored == "skip")


# The learning rate


def test_learning_rates_follow_the_schedule(monkeypatch):
    def state(model, x, y) -> tuple:
        rates = [optimizer.param_groups[0]["lr"] for optimizer in model.optimizers.values()]
        return model.training, model.progress, rates

    seen = record_steps(monkeypatch, "advsemi", state)
    flags = ["--method", "advsemi", "--epochs", "4", "--lr", "0.1"]
    assert run("--training", *TINY, *flags) == 0
    factors = [1] * 8 + [2 / 3] * 4 + [1 / 3] * 4  # 4 steps per epoch; from epoch 1 to 0 at 4
    rates = [[pytest.approx(0.1 * factor)] * 2 for factor in factors]
    assert seen == [(True, step / 16, rates[step]) for step in range(16)]


# Losses that are not finite

LAST = Path("checkpoints/tiny_cyclegan_0.2_s0/last.pt")


@pytest.mark.parametrize(
    ("step", "place", "advice"),
    [
        (0, "epoch 1, step 1", "no checkpoint exists"),
        (6, "epoch 2, step 3", f"the last good checkpoint is {LAST}; try a lower --lr"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    capsys, monkeypatch, step, place, advice
):
    disc, calls = model.disc, itertools.count()

    def failing(*tensors, **more):
        return disc(*tensors, **more) * (math.nan if next(calls) == 2 * step else 1)

    monkeypatch.setattr(model, "disc", failing)
    error = error_line(capsys, "--training", *TINY, "--epochs", "3", code=1)
    assert error.startswith(f"error: {place}: a loss is not finite (D_S nan, D_I ")
    assert advice in error
    assert next(calls) == 2 * step + 2
    assert LAST.exists() == (step > 0)


def test_a_network_whose_outputs_are_not_finite_is_neither_scored_nor_saved(capsys):
    flags = ["--training", *TINY, "--method", "supervised", "--batch-size", "20", "--lr", "1e37"]
    flags = ["--epochs", "2", *flags]  # of one step
    error = error_line(capsys, *flags, "--name", "one", code=1)
    assert "outputs are not finite: its training has diverged; train with a lower --lr" in error
    assert not Path("checkpoints/one/best.pt").exists()
    assert not Path("checkpoints/one/last.pt").exists()
    assert run(*flags[:-1], "1e-3", "--name", "two") == 0
    last = Path("checkpoints/two/last.pt")
    edit_checkpoint(last, lambda state: [w.fill_(math.nan) for w in state["model"].values()])
    Image.new("RGB", (20, 20)).save("one.png")
    for use in ["--testing"], ["--predict", "one.png"]:
        assert "are not finite" in error_line(capsys, *use, "--checkpoint", last, code=1)
    assert not Path("results/two/metrics.json").exists()
    assert not [*Path("results/two").rglob("*.png")]


def test_a_network_whose_outputs_are_not_finite_leaves_an_earlier_test_and_export(capsys, trained):
    command = [trained.parent, "network.pt2"]
    assert run("--testing") == run(*command, tool=export.export) == 0
    files = [path for path in [*Path("results").rglob("*"), Path("network.pt2")] if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    edit_checkpoint(trained, lambda state: [w.fill_(math.nan) for w in state["model"].values()])
    assert "are not finite" in error_line(capsys, "--testing", code=1)
    assert "are not finite" in error_line(capsys, *command, code=1, tool=export.export)
    assert {path: path.read_bytes() for path in before} == before
