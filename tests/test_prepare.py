"""tools/prepare.py: official archives become folders that main.py trains on, or one error line."""

import json
import os
import re
import shutil
import tarfile
import urllib.error
import zipfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
from conftest import make_acdc, make_cityscapes, make_voc, write_indexed, write_volume
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import sbd, voc

from datasets.cache import decode
from datasets.layouts import index
from datasets.spec import load_spec
from tools import prepare as tool

SBD_VALUES = np.repeat(np.arange(21, dtype=np.uint8), 24).reshape(18, 28)  # every class


run = partial(runs.run, tool=tool.prepare)
error_line = partial(runs.error_line, tool=tool.prepare)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def prepare(dataset: str, root: Path, *sources: Path) -> int:
    """Prepare a dataset from these sources and what lies under its root."""
    return run(dataset, "--root", root, *(["--from", *sources] if sources else []))


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def archive(folder: Path, path: Path, rename=str) -> Path:
    """A zip or tar of a folder's files, renamed."""
    names = sorted(files(folder), reverse=True)  # archives have no particular order
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as target:
            target.writestr(rename("folder/"), b"")
            for name in names:
                target.writestr(rename(name), (folder / name).read_bytes())
    else:
        mode = {".tgz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
        with tarfile.open(path, mode) as target:
            for name in names:
                target.add(folder / name, rename(name))
    return path


def snapshot(folder: Path) -> dict[str, tuple]:
    """Content and time of every file, and every folder."""
    state = {str(path): () for path in folder.rglob("*")}
    for name in files(folder):
        path = folder / name
        state[str(path)] = path.read_bytes(), path.stat().st_mtime_ns
    return state


def found_by_main(dataset: str, root: Path) -> list[str]:
    """The ids that a training run finds, each of them decoded."""
    spec = load_spec(dataset)
    samples = index(spec, root, "paper")
    for sample in samples:
        decode(sample, spec, (16, 16))
    return [sample.id for sample in samples]


def make_voc2012(folder: Path) -> Path:
    """The official VOC2012: train 2007_000000 and _000001, val 2007_000002, two more images."""
    home = make_voc(folder, 2) / "VOCdevkit" / "VOC2012"
    (home / "SegmentationClassAug").rename(home / "SegmentationClass")
    lists = home / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").rename(lists / "train.txt")
    for name in "2008_000001", "2008_000002":
        Image.new("RGB", (28, 18)).save(home / "JPEGImages" / f"{name}.jpg")
    return home


def make_sbd(folder: Path) -> Path:
    """SBD's folder: an image of VOC's train, one of its val, two of SBD alone."""
    for kind, key in ("cls", "GTcls"), ("inst", "GTinst"):
        (folder / kind).mkdir(parents=True)
        for name in "2008_000001", "2007_000001", "2008_000002", "2007_000002":
            struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": SBD_VALUES}
            savemat(folder / kind / f"{name}.mat", {key: struct}, do_compression=True)
    return folder


AUGMENTED = ["2007_000000", "2007_000001", "2008_000001", "2008_000002"]
HOME = "VOCdevkit/VOC2012"
TRAIN_AUG = f"{HOME}/ImageSets/Segmentation/train_aug.txt"


@pytest.fixture
def voc_archives(tmp_path) -> list[Path]:
    home, masks = make_voc2012(tmp_path / "official"), make_sbd(tmp_path / "sbd")
    return [
        archive(home, tmp_path / "VOCtrainval_11-May-2012.tar", f"{HOME}/{{}}".format),
        archive(masks, tmp_path / "benchmark.tgz", "benchmark_RELEASE/dataset/{}".format),
    ]


# VOC


def test_voc_from_both_archives_is_what_main_reads_with_vocs_own_masks_before_sbds(
    root, voc_archives
):
    masks = root / HOME / "SegmentationClassAug"
    own = "2007_000000.png", "2007_000001.png", "2007_000002.png"
    for name in own:
        write_indexed(masks / name, SBD_VALUES)  # as another tool may have left it
    assert prepare("voc", root, *voc_archives) == 0
    assert (root / TRAIN_AUG).read_text() == "".join(f"{name}\n" for name in AUGMENTED)
    assert found_by_main("voc", root) == AUGMENTED
    for name in own:
        official = root / HOME / "SegmentationClass" / name
        assert (masks / name).read_bytes() == official.read_bytes()
    with Image.open(masks / "2008_000001.png") as mask:
        assert (mask.format, mask.mode) == ("PNG", "P")
        assert np.array_equal(mask, SBD_VALUES)
        colors = np.reshape(mask.getpalette(), (-1, 3)).tolist()
    assert colors[:21] == [list(color) for color in load_spec("voc").palette]
    assert colors[255] == [224, 224, 192]


@pytest.mark.parametrize("home", ["VOC2012", "."])
def test_unpacked_folders_under_the_root_are_found(root, tmp_path, home):
    make_voc2012(tmp_path)
    (root / home).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / HOME, root / home)
    make_sbd(root / "benchmark_RELEASE" / "dataset")
    assert prepare("voc", root) == 0
    assert (root / home / "ImageSets" / "Segmentation" / "train_aug.txt").is_file()
    assert found_by_main("voc", root) == AUGMENTED


def test_another_train_aug_is_corrected_and_the_same_in_another_order_stays(
    root, voc_archives, capsys
):
    path = root / TRAIN_AUG
    reverse = AUGMENTED[::-1]
    for before, after in (reverse, reverse), ([*AUGMENTED, "2007_000002"], AUGMENTED):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(before))
        assert prepare("voc", root, *voc_archives) == 0
        assert path.read_text().split() == after
        if before != after:
            assert path.with_suffix(".earlier").read_text().split() == before
        said = f"{path}: replaced, it differed in 1 image\n" in capsys.readouterr().out
        assert said == (before != after)


def test_train_aug_is_not_shortened_to_the_masks_of_sbd_that_are_there(root, voc_archives, capsys):
    path = root / TRAIN_AUG
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([*AUGMENTED, "2008_000009"]))
    before = path.read_text()
    prepare("voc", root, *voc_archives)
    assert path.read_text() == before
    assert "kept " in (printed := capsys.readouterr().out)
    assert "1 image more than SBD's masks here" in printed


def test_an_interrupted_download_of_sbd_is_no_source_and_begins_anew(root, monkeypatch):
    make_voc2012(root)

    def download_sbd(root, image_set, mode, download):
        make_sbd(root)
        if not complete:
            for mask in sorted(Path(root).rglob("*.mat"))[1:]:
                mask.unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(tool, "SBDataset", download_sbd)
    for complete in False, True:
        with suppress(KeyboardInterrupt):
            assert run("voc", "--root", root, "--download") == 0 or not complete
        assert (root / TRAIN_AUG).is_file() == complete
    assert found_by_main("voc", root) == AUGMENTED


def test_voc_without_its_train_txt_is_one_error_line(root, capsys):
    home = make_voc2012(root)
    (home / "ImageSets/Segmentation/train.txt").unlink()
    make_sbd(root / "benchmark_RELEASE" / "dataset")
    error = error_line(capsys, "voc", "--root", root)
    assert "ImageSets/Segmentation/train.txt: no such file" in error


def test_without_sbd_an_existing_train_aug_is_used_and_otherwise_the_remedy_named(
    root, voc_archives, capsys
):
    line = error_line(capsys, "voc", "--root", root, "--from", voc_archives[0])
    assert all(word in line for word in ("SBD", "--download", "benchmark.tgz", "--from"))
    (root / TRAIN_AUG).write_text("2007_000000")
    assert prepare("voc", root) == 0


def test_download_gets_what_is_missing_once(root, voc_archives, monkeypatch):
    requests = []

    def download_voc(root, year, image_set, download):
        requests.append("voc")
        make_voc2012(root)

    def download_sbd(root, image_set, mode, download):
        requests.append("sbd")
        make_sbd(root)

    monkeypatch.setattr(tool, "VOCSegmentation", download_voc)
    monkeypatch.setattr(tool, "SBDataset", download_sbd)
    for _ in range(2):
        assert run("voc", "--root", root, "--download") == 0
        assert requests == ["voc", "sbd"]
        assert found_by_main("voc", root) == AUGMENTED
    for given, missing in zip(voc_archives, ("sbd", "voc"), strict=True):
        requests.clear()
        assert run("voc", "--root", root / f"no_{missing}", "--download", "--from", given) == 0
        assert requests == [missing]


@pytest.mark.parametrize("module", [voc, sbd])
def test_a_failed_download_is_one_error_line(root, monkeypatch, module, capsys):
    def unreachable(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(module, "download_and_extract_archive", unreachable)
    if module is sbd:
        make_voc2012(root)
    line = error_line(capsys, "voc", "--root", root, "--download", code=1)
    assert all(word in line for word in ("--download", "Name or service not known", "--from"))


# Cityscapes


@pytest.fixture
def cityscapes_archives(tmp_path) -> list[Path]:
    """The two official archives, with a part and files that are never read."""
    official = make_cityscapes(tmp_path / "official", 3, 2)
    shutil.copytree(official / "leftImg8bit" / "val", official / "leftImg8bit" / "test")
    zips = []
    for kind in "leftImg8bit", "gtFine":
        name = f"frankfurt_9_{kind}_labelIds.png.part"
        (official / kind / "val" / "frankfurt" / name).write_text("rest")
        path = tmp_path / f"{kind}_trainvaltest.zip"
        zips.append(archive(official / kind, path, f"{kind}/{{}}".format))
    return zips


CITYSCAPES_FILES = {
    f"{kind}/{part}/{city}/{city}_{number:06d}_000019_{ending}.png"
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
    for part, city, n in (("train", "aachen", 3), ("val", "frankfurt", 2))
    for number in range(n)
}


def test_only_the_files_of_the_layout_are_taken_from_archives_in_the_root_or_a_folder(
    root, cityscapes_archives, tmp_path
):
    for path, folder in zip(cityscapes_archives, (root, tmp_path / "elsewhere"), strict=True):
        folder.mkdir()
        shutil.move(path, folder)
    assert prepare("cityscapes", root, tmp_path / "elsewhere") == 0
    assert files(root) == CITYSCAPES_FILES | {"leftImg8bit_trainvaltest.zip"}
    assert len(found_by_main("cityscapes", root)) == 5


def test_a_truncated_file_is_written_again(root, cityscapes_archives):
    prepare("cityscapes", root, *cityscapes_archives)
    before = snapshot(root)
    path = root / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert prepare("cityscapes", root, *cityscapes_archives) == 0
    assert path.read_bytes() == content
    assert {name for name, state in snapshot(root).items() if state != before[name]} == {str(path)}


def test_a_changed_file_is_kept_and_named(root, cityscapes_archives, capsys):
    prepare("cityscapes", root, *cityscapes_archives)
    image, mask = (next(root.rglob(name)) for name in ("*_leftImg8bit.png", "*_labelIds.png"))
    for path in image, mask:  # the same pixels in another size
        with Image.open(path) as picture:
            picture.save(path, compress_level=0, dpi=(72, 72))
    before = snapshot(root)
    capsys.readouterr()
    assert prepare("cityscapes", root, *cityscapes_archives) == 0
    assert snapshot(root) == before
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept")]
    assert sum(path.relative_to(root).as_posix() in "".join(kept) for path in (image, mask)) == 2


def test_a_shorter_text_is_not_a_truncated_file(root, tmp_path, capsys):
    make_acdc(tmp_path / "source", 2, 3)
    prepare("acdc", root, tmp_path / "source")
    path = root / "training/patient001/Info.cfg"
    path.write_text("".join(path.read_text().splitlines(True)[:2]))
    before = snapshot(root)
    capsys.readouterr()
    prepare("acdc", root, tmp_path / "source")
    assert snapshot(root) == before
    assert "training/patient001/Info.cfg" in capsys.readouterr().out


def test_the_first_of_two_sources_wins(root, cityscapes_archives, tmp_path):
    name = "gtFine/train/aachen/aachen_9_gtFine_labelIds.png"
    for source in "first", "the second":
        (tmp_path / source / name).parent.mkdir(parents=True)
        (tmp_path / source / name).write_text(source)
    sources = tmp_path / "first" / "gtFine", tmp_path / "the second", *cityscapes_archives
    assert prepare("cityscapes", root, *sources) == 0
    assert (root / name).read_text() == "first"


def test_the_error_names_the_missing_archive(root, cityscapes_archives, capsys):
    line = error_line(capsys, "cityscapes", "--root", root, "--from", cityscapes_archives[0])
    assert cityscapes_archives[1].name in line


@pytest.mark.parametrize("start", ["../", "x/../../", "/", "..\\", "\\", "C:\\", "c:/"])
def test_a_member_outside_its_archive_is_refused(root, tmp_path, start, capsys):
    path, name = tmp_path / "evil.zip", f"{start}leftImg8bit/train/aachen/a_leftImg8bit.png"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr(name, b"evil")
    assert repr(name) in error_line(capsys, "cityscapes", "--root", root, "--from", path)
    assert files(tmp_path) == {path.name}


def test_a_damaged_member_is_named(root, cityscapes_archives, capsys):
    with zipfile.ZipFile(cityscapes_archives[0]) as target:
        member = next(m for m in target.infolist() if "/train/" in m.filename)
    content = bytearray(cityscapes_archives[0].read_bytes())
    content[member.header_offset + 200] ^= 255
    cityscapes_archives[0].write_bytes(content)
    line = error_line(capsys, "cityscapes", "--root", root, "--from", *cityscapes_archives)
    assert member.filename in line
    assert not (root / member.filename).exists()


# ACDC


@pytest.fixture
def acdc_files(tmp_path) -> Path:
    """database/ as in the official archive: 2 exams in training, 1 in testing, whole series.

    With files that macOS leaves behind.
    """
    database = make_acdc(tmp_path / "database", 3, 3)
    (database / "testing").mkdir()
    shutil.move(database / "training" / "patient003", database / "testing")
    for exam in database.glob("*/patient*"):
        write_volume(exam / f"{exam.name}_4d.nii.gz", np.zeros((4, 4, 2, 3), np.int16))
        (exam / "MANDATORY_CITATION.md").write_text("cite")
        for folder in exam, database / "__MACOSX/ACDC/database" / exam.relative_to(database):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"._{exam.name}_frame01.nii.gz").write_bytes(b"Mac OS X")
            (folder / "._Info.cfg").write_bytes(b"Mac OS X")
    return database


ACDC_FILES = set()
for exam in "training/patient001", "training/patient002", "testing/patient003":
    ACDC_FILES |= {f"{exam}/Info.cfg", f"{exam}/MANDATORY_CITATION.md"}
    for ending in "01", "01_gt", "12", "12_gt":
        ACDC_FILES.add(f"{exam}/{Path(exam).name}_frame{ending}.nii.gz")


def test_acdc_is_taken_from_a_folder_with_a_link(root, acdc_files, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "training").symlink_to(acdc_files / "training")
    for loop in "ab":  # 2^40 paths, if followed
        (tmp_path / "links" / loop).symlink_to(tmp_path / "links")
    assert prepare("acdc", root, tmp_path / "links") == 0
    assert files(root) == {name for name in ACDC_FILES if name.startswith("training")}


def windows(name: str) -> str:
    return f"ACDC/database/{name}".replace("/", "\\")


@pytest.mark.parametrize(
    ("ending", "rename"),
    [
        ("zip", windows),
        ("tar", "./{}".format),
        ("tgz", str.upper),
        ("tar.xz", str),
        ("zip", lambda name: f"Cardiac MRI/{name}".title()),
    ],
)
def test_acdc_is_read_from_an_archive_as_any_system_writes_it(
    root, acdc_files, tmp_path, ending, rename
):
    assert prepare("acdc", root, archive(acdc_files, tmp_path / f"ACDC.{ending}", rename)) == 0
    assert files(root) == ACDC_FILES
    assert len(found_by_main("acdc", root)) == 12


def test_vocs_and_cityscapes_names_have_their_official_spelling_whatever_an_archives(
    root, cityscapes_archives, voc_archives, tmp_path
):
    shouted = archive(tmp_path / "official", tmp_path / "A.ZIP", lambda name: windows(name).upper())
    for dataset in "cityscapes", "voc":
        prepare(dataset, root / dataset, shouted)
    lower = {name.replace("AACHEN", "aachen") for name in files(root / "cityscapes")}
    assert {name.replace("FRANKFURT", "frankfurt") for name in lower} == CITYSCAPES_FILES
    names = {Path(name).parent.name for name in files(root / "voc")}
    assert names == {"JPEGImages", "SegmentationClass", "SegmentationClassAug", "Segmentation"}
    assert (root / "voc" / HOME / "ImageSets/Segmentation/train.txt").is_file()


def test_an_archive_without_the_layout_is_said_to_hold_what_it_holds(root, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as target:
        target.writestr("scans/", b"")
        for number in range(3):
            target.writestr(f"scans/{number}.dcm", b"")
    line = error_line(capsys, "acdc", "--root", root, "--from", tmp_path / "other.zip")
    assert f"{root}: no training: get the ACDC archive" in line
    assert line.endswith(f"; {tmp_path / 'other.zip'} contains 3 other files, such as scans/0.dcm")


# All of them


@pytest.mark.parametrize("dataset", ["voc", "cityscapes"])
def test_preparing_twice_changes_nothing_and_verify_writes_nothing(request, root, dataset, capsys):
    archives = request.getfixturevalue(f"{dataset}_archives")
    assert prepare(dataset, root, *archives) == 0
    before = snapshot(root)
    assert prepare(dataset, root, *archives) == prepare(dataset, root) == 0
    assert snapshot(root) == before
    assert "\n0 files written" in capsys.readouterr().out
    for path in archives:
        shutil.move(path, root)
    mask = max(name for name in files(root) if re.search("Aug/|labelIds", name))
    (root / mask).unlink()  # preparing would restore it
    before = snapshot(root)
    assert mask in error_line(capsys, dataset, "--root", root, "--verify")
    assert snapshot(root) == before


def test_the_number_of_workers_does_not_matter(acdc_files, capsys):
    outputs = []
    for n in 0, 3:
        assert run("acdc", "--root", acdc_files, "--verify", "--workers", n) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


# Output of the verification


def test_unusable_files_of_every_part_are_one_error_line(root, capsys):
    home = make_voc(root, 2) / HOME
    image = home / "JPEGImages/2007_000001.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    mask = home / "SegmentationClassAug/2007_000002.png"  # of val
    write_indexed(mask, np.full((20, 28), 21))
    line = error_line(capsys, "voc", "--root", root, "--verify")
    assert line.startswith(f"error: unusable files (2): {image}: image file is truncated")
    assert f"{mask}: label 21 is out of range" in line


def test_a_broken_volume_is_one_error_for_all_its_slices(root, capsys):
    make_acdc(root, 2, 3)
    path = root / "training/patient001/patient001_frame01_gt.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    line = error_line(capsys, "acdc", "--root", root, "--verify")
    assert line.startswith(f"error: unusable files (1): {path}: ")


def test_counts_and_shares_are_those_of_the_files(root, capsys):
    make_cityscapes(root, 1, 0)
    road, bicycle, void = [7] * 17, [33] * 8, [0, 1, 2, 3, 4, 5, 6, 9, 255]
    mask = np.repeat([road + bicycle + void], 16, 0).astype(np.uint8)
    Image.fromarray(mask).save(next(root.glob("gtFine/train/*/*_labelIds.png")))
    assert run("cityscapes", "--root", root, "--verify") == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[0] == f"cityscapes in {root}"
    assert lines[1].split() == ["train", "1", "of", "2,975", "images"]
    assert lines[2].split() == ["val", "0", "of", "500", "images"]
    rows = {line[:26].strip(): line[26:].strip() for line in lines if line[26:]}
    titles = "road", "bicycle", "sky", "void, % of all pixels"
    assert [rows[title] for title in titles] == ["68.00", "32.00", "-", "26.47"]  # of 25, of 34
    assert "all images and masks are usable; incomplete: train, val\n" in output


def test_exams_are_counted_and_a_missing_part_is_reported(root, capsys):
    make_acdc(root, 2, 3)
    assert run("acdc", "--root", root, "--verify") == 0
    output = capsys.readouterr().out
    assert "train      2 of 100 exams, 12 slices\n" in output
    assert "test       0 of 50 exams   (used by --split standard only)\n" in output


def test_the_official_number_is_complete(root, capsys):
    make_cityscapes(root, 2, 1)
    tool.verify(replace(load_spec("cityscapes"), standard_counts=(2, 1)), root, 0)
    assert "all images and masks are usable; complete\n" in capsys.readouterr().out


def test_data_that_the_papers_split_cannot_train_on_is_an_error(root, acdc_files, capsys):
    root.mkdir()
    shutil.move(acdc_files / "testing", root)
    assert str(root) in error_line(capsys, "acdc", "--root", root, "--verify")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("voc --verify --from x.zip", ["--verify", "--from"]),
        ("cityscapes --download", ["--download", "gtFine_trainvaltest.zip"]),
        ("acdc --from nowhere.zip", ["nowhere.zip", "No such file"]),
        ("acdc --from text.zip", ["text.zip", "neither", "truncated; delete it and download"]),
        ("acdc --from cut.tgz", ["cut.tgz", "neither", "truncated; delete it and download"]),
        ("acdc --from pipe.zip", ["pipe.zip", "not a regular file"]),
        ("acdc --root text.zip", ["--root", "text.zip"]),
    ],
)
def test_wrong_flags_and_sources_are_one_error_line(tmp_path, monkeypatch, flags, words, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.zip").write_text("not a zip")
    os.mkfifo("pipe.zip")
    Path("noise").write_bytes(np.random.default_rng(0).bytes(20000))
    with tarfile.open("cut.tgz", "w:gz") as target:
        target.add("noise")
    Path("cut.tgz").write_bytes(Path("cut.tgz").read_bytes()[:-10000])
    line = error_line(capsys, *flags.split())
    assert all(word in line for word in words), line


# prepare.py split


def split_command(tmp_path, lists: dict[str, str], *flags) -> list[str]:
    """`prepare.py split` with lists of lines, writing out.json."""
    command = ["split", "--out", str(tmp_path / "out.json"), *map(str, flags)]
    for role, lines in lists.items():
        (tmp_path / f"{role}.txt").write_text(lines)
        command += [f"--{role}", str(tmp_path / f"{role}.txt")]
    return command


def convert(tmp_path, lists: dict[str, str], *flags) -> dict:
    """The split file that `prepare.py split` makes of lists of lines."""
    assert run(*split_command(tmp_path, lists, *flags)) == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
        ("/data/VOC2012/JPEGImages/2007_000032.jpg\t/x/2007_000032.png", "2007_000032"),
        (r"JPEGImages\2007_000032.jpg SegmentationClass\2007_000032.png", "2007_000032"),
        ("leftImg8bit/train/jena/jena_1_leftImg8bit.png gtFine/jena_1_gtFine.png", "jena_1"),
        ("a picture.PNG", "a picture"),
        ("a 1", "a 1"),
        ("v1.2", "v1.2"),
    ],
)
def test_a_line_of_a_list_is_an_image_or_an_image_and_its_mask(tmp_path, capsys, lines, ids):
    lists = {"labeled": f"{lines}\n\n{lines}\n", "unlabeled": "b", "val": "c.jpg", "test": "d"}
    expected = {"labeled": [ids], "unlabeled": ["b"], "val": ["c"], "test": ["d"]}
    assert convert(tmp_path, lists) == expected
    assert "1 labeled, 1 unlabeled, 1 val, 1 test" in capsys.readouterr().out


def test_ssl4mis_counts_frames_by_exam_and_slices_from_1(tmp_path):
    root = make_acdc(tmp_path / "acdc", 5, 3)  # frames 01 and 12
    lists = {
        "labeled": "patient001_frame01_slice_1\npatient001_frame02_slice_3\n",
        "unlabeled": "".join(f"patient002_frame0{f}_slice_{z}.h5\n" for f in "12" for z in "231"),
        "val": "".join(f"data/patient00{p}_frame0{f}.h5\n" for p in (5, 3) for f in (1, 2)),
        "test": "patient004_frame02\n",
    }
    assert convert(tmp_path, lists, "--root", root) == {
        "labeled": ["patient001_frame01_s00", "patient001_frame12_s02"],
        "unlabeled": ["patient002"],
        "val": ["patient003", "patient005"],
        "test": [f"patient004_frame12_s0{z}" for z in range(3)],
    }


def test_frames_may_be_acdcs_own_and_slices_may_count_from_0(tmp_path):
    root = make_acdc(tmp_path / "acdc", 3, 2)
    lists = {
        "labeled": "patient001_frame12_slice_0\npatient001_frame12_slice_1\n",
        "unlabeled": "patient002",
        "val": "patient003_frame01_s01",
    }
    assert convert(tmp_path, lists, "--root", root) == {
        "labeled": ["patient001_frame12_s00", "patient001_frame12_s01"],
        "unlabeled": ["patient002"],
        "val": ["patient003_frame01_s01"],
    }


def test_the_command_that_uses_the_lists_names_their_dataset_if_it_is_known(tmp_path, capsys):
    root, lists = make_acdc(tmp_path / "acdc", 3, 2), {"labeled": "a", "unlabeled": "b", "val": "c"}
    convert(tmp_path, lists)
    assert "--training --dataset DATASET --split" in capsys.readouterr().out
    patients = {role: f"patient00{n}_frame01" for n, role in enumerate(lists, 1)}
    convert(tmp_path, patients, "--root", root)
    assert f"--training --dataset acdc --data-root {root} --split" in capsys.readouterr().out


def test_labeled_images_are_left_out_of_the_unlabeled_ones(tmp_path, capsys):
    lists = {"labeled": "a", "unlabeled": "a\nb", "val": "c"}
    assert convert(tmp_path, lists)["unlabeled"] == ["b"]
    assert "unlabeled.txt: skipped 1 image also labeled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": "a"}, "--labeled and --val both list a"),
        ({"val": "\n"}, "val.txt: lists no image"),
        ({"val": "a/1.png\nb/1.png"}, "val.txt: 'a/1.png' and 'b/1.png' both name '1': ids"),
        ({"val": "my.scan 1.jpg\nmy.scan 2.jpg"}, "val.txt: 'my.scan 1.jpg' and 'my.scan 2.jpg'"),
        ({"val": "JPEGImages/"}, "val.txt: 'JPEGImages/' names no image"),
        ({"labeled": "patient001_frame01_slice_4"}, "--labeled: not in the dataset: patient001_f"),
        ({"val": "patient009_frame01"}, "--val: not in the dataset: patient009_frame01"),
        ({"val": "patient001_frame02"}, "out.json: in training and validation: patient001"),
    ],
)
def test_wrong_lists_are_one_error_line(tmp_path, capsys, changes, message):
    root, plain = make_acdc(tmp_path / "acdc", 1, 3), {"labeled": "a", "unlabeled": "b", "val": "c"}
    if "patient" in str(changes):
        plain = dict.fromkeys(plain, "patient001_frame01_slice_1")
    command = split_command(tmp_path, plain | changes, "--root", root)
    assert message in error_line(capsys, *command)
    assert not (tmp_path / "out.json").exists()
