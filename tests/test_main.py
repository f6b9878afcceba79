"""The command line: flags, TOMLs, defaults, errors, and which checkpoint is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_acdc, make_tiny
from runs import SUPERVISED, TINY, edit_checkpoint, error_line, tiny_on

import main
import utils
from data_utils import load_spec
from datasets.spec import CONFIG, read_toml
from engine.signals import stop
from utils import InputError

PARSER = main.build_parser()
FLAGS = [flag for action in PARSER._actions for flag in action.option_strings]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """A folder of its own, with tiny.toml: 24 phantoms, 4 of them validation images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stop, "signum", 0)
    make_tiny(20, 4)


# Flags


DEFAULTS = {
    "method": "cyclegan", "ratio": 0.2, "seed": 0, "data_root": "data/voc",
    "epochs": 400, "decay_epoch": 100, "batch_size": 5, "lr": 2e-4, "betas": [0.5, 0.999],
    "augment": False,
    "reduction": "mean",
    "lambda1": 1, "lambda2": 0.05, "lambda3": 1, "lambda4": 1, "lambda5": 1,
    "ngf": 64, "ndf": 64, "n_blocks": 9, "dropout": 0, "pool_size": 0,
    "disc_norm": "batch", "disc_input": "softmax", "disc_kernel": 1, "cutmix_on": "both",
    "size": [200, 200], "precision": "fp32", "split": "paper", "label_unit": "image",
    "normalization": "range", "ignored": "skip", "init": None,
}  # fmt: skip


def test_defaults_are_the_papers():
    args = vars(main.parse_args(["--training", "--dataset", "voc"]))
    assert {key: args[key] for key in DEFAULTS} == DEFAULTS
    assert main.parse_args(["--training", "--dataset", "cityscapes"]).size == [128, 256]


def test_learning_rate_falls_after_a_quarter_of_the_epochs_by_default():
    flags = ["--training", "--dataset", "voc", "--epochs", "41"]
    assert main.parse_args(flags).decay_epoch == 10
    assert main.parse_args([*flags, "--decay-epoch", "0"]).decay_epoch == 0


def test_settings_are_the_flags_of_the_groups_that_change_the_result():
    groups = [PARSER.keys[title] for title in ("experiment", "optimization", "networks")]
    expected = [key for keys in groups for key in keys if key != "dataset"]
    args = main.parse_args(["--training", "--dataset", "voc", "--lambda4", "0.5"])
    assert list(args.settings) == expected
    assert args.settings["lambda4"] == 0.5
    assert {*DEFAULTS} - {"data_root"} == {*expected}
    every_group = [key for keys in PARSER.keys.values() for key in keys]
    assert sorted(every_group) == sorted(a.dest for a in PARSER._actions if a.dest != "help")


def test_given_are_the_flags_of_the_command_line_alone():
    Path("config.toml").write_text("ngf = 4\n")
    flags = ["--training", "--config", "config.toml", "--seed", "0", "--betas", "0", "0.9"]
    expected = {"training": True, "config": "config.toml", "seed": 0, "betas": [0, 0.9]}
    assert main.parse_args(flags).given == expected


def test_help_explains_every_flag_and_shows_every_default_but_none(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(action.help for action in PARSER._actions)
    assert "(default: None)" not in text
    assert "(default: False)" not in text
    for action in PARSER._actions:
        default = action.default
        if not isinstance(default, bool | None) and action.dest != "help":
            typed = " ".join(map(str, default)) if isinstance(default, list) else default
            assert f"{action.help} (default: {typed})" in text


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.startswith("--")])
def test_a_flag_has_no_abbreviation(flag):
    mode = [] if flag in ("--training", "--testing") else ["--training"]
    for end in range(3, len(flag)):
        if flag[:end] not in FLAGS:
            with pytest.raises(InputError, match="unrecognized arguments"):
                main.parse_args([*mode, flag[:end]])


# TOMLs


def test_toml_precedence_is_default_dataset_config_command_line():
    tiny = Path("tiny.toml").read_text()
    Path("mine.toml").write_text(f"epochs = 7\nngf = 3\nseed = 5\n{tiny}")
    Path("config.toml").write_text("ngf = 4\nseed = 6\nsize = [32, 48]\ncompile = true\n")
    flags = ["--training", "--dataset", "mine.toml", "--config", "config.toml", "--seed", "8"]
    args = main.parse_args(flags)
    assert (args.lr, args.epochs, args.ngf, args.seed) == (2e-4, 7, 4, 8)
    assert (args.size, args.compile, args.data_root) == ([32, 48], True, "data/mine")
    assert main.parse_args([*flags, "--no-compile"]).compile is False


def test_config_may_name_dataset_and_method():
    Path("run.toml").write_text('dataset = "phantom"\nmethod = "supervised"\nlr = 0.5\n')
    args = main.parse_args(["--training", "--config", "run.toml"])
    assert (args.dataset, args.method, args.lr) == ("phantom", "supervised", 0.5)
    assert (args.ngf, args.data_root) == (16, "data/phantom")  # from phantom.toml
    assert main.parse_args(["--training", "--config", "run.toml", "--dataset", "voc"]).ngf == 64


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_toml_goes_through_the_entry_point(path):
    table = read_toml(path)
    flags = ["--config", str(path)]
    if "dataset" in table:
        assert load_spec(path.stem).name == path.stem
        flags = ["--dataset", path.stem]
    args = vars(main.parse_args(["--training", *flags]))
    for key in table.keys() - {"dataset"}:
        assert args[key] == table[key]


def test_official_presets_are_the_released_code():
    def preset(name: str) -> dict:
        flags = ["--training", "--dataset", "voc", "--config", str(CONFIG / name)]
        return vars(main.parse_args(flags))

    ours, partial = preset("official.toml"), preset("official_partial.toml")
    both = {"epochs": 400, "lr": 2e-4, "batch_size": 5, "size": [200, 200], "dropout": 0.5}
    both |= {"normalization": "half", "ignored": "background", "split": "image"}
    own = {"method": "cyclegan", "disc_norm": "instance", "disc_input": "argmax"}
    own |= {"pool_size": 50, "betas": [0.5, 0.999], "decay_epoch": 100}
    own |= {"lambda1": 1, "lambda2": 0.05, "lambda3": 1, "lambda4": 0.5, "lambda5": 0.5}
    theirs = {"method": "supervised", "betas": [0.9, 0.999], "decay_epoch": 400}
    for args, expected in (ours, both | own), (partial, both | theirs):
        assert {key: args[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("epocs = 3", "unknown key 'epocs'; did you mean 'epochs'?"),
        ("[supervised]\nlr = 1", "unknown key 'supervised'"),
        ("epochs = 'many'", "argument --epochs"),
        ("epochs = '3 --seed 4'", "argument --epochs"),
        ("size = [64]", "argument --size"),
        ("method = 'cycle'", "argument --method"),
        ("split = 'parts.txt'", "expected paper, standard, image, acdc_14of70, "),
        ("disc_kernel = 2", "must be odd"),
        ("epochs = ", "not TOML"),
        ("overwrite = true", "unknown key 'overwrite'"),
        ("testing = true", "unknown key 'testing'"),
        ("[dataset]\nlayout = 'voc'", "give it as --dataset"),
    ],
)
def test_a_wrong_toml_is_an_error_that_names_the_file(capsys, toml, named):
    Path("wrong.toml").write_text(toml)
    flags = ["--training", "--dataset", "phantom", "--config", "wrong.toml"]
    error = error_line(capsys, *flags)
    assert "wrong.toml" in error
    assert named in error


# Errors


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--training"),
        ("--training --testing", "--training"),
        ("--dataset phantom", "--training"),
        ("--training --dataset nothere", "--dataset nothere"),
        ("--training --dataset official", "has no [dataset] table"),
        ("--training --dataset voc --data-root nowhere", "--data-root nowhere"),
        ("--training --config none.toml", "none.toml"),
        ("--testing", "python main.py --training"),
        ("--testing --checkpoint none.pt", "none.pt"),
        ("--testing --checkpoint junk.pt", "junk.pt"),
        ("--predict none.png", "python main.py --training"),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, flags, named):
    Path("junk.pt").write_bytes(b"junk" * 100)
    assert named in error_line(capsys, *flags.split())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--epoch 3", "--epoch"),
        ("--tta", "--help lists the flags"),
        ("--ratio 0", "--ratio"),
        ("--ratio 1.5", "--ratio"),
        ("--ratio nan", "--ratio"),
        ("--ratio 0.001", "--ratio 0.001"),
        ("--ratio 1", "--ratio 1 leaves no unlabeled image for --method cyclegan"),
        ("--ratio 1 --method advsemi", "--ratio 1 leaves no unlabeled image for --method advsemi"),
        ("--ratio 0.002 --label-unit exam", "no labeled exam"),
        ("--size 15 64", "--size"),
        ("--batch-size 0", "--batch-size"),
        ("--batch-size 2.5", "invalid int value"),
        ("--lr -1", "--lr"),
        ("--lr 0", "greater than 0"),
        ("--seed 4294967297", "at most"),
        ("--disc-kernel 33", "from 1 to 31"),
        ("--device tpu9", "--device tpu9"),
        ("--name ../up", "--name ../up"),
        ("--name .hidden", "--name .hidden"),
        ("--checkpoints main.py/x", "--checkpoints"),
        ("--cache main.py/x", "--cache"),
        ("--init none.pt", "none.pt"),
        ("--split standard", "--split standard"),
        ("--split parts", "expected paper, standard, image, acdc_14of70, "),
        ("--split none.json", "none.json"),
        ("--split none.json --ratio 0.2", "--ratio: none.json says which images are labeled"),
    ],
)
def test_a_wrong_flag_of_a_training_is_one_error_line(capsys, flags, named):
    Path("main.py").write_text("a file where a folder should be")
    assert named in error_line(capsys, "--training", *TINY, *flags.split())


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (MemoryError(), "out of memory; in training, half the --batch-size"),
        (RuntimeError("CUDA error: out of memory"), "out of memory; in training, half"),
        (PermissionError(13, "Permission denied", "a/b.png"), "a/b.png: Permission denied"),
        (utils.TrainingError("no more"), "no more"),
        (BrokenPipeError(32, "Broken pipe"), "standard output: Broken pipe"),
    ],
)
def test_a_failure_of_the_machine_is_one_error_line_and_exit_code_1(capsys, raised, message):
    def failing(_argv):
        raise raised

    assert main.main([], failing) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_processes_start_with_equal_weights_and_draw_other_numbers(monkeypatch):
    args = main.parse_args(["--training", *TINY])
    weights, draws = [], []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        model = main.build_model(args, load_spec("tiny.toml"), torch.device("cpu"))
        weights.append(torch.cat([w.flatten() for w in model.state_dict().values()]))
        draws.append(torch.rand(3))
    assert torch.equal(*weights)
    assert not torch.equal(*draws)


def test_other_counts_than_the_datasets_are_printed(capsys):
    assert main.main(["--training", *SUPERVISED]) == 0
    assert "instead of" not in capsys.readouterr().out
    flags = [*tiny_on("acdc"), *SUPERVISED[len(TINY) :], "--ratio", "0.5"]
    assert main.main(["--training", *flags, "--data-root", str(make_acdc(Path("acdc"), 4, 2))]) == 0
    about = "4 images or exams with masks instead of acdc's 100: split in the same proportions"
    assert f"acdc: {about}\n" in capsys.readouterr().out


def test_the_first_process_of_each_machine_prints_errors(capsys, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    for local_rank, n_lines in (0, 1), (1, 0):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert main.main(["--training", "--dataset", "gone.toml"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == n_lines


def test_a_defect_of_the_program_is_a_traceback(capsys):
    def failing(_argv):
        raise ValueError("shapes differ")

    assert main.main([], failing) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("ValueError: shapes differ\n")


# Which checkpoint is used


def find(*flags) -> Path:
    return main.find_checkpoint(main.parse_args(["--testing", *map(str, flags)]))


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
    for flags in ["--seed", "2"], ["--dataset", "voc"], ["--name", "removed"]:
        error = error_line(capsys, "--testing", *flags)
        assert f"checkpoints contains no trained run {' '.join(flags)}" in error
    error = error_line(capsys, "--testing", "--dataset", "../camvid.toml")
    assert "start one with python main.py --training --dataset ../camvid.toml" in error
    error = error_line(capsys, "--testing", "--name", "unfinished")
    assert "checkpoints/unfinished: not evaluated yet; resume it" in error


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--training", "--checkpoint", "best.pt"], "--testing or --predict; --init sets"),
        (["--training", "--overlay"], "--predict"),
        (["--training", "--native-size"], "--testing"),
        (["--testing", "--config", "a.toml"], "--training"),
        (["--testing", "--overwrite"], "--training"),
        (["--predict", "a.png", "--native-size"], "--testing"),
        (["--training", "--part", "test"], "--testing"),
    ],
)
def test_a_flag_of_another_mode_is_an_error(capsys, flags, needed):
    error = error_line(capsys, *flags, "--dataset", "tiny.toml")
    (other,) = [flag for flag in flags[1:] if flag.startswith("--")]
    assert error.startswith(f"error: {other} needs {needed}")


def test_a_path_that_no_toml_can_hold_is_refused(capsys):
    error = error_line(capsys, "--training", "--dataset", "phantom", "--data-root", "a\udcff")
    assert error == r"error: --data-root 'a\udcff': expected UTF-8"


def test_a_dataset_is_found_by_the_name_in_its_file(trained):
    config = trained.with_name("config.toml")
    assert main.load_trained(["--testing", "--dataset", str(config)]).path == trained
    assert main.load_trained(["--testing", "--dataset", "gone/tiny.toml"]).path == trained


def test_any_file_name_can_be_printed():
    code = "import main, sys; sys.exit(main.main([], lambda _: print('\\udcff')))"
    command = [sys.executable, "-c", code]
    folder = Path(main.__file__).parent
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    printed = subprocess.check_output(command, cwd=folder, env=environment, text=True)
    assert printed == "\\udcff\n"


def test_a_checkpoint_may_be_given_as_a_file_or_as_a_runs_folder():
    best = make_run("one", 1)
    assert find("--checkpoint", best.parent) == best
    assert find("--checkpoint", best.with_name("last.pt")) == best.with_name("last.pt")
    assert find("--checkpoint", "none.pt") == Path("none.pt")


def test_a_checkpoints_settings_lie_under_the_command_line(trained):
    flags = ["--testing", "--batch-size", "3", "--workers", "1"]
    loaded = main.load_trained(flags)
    assert (loaded.path, loaded.spec.name) == (trained, "tiny")
    args = loaded.args
    assert (args.size, args.ngf, args.method) == ([16, 16], 2, "supervised")
    assert (args.batch_size, args.workers, args.data_root) == (3, 1, "data/tiny")
    assert not loaded.model.training
    assert main.load_trained([*flags, "--data-root", "moved"]).args.data_root == "moved"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--ngf 3", "--ngf is 2, not 3"),
        ("--size 16 32 --lr 1", "--size is [16, 16], not [16, 32]; --lr is 0.0002, not 1.0"),
        ("--split image", "--split is paper, not image"),
        ("--checkpoint {} --dataset voc", "--dataset is tiny, not voc"),
        ("--checkpoint {} --seed 1", "--seed is 0, not 1"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_one_error_line(capsys, trained, flags, named):
    error = error_line(capsys, "--testing", *flags.format(trained).split())
    assert f"{trained}: {named}; the checkpoint sets these" in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state["settings"].update(ngf="wide"), "--ngf"),
        (lambda state: state["settings"].update(ngf=3), "does not fit the networks"),
        (lambda state: state["settings"].update(depth=3), "unknown key 'depth'"),
        (lambda state: state["settings"].update(overwrite=True), "unknown key 'overwrite'"),
        (lambda state: state["settings"].update(size=torch.ones(2)), "--size"),
        (lambda state: state["settings"].update({7: 7}), "lacks settings"),
        (lambda state: state.pop("settings"), "lacks settings"),
        (lambda state: state["dataset"].update(layout="cubes"), "layout"),
        (lambda state: state["dataset"].update(scored=torch.ones(2)), "scored"),
        (lambda state: state["dataset"].pop("classes"), "classes"),
        (
            lambda state: state["dataset"].update(classes=[*"abcde"], palette=[[0, 0, 0]] * 5),
            "does not fit the networks",
        ),
        (lambda state: state["model"].popitem(), "does not fit the networks"),
        (lambda state: state["model"].update(more=torch.ones(3)), "more is (3,), expected none"),
        (lambda state: state.update(split="other"), "holds other images"),
        (lambda state: state.update(format=3), "format 2"),
    ],
)
def test_a_strangers_checkpoint_is_one_error_line(capsys, trained, change, named):
    edit_checkpoint(trained, change)
    error = error_line(capsys, "--testing")
    assert named in error
    assert str(trained) in error or named == "holds other images"


def test_an_earlier_versions_checkpoint_is_one_error_line(capsys, trained):
    last = trained.with_name("last.pt")
    for path in trained, last:
        edit_checkpoint(path, lambda state: state.update(format=1, config=state.pop("settings")))
    commands = {
        ("--testing",): trained,
        ("--predict", "one.png"): trained,
        ("--training", *SUPERVISED): last,
        ("--training", *TINY, "--name", "more", "--init", str(trained)): trained,
    }
    for flags, path in commands.items():
        before = path.read_bytes()
        assert f"{path}: from an earlier version (format 1)" in error_line(capsys, *flags)
        assert path.read_bytes() == before
