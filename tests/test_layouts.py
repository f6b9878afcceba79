"""From a root folder to samples: the layouts of VOC, Cityscapes, ACDC and of plain folders."""

import json
import shutil
import struct
import unicodedata
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import add_acdc_testing, error_of, folder_spec, make_folder, read_errors, write_volume
from PIL import Image

from datasets.layouts import index
from datasets.spec import DatasetSpec, Slice, load_spec
from datasets.splits import read_split

HOME = "VOCdevkit/VOC2012"
TRAIN_AUG = f"{HOME}/ImageSets/Segmentation/train_aug.txt"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures with masks, two without, and one in val/."""
    return make_folder(tmp_path / "folder", 4, n_unlabeled=2, n_val=1)


def spec_of(name: str) -> DatasetSpec:
    return folder_spec() if name == "folder" else load_spec(name)


def test_voc_root_may_be_voc2012_or_a_folder_above(voc):
    for root in voc, voc / "VOCdevkit", voc / HOME:
        samples = index(load_spec("voc"), root)
        assert [s.id for s in samples] == [f"2007_{i:06d}" for i in range(4)]
        assert all(s.image.is_file() and s.mask.is_file() for s in samples)


def test_cityscapes_endings_may_be_capital_and_other_files_are_left_out(cityscapes):
    spec, city = load_spec("cityscapes"), cityscapes / "leftImg8bit/train/aachen"
    image = city / "aachen_000000_000019_leftImg8bit.png"
    image.rename(image.with_suffix(".PNG"))
    (city / "notes.txt").write_text("not an image")
    (city / "._aachen_000000_000019_leftImg8bit.png").write_text("of macOS")
    samples = index(spec, cityscapes)
    cities = "aachen_{:06d}_000019", "frankfurt_{:06d}_000019"
    expected = [cities[0].format(i) for i in range(4)] + [cities[1].format(i) for i in range(2)]
    assert [s.id for s in samples] == [s.group for s in samples] == expected
    assert not read_errors(samples, spec)
    mask = samples[0].mask
    mask.rename(mask.with_suffix(".PNG"))
    assert read_errors(index(spec, cityscapes), spec) == [f"{mask}: No such file or directory"]


def test_acdc_takes_every_slice_of_the_two_frames_that_info_names(acdc):
    exam = acdc / "training" / "patient001"
    write_volume(exam / "patient001_frame05.nii.gz", np.zeros((18, 14, 3), np.int16))
    write_volume(exam / "patient001_4d.nii.gz", np.zeros((18, 14, 3, 2), np.int16))
    samples = index(load_spec("acdc"), acdc)
    frames = [f"patient00{p}_frame{f:02d}" for p in (1, 2) for f in (1, 12)]
    assert [s.id for s in samples] == [f"{frame}_s0{z}" for frame in frames for z in range(3)]
    assert [s.group for s in samples] == ["patient001"] * 6 + ["patient002"] * 6
    assert samples[4].image == Slice(exam / "patient001_frame12.nii.gz", 1)
    assert samples[4].mask == Slice(exam / "patient001_frame12_gt.nii.gz", 1)


def test_each_kind_of_split_takes_its_parts_and_a_split_file_all(voc, cityscapes, acdc, folder):
    add_acdc_testing(acdc, 2)
    for name, root, pool, everything in [
        ("voc", voc, {"train": 4}, {"train": 4, "val": 1}),
        ("cityscapes", cityscapes, {"train": 4, "val": 2}, {"train": 4, "val": 2}),
        ("acdc", acdc, {"train": 12}, {"train": 12, "test": 8}),
        ("folder", folder, {"train": 6, "val": 1}, {"train": 6, "val": 1}),
    ]:
        kinds = {"paper": pool, "image": pool, "standard": everything}
        for kind, expected in kinds.items():
            assert Counter(s.part for s in index(spec_of(name), root, kind)) == expected
        assert len(index(spec_of(name), root, "file")) == sum(everything.values())
    assert "phantom" in error_of(index, load_spec("phantom"), Path("none"), "standard")
    assert "contains no test image in the layout" in error_of(index, folder_spec(), folder, "test")


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
    for image in "case0.nii", "case1.nii.gz":
        write_volume(tmp_path / "images" / image, np.zeros((6, 5, 3), np.int16))
        write_volume(tmp_path / "masks" / f"{image[:5]}.nii.gz", np.zeros((6, 5, 3), np.uint8))
    samples = index(folder_spec(channels=1), tmp_path)
    assert [s.id for s in samples] == [f"case{i}_s{z:02d}" for i in range(2) for z in range(3)]
    assert [s.group for s in samples] == ["case0"] * 3 + ["case1"] * 3
    assert samples[1].image == Slice(tmp_path / "images/case0.nii", 1)
    assert samples[1].mask == Slice(tmp_path / "masks/case0.nii.gz", 1)


@pytest.mark.parametrize("name", ["left ventricle 1", "Übung", "心臓", "a.b", "-x"])
def test_an_id_may_hold_spaces_and_any_letters(voc, name):
    for place, ending in ("JPEGImages", ".jpg"), ("SegmentationClassAug", ".png"):
        (voc / HOME / place / f"2007_000000{ending}").rename(voc / HOME / place / f"{name}{ending}")
    (voc / TRAIN_AUG).write_text(f"{name}\n", encoding="utf-8")
    samples = index(load_spec("voc"), voc)
    assert [s.id for s in samples] == [name]
    assert not read_errors(samples, load_spec("voc"))


def test_a_split_file_may_name_any_image_of_voc_and_needs_no_lists(voc):
    shutil.rmtree(voc / HOME / "ImageSets")
    (voc / HOME / "SegmentationClass").mkdir()
    masks = sorted((voc / HOME / "SegmentationClassAug").iterdir())
    for mask in masks[1:3]:
        mask.rename(voc / HOME / "SegmentationClass" / mask.name)
    shutil.copy(masks[0], voc / HOME / "SegmentationClass")  # SegmentationClassAug comes first
    masks[3].unlink()
    (voc / HOME / "JPEGImages/._2007_000000.jpg").write_text("of macOS")
    found = {s.id: s.mask and s.mask.parent.name for s in index(load_spec("voc"), voc, "file")}
    folders = ["SegmentationClassAug", *["SegmentationClass"] * 2, None, "SegmentationClassAug"]
    assert found == {f"2007_{i:06d}": folder for i, folder in enumerate(folders)}


# Errors


def listed(text: str):
    """A change of VOC's list of training images."""
    return lambda root: (root / TRAIN_AUG).write_text(text)


def empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def rename(old: str, new: str):
    return lambda root: (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("name", "breakage", "named"),
    [
        ("acdc", shutil.rmtree, "acdc: no such folder; docs/data.md describes the layout"),
        ("cityscapes", empty, "--data-root|cityscapes: contains no image in the layout 'cityscape"),
        ("voc", empty, "voc: contains no VOC2012 (a folder with ImageSets/Segmentation); point"),
        ("folder", empty, "no image in the layout 'folder'; docs/own_data.md describes the layout"),
        ("folder", lambda root: (root / "images/picture 1.png").unlink(),
         "picture 1.png: has no image"),
        ("folder", lambda root: (root / "images/picture 1.bmp").write_text(""),
         "picture 1.png: picture 1.bmp has the same stem"),
        ("folder", lambda root: (root / "images/notes.txt").write_text(""),
         "notes.txt: neither an image nor"),
        ("folder", lambda root: (root / "masks/more.png").mkdir(),
         "more.png: a folder; files must be"),
        ("folder", lambda root: (root / "val/masks/picture 6.png").unlink(),
         "picture 6.png: has no mask"),
        ("folder", rename("masks/picture 1.png", "masks/picture 1.nii"),
         "picture 1.nii: image and mask must be two volumes or two image files"),
        ("folder", rename("val", "Validation"), "Validation: such a folder must be named 'val'"),
        ("folder", rename("val/masks", "val/mask"), "mask: such a folder must be named 'masks'"),
        ("folder", rename("unlabeled", "unlabelled"), "unlabelled: such a folder must be named"),
        ("folder", lambda root: make_folder(root / "test", 1),
         "test/images/picture 0.png: an image of this name is also among the train images"),
        ("folder", rename("unlabeled/picture 5.png", "unlabeled/picture 0.png"),
         "duplicate ids: |images/picture 0.png)|unlabeled/picture 0.png)"),
        ("voc", lambda root: (root / TRAIN_AUG).unlink(), "train_aug.txt: no such file"),
        ("voc", listed(""), "train_aug.txt: lists no image"),
        ("voc", listed("2007_000001\n2007_000002\n2007_000001\n"), "duplicate ids: 2007_000001 ("),
        *(("voc", listed(f"2007_000000\n{name}\n"), f"train_aug.txt: |: {name!r}")
          for name in ("a/b", "..", "2007_000001\x1b")),
        ("acdc", lambda root: (root / "training/patient003").write_text("no folder"), "patient003"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_layout_is_named(request, name, breakage, named):
    root = request.getfixturevalue(name)
    breakage(root)
    message = error_of(index, spec_of(name), root)
    assert all(part in message for part in named.split("|"))
    assert "2007_000002" not in message


def test_every_missing_or_senseless_info_is_named(acdc):
    add_acdc_testing(acdc, 1)
    infos = [acdc / "training" / f"patient00{i}" / "Info.cfg" for i in (1, 2)]
    infos[0].unlink()
    infos[1].write_text("ED: 1\nES: end\n")
    message = error_of(index, load_spec("acdc"), acdc)
    assert f"{infos[0]}: No such file or directory; {infos[1]}: expected lines 'ED: " in message
    assert "patient003" not in message


def test_a_missing_frame_is_named_when_it_is_read(acdc):
    (acdc / "training/patient002/Info.cfg").write_text("ED: 1\nES: 31\n")
    (message,) = read_errors(index(load_spec("acdc"), acdc), load_spec("acdc"))
    assert "patient002_frame31.nii.gz" in message


def test_other_folders_beside_the_images_are_left_alone(folder):
    before = index(folder_spec(), folder)
    for name in "validation", "testing", "notes", "val/Test":
        (folder / name).mkdir()
    assert index(folder_spec(), folder) == before


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("unlabeled", "unlabeled: not a folder, or a link to one that is missing"),
        ("val", "val: not a folder, or a link"),
        ("val/images", "val/images: not a folder, or a link"),
        ("test/masks", "test/masks: not a folder, or a link"),
    ],
)
@pytest.mark.parametrize("is_link", [True, False])
def test_a_folder_that_is_missing_behind_a_link_or_is_a_file_is_named(
    tmp_path, place, named, is_link
):
    path = make_folder(tmp_path, 2) / place
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("not mounted") if is_link else path.touch()
    assert named in error_of(index, folder_spec(), tmp_path)


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_validation_images_that_are_not_in_images_are_named(tmp_path, name):
    (make_folder(tmp_path, 2) / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    named = "must be named 'val'" if name == "validation" else "contains no images/; see docs/"
    assert f"{tmp_path / name}: " in (error := error_of(index, folder_spec(), tmp_path))
    assert named in error


def test_a_name_too_long_for_its_mask_is_an_error(tmp_path):
    path = tmp_path / "images" / f"{'v' * 248}.nii"
    write_volume(path, np.zeros((4, 4, 2), np.int16))
    assert "names too long for a mask file: vvv" in error_of(index, folder_spec(), tmp_path)


def test_a_header_that_claims_more_slices_than_any_volume_has_is_left_to_decoding(tmp_path):
    make_folder(tmp_path, 1)
    path = tmp_path / "images" / "a.nii"
    nibabel.save(nibabel.Nifti2Image(np.zeros((4, 4, 1), np.int16), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[40:48] = struct.pack("<q", 2**40)  # dim[3]
    path.write_bytes(content)
    samples = index(folder_spec(), tmp_path)
    assert [sample.id for sample in samples] == ["a_s00", "picture 0"]
    (message,) = read_errors(samples, folder_spec())
    assert message.startswith(f"{path}: ")
    assert "but its header declares" in message


# Patients


def test_names_that_look_the_same_are_the_same(tmp_path):
    """Unicode writes an umlaut as one character or, on macOS, as two."""
    make_folder(tmp_path, 1)
    make_folder(tmp_path / "val", 2)
    composed, decomposed = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFC", "NFD"))
    for folder in "images", "masks":
        (tmp_path / "val" / folder / "picture 0.png").unlink()
        (tmp_path / folder / "picture 0.png").rename(tmp_path / folder / f"{composed} 0.png")
        own = decomposed if folder == "images" else composed
        (tmp_path / "val" / folder / "picture 1.png").rename(
            tmp_path / "val" / folder / f"{own} 1.png"
        )
    samples = index(folder_spec(), tmp_path)
    assert [sample.id for sample in samples] == [f"{decomposed} 1", f"{composed} 0"]
    message = error_of(index, folder_spec(group="(.+) "), tmp_path)
    assert f"patient {composed} is also among the train images" in message
    lists = {"labeled": [f"{decomposed} 0"], "unlabeled": [], "val": [f"{composed} 1"]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    assert read_split(tmp_path / "split.json", samples).labeled == (samples[1],)


def test_ids_that_look_the_same_are_duplicates(tmp_path):
    names = [unicodedata.normalize(form, "M\u00fcller") for form in ("NFC", "NFD")]
    make_folder(tmp_path, 1, n_unlabeled=1)
    for number, (folder, name) in enumerate(zip(("images", "unlabeled"), names, strict=True)):
        (tmp_path / folder / f"picture {number}.png").rename(tmp_path / folder / f"{name}.png")
    (tmp_path / "masks" / "picture 0.png").rename(tmp_path / "masks" / f"{names[0]}.png")
    assert "duplicate ids: " in error_of(index, folder_spec(), tmp_path)


def test_a_patient_has_one_spelling(tmp_path):
    make_folder(tmp_path, 2)
    for number, stem in enumerate(("p02_0", "P02_1")):
        for folder in "images", "masks":
            (tmp_path / folder / f"picture {number}.png").rename(tmp_path / folder / f"{stem}.png")
    assert len(index(folder_spec(), tmp_path)) == 2
    message = error_of(index, folder_spec(group="(.+)_"), tmp_path)
    assert "patient p02 is also written P02; use one spelling" in message


def test_group_is_the_patient_of_each_file(tmp_path):
    make_folder(tmp_path, 1)
    for stem in "P1_a", "P1_b":
        write_volume(tmp_path / "images" / f"{stem}.nii.gz", np.zeros((4, 4, 1), np.int16))
    samples = index(folder_spec(group="(.+)[ _]"), tmp_path)
    assert [(s.id, s.volume, s.group) for s in samples] == [
        ("P1_a_s00", "P1_a", "P1"),
        ("P1_b_s00", "P1_b", "P1"),
        ("picture 0", "picture 0", "picture"),
    ]


@pytest.mark.parametrize("pattern", [r"^(P\d+)_", "(x?)"])
def test_a_stem_without_a_patient_is_named(tmp_path, pattern):
    make_folder(tmp_path, 2)
    message = error_of(index, folder_spec(group=pattern), tmp_path)
    for i in 0, 1:
        assert f"images/picture {i}.png: the name does not match group = {pattern!r}" in message


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_patient_is_not_in_two_parts(tmp_path, part):
    make_folder(tmp_path, 1)
    make_folder(tmp_path / part, 2)
    for folder in "images", "masks":
        (tmp_path / part / folder / "picture 0.png").unlink()
    message = error_of(index, folder_spec(group="(picture)"), tmp_path)
    assert f"{part}/images/picture 1.png: patient picture is also among the train" in message
    assert len(index(folder_spec(group="(.+)"), tmp_path)) == (2 if part == "val" else 1)
