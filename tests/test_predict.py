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
from datasets.layouts import index
from datasets.phantom import draw_phantom
from datasets.spec import load_spec
from engine import checkpoint
from engine.metrics import format_metrics
from model import METHODS

RESULTS = Path("results", SIMPLE.name)
MASKS = RESULTS / "predict" / "masks"
OVERLAYS = RESULTS / "predict" / "overlays"
PARTIAL = ["--method", "supervised", "--epochs", "1", "--ratio", "0.5"]

pytestmark = pytest.mark.usefixtures("in_tmp")


def metrics_of(name: str) -> dict:
    return json.loads(Path("results", name, "metrics.json").read_text())


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def pixels_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def flat(palette) -> list[int]:
    return [value for color in palette for value in color]


# --testing


@pytest.mark.parametrize("method", METHODS)
def test_a_test_writes_metrics_masks_and_panels(capsys, method):
    assert run("--training", *TINY, "--method", method, "--epochs", "1") == 0
    name = f"tiny_{method}_0.2_s0"
    results, ids = Path("results", name), split_ids(name)
    for folder in "masks", "panels":
        (results / folder).mkdir(parents=True)
        (results / folder / "old.png").touch()
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
    assert (metrics["checkpoint"], metrics["epoch"]) == (f"checkpoints/{name}/best.pt", 1)
    assert f"checkpoints/{name}/best.pt after epoch 1, on 4 validation images of tiny" in printed
    assert format_metrics(metrics) in printed
    for folder in "masks", "panels":
        assert stems(results / folder) == set(ids["val"])
    mask = Image.open(results / "masks" / f"{ids['val'][0]}.png")
    assert (mask.mode, mask.size) == ("P", (16, 16))
    assert mask.getpalette()[:12] == flat(spec.palette)
    columns = 6 if method == "cyclegan" else 3  # image, truth, and all that the networks make
    panel = Image.open(results / "panels" / f"{ids['val'][0]}.png")
    assert panel.width == 4 + columns * (128 + 4)  # each pixel is a square of 8x8


def test_a_test_computes_each_output_of_the_networks_once(monkeypatch):
    assert run("--training", *TINY, "--epochs", "1") == 0
    used, compute = [], METHODS["cyclegan"].compute

    def counted(self, network, x):
        used.extend(name for name, each in self.named_children() if each is network)
        return compute(self, network, x)

    monkeypatch.setattr(METHODS["cyclegan"], "compute", counted)
    assert run("--testing", "--batch-size", "4") == 0  # one batch
    assert sorted(used) == ["G_IS", "G_IS", "G_SI", "G_SI"]


def test_written_masks_give_the_reported_miou(trained):
    spec = load_spec("tiny.toml")
    make_tiny(19, 4)  # the description in the checkpoint counts
    assert run("--testing") == 0
    samples = {sample.id: sample for sample in index(spec, Path("none"))}
    inter, union = np.zeros(4), np.zeros(4)
    for path in (RESULTS / "masks").iterdir():
        truth = decode(samples[path.stem], spec, (16, 16))[1].numpy()
        prediction = pixels_of(path)
        for k in range(4):
            inter[k] += ((truth == k) & (prediction == k)).sum()
            union[k] += ((truth == k) | (prediction == k)).sum()
    expected = (inter / union)[union > 0].mean()
    assert metrics_of(SIMPLE.name)["miou"] == pytest.approx(expected)


def test_masks_at_native_size_are_the_argmax_of_enlarged_logits(capsys, trained):
    assert run("--testing") == 0
    small = metrics_of(SIMPLE.name)
    assert "native_size" not in small
    assert run("--testing", "--native-size") == 0
    metrics = metrics_of(SIMPLE.name)
    native = metrics["native_size"]["miou"]
    assert f"at the masks' own size: mIoU {native:.4f}" in capsys.readouterr().out
    assert metrics["miou"] == small["miou"] != native

    model, counts = load_with(["--testing"]).model, np.zeros((4, 4))
    large = {}
    for name in split_ids(SIMPLE.name)["val"]:
        image, mask = draw_phantom(int(name.removeprefix("phantom_")))
        Image.fromarray(image).save(f"{name}.png")
        x = resize(torch.from_numpy(image)[None], (16, 16))[None]
        with torch.inference_mode():
            logits = model.segment(data_utils.normalize(x))
        logits = torch.nn.functional.interpolate(logits, (96, 96), mode="bilinear")
        large[f"{name}.png"] = logits.argmax(1)[0].numpy()
        np.add.at(counts, (mask, large[f"{name}.png"]), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    assert native == pytest.approx(np.nanmean(counts.diagonal() / union), abs=1e-6)
    assert run("--predict", *large) == 0
    written = {str(path.relative_to(MASKS.parent)) for path in MASKS.parent.rglob("*.png")}
    assert written == {f"masks/{name}" for name in large}  # no overlay, which --overlay asks for
    for name, mask in large.items():
        assert np.array_equal(pixels_of(MASKS / name), mask)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--split", "image"], [7, 7, 2]),
        (["--label-unit", "exam"], [8, 4, 4]),
        (["--split", "standard"], [8, 8, 4]),
    ],
)
def test_a_run_is_tested_on_the_split_that_it_was_trained_with(flags, sizes):
    root = make_acdc(Path("acdc"), 5, 2)
    (root / "testing").mkdir()
    (root / "training/patient005").rename(root / "testing/patient005")
    assert run("--training", *tiny_on("acdc"), *PARTIAL, "--data-root", root, *flags) == 0
    ids = split_ids("acdc_supervised_0.5_s0")
    assert [len(ids[role]) for role in ("labeled", "unlabeled", "val")] == sizes
    assert run("--testing") == 0
    assert stems(Path("results/acdc_supervised_0.5_s0/masks")) == set(ids["val"])


def test_normalization_holds_for_training_and_for_both_evaluations(monkeypatch):
    seen, normalize = [], data_utils.normalize

    def recorded(x, normalization="range"):
        seen.append(normalization)
        return normalize(x, normalization)

    for module in data_utils, engine.predict, engine.run:
        monkeypatch.setattr(module, "normalize", recorded)
    Image.new("L", (20, 20)).save("one.png")
    training = ["--training", *TINY, "--epochs", "1", "--normalization", "half"]
    for command in training, ["--testing"], ["--predict", "one.png"]:
        seen.clear()
        assert run(*command) == 0
        assert {*seen} == {"half"}


def test_volumes_of_a_test_are_those_that_a_prediction_writes(capsys):
    """Dice of volumes.csv against the masks of --predict and the true ones, at their own size."""
    root = make_acdc(Path("acdc"), 4, 3)
    assert run("--training", *tiny_on("acdc"), *PARTIAL, "--data-root", root) == 0
    name = "acdc_supervised_0.5_s0"
    assert run("--testing", "--batch-size", "4") == 0
    exam = split_ids(name)["val"][0].partition("_")[0]
    title = "2 volumes of 1 exam, each scored at its masks' own size"
    assert title in capsys.readouterr().out
    rows = {}
    for row in rows_of(Path("results", name, "volumes.csv")):
        rows[row["exam"], row["volume"], row["phase"], row["class"]] = row
    names, expected = load_spec("acdc").classes, set()
    for frame, phase in ("01", "ED"), ("12", "ES"):
        image = root / "training" / exam / f"{exam}_frame{frame}.nii.gz"
        assert run("--predict", image) == 0
        truth = labels_of(image.with_name(f"{exam}_frame{frame}_gt.nii.gz"))
        predicted = labels_of(Path("results", name, "predict/masks", image.name))
        for k in 1, 2, 3:
            key = exam, f"{exam}_frame{frame}", phase, names[k]
            expected.add(key)
            both = ((truth == k) & (predicted == k)).sum()
            dice = 2 * both / ((truth == k).sum() + (predicted == k).sum())
            assert float(rows[key]["dice"]) == pytest.approx(dice, abs=1e-5)
    assert rows.keys() == expected
    summary = metrics_of(name)["volumes"]
    assert (summary["n_volumes"], summary["n_incomplete"]) == (2, 0)
    assert {"all", "ED", "ES"} < summary.keys()


def test_a_folder_of_volumes_is_scored_by_patient_and_no_png_holds_large_labels(capsys):
    for stem in "P1_a", "P1_b", "P2_a", "P3_a":
        image = noise(18, 20, 2, dtype=np.int16)
        write_volume(Path("scans/images", f"{stem}.nii.gz"), image)
        mask = np.where(image > 128, 500, 0).astype(np.int16)
        write_volume(Path("scans/masks", f"{stem}.nii.gz"), mask)
    table = "[dataset]\nlayout = 'folder'\nclasses = ['background', 'bright']\nchannels = 1\n"
    table += "counts = [1, 2]\ngroup = '(.+)_'\nlabel_ids = [0, 500]\n"
    Path("scans.toml").write_text(table)
    assert run("--training", *tiny_on("scans.toml"), *PARTIAL, "--data-root", "scans") == 0
    for command in ["--testing"], ["--predict", "scans/images"]:
        capsys.readouterr()
        assert run(*command) == 0
        expected = "PNG masks hold class indices: label_ids 500 needs more than 8 bits"
        assert expected in capsys.readouterr().out
    rows = rows_of(Path("results/scans_supervised_0.5_s0/volumes.csv"))
    volumes = {name.partition("_s0")[0] for name in split_ids("scans_supervised_0.5_s0")["val"]}
    assert {row["volume"] for row in rows} == volumes
    assert {(row["exam"], row["phase"]) for row in rows} == {(name[:2], "") for name in volumes}


# --predict


def test_predictions_are_those_of_the_test():
    assert run("--training", *TINY, "--epochs", "1") == 0
    assert run("--testing") == 0
    results = Path("results/tiny_cyclegan_0.2_s0")
    expected = {path.name: pixels_of(path) for path in (results / "masks").iterdir()}
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
    assert len(stems(results / "predict" / "masks")) == 24


def test_pictures_of_any_kind_and_volumes_are_predicted_at_their_own_size(capsys, trained):
    mine = Path("mine/deep er")
    mine.mkdir(parents=True)
    pictures = {
        "grey.jpg": noise(30, 41),
        "with alpha 1.png": noise(17, 90, 4),
        "deep.png": noise(33, 20, dtype=np.uint16) * 256,
        "float.TIF": noise(8, 9, dtype=np.float32) / 256,
        "print.jpg": Image.new("CMYK", (25, 26), (9, 80, 3, 0)),
    }
    for name, picture in pictures.items():
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.save(mine / name)
    write_volume(mine / "heart.nii.gz", noise(21, 34, 3, dtype=np.int16))
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
    assert f"6 masks by {trained} (epoch 1): {MASKS}" in lines
    for name in pictures:
        place = Path("deep er", name).with_suffix(".png")
        size = Image.open(mine / name).size
        assert Image.open(MASKS / place).size == size
        width, height = Image.open(OVERLAYS / place).size  # enlarged, above a legend
        zoom = -(-128 // min(size))
        assert width >= zoom * size[0]
        assert height > zoom * size[1]
    assert not (MASKS / "grey.png").exists()  # named twice, predicted once
    labels = labels_of(MASKS / "deep er" / "heart.nii.gz")
    assert labels.shape == (21, 34, 3)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    assert len(list(OVERLAYS.glob("deep er/heart_s*.png"))) == 3


def test_nothing_to_predict_is_an_error(capsys, trained):
    assert "found no picture" in error_line(capsys, "--predict", "tiny.toml")
    Path("broken.png").write_bytes(b"junk")
    assert "unreadable files: " in error_line(capsys, "--predict", "broken.png", code=1)


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
    Image.fromarray(50 + noise(20, 20) // 8).save("one.png")
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


def test_each_slice_of_each_frame_of_a_film_is_predicted_as_a_picture_is(capsys, trained):
    film = noise(21, 34, 2, 3, dtype=np.float32)
    write_volume(Path("film.nii.gz"), film, np.diag([1.5, 2, 10, 1]))
    pictures = {}
    for z, t in np.ndindex(2, 3):
        pictures[z, t] = f"film_t0{t}_s0{z}"
        Image.fromarray(film[:, :, z, t].T).save(f"{pictures[z, t]}.tif")
    assert run("--predict", "film.nii.gz", "--overlay") == 0
    printed = capsys.readouterr().out
    assert stems(OVERLAYS) == {*pictures.values()}
    assert run("--predict", *(f"{name}.tif" for name in pictures.values())) == 0
    labels = nibabel.load(MASKS / "film.nii.gz")
    assert labels.shape == film.shape
    assert labels.header.get_zooms() == nibabel.load("film.nii.gz").header.get_zooms()
    values = np.asarray(labels.dataobj)
    assert len(np.unique(values)) > 1
    for (z, t), name in pictures.items():
        assert np.array_equal(values[:, :, z, t].T, pixels_of(MASKS / f"{name}.png"))
    ml = [0.03 * (values[..., t] == 1).sum() for t in range(3)]
    assert f"right ventricle {min(ml):.1f} to {max(ml):.1f} ml" in printed
    assert "film.nii.gz: " in printed
    assert "3 frames" in printed


def test_volumes_of_classes_are_listed_by_file_and_frame(capsys, trained):
    for name in "a.nii.gz", "b.nii":
        write_volume(Path(name), noise(21, 34, 2, dtype=np.float32), np.diag([1.5, 2, 10, 1]))
    Image.new("L", (20, 20)).save("one.png")
    assert run("--predict", "a.nii.gz", "b.nii", "one.png") == 0
    printed = capsys.readouterr().out
    mask, rows = labels_of(MASKS / "a.nii.gz"), rows_of(MASKS.parent / "volumes.csv")
    names = load_spec("tiny.toml").classes[1:]
    assert [(row["file"], row["frame"], row["class"]) for row in rows] == [
        (file, "0", name) for file in ("a.nii.gz", "b.nii") for name in names
    ]
    for k, row in enumerate(rows[:3], 1):
        assert float(row["ml"]) == pytest.approx((mask == k).sum() * 0.03, rel=1e-5)
        assert f"{row['class']} {float(row['ml']):.1f} ml" in printed
    assert sum(line.startswith(("a.nii.gz: ", "b.nii: ")) for line in printed.splitlines()) == 2


def test_overlays_show_the_masks_that_lie_beside_them(trained):
    volume = noise(21, 34, 3, dtype=np.float32)
    write_volume(Path("v.nii.gz"), volume)
    for name in "one.png", "two.png":
        Image.new("L", (20, 20)).save(name)
    assert run("--predict", "v.nii.gz", "one.png", "two.png", "--overlay") == 0
    assert stems(OVERLAYS) == {"v_s00", "v_s01", "v_s02", "one", "two"}
    write_volume(Path("v.nii.gz"), volume[..., :2])
    assert run("--predict", "v.nii.gz", "--overlay") == 0
    assert stems(OVERLAYS) == {"v_s00", "v_s01", "one", "two"}
    assert run("--predict", "v.nii.gz", "one.png") == 0
    assert stems(OVERLAYS) == {"two"}


@pytest.mark.parametrize("name", ["v.nii.gz", "one.png"])
def test_a_full_disk_leaves_the_old_mask_and_names_file_and_space(
    capsys, monkeypatch, trained, name
):
    write_volume(Path("v.nii.gz"), noise(21, 34, 3, dtype=np.float32))
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
