"""Section 4.1's datasets: descriptions, splits, decoding, the cache, epochs, batches and phantoms, by known answers."""

import dataclasses
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import ACDC_AFFINE, make_acdc, make_cityscapes, make_folder, make_voc, write_indexed, write_volume
from PIL import Image

import data_utils
from data_utils import (
    Epoch,
    Sample,
    Slice,
    Stored,
    batches,
    decode,
    draw_phantom,
    index,
    load_spec,
    normalize,
    open_cache,
)
from utils import IGNORE, InputError, to_toml

CPU = torch.device("cpu")
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
TABLE = {
    "layout": "voc",
    "classes": ["sky", "tree", "cat"],
    "palette": [[0, 0, 255], [0, 128, 0], [128, 0, 0]],
    "scored": [1, 2],
}
OFFICIAL_CITYSCAPES = {  # cityscapesscripts.helpers.labels: the ids that are evaluated, in the order of their trainId
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
REAL = Path(os.environ.get("SEG_REAL_DATA", "/nonexistent"))
needs_real_data = pytest.mark.skipif("SEG_REAL_DATA" not in os.environ, reason="SEG_REAL_DATA names no folder")


def toy_spec(**changes) -> data_utils.DatasetSpec:
    return data_utils.make_spec({"name": "toy", **TABLE, **changes}, "toy.toml")


def complaint(function, *args) -> str:
    """The message of the InputError that a call must raise."""
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Descriptions


@pytest.mark.parametrize(
    ("name", "k", "scored", "void", "channels", "counts"),
    [
        ("voc", 21, range(1, 21), None, 3, (8994, 1588)),
        ("cityscapes", 20, range(19), 19, 3, (2953, 522)),
        ("acdc", 4, range(4), None, 1, (75, 25)),
        ("phantom", 4, range(4), None, 1, (160, 40)),
    ],
)
def test_committed_description(name, k, scored, void, channels, counts):
    spec = load_spec(name)
    assert (spec.name, spec.layout, len(spec.classes), len(spec.palette)) == (name, name, k, k)
    assert (spec.scored, spec.void, spec.channels, spec.counts) == (tuple(scored), void, channels, counts)
    assert spec.ignore == IGNORE


def test_voc_palette_spreads_the_bits_of_the_index():
    def colour(i):  # VOCcode/VOClabelcolormap.m
        return tuple(sum((i >> (3 * bit + c) & 1) << (7 - bit) for bit in range(3)) for c in range(3))

    assert load_spec("voc").palette == tuple(colour(i) for i in range(21))


def test_toml_file_is_a_dataset_named_by_its_stem(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f"[dataset]\n{to_toml(TABLE)}")
    spec = load_spec(str(path))
    assert (spec.name, spec.classes, spec.palette[1], spec.counts) == (
        "mine",
        ("sky", "tree", "cat"),
        (0, 128, 0),
        None,
    )


def test_unknown_dataset_is_an_error_that_lists_the_known():
    message = complaint(load_spec, "nope")
    assert all(name in message for name in ("nope", "voc", "cityscapes", "acdc", "phantom"))


@pytest.mark.parametrize("text", ["layout = ", "size = [1, 2]\n", "dataset = 3\n"])
def test_file_without_a_dataset_table_is_named(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert str(path) in complaint(load_spec, str(path))


def complaint_about(path: Path, table: dict) -> str:
    """What load_spec says of a [dataset] table, after the file's name."""
    path.write_text(f"[dataset]\n{to_toml(table)}")
    message = complaint(load_spec, str(path))
    assert str(path) in message
    return message.replace(str(path), "")


def test_unknown_key_is_named(tmp_path):
    assert "colours" in complaint_about(tmp_path / "a.toml", {**TABLE, "colours": 3})


@pytest.mark.parametrize("key", ["layout", "classes"])
def test_missing_key_is_named(tmp_path, key):
    assert key in complaint_about(tmp_path / "a.toml", {k: v for k, v in TABLE.items() if k != key})


def test_layout_and_classes_are_enough(tmp_path):
    (tmp_path / "a.toml").write_text(f"[dataset]\n{to_toml({'layout': 'folder', 'classes': TABLE['classes']})}")
    spec = load_spec(str(tmp_path / "a.toml"))
    assert (spec.palette, spec.scored) == (load_spec("voc").palette[:3], (0, 1, 2))
    assert (spec.channels, spec.ignore, spec.counts) == (3, 255, None)


WRONG = {
    "layout": ["nope", 3],
    "classes": [[], ["one"], ["sky", "tree", "tree"], [1, 2, 3], "abc"],
    "palette": [
        7,
        *([[0, 0, 0], [1, 1, 1], *last] for last in ([], [[2, 2]], [[2, 2, 256]], [[2, 2, -1]], [[2, 2, 0.5]])),
    ],
    "scored": [[], [3], [-1], ["tree"], 1],
    "channels": [2, "3"],
    "ignore": [256, -1, "255"],
    "void": [3, -1, "tree"],
    "label_ids": [[1, 2, 3, 4], [1, 2, 256], [-1, 2], 5],
    "void_ids": [[9]],  # there is no void
    "pool": [[], "train"],
    "counts": [[1], [1, 2, 3], [0, 5], [5, 0], [1.5, 2], 100],
    "standard": [[], ["train"], ["train", "train"], ["train", "dev"], ["train", "val", "test"], "train", 1],
    "standard_counts": [[1], [0, 5], [1.5, 2], 100],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_wrong_value_is_named_with_its_key(tmp_path, key, value):
    message = complaint_about(tmp_path / "a.toml", {**TABLE, key: value})
    assert key in message
    assert repr(value) in message


def test_void_ids_are_values_of_a_byte(tmp_path):
    assert "void_ids" in complaint_about(tmp_path / "a.toml", {**TABLE, "void": 0, "void_ids": [256]})


def test_official_cityscapes_ids_become_classes_and_the_rest_void(tmp_path):
    spec = load_spec("cityscapes")
    sample = index(spec, make_cityscapes(tmp_path, 1, 0))[0]  # column i of the mask holds labelId i
    column = decode(sample, spec, (16, 34))[1][0].tolist()
    assert [spec.classes[column[i]] for i in OFFICIAL_CITYSCAPES] == list(OFFICIAL_CITYSCAPES.values())
    assert [column[i] for i in OFFICIAL_CITYSCAPES] == list(range(19))
    assert {column[i] for i in range(34) if i not in OFFICIAL_CITYSCAPES} == {19}


# Layouts


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
    names = [f"patient{p:03d}_frame{f:02d}_s{z:02d}" for p in (1, 2) for f in (1, 12) for z in range(3)]
    assert [s.id for s in samples] == names
    assert [s.group for s in samples] == ["patient001"] * 6 + ["patient002"] * 6
    assert samples[4].image == Slice(exam / "patient001_frame12.nii.gz", 1)
    assert samples[4].mask == Slice(exam / "patient001_frame12_gt.nii.gz", 1)


def test_acdc_testing_exams_stay_out_of_the_pool(acdc):
    (acdc / "testing").mkdir()
    (make_acdc(acdc / "more", 3, 2) / "training" / "patient003").rename(acdc / "testing" / "patient003")
    assert {s.group for s in index(load_spec("acdc"), acdc)} == {"patient001", "patient002"}


def add_acdc_testing(root: Path, n: int) -> Path:
    """n exams of two slices in testing/, numbered on from training's two."""
    (root / "testing").mkdir()
    for number in range(3, 3 + n):
        name = f"patient{number:03d}"
        (make_acdc(root / "more" / name, number, 2) / "training" / name).rename(root / "testing" / name)
    return root


def test_standard_split_takes_the_parts_that_other_papers_take(voc, cityscapes, acdc):
    add_acdc_testing(acdc, 2)
    for name, root, expected in (
        ("voc", voc, {"train": 4, "val": 1}),
        ("cityscapes", cityscapes, {"train": 4, "val": 2}),
        ("acdc", acdc, {"train": 12, "test": 8}),
    ):
        spec = load_spec(name)
        samples = index(spec, root, "standard")
        assert Counter(s.part for s in samples) == expected
        parts = data_utils.split(samples, 0.5, 0, spec, "standard")
        trained, validated = expected.values()
        assert {s.part for s in parts.labeled + parts.unlabeled} == {"train"}
        assert {s.part for s in parts.val} == {spec.standard[1]}
        assert (sizes(parts), len(parts.labeled)) == ((trained, validated), trained / 2)


def test_counts_of_the_standard_splits_are_the_fields():
    counts = {name: load_spec(name).standard_counts for name in ("voc", "cityscapes", "acdc")}
    assert counts == {"voc": (10582, 1449), "cityscapes": (2975, 500), "acdc": (100, 50)}


def folder_spec(**more) -> data_utils.DatasetSpec:
    return data_utils.make_spec({"name": "own", "layout": "folder", "classes": ["dark", "bright"], **more}, "own.toml")


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
    parts = data_utils.split(samples, 1.0, 0, folder_spec())
    assert len(parts.val) == 1  # 15 % of the three that have a mask, but at least one
    assert {*parts.unlabeled} == {samples[2], *samples[4:]}


def test_a_folders_val_is_what_it_is_validated_on(tmp_path):
    spec, root = folder_spec(), make_folder(tmp_path, 8, n_unlabeled=3, n_val=2)
    for kind in "paper", "standard":
        samples = index(spec, root, kind)
        parts = data_utils.split(samples, 0.5, 0, spec, kind)
        assert [s.id for s in parts.val] == ["picture 11", "picture 12"]
        assert (len(parts.labeled), len(parts.unlabeled)) == (4, 4 + 3)
    whole = data_utils.split(samples, 1.0, 0, spec)
    assert [s.id for s in whole.unlabeled] == ["picture 10", "picture 8", "picture 9"]


def test_a_folders_volumes_are_taken_slice_by_slice_and_never_divided(tmp_path):
    for number in range(8):
        volume = np.random.default_rng(number).integers(0, 2, (6, 5, 3)).astype(np.int16)
        ending = (".nii", ".nii.gz")[number % 2]
        write_volume(tmp_path / "images" / f"case{number}{ending}", 1000 * volume)
        write_volume(tmp_path / "masks" / f"case{number}.nii.gz", volume)
    spec = folder_spec(channels=1)
    samples = index(spec, tmp_path)
    assert [s.id for s in samples[:4]] == ["case0_s00", "case0_s01", "case0_s02", "case1_s00"]
    image, mask = decode(samples[4], spec, (5, 6))
    assert torch.equal(image[0], 1000.0 * mask)
    parts = data_utils.split(samples, 0.5, 0, spec)
    assert not {s.group for s in parts.val} & {s.group for s in parts.labeled + parts.unlabeled}
    colour = open_cache(folder_spec(), samples, (5, 6), tmp_path / "cache").images
    assert (colour.shape, colour.dtype) == ((24, 3, 5, 6), np.float32)
    assert np.array_equal(colour[4, 2], image[0])


def test_a_folders_deep_grey_pictures_keep_their_values(tmp_path):
    root = make_folder(tmp_path, 3)
    values = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    Image.fromarray(values).save(root / "images" / "picture 1.png")
    Image.fromarray(values.astype(np.float32) / 7).save(root / "images" / "picture 2.tif")
    (root / "images" / "picture 2.png").unlink()
    spec = folder_spec()
    cache = open_cache(spec, index(spec, root), (20, 24), tmp_path / "cache")
    assert cache.images.dtype == np.float32
    assert all(np.array_equal(channel, values) for channel in cache.images[1])
    assert np.array_equal(cache.images[2, 0], values.astype(np.float32) / 7)
    assert cache.images[0].max() <= 255


@pytest.mark.parametrize(
    ("breakage", "named"),
    [
        (lambda root: (root / "images/picture 1.png").unlink(), "picture 1.png: has no image"),
        (lambda root: (root / "images/picture 1.bmp").write_text(""), "picture 1.png: picture 1.bmp has the same stem"),
        (lambda root: (root / "images/notes.txt").write_text(""), "notes.txt: neither a picture nor"),
        (lambda root: (root / "masks/more.png").mkdir(), "more.png: neither a picture nor"),
        (lambda root: (root / "val/masks/picture 6.png").unlink(), "picture 6.png: has no mask"),
        (lambda root: (root / "masks/picture 1.png").rename(root / "masks/picture 1.nii"), "picture 1.nii: image and"),
        (lambda root: (root / "unlabeled/picture 5.png").rename(root / "unlabeled/picture 0.png"), "stand twice: pict"),
        (lambda root: (root / "images/picture 0.png").write_bytes(b"junk"), "picture 0.png"),
        (lambda root: write_indexed(root / "masks/picture 0.png", np.full((20, 24), 2)), "label 2 is out of range"),
        (lambda root: Image.new("F", (24, 20), np.nan).save(root / "unlabeled/nan.tif"), "nan.tif: holds values"),
    ],
)
def test_bad_folders_are_named(tmp_path, breakage, named):
    root, spec = make_folder(tmp_path / "own", 4, n_unlabeled=2, n_val=1), folder_spec()
    breakage(root)
    assert named in complaint(lambda: open_cache(spec, index(spec, root), (8, 8), tmp_path / "cache"))


def test_phantoms_need_no_folder():
    samples = index(load_spec("phantom"), Path("/nonexistent"))
    assert len(samples) == 200
    assert len({s.image for s in samples}) == 200


@pytest.mark.parametrize("name", ["voc", "cityscapes", "acdc"])
def test_missing_or_empty_root_is_named(tmp_path, name):
    assert str(tmp_path / "gone") in complaint(index, load_spec(name), tmp_path / "gone")
    assert str(tmp_path) in complaint(index, load_spec(name), tmp_path)


@pytest.mark.parametrize("breakage", ["gone", "empty", "twice"])
def test_bad_voc_list_is_an_error(voc, breakage):
    path = voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"
    if breakage == "gone":
        path.unlink()
    else:
        path.write_text("" if breakage == "empty" else "2007_000001\n2007_000002\n2007_000001\n")
    message = complaint(index, load_spec("voc"), voc)
    assert ("2007_000001" if breakage == "twice" else "train_aug.txt") in message
    assert "2007_000002" not in message


@pytest.mark.parametrize("name", ["../2007_000001", "/etc/passwd", "a/b", "..", "a\0b", "2007_000001\x1b"])
def test_an_id_that_is_no_file_name_is_an_error(voc, name):
    path = voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"
    path.write_text(f"2007_000000\n{name}\n")
    message = complaint(index, load_spec("voc"), voc)
    assert str(path) in message
    assert repr(name) in message


@pytest.mark.parametrize("name", ["left ventricle 1", "Übung", "心臓", "a.b", "-x"])
def test_an_id_may_hold_spaces_and_any_letters(voc, tmp_path, name):
    home = voc / "VOCdevkit/VOC2012"
    for folder, ending in ("JPEGImages", ".jpg"), ("SegmentationClassAug", ".png"):
        (home / folder / f"2007_000000{ending}").rename(home / folder / f"{name}{ending}")
    (home / "ImageSets/Segmentation/train_aug.txt").write_text(f"{name}\r\n\n2007_000001  \n", encoding="utf-8")
    assert {s.id for s in index(load_spec("voc"), voc)} == {name, "2007_000001"}
    assert len(voc_cache(voc, tmp_path / "cache")[0].images) == 2


def test_cityscapes_endings_may_be_capital_and_a_missing_mask_is_named(cityscapes, tmp_path):
    folder = cityscapes / "leftImg8bit/train/aachen"
    image = folder / "aachen_000000_000019_leftImg8bit.png"
    image.rename(image.with_suffix(".PNG"))
    (folder / "notes.txt").write_text("not an image")
    spec = load_spec("cityscapes")
    assert len(index(spec, cityscapes)) == 6
    mask = index(spec, cityscapes)[0].mask
    mask.rename(mask.with_suffix(".PNG"))
    assert str(mask) in complaint(open_cache, spec, index(spec, cityscapes), (8, 8), tmp_path / "cache")


def test_an_exam_that_is_a_file_or_names_another_frame_is_named(acdc, tmp_path):
    (acdc / "training" / "patient003").write_text("not a folder")
    assert "patient003" in complaint(index, load_spec("acdc"), acdc)
    (acdc / "training" / "patient003").unlink()
    (acdc / "training" / "patient002" / "Info.cfg").write_text("ED: 1\nES: 31\n")
    spec = load_spec("acdc")
    message = complaint(lambda: open_cache(spec, index(spec, acdc), (8, 8), tmp_path / "cache"))
    assert "patient002_frame31.nii.gz" in message


def test_every_missing_or_senseless_info_is_named(tmp_path):
    make_acdc(tmp_path, 3, 1)
    files = [tmp_path / "training" / f"patient00{i}" / "Info.cfg" for i in (1, 2, 3)]
    files[0].unlink()
    files[2].write_text("ED: 1\nES: end\n")
    message = complaint(index, load_spec("acdc"), tmp_path)
    assert [str(file) in message for file in files] == [True, False, True]


# Splits


def made_up(n: int, group_of=str, part: str = "train") -> list[Sample]:
    return [Sample(f"{i:05d}", group_of(i), i, i, part) for i in range(n)]


def sizes(parts) -> tuple[int, int]:
    return len(parts.labeled) + len(parts.unlabeled), len(parts.val)


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("voc", 10582, (8994, 1588)),
        ("cityscapes", 3475, (2953, 522)),
        ("phantom", 200, (160, 40)),
        ("voc", 160, (136, 24)),
        ("cityscapes", 5, (4, 1)),
        ("voc", 8, (7, 1)),  # 1.2 to validate
        ("voc", 11, (9, 2)),  # 1.65 to validate
        ("voc", 2, (1, 1)),
    ],
)
def test_papers_counts_or_their_proportions(name, n, expected):
    assert sizes(data_utils.split(made_up(n), 1.0, 0, load_spec(name))) == expected


def test_without_counts_15_percent_are_held_out():
    assert sizes(data_utils.split(made_up(200), 1.0, 0, toy_spec())) == (170, 30)


def acdc_like(n_exams: int) -> list[Sample]:
    """12 to 28 slices an exam, in two frames, as ACDC has."""
    depths = np.random.default_rng(0).integers(6, 15, n_exams)
    exams = [f"patient{e:03d}" for e, depth in enumerate(depths) for _ in range(2 * depth)]
    return made_up(len(exams), exams.__getitem__)


@pytest.mark.parametrize("seed", range(5))
def test_no_exam_is_on_both_sides(seed):
    parts = data_utils.split(acdc_like(100), 0.3, seed, load_spec("acdc"))
    train, val = {s.group for s in parts.labeled + parts.unlabeled}, {s.group for s in parts.val}
    assert (len(train), len(val), train & val) == (75, 25, set())


def test_ratio_of_acdc_counts_slices_of_the_training_exams():
    parts = data_utils.split(acdc_like(100), 0.1, 0, load_spec("acdc"))
    assert len(parts.labeled) == round(0.1 * sizes(parts)[0])


@pytest.mark.parametrize(("ratio", "n_labeled"), [(0.1, 899), (0.2, 1799), (0.3, 2698), (0.5, 4497), (1.0, 8994)])
def test_ratio_counts_training_images(ratio, n_labeled):
    assert len(data_utils.split(made_up(10582), ratio, 0, load_spec("voc")).labeled) == n_labeled


def test_split_is_a_partition_sorted_by_id():
    samples = acdc_like(20)
    parts = data_utils.split(samples, 0.3, 0, load_spec("acdc"))
    everything = [*parts.labeled, *parts.unlabeled, *parts.val]
    assert sorted(everything, key=lambda s: s.id) == samples
    for role, ids in parts.ids().items():
        assert ids == [s.id for s in getattr(parts, role)] == sorted(ids)
        assert ids


def test_fewer_labels_are_part_of_more_and_val_stays():
    splits = [data_utils.split(made_up(1000), ratio, 3, load_spec("voc")) for ratio in (0.1, 0.2, 0.3, 0.5, 1.0)]
    for fewer, more in zip(splits, splits[1:], strict=False):
        assert {*fewer.labeled} < {*more.labeled}
        assert fewer.val == more.val
    assert splits[-1].unlabeled == ()


def test_split_depends_on_the_seed_and_not_on_the_order_of_the_samples():
    samples, spec = made_up(300), load_spec("voc")
    parts = data_utils.split(samples, 0.2, 1, spec)
    assert data_utils.split(samples[::-1], 0.2, 1, spec) == parts
    other = data_utils.split(samples, 0.2, 2, spec)
    assert other.val != parts.val
    places = []
    for each in parts, other:
        train = sorted([*each.labeled, *each.unlabeled], key=lambda s: s.id)
        places.append([train.index(s) for s in each.labeled])
    assert places[0] != places[1]  # labels are drawn too, not only the validation set
    assert list(range(len(places[0]))) not in places  # and not taken from the top of the list


def test_split_leaves_the_global_generators_and_its_input_alone():
    samples = made_up(50)[::-1]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), samples.copy()
    data_utils.split(samples, 0.2, 1, toy_spec())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), samples) == before


def test_samples_outside_the_pool_are_not_split():
    samples = [*made_up(20), *(Sample(f"v{i}", f"v{i}", i, i, "val") for i in range(5))]
    parts = data_utils.split(samples, 1.0, 0, toy_spec())
    assert {s.part for s in parts.labeled + parts.val} == {"train"}
    assert sum(sizes(parts)) == 20


def test_standard_split_validates_on_all_of_its_part_whatever_the_seed():
    spec = load_spec("acdc")
    samples = [*made_up(40), *(Sample(f"t{i}", "t", i, i, "test") for i in range(9))]
    for seed in 0, 1:
        parts = data_utils.split(samples, 0.25, seed, spec, "standard")
        assert (len(parts.labeled), len(parts.unlabeled), [s.id for s in parts.val]) == (
            10,
            30,
            [f"t{i}" for i in range(9)],
        )
    assert parts.labeled != data_utils.split(samples, 0.25, 0, spec, "standard").labeled
    samples[-1] = dataclasses.replace(samples[-1], mask=None)
    assert [s.id for s in data_utils.split(samples, 0.25, 0, spec, "standard").val] == [f"t{i}" for i in range(8)]


def test_standard_split_without_its_part_or_of_a_dataset_without_one_is_an_error():
    assert "'test' is not there" in complaint(data_utils.split, made_up(40), 0.5, 0, load_spec("acdc"), "standard")
    assert "phantom" in complaint(data_utils.split, made_up(40), 0.5, 0, load_spec("phantom"), "standard")
    assert "phantom" in complaint(index, load_spec("phantom"), Path("none"), "standard")


def test_image_split_is_the_released_codes_85_to_15_over_slices():
    spec, samples = load_spec("acdc"), acdc_like(100)
    parts = data_utils.split(samples, 0.2, 0, spec, "image")
    assert len(parts.val) == round(0.15 * len(samples))
    train, val = {s.group for s in parts.labeled + parts.unlabeled}, {s.group for s in parts.val}
    assert len(train & val) > 50  # exams on both sides
    assert sorted([*parts.labeled, *parts.unlabeled, *parts.val], key=lambda s: s.id) == samples


@pytest.mark.parametrize("kind", ["paper", "standard", "image"])
def test_labels_by_exam_never_divide_one_and_nest(kind):
    spec = load_spec("acdc")
    samples = [*acdc_like(40), *(Sample(f"t{i}", "t", i, i, "test") for i in range(9))]
    before = set()
    for ratio in 0.1, 0.2, 0.5:
        parts = data_utils.split(samples, ratio, 0, spec, kind, "exam")
        exams = {s.group for s in parts.labeled + parts.unlabeled}
        labeled = {s.group for s in parts.labeled}
        assert len(labeled) == round(ratio * len(exams))
        assert not labeled & {s.group for s in parts.unlabeled}
        assert before < labeled
        before = labeled


def test_an_exams_slice_without_a_mask_is_never_labeled():
    samples = [dataclasses.replace(s, mask=None) if i % 7 == 0 else s for i, s in enumerate(acdc_like(40))]
    parts = data_utils.split(samples, 1.0, 0, load_spec("acdc"), "paper", "exam")
    assert all(s.mask is not None for s in parts.labeled)
    assert {s.mask for s in parts.unlabeled} == {None}


def test_labels_by_exam_leave_the_validation_set_as_it_is():
    one, other = (data_utils.split(acdc_like(40), 0.2, 0, load_spec("acdc"), "paper", u) for u in ("image", "exam"))
    assert one.val == other.val
    assert one.labeled != other.labeled
    assert "no labeled exam" in complaint(data_utils.split, acdc_like(8), 0.05, 0, load_spec("acdc"), "paper", "exam")


@pytest.mark.parametrize("ratio", [0.004, 0.0])
def test_ratio_that_leaves_nothing_labeled_is_an_error(ratio):
    assert f"--ratio {ratio:g}" in complaint(data_utils.split, made_up(118), ratio, 0, toy_spec())


def test_image_without_a_mask_is_never_labeled():
    samples = [dataclasses.replace(s, mask=None) if i % 2 else s for i, s in enumerate(made_up(200))]
    parts = data_utils.split(samples, 1.0, 0, toy_spec())
    assert all(s.mask is not None for s in parts.labeled)
    assert parts.unlabeled
    assert all(s.mask is None for s in parts.unlabeled)
    half = data_utils.split(samples, 0.5, 0, toy_spec())
    assert len(half.labeled) == round(0.5 * len(parts.labeled))  # the ratio counts images that have a mask


def test_hash_follows_the_ids_and_their_roles_alone():
    samples, spec = made_up(100), toy_spec()
    parts = data_utils.split(samples, 0.2, 0, spec)
    moved = [dataclasses.replace(s, image=Path("elsewhere"), mask=Path("too"), part=None) for s in samples]
    assert data_utils.split(moved, 0.2, 0, spec).hash() == parts.hash()
    renamed = [dataclasses.replace(s, id=s.id.replace("00099", "00100")) for s in samples]
    others = [(renamed, 0.2, 0), (samples, 0.3, 0), (samples, 0.2, 1), (samples[1:], 0.2, 0)]
    assert len({parts.hash(), *(data_utils.split(*other, spec).hash() for other in others)}) == 5


# Decoding


def picture_sample(folder: Path, image: np.ndarray, mask: np.ndarray) -> Sample:
    Image.fromarray(image).save(folder / "image.png")
    write_indexed(folder / "mask.png", mask)
    return Sample("a", "a", folder / "image.png", folder / "mask.png")


def test_palette_png_gives_its_indices_and_255_is_ignored(tmp_path):
    values = np.array([[0, 1, 2], [20, 255, 15]])
    sample = picture_sample(tmp_path, np.zeros((2, 3, 3), np.uint8), values)
    mask = decode(sample, load_spec("voc"), (2, 3))[1]
    assert mask.dtype == torch.uint8
    assert mask.tolist() == values.tolist()


def test_another_ignore_value_becomes_IGNORE(tmp_path):
    sample = picture_sample(tmp_path, np.zeros((2, 2, 3), np.uint8), np.array([[0, 11], [2, 1]]))
    assert decode(sample, toy_spec(ignore=11), (2, 2))[1].tolist() == [[0, IGNORE], [2, 1]]


def test_decoded_picture_is_the_file_at_native_size(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    sample = picture_sample(tmp_path, image, np.zeros((5, 7)))
    pixels = decode(sample, load_spec("voc"), (5, 7))[0]
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels, image.transpose(2, 0, 1))


@pytest.mark.parametrize(("image_type", "mask_type"), [(np.int16, np.float32), (np.float32, np.uint8)])
@pytest.mark.parametrize("affine", [ACDC_AFFINE, np.eye(4), np.diag([-1, -2, 3, 1])])
def test_decoded_slice_is_the_arrays_slice_with_y_as_rows_whatever_the_affine(tmp_path, image_type, mask_type, affine):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(-50, 4032, (7, 5, 4)), rng.integers(0, 4, (7, 5, 4))
    write_volume(tmp_path / "i.nii.gz", image.astype(image_type), affine)
    write_volume(tmp_path / "m.nii.gz", mask.astype(mask_type), affine)
    for z in range(4):
        sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", z), Slice(tmp_path / "m.nii.gz", z))
        pixels, labels = decode(sample, load_spec("acdc"), (5, 7))
        assert (pixels.dtype, labels.dtype, pixels.shape) == (torch.float32, torch.uint8, (1, 5, 7))
        assert pixels[0].tolist() == [[image[x, y, z] for x in range(7)] for y in range(5)]
        assert labels.tolist() == [[mask[x, y, z] for x in range(7)] for y in range(5)]


def test_nifti_slope_and_intercept_are_applied(tmp_path):
    volume = nibabel.Nifti1Image(np.arange(12, dtype=np.int16).reshape(3, 4, 1), np.eye(4))
    volume.header.set_slope_inter(0.5, -3)
    nibabel.save(volume, tmp_path / "i.nii.gz")
    pixels, labels = decode(Sample("a", "a", Slice(tmp_path / "i.nii.gz", 0), None), load_spec("acdc"), (4, 3))
    assert np.array_equal(pixels[0], nibabel.load(tmp_path / "i.nii.gz").get_fdata()[:, :, 0].T)
    assert pixels[0, 1].tolist() == [-2.5, -0.5, 1.5]
    assert set(labels.flatten().tolist()) == {IGNORE}  # no mask: no pixel counts


@pytest.mark.parametrize("size", [(10, 14), (40, 50), (30, 6)])  # even, from odd: no pixel centre falls on an edge
def test_images_are_resized_bilinearly_and_masks_to_the_nearest(tmp_path, size):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (25, 31, 3), np.uint8), rng.integers(0, 5, (25, 31), np.uint8) * 4
    mask[:3] = 255
    pixels, labels = decode(picture_sample(tmp_path, image, mask), load_spec("voc"), size)
    assert (pixels.shape, labels.shape) == ((3, *size), size)  # H, W
    shape = size[::-1]
    expected = np.array(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(pixels.numpy().astype(int) - expected).max() <= 1
    assert np.array_equal(labels, Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST))
    assert set(labels.unique().tolist()) <= {0, 4, 8, 12, 16, 255}


def test_slices_are_resized_in_floating_point(tmp_path):
    volume = np.random.default_rng(0).normal(0, 1000, (24, 30, 1)).astype(np.float32)
    write_volume(tmp_path / "i.nii.gz", volume)
    pixels, _ = decode(Sample("a", "a", Slice(tmp_path / "i.nii.gz", 0), None), load_spec("acdc"), (13, 11))
    expected = Image.fromarray(np.ascontiguousarray(volume[:, :, 0].T)).resize((11, 13), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(pixels[0], expected, atol=1e-2)


def test_grey_voc_jpeg_becomes_three_equal_channels(voc):
    sample, grey = index(load_spec("voc"), voc)[0], np.arange(20 * 28, dtype=np.uint8).reshape(20, 28)
    Image.fromarray(grey).save(sample.image)
    pixels = decode(sample, load_spec("voc"), (20, 28))[0]
    assert pixels.shape == (3, 20, 28)
    assert all(np.array_equal(channel, Image.open(sample.image)) for channel in pixels)


def test_colour_picture_becomes_one_channel_where_the_spec_says_so(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    pixels = decode(picture_sample(tmp_path, image, np.zeros((4, 5))), toy_spec(channels=1), (4, 5))[0]
    assert np.array_equal(pixels, np.array(Image.fromarray(image).convert("L"))[None])


# The cache


def voc_cache(root: Path, folder: Path, size=(8, 8), workers: int = 0, **changes):
    """The cache of a made VOC, and its samples."""
    spec = dataclasses.replace(load_spec("voc"), **changes)
    samples = index(spec, root)
    return open_cache(spec, samples, size, folder, workers), samples


def test_cache_holds_what_decode_returns(voc, tmp_path):
    cache, samples = voc_cache(voc, tmp_path / "cache", (8, 12))
    assert (cache.images.shape, cache.images.dtype) == ((4, 3, 8, 12), np.uint8)
    assert (cache.masks.shape, cache.masks.dtype) == ((4, 8, 12), np.uint8)
    for sample in samples:
        image, mask = decode(sample, load_spec("voc"), (8, 12))
        assert np.array_equal(cache.images[cache.rows[sample.id]], image)
        assert np.array_equal(cache.masks[cache.rows[sample.id]], mask)


def test_nifti_cache_is_float32(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)
    cache = open_cache(spec, samples, (14, 18), tmp_path / "cache")
    assert cache.images.dtype == np.float32
    volume = nibabel.load(samples[4].image.path).get_fdata()
    assert np.array_equal(cache.images[cache.rows["patient001_frame12_s01"], 0], volume[:, :, 1].T)


def test_second_call_reads_no_image_and_maps_the_same_files(voc, tmp_path, monkeypatch):
    first, _ = voc_cache(voc, tmp_path / "cache")

    def state():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}

    before = state()
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was read"))
    second, _ = voc_cache(voc, tmp_path / "cache")
    assert state() == before
    for kind in "images", "masks":
        assert isinstance(getattr(second, kind), np.memmap)
        assert np.array_equal(getattr(first, kind), getattr(second, kind))


def repaint(path: Path) -> None:
    Image.fromarray(np.ascontiguousarray(np.array(Image.open(path))[::-1])).save(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))


def grow(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")  # decoders stop at the picture's end
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [repaint, touch, grow])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_changed_file_gives_a_new_cache(voc, tmp_path, change, kind):
    _, samples = voc_cache(voc, tmp_path / "cache", (20, 28))
    change(getattr(samples[2], kind))
    cache, _ = voc_cache(voc, tmp_path / "cache", (20, 28))
    assert len([*(tmp_path / "cache").iterdir()]) == 2
    image, mask = decode(samples[2], load_spec("voc"), (20, 28))
    assert np.array_equal(cache.images[2], image)
    assert np.array_equal(cache.masks[2], mask)


def test_changed_volume_gives_a_new_cache(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)[:3]  # one volume and its mask
    open_cache(spec, samples, (14, 18), tmp_path / "cache")
    write_volume(samples[0].image.path, np.full((18, 14, 3), 7, np.int16))
    assert set(open_cache(spec, samples, (14, 18), tmp_path / "cache").images[:3].flatten().tolist()) == {7}


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (8, 9)},
        {"channels": 1},
        {"ignore": 0, "label_ids": (255, *range(1, 21))},
        {"label_ids": (1, 0, *range(2, 21))},
        {"void": 20, "void_ids": (0,)},
        {"name": "other"},
    ],
)
def test_another_size_or_meaning_gives_a_new_cache(voc, tmp_path, changes):
    voc_cache(voc, tmp_path / "cache")
    voc_cache(voc, tmp_path / "cache", **changes)
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_palette_and_scored_classes_share_a_cache(voc, tmp_path):
    voc_cache(voc, tmp_path / "cache")
    voc_cache(voc, tmp_path / "cache", palette=((1, 2, 3),) * 21, scored=(4,), counts=(1, 1))
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_fewer_samples_give_their_own_cache(voc, tmp_path):
    _, samples = voc_cache(voc, tmp_path / "cache")
    cache = open_cache(load_spec("voc"), samples[1:], (8, 8), tmp_path / "cache")
    assert len(cache.images) == 3
    assert np.array_equal(cache.masks[cache.rows[samples[3].id]], decode(samples[3], load_spec("voc"), (8, 8))[1])


def test_two_workers_fill_the_same_cache(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)
    alone, shared = (open_cache(spec, samples, (9, 7), tmp_path / str(n), workers=n) for n in (0, 2))
    assert np.array_equal(alone.images, shared.images)
    assert np.array_equal(alone.masks, shared.masks)
    assert alone.rows == shared.rows


def test_nothing_is_left_behind_after_a_failure(voc, tmp_path, monkeypatch):
    mask = index(load_spec("voc"), voc)[3].mask
    good = mask.read_bytes()
    mask.write_bytes(b"junk")
    complaint(voc_cache, voc, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            voc_cache(voc, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []
    mask.write_bytes(good)
    assert len(voc_cache(voc, tmp_path / "cache")[0].images) == 4


def test_leftovers_of_killed_processes_are_swept(voc, tmp_path):
    cache, host = tmp_path / "cache", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive, elsewhere = f".voc_8x8_0.{host}.{os.getppid()}", f".voc_8x8_0.another-{host}.{dead.pid}"
    for name in f".voc_8x8_0.{host}.{dead.pid}", alive, elsewhere, f".notes.{host}.txt":
        (cache / name).mkdir(parents=True)
        (cache / name / "images.npy").write_text("half")
    voc_cache(voc, cache)
    hidden = {path.name for path in cache.iterdir() if path.name.startswith(".")}
    assert hidden == {alive, elsewhere, f".notes.{host}.txt"}


def png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path, "PNG")


def png16(path: Path) -> None:
    """A 28x20 RGB PNG of 16 bits a channel, which Pillow reads, as 8, but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 20, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + bytes(28 * 6)) * 20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))


def replace_by(make):
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


@pytest.mark.parametrize(
    ("kind", "breakage", "said"),
    [
        ("image", Path.unlink, "No such file"),
        ("mask", Path.unlink, "No such file"),
        ("image", lambda p: p.write_bytes(b""), ""),
        ("image", lambda p: p.write_bytes(p.read_bytes()[:-200]), ""),
        ("mask", lambda p: p.write_bytes(p.read_bytes()[:-200]), ""),
        ("image", lambda p: png(p, np.zeros((20, 28), np.uint16)), "mode I"),
        ("image", lambda p: png(p, np.zeros((20, 27), np.uint8)), "27x20"),
        ("mask", lambda p: png(p, np.zeros((28, 20), np.uint8)), "20x28"),
        ("mask", lambda p: png(p, np.zeros((20, 28, 3), np.uint8)), "RGB"),
        ("mask", lambda p: png(p, np.zeros((20, 28, 4), np.uint8)), "RGBA"),
        ("mask", lambda p: png(p, np.zeros((20, 28, 2), np.uint8)), "LA"),
        ("mask", lambda p: png(p, np.zeros((20, 28), bool)), "mode 1"),
        ("mask", png16, "mode RGB"),
        ("image", png16, "of 16 bits"),
        ("image", lambda p: Image.new("CMYK", (28, 20)).save(p), "mode CMYK"),
        ("image", replace_by(lambda p: p.symlink_to("gone")), "No such file"),
        ("mask", replace_by(lambda p: p.symlink_to(p)), ""),
        ("image", replace_by(Path.mkdir), "Is a directory"),
        ("mask", replace_by(Path.mkdir), "Is a directory"),
        ("image", lambda p: p.rename(p.with_suffix(".JPG")), "No such file"),
        pytest.param("mask", lambda p: p.chmod(0), "Permission denied", marks=needs_permissions),
        ("mask", lambda p: png(p, np.zeros((20, 28), np.uint16)), "mode I"),
        ("mask", lambda p: png(p, np.full((20, 28), 21, np.uint8)), "label 21 "),
        ("mask", lambda p: png(p, np.full((20, 28), 254, np.uint8)), "label 254 "),
    ],
)
def test_bad_voc_file_is_named(voc, tmp_path, kind, breakage, said):
    samples = index(load_spec("voc"), voc)
    breakage(getattr(samples[2], kind))
    message = complaint(voc_cache, voc, tmp_path / "cache")
    file = samples[2].mask if "27x20" in said else getattr(samples[2], kind)  # sizes differ: the mask is named
    assert message.startswith("1 bad file: ")
    assert str(file) in message
    assert said in message
    assert not any(samples[i].id in message for i in (0, 1, 3))


@pytest.mark.parametrize("label", [34, 254])
def test_label_that_cityscapes_does_not_know_is_named(cityscapes, label):
    sample = index(load_spec("cityscapes"), cityscapes)[0]
    png(sample.mask, np.full((16, 34), label, np.uint8))
    message = complaint(decode, sample, load_spec("cityscapes"), (4, 4))
    assert str(sample.mask) in message
    assert f"label {label} " in message


def with_value(value: float, dtype: type, depth: int = 3):
    def write(path: Path) -> None:
        volume = np.zeros((18, 14, depth), dtype)
        volume[5, 6, 1] = value
        write_volume(path, volume)

    return write


@pytest.mark.parametrize(
    ("suffix", "breakage", "said"),
    [
        ("", Path.unlink, ""),
        ("", lambda p: p.write_bytes(b"junk"), ""),
        ("", lambda p: p.write_bytes(p.read_bytes()[:-300]), ""),
        ("", lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(8)), "CRC"),
        ("_gt", lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(8)), "CRC"),
        ("", lambda p: p.write_bytes(b""), ""),
        ("", with_value(np.nan, np.float32), "slice 1"),
        ("", with_value(np.inf, np.float32), "slice 1"),
        ("", lambda p: write_volume(p, np.zeros((18, 14, 3, 2), np.int16)), "(18, 14, 3, 2)"),
        ("_gt", Path.unlink, ""),
        ("_gt", lambda p: write_volume(p, np.zeros((18, 14, 2), np.uint8)), "2 slices"),
        ("_gt", lambda p: write_volume(p, np.zeros((14, 18, 3), np.uint8)), "14x18"),
        ("_gt", with_value(4, np.uint8), "label 4 "),
        ("_gt", with_value(-1, np.int16), "label -1 "),
        ("_gt", with_value(259, np.int16), "label 259 "),  # 3 + 256
        ("_gt", with_value(1.5, np.float32), "label 1.5 "),
        ("_gt", with_value(np.nan, np.float32), "slice 1"),
    ],
)
def test_bad_nifti_file_is_named(acdc, tmp_path, suffix, breakage, said):
    spec, bad = load_spec("acdc"), acdc / "training/patient002" / f"patient002_frame12{suffix}.nii.gz"
    breakage(bad)
    message = complaint(lambda: open_cache(spec, index(spec, acdc), (8, 8), tmp_path / "cache"))
    assert str(bad) in message
    assert said in message
    assert "patient001" not in message
    assert "frame01" not in message


def test_ten_bad_files_are_named_and_the_rest_counted(tmp_path):
    samples = index(load_spec("voc"), make_voc(tmp_path, 14))
    for sample in samples[1:13]:
        sample.mask.write_bytes(b"junk")
    message = complaint(voc_cache, tmp_path, tmp_path / "cache")
    assert [s.mask.name in message for s in samples] == [False] + [True] * 10 + [False] * 3
    assert message.startswith("12 bad files: ")
    assert message.endswith("and 2 more")


def test_bad_volume_is_named_once_whatever_its_slices(tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, make_acdc(tmp_path, 1, 4))
    (tmp_path / "training/patient001/patient001_frame01_gt.nii.gz").write_bytes(b"junk")
    message = complaint(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert message.startswith("1 bad file: ")
    assert "; " not in message


# Epochs and batches


def stored(first: int, n: int) -> Stored:
    """Samples first, first + 1, ...: image and mask hold the sample's number."""
    numbers = np.arange(30, dtype=np.uint8)
    cache = SimpleNamespace(images=numbers.reshape(30, 1, 1, 1), masks=numbers.reshape(30, 1, 1))
    return Stored(cache, list(range(first, first + n)))


def numbers(epoch: Epoch, column: int) -> list[int]:
    return [int(epoch[i][column]) for i in range(len(epoch))]


@pytest.mark.parametrize(("n", "n_u", "longer", "shorter"), [(4, 10, 2, 0), (10, 4, 0, 2), (1, 10, 2, 0), (5, 5, 0, 2)])
def test_epoch_passes_once_over_the_longer_list_and_cycles_the_shorter(n, n_u, longer, shorter):
    epoch = Epoch(stored(0, n), stored(10, n_u), 0, 0)
    first = {0: 0, 2: 10}
    assert sorted(numbers(epoch, longer)) == list(range(first[longer], first[longer] + max(n, n_u)))
    cycled, whole = numbers(epoch, shorter), list(range(first[shorter], first[shorter] + min(n, n_u)))
    for start in range(0, len(cycled), len(whole)):
        one_pass = cycled[start : start + len(whole)]
        assert len({*one_pass}) == len(one_pass)
        assert {*one_pass} <= {*whole}
    assert len(cycled) == max(n, n_u)


def test_last_batch_is_filled_up_by_a_next_pass():
    epoch = Epoch(stored(0, 3), stored(10, 7), 0, 0, batch_size=5)
    assert len(epoch) == 10
    drawn = numbers(epoch, 2)
    assert sorted(drawn[:7]) == list(range(10, 17))
    assert len({*drawn[7:]}) == 3


def test_each_pass_over_the_shorter_list_has_its_own_order():
    cycled = numbers(Epoch(stored(0, 5), stored(10, 20), 0, 0), 0)
    assert len({tuple(cycled[i : i + 5]) for i in range(0, 20, 5)}) > 1


def test_epoch_without_unlabeled_images_yields_pairs():
    epoch = Epoch(stored(0, 6), stored(10, 0), 0, 0)
    assert {len(epoch[i]) for i in range(len(epoch))} == {2}
    assert sorted(numbers(epoch, 0)) == list(range(6))
    assert numbers(epoch, 0) != list(range(6))


def test_image_and_mask_stay_together():
    epoch = Epoch(stored(0, 4), stored(10, 10), 0, 0)
    assert numbers(epoch, 0) == numbers(epoch, 1)


def test_order_follows_from_seed_and_epoch_alone():
    def order(seed, epoch):
        drawn = Epoch(stored(0, 4), stored(10, 10), seed, epoch)
        return numbers(drawn, 0), numbers(drawn, 2)

    torch.manual_seed(0)
    np.random.seed(0)
    before = order(1, 2)
    torch.manual_seed(9)
    np.random.seed(9)
    assert order(1, 2) == before
    for other in order(1, 3), order(2, 2), order(2, 1):
        assert other[0] != before[0]
        assert other[1] != before[1]


def test_normalize_by_hand_for_each_image_and_channel():
    x = torch.tensor([[[[0, 1], [2, 5]], [[10, 10], [10, 50]]], [[[100, 0], [0, 0]], [[7, 7], [7, 7]]]])
    expected = [
        [[[-0.4, -0.2], [0, 0.6]], [[-0.25, -0.25], [-0.25, 0.75]]],
        [[[0.75, -0.25], [-0.25, -0.25]], [[0, 0]] * 2],
    ]
    assert normalize(x.to(torch.uint8)).dtype == torch.float32
    torch.testing.assert_close(normalize(x.to(torch.uint8)), torch.tensor(expected))


def test_constant_channel_becomes_zero():
    values = 4031 * torch.rand(1, 99, 1, 1, generator=torch.Generator().manual_seed(0))  # few have an exact mean
    assert normalize(values.expand(1, 99, 33, 31)).abs().max() == 0


def test_released_normalization_of_bytes_is_fixed_and_of_floats_between_their_extremes():
    x = torch.tensor([[[[0, 51], [102, 255]]], [[[51, 51], [51, 51]]]])
    expected = torch.tensor([[[[-1, -0.6], [-0.2, 1]]], [[[-0.6, -0.6], [-0.6, -0.6]]]])
    torch.testing.assert_close(normalize(x.to(torch.uint8), "half"), expected)
    floats = torch.tensor([[[[100.0, 200], [400, 500]]], [[[3, 3], [3, 3]]]])
    expected = torch.tensor([[[[-1, -0.5], [0.5, 1]]], [[[-1, -1], [-1, -1]]]])
    torch.testing.assert_close(normalize(floats, "half"), expected)


def test_batches_are_normalized_as_they_are_told(phantoms):
    images = torch.tensor(phantoms.images[:2])
    for how in "range", "half":
        x, _ = next(iter(batches(Stored(phantoms, [0, 1]), 2, CPU, normalization=how)))
        assert torch.equal(x, normalize(images, how))


def test_normalized_images_lie_within_one_and_have_range_one():
    x = normalize(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 1000)
    assert x.abs().max() <= 1
    torch.testing.assert_close(x.amax((2, 3)) - x.amin((2, 3)), torch.ones(4, 3))
    torch.testing.assert_close(x.mean((2, 3)), torch.zeros(4, 3), atol=1e-6, rtol=0)


@pytest.fixture
def phantoms(tmp_path):
    """The first 11 phantoms at 16x16."""
    spec = load_spec("phantom")
    return open_cache(spec, index(spec, tmp_path)[:11], (16, 16), tmp_path / "cache")


def test_batches_are_normalized_in_order_and_end_with_a_smaller_one(phantoms):
    rows = [3, 1, 4, 0, 5, 9, 2]
    drawn = list(batches(Stored(phantoms, rows), 3, CPU))
    assert [len(x) for x, _ in drawn] == [3, 3, 1]
    x, y = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x, normalize(torch.from_numpy(phantoms.images[rows])))
    assert np.array_equal(y, phantoms.masks[rows])


def test_batches_of_an_epoch_hold_x_y_and_x_u(phantoms):
    epoch = Epoch(Stored(phantoms, [0, 1]), Stored(phantoms, [2, 3, 4, 5, 6]), 0, 0)
    drawn = list(batches(epoch, 2, CPU))
    assert [len(batch) for batch in drawn] == [3, 3, 3]
    x_u = torch.cat([batch[2] for batch in drawn])
    images = normalize(torch.tensor(phantoms.images[2:7]))
    assert sorted(int((images == one).flatten(1).all(1).nonzero()) for one in x_u) == [0, 1, 2, 3, 4]


def test_reading_batches_leaves_torchs_generator_alone(phantoms):
    before = torch.get_rng_state()
    list(batches(Epoch(Stored(phantoms, [0, 1]), Stored(phantoms, [2]), 0, 0), 2, CPU))
    assert torch.equal(torch.get_rng_state(), before)


# Phantoms


def test_phantom_is_the_same_picture_each_time():
    for number in 0, 7:
        (image, mask), (again, mask_again) = draw_phantom(number), draw_phantom(number)
        assert np.array_equal(image, again)
        assert np.array_equal(mask, mask_again)
    assert not np.array_equal(draw_phantom(0)[0], draw_phantom(7)[0])


def test_phantoms_are_bytes_and_twenty_show_every_class():
    seen = set()
    for number in range(20):
        image, mask = draw_phantom(number)
        assert (image.dtype, mask.dtype, image.shape, mask.shape) == (np.uint8, np.uint8, (96, 96), (96, 96))
        assert np.ptp(image) > 50
        seen |= {*np.unique(mask).tolist()}
    assert seen == {0, 1, 2, 3}


def test_phantom_cache_holds_the_drawn_picture(tmp_path):
    spec = load_spec("phantom")
    samples = index(spec, tmp_path)[5:7]
    cache = open_cache(spec, samples, (96, 96), tmp_path / "cache")
    image, mask = draw_phantom(samples[1].image)
    assert np.array_equal(cache.images[1, 0], image)
    assert np.array_equal(cache.masks[1], mask)


# The real sets, where SEG_REAL_DATA names their folder


@needs_real_data
def test_real_acdc_has_100_exams_and_1902_slices():
    spec = load_spec("acdc")
    samples = index(spec, REAL / "acdc")
    assert (len(samples), len({s.group for s in samples})) == (1902, 100)
    parts = data_utils.split(samples, 0.1, 0, spec)
    train, val = {s.group for s in parts.labeled + parts.unlabeled}, {s.group for s in parts.val}
    assert (len(train), len(val), train & val) == (75, 25, set())
    seen = set()
    for sample in samples[4:1902:380]:
        volume, truth = (nibabel.load(part.path).get_fdata() for part in (sample.image, sample.mask))
        image, mask = decode(sample, spec, volume.shape[1::-1])
        assert np.array_equal(image[0], volume[:, :, sample.image.z].T.astype(np.float32))
        assert np.array_equal(mask, truth[:, :, sample.mask.z].T)
        seen |= {*mask.unique().tolist()}
    assert seen == {0, 1, 2, 3}


@needs_real_data
def test_real_voc_decodes():
    spec = load_spec("voc")
    samples = index(spec, REAL / "voc")
    assert len(samples) == 160
    seen = set()
    for sample in samples:
        image, mask = decode(sample, spec, (64, 64))
        assert (image.shape, mask.shape) == ((3, 64, 64), (64, 64))
        seen |= {*mask.unique().tolist()}
    assert seen == {*range(21), IGNORE}


@needs_real_data
def test_real_cityscapes_decodes():
    spec = load_spec("cityscapes")
    samples = index(spec, REAL / "cityscapes")
    assert len(samples) == 5
    for sample in samples:
        mask = decode(sample, spec, (128, 256))[1]
        assert mask.max() <= 19
        assert len(mask.unique()) > 5


def test_a_mask_of_more_slices_than_its_image_is_named(acdc):
    sample = index(load_spec("acdc"), acdc)[0]
    write_volume(sample.mask.path, np.zeros((18, 14, 5), np.uint8))
    with pytest.raises(InputError, match=f"{sample.mask.path.name}: has another number of slices"):
        decode(sample, load_spec("acdc"), (18, 14))


def test_a_volume_without_slices_is_named(acdc):
    image = index(load_spec("acdc"), acdc)[0].image.path
    write_volume(image, np.zeros((18, 14, 0), np.int16))
    samples = index(load_spec("acdc"), acdc)
    assert samples[0].image == Slice(image, 0)
    with pytest.raises(InputError, match="frame01.nii.gz: shape"):
        decode(samples[0], load_spec("acdc"), (18, 14))


def test_values_beyond_float32_are_named(acdc):
    sample = index(load_spec("acdc"), acdc)[0]
    write_volume(sample.image.path, np.full((18, 14, 3), 1e300))
    with pytest.raises(InputError, match="no finite float32"):
        decode(sample, load_spec("acdc"), (18, 14))


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_damaged_cache_is_filled_again(voc, tmp_path, damage):
    images = voc_cache(voc, tmp_path / "cache")[0].images.copy()
    (file,) = (tmp_path / "cache").glob("*/images.npy")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 300 if damage == "cut" else 0])
    assert (voc_cache(voc, tmp_path / "cache")[0].images == images).all()


def test_images_without_a_mask_are_never_validated_on():
    samples = [Sample(f"{i:03d}", f"{i:03d}", i, i if i % 2 else None) for i in range(100)]
    parts = data_utils.split(samples, 1.0, 0, load_spec("phantom"))
    assert len(parts.val) == 10
    assert all(sample.mask is not None for sample in parts.val)


@pytest.mark.parametrize(
    "changes",
    [
        {"scored": [1, 1]},
        {"void": 2, "scored": [1, 2]},
        {"label_ids": [1]},
        {"label_ids": [7, 7, 8]},
        {"ignore": 0},
        {"channels": True},
        {"pool": ["trian"]},
        {"name": "a/b"},
        {"layout": {"a": 1}},
    ],
)
def test_a_description_that_contradicts_itself_is_an_error(changes):
    table = {"name": "mine", "layout": "voc", "classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3, "scored": [1, 2]}
    data_utils.make_spec(table, "mine.toml")
    with pytest.raises(InputError, match=r"mine\.toml"):
        data_utils.make_spec(table | changes, "mine.toml")
