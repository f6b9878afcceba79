"""The command line from end to end: flags and TOMLs, errors, runs that train, stop, go on and are tested."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import make_acdc, make_folder, make_tiny, make_voc, same, write_indexed, write_volume
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import model
import utils
from data_utils import load_spec

MAIN = Path(main.__file__)
TINY = "--dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 1 --workers 0 --device cpu".split()

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """A folder of its own, with tiny.toml: 24 phantoms, 20 to train on, so 4 steps an epoch at the ratio 0.2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.stop, "signum", 0)
    make_tiny(20, 4)


def run(*flags: str) -> int:
    return main.main(list(map(str, flags)))


def error_of(capsys, *flags: str) -> str:
    """The one error line of a command that must end with exit code 2."""
    capsys.readouterr()
    assert run(*flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# Flags and TOMLs


def test_defaults_are_the_papers():
    args = main.parse_args(["--training", "--dataset", "voc"])
    assert (args.epochs, args.decay_epoch, args.batch_size, args.lr, args.betas) == (400, 100, 5, 2e-4, [0.5, 0.999])
    weights = [args.lambda1, args.lambda2, args.lambda3, args.lambda4, args.lambda5]
    assert weights == [1, 0.05, 1, 1, 1]
    assert (args.ngf, args.ndf, args.n_blocks, args.dropout, args.pool_size) == (64, 64, 9, 0, 0)
    assert (args.disc_norm, args.disc_input, args.size, args.precision) == ("batch", "softmax", [200, 200], "fp32")
    assert (args.split, args.label_unit, args.normalization, args.ignored) == ("paper", "image", "range", "skip")
    assert (args.optimizer, args.weight_decay, args.schedule) == ("adam", 0, "linear")
    assert (args.disc_lr, args.disc_betas) == (2e-4, [0.5, 0.999])  # those of the generators
    assert (args.method, args.ratio, args.seed, args.data_root) == ("cyclegan", 0.2, 0, "data/voc")
    assert main.parse_args(["--training", "--dataset", "cityscapes"]).size == [128, 256]


def test_toml_precedence_is_default_dataset_config_command_line(tmp_path):
    described = tmp_path / "mine.toml"
    described.write_text("epochs = 7\nngf = 3\nseed = 5\n" + Path("tiny.toml").read_text())
    config = tmp_path / "config.toml"
    config.write_text("ngf = 4\nseed = 6\nsize = [32, 48]\ncompile = true\n")
    flags = ["--training", "--dataset", str(described), "--config", str(config), "--seed", "8"]
    args = main.parse_args(flags)
    assert (args.lr, args.epochs, args.ngf, args.seed, args.size, args.compile) == (2e-4, 7, 4, 8, [32, 48], True)
    assert args.data_root == "data/mine"
    assert main.parse_args([*flags, "--no-compile"]).compile is False


def test_config_may_name_dataset_and_method():
    Path("run.toml").write_text('dataset = "phantom"\nmethod = "supervised"\n[supervised]\nlr = 0.5\n')
    args = main.parse_args(["--training", "--config", "run.toml"])
    assert (args.dataset, args.method, args.lr) == ("phantom", "supervised", 0.5)


def test_a_methods_table_holds_for_that_method_only():
    Path("run.toml").write_text("lr = 0.3\n[supervised]\nlr = 0.5\n")
    flags = ["--training", "--dataset", "phantom", "--config", "run.toml"]
    assert main.parse_args([*flags, "--method", "supervised"]).lr == 0.5
    assert main.parse_args([*flags, "--method", "cyclegan"]).lr == 0.3


@pytest.mark.parametrize("path", sorted(main.data_utils.CONFIG.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_toml_goes_through_the_entry_point(path):
    if "dataset" in main.read_toml(path):
        args = main.parse_args(["--training", "--dataset", path.stem])
        assert args.dataset == path.stem
        assert load_spec(path.stem).name == path.stem
    else:  # a preset
        main.parse_args(["--training", "--dataset", "phantom", "--config", str(path)])


def test_official_preset_is_the_released_code():
    flags = ["--training", "--dataset", "voc", "--config", str(main.data_utils.CONFIG / "official.toml")]
    ours, partial = main.parse_args(flags), main.parse_args([*flags, "--method", "supervised"])
    for args in ours, partial:
        assert (args.disc_norm, args.disc_input, args.dropout, args.pool_size) == ("instance", "argmax", 0.5, 50)
        assert (args.lambda1, args.lambda2, args.lambda3, args.lambda4, args.lambda5) == (1, 0.05, 1, 0.5, 0.5)
        assert (args.normalization, args.ignored, args.split) == ("half", "background", "image")
        assert (args.epochs, args.decay_epoch, args.lr, args.batch_size, args.size) == (400, 100, 2e-4, 5, [200, 200])
    assert (ours.betas, ours.schedule) == ([0.5, 0.999], "linear")
    assert (partial.betas, partial.schedule) == ([0.9, 0.999], "constant")


def test_hung_preset_is_their_optimization():
    args = main.parse_args(["--training", "--config", str(main.data_utils.CONFIG / "hung.toml")])
    assert (args.method, args.optimizer, args.lr, args.momentum, args.weight_decay) == (
        "advsemi", "sgd", 2.5e-4, 0.9, 5e-4,
    )  # fmt: skip
    assert (args.disc_lr, args.disc_betas, args.schedule, args.batch_size) == (1e-4, [0.9, 0.99], "poly", 10)
    assert (args.lambda_adv, args.lambda_semi_adv, args.lambda_semi) == (0.01, 0.001, 0.1)
    assert (args.semi_threshold, args.semi_start) == (0.2, 0.25)
    unlabeled = 8994 - round(0.2 * 8994)
    assert args.epochs * -(-unlabeled // 10) == pytest.approx(20_000, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (0, 0)),
        ("--method supervised", (0, 0)),
        ("--method supervised --ema 0.9", (0, 0.9)),
        ("--lambda6 0.5", (0.5, 0.99)),
        ("--lambda6 0.5 --ema 0", (0.5, 0)),
        ("--method meanteacher", (1, 0.99)),
        ("--method meanteacher --lambda6 2 --ema 0.999", (2, 0.999)),
        ("--config best.toml", (1, 0.99)),
        ("--config labels_cycle.toml", (1, 0.99)),
        ("--config labels_cycle.toml --method supervised", (1, 0)),
    ],
)
def test_consistency_and_the_average_come_with_the_method_or_when_asked_for(flags, expected):
    config = Path(main.__file__).parent / "config"
    flags = [str(config / flag) if flag.endswith(".toml") else flag for flag in flags.split()]
    args = main.parse_args(["--training", "--dataset", "voc", *flags])
    assert (args.lambda6, args.ema) == expected


def test_discriminators_follow_the_generators_rate_unless_told_otherwise():
    flags = ["--training", "--dataset", "phantom", "--lr", "0.01", "--betas", "0.1", "0.2"]
    args = main.parse_args(flags)
    assert (args.disc_lr, args.disc_betas) == (0.01, [0.1, 0.2])
    args = main.parse_args([*flags, "--disc-lr", "0.03", "--disc-betas", "0.3", "0.4"])
    assert (args.lr, args.betas, args.disc_lr, args.disc_betas) == (0.01, [0.1, 0.2], 0.03, [0.3, 0.4])


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("epocs = 3", "unknown key 'epocs'; did you mean 'epochs'?"),
        ("[supervised]\nlrr = 1", "unknown key 'lrr'"),
        ("[superwised]\nlr = 1", "unknown key 'superwised'; did you mean 'supervised'?"),
        ("epochs = 'many'", "argument --epochs"),
        ("size = [64]", "argument --size"),
        ("method = 'cycle'", "argument --method"),
        ("epochs = ", "not TOML"),
        ("overwrite = true", "unknown key 'overwrite'"),
        ("[dataset]\nlayout = 'voc'", "give it as --dataset"),
    ],
)
def test_a_wrong_toml_is_an_error_that_names_the_file(capsys, toml, named):
    Path("wrong.toml").write_text(toml)
    error = error_of(capsys, "--training", "--dataset", "phantom", "--config", "wrong.toml")
    assert "wrong.toml" in error
    assert named in error


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--training"),
        ("--training --testing", "--training"),
        ("--training --dataset nothere", "--dataset nothere"),
        ("--training --dataset phantom --epoch 3", "--epoch"),
        ("--training --dataset phantom --ratio 0", "--ratio"),
        ("--training --dataset phantom --ratio 1.5", "--ratio"),
        ("--training --dataset phantom --ratio nan", "--ratio"),
        ("--training --dataset phantom --ratio 0.001", "--ratio 0.001"),
        ("--training --dataset phantom --ratio 1", "--ratio 1"),
        ("--training --dataset phantom --size 15 64", "--size"),
        ("--training --dataset phantom --batch-size 0", "--batch-size"),
        ("--training --dataset phantom --lr -1", "--lr"),
        ("--training --dataset phantom --device tpu9", "--device tpu9"),
        ("--training --dataset phantom --name ../up", "--name ../up"),
        ("--training --dataset phantom --config none.toml", "none.toml"),
        ("--training --dataset phantom --checkpoints main.py/x", "--checkpoints"),
        ("--training --dataset phantom --init none.pt", "none.pt"),
        ("--training --dataset phantom --split standard", "--split standard"),
        ("--training --dataset phantom --ratio 0.002 --label-unit exam", "no labeled exam"),
        ("--training --dataset phantom --semi-start 1.5", "--semi-start"),
        ("--training --dataset phantom --semi-threshold -1", "--semi-threshold"),
        ("--training --dataset phantom --schedule cosine", "--schedule"),
        ("--training --dataset phantom --method advsemi --ratio 1", "--ratio 1"),
        ("--training --dataset official", "has no [dataset] table"),
        ("--training --dataset voc --data-root nowhere", "--data-root nowhere"),
        ("--testing", "python main.py --training"),
        ("--testing --checkpoint none.pt", "none.pt"),
        ("--testing --checkpoint junk.pt", "junk.pt"),
    ],
)
def test_a_wrong_command_is_one_error_line(capsys, flags, named):
    Path("main.py").write_text("a file where a folder should be")
    Path("junk.pt").write_bytes(b"junk" * 100)
    assert named in error_of(capsys, *flags.split())


# Runs


@pytest.mark.parametrize("method", main.METHODS)
def test_a_run_trains_and_is_tested(capsys, method):
    flags = [*TINY, "--method", method, "--ratio", "0.5"]
    assert run("--training", *flags, "--epochs", "2", "--log-every", "1") == 0
    folder = Path(f"checkpoints/tiny_{method}_0.5_s0")
    assert {path.name for path in folder.iterdir()} > {
        "last.pt", "best.pt", "config.toml", "split.json", "metrics.jsonl", "manifest.json",
    }  # fmt: skip
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    terms = ["gen_S"]
    if method == "cyclegan":
        terms += ["gen_I", "cycle_S", "cycle_I", "disc_S", "disc_I", "D_S", "D_I"]
    if method == "advsemi":
        terms += ["adv", "semi_adv", "semi", "D_S"]
    if method == "meanteacher":
        terms += ["cutmix"]
    assert list(lines[0]["losses"]) == terms
    ids = json.loads((folder / "split.json").read_text())
    assert [len(ids[role]) for role in ("labeled", "unlabeled", "val")] == [10, 10, 4]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"torch", "device", "commit", "started", "finished", "command"} <= manifest.keys()

    trained_out = capsys.readouterr().out
    for line in lines:  # the three means side by side
        means = "mIoU {miou:.4f}, every class {miou_all:.4f}, as released {miou_official:.4f}".format(**line)
        assert means in trained_out
    assert f"after the last epoch {means}" in trained_out

    assert run("--testing", *flags) == 0
    assert "mIoU" in capsys.readouterr().out
    results = Path("results") / folder.name
    metrics = json.loads((results / "metrics.json").read_text())
    best = max(lines, key=lambda line: line["miou"])
    assert metrics["miou"] == pytest.approx(best["miou"])
    assert metrics["epoch"] == best["epoch"]
    assert (metrics["n_images"], metrics["split"], metrics["dataset"]) == (4, ids["hash"], "tiny")
    assert (metrics["method"], metrics["ratio"], metrics["seed"]) == (method, 0.5, 0)
    assert metrics["checkpoint"] == str(folder / "best.pt")
    assert {"miou_all", "miou_official", "pixel_accuracy", "iou", "dice"} <= metrics.keys()
    rows = list(csv.DictReader((results / "per_class.csv").open()))
    assert [row["class"] for row in rows] == list(load_spec("tiny.toml").classes)
    assert {path.stem for path in (results / "masks").iterdir()} == set(ids["val"])
    assert {path.stem for path in (results / "panels").iterdir()} == set(ids["val"])
    mask = Image.open(results / "masks" / f"{ids['val'][0]}.png")
    assert (mask.mode, mask.size) == ("P", (16, 16))
    assert mask.getpalette()[:12] == [value for colour in load_spec("tiny.toml").palette for value in colour]
    columns = 4 if method == "cyclegan" else 3
    assert Image.open(results / "panels" / f"{ids['val'][0]}.png").width == 2 + columns * 18


def test_written_masks_give_the_reported_miou():
    assert run("--training", *TINY, "--method", "supervised", "--epochs", "9", "--lr", "0.01") == 0
    assert run("--testing") == 0
    folder = Path("results/tiny_supervised_0.2_s0")
    metrics = json.loads((folder / "metrics.json").read_text())
    spec = load_spec("tiny.toml")
    samples = {sample.id: sample for sample in main.data_utils.index(spec, Path("none"))}
    inter, union = np.zeros(4), np.zeros(4)
    for path in (folder / "masks").iterdir():
        truth = main.data_utils.decode(samples[path.stem], spec, (16, 16))[1].numpy()
        prediction = np.array(Image.open(path))
        for k in range(4):
            inter[k] += ((truth == k) & (prediction == k)).sum()
            union[k] += ((truth == k) | (prediction == k)).sum()
    assert metrics["miou"] == pytest.approx((inter / union)[union > 0].mean())


def test_native_size_scores_enlarged_logits_against_the_masks_as_they_are(capsys):
    assert run("--training", *TINY, "--ngf", "8", "--method", "supervised", "--epochs", "20", "--lr", "0.01") == 0
    assert run("--testing") == 0
    small = json.loads(Path("results/tiny_supervised_0.2_s0/metrics.json").read_text())
    assert "native_size" not in small
    assert run("--testing", "--native-size") == 0
    metrics = json.loads(Path("results/tiny_supervised_0.2_s0/metrics.json").read_text())
    trained = main.load_trained(main.parse_args(["--testing"]))
    counts = np.zeros((4, 4))
    for name in json.loads(Path("checkpoints/tiny_supervised_0.2_s0/split.json").read_text())["val"]:
        image, mask = main.data_utils.draw_phantom(int(name.removeprefix("phantom_")))
        x = main.data_utils.resize(torch.from_numpy(image)[None], (16, 16))[None]
        with torch.inference_mode():
            logits = trained.model.segment(main.data_utils.normalize(x))
        large = torch.nn.functional.interpolate(logits, (96, 96), mode="bilinear").argmax(1)[0].numpy()
        np.add.at(counts, (mask, large), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    expected = np.nanmean(counts.diagonal() / union)
    assert metrics["native_size"]["miou"] == pytest.approx(expected, abs=1e-6)
    assert f"at the masks' own size: mIoU {metrics['native_size']['miou']:.4f}" in capsys.readouterr().out
    assert metrics["miou"] == small["miou"] != metrics["native_size"]["miou"]


def test_a_run_says_what_it_is():
    assert run("--training", *TINY, "--epochs", "2", "--ratio", "0.5", "--name", "one") == 0
    folder = Path("checkpoints/one")
    card = (folder / "README.md").read_text()
    best = max(
        (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()),
        key=lambda line: line["miou"],
    )
    assert f"{100 * best['miou']:.2f} per cent" in card
    assert f"After epoch {best['epoch']} of 2, on 4 validation images" in card
    assert "10 annotated and 10 other" in card
    commands = [line for line in card.splitlines() if line.startswith("python main.py ")]
    assert len(commands) == 2
    for command in commands:
        main.parse_args(command.split()[2:])
    assert run("--predict", "one.png", "--checkpoint", commands[0].split()[-1]) == 2  # the picture is not there
    events = EventAccumulator(str(folder)).Reload()
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lambda2 | 0.05 |" in text
    assert "| labeled | 10 |" in text
    assert "_hparams_/session_start_info" in events.summary_metadata


def seen_by_step(monkeypatch, method: str, look) -> list:
    """What `look(model, x, y)` finds at the start of each training step, from now on."""
    seen, step = [], main.METHODS[method].step

    def watched(self, x, y, *x_u):
        seen.append(look(self, x, y))
        return step(self, x, y, *x_u)

    monkeypatch.setattr(main.METHODS[method], "step", watched)
    return seen


def rates(model, x, y) -> list[float]:
    return [round(optimizer.param_groups[0]["lr"], 12) for optimizer in model.optimizers.values()]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", [1] * 8 + [2 / 3] * 4 + [1 / 3] * 4),  # 4 epochs of 4 steps; from epoch 1 to 0 at epoch 4
        ("poly", [(1 - step / 16) ** 0.9 for step in range(16)]),
        ("constant", [1] * 16),
    ],
)
def test_learning_rates_follow_the_schedule(monkeypatch, schedule, factors):
    seen = seen_by_step(monkeypatch, "advsemi", rates)
    flags = [*TINY, "--method", "advsemi", "--epochs", "4", "--schedule", schedule, "--lr", "0.1", "--disc-lr", "0.02"]
    assert run("--training", *flags) == 0
    assert seen == [[pytest.approx(0.1 * factor), pytest.approx(0.02 * factor)] for factor in factors]


def test_methods_know_how_much_of_the_run_is_done(monkeypatch):
    seen = seen_by_step(monkeypatch, "advsemi", lambda model, x, y: model.progress)
    assert run("--training", *TINY, "--method", "advsemi", "--epochs", "2") == 0
    assert seen == [step / 8 for step in range(8)]


@pytest.mark.parametrize(("how", "labels"), [("skip", {7, utils.IGNORE}), ("background", {0, 7})])
def test_ignored_pixels_may_train_as_background_and_are_never_scored(tmp_path, monkeypatch, how, labels):
    root = make_voc(tmp_path / "voc", 8)
    for path in (root / "VOCdevkit/VOC2012/SegmentationClassAug").iterdir():
        values = np.array(Image.open(path))
        write_indexed(path, np.where(values == 255, 255, 7))
    seen = seen_by_step(monkeypatch, "supervised", lambda model, x, y: {*y.unique().tolist()})
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "1", "--ratio", "0.5", "--ignored", how]
    flags[flags.index("tiny.toml")] = "voc"
    assert run(*flags, "--data-root", root) == 0
    assert set.union(*seen) == labels
    (line,) = map(json.loads, Path("checkpoints/voc_supervised_0.5_s0/metrics.jsonl").read_text().splitlines())
    assert line["iou"]["background"] in (None, 0)  # no pixel's truth


def test_a_diagnosis_stands_beside_the_metrics_and_changes_nothing():
    flags = ["--training", *TINY, "--epochs", "2", "--lambda6", "1", "--confidence", "0"]
    assert run(*flags, "--name", "plain") == 0
    assert run(*flags, "--name", "told", "--diagnose") == 0
    assert same(trained("plain")["model"]["G_IS.layers.1.weight"], trained("told")["model"]["G_IS.layers.1.weight"])
    plain, told = (Path("checkpoints", name, "metrics.jsonl").read_text() for name in ("plain", "told"))
    told = [json.loads(line) for line in told.splitlines()]
    for line in told:
        gradients, answers = line.pop("gradients"), line.pop("answers")
        assert set(gradients) == {"gen_S", "gen_I", "cycle_S", "cycle_I", "disc_S", "disc_I", "cutmix"}
        assert gradients["gen_S"] > 0 == gradients["gen_I"]
        assert set(answers) == {"D_S(y)", "D_S(G_IS(x'))", "D_I(x')", "D_I(G_SI(y))"}
    assert [json.loads(line) for line in plain.splitlines()] == told
    assert run("--training", *TINY, "--method", "supervised", "--ratio", "1", "--epochs", "1", "--diagnose") == 0


def test_normalization_holds_for_training_and_for_both_evaluations(monkeypatch):
    seen, normalize = [], main.data_utils.normalize

    def watched(x, how="range"):
        seen.append(how)
        return normalize(x, how)

    monkeypatch.setattr(main.data_utils, "normalize", watched)
    assert run("--training", *TINY, "--epochs", "1", "--normalization", "half") == 0
    assert run("--testing") == 0
    assert {*seen} == {"half"}


@pytest.mark.parametrize("flags", [["--split", "image"], ["--label-unit", "exam"], ["--split", "standard"]])
def test_a_run_is_tested_on_the_split_that_it_was_trained_with(tmp_path, flags):
    root = make_acdc(tmp_path / "acdc", 4, 2)
    (root / "testing").mkdir()
    (make_acdc(tmp_path / "more", 5, 2) / "training" / "patient005").rename(root / "testing" / "patient005")
    small = [*TINY, "--method", "supervised", "--epochs", "1", "--ratio", "0.5", "--data-root", root, *flags]
    small[small.index("tiny.toml")] = "acdc"
    assert run("--training", *small) == 0
    ids = json.loads(Path("checkpoints/acdc_supervised_0.5_s0/split.json").read_text())
    sizes = [len(ids[role]) for role in ("labeled", "unlabeled", "val")]
    assert sizes == {"image": [7, 7, 2], "exam": [8, 4, 4], "standard": [8, 8, 4]}[flags[1]]
    assert run("--testing") == 0
    assert {path.stem for path in Path("results/acdc_supervised_0.5_s0/masks").iterdir()} == set(ids["val"])


def test_a_folder_of_ones_own_images_needs_a_few_lines_of_toml(capsys, tmp_path):
    root = make_folder(tmp_path / "pictures", 8, n_unlabeled=4, n_val=2)
    Path("own.toml").write_text(
        'size = [16, 16]\nratio = 1\n[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n'
    )
    small = [*TINY, "--epochs", "1", "--data-root", root]
    del small[small.index("--size") : small.index("--size") + 3]
    small[small.index("tiny.toml")] = "own.toml"
    assert run("--training", *small) == 0
    out = capsys.readouterr().out
    assert "8 labeled, 4 unlabeled, 2 validation images" in out
    assert "no labeled mask shows" not in out
    assert run("--testing") == 0
    results = Path("results/own_cyclegan_1_s0")
    assert {path.name for path in (results / "masks").iterdir()} == {"picture 12.png", "picture 13.png"}
    assert list(json.loads((results / "metrics.json").read_text())["iou"]) == ["dark", "bright"]
    for path in (root / "masks").iterdir():  # as many tools write them: 0 and 255
        write_indexed(path, np.where(np.array(Image.open(path)), 255, 0))
    assert run("--training", *small, "--name", "wrong") == 0
    assert "no labeled mask shows bright" in capsys.readouterr().out


def test_predictions_are_those_of_the_test(monkeypatch):
    assert run("--training", *TINY, "--epochs", "1") == 0
    assert run("--testing") == 0
    expected = {path.name: np.array(Image.open(path)) for path in Path("results/tiny_cyclegan_0.2_s0/masks").iterdir()}
    assert len({mask.tobytes() for mask in expected.values()}) > 1
    spec = load_spec("tiny.toml")
    Path("mine").mkdir()
    for sample in main.data_utils.index(spec, Path("none")):
        image, _ = main.data_utils.decode(sample, spec, (16, 16))
        Image.fromarray(image[0].numpy()).save(f"mine/{sample.id}.png")
    assert run("--predict", "mine", "--batch-size", "7") == 0  # which changes nothing
    for name, mask in expected.items():
        found = Image.open(Path("results/tiny_cyclegan_0.2_s0/predict/masks") / name)
        assert found.mode == "P"
        assert found.getpalette()[:12] == [value for colour in spec.palette for value in colour]
        assert np.array_equal(np.array(found), mask)
    assert len(list(Path("results/tiny_cyclegan_0.2_s0/predict/masks").iterdir())) == 24


def test_pictures_of_any_kind_and_volumes_are_predicted_at_their_own_size(capsys):
    assert run("--training", *TINY, "--method", "supervised", "--epochs", "1") == 0
    rng = np.random.default_rng(0)
    mine = Path("mine/deep er")
    mine.mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (30, 41), np.uint8)).save(mine / "grey.jpg")
    Image.fromarray(rng.integers(0, 256, (17, 90, 4), np.uint8)).save(mine / "with alpha 1.png")
    Image.fromarray(rng.integers(0, 65536, (33, 20), np.uint16)).save(mine / "deep.png")
    Image.fromarray(rng.random((8, 9), np.float32)).save(mine / "float.TIF")
    Image.new("CMYK", (25, 26), (9, 80, 3, 0)).save(mine / "print.jpg")
    volume = rng.integers(-500, 500, (21, 34, 3)).astype(np.int16)
    write_volume(mine / "heart.nii.gz", volume)
    (mine / "notes.txt").write_text("not a picture")
    (mine / "broken.png").write_bytes(b"junk")
    write_volume(mine / "film.nii", np.zeros((4, 4, 2, 2), np.int16))
    assert run("--predict", "mine", mine / "grey.jpg", "--overlay", "--save-probabilities") == 0
    out = capsys.readouterr().out
    skipped = [line for line in out.splitlines() if line.startswith("skipped ")]
    assert [any(name in line for line in skipped) for name in ("notes.txt", "broken.png", "film.nii")] == [True] * 3
    assert len(skipped) == 3
    folder = Path("results/tiny_supervised_0.2_s0/predict")
    sizes = {"grey": (41, 30), "with alpha 1": (90, 17), "deep": (20, 33), "float": (9, 8), "print": (25, 26)}
    for name, size in sizes.items():
        for kind in "masks", "overlays":
            assert Image.open(folder / kind / "deep er" / f"{name}.png").size == size
        probabilities = np.load(folder / "probabilities" / "deep er" / f"{name}.npz")["arr_0"]
        assert probabilities.shape == (4, *size[::-1])
        assert np.allclose(probabilities.sum(0), 1, atol=0.01)
        mask = np.array(Image.open(folder / "masks" / "deep er" / f"{name}.png"))
        chosen = np.take_along_axis(probabilities, mask[None].astype(int), 0)[0]
        assert (chosen >= probabilities.max(0) - 0.002).all()  # in half precision
    assert not (folder / "masks" / "grey.png").exists()  # named twice, predicted once
    source, labels = (
        nibabel.load(path) for path in (mine / "heart.nii.gz", folder / "masks" / "deep er" / "heart.nii.gz")
    )
    assert np.array_equal(labels.affine, source.affine)
    assert labels.header.get_zooms() == source.header.get_zooms()
    assert (labels.shape, labels.get_data_dtype()) == (volume.shape, np.uint8)
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 3}
    assert len(list((folder / "overlays" / "deep er").glob("heart_s*.png"))) == 3


def test_a_volumes_slices_are_predicted_as_pictures_are():
    assert run("--training", *TINY, "--method", "supervised", "--epochs", "1") == 0
    volume = np.random.default_rng(0).integers(0, 256, (21, 34, 2)).astype(np.uint8)
    write_volume(Path("v.nii.gz"), volume.astype(np.float32))
    for z in range(2):
        Image.fromarray(volume[:, :, z].T.astype(np.float32)).save(f"p{z}.tif")
    assert run("--predict", "v.nii.gz", "p0.tif", "p1.tif") == 0
    masks = Path("results/tiny_supervised_0.2_s0/predict/masks")
    labels = np.asarray(nibabel.load(masks / "v.nii.gz").dataobj)
    assert labels.any()
    for z in range(2):
        assert np.array_equal(labels[:, :, z].T, np.array(Image.open(masks / f"p{z}.png")))


def test_mirrored_predictions_are_averaged_where_that_is_asked():
    assert run("--training", *TINY, "--ngf", "8", "--method", "supervised", "--epochs", "9", "--lr", "0.01") == 0
    checkpoint = ["--checkpoint", "checkpoints/tiny_supervised_0.2_s0/last.pt"]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save("one.png")
    assert run("--predict", "one.png", "--tta", "--save-probabilities", *checkpoint) == 0
    (file,) = Path("results").glob("*/predict/probabilities/one.npz")
    trained = main.load_trained(main.parse_args(["--predict", "one.png", *checkpoint]))
    both = torch.from_numpy(np.stack([pixels, pixels[:, ::-1]]))[:, None]
    with torch.inference_mode():
        straight, mirrored = trained.model.segment(main.data_utils.normalize(both)).softmax(1).numpy()
    expected = (straight + mirrored[:, :, ::-1]) / 2
    assert np.allclose(np.load(file)["arr_0"], expected, atol=2e-3)
    assert not np.allclose(straight, expected, atol=1e-2)


def test_predictions_are_also_written_in_the_mask_files_own_values(tmp_path):
    make_folder(tmp_path / "data/mine", 8)
    for path in (tmp_path / "data/mine/masks").iterdir():
        write_indexed(path, np.where(np.array(Image.open(path)), 200, 7))
    Path("mine.toml").write_text('[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\nlabel_ids = [7, 200]\n')
    flags = ["--dataset", "mine.toml", "--method", "supervised", "--epochs", "20", "--lr", "0.01", "--ratio", "1"]
    assert run("--training", *TINY, *flags) == 0
    assert run("--predict", "data/mine/images") == 0
    seen = set()
    for path in Path("results/mine_supervised_1_s0/predict/masks").iterdir():
        values = Image.open(path.parents[1] / "label_ids" / path.name)
        assert values.mode == "L"
        assert np.array_equal(np.array(values), np.array([7, 200])[np.array(Image.open(path))])
        seen |= {*np.unique(values)}
    assert seen == {7, 200}


def test_nothing_to_predict_is_an_error(capsys):
    assert "python main.py --training" in error_of(capsys, "--predict", "none.png")
    assert run("--training", *TINY, "--method", "supervised", "--epochs", "1") == 0
    assert "none.png: no such file" in error_of(capsys, "--predict", "none.png")
    assert "found no picture" in error_of(capsys, "--predict", "tiny.toml")
    for name in "a/x.png", "b/x.jpg":
        Path(name).parent.mkdir()
        Image.new("L", (20, 20)).save(name)
    assert "would be written as x" in error_of(capsys, "--predict", "a", "b")


def trained(name: str) -> dict:
    state = utils.load_checkpoint(Path("checkpoints") / name / "last.pt")
    return {key: value for key, value in state.items() if key not in ("data_root",)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_run_that_was_stopped_within_an_epoch_ends_as_if_it_never_was(capsys, monkeypatch, device):
    flags = [*TINY, "--epochs", "2", "--dropout", "0.5", "--pool-size", "3", "--lr", "0.01"]
    flags += ["--lambda6", "1", "--confidence", "0", "--ramp-up", "0.5", "--diagnose"]
    flags += ["--device", device, "--deterministic"]
    assert run("--training", *flags, "--name", "whole") == 0

    steps = []
    step = main.METHODS["cyclegan"].step

    def counted_step(self, *batch):
        steps.append(1)
        if len(steps) in (2, 7):
            main.stop.signum = signal.SIGTERM
        return step(self, *batch)

    monkeypatch.setattr(main.METHODS["cyclegan"], "step", counted_step)
    assert run("--training", *flags, "--name", "cut") == 128 + signal.SIGTERM
    assert "SIGTERM" in capsys.readouterr().out
    main.stop.signum = 0
    assert run("--training", *flags, "--name", "cut") == 128 + signal.SIGTERM
    assert "resuming at epoch 1, step 2" in capsys.readouterr().out
    main.stop.signum = 0
    assert run("--training", *flags, "--name", "cut") == 0
    assert "resuming at epoch 2, step 3" in capsys.readouterr().out
    assert len(steps) == 8
    assert same(trained("whole"), trained("cut"))
    logs = [Path("checkpoints", name, "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_finished_run_changes_nothing_and_overwrite_starts_anew(capsys):
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "1"]
    assert run(*flags) == 0
    last = Path("checkpoints/tiny_supervised_0.2_s0/last.pt")
    before = last.stat().st_mtime_ns
    assert run(*flags, "--workers", "1", "--eval-every", "3") == 0
    assert "is finished" in capsys.readouterr().out
    assert last.stat().st_mtime_ns == before
    assert run(*flags, "--overwrite") == 0
    assert last.stat().st_mtime_ns > before


def test_settings_that_differ_are_an_error_that_lists_them(capsys):
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "1"]
    assert run(*flags) == 0
    error = error_of(capsys, *flags, "--lr", "0.1", "--ngf", "3")
    assert "lr was 0.0002, is 0.1" in error
    assert "ngf was 2, is 3" in error


def test_overwrite_never_deletes_a_folder_that_holds_no_run(capsys):
    Path("checkpoints/precious").mkdir(parents=True)
    Path("checkpoints/precious/thesis.txt").write_text("years of work")
    assert "precious" in error_of(capsys, "--training", *TINY, "--name", "precious", "--overwrite")
    assert Path("checkpoints/precious/thesis.txt").is_file()


def test_testing_takes_the_most_recent_run_that_is_named(capsys):
    for seed in (0, 1):
        assert run("--training", *TINY, "--method", "supervised", "--epochs", "1", "--seed", seed) == 0
    capsys.readouterr()
    assert run("--testing") == 0
    assert "tiny_supervised_0.2_s1" in capsys.readouterr().out
    assert run("--testing", "--seed", "0") == 0
    assert "tiny_supervised_0.2_s0" in capsys.readouterr().out
    assert "--seed 2" in error_of(capsys, "--testing", "--seed", "2")
    assert "--ngf is 2, not 3" in error_of(capsys, "--testing", "--ngf", "3")


def test_a_runs_config_repeats_it():
    assert run("--training", *TINY, "--epochs", "1", "--lr", "0.01") == 0
    config = Path("checkpoints/tiny_cyclegan_0.2_s0/config.toml")
    assert tomllib.loads(config.read_text())["dataset"]["name"] == "tiny"
    assert run("--training", "--dataset", config, "--name", "again") == 0
    assert same(trained("tiny_cyclegan_0.2_s0")["model"], trained("again")["model"])


def test_init_takes_over_the_shared_networks(capsys):
    assert run("--training", *TINY, "--method", "supervised", "--epochs", "1", "--lr", "0.01") == 0
    source = "checkpoints/tiny_supervised_0.2_s0/best.pt"
    assert run("--training", *TINY, "--epochs", "1", "--init", source, "--lr", "1e-12", "--name", "more") == 0
    assert "starting from G_IS" in capsys.readouterr().out
    weights = utils.load_checkpoint(Path(source))["model"]
    ours = trained("more")["model"]
    assert all(torch.allclose(ours[key], weights[key], atol=1e-6) for key in weights)
    small = ["--training", *TINY, "--epochs", "1", "--lr", "1e-12"]
    assert run(*small, "--init", "checkpoints/more/best.pt", "--name", "same") == 0
    same = {key: value for key, value in trained("same")["model"].items() if key.endswith(("weight", "bias"))}
    assert all(torch.allclose(value, ours[key], atol=1e-6) for key, value in same.items())  # D_S and D_I too
    assert run(*small, "--method", "advsemi", "--init", "checkpoints/more/best.pt", "--name", "other") == 0
    hung = trained("other")["model"]  # G_IS alone: their D_S is another network
    assert all(torch.allclose(hung[key], weights[key], atol=1e-6) for key in weights)
    capsys.readouterr()
    assert run(*small, "--ema", "0.5", "--init", "checkpoints/more/best.pt", "--name", "first") == 0
    assert "starting from G_IS, teacher, G_SI, D_S, D_I" in capsys.readouterr().out
    first = trained("first")["model"]  # its average begins where G_IS did
    average = {key.replace("teacher", "G_IS"): value for key, value in first.items() if key.startswith("teacher")}
    assert all(torch.allclose(average[key], weights[key], atol=1e-6) for key in weights)
    assert run(*small, "--method", "meanteacher", "--init", "checkpoints/first/best.pt", "--name", "second") == 0
    second = trained("second")["model"]
    assert all(torch.allclose(second[key], first[key], atol=1e-6) for key in second)
    assert "other networks" in error_of(capsys, "--training", *TINY, "--ngf", "3", "--init", source, "--name", "no")


def break_at(monkeypatch, term: str, call: int) -> None:
    """Let the call-th value of a loss function be nan."""
    function, calls = getattr(model, term), []

    def failing(*tensors, **more):
        calls.append(1)
        return function(*tensors, **more) * (float("nan") if len(calls) == call else 1)

    monkeypatch.setattr(model, term, failing)


@pytest.mark.parametrize(("method", "term"), [("supervised", "gen_S"), ("cyclegan", "cycle_I"), ("advsemi", "judge")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(capsys, monkeypatch, method, term):
    a_step = {"gen_S": 1, "cycle_I": 1, "judge": 4}[term]  # calls
    break_at(monkeypatch, term, 6 * a_step + 1)
    weights = seen_by_step(monkeypatch, method, lambda model, x, y: next(model.parameters()).detach().clone())
    assert run("--training", *TINY, "--method", method, "--epochs", "3") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: epoch 2, step 3: a loss is not finite (gen_S ")
    assert f"{'adv' if term == 'judge' else term} nan" in error
    assert len(error.splitlines()) == 1
    assert len(weights) == 7
    assert utils.load_checkpoint(Path(f"checkpoints/tiny_{method}_0.2_s0/last.pt"))["epoch"] == 1


@pytest.mark.parametrize("method", ["supervised", "cyclegan", "advsemi"])
def test_a_step_whose_loss_is_not_finite_can_be_skipped(capsys, monkeypatch, method):
    break_at(monkeypatch, "gen_S", {"supervised": 2, "cyclegan": 3, "advsemi": 2}[method])  # within the second step
    weights = seen_by_step(monkeypatch, method, lambda model, x, y: next(model.parameters()).detach().clone())
    flags = ["--training", *TINY, "--method", method, "--epochs", "2", "--on-nonfinite", "skip", "--semi-start", "1"]
    assert run(*flags) == 0
    assert torch.equal(weights[2], weights[1])  # no update
    assert not torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[3], weights[2])
    assert "1 steps skipped" in capsys.readouterr().out
    lines = Path(f"checkpoints/tiny_{method}_0.2_s0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [1, 1]
    assert np.isfinite(json.loads(lines[0])["losses"]["gen_S"])


def test_a_discriminators_loss_that_is_not_finite_stops_the_run_too(capsys, monkeypatch):
    break_at(monkeypatch, "disc", 3)
    assert run("--training", *TINY, "--epochs", "1") == 1
    assert "epoch 1, step 2: a loss is not finite (D_S nan, D_I" in capsys.readouterr().err


def test_a_signal_during_an_evaluation_ends_it_and_who_goes_on_evaluates_again(capsys, monkeypatch):
    flags = ["--training", *TINY, "--epochs", "2", "--batch-size", "2"]
    assert run(*flags, "--name", "whole") == 0
    capsys.readouterr()
    segment, calls = main.METHODS["cyclegan"].segment, []

    def interrupted(self, x):
        if not self.training:
            calls.append(1)
            if len(calls) == 1:
                main.stop.signum = signal.SIGUSR1
        return segment(self, x)

    monkeypatch.setattr(main.METHODS["cyclegan"], "segment", interrupted)
    assert run(*flags, "--name", "cut") == 128 + signal.SIGUSR1
    assert len(calls) == 1  # of two validation batches
    assert "epoch 1/2" not in capsys.readouterr().out
    assert Path("checkpoints/cut/last.pt").is_file()
    assert not Path("checkpoints/cut/best.pt").exists()
    main.stop.signum = 0
    assert run(*flags, "--name", "cut") == 0
    out = capsys.readouterr().out
    assert "resuming at epoch 2, step 0" in out
    assert "epoch 1/2: mIoU" in out
    assert same(trained("whole"), trained("cut"))
    logs = [Path("checkpoints", name, "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_second_signal_does_not_wait(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = main.Stop()
    stop.can_wait = True
    stop(signal.SIGTERM, None)
    assert (stop.signum, left) == (signal.SIGTERM, [])
    stop(signal.SIGINT, None)
    assert left == [130]


def test_a_signal_while_there_is_nothing_to_save_ends_the_program(capfd):
    with pytest.raises(SystemExit) as caught:
        main.Stop()(signal.SIGUSR1, None)
    assert caught.value.code == 128 + signal.SIGUSR1
    assert capfd.readouterr().out == "SIGUSR1: stopped; there was nothing to save\n"


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))  # bytes in a file: as on a disk that is nearly full
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("size", "file"), [(1500, "cache"), (2000, "events"), (200_000, "best.pt")])
def test_a_full_disk_is_one_error_line_and_the_last_checkpoint_stays(monkeypatch, size, file):
    flags = [
        "--training",
        *TINY,
        "--ngf",
        "8",
        "--epochs",
        "2",
        "--name",
        "one",
        "--batch-size",
        "1",
        "--log-every",
        "1",
    ]
    folder = Path.cwd()
    seen_by_step(monkeypatch, "cyclegan", lambda model, x, y: setattr(main.stop, "signum", signal.SIGTERM))
    assert run(*flags) == 128 + signal.SIGTERM
    last = Path("checkpoints/one/last.pt")
    before = last.read_bytes()
    assert len(before) > 200_000
    if file == "cache":
        shutil.rmtree("data")
    script = LIMITED.format(root=str(MAIN.parent), size=size)
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert file in done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert "MiB are needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert last.read_bytes() == before
    assert not list(Path("checkpoints/one").glob(".*"))
    main.stop.signum = 0
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*flags) == 0


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
import utils
from pathlib import Path
with utils.locked(Path({folder!r}), "--checkpoints"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_holds_nothing(capsys):
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "1", "--name", "one"]
    folder = Path("checkpoints/one")
    script = HOLD.format(root=str(MAIN.parent), folder=str(folder))
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    (folder / ".other.tmp").write_text("half a file")
    for more in [], ["--overwrite"]:
        error = error_of(capsys, *flags, *more)
        assert f"checkpoints/one: process {holder.pid} on " in error
        assert "is training there" in error
    holder.kill()
    holder.wait()
    assert (folder / "lock").is_file()
    assert run(*flags) == 0
    assert not [path for path in folder.iterdir() if path.name == "lock" or path.name.endswith(".tmp")]


def test_a_start_that_fails_leaves_no_folder(capsys):
    error_of(capsys, "--training", "--dataset", "voc", "--data-root", "nowhere", "--name", "none")
    assert not Path("checkpoints/none").exists()


def test_overwriting_that_was_cut_short_can_be_done_again():
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "1", "--name", "one"]
    assert run(*flags) == 0
    for name in "last.pt", "best.pt", "split.json":
        Path("checkpoints/one", name).unlink()
    assert run(*flags, "--overwrite") == 0


def write_state(path: Path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state["config"].update(ngf="wide"), "--ngf"),
        (lambda state: state["config"].update(ngf=3), "other networks"),
        (lambda state: state["config"].update(depth=3), "unknown key 'depth'"),
        (lambda state: state["config"].update(size=torch.ones(2)), "--size"),
        (lambda state: state["config"].update({7: 7}), "lacks config"),
        (lambda state: state["dataset"].update(layout="cubes"), "layout"),
        (lambda state: state["dataset"].update(scored=torch.ones(2)), "scored"),
        (lambda state: state["dataset"].pop("classes"), "classes"),
        (lambda state: state["dataset"].update(classes=[*"abcde"], palette=[[0, 0, 0]] * 5), "other networks"),
        (lambda state: state["model"].popitem(), "other networks"),
        (lambda state: state["model"].update(more=torch.ones(3)), "more is (3,), expected none"),
        (lambda state: state.update(split="other"), "holds other files"),
        (lambda state: state.update(format=2), "format 1"),
    ],
)  # fmt: skip
def test_a_strangers_checkpoint_is_one_error_line(capsys, change, named):
    assert run("--training", *TINY, "--method", "supervised", "--epochs", "1") == 0
    path = Path("checkpoints/tiny_supervised_0.2_s0/best.pt")
    write_state(path, change)
    error = error_of(capsys, "--testing")
    assert named in error
    assert str(path) in error


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("progress"),
        lambda state: state.pop("optimizers"),
        lambda state: state.update(progress={"epoch": 1}),
        lambda state: state["optimizers"]["G"].update(param_groups=[]),
        lambda state: state["processes"][0].update(rng=torch.ones(3)),
        lambda state: state.update(processes=[]),
        lambda state: state.update(schedulers={"G": 3}),
    ],
)
def test_a_run_does_not_go_on_from_a_strangers_checkpoint(capsys, change):
    flags = ["--training", *TINY, "--method", "supervised", "--epochs", "2"]
    assert run(*flags) == 0
    path = Path("checkpoints/tiny_supervised_0.2_s0/last.pt")

    def unfinish(state):
        state["progress"]["evaluated"] = 1
        change(state)

    write_state(path, unfinish)
    before = path.read_bytes()
    assert f"{path}: a run cannot go on from it" in error_of(capsys, *flags)
    assert path.read_bytes() == before


def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on():
    command = [sys.executable, MAIN, "--training", *TINY, "--workers", "1", "--epochs", "1000", "--log-every", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the reading processes hear it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "SIGINT: saved checkpoints/tiny_cyclegan_0.2_s0/last.pt" in out
    assert "Traceback" not in err
    assert utils.load_checkpoint(Path("checkpoints/tiny_cyclegan_0.2_s0/last.pt"))["epoch"] >= 1
