"""The command line: flags, TOMLs, defaults, errors."""

from pathlib import Path

import pytest
from runs import TINY, error_line

import main
from datasets.spec import CONFIG, load_spec, read_toml
from engine.flags import build_parser, parse_args

PARSER = build_parser()
ACTIONS = [action for action in PARSER._actions if action.dest != "help"]
pytestmark = pytest.mark.usefixtures("in_tmp")

DEFAULTS = {
    "method": "cyclegan", "ratio": 0.2, "labeled": None, "seed": 0, "data_root": "data/voc",
    "epochs": 400, "decay_epoch": 100, "batch_size": 5, "lr": 2e-4, "betas": [0.5, 0.999],
    "augment": False, "reduction": "mean",
    "lambda1": 1, "lambda2": 0.05, "lambda3": 1, "lambda4": 1, "lambda5": 1,
    "ngf": 64, "ndf": 64, "n_blocks": 9, "dropout": 0, "pool_size": 0,
    "disc_norm": "batch", "disc_input": "softmax", "disc_kernel": 1, "cutmix_on": "both",
    "size": [200, 200], "precision": "fp32", "split": "paper", "label_unit": "image",
    "normalization": "range", "ignored": "skip", "init": None,
}  # fmt: skip


def test_defaults_are_the_papers():
    args = vars(parse_args(["--training", "--dataset", "voc"]))
    assert {key: args[key] for key in DEFAULTS} == DEFAULTS
    assert parse_args(["--training", "--dataset", "cityscapes"]).size == [128, 256]


def test_learning_rate_falls_after_a_quarter_of_the_epochs_by_default():
    flags = ["--training", "--dataset", "voc", "--epochs", "41"]
    assert parse_args(flags).decay_epoch == 10
    assert parse_args([*flags, "--decay-epoch", "0"]).decay_epoch == 0


def test_settings_are_the_flags_of_the_groups_that_change_the_result():
    args = parse_args(["--training", "--dataset", "voc", "--lambda4", "0.5"])
    assert args.settings.keys() == {*DEFAULTS} - {"data_root"}
    assert args.settings["lambda4"] == 0.5
    assert sorted(sum(PARSER.keys.values(), [])) == sorted(action.dest for action in ACTIONS)


def test_given_are_the_flags_of_the_command_line_alone():
    Path("config.toml").write_text("ngf = 4\n")
    flags = ["--training", "--config", "config.toml", "--seed", "0", "--betas", "0", "0.9"]
    expected = {"training": True, "config": "config.toml", "seed": 0, "betas": [0, 0.9]}
    assert parse_args(flags).given == expected


def test_help_is_one_line_of_usage_and_the_flags_with_their_defaults_but_none(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == 0
    usage, _, flags = capsys.readouterr().out.partition("\n\n")
    assert usage == "usage: python main.py --training | --testing | --predict PATH... [flags]"
    assert "(default: 400)" in flags
    assert "(default: 0.5 0.999)" in flags
    assert "(default: None)" not in flags
    assert "(default: False)" not in flags


def test_flags_of_the_released_code_are_those_that_its_preset_changes():
    preset = read_toml(CONFIG / "official.toml").keys()
    assert {*PARSER.keys["released code"]} == preset - {"lambda4", "lambda5", "split"}


def test_ratio_and_labeled_replace_each_other_and_the_higher_one_decides():
    tiny = Path("tiny.toml").read_text()
    Path("mine.toml").write_text(f"ratio = 0.5\n{tiny}")
    Path("config.toml").write_text("labeled = 8\n")

    def amounts(*flags: str) -> tuple:
        args = parse_args(["--training", "--dataset", "mine.toml", *flags])
        return args.ratio, args.labeled, args.rule.label

    assert amounts() == (0.5, None, "0.5")
    assert amounts("--config", "config.toml") == (None, 8, "8images")
    assert amounts("--config", "config.toml", "--ratio", "0.3") == (0.3, None, "0.3")
    assert amounts("--labeled", "1", "--label-unit", "exam") == (None, 1, "1exam")
    assert amounts("--split", "lists/mine.json") == (None, None, "mine")


# TOMLs


def test_toml_precedence_is_default_dataset_config_command_line():
    tiny = Path("tiny.toml").read_text()
    Path("mine.toml").write_text(f"epochs = 7\nngf = 3\nseed = 5\n{tiny}")
    Path("config.toml").write_text("ngf = 4\nseed = 6\nsize = [32, 48]\ncompile = true\n")
    flags = ["--training", "--dataset", "mine.toml", "--config", "config.toml", "--seed", "8"]
    args = parse_args(flags)
    assert (args.lr, args.epochs, args.ngf, args.seed) == (2e-4, 7, 4, 8)
    assert (args.size, args.compile, args.data_root) == ([32, 48], True, "data/mine")
    assert parse_args([*flags, "--no-compile"]).compile is False


def test_config_may_name_dataset_and_method():
    Path("run.toml").write_text('dataset = "phantom"\nmethod = "supervised"\nlr = 0.5\n')
    args = parse_args(["--training", "--config", "run.toml"])
    assert (args.dataset, args.method, args.lr) == ("phantom", "supervised", 0.5)
    assert (args.ngf, args.data_root) == (16, "data/phantom")  # from phantom.toml
    assert parse_args(["--training", "--config", "run.toml", "--dataset", "voc"]).ngf == 64


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_toml_goes_through_the_entry_point(path):
    table = read_toml(path)
    flags = ["--config", str(path)]
    if "dataset" in table:
        assert load_spec(path.stem).name == path.stem
        flags = ["--dataset", path.stem]
    args = vars(parse_args(["--training", *flags]))
    for key in table.keys() - {"dataset"}:
        assert args[key] == table[key]


def test_official_presets_are_the_released_code():
    def preset(name: str) -> dict:
        flags = ["--training", "--dataset", "voc", "--config", str(CONFIG / name)]
        return vars(parse_args(flags))

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
        ("overwrite = true", "unknown key 'overwrite'"),
        ("epochs = 'many'", "argument --epochs"),
        ("epochs = [3]", "argument --epochs: [3] is not a number"),
        ("size = [32, 32, '--overwrite']", "argument --size: [32, 32, '--overwrite'] is not 2 num"),
        ("size = 32", "argument --size: 32 is not 2 numbers"),
        ("lr = true", "argument --lr: True is not a number"),
        ("augment = 1", "argument --augment: 1 is not true or false"),
        ("data_root = ['a']", "argument --data-root: ['a'] is not text"),
        ("name = 2020-01-01", "argument --name: datetime.date(2020, 1, 1) is not text"),
        (f"seed = {'1' * 5000}", "not TOML"),
        (f"seed = 0x{'f' * 5000}", "digits"),
        (f"x = {'[' * 3000}", "not TOML"),
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
        ("", "give one of --training, --testing, --predict"),
        ("--training --testing", "give one of --training, --testing, --predict"),
        # of another mode
        ("--training --checkpoint best.pt", "--checkpoint needs --testing or --predict; --init"),
        ("--training --overlay", "--overlay needs --predict"),
        ("--training --part test", "--part needs --testing"),
        (
            "--training --cutmix-on labeled",
            "--cutmix-on has no effect with --method cyclegan; leave",
        ),
        (
            "--training --method supervised --reduction sum",
            "--reduction has no effect with --method",
        ),
        ("--testing --config a.toml", "--config needs --training"),
        ("--testing --overwrite", "--overwrite needs --training"),
        ("--predict a.png --native-size", "--native-size needs --testing"),
        ("--predict a.png --split a.json", "--split needs --training or --testing"),
        # a flag alone
        ("--training --epoch 3", "--epoch 3; --help lists the flags"),
        ("--training --ratio 1.5", "--ratio: 1.5 must be greater than 0 and at most 1"),
        ("--training --size 15 64", "--size: 15 must be at least 16"),
        ("--training --batch-size 2.5", "invalid int value"),
        (f"--training --batch-size {10**9}", "at least 1 and at most 65,536"),
        (f"--training --n-blocks {10**9}", "at most 1,000"),
        (f"--training --pool-size {10**310}", "at most 1,000,000,000"),  # no float holds it
        ("--training --lr 0", "--lr: 0 must be greater than 0"),
        ("--training --lr inf", "--lr: inf must be greater than 0"),
        ("--training --disc-kernel 2", "2 must be odd, from 1 to 31"),
        ("--training --device tpu9", "--device tpu9"),
        ("--training --device cuda:99", "--device cuda:99"),
        ("--training --name ../up", "--name ../up"),
        ("--training --checkpoints main.py/x", "--checkpoints"),
        ("--training --cache main.py/x", "--cache"),
        ("--training --init none.pt", "checkpoint none.pt: no such file"),
        # the dataset and its split
        ("--training --dataset voc --data-root nowhere", "--data-root nowhere"),
        ("--training --data-root a\udcff", r"--data-root 'a\udcff': expected UTF-8"),
        ("--training --ratio 1", "--ratio 1 leaves no unlabeled image for --method cyclegan"),
        ("--training --ratio 0.2 --labeled 2", "--ratio and --labeled: give one of them"),
        ("--training --split parts", "expected paper, standard, image, acdc_14of70, "),
        ("--training --split none.json", "none.json"),
        ("--training --split none.json --labeled 2", "--labeled: none.json says which images are"),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, flags, named):
    Path("main.py").write_text("a file where a folder should be")
    training = ["--training", *TINY] if "--training" in flags else []
    assert named in error_line(capsys, *training, *flags.replace("--training", "").split())


@pytest.mark.parametrize("ending", ["", ".toml", ".json"])
@pytest.mark.parametrize(
    "flags",
    [
        *("--training --dataset", "--training --config", "--training --split", "--training --init"),
        *("--training --dataset voc --data-root", "--training --name", "--training --checkpoints"),
        *("--training --cache", "--testing --checkpoint", "--testing --checkpoints"),
        "--testing --dataset",
    ],
)
def test_a_name_longer_than_the_file_system_allows_is_refused(capsys, flags, ending):
    training = ["--training", *TINY] if "--training" in flags else []
    flags = flags.replace("--training", "").split()
    name = "1" * 300 + ending
    assert name in error_line(capsys, *training, *flags, name)


@pytest.mark.parametrize(
    "flags", [["--init", ""], ["--name="], ["--training", "--predict", "a", ""], ["--config", ""]]
)
def test_an_empty_value_is_refused(capsys, flags):
    assert "is empty; give a value" in error_line(capsys, "--training", *TINY, *flags)


def test_an_empty_value_in_a_toml_is_refused(capsys):
    for key in "data_root", "checkpoints", "device":
        Path("empty.toml").write_text(f'{key} = ""\n')
        error = error_line(capsys, "--training", *TINY, "--config", "empty.toml")
        assert f"empty.toml: --{key.replace('_', '-')}=: is empty" in error
