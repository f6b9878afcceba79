"""Which checkpoint is used, and the flags that it sets."""

import os
from pathlib import Path

import pytest
import torch
from runs import SUPERVISED, TINY, edit_checkpoint, error_line, load_with, run

from engine.flags import parse_args
from engine.trained import find_checkpoint

pytestmark = pytest.mark.usefixtures("in_tmp")


def find(*flags) -> Path:
    return find_checkpoint(parse_args(["--testing", *map(str, flags)]))


def make_run(name: str, age: int, **settings) -> Path:
    """A run's folder, last written `age` seconds ago, as far as find_checkpoint looks into it."""
    folder = Path("checkpoints", name)
    folder.mkdir(parents=True)
    table = {"method": "cyclegan", "ratio": 0.2, "seed": 0, **settings}
    lines = [f"{key} = {value!r}\n" for key, value in table.items()]
    (folder / "config.toml").write_text(f"{''.join(lines)}[dataset]\nname = 'tiny'\n")
    for file in "best.pt", "last.pt":
        (folder / file).touch()
        os.utime(folder / file, (1e9 - age, 1e9 - age))
    return folder / "best.pt"


def test_the_most_recent_run_that_matches_the_flags_is_used(capsys):
    old = make_run("old", 9, seed=3)
    partial = make_run("partial", 8, method="supervised")
    half = make_run("half", 7, ratio=0.5)
    newest = make_run("newest", 6)
    (make_run("unfinished", 1)).unlink()  # without best.pt
    (make_run("removed", 1)).unlink()
    Path("checkpoints/removed/last.pt").unlink()
    for name, text in ("broken", "a ="), ("other", 'dataset = "acdc"'), ("more", "[dataset]"):
        make_run(name, 0).with_name("config.toml").write_text(text)
    assert find() == newest
    assert find("--seed", 3) == find("--name", "old") == old
    assert find("--method", "supervised") == partial
    assert find("--ratio", "0.50", "--dataset", "some/tiny.toml") == half
    os.utime(old.with_name("last.pt"))  # a resumed run is recent, whenever best.pt was written
    assert find() == old
    for flags in "--seed 2", "--dataset ../camvid.toml", "--name removed":
        error = error_line(capsys, "--testing", *flags.split())
        advice = f"start one with python main.py --training {flags}"
        assert f"checkpoints contains no trained run {flags}: {advice}" in error
    error = error_line(capsys, "--testing", "--name", "unfinished")
    assert "checkpoints/unfinished: not evaluated yet; resume it" in error


def test_a_run_is_found_by_the_unit_of_its_labels():
    exams = make_run("8exams", 9, labeled=8, label_unit="exam")
    make_run("8images", 5, labeled=8, label_unit="image")
    assert find("--labeled", 8, "--label-unit", "exam") == exams


def test_a_run_that_was_not_evaluated_yet_is_said_to_be_one(capsys, trained):
    trained.unlink()
    error = error_line(capsys, "--testing", "--checkpoint", trained.parent)
    assert f"not been evaluated yet: give {trained.with_name('last.pt')}" in error


def test_a_dataset_is_found_by_the_name_in_its_file(trained):
    for dataset in str(trained.with_name("config.toml")), "gone/tiny.toml":
        assert load_with(["--testing", "--dataset", dataset]).path == trained


def test_a_checkpoint_may_be_given_as_a_file_or_as_a_runs_folder():
    best = make_run("one", 1)
    assert find("--checkpoint", best.parent) == best
    assert find("--checkpoint", best.with_name("last.pt")) == best.with_name("last.pt")
    assert find("--checkpoint", "none.pt") == Path("none.pt")


def test_a_checkpoints_settings_lie_under_the_command_line(trained):
    flags = ["--testing", "--batch-size", "3", "--workers", "1"]
    loaded = load_with(flags)
    assert (loaded.path, loaded.spec.name) == (trained, "tiny")
    args = loaded.args
    assert (args.size, args.ngf, args.method) == ([16, 16], 2, "supervised")
    assert (args.batch_size, args.workers, args.data_root) == (3, 1, "data/tiny")
    assert not loaded.model.training
    assert load_with([*flags, "--data-root", "moved"]).args.data_root == "moved"


def test_a_description_that_differs_from_the_checkpoints_is_named(capsys, trained):
    toml = Path("tiny.toml")
    toml.write_text(toml.read_text().replace("[dataset]", "[dataset]\nignore = 254"))
    assert run("--testing", "--checkpoint", str(trained), "--dataset", "tiny.toml") == 0
    expected = f"tiny.toml: ignore of [dataset] differ from those of {trained}, which are used"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            "--size 16 32 --lr 1",
            "--size [16, 32], but it was trained with [16, 16]; "
            "--lr 1.0, but it was trained with 0.0002",
        ),
        ("--split image", "--split image, but it was trained with paper"),
        ("--checkpoint {} --dataset voc", "--dataset voc, but it was trained with tiny"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_one_error_line(capsys, trained, flags, named):
    error = error_line(capsys, "--testing", *flags.format(trained).split())
    assert f"{trained}: {named}; leave these flags out" in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state["settings"].update(ngf="wide"), "--ngf"),
        (lambda state: state["settings"].update(ngf=3), "does not fit the networks"),
        (lambda state: state["settings"].update(depth=3), "unknown key 'depth'"),
        (lambda state: state["settings"].update(size=torch.ones(2)), "--size"),
        (lambda state: state["dataset"].update(scored=torch.ones(2)), "scored"),
        (lambda state: state["dataset"].pop("classes"), "classes"),
        (lambda state: state.update(split="other"), "contains other images"),
        (lambda state: state.update(format=3), "format 2"),
    ],
)
def test_a_strangers_checkpoint_is_one_error_line(capsys, trained, change, named):
    edit_checkpoint(trained, change)
    error = error_line(capsys, "--testing")
    assert named in error
    assert str(trained) in error or named == "contains other images"


def test_an_earlier_versions_checkpoint_is_one_error_line(capsys, trained):
    last = trained.with_name("last.pt")
    for path in trained, last:
        edit_checkpoint(path, lambda state: state.update(format=1, config=state.pop("settings")))
    commands = {
        ("--testing",): trained,
        ("--training", *SUPERVISED): last,
        ("--training", *TINY, "--name", "more", "--init", str(trained)): trained,
    }
    for flags, path in commands.items():
        before = path.read_bytes()
        assert f"{path}: from an earlier version (format 1)" in error_line(capsys, *flags)
        assert path.read_bytes() == before
