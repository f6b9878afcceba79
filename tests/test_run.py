"""A run's folder: its files, resuming, and what happens when a run is disturbed."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import add_acdc_testing, make_folder, same
from PIL import Image
from runs import (
    SIMPLE,
    SUPERVISED,
    TINY,
    Program,
    curve,
    edit_checkpoint,
    error_line,
    evaluations,
    interrupt,
    last_state,
    record_steps,
    run,
    split_ids,
    tiny_on,
    wait_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine.run
import main
from engine import checkpoint
from engine.flags import parse_args
from engine.folder import RunFolder, locked
from engine.logs import commit_of, write_manifest
from engine.signals import Stop, stop
from model import METHODS
from utils import InputError

ROOT = Path(main.__file__).parent
CPU = torch.device("cpu")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
pytestmark = pytest.mark.usefixtures("in_tmp")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What a run writes


TERMS = {
    "supervised": ["gen_S"],
    "cyclegan": ["gen_S", "gen_I", "cycle_S", "cycle_I", "disc_S", "disc_I", "D_S", "D_I"],
    "advsemi": ["gen_S", "adv", "semi_adv", "semi", "D_S"],
    "meanteacher": ["gen_S", "cutmix"],
}
FILES = {
    "last.pt", "best.pt", "config.toml", "split.json", "metrics.jsonl", "manifest.json",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_is_tested(capsys, monkeypatch, method):
    monkeypatch.setattr("engine.logs.SECONDS_BETWEEN_LINES", 0)
    flags = [*TINY, "--method", method, "--ratio", "0.5"]
    assert run("--training", *flags, "--epochs", "2", "--log-every", "1") == 0
    name = f"tiny_{method}_0.5_s0"
    folder = Path("checkpoints", name)
    files = names(folder)
    assert {file for file in files if not file.startswith("events.out.tfevents")} == FILES
    assert len(files) == len(FILES) + 1
    lines = evaluations(name)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 2), (2, 4)]
    assert list(lines[0]["losses"]) == TERMS[method]
    steps = [value for _, value in curve(folder)]
    means = [sum(steps[:2]) / 2, sum(steps[2:]) / 2]  # since the evaluation before
    assert [line["losses"]["gen_S"] for line in lines] == pytest.approx(means)
    ids = split_ids(name)
    assert [len(ids[role]) for role in ("labeled", "unlabeled", "val")] == [10, 10, 4]
    state = checkpoint.load(folder / "best.pt")
    assert (state["format"], state["split"], state["data_root"]) == (2, ids["hash"], "data/tiny")
    assert state["settings"] == parse_args(["--training", *flags, "--epochs", "2"]).settings
    assert "optimizers" not in state

    printed = capsys.readouterr().out
    places = [line.partition(": gen_S ")[0] for line in printed.splitlines() if ", step " in line]
    assert places == [f"epoch {epoch}/2, step {step}/2" for epoch in "12" for step in "12"]
    means = "mIoU {miou:.4f}"  # the other two are equal
    for line in lines:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in line["losses"].items())
        title = rf"epoch {line['epoch']}/2, [\d.]+ images/s: {means.format(**line)}.*, {losses}\n"
        assert re.search(title, printed)
    assert f"after the last epoch {means.format(**lines[-1])}" in printed
    best = max(lines, key=lambda line: line["miou"])
    assert f"best mIoU {best['miou']:.4f} after epoch {best['epoch']}" in printed
    commands = [words for words in printed.splitlines() if "python main.py" in words]
    assert len(commands) == 2
    for command in commands:
        parse_args(command.split()[4:])

    assert run("--testing", *flags) == 0
    metrics = json.loads(Path("results", name, "metrics.json").read_text())
    assert (metrics["miou"], metrics["epoch"]) == (pytest.approx(best["miou"]), best["epoch"])


def test_a_runs_config_repeats_it():
    assert run("--training", *TINY, "--epochs", "1", "--lr", "0.01") == 0
    config = Path("checkpoints/tiny_cyclegan_0.2_s0/config.toml")
    assert tomllib.loads(config.read_text())["dataset"]["name"] == "tiny"
    assert run("--training", "--dataset", config, "--name", "again") == 0
    assert same(last_state("tiny_cyclegan_0.2_s0")["model"], last_state("again")["model"])


def test_evaluations_come_every_so_many_epochs_and_at_the_end_and_tensorboard_shows_them():
    flags = ["--epochs", "3", "--eval-every", "2", "--log-every", "5", "--name", "one"]
    assert run("--training", *TINY, *flags) == 0
    lines = evaluations("one")
    assert [line["epoch"] for line in lines] == [2, 3]
    assert curve("checkpoints/one", "val/miou") == [
        (line["step"], pytest.approx(line["miou"])) for line in lines
    ]
    assert [step for step, _ in curve("checkpoints/one")] == [5, 10]
    rates = [(5, pytest.approx(2e-4 * 2 / 3)), (10, pytest.approx(2e-4 / 3))]
    assert curve("checkpoints/one", "lr") == rates
    for kind in "iou", "dice":
        expected = [(line["step"], pytest.approx(line[kind]["background"])) for line in lines]
        assert curve("checkpoints/one", f"{kind}/background") == expected
    events = EventAccumulator("checkpoints/one").Reload()
    assert [event.step for event in events.Images("validation")] == [8, 12]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lambda2 | 0.05 |" in text
    assert "| labeled images | 4 |" in text
    assert "_hparams_/session_start_info" in events.summary_metadata


OWN = '[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n'


def test_ones_own_images_need_a_few_lines_of_toml(capsys):
    root = make_folder(Path("pictures"), 8, n_unlabeled=4, n_val=2)
    Path("own.toml").write_text(f"ratio = 1\n{OWN}")
    flags = [*tiny_on("own.toml"), "--epochs", "1", "--data-root", root]
    assert run("--training", *flags) == 0
    printed = capsys.readouterr().out
    assert "8 of 12 images labeled, 4 unlabeled, 2 for validation" in printed
    assert "seed 0, 1 epoch of 2 steps\n" in printed
    assert "labeled mask" not in printed
    assert run("--testing") == 0
    masks = Path("results/own_cyclegan_1_s0/masks")
    assert names(masks) == {"picture 12.png", "picture 13.png"}


def test_patients_may_have_masks_of_some_of_their_images(capsys):
    root = make_folder(Path("pictures"), 30)
    for number in range(0, 30, 3):
        (root / "masks" / f"picture {number}.png").unlink()
    Path("own.toml").write_text(f"ratio = 1\n{OWN}group = '(.)$'\n")  # three images each
    assert (
        run("--training", *tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", root) == 0
    )
    printed = capsys.readouterr().out
    assert "16 of 24 images labeled, 8 unlabeled, 4 for validation" in printed


def test_images_kept_for_a_final_test_are_scored_by_part(capsys):
    root = make_folder(Path("pictures"), 8, n_val=3)
    (root / "val").rename("kept")
    Path("own.toml").write_text(f"ratio = 0.5\n{OWN}")
    flags = ["--training", *tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", root]
    assert run(*flags) == 0
    part = ["--testing", "--part", "test"]
    Path("kept/masks").rename("away")
    Path("kept").rename(root / "test")
    assert "--part test: no image has a mask" in error_line(capsys, *part)
    Path("away").rename(root / "test/masks")
    assert run(*part) == 0
    assert "on 3 test images of own" in capsys.readouterr().out
    results = Path("results/own_supervised_0.5_s0/test")
    metrics = json.loads((results / "metrics.json").read_text())
    assert (metrics["part"], metrics["n_images"]) == ("test", 3)
    assert names(results / "masks") == {"picture 8.png", "picture 9.png", "picture 10.png"}
    (trained_on,) = json.loads(Path("checkpoints/own_supervised_0.5_s0/split.json").read_text())[
        "labeled"
    ][:1]
    for role in "images", "masks":  # as if it had been kept for the test
        (root / role / f"{trained_on}.png").rename(root / "test" / role / f"{trained_on}.png")
    assert f"--part test: in the run's split: {trained_on}" in error_line(capsys, *part)
    for role in "images", "masks":
        (root / "test" / role / f"{trained_on}.png").rename(root / role / f"{trained_on}.png")
    error = error_line(capsys, "--testing", "--part", "val")
    assert "--part val: the run's split uses this part" in error
    lists = {"labeled": ["picture 1"], "unlabeled": ["picture 9"], "val": ["picture 2"]}
    Path("mine.json").write_text(json.dumps(lists))
    assert run(*flags, "--split", "mine.json") == 0
    error = error_line(capsys, *part, "--name", "own_supervised_mine_s0")
    assert "--part test: in the run's split: picture 9" in error
    lists["unlabeled"] = ["picture 3"]
    Path("other.json").write_text(json.dumps(lists))  # without the images that the run has seen
    for name in "own_supervised_mine_s0", "own_supervised_0.5_s0":
        error = error_line(capsys, *part, "--name", name, "--split", "other.json")
        assert "--split other.json: lists other images than the run started with" in error


def test_masks_whose_colors_are_numbered_otherwise_than_in_training_are_not_scored(capsys):
    root = make_folder(Path("pictures"), 8, n_val=3)
    (root / "val").rename(root / "test")
    Path("own.toml").write_text(f"ratio = 0.5\n{OWN}")
    flags = [*tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", root]
    assert run("--training", *flags) == 0
    assert run("--testing", "--part", "test") == 0
    for path in (root / "test/masks").iterdir():
        image = Image.open(path)
        image.putpalette([0, 0, 0, 0, 128, 0])
        image.save(path)
    error = error_line(capsys, "--testing", "--part", "test")
    assert "index 1 is drawn in (0, 128, 0), in training it was in (128, 0, 0); save" in error


@pytest.mark.parametrize(("dataset", "part", "n"), [("voc", "val", 1), ("acdc", "test", 8)])
def test_vocs_val_txt_and_acdcs_testing_are_scored_by_part(capsys, voc, acdc, dataset, part, n):
    root = {"voc": voc, "acdc": add_acdc_testing(acdc, 2)}[dataset]
    flags = [*tiny_on(dataset), *SUPERVISED[len(TINY) :], "--ratio", "0.5", "--data-root", root]
    assert run("--training", *flags) == 0
    assert run("--testing", "--part", part) == 0
    assert f"on {n} {part} images of {dataset}" in capsys.readouterr().out


def test_a_run_whose_images_got_masks_is_tested_with_its_own_split(capsys):
    root = make_folder(Path("pictures"), 8)
    (root / "masks/picture 3.png").rename("later.png")
    Path("own.toml").write_text(f"ratio = 1\n{OWN}")
    flags = [*tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", root]
    assert run("--training", *flags) == 0
    Path("later.png").rename(root / "masks/picture 3.png")
    error = error_line(capsys, "--testing")
    assert "contains other images or masks than the run started with" in error
    assert "give the run's split.json as --split" in error
    assert run("--testing", "--split", "checkpoints/own_supervised_1_s0/split.json") == 0


@pytest.mark.parametrize("by_file", [False, True])
def test_another_folder_is_another_dataset_unless_it_has_all_of_the_runs_images(capsys, by_file):
    root = make_folder(Path("pictures"), 8)
    Path("own.toml").write_text(f"ratio = 0.5\n{OWN}")
    lists = {"labeled": ["picture 1"], "unlabeled": ["picture 3"], "val": ["picture 2"]}
    Path("mine.json").write_text(json.dumps({**lists, "test": ["picture 4"]}))
    flags = ["--training", *tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", root]
    assert run(*flags, *(["--split", "mine.json"] if by_file else [])) == 0
    part = "--testing", "--part", "test", "--data-root"

    other = make_folder(Path("other/test"), 2).parent  # of another hospital, with nothing else
    capsys.readouterr()
    assert run(*part, other, "--results", "theirs") == 0
    printed = capsys.readouterr().out
    assert "on 2 test images" in printed
    assert "has images of these names, too" in printed
    make_folder(Path("third/test"), 9)  # whose names contain all of the run's
    Path("third/test/masks/picture 8.png").unlink()
    assert run(*part, "third", "--results", "others") == 0
    printed = capsys.readouterr().out
    assert "on 8 test images" in printed
    assert "1 of 9 images have no mask and are not scored" in printed
    root.rename("moved")
    make_folder(Path("moved/test"), 1)
    if by_file:
        for role in "images", "masks":
            next(Path("moved/test", role).iterdir()).unlink()
        assert run(*part, "moved") == 0
        assert "on 1 test image" in capsys.readouterr().out
        assert names(Path("results/own_supervised_mine_s0/test/masks")) == {"picture 4.png"}
        for _ in range(2):  # the other's scores do not replace them
            error = error_line(capsys, *part, other)
            assert f"contains the scores of images in {Path('moved').resolve()}; give" in error
    else:
        for role in "images", "masks":  # as if it had been kept for the test
            Path("moved", role, "picture 0.png").unlink()
        error = error_line(capsys, *part, "moved")
        assert "--part test: in the run's split: picture 0" in error


def test_a_copy_of_a_checkpoint_without_its_split_is_not_scored_on_parts_that_it_used(capsys):
    root = make_folder(Path("pictures"), 8, n_val=3)
    Path("own.toml").write_text(f"ratio = 0.5\n{OWN}")
    flags = ["--training", *tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", root]
    assert run(*flags, "--name", "one") == 0
    shutil.copy("checkpoints/one/best.pt", "copy.pt")
    root.rename("moved")
    part = ["--testing", "--checkpoint", "copy.pt", "--part", "val", "--data-root", "moved"]
    assert "--part val: the run's split uses this part" in error_line(capsys, *part)
    Path("moved").rename(root)
    (root / "val").rename(root / "test")
    part = ["--testing", "--part", "test", "--checkpoint"]
    error = error_line(capsys, *part, "copy.pt")
    assert "no split.json beside copy.pt says which images it was trained on; copy" in error
    make_folder(Path("theirs"), 0, n_val=3)
    Path("theirs/val").rename("theirs/test")
    assert run(*part, "copy.pt", "--data-root", "theirs") == 0
    assert "no split.json beside copy.pt says" in capsys.readouterr().out
    lists = split_ids("one")
    lists["labeled"].pop()
    Path("checkpoints/one/split.json").write_text(json.dumps(lists))
    error = error_line(capsys, *part, "checkpoints/one")
    assert "checkpoints/one/split.json: not the split of checkpoints/one/best.pt; restore" in error


@pytest.mark.parametrize("file", ["metrics.jsonl", "best.pt", "last.pt"])
def test_a_run_that_lacks_a_file_is_not_resumed(capsys, file):
    flags = ["--training", *SUPERVISED, "--epochs", "3", "--name", "one"]
    interrupt(6, *flags[1:])
    path = Path("checkpoints/one", file)
    path.write_bytes(b"") if file == "last.pt" else path.unlink()
    error = error_line(capsys, *flags)
    assert f"one/{file}" in error or f"no {file}" in error
    assert "give --overwrite to start over" in error


# --split FILE


LISTS = {
    "labeled": ["phantom_0003", "phantom_0001"],
    "unlabeled": ["phantom_0005", "phantom_0007", "phantom_0009"],
    "val": ["phantom_0020", "phantom_0002"],
}


def write_lists(path: str, **changes) -> None:
    Path(path).write_text(json.dumps({**LISTS, **changes}))


def test_a_split_file_decides_what_is_labeled_and_scored(capsys):
    write_lists("mine.json", test=["phantom_0004", "phantom_0006", "phantom_0010"])
    assert run("--training", *SUPERVISED, "--split", "mine.json") == 0
    printed = capsys.readouterr().out
    assert "supervised, --split mine.json, seed 0" in printed
    assert "2 of 5 images labeled, 3 unlabeled (3 have masks that are not used), 2 for" in printed
    ids = split_ids("tiny_supervised_mine_s0")
    assert {role: ids[role] for role in LISTS} == {role: sorted(LISTS[role]) for role in LISTS}
    results = Path("results/tiny_supervised_mine_s0")
    for part, folder, role, title in (
        ([], results, "val", "on 2 validation images"),
        (["--part", "test"], results / "test", "test", "on 3 test images"),
    ):
        assert run("--testing", *part) == 0
        assert title in capsys.readouterr().out
        assert names(folder / "masks") == {f"{name}.png" for name in ids[role]}


def test_a_run_with_a_split_file_resumes_with_the_same_lists_alone(capsys):
    write_lists("mine.json")
    flags = ["--training", *SUPERVISED, "--epochs", "4", "--name", "one", "--split"]
    interrupt(1, *flags[1:], "mine.json")
    assert "split was mine.json, is paper" in error_line(capsys, *flags, "paper")
    Path("mine.json").rename("moved.json")
    assert run(*flags, "moved.json") == 0
    assert "resuming at epoch 1, step 1" in capsys.readouterr().out
    Path("moved.json").unlink()
    assert run("--testing") == 0  # with the run's own split.json
    write_lists("other.json", labeled=["phantom_0001"])
    for mode in flags[:-1], ["--testing"]:  # although the run is finished
        error = error_line(capsys, *mode, "--split", "other.json")
        assert "--split other.json: lists other images than the run started with" in error


# Resuming


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("method", ["cyclegan", "meanteacher"])
def test_a_run_that_was_stopped_within_an_epoch_ends_as_if_it_never_was(
    capsys, monkeypatch, device, method
):
    flags = [*TINY, "--epochs", "2", "--dropout", "0.5", "--pool-size", "3", "--lr", "0.01"]
    flags += ["--method", method, "--device", device, "--deterministic", "--augment"]
    assert run("--training", *flags, "--name", "whole") == 0
    assert torch.are_deterministic_algorithms_enabled()
    steps = record_steps(monkeypatch, method, lambda *_: None)
    flags += ["--name", "cut"]
    interrupt(2, *flags)
    printed = capsys.readouterr().out
    assert "SIGTERM: saved checkpoints/cut/last.pt; the same command resumes the run" in printed

    def add_keys_of_earlier_versions(state):
        state["schedulers"] = {"G": {"last_epoch": 9}}
        state["progress"]["metrics"] = {"miou": 0.5}

    edit_checkpoint(Path("checkpoints/cut/last.pt"), add_keys_of_earlier_versions)
    interrupt(5, *flags, "--workers", "1")
    assert "resuming at epoch 1, step 2" in capsys.readouterr().out
    assert run("--training", *flags, "--log-every", "1") == 0
    assert "resuming at epoch 2, step 3" in capsys.readouterr().out
    assert len(steps) == 8
    assert same(last_state("whole"), last_state("cut"))
    assert evaluations("whole") == evaluations("cut")


def test_a_resumed_run_logs_every_step_and_evaluation_once(monkeypatch):
    flags = [*SUPERVISED, "--epochs", "2", "--log-every", "1"]
    interrupt(6, *flags)
    assert not stop.training
    log = SIMPLE / "metrics.jsonl"
    (line,) = log.read_text().splitlines()
    log.write_text(f"{line}\n{line.replace('1', '2', 1)}\n")  # killed before last.pt was written
    monkeypatch.setattr(os, "getpid", lambda: 99999999)  # in the name of the event file
    assert run("--training", *flags) == 0
    assert [line["epoch"] for line in evaluations(SIMPLE.name)] == [1, 2]
    assert [step for step, _ in curve(SIMPLE)] == [*range(1, 9)]


@pytest.mark.parametrize(("minutes", "n_saved"), [("0", 8 + 3), ("1.5", 4 + 3), ("100", 3)])
def test_checkpoints_are_written_when_due(monkeypatch, minutes, n_saved):
    saved, save = [], RunFolder.save
    steps = record_steps(monkeypatch, "supervised", lambda *_: None)
    monkeypatch.setattr(time, "monotonic", lambda: 60 * len(steps))  # each step takes a minute
    monkeypatch.setattr(RunFolder, "save", lambda *args: (saved.append(args[1]), save(*args)))
    assert run("--training", *SUPERVISED, "--epochs", "2", "--save-every", minutes) == 0
    assert saved.count("last.pt") == n_saved


def test_a_finished_run_changes_nothing_under_other_flags_of_the_machine_and_files(capsys, trained):
    last = trained.with_name("last.pt")
    before = last.stat().st_mtime_ns
    flags = "--device cpu --compile --workers 1 --data-root moved --eval-every 7"
    shutil.rmtree("data/cache")
    assert run("--training", *SUPERVISED, *flags.split()) == 0
    assert "is finished after 1 epoch: best mIoU" in capsys.readouterr().out
    assert last.stat().st_mtime_ns == before
    assert not Path("data/cache").exists()


def test_a_run_does_not_continue_on_another_folder_with_the_same_names(capsys):
    Path("own.toml").write_text(OWN)
    first, other = make_folder(Path("first"), 20), make_folder(Path("other"), 20)
    flags = ["--training", *tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root"]
    assert run(*flags, first) == 0
    error = error_line(capsys, *flags, other)
    assert "contains a run on first, which still exists, not on --data-root other; give" in error
    Path("link").symlink_to(first)
    assert run(*flags, "link") == 0
    first.rename("moved")
    assert run(*flags, "moved") == 0


def test_a_run_does_not_continue_where_its_relative_data_root_leads_elsewhere(capsys):
    Path("own.toml").write_text(OWN)
    make_folder(Path("v1"), 20), make_folder(Path("v2"), 20)
    Path("link").symlink_to("v1")
    flags = [*tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", "link"]
    assert run("--training", *flags) == 0
    Path("link").unlink()
    Path("link").symlink_to("v2")
    error = error_line(capsys, "--training", *flags)
    v1 = Path("v1").resolve()
    assert f"contains a run on {v1}, which still exists, not on --data-root link; give" in error
    assert run("--testing", *tiny_on("own.toml"), "--method", "supervised") == 0
    assert f"validation images of own ({v1})" in capsys.readouterr().out
    Path("v1").rename("v3")  # moved, with a link at its old place
    Path("v1").symlink_to("v3")
    assert run("--training", *flags[:-1], "v3") == 0


def test_a_run_resumed_within_an_epoch_is_evaluated_at_its_end_under_any_eval_every():
    flags = ["--training", *SUPERVISED, "--epochs", "3"]
    assert run(*flags, "--name", "whole") == 0
    interrupt(6, *flags[1:], "--name", "cut", "--eval-every", "3")  # epochs of four steps
    assert run(*flags, "--name", "cut") == 0
    whole = {line["epoch"]: line["iou"] for line in evaluations("whole")}
    assert {line["epoch"]: line["iou"] for line in evaluations("cut")} == {2: whole[2], 3: whole[3]}


def test_settings_and_a_description_that_differ_are_an_error_that_names_them(capsys, trained):
    tiny = Path("tiny.toml")
    tiny.write_text(tiny.read_text().replace("scored = [0, 1, 2, 3]", "scored = [1, 2, 3]"))
    before = trained.with_name("last.pt").read_bytes()
    flags = "--betas 0.1 0.2 --augment --method advsemi --split image --labeled 3 --init other.pt"
    error = error_line(capsys, "--training", *SUPERVISED, "--name", SIMPLE.name, *flags.split())
    for difference in (
        "method was supervised, is advsemi", "ratio was 0.2, is None", "labeled was None, is 3",
        "split was paper, is image", "betas was [0.5, 0.999], is [0.1, 0.2]",
        "augment was False, is True", "init was None, is other.pt",
        "[dataset] scored was (0, 1, 2, 3), is (1, 2, 3)",
    ):  # fmt: skip
        assert difference in error
    assert "give --name for another folder, or --overwrite to start over" in error
    assert trained.with_name("last.pt").read_bytes() == before


def test_a_run_from_before_a_flag_or_a_key_of_the_description_has_its_default(capsys, trained):
    def make_older(state):
        assert state["dataset"].pop("orientation") == "any"
        state["dataset"]["any_orientation"] = True  # its name before --augment
        del state["settings"]["augment"], state["settings"]["reduction"]
        del state["settings"]["pool_size"], state["settings"]["labeled"]
        assert state["dataset"].pop("group") is None

    edit_checkpoint(trained.with_name("last.pt"), make_older)
    assert run("--training", *SUPERVISED, "--name", SIMPLE.name) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("progress"),
        lambda state: state.pop("optimizers"),
        lambda state: state.update(progress={"evaluated": 1}),  # all of the epochs
        lambda state: state["optimizers"]["G"].update(param_groups=[]),
        lambda state: state["processes"][0].update(rng=torch.ones(3)),
        lambda state: state.update(processes=[]),
    ],
)
def test_a_run_does_not_resume_from_a_strangers_checkpoint(capsys, trained, change):
    path = trained.with_name("last.pt")
    edit_checkpoint(path, lambda state: state["progress"].update(evaluated=0))
    edit_checkpoint(path, change)
    before = path.read_bytes()
    error = error_line(capsys, "--training", *SUPERVISED)
    assert f"{path}: a run cannot resume from it" in error
    assert path.read_bytes() == before


def test_optimizer_state_with_other_strides_resumes_to_the_same_weights():
    flags = [*TINY, "--epochs", "3", "--lr", "0.01", "--name"]
    assert run("--training", *flags, "whole") == 0
    interrupt(6, *flags, "cut")
    changed = []

    def contiguous(state):
        for optimizer in state["optimizers"].values():
            for moments in optimizer["state"].values():
                for key, value in moments.items():
                    if value.dim() == 4:
                        moments[key] = value.contiguous()
                        changed.append(moments[key].stride() != value.stride())

    edit_checkpoint(Path("checkpoints/cut/last.pt"), contiguous)
    assert any(changed)
    assert run("--training", *flags, "cut") == 0
    assert same(last_state("whole")["model"], last_state("cut")["model"])


# --init


@pytest.mark.parametrize(
    ("method", "other", "sources"),
    [
        ("cyclegan", "cyclegan", {name: name for name in ("G_IS", "G_SI", "D_S", "D_I")}),
        ("advsemi", "cyclegan", {"G_IS": "G_IS"}),  # their D_S is another network
        ("meanteacher", "cyclegan", {"G_IS": "G_IS", "teacher": "G_IS"}),
        ("meanteacher", "meanteacher", {"G_IS": "G_IS", "teacher": "teacher"}),
    ],
)
def test_init_takes_over_the_networks_that_both_have(capsys, monkeypatch, method, other, sources):
    flags = ["--training", *TINY, "--epochs", "1", "--lr", "0.01", "--method"]
    assert run(*flags, other, "--name", "other") == 0
    monkeypatch.setattr(METHODS[method], "step", lambda *_: {"gen_S": torch.zeros(())})
    assert run(*flags, method, "--name", "own", "--init", "checkpoints/other") == 0
    printed = capsys.readouterr().out
    assert f"starting from {', '.join(sources)} of checkpoints/other" in printed
    weights, theirs = last_state("own")["model"], last_state("other")["model"]
    for key in weights:
        network, _, parameter = key.partition(".")
        if network in sources:
            assert torch.equal(weights[key], theirs[f"{sources[network]}.{parameter}"])


def test_init_from_networks_that_do_not_fit_is_an_error_and_leaves_no_folder(capsys, trained):
    flags = ["--training", *SUPERVISED, "--ngf", "3", "--init", trained, "--name", "no"]
    assert "does not fit the networks" in error_line(capsys, *flags)
    assert not Path("checkpoints/no").exists()


# Folders that are in use, not runs, or cut short


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_and_leaves_no_log(
    capsys, trained
):
    for name in "last.pt", "best.pt", "metrics.jsonl":
        (SIMPLE / name).unlink()
    (before,) = trained.parent.glob("events.out.tfevents*")
    before.rename(f"{before}.before")
    assert run("--training", *SUPERVISED) == 0
    assert "resuming" not in capsys.readouterr().out
    (events,) = trained.parent.glob("events.out.tfevents*")
    assert not events.name.endswith(".before")
    assert [line["epoch"] for line in evaluations(SIMPLE.name)] == [1]


def test_overwrite_never_deletes_a_folder_that_holds_no_run(capsys):
    precious = Path("checkpoints/precious/thesis.txt")
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    flags = ["--training", *TINY, "--name", "precious", "--overwrite"]
    assert "precious contains no run" in error_line(capsys, *flags)
    config = precious.with_name("config.toml")
    config.write_text("ngf = 2\n")
    assert "precious contains no run" in error_line(capsys, *flags)
    error = error_line(capsys, *flags[:-1], "--config", config)
    assert "precious: contains config.toml, which is not from a run" in error
    assert precious.is_file()
    assert config.read_text() == "ngf = 2\n"


@pytest.mark.parametrize("name", ["events.out.tfevents.1.mine", "split.json", "manifest.json"])
def test_a_run_does_not_start_in_a_folder_with_files_of_others(capsys, name):
    mine = Path("checkpoints/mine", name)
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    error = error_line(capsys, "--training", *SUPERVISED, "--name", "mine")
    assert f"checkpoints/mine: contains {name}, which is not from a run; give --name" in error
    assert {path.name: path.read_text() for path in mine.parent.iterdir()} == {name: "mine"}


def test_a_run_may_start_beside_files_that_it_does_not_write():
    log = Path("checkpoints/one/log.txt")  # of a shell or a cluster
    log.parent.mkdir(parents=True)
    log.write_text("mine")
    assert run("--training", *SUPERVISED, "--name", "one") == 0
    assert log.read_text() == "mine"


def test_a_run_that_is_killed_again_and_again_can_be_locked():
    fork = multiprocessing.get_context("fork")
    for _ in range(3):
        ready = fork.Event()
        holder = fork.Process(target=hold, args=(Path("one"), ready))
        holder.start()
        assert ready.wait(30)
        assert Path("one/lock").read_text().startswith(f"process {holder.pid} on ")
        holder.kill()
        holder.join()


@pytest.mark.parametrize("key", ["init", "config", "dataset", "split", "data-root", "cache"])
def test_overwrite_does_not_delete_what_the_new_run_reads(capsys, trained, key):
    lists = json.loads((SIMPLE / "split.json").read_text())
    (SIMPLE / "mine.toml").write_text("lr = 0.01")
    (SIMPLE / "old").mkdir()
    (SIMPLE / "old/split.json").write_text(json.dumps(lists))
    values = {"init": trained, "config": SIMPLE / "mine.toml", "split": SIMPLE / "old/split.json"}
    values["dataset"] = shutil.copy("tiny.toml", SIMPLE / "own.toml")
    path = values.get(key, SIMPLE / "data")
    flags = [*SUPERVISED, "--name", SIMPLE.name, "--overwrite", f"--{key}", path]
    before = names(SIMPLE)
    error = error_line(capsys, "--training", *flags)
    assert f"--{key} {path.absolute()}: --overwrite deletes it; move it, or give --name" in error
    assert names(SIMPLE) == before


def test_a_run_may_be_repeated_in_its_folder_from_its_own_files(trained):
    own = ["--dataset", SIMPLE / "config.toml", "--split", SIMPLE / "split.json"]
    assert run("--training", *own, "--name", SIMPLE.name, "--device", "cpu", "--overwrite") == 0
    assert run("--testing", "--name", SIMPLE.name) == 0


def test_a_run_of_a_newer_version_is_not_resumed_without_its_settings(capsys, trained):
    last = trained.with_name("last.pt")
    edit_checkpoint(last, lambda state: state["settings"].update(label_smoothing=0.1))
    error = error_line(capsys, "--training", *SUPERVISED, "--epochs", "2")
    assert f"{SIMPLE}: contains a run of another version, with label_smoothing" in error


def test_the_parent_of_the_run_folders_may_have_any_name():
    parent = "two\nlines 'and' a quote"
    assert run("--training", *SUPERVISED, "--checkpoints", parent) == 0
    assert run("--testing", "--checkpoints", parent) == 0


def test_a_batch_that_cannot_be_mixed_is_an_error_before_overwrite_deletes_a_run(capsys, trained):
    flags = [*TINY, "--method", "meanteacher", "--cutmix-on", "labeled", "--batch-size", "1"]
    error = error_line(capsys, "--training", *flags, "--name", SIMPLE.name, "--overwrite")
    assert "CutMix needs two images per process; give a larger --batch-size" in error
    assert trained.is_file()


@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl"])
def test_results_without_a_last_checkpoint_are_not_trained_over(capsys, trained, name):
    for other in {"last.pt", "best.pt", "metrics.jsonl", "config.toml"} - {name}:
        (SIMPLE / other).unlink()
    before = (SIMPLE / name).read_bytes()
    error = error_line(capsys, "--training", *SUPERVISED)
    assert f"{SIMPLE}: contains {name} but no last.pt" in error
    assert (SIMPLE / name).read_bytes() == before


@pytest.mark.parametrize("killed_in", ["_save", "evaluation"])
def test_a_run_killed_in_its_first_evaluation_resumes(monkeypatch, killed_in):
    """last.pt is there before best.pt and metrics.jsonl are."""
    owner = engine.run.Run if killed_in == "_save" else engine.run.Logs
    real = getattr(owner, killed_in)

    def dying(self, *args):
        real(self, *args)
        if killed_in == "evaluation" or args == ("best.pt",):
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(owner, killed_in, dying)
        with pytest.raises(SystemExit):
            run("--training", *SUPERVISED)
    assert (SIMPLE / "best.pt").is_file()
    assert run("--training", *SUPERVISED) == 0
    assert [line["epoch"] for line in evaluations(SIMPLE.name)] == [1]


def test_a_damaged_log_is_named_when_a_run_resumes(capsys, trained):
    flags = [*SUPERVISED, "--epochs", "2", "--decay-epoch", "1"]
    interrupt(6, *flags, "--overwrite")
    log = SIMPLE / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-20])
    error = error_line(capsys, "--training", *flags)
    assert f"{log}: " in error
    assert "restore the file, or give --overwrite to start over" in error
    log.write_text(whole)
    manifest = SIMPLE / "manifest.json"  # no run needs it
    manifest.write_text(manifest.read_text()[:-20])
    assert run("--training", *flags) == 0
    assert f"{manifest}: " in capsys.readouterr().out
    assert "finished" in json.loads(manifest.read_text())


@pytest.mark.parametrize("gone", ["", "last.pt best.pt split.json"])
def test_overwrite_starts_anew_also_where_it_was_cut_short_before(trained, gone):
    for name in gone.split():
        (SIMPLE / name).unlink()
    (SIMPLE / "old.txt").touch()
    assert run("--training", *SUPERVISED, "--overwrite") == 0
    assert not (SIMPLE / "old.txt").exists()
    assert [line["epoch"] for line in evaluations(SIMPLE.name)] == [1]


def hold(folder: Path, ready) -> None:
    """Lock a run's folder until this process is killed."""
    with locked(folder, "--checkpoints"):
        ready.set()
        time.sleep(60)


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_holds_nothing(capsys):
    flags = ["--training", *SUPERVISED, "--name", "one"]
    folder = Path("checkpoints/one")
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(folder, ready))
    holder.start()
    assert ready.wait(30)
    (folder / ".other.123.tmp").write_text("half a file")
    for more in [], ["--overwrite"]:
        error = error_line(capsys, *flags, *more)
        assert f"checkpoints/one: process {holder.pid} on " in error
        assert "is already training there; wait for it, or give --name" in error
    holder.kill()
    holder.join()
    assert (folder / "lock").is_file()
    assert run(*flags) == 0
    assert {name for name in names(folder) if "events" not in name} == FILES


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_run_whose_lock_is_gone_writes_nothing_more(capsys, monkeypatch, is_replaced):
    folder = Path("checkpoints/one")
    save = RunFolder.save

    def lose_lock(self, name, state):
        (folder / "lock").unlink()
        if is_replaced:
            (folder / "lock").write_text("process 1 on elsewhere")
        save(self, name, state)

    monkeypatch.setattr(RunFolder, "save", lose_lock)
    error = error_line(capsys, "--training", *SUPERVISED, "--name", "one", code=1)
    assert f"{folder}: its lock was deleted or replaced" in error
    assert not (folder / "last.pt").exists()
    assert (folder / "lock").exists() == is_replaced


def test_a_file_of_the_lock_s_name_that_no_run_wrote_stays(capsys):
    folder = Path("checkpoints/one")
    folder.mkdir(parents=True)
    (folder / "lock").write_text("my notes")
    error = error_line(capsys, "--training", *SUPERVISED, "--name", "one")
    assert f"{folder / 'lock'}: not written by a run; give --name" in error
    assert (folder / "lock").read_text() == "my notes"
    (folder / "lock").unlink()
    (folder / "lock").mkdir()
    assert f"{folder / 'lock'}: Is a directory" in error_line(
        capsys, "--training", *SUPERVISED, "--name", "one"
    )


def test_a_lock_is_released_however_its_body_ends():
    folder = Path("one")
    with suppress(ZeroDivisionError), locked(folder, "--checkpoints"):
        assert (folder / "lock").read_text().startswith(f"process {os.getpid()} on ")
        raise ZeroDivisionError
    assert not folder.exists()
    with locked(folder, "--checkpoints"):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with pytest.raises(InputError, match="--checkpoints one/kept"):
        locked(folder / "kept", "--checkpoints").__enter__()


@contextmanager
def full_disk(size: int):
    """Limit the size of files, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "file"), [(1500, "cache"), (2000, "events"), (200_000, "best.pt")]
)
def test_a_full_disk_is_one_error_line_and_the_last_checkpoint_stays(capsys, size, file):
    flags = [*TINY, "--ngf", "8", "--epochs", "1", "--name", "one"]
    flags += ["--batch-size", "2", "--log-every", "1"]
    interrupt(1, *flags)
    last = Path("checkpoints/one/last.pt")
    before = last.read_bytes()
    assert len(before) > 200_000
    if file == "cache":
        shutil.rmtree("data")
    with full_disk(size):
        error = error_line(capsys, "--training", *flags, code=1)
    assert file in error
    assert "cannot be written (File too large)" in error
    assert "MiB are needed" in error
    assert last.read_bytes() == before
    assert not list(Path("checkpoints/one").glob(".*"))
    assert run("--training", *flags) == 0


# Signals


def test_a_signal_saves_a_checkpoint_and_ends_with_128_and_its_number():
    flags = [*TINY, "--workers", "1", "--epochs", "1000", "--log-every", "1"]
    program = Program("--training", *flags)
    wait_for(lambda: "epoch 1/" in program.printed[0])
    time.sleep(0.3)
    os.killpg(program.pid, signal.SIGINT)  # as Ctrl-C does: the reading processes hear it too
    code, out, err = program.ended()
    assert code == 130, err
    assert "SIGINT: saved checkpoints/tiny_cyclegan_0.2_s0/last.pt" in out
    assert "Traceback" not in err
    assert last_state("tiny_cyclegan_0.2_s0")["epoch"] >= 1


def test_a_reader_that_hangs_up_loses_no_checkpoint(capsys, monkeypatch):
    def say(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(engine.run.Logs, "say", say)
    error = error_line(capsys, "--training", *SUPERVISED, code=1)
    assert error.endswith("error: standard output: Broken pipe")
    assert [line["epoch"] for line in evaluations(SIMPLE.name)] == [1]
    assert last_state(SIMPLE.name)["progress"]["evaluated"] == 1


def test_a_second_signal_does_not_wait(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    handler = Stop()
    handler.training = True
    handler(signal.SIGTERM, None)
    assert (handler.signum, codes) == (signal.SIGTERM, [])
    handler(signal.SIGINT, None)
    assert codes == [130]


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    handler = Stop()
    handler.training = True
    handler(signal.SIGINT, None)
    handler(signal.SIGINT, None)  # torchrun passes on what the terminal has sent already
    assert (handler.signum, codes) == (signal.SIGINT, [])
    handler.heard_at -= 2
    handler(signal.SIGINT, None)
    assert codes == [130]


def test_a_signal_while_there_is_nothing_to_save_ends_the_program(capfd):
    with pytest.raises(SystemExit) as caught:
        Stop()(signal.SIGUSR1, None)
    assert caught.value.code == 128 + signal.SIGUSR1
    assert capfd.readouterr().out == "SIGUSR1: stopped; there was nothing to save\n"


def test_signals_are_handled_before_anything_slow_is_imported():
    script = "import sys, engine.signals; print('torch' in sys.modules, 'numpy' in sys.modules)"
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "False False\n"


# Logs


def test_a_repository_around_the_program_has_another_commit():
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another"]:
        subprocess.run([*git, *command], check=True)
    Path("program").mkdir()
    assert commit_of(Path("program").resolve()) is None
    assert len(commit_of(Path.cwd())) == 40
    subprocess.run([*git, "add", "tiny.toml"], check=True)
    assert commit_of(Path.cwd()).endswith("-dirty")


def test_the_manifest_names_command_versions_and_machine_and_keeps_what_it_held(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--training"])
    write_manifest(Path("."), CPU, started="today")
    write_manifest(Path("."), CPU, finished="tomorrow")
    manifest = json.loads(Path("manifest.json").read_text())
    assert (manifest["started"], manifest["finished"]) == ("today", "tomorrow")
    assert (manifest["command"], manifest["device"]) == ("main.py --training", "cpu")
    assert (manifest["torch"], manifest["gpu"]) == (version("torch"), None)
    assert {"numpy", "python", "platform", "commit"} <= manifest.keys()
    monkeypatch.setenv("GIT_DIR", ".git")  # as in a hook of another repository
    assert commit_of(ROOT) == manifest["commit"]
    monkeypatch.setenv("PATH", "nowhere")  # without git
    write_manifest(Path("."), CPU)
    assert json.loads(Path("manifest.json").read_text())["commit"] is None
