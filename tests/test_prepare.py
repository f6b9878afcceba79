"""tools/prepare.py: official archives become folders that main.py trains on, or one error line."""

import io
import json
import re
import runpy
import shutil
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_acdc, make_cityscapes, make_voc, write_indexed, write_volume
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import SBDataset, VOCSegmentation, voc

from datasets.cache import decode
from datasets.layouts import index
from datasets.spec import CONFIG, load_spec
from engine import program
from tools import prepare as tool

SBD_VALUES = np.repeat(np.arange(21, dtype=np.uint8), 24).reshape(18, 28)  # every class


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def run(dataset: str, root: Path, *flags) -> int:
    return program.execute(tool.prepare, [dataset, "--root", str(root), *map(str, flags)])


def error_line(capsys, *command, code: int = 2) -> str:
    """The error line, the only one, of a command that must end with this exit code."""
    capsys.readouterr()
    assert program.execute(tool.prepare, [*map(str, command)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


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
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as target:
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
    trainval = (lists / "train.txt").read_text() + (lists / "val.txt").read_text()
    (lists / "trainval.txt").write_text(trainval)
    for name in "2008_000001", "2008_000002":
        Image.new("RGB", (28, 18)).save(home / "JPEGImages" / f"{name}.jpg")
    (home / "Annotations").mkdir()
    (home / "Annotations" / "2007_000000.xml").write_text("boxes, never read")
    return home


def make_sbd(folder: Path) -> Path:
    """SBD's folder: an image of VOC's train, one of its val, two of SBD alone."""
    names = ["2008_000001", "2007_000001", "2008_000002", "2007_000002"]
    for kind, key in ("cls", "GTcls"), ("inst", "GTinst"):
        (folder / kind).mkdir(parents=True)
        for name in names:
            struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": SBD_VALUES}
            savemat(folder / kind / f"{name}.mat", {key: struct}, do_compression=True)
    (folder / "train.txt").write_text("\n".join(names[:2]))
    (folder / "val.txt").write_text("\n".join(names[2:]))
    return folder


AUGMENTED = ["2007_000000", "2007_000001", "2008_000001", "2008_000002"]
HOME = "VOCdevkit/VOC2012"
TRAIN_AUG = f"{HOME}/ImageSets/Segmentation/train_aug.txt"


@pytest.fixture
def voc_archives(tmp_path) -> list[Path]:
    home, sbd = make_voc2012(tmp_path / "official"), make_sbd(tmp_path / "sbd")
    return [
        archive(home, tmp_path / "VOCtrainval_11-May-2012.tar", f"{HOME}/{{}}".format),
        archive(sbd, tmp_path / "benchmark.tgz", "benchmark_RELEASE/dataset/{}".format),
    ]


# VOC


def test_voc_from_both_archives_is_what_main_reads(root, voc_archives):
    assert run("voc", root, "--from", *voc_archives) == 0
    assert (root / TRAIN_AUG).read_text() == "".join(f"{name}\n" for name in AUGMENTED)
    assert found_by_main("voc", root) == AUGMENTED
    masks = {p.stem for p in (root / HOME / "SegmentationClassAug").iterdir()}
    assert masks == {*AUGMENTED, "2007_000002"}
    assert not (root / HOME / "Annotations").exists()
    assert not [name for name in files(root) if name.endswith((".mat", ".tmp"))]


def test_masks_are_vocs_own_byte_for_byte_and_otherwise_sbds_with_vocs_palette(root, voc_archives):
    masks = root / HOME / "SegmentationClassAug"
    own = "2007_000000.png", "2007_000001.png", "2007_000002.png"
    for name in own:
        write_indexed(masks / name, SBD_VALUES)  # as another tool may have left it
    assert run("voc", root, "--from", *voc_archives) == 0
    for name in own:
        official = root / HOME / "SegmentationClass" / name
        assert (masks / name).read_bytes() == official.read_bytes()
    with Image.open(masks / "2008_000001.png") as mask:
        assert (mask.format, mask.mode) == ("PNG", "P")
        assert np.array_equal(mask, SBD_VALUES)
        colors = np.reshape(mask.getpalette(), (-1, 3)).tolist()
    assert colors[:21] == [list(color) for color in load_spec("voc").palette]
    assert colors[255] == [224, 224, 192]


@pytest.mark.parametrize("home", [HOME, "VOC2012", "."])
def test_unpacked_folders_under_the_root_are_found(root, tmp_path, home):
    make_voc2012(tmp_path)
    (root / home).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / HOME, root / home)
    make_sbd(root / "benchmark_RELEASE" / "dataset")
    assert run("voc", root) == 0
    assert (root / home / "ImageSets" / "Segmentation" / "train_aug.txt").is_file()
    assert found_by_main("voc", root) == AUGMENTED


def test_another_train_aug_is_corrected_and_the_same_in_another_order_stays(root, voc_archives):
    path = root / TRAIN_AUG
    reverse = AUGMENTED[::-1]
    for before, after in (reverse, reverse), ([*AUGMENTED, "2007_000002"], AUGMENTED):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(before))
        assert run("voc", root, "--from", *voc_archives) == 0
        assert path.read_text().split() == after


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
    assert run("voc", root) == 0


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """The downloads requested from stand-ins for torchvision's classes."""
    requests = []

    def download_voc(root, year, image_set, download):
        requests.append("voc")
        assert (year, download) == ("2012", True)
        make_voc2012(root)

    def download_sbd(root, image_set, mode, download):
        requests.append("sbd")
        assert download
        make_sbd(root)

    monkeypatch.setattr(tool, "VOCSegmentation", download_voc)
    monkeypatch.setattr(tool, "SBDataset", download_sbd)
    return requests


def test_download_gets_what_is_missing_once(root, downloads):
    for _ in range(2):
        assert run("voc", root, "--download") == 0
        assert downloads == ["voc", "sbd"]
        assert found_by_main("voc", root) == AUGMENTED


def test_download_omits_an_sbd_that_is_given(root, downloads, voc_archives):
    assert run("voc", root, "--download", "--from", voc_archives[1]) == 0
    assert downloads == ["voc"]


@pytest.mark.parametrize(
    ("dataset", "flags"),
    [(VOCSegmentation, {"year": "2012"}), (SBDataset, {"mode": "segmentation"})],
)
def test_download_passes_flags_that_torchvision_knows(dataset, flags):
    with pytest.raises(RuntimeError, match="not found"):  # the data, not a flag
        dataset("/nonexistent", image_set="train", download=False, **flags)


def test_a_failed_download_is_one_error_line(root, monkeypatch, capsys):
    def unreachable(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(voc, "download_and_extract_archive", unreachable)
    line = error_line(capsys, "voc", "--root", root, "--download", code=1)
    assert all(word in line for word in ("--download", "Name or service not known", "--from"))


# Cityscapes


@pytest.fixture
def cityscapes_zips(tmp_path) -> list[Path]:
    """The two official archives, with a part and files that are never read."""
    official = make_cityscapes(tmp_path / "official", 3, 2)
    shutil.copytree(official / "leftImg8bit" / "val", official / "leftImg8bit" / "test")
    zips = []
    for kind in "leftImg8bit", "gtFine":
        (official / kind / "README").write_text("terms")
        for ending in "_labelIds.png.part", ".png.part":
            name = f"frankfurt_9_{kind}{ending}"
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
    root, cityscapes_zips, tmp_path
):
    for path, folder in zip(cityscapes_zips, (root, tmp_path / "elsewhere"), strict=True):
        folder.mkdir()
        shutil.move(path, folder)
    assert run("cityscapes", root, "--from", tmp_path / "elsewhere") == 0
    assert files(root) == CITYSCAPES_FILES | {"leftImg8bit_trainvaltest.zip"}
    assert len(found_by_main("cityscapes", root)) == 5


def test_a_truncated_file_is_written_again(root, cityscapes_zips):
    run("cityscapes", root, "--from", *cityscapes_zips)
    before = snapshot(root)
    path = root / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert run("cityscapes", root, "--from", *cityscapes_zips) == 0
    assert path.read_bytes() == content
    assert {name for name, state in snapshot(root).items() if state != before[name]} == {str(path)}


def test_the_first_of_two_sources_wins(root, cityscapes_zips, tmp_path):
    name = "gtFine/train/aachen/aachen_9_gtFine_labelIds.png"
    for source in "first", "the second":
        (tmp_path / source / name).parent.mkdir(parents=True)
        (tmp_path / source / name).write_text(source)
    sources = tmp_path / "first" / "gtFine", tmp_path / "the second", *cityscapes_zips
    assert run("cityscapes", root, "--from", *sources) == 0
    assert (root / name).read_text() == "first"


@pytest.mark.parametrize("given", [0, 1])
def test_the_error_names_the_missing_archive(root, cityscapes_zips, given, capsys):
    line = error_line(capsys, "cityscapes", "--root", root, "--from", cityscapes_zips[given])
    assert cityscapes_zips[1 - given].name in line


@pytest.mark.parametrize("ending", ["zip", "tar"])
@pytest.mark.parametrize("start", ["../", "x/../../", "/", "..\\", "\\", "C:\\", "c:/"])
def test_a_member_outside_its_archive_is_refused(root, tmp_path, ending, start, capsys):
    path, name = tmp_path / f"evil.{ending}", f"{start}leftImg8bit/train/aachen/a_leftImg8bit.png"
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as target:
            target.writestr(name, b"evil")
    else:
        with tarfile.open(path, "w") as target:
            member = tarfile.TarInfo(name)
            member.size = 4
            target.addfile(member, io.BytesIO(b"evil"))
    assert repr(name) in error_line(capsys, "cityscapes", "--root", root, "--from", path)
    assert files(tmp_path) == {path.name}


def test_a_damaged_member_is_named(root, cityscapes_zips, capsys):
    with zipfile.ZipFile(cityscapes_zips[0]) as target:
        member = next(m for m in target.infolist() if "/train/" in m.filename)
    content = bytearray(cityscapes_zips[0].read_bytes())
    content[member.header_offset + 200] ^= 255
    cityscapes_zips[0].write_bytes(content)
    line = error_line(capsys, "cityscapes", "--root", root, "--from", *cityscapes_zips)
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


@pytest.mark.parametrize("source", ["database", "database/training", "links"])
def test_acdc_is_taken_from_a_folder_or_a_link_to_one(root, acdc_files, tmp_path, source):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "training").symlink_to(acdc_files / "training")
    assert run("acdc", root, "--from", tmp_path / source) == 0
    part = "" if source == "database" else "training"
    assert files(root) == {name for name in ACDC_FILES if name.startswith(part)}


def windows(name: str) -> str:
    return f"ACDC/database/{name}".replace("/", "\\")


@pytest.mark.parametrize("ending", ["zip", "tar", "tgz"])
@pytest.mark.parametrize(
    "rename",
    [
        windows,
        lambda name: f"./{name}",
        lambda name: f".\\{name}",
        str.upper,
        lambda name: f"Cardiac MRI/{name}".title(),
        lambda name: f"a/b/c/{name}",
    ],
)
def test_acdc_is_read_from_an_archive_as_any_system_writes_it(
    root, acdc_files, tmp_path, ending, rename
):
    path = archive(acdc_files, tmp_path / f"ACDC.{ending}", rename)
    assert run("acdc", root, "--from", path) == 0
    assert files(root) == ACDC_FILES
    assert len(found_by_main("acdc", root)) == 12


def test_vocs_and_cityscapes_names_have_their_official_spelling_whatever_an_archives(
    root, cityscapes_zips, voc_archives, tmp_path
):
    shouted = archive(tmp_path / "official", tmp_path / "A.ZIP", lambda name: windows(name).upper())
    for dataset in "cityscapes", "voc":
        run(dataset, root / dataset, "--from", shouted)
    lower = {name.replace("AACHEN", "aachen") for name in files(root / "cityscapes")}
    assert {name.replace("FRANKFURT", "frankfurt") for name in lower} == CITYSCAPES_FILES
    names = {Path(name).parent.name for name in files(root / "voc")}
    assert names == {"JPEGImages", "SegmentationClass", "SegmentationClassAug", "Segmentation"}
    assert (root / "voc" / HOME / "ImageSets/Segmentation/train.txt").is_file()


def test_an_archive_without_the_layout_is_said_to_hold_what_it_holds(root, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as target:
        for number in range(3):
            target.writestr(f"scans/{number}.dcm", b"")
    line = error_line(capsys, "acdc", "--root", root, "--from", tmp_path / "other.zip")
    assert line.endswith(f"; {tmp_path / 'other.zip'} contains 3 other files, such as scans/0.dcm")


# All of them


@pytest.fixture(params=["voc", "cityscapes", "acdc"])
def prepared(request, root, tmp_path) -> tuple[str, Path, list[Path]]:
    """A prepared dataset: its name, its root, the archives."""
    if request.param == "acdc":
        folder = request.getfixturevalue("acdc_files")
        archives = [archive(folder, tmp_path / "ACDC.zip")]
    else:
        fixture = "voc_archives" if request.param == "voc" else "cityscapes_zips"
        archives = request.getfixturevalue(fixture)
    assert run(request.param, root, "--from", *archives) == 0
    return request.param, root, archives


def test_preparing_twice_changes_nothing(prepared, capsys):
    dataset, root, archives = prepared
    before = snapshot(root)
    assert run(dataset, root, "--from", *archives) == 0
    assert run(dataset, root) == 0
    assert snapshot(root) == before
    assert "\n0 files written" in capsys.readouterr().out


def test_verify_writes_nothing(prepared, capsys):
    dataset, root, archives = prepared
    for path in archives:
        shutil.move(path, root)
    mask = max(name for name in files(root) if re.search(r"Aug/|labelIds|_gt\.", name))
    (root / mask).unlink()  # preparing would restore it
    before = snapshot(root)
    assert mask in error_line(capsys, dataset, "--root", root, "--verify")
    assert snapshot(root) == before


def test_the_number_of_workers_does_not_matter(prepared, capsys):
    dataset, root, _ = prepared
    capsys.readouterr()
    outputs = []
    for n in 0, 3:
        assert run(dataset, root, "--verify", "--workers", n) == 0
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


def shares(output: str) -> dict[str, str]:
    """The last column but VOC's val by row."""
    return {line.split()[0]: line[26:34].strip() for line in output.splitlines() if line[26:]}


def test_counts_and_shares_are_those_of_the_files(root, capsys):
    mask = np.full((20, 28), 255)
    mask[:10] = 0
    mask[:10, :7] = 15  # 70 of the 280 pixels that count, of 560
    write_indexed(make_voc(root, 1) / HOME / "SegmentationClassAug" / "2007_000000.png", mask)
    assert run("voc", root, "--verify") == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[0] == f"voc in {root}"
    assert lines[1].split() == ["train", "1", "of", "10,582", "images"]
    assert lines[2].split()[:5] == ["val", "1", "of", "1,449", "images"]
    rows = shares(output)
    titles = "background", "person", "cat", "void,"
    assert [rows[title] for title in titles] == ["75.00", "25.00", "-", "50.00"]
    assert "all images and masks are usable; incomplete: train, val\n" in output


def test_pixels_of_cityscapes_void_class_do_not_count(root, capsys):
    make_cityscapes(root, 1, 0)
    road, bicycle, void = [7] * 17, [33] * 8, [0, 1, 2, 3, 4, 5, 6, 9, 10]
    mask = np.repeat([road + bicycle + void], 16, 0).astype(np.uint8)
    Image.fromarray(mask).save(next(root.glob("gtFine/train/*/*_labelIds.png")))
    assert run("cityscapes", root, "--verify") == 0
    rows = shares(capsys.readouterr().out)
    values = [rows[title] for title in ("road", "bicycle", "void,")]
    assert values == ["68.00", "32.00", "26.47"]  # of 25, of 34


def test_exams_are_counted_and_a_missing_part_is_reported(root, capsys):
    make_acdc(root, 2, 3)
    assert run("acdc", root, "--verify") == 0
    output = capsys.readouterr().out
    assert "train      2 of 100 exams, 12 slices\n" in output
    assert "test       0 of 50 exams   (used by --split standard only)\n" in output


def test_the_official_number_is_complete(root, capsys):
    make_cityscapes(root, 2, 1)
    toml = root / "cityscapes.toml"
    official = (CONFIG / "cityscapes.toml").read_text()
    toml.write_text(official.replace("[2975, 500]", "[2, 1]"))
    tool.verify(load_spec(str(toml)), root, 0)
    assert "all images and masks are usable; complete\n" in capsys.readouterr().out


def test_data_that_the_papers_split_cannot_train_on_is_an_error(root, acdc_files, capsys):
    root.mkdir()
    shutil.move(acdc_files / "testing", root)
    assert str(root) in error_line(capsys, "acdc", "--root", root, "--verify")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("voc --verify --download", ["--verify", "--download"]),
        ("voc --verify --from x.zip", ["--verify", "--from"]),
        ("cityscapes --download", ["--download", "gtFine_trainvaltest.zip"]),
        ("acdc --from nowhere.zip", ["nowhere.zip", "No such file"]),
        ("acdc --from text.zip", ["text.zip", "neither"]),
        ("acdc --root text.zip", ["--root", "text.zip"]),
        ("acdc", ["data/acdc", "the ACDC archive"]),
        ("acdc --verify", ["data/acdc", "no such folder"]),
        ("phantom", ["phantom", "cityscapes"]),
        ("acdc --worker 1", ["--worker"]),
    ],
)
def test_wrong_flags_and_sources_are_one_error_line(tmp_path, monkeypatch, flags, words, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.zip").write_text("not a zip")
    line = error_line(capsys, *flags.split())
    assert all(word in line for word in words), line


def test_the_command_ends_with_the_exit_code(root, monkeypatch):
    make_acdc(root, 1, 1)
    for flags, code in (["--verify", "--root", str(root)], 0), (["--unknown"], 2):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "acdc", *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(tool.__file__, run_name="__main__")
        assert end.value.code == code


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
    assert program.execute(tool.prepare, split_command(tmp_path, lists, *flags)) == 0
    return json.loads((tmp_path / "out.json").read_text())


CITY = "leftImg8bit/train/jena/jena_000001_000019_leftImg8bit.png"


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
        ("2007_000032", "2007_000032"),
        ("/data/VOC2012/JPEGImages/2007_000032.jpg\t/x/2007_000032.png", "2007_000032"),
        (r"JPEGImages\2007_000032.jpg SegmentationClass\2007_000032.png", "2007_000032"),
        (f"{CITY} gtFine/train/jena/jena_1_gtFine_labelTrainIds.png", "jena_000001_000019"),
        (CITY, "jena_000001_000019"),
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


def test_labeled_images_are_left_out_of_the_unlabeled_ones(tmp_path, capsys):
    root = make_acdc(tmp_path / "acdc", 2, 2)
    everything = "".join(f"patient001_frame0{f}_slice_{z}\n" for f in "12" for z in "12")
    lists = {"labeled": everything[:27], "unlabeled": everything, "val": "patient002_frame01"}
    split = convert(tmp_path, lists, "--root", root)
    assert "unlabeled.txt: 1 are labeled and so left out" in capsys.readouterr().out
    assert split["unlabeled"] == [
        "patient001_frame01_s01",
        "patient001_frame12_s00",
        "patient001_frame12_s01",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": "a"}, "--labeled and --val both list a"),
        ({"test": "c"}, "--val and --test both list c"),
        ({"val": "\n"}, "val.txt: lists no image"),
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
