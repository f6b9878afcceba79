"""From a root folder to samples: the layouts of VOC, Cityscapes, ACDC and of plain folders."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    add_acdc_testing,
    error_of,
    folder_spec,
    make_acdc,
    make_folder,
    read_errors,
    write_volume,
)

from datasets.layouts import index
from datasets.spec import Slice, load_spec
from datasets.splits import split

LISTS = "VOCdevkit/VOC2012/ImageSets/Segmentation"


def test_voc_root_may_be_voc2012_or_a_folder_above(voc):
    spec, ids = load_spec("voc"), [f"2007_{i:06d}" for i in range(4)]
    for root in voc, voc / "VOCdevkit", voc / "VOCdevkit" / "VOC2012":
        samples = index(spec, root)
        assert [s.id for s in samples] == ids  # train_aug.txt alone, not val.txt
        assert all(s.image.is_file() and s.mask.is_file() for s in samples)


def test_cityscapes_pools_train_and_val(cityscapes):
    samples = index(load_spec("cityscapes"), cityscapes)
    assert Counter(s.part for s in samples) == {"train": 4, "val": 2}
    assert samples[0].id == "aachen_000000_000019"
    assert samples[0].mask.name == "aachen_000000_000019_gtFine_labelIds.png"
    assert samples[-1].id == "frankfurt_000001_000019"
    assert all(s.image.is_file() and s.mask.is_file() and s.group == s.id for s in samples)


def test_acdc_takes_every_slice_of_the_two_frames_that_info_names(acdc):
    exam = acdc / "training" / "patient001"
    write_volume(exam / "patient001_frame05.nii.gz", np.zeros((18, 14, 3), np.int16))
    write_volume(exam / "patient001_4d.nii.gz", np.zeros((18, 14, 3, 2), np.int16))
    samples = index(load_spec("acdc"), acdc)
    names = [
        f"patient{p:03d}_frame{f:02d}_s{z:02d}" for p in (1, 2) for f in (1, 12) for z in range(3)
    ]
    assert [s.id for s in samples] == names
    assert [s.group for s in samples] == ["patient001"] * 6 + ["patient002"] * 6
    assert samples[4].image == Slice(exam / "patient001_frame12.nii.gz", 1)
    assert samples[4].mask == Slice(exam / "patient001_frame12_gt.nii.gz", 1)


def test_each_kind_of_split_takes_its_parts_and_a_split_file_all(voc, cityscapes, acdc, tmp_path):
    add_acdc_testing(acdc, 2)
    own = make_folder(tmp_path / "own", 3, n_unlabeled=2, n_val=1)
    cases = [
        (load_spec("voc"), voc, {"train": 4}, {"train": 4, "val": 1}),
        (load_spec("cityscapes"), cityscapes, {"train": 4, "val": 2}, {"train": 4, "val": 2}),
        (load_spec("acdc"), acdc, {"train": 12}, {"train": 12, "test": 8}),
        (folder_spec(), own, {"train": 5, "val": 1}, {"train": 5, "val": 1}),
    ]
    for spec, root, pool, everything in cases:
        for kind in "paper", "image":
            assert Counter(s.part for s in index(spec, root, kind)) == pool
        assert Counter(s.part for s in index(spec, root, "standard")) == everything
        assert len(index(spec, root, "file")) == sum(everything.values())


def test_standard_split_of_a_dataset_without_one_is_an_error():
    assert "phantom" in error_of(index, load_spec("phantom"), Path("none"), "standard")


def test_phantoms_need_no_folder_and_are_as_many_as_counts():
    samples = index(load_spec("phantom"), Path("/nonexistent"))
    assert len(samples) == 160 + 40
    assert sorted(s.image for s in samples) == list(range(200))
    assert all(s.mask == s.image for s in samples)


def test_a_folders_pictures_and_masks_go_together_by_stem(tmp_path):
    root = make_folder(tmp_path, 4, n_unlabeled=2, ending=".JPG")
    (root / "masks" / "picture 2.png").unlink()
    (root / "images" / ".DS_Store").write_text("not an image")
    samples = index(folder_spec(), root)
    assert [s.id for s in samples] == [f"picture {i}" for i in range(6)]
    assert [s.mask and s.mask.name for s in samples] == [
        "picture 0.png", "picture 1.png", None, "picture 3.png", None, None,
    ]  # fmt: skip
    assert all(s.image.is_file() and s.group == s.id and s.part == "train" for s in samples)


def test_a_folders_volumes_give_one_sample_per_slice(tmp_path):
    for number in range(2):
        ending = (".nii", ".nii.gz")[number % 2]
        write_volume(tmp_path / "images" / f"case{number}{ending}", np.zeros((6, 5, 3), np.int16))
        write_volume(tmp_path / "masks" / f"case{number}.nii.gz", np.zeros((6, 5, 3), np.uint8))
    samples = index(folder_spec(channels=1), tmp_path)
    assert [s.id for s in samples] == [f"case{i}_s{z:02d}" for i in range(2) for z in range(3)]
    assert [s.group for s in samples] == ["case0"] * 3 + ["case1"] * 3
    assert samples[1].image == Slice(tmp_path / "images/case0.nii", 1)
    assert samples[1].mask == Slice(tmp_path / "masks/case0.nii.gz", 1)


@pytest.mark.parametrize(
    ("breakage", "named"),
    [
        (lambda root: (root / "images/picture 1.png").unlink(), "picture 1.png: has no image"),
        (
            lambda root: (root / "images/picture 1.bmp").write_text(""),
            "picture 1.png: picture 1.bmp has the same stem",
        ),
        (
            lambda root: (root / "images/notes.txt").write_text(""),
            "notes.txt: neither a picture nor",
        ),
        (lambda root: (root / "masks/more.png").mkdir(), "more.png: a folder; files must lie"),
        (lambda root: (root / "val/masks/picture 6.png").unlink(), "picture 6.png: has no mask"),
        (
            lambda root: (root / "masks/picture 1.png").rename(root / "masks/picture 1.nii"),
            "picture 1.nii: image and mask must be two volumes or two pictures",
        ),
        (
            lambda root: (root / "unlabeled/picture 5.png").rename(
                root / "unlabeled/picture 0.png"
            ),
            "unlabeled/picture 0.png)",
        ),
    ],
)
def test_files_that_do_not_fit_the_folder_layout_are_named(tmp_path, breakage, named):
    root = make_folder(tmp_path / "own", 4, n_unlabeled=2, n_val=1)
    breakage(root)
    assert named in error_of(index, folder_spec(), root)


@pytest.mark.parametrize("name", ["voc", "cityscapes", "acdc"])
def test_missing_or_empty_root_is_named(tmp_path, name):
    assert str(tmp_path / "gone") in error_of(index, load_spec(name), tmp_path / "gone")
    assert str(tmp_path) in error_of(index, load_spec(name), tmp_path)


def test_an_empty_folder_is_told_where_its_layout_is_described(tmp_path):
    error = error_of(index, folder_spec(), tmp_path)
    assert error.endswith("no image in the layout 'folder'; docs/own_data.md describes the layout")
    error = error_of(index, folder_spec(), tmp_path, "test")
    assert "contains no test image in the layout" in error


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "train_aug.txt: no such file"),
        ("", "train_aug.txt: lists no image"),
        ("2007_000001\n2007_000002\n2007_000001\n", "duplicate ids: 2007_000001"),
    ],
)
def test_bad_voc_list_is_an_error(voc, content, named):
    path = voc / LISTS / "train_aug.txt"
    path.unlink() if content is None else path.write_text(content)
    message = error_of(index, load_spec("voc"), voc)
    assert named in message
    assert "2007_000002" not in message


@pytest.mark.parametrize(
    "name", ["../2007_000001", "/etc/passwd", "a/b", "..", "a\0b", "2007_000001\x1b"]
)
def test_an_id_that_is_no_file_name_is_an_error(voc, name):
    path = voc / LISTS / "train_aug.txt"
    path.write_text(f"2007_000000\n{name}\n")
    message = error_of(index, load_spec("voc"), voc)
    assert message.startswith(f"{path}: ")
    assert repr(name) in message


@pytest.mark.parametrize("name", ["left ventricle 1", "Übung", "心臓", "a.b", "-x"])
def test_an_id_may_hold_spaces_and_any_letters(voc, name):
    home = voc / "VOCdevkit/VOC2012"
    for folder, ending in ("JPEGImages", ".jpg"), ("SegmentationClassAug", ".png"):
        (home / folder / f"2007_000000{ending}").rename(home / folder / f"{name}{ending}")
    ids = f"{name}\r\n\n2007_000001  \n"
    (voc / LISTS / "train_aug.txt").write_text(ids, encoding="utf-8")
    samples = index(load_spec("voc"), voc)
    assert {s.id for s in samples} == {name, "2007_000001"}
    assert not read_errors(samples, load_spec("voc"))


def test_cityscapes_endings_may_be_capital_and_other_files_are_left_out(cityscapes):
    folder = cityscapes / "leftImg8bit/train/aachen"
    image = folder / "aachen_000000_000019_leftImg8bit.png"
    image.rename(image.with_suffix(".PNG"))
    (folder / "notes.txt").write_text("not an image")
    spec = load_spec("cityscapes")
    samples = index(spec, cityscapes)
    assert len(samples) == 6
    assert not read_errors(samples, spec)
    mask = samples[0].mask
    mask.rename(mask.with_suffix(".PNG"))
    assert read_errors(index(spec, cityscapes), spec) == [f"{mask}: No such file or directory"]


def test_an_exam_that_is_a_file_or_names_another_frame_is_named(acdc):
    spec = load_spec("acdc")
    (acdc / "training" / "patient003").write_text("not a folder")
    assert "patient003" in error_of(index, spec, acdc)
    (acdc / "training" / "patient003").unlink()
    (acdc / "training" / "patient002" / "Info.cfg").write_text("ED: 1\nES: 31\n")
    (message,) = read_errors(index(spec, acdc), spec)
    assert "patient002_frame31.nii.gz" in message


def test_every_missing_or_senseless_info_is_named(tmp_path):
    make_acdc(tmp_path, 3, 1)
    infos = [tmp_path / "training" / f"patient00{i}" / "Info.cfg" for i in (1, 2, 3)]
    infos[0].unlink()
    infos[2].write_text("ED: 1\nES: end\n")
    message = error_of(index, load_spec("acdc"), tmp_path)
    assert [str(path) in message for path in infos] == [True, False, True]


def test_group_keeps_the_files_of_a_patient_together(tmp_path):
    make_folder(tmp_path, 4)  # picture 0 to 3
    for folder in "images", "masks":
        for number in range(4):
            old = tmp_path / folder / f"picture {number}.png"
            old.rename(old.with_name(f"P{number // 2}_{number}.png"))
    spec = folder_spec(group=r"^(P\d+)_")
    groups = [(s.id, s.group) for s in index(spec, tmp_path)]
    assert groups == [("P0_0", "P0"), ("P0_1", "P0"), ("P1_2", "P1"), ("P1_3", "P1")]
    for seed in range(4):
        parts = split(index(spec, tmp_path), 1, seed, spec)
        assert len({s.group for s in parts.val}) == 1
        assert {s.group for s in parts.val}.isdisjoint(s.group for s in parts.labeled)


def test_scans_of_a_patient_are_one_group(tmp_path):
    for stem in "P1_a", "P1_b":
        write_volume(tmp_path / "images" / f"{stem}.nii.gz", np.zeros((4, 4, 2), np.int16))
    samples = index(folder_spec(group="(.+)_"), tmp_path)
    assert [(s.id, s.volume, s.group) for s in samples] == [
        ("P1_a_s00", "P1_a", "P1"),
        ("P1_a_s01", "P1_a", "P1"),
        ("P1_b_s00", "P1_b", "P1"),
        ("P1_b_s01", "P1_b", "P1"),
    ]


@pytest.mark.parametrize("pattern", [r"^(P\d+)_", "(x?)"])
def test_a_stem_without_a_patient_is_named(tmp_path, pattern):
    make_folder(tmp_path, 2)
    message = error_of(index, folder_spec(group=pattern), tmp_path)
    assert all(f"images/picture {i}.png: names no patient" in message for i in (0, 1))
    assert repr(pattern) in message


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_patient_is_not_in_two_parts(tmp_path, part):
    make_folder(tmp_path, 1)
    make_folder(tmp_path / part, 2)
    for folder in "images", "masks":
        (tmp_path / part / folder / "picture 0.png").unlink()
    message = error_of(index, folder_spec(group="(picture)"), tmp_path)
    assert f"{part}/images/picture 1.png: patient picture is also among the train" in message
    assert len(index(folder_spec(group="(.+)"), tmp_path)) == (2 if part == "val" else 1)


def test_a_split_file_may_name_any_image_of_voc(voc):
    home = voc / "VOCdevkit" / "VOC2012"
    (home / "SegmentationClass").mkdir()
    masks = sorted((home / "SegmentationClassAug").iterdir())
    for mask in masks[1:3]:
        mask.rename(home / "SegmentationClass" / mask.name)
    masks[3].unlink()
    found = {s.id: s.mask and s.mask.parent.name for s in index(load_spec("voc"), voc, "file")}
    folders = ["SegmentationClassAug", *["SegmentationClass"] * 2, None, "SegmentationClassAug"]
    assert found == {f"2007_{i:06d}": folder for i, folder in enumerate(folders)}


def test_voc_needs_no_lists_for_a_split_file(voc):
    home = voc / "VOCdevkit" / "VOC2012"
    shutil.rmtree(home / "ImageSets")
    (home / "SegmentationClassAug").rename(home / "SegmentationClass")
    samples = index(load_spec("voc"), voc, "file")
    assert len(samples) == 5
    assert all(s.mask.is_file() for s in samples)
    assert "ImageSets/Segmentation" in error_of(index, load_spec("voc"), voc)
