"""--testing and --predict: scores, masks and panels of a run, and masks of any picture."""

import csv
import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import error_of, make_acdc, make_tiny, write_volume
from PIL import Image
from runs import SIMPLE, TINY, edit_checkpoint, error_line, load_with, run, split_ids, tiny_on

import data_utils
import engine.predict
import engine.run
import utils
from datasets import writers
from datasets.cache import decode, resize
from datasets.layouts import index
from datasets.phantom import draw_phantom
from datasets.spec import load_spec
from engine import checkpoint
from engine.metrics import format_metrics
from engine.results import count_older, note_sources
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


# --testing


@pytest.mark.parametrize("method", ["supervised", "cyclegan"])
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
        "epoch", "checkpoint", "dataset", "data_root", "method", "ratio", "labeled", "seed",
    }  # fmt: skip
    assert (metrics["n_images"], metrics["split"], metrics["dataset"]) == (4, ids["hash"], "tiny")
    assert (metrics["method"], metrics["ratio"], metrics["seed"]) == (method, 0.2, 0)
    assert (metrics["checkpoint"], metrics["epoch"]) == (f"checkpoints/{name}/best.pt", 1)
    assert f"checkpoints/{name}/best.pt after epoch 1, on 4 validation images of tiny" in printed
    assert format_metrics(metrics) in printed
    for folder in "masks", "panels":
        assert stems(results / folder) == set(ids["val"])
    columns = 6 if method == "cyclegan" else 3  # image, truth, and all that the networks make
    panel = Image.open(results / "panels" / f"{ids['val'][0]}.png")
    assert panel.width == 4 + columns * (128 + 4)  # each pixel is a square of 8x8


def test_an_interrupted_test_leaves_no_scores_of_another_checkpoint(monkeypatch, trained):
    assert run("--testing") == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.predict, "save_picture", interrupted)
    assert run("--testing", "--checkpoint", trained.with_name("last.pt")) == 130
    assert not (RESULTS / "metrics.json").exists()


def test_a_second_test_of_a_run_is_refused(capsys, trained):
    assert run("--testing") == 0
    before = (RESULTS / "metrics.json").read_bytes()
    with utils.exclusive(RESULTS):
        error = error_line(capsys, "--testing")
        assert f"{RESULTS}: another command is testing there; wait for it" in error
    assert (RESULTS / "metrics.json").read_bytes() == before


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
    counts = np.zeros((4, 4))
    for path in (RESULTS / "masks").iterdir():
        truth = decode(samples[path.stem], spec, (16, 16))[1].numpy()
        np.add.at(counts, (truth, pixels_of(path)), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    expected = np.nanmean(counts.diagonal() / union)
    assert metrics_of(SIMPLE.name)["miou"] == pytest.approx(expected)


def test_masks_at_native_size_are_the_argmax_of_enlarged_logits(capsys, trained):
    assert run("--testing") == 0
    small = metrics_of(SIMPLE.name)
    assert "native_size" not in small
    assert run("--testing", "--native-size") == 0
    metrics = metrics_of(SIMPLE.name)
    native = metrics["native_size"]["miou"]
    assert f"at the masks' original size: mIoU {native:.4f}" in capsys.readouterr().out
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


def test_a_run_is_tested_on_the_split_that_it_was_trained_with():
    root = make_acdc(Path("acdc"), 4, 2)
    (root / "testing").mkdir()
    (root / "training/patient004").rename(root / "testing/patient004")
    flags = [*tiny_on("acdc"), *PARTIAL, "--split", "standard", "--label-unit", "exam"]
    assert run("--training", *flags, "--data-root", root) == 0
    ids = split_ids("acdc_supervised_0.5_s0")
    assert [len(ids[role]) for role in ("labeled", "unlabeled", "val")] == [8, 4, 4]
    assert run("--testing") == 0
    masks = stems(Path("results/acdc_supervised_0.5_s0/masks"))
    assert {name.partition("_")[0] for name in masks} == {"patient004"}


def test_normalization_holds_for_training_and_its_evaluations(monkeypatch):
    seen, normalize = [], data_utils.normalize

    def recorded(x, normalization="range"):
        seen.append(normalization)
        return normalize(x, normalization)

    for module in data_utils, engine.run:
        monkeypatch.setattr(module, "normalize", recorded)
    assert run("--training", *TINY, "--epochs", "1", "--normalization", "half") == 0
    assert {*seen} == {"half"}


def test_volumes_of_a_test_are_those_that_a_prediction_writes(capsys):
    """Dice of volumes.csv against the masks of --predict and the true ones, at their own size."""
    root = make_acdc(Path("acdc"), 4, 3)
    assert run("--training", *tiny_on("acdc"), *PARTIAL, "--data-root", root) == 0
    results = Path("results/acdc_supervised_0.5_s0")
    assert run("--testing", "--batch-size", "4") == 0
    title = "2 volumes of 1 exam, each scored at its masks' original size"
    assert title in capsys.readouterr().out
    assert metrics_of(results.name)["volumes"]["n_volumes"] == 2
    exam = split_ids(results.name)["val"][0].partition("_")[0]
    assert run("--predict", root / "training" / exam) == 0
    rows, names = rows_of(results / "volumes.csv"), load_spec("acdc").classes
    expected = {(f"{exam}_frame01", "ED"), (f"{exam}_frame12", "ES")}
    assert {(row["volume"], row["phase"]) for row in rows} == expected
    assert len(rows) == 2 * 3
    for row in rows:
        k = names.index(row["class"])
        truth = labels_of(root / "training" / exam / f"{row['volume']}_gt.nii.gz") == k
        predicted = labels_of(results / "predict/masks" / f"{row['volume']}.nii.gz") == k
        dice = 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-5)


def test_class_indices_in_place_of_values_of_more_than_8_bits_are_printed(capsys, trained):
    edit_checkpoint(trained, lambda state: state["dataset"].update(ignore=300))
    Image.new("L", (20, 20)).save("one.png")
    for command in ["--testing"], ["--predict", "one.png"]:
        assert run(*command) == 0
        expected = "PNG masks hold class indices: ignore 300 needs more than 8 bits"
        assert expected in capsys.readouterr().out


# --predict


def test_pictures_of_any_kind_and_volumes_are_predicted_at_their_own_size(capsys, trained):
    mine = Path("mine/deep er")
    mine.mkdir(parents=True)
    pictures = {
        "grey.jpg": Image.fromarray(noise(30, 41)),
        "with alpha 1.png": Image.fromarray(noise(17, 90, 4)),
        "deep.png": Image.fromarray(noise(33, 20, dtype=np.uint16) * 256),
        "float.TIF": Image.fromarray(noise(8, 9, dtype=np.float32) / 256),
        "print.jpg": Image.new("CMYK", (25, 26), (9, 80, 3, 0)),
    }
    for name, picture in pictures.items():
        picture.save(mine / name)
    write_volume(mine / "heart.nii.gz", noise(21, 34, 3, dtype=np.int16), np.diag([1.5, 2, 10, 1]))
    (mine / "notes.txt").write_text("not a picture")
    (mine / "broken.png").write_bytes(b"junk")
    assert run("--predict", "mine", mine / "grey.jpg", "--overlay") == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: unreadable files: {mine / 'broken.png'}: ")
    for name in "broken.png", "notes.txt":
        assert f"skipped {mine / name}: " in out
    assert f"6 masks by {trained} (epoch 1): {MASKS}\n" in out
    for name, picture in pictures.items():
        assert Image.open(MASKS / "deep er" / Path(name).with_suffix(".png")).size == picture.size
    labels = labels_of(MASKS / "deep er/heart.nii.gz")
    assert labels.shape == (21, 34, 3)
    assert f"heart.nii.gz: right ventricle {0.03 * (labels == 1).sum():.1f} ml, myocardium " in out
    assert stems(OVERLAYS / "deep er/heart.nii.gz") == {"s00", "s01", "s02"}
    (OVERLAYS / "deep er/heart.nii.gz").rename("overlays of a volume")
    assert stems(OVERLAYS / "deep er") == {Path(name).stem for name in pictures}


def test_nothing_to_predict_is_an_error(capsys, trained):
    Path(".nii.gz").touch()
    error = error_line(capsys, "--predict", "tiny.toml", ".nii.gz")
    assert "found no images or NIfTI volumes; skipped tiny.toml: neither" in error
    assert "; .nii.gz: neither an image nor" in error
    assert not Path("results").exists()
    Path("broken.png").write_bytes(b"junk")
    assert "unreadable files: " in error_line(capsys, "--predict", "broken.png", code=1)


def test_results_of_another_run_with_the_same_name_are_kept(capsys, trained):
    other = Path("other") / trained.parent.name
    shutil.copytree(trained.parent, other)
    Image.new("L", (20, 20)).save("one.png")
    predict, options = ["--predict", "one.png"], ["--results", "elsewhere", "--checkpoint"]
    Path("elsewhere", other.name).mkdir(parents=True)
    Path("elsewhere", other.name, ".checkpoint.txt.9.tmp").touch()  # of a command that starts, too
    assert run(*predict, *options, trained) == 0
    for mode in predict, ["--testing"]:
        error = error_line(capsys, *mode, *options, other / "last.pt")
        expected = f"elsewhere/{other.name}: contains the results of {trained.resolve()}; give"
        assert expected in error
    assert run("--testing", *options, trained.with_name("last.pt")) == 0  # of the same run
    shutil.rmtree(trained.parent)
    assert run("--testing", *options, other) == 0


@pytest.mark.parametrize("name", ["kept_0.1_s0", "kept_0.2_s0", "{}.pt", "other.pth"])
def test_copies_of_a_checkpoint_have_results_of_their_own(capsys, trained, name):
    assert run("--testing", "--checkpoint", trained) == 0
    Path("kept_0.1_s1").write_bytes(trained.read_bytes())
    assert run("--testing", "--checkpoint", "kept_0.1_s1") == 0
    copy = trained.parent.parent / name.format(trained.parent.name)
    copy.write_bytes(trained.read_bytes())
    before = Path("results", trained.parent.name, "metrics.json").read_bytes()
    if name.startswith("{}"):
        assert f"contains the results of {trained.resolve()}" in error_line(
            capsys, "--testing", "--checkpoint", copy
        )
    else:
        assert run("--testing", "--checkpoint", copy) == 0
        assert Path("results", name, "metrics.json").is_file()
    assert Path("results", trained.parent.name, "metrics.json").read_bytes() == before


def test_an_unreadable_table_of_volumes_is_an_error_before_anything_is_predicted(capsys, trained):
    write_volume(Path("a.nii.gz"), noise(20, 20, 2, dtype=np.int16), np.eye(4))
    assert run("--predict", "a.nii.gz") == 0
    table, mask = MASKS.parent / "volumes.csv", MASKS / "a.nii.gz"
    table.write_bytes(table.read_bytes() + "Höhle".encode("latin-1"))
    mask.unlink()
    assert f"{table}: line" in error_line(capsys, "--predict", "a.nii.gz")
    assert not mask.exists()


def test_a_folder_whose_name_is_not_utf_8_is_listed_once(trained):
    folder = Path(os.fsdecode(b"w\xff"))
    folder.mkdir()
    write_volume(folder / "a.nii.gz", noise(20, 20, 2, dtype=np.int16), np.eye(4))
    found = []
    for _ in range(2):
        assert run("--predict", folder) == 0
        found.append((MASKS.parent / "volumes.csv").read_text())
    assert found[0] == found[1]


def test_an_image_whose_outputs_are_not_finite_is_named_and_the_others_are_predicted(
    capsys, monkeypatch, trained
):
    for name in "abc":
        Image.fromarray(noise(20, 20)).save(f"{name}.png")
    segment = METHODS["supervised"].segment

    def overflowing(self, x):
        logits = segment(self, x)
        logits[1] = torch.inf
        return logits

    monkeypatch.setattr(METHODS["supervised"], "segment", overflowing)
    error = error_line(capsys, "--predict", "a.png", "b.png", "c.png", code=1)
    assert "unreadable files: b.png: the network's outputs are not finite" in error
    assert {path.name for path in MASKS.iterdir()} == {"a.png", "c.png"}


def test_masks_of_earlier_calls_stay(capsys, trained):
    for name in "a/scan.nii.gz", "b/scan.nii.gz", "b/other.nii.gz":
        Path(name).parent.mkdir(exist_ok=True)
        write_volume(Path(name), noise(20, 20, 2, dtype=np.int16), np.eye(4))
    for name in "a/one.png", "b/one.png":
        Image.fromarray(noise(20, 20)).save(name)
    assert run("--predict", "a/scan.nii.gz", "a/one.png") == 0
    masks = [MASKS / "scan.nii.gz", MASKS / "one.png"]
    before = [mask.read_bytes() for mask in masks]
    for source, mask in zip(("b/scan.nii.gz", "b/one.png"), masks, strict=True):
        error = error_line(capsys, "--predict", source)
        assert f"{mask.name} is the mask of {Path(source).resolve()}".replace("/b/", "/a/") in error
    assert [mask.read_bytes() for mask in masks] == before
    files = [str(Path(name).resolve()) for name in ("a/scan.nii.gz", "b/other.nii.gz")]
    for name in "b/other.nii.gz", files[1], "b/other.nii.gz":
        assert run("--predict", name) == 0
        rows = rows_of(MASKS.parent / "volumes.csv")
        assert [row["file"] for row in rows[::3]] == files
    Path("a/one.png").rename("archived.png")
    assert "one.png is the mask of" in error_line(capsys, "--predict", "b/one.png")
    masks[1].unlink()
    assert run("--predict", "b/one.png") == 0


def test_commands_that_start_together_note_all_sources(tmp_path, monkeypatch):
    write = utils.write_atomically
    monkeypatch.setattr(utils, "write_atomically", lambda *file: (time.sleep(0.3), write(*file)))
    (tmp_path / "masks").mkdir()
    threads = []
    for name in "a", "b":
        found = {tmp_path / f"{name}.png": Path(name)}
        threads.append(threading.Thread(target=note_sources, args=(tmp_path, found)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "files.json").read_text()).keys() == {"a.png", "b.png"}


def test_damaged_notes_of_sources_are_an_error(tmp_path):
    (tmp_path / "masks").mkdir()
    for content in '{"a.png": 7}', "[1]":
        (tmp_path / "files.json").write_text(content)
        message = error_of(note_sources, tmp_path, {tmp_path / "a.png": Path("a")})
        assert message.startswith(f"{tmp_path / 'files.json'}: ")


def test_the_volumes_of_an_interrupted_call_are_those_of_its_masks(monkeypatch, trained):
    for name in "abc":
        write_volume(Path(f"{name}.nii.gz"), noise(20, 20, 2, dtype=np.int16), np.eye(4))
    saved, save = [], writers.save_prediction

    def interrupted(*args):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*args))

    monkeypatch.setattr(writers, "save_prediction", interrupted)
    assert run("--predict", "a.nii.gz", "b.nii.gz", "c.nii.gz") == 130
    rows = rows_of(MASKS.parent / "volumes.csv")
    assert {Path(row["file"]).name for row in rows} == {path.name for path in MASKS.iterdir()}
    assert len(rows) == 6


def test_results_are_not_predicted(capsys, trained):
    Path("mine").mkdir()
    for name in "one", "two":
        Image.fromarray(noise(20, 20)).save(f"mine/{name}.png")
    for _ in range(2):
        assert run("--predict", "mine", "--overlay", "--results", "mine/results") == 0
    printed = capsys.readouterr().out
    results = Path("mine/results", trained.parent.name)
    assert f"skipped {results}: results of a run\n" in printed
    assert printed.count("2 masks by") == 2


def test_a_volume_and_pictures_with_similar_names_keep_their_overlays(trained):
    for name in "heart", "heart_s00":
        Image.fromarray(noise(20, 20)).save(f"{name}.png")
    write_volume(Path("heart.nii.gz"), noise(20, 20, 1, dtype=np.int16), np.eye(4))
    for names in ["heart.png", "heart_s00.png"], ["heart.nii.gz"]:
        assert run("--predict", *names, "--overlay") == 0
    found = {str(path.relative_to(OVERLAYS)) for path in OVERLAYS.rglob("*.png")}
    assert found == {"heart.png", "heart_s00.png", "heart.nii.gz/s00.png"}


def test_a_link_among_the_overlays_is_replaced_not_what_it_names(trained):
    write_volume(Path("heart.nii.gz"), noise(20, 20, 1, dtype=np.int16), np.eye(4))
    assert run("--predict", "heart.nii.gz", "--overlay") == 0
    overlay = OVERLAYS / "heart.nii.gz"
    overlay.rename("kept")
    overlay.symlink_to(Path("kept").resolve())
    assert run("--predict", "heart.nii.gz", "--overlay") == 0
    assert not overlay.is_symlink()
    assert [path.name for path in overlay.iterdir()] == ["s00.png"]
    assert [path.name for path in Path("kept").iterdir()] == ["s00.png"]


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


def test_deep_pictures_are_not_predicted_where_half_would_scale_them_otherwise(capsys, trained):
    state = checkpoint.load(trained)
    state["settings"]["normalization"] = "half"
    Image.fromarray(noise(20, 20, dtype=np.uint16)).save("deep.png")
    checkpoint.save(trained, state | {"image_dtype": "uint8"})
    error = error_line(capsys, "--predict", "deep.png", code=1)
    assert "deep.png: more than 8 bits, unlike the training images" in error
    checkpoint.save(trained, state | {"image_dtype": "float32"})
    assert run("--predict", "deep.png") == 0


def test_images_that_half_would_scale_otherwise_than_in_training_are_not_scored(capsys, trained):
    state = checkpoint.load(trained)
    state["settings"]["normalization"] = "half"
    other = {"uint8": "float32", "float32": "uint8"}[state["image_dtype"]]
    checkpoint.save(trained, state | {"image_dtype": other})
    error = error_line(capsys, "--testing")
    found = f"images are {state['image_dtype']}, those of the training were {other}"
    assert f"--normalization half: {found}" in error


def test_masks_of_large_pictures_need_one_class_of_logits_at_a_time(monkeypatch):
    interpolate, sizes = torch.nn.functional.interpolate, []

    def spy(*args, **kwargs):
        result = interpolate(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.nn.functional, "interpolate", spy)
    mask = engine.predict.mask_at(torch.randn(21, 8, 8), (50, 30))
    assert mask.dtype == torch.uint8
    assert max(sizes) == 50 * 30


def test_each_slice_of_each_frame_of_a_film_is_predicted_as_a_picture_is(capsys, trained):
    film = noise(21, 34, 2, 3, dtype=np.float32)
    write_volume(Path("film.nii.gz"), film, np.diag([1.5, 2, 10, 1]))
    pictures = {}
    for z, t in np.ndindex(2, 3):
        pictures[z, t] = f"film_t0{t}_s0{z}"
        Image.fromarray(film[:, :, z, t].T).save(f"{pictures[z, t]}.tif")
    assert run("--predict", "film.nii.gz", "--overlay") == 0
    printed, rows = capsys.readouterr().out, rows_of(MASKS.parent / "volumes.csv")
    frames = stems(OVERLAYS / "film.nii.gz")
    assert {f"film_{name}" for name in frames} == {*pictures.values()}
    assert run("--predict", *(f"{name}.tif" for name in pictures.values())) == 0
    values = labels_of(MASKS / "film.nii.gz")
    assert values.shape == film.shape
    assert len(np.unique(values)) > 1
    for (z, t), name in pictures.items():
        assert np.array_equal(values[:, :, z, t].T, pixels_of(MASKS / f"{name}.png"))
    ml = [0.03 * (values[..., t] == 1).sum() for t in range(3)]
    assert f"film.nii.gz: right ventricle {min(ml):.1f} to {max(ml):.1f} ml, myocardium" in printed
    assert " ml, 3 frames\n" in printed
    film = str(Path("film.nii.gz").resolve())
    assert [(row["file"], row["frame"]) for row in rows[::3]] == [(film, t) for t in "012"]
    assert [row["class"] for row in rows] == 3 * [*load_spec("tiny.toml").classes[1:]]
    assert [float(row["ml"]) for row in rows[::3]] == pytest.approx(ml, rel=1e-5)


def test_overlays_show_the_masks_that_lie_beside_them(trained):
    volume = noise(21, 34, 3, dtype=np.float32)
    write_volume(Path("v.nii.gz"), volume)
    for name in "one.png", "two.png":
        Image.new("L", (20, 20)).save(name)
    assert run("--predict", "v.nii.gz", "one.png", "two.png", "--overlay") == 0
    assert stems(OVERLAYS / "v.nii.gz") == {"s00", "s01", "s02"}
    write_volume(Path("v.nii.gz"), volume[..., :2])
    assert run("--predict", "v.nii.gz", "--overlay") == 0
    assert stems(OVERLAYS / "v.nii.gz") == {"s00", "s01"}
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


def test_volumes_with_other_axes_than_those_of_the_training_are_named(capsys):
    volumes = Path("volumes")
    for number in range(4):
        for folder in "images", "masks":
            pixels = noise(20, 24, 2) // 128
            write_volume(volumes / folder / f"{number}.nii.gz", pixels, np.diag([-1, -1, 5, 1]))
    Path("own.toml").write_text('[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n')
    flags = [*tiny_on("own.toml"), *PARTIAL, "--data-root", str(volumes), "--name", "own"]
    assert run("--training", *flags) == 0
    assert "axes:" not in capsys.readouterr().out
    write_volume(Path("turned.nii.gz"), noise(20, 24, 2), np.eye(4))
    write_volume(Path("same.nii.gz"), noise(20, 24, 2), np.diag([-1, -1, 5, 1]))
    checkpoint = "checkpoints/own/best.pt"
    assert run("--predict", "turned.nii.gz", "same.nii.gz", "--checkpoint", checkpoint) == 0
    printed = capsys.readouterr().out
    assert "turned.nii.gz: its axes point to RAS, the training volumes' to LPS" in printed
    assert "same.nii.gz: its axes" not in printed
    for folder in "images", "masks":
        pixels = noise(20, 24, 2) // 128
        write_volume(volumes / folder / "5.nii.gz", pixels, np.diag([1, 1, 5, 1]))
    assert run("--training", *flags, "--overwrite") == 0
    assert "axes:    LPS, RAS: slices of volumes are not reoriented" in capsys.readouterr().out


def test_volumes_are_named_where_the_training_images_were_pictures(capsys, trained):
    write_volume(Path("scan.nii.gz"), noise(20, 24, 2), np.eye(4))
    assert run("--predict", "scan.nii.gz") == 0
    expected = "scan.nii.gz: its axes point to RAS, the training images were pictures; it is not"
    assert expected in capsys.readouterr().out


def test_masks_that_another_command_replaces_meanwhile_are_not_counted(tmp_path, monkeypatch):
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in "a.png", "b.png", ".c.png.7.tmp":
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    is_file = Path.is_file
    gone = folder / "a.png"
    monkeypatch.setattr(Path, "is_file", lambda p: is_file(p) and (p != gone or p.unlink() or True))
    (tmp_path / "best.pt").touch()
    assert count_older(folder, {}, tmp_path / "best.pt") == 1


def test_masks_that_earlier_weights_made_are_counted(capsys, trained):
    for name in "one", "two":
        Image.fromarray(noise(20, 20)).save(f"{name}.png")
    assert run("--predict", "one.png", "two.png") == 0
    assert "older than" not in capsys.readouterr().out
    os.utime(trained)
    os.utime(MASKS / "one.png", ns=(0, 0))
    assert run("--predict", "two.png") == 0
    assert "has 1 mask of other files, older than" in capsys.readouterr().out
    assert run("--predict", "one.png", "two.png") == 0
    assert "older than" not in capsys.readouterr().out


@pytest.mark.parametrize("sign", [1, -1])
def test_the_duration_of_a_frame_stays_where_the_fifth_axis_is_time(trained, sign):
    image = nibabel.Nifti1Image(noise(20, 20, 2, 1, 3, dtype=np.int16), np.eye(4))
    image.header.set_zooms((1, 1, 5, 1, 35))
    image.header["pixdim"][5] = sign * 35
    nibabel.save(image, "film.nii.gz")
    assert run("--predict", "film.nii.gz") == 0
    masks = nibabel.load(MASKS / "film.nii.gz")
    assert (masks.shape, masks.header.get_zooms()) == ((20, 20, 2, 3), (1, 1, 5, 35))
