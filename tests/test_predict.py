"""--testing and --predict: scores, masks and panels of a run, and masks of any picture."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import make_acdc, make_tiny, write_volume
from PIL import Image
from runs import SIMPLE, TINY, error_line, load_with, run, split_ids, tiny_on

import data_utils
import engine.predict
import engine.run
from datasets.cache import decode, resize
from datasets.files import find_pictures
from datasets.layouts import index
from datasets.phantom import draw_phantom
from datasets.spec import load_spec
from engine import checkpoint
from engine.metrics import format_metrics
from engine.signals import stop
from model import METHODS

RESULTS = Path("results", SIMPLE.name)
MASKS = RESULTS / "predict" / "masks"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """A folder of its own, with tiny.toml: 24 phantoms, 4 of them validation images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stop, "signum", 0)
    make_tiny(20, 4)


def metrics_of(name: str) -> dict:
    return json.loads(Path("results", name, "metrics.json").read_text())


def flat(palette) -> list[int]:
    return [value for color in palette for value in color]


# --testing


@pytest.mark.parametrize("method", METHODS)
def test_a_test_writes_metrics_masks_and_panels(capsys, method):
    flags = [*TINY, "--method", method, "--epochs", "1"]
    assert run("--training", *flags) == 0
    name = f"tiny_{method}_0.2_s0"
    results, ids = Path("results", name), split_ids(name)
    for folder in "masks", "panels":
        (results / folder).mkdir(parents=True)
        (results / folder / "old.png").touch()
    capsys.readouterr()
    assert f"{results}: contains files but no checkpoint.txt" in error_line(capsys, "--testing")
    assert (results / "masks/old.png").is_file()
    (results / "checkpoint.txt").write_text(f"checkpoints/{name}/best.pt\n")  # an earlier test
    assert run("--testing") == 0
    printed = capsys.readouterr().out
    metrics = metrics_of(name)
    assert metrics.keys() == {
        "miou", "miou_all", "miou_official", "miou_foreground", "dice_foreground", "constant",
        "pixel_accuracy", "iou", "dice", "n_images", "split",
        "epoch", "checkpoint", "dataset", "method", "ratio", "labeled", "seed",
    }  # fmt: skip
    spec = load_spec("tiny.toml")
    assert list(metrics["iou"]) == list(metrics["dice"]) == list(spec.classes)
    assert (metrics["n_images"], metrics["split"], metrics["dataset"]) == (4, ids["hash"], "tiny")
    assert (metrics["method"], metrics["ratio"], metrics["seed"]) == (method, 0.2, 0)
    assert metrics["checkpoint"] == f"checkpoints/{name}/best.pt"
    assert f"checkpoints/{name}/best.pt after epoch 1, on 4 validation images of tiny" in printed
    assert format_metrics(metrics) in printed
    for folder in "masks", "panels":
        assert {path.stem for path in (results / folder).iterdir()} == set(ids["val"])
    mask = Image.open(results / "masks" / f"{ids['val'][0]}.png")
    assert (mask.mode, mask.size) == ("P", (16, 16))
    assert mask.getpalette()[:12] == flat(spec.palette)
    columns = 6 if method == "cyclegan" else 3  # image, truth, and all that the networks make
    panel = Image.open(results / "panels" / f"{ids['val'][0]}.png")
    assert panel.width == 4 + columns * (128 + 4)  # each pixel is a square of 8x8


def test_a_test_computes_each_output_of_the_networks_once(monkeypatch):
    assert run("--training", *TINY, "--epochs", "1") == 0
    used, compute = [], METHODS["cyclegan"].compute
    names = ["G_IS", "G_SI", "D_S", "D_I"]

    def counted(self, network, x):
        used.extend(name for name in names if getattr(self, name) is network)
        return compute(self, network, x)

    monkeypatch.setattr(METHODS["cyclegan"], "compute", counted)
    assert run("--testing", "--batch-size", "4") == 0  # one batch
    assert sorted(used) == ["G_IS", "G_IS", "G_SI", "G_SI"]


def test_written_masks_give_the_reported_miou(trained):
    assert run("--testing") == 0
    spec = load_spec("tiny.toml")
    samples = {sample.id: sample for sample in index(spec, Path("none"))}
    inter, union = np.zeros(4), np.zeros(4)
    for path in (RESULTS / "masks").iterdir():
        truth = decode(samples[path.stem], spec, (16, 16))[1].numpy()
        prediction = np.array(Image.open(path))
        for k in range(4):
            inter[k] += ((truth == k) & (prediction == k)).sum()
            union[k] += ((truth == k) | (prediction == k)).sum()
    expected = (inter / union)[union > 0].mean()
    assert metrics_of(SIMPLE.name)["miou"] == pytest.approx(expected)


def test_native_size_scores_enlarged_logits_against_the_masks_as_they_are(capsys, trained):
    assert run("--testing") == 0
    small = metrics_of(SIMPLE.name)
    assert "native_size" not in small
    assert run("--testing", "--native-size") == 0
    metrics = metrics_of(SIMPLE.name)
    model = load_with(["--testing"]).model
    counts = np.zeros((4, 4))
    for name in split_ids(SIMPLE.name)["val"]:
        image, mask = draw_phantom(int(name.removeprefix("phantom_")))
        x = resize(torch.from_numpy(image)[None], (16, 16))[None]
        with torch.inference_mode():
            logits = model.segment(data_utils.normalize(x))
        large = torch.nn.functional.interpolate(logits, (96, 96), mode="bilinear")
        np.add.at(counts, (mask, large.argmax(1)[0].numpy()), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    native = metrics["native_size"]["miou"]
    assert native == pytest.approx(np.nanmean(counts.diagonal() / union), abs=1e-6)
    assert f"at the masks' own size: mIoU {native:.4f}" in capsys.readouterr().out
    assert metrics["miou"] == small["miou"] != native


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--split", "image"], [7, 7, 2]),
        (["--label-unit", "exam"], [8, 4, 4]),
        (["--split", "standard"], [8, 8, 4]),
    ],
)
def test_a_run_is_tested_on_the_split_that_it_was_trained_with(flags, sizes):
    root = make_acdc(Path("acdc"), 4, 2)
    (root / "testing").mkdir()
    exam = make_acdc(Path("more"), 5, 2) / "training" / "patient005"
    exam.rename(root / "testing" / "patient005")
    small = [*tiny_on("acdc"), "--method", "supervised", "--epochs", "1", "--ratio", "0.5"]
    assert run("--training", *small, "--data-root", root, *flags) == 0
    name = "acdc_supervised_0.5_s0"
    ids = split_ids(name)
    assert [len(ids[role]) for role in ("labeled", "unlabeled", "val")] == sizes
    assert run("--testing") == 0
    assert {path.stem for path in Path("results", name, "masks").iterdir()} == set(ids["val"])


def test_normalization_holds_for_training_and_for_both_evaluations(monkeypatch):
    seen, normalize = [], data_utils.normalize

    def recorded(x, normalization="range"):
        seen.append(normalization)
        return normalize(x, normalization)

    for module in data_utils, engine.predict, engine.run:
        monkeypatch.setattr(module, "normalize", recorded)
    assert run("--training", *TINY, "--epochs", "1", "--normalization", "half") == 0
    n_training = len(seen)
    assert run("--testing") == 0
    n_testing = len(seen) - n_training
    Image.new("L", (20, 20)).save("one.png")
    assert run("--predict", "one.png") == 0
    assert min(n_training, n_testing, len(seen) - n_training - n_testing) > 0
    assert {*seen} == {"half"}


def test_volumes_of_a_test_are_those_that_a_prediction_writes(capsys):
    """Dice of volumes.csv against the masks of --predict and the true ones, at their own size."""
    root = make_acdc(Path("acdc"), 4, 3)
    small = [*tiny_on("acdc"), "--method", "supervised", "--epochs", "1", "--ratio", "0.5"]
    assert run("--training", *small, "--data-root", root) == 0
    name = "acdc_supervised_0.5_s0"
    capsys.readouterr()
    assert run("--testing", "--batch-size", "4") == 0
    printed = capsys.readouterr().out
    exam = split_ids(name)["val"][0].partition("_")[0]
    assert "2 volumes of 1 exam, each scored at its masks' own size" in printed
    with open(f"results/{name}/volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["volume"], row["exam"], row["phase"]) for row in rows} == {
        (f"{exam}_frame01", exam, "ED"),
        (f"{exam}_frame12", exam, "ES"),
    }
    images = [root / "training" / exam / f"{exam}_frame{frame}.nii.gz" for frame in ("01", "12")]
    assert run("--predict", *images) == 0
    names = load_spec("acdc").classes
    voxel = np.prod(nibabel.load(images[0]).header.get_zooms()) / 1000
    for image in images:
        truth = nibabel.load(image.with_name(image.name.replace(".nii", "_gt.nii"))).get_fdata()
        predicted = nibabel.load(f"results/{name}/predict/masks/{image.name}").get_fdata()
        for k in 1, 2, 3:
            (row,) = [
                row for row in rows
                if row["class"] == names[k] and image.name.startswith(row["volume"])
            ]  # fmt: skip
            both, sizes = ((truth == k) & (predicted == k)).sum(), [(truth == k).sum()]
            sizes.append((predicted == k).sum())
            assert float(row["dice"]) == pytest.approx(2 * both / sum(sizes), abs=1e-5)
            assert float(row["truth_ml"]) == pytest.approx(sizes[0] * voxel, rel=1e-4)
            assert float(row["predicted_ml"]) == pytest.approx(sizes[1] * voxel, rel=1e-4)
            assert (row["hd95_mm"] == "") == (sizes[1] == 0)
    summary = metrics_of(name)["volumes"]
    assert (summary["n_volumes"], summary["n_incomplete"]) == (2, 0)
    assert {"all", "ED", "ES"} < summary.keys()


def test_volumes_of_a_folder_are_scored_by_patient(capsys):
    root, rng = Path("scans"), np.random.default_rng(0)
    for stem in "P1_a", "P1_b", "P2_a", "P3_a":
        image = rng.integers(0, 100, (18, 20, 2)).astype(np.int16)
        write_volume(root / "images" / f"{stem}.nii.gz", image)
        write_volume(root / "masks" / f"{stem}.nii.gz", (image > 50).astype(np.uint8))
    table = "layout = 'folder'\nclasses = ['background', 'bright']\nchannels = 1\ncounts = [1, 2]"
    Path("scans.toml").write_text(f"[dataset]\n{table}\ngroup = '(.+)_'\n")
    flags = [*tiny_on("scans.toml"), "--epochs", "1", "--data-root", root, "--ratio", "0.5"]
    assert run("--training", *flags, "--method", "supervised") == 0
    assert run("--testing") == 0
    with open("results/scans_supervised_0.5_s0/volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stems = {name.partition("_s0")[0] for name in split_ids("scans_supervised_0.5_s0")["val"]}
    assert {row["volume"] for row in rows} == stems
    assert {(row["exam"], row["phase"]) for row in rows} == {(s[:2], "") for s in stems}


def test_other_data_than_the_run_started_with_are_one_error_line(capsys, trained):
    make_tiny(19, 4)
    assert run("--testing") == 0  # the checkpoint's description counts
    (path,) = Path("checkpoints").glob("*/best.pt")
    state = torch.load(path, weights_only=True)
    state["dataset"]["counts"] = (19, 4)
    torch.save(state, path)
    error = error_line(capsys, "--testing")
    assert "--data-root data/tiny: holds other images than the run started with" in error


# --predict


def test_predictions_are_those_of_the_test():
    assert run("--training", *TINY, "--epochs", "1") == 0
    assert run("--testing") == 0
    results = Path("results/tiny_cyclegan_0.2_s0")
    paths = (results / "masks").iterdir()
    expected = {path.name: np.array(Image.open(path)) for path in paths}
    assert len({mask.tobytes() for mask in expected.values()}) > 1
    spec = load_spec("tiny.toml")
    Path("mine").mkdir()
    for sample in index(spec, Path("none")):
        image, _ = decode(sample, spec, (16, 16))
        Image.fromarray(image[0].numpy()).save(f"mine/{sample.id}.png")
    assert run("--predict", "mine", "--batch-size", "7") == 0  # which changes nothing
    for name, mask in expected.items():
        prediction = Image.open(results / "predict" / "masks" / name)
        assert prediction.mode == "P"
        assert prediction.getpalette()[:12] == flat(spec.palette)
        assert np.array_equal(np.array(prediction), mask)
    assert len(list((results / "predict" / "masks").iterdir())) == 24


def test_pictures_of_any_kind_and_volumes_are_predicted_at_their_own_size(capsys, trained):
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
    write_volume(mine / "film.nii", np.zeros((4, 4, 2, 2, 2), np.int16))
    assert run("--predict", "mine", mine / "grey.jpg", "--overlay") == 1
    out, err = capsys.readouterr()
    unreadable = err.strip().removeprefix("error: unreadable files: ").split("; ")
    assert [line.partition(": ")[0] for line in unreadable] == [
        str(mine / name) for name in ("broken.png", "film.nii")
    ]
    lines = out.splitlines()
    skipped = sorted(line for line in lines if line.startswith("skipped "))
    for line, name in zip(skipped, ("broken.png", "film.nii", "notes.txt"), strict=True):
        assert name in line
    assert f"6 masks by {trained} (epoch 1) are in {MASKS}" in lines
    assert "unreadable files: " in error_line(capsys, "--predict", mine / "broken.png", code=1)
    sizes = {
        "grey": (41, 30),
        "with alpha 1": (90, 17),
        "deep": (20, 33),
        "float": (9, 8),
        "print": (25, 26),
    }
    overlays = MASKS.with_name("overlays") / "deep er"
    for name, size in sizes.items():
        assert Image.open(MASKS / "deep er" / f"{name}.png").size == size
        width, height = Image.open(overlays / f"{name}.png").size  # enlarged, above a legend
        zoom = -(-128 // min(size))
        assert width >= zoom * size[0]
        assert height > zoom * size[1]
    assert not (MASKS / "grey.png").exists()  # named twice, predicted once
    source, labels = map(nibabel.load, (mine / "heart.nii.gz", MASKS / "deep er" / "heart.nii.gz"))
    assert np.array_equal(labels.affine, source.affine)
    assert labels.header.get_zooms() == source.header.get_zooms()
    assert (labels.shape, labels.get_data_dtype()) == (volume.shape, np.uint8)
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 3}
    assert len(list(overlays.glob("heart_s*.png"))) == 3


def test_results_of_another_run_with_the_same_name_are_kept(capsys, trained):
    other = Path("other") / trained.parent.name
    shutil.copytree(trained.parent, other)
    assert run("--testing", "--checkpoint", trained) == 0
    Image.new("L", (20, 20)).save("one.png")
    for mode in ["--testing"], ["--predict", "one.png"]:
        error = error_line(capsys, *mode, "--checkpoint", other / "last.pt")
        assert f"{RESULTS}: contains the results of {trained}; give another folder" in error
    assert run("--testing", "--checkpoint", trained.with_name("last.pt")) == 0  # of the same run
    one = ["--predict", "one.png", "--results", "predicted", "--checkpoint"]
    assert run(*one, trained) == 0
    assert f"contains the results of {trained}" in error_line(capsys, *one, other)
    shutil.rmtree(trained.parent)
    assert run("--testing", "--checkpoint", other) == 0


def test_bytes_are_scaled_as_the_floats_were_that_a_network_learned_from(monkeypatch, trained):
    """--normalization half: with a 16-bit image in the dataset each image had its own range."""
    state = checkpoint.load(trained)
    state["settings"]["normalization"] = "half"
    pixels = np.random.default_rng(0).integers(50, 100, (20, 20)).astype(np.uint8)
    Image.fromarray(pixels).save("one.png")
    seen, segment = [], METHODS["supervised"].segment
    monkeypatch.setattr(
        METHODS["supervised"], "segment", lambda self, x: seen.append(x) or segment(self, x)
    )
    for dtype in "uint8", "float32":
        checkpoint.save(trained, state | {"image_dtype": dtype})
        assert run("--predict", "one.png") == 0
    (lowest, highest), ends = torch.aminmax(seen[0]), torch.aminmax(seen[1])
    assert -1 < lowest < highest < 0
    assert torch.equal(torch.stack(ends), torch.tensor([-1.0, 1.0]))


def test_overlays_are_written_only_where_asked_for(trained):
    Image.new("L", (20, 20)).save("one.png")
    assert run("--predict", "one.png") == 0
    assert [path.name for path in MASKS.parent.rglob("*.png")] == ["one.png"]


def test_a_volumes_slices_are_predicted_as_pictures_are(trained):
    volume = np.random.default_rng(0).integers(0, 256, (21, 34, 2)).astype(np.uint8)
    write_volume(Path("v.nii.gz"), volume.astype(np.float32))
    for z in range(2):
        Image.fromarray(volume[:, :, z].T.astype(np.float32)).save(f"p{z}.tif")
    assert run("--predict", "v.nii.gz", "p0.tif", "p1.tif") == 0
    labels = np.asarray(nibabel.load(MASKS / "v.nii.gz").dataobj)
    assert labels.any()
    for z in range(2):
        assert np.array_equal(labels[:, :, z].T, np.array(Image.open(MASKS / f"p{z}.png")))


def test_a_prediction_is_the_argmax_of_logits_enlarged_to_the_pictures_size(trained):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24), np.uint8)
    Image.fromarray(pixels).save("one.png")
    assert run("--predict", "one.png") == 0
    model = load_with(["--predict", "one.png"]).model
    x = resize(torch.from_numpy(pixels)[None], (16, 16))[None]
    with torch.inference_mode():
        logits = model.segment(data_utils.normalize(x))
    large = torch.nn.functional.interpolate(logits, (40, 24), mode="bilinear").argmax(1)[0]
    assert len(large.unique()) > 1
    assert np.array_equal(np.array(Image.open(MASKS / "one.png")), large.numpy())


def test_masks_of_large_pictures_need_one_class_of_logits_at_a_time(monkeypatch):
    logits = torch.randn(21, 8, 8)
    expected = torch.nn.functional.interpolate(logits[None], (50, 30), mode="bilinear").argmax(1)[0]
    interpolate, sizes = torch.nn.functional.interpolate, []

    def spy(*args, **kwargs):
        result = interpolate(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.nn.functional, "interpolate", spy)
    mask = engine.predict.mask_at(logits, (50, 30))
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.long(), expected)
    assert max(sizes) == 50 * 30


def test_a_film_is_segmented_frame_by_frame(capsys, trained):
    film = np.random.default_rng(0).integers(0, 256, (21, 34, 2, 3)).astype(np.float32)
    affine = np.diag([1.5, 2, 10, 1])
    nibabel.save(nibabel.Nifti1Image(film, affine), "film.nii.gz")
    for t in range(3):
        nibabel.save(nibabel.Nifti1Image(film[..., t], affine), f"frame{t}.nii.gz")
    assert run("--predict", "film.nii.gz", "--overlay") == 0
    printed = capsys.readouterr().out
    frames = [f"frame{t}.nii.gz" for t in range(3)]
    assert run("--predict", *frames) == 0
    labels = nibabel.load(MASKS / "film.nii.gz")
    assert labels.shape == film.shape
    assert labels.header.get_zooms() == nibabel.load("film.nii.gz").header.get_zooms()
    values = np.asarray(labels.dataobj)
    assert len(np.unique(values)) > 1
    for t, frame in enumerate(frames):
        assert np.array_equal(values[..., t], np.asarray(nibabel.load(MASKS / frame).dataobj))
    assert {path.name for path in (MASKS.parent / "overlays").iterdir()} == {
        f"film_t0{t}_s0{z}.png" for t in range(3) for z in range(2)
    }
    ml = [0.03 * (values[..., t] == 1).sum() for t in range(3)]
    assert f"right ventricle {min(ml):.1f} to {max(ml):.1f} ml" in printed
    assert "film.nii.gz: " in printed
    assert "3 frames" in printed


def test_volumes_of_classes_are_listed_by_file_and_frame(capsys, trained):
    volume = np.random.default_rng(0).integers(0, 256, (21, 34, 2)).astype(np.float32)
    for name in "a.nii.gz", "b.nii":
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.5, 2, 10, 1])), name)
    Image.new("L", (20, 20)).save("one.png")
    assert run("--predict", "a.nii.gz", "b.nii", "one.png") == 0
    printed = capsys.readouterr().out
    mask = np.asarray(nibabel.load(MASKS / "a.nii.gz").dataobj)
    with open(MASKS.parent / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = load_spec("tiny.toml").classes[1:]
    assert [(row["file"], row["frame"], row["class"]) for row in rows] == [
        (file, "0", name) for file in ("a.nii.gz", "b.nii") for name in names
    ]
    for k, row in enumerate(rows[:3], 1):
        assert float(row["ml"]) == pytest.approx((mask == k).sum() * 0.03, rel=1e-5)
        assert f"{row['class']} {float(row['ml']):.1f} ml" in printed
    assert sum(line.startswith(("a.nii.gz: ", "b.nii: ")) for line in printed.splitlines()) == 2


def test_the_mask_beside_a_volume_is_no_image(capsys, trained):
    exam = make_acdc(Path("acdc"), 1, 2) / "training" / "patient001"
    (exam / "patient001_frame12.nii.gz").unlink()  # its mask is a volume like any other
    assert run("--predict", exam) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    mask = exam / "patient001_frame01_gt.nii.gz"
    assert f"skipped {mask}: the mask of patient001_frame01.nii.gz" in skipped
    written = {path.name for path in MASKS.iterdir()}
    assert written == {"patient001_frame01.nii.gz", "patient001_frame12_gt.nii.gz"}


@pytest.mark.parametrize("mask", ["a_GT.NII.GZ", "a_gt.nii", "a_Gt.nii.gz"])
@pytest.mark.parametrize("image", ["a.NII.GZ", "a.nii", "a.Nii.gz"])
def test_the_mask_beside_a_volume_is_found_in_any_case(tmp_path, image, mask):
    folder = tmp_path / "volumes"
    folder.mkdir()
    for name in image, mask, "a_2.nii.gz", "b_gt.nii.gz":
        (folder / name).touch()
    found, other = find_pictures([folder])
    assert {path.name for path in found} == {image, "a_2.nii.gz", "b_gt.nii.gz"}
    assert other == [f"{folder / mask}: the mask of {image}"]


def test_overlays_show_the_masks_that_lie_beside_them(trained):
    volume = np.random.default_rng(0).integers(0, 256, (21, 34, 3)).astype(np.float32)
    write_volume(Path("v.nii.gz"), volume)
    for name in "one.png", "two.png":
        Image.new("L", (20, 20)).save(name)
    overlays = MASKS.parent / "overlays"
    assert run("--predict", "v.nii.gz", "one.png", "two.png", "--overlay") == 0
    assert len([*overlays.iterdir()]) == 5
    write_volume(Path("v.nii.gz"), volume[..., :2])
    assert run("--predict", "v.nii.gz", "--overlay") == 0
    assert {path.stem for path in overlays.iterdir()} == {"v_s00", "v_s01", "one", "two"}
    assert run("--predict", "v.nii.gz", "one.png") == 0
    assert {path.stem for path in overlays.iterdir()} == {"two"}


@pytest.mark.parametrize("name", ["v.nii.gz", "one.png"])
def test_a_full_disk_leaves_the_old_mask_and_names_file_and_space(
    capsys, monkeypatch, trained, name
):
    volume = np.random.default_rng(0).integers(0, 256, (21, 34, 3)).astype(np.float32)
    write_volume(Path("v.nii.gz"), volume)
    Image.new("L", (20, 20)).save("one.png")
    assert run("--predict", name) == 0
    before = {path: path.read_bytes() for path in MASKS.parent.rglob("*") if path.is_file()}

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(engine.predict, "results_folder", lambda *_: RESULTS)
    error = error_line(capsys, "--predict", name, code=1)
    assert f"{MASKS / name}: cannot be written (No space left on device): " in error
    assert "MiB are needed" in error
    assert {path: path.read_bytes() for path in MASKS.parent.rglob("*") if path.is_file()} == before


def test_nothing_to_predict_is_one_error_line(capsys, trained):
    assert "none.png: no such file" in error_line(capsys, "--predict", "none.png")
    assert "found no picture" in error_line(capsys, "--predict", "tiny.toml")
    for name in "a/x.png", "b/x.jpg":
        Path(name).parent.mkdir()
        Image.new("L", (20, 20)).save(name)
    assert "would be written as x" in error_line(capsys, "--predict", "a", "b")
