"""tools/prepare.py: archives in the genuine layouts become folders that main.py trains from, or one error line."""

import io
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
import torchvision
from conftest import make_acdc, make_cityscapes, make_voc, write_indexed, write_volume
from PIL import Image
from scipy.io import savemat

import data_utils
import main
from tools import prepare as tool
from tools.prepare import prepare, train_aug

SBD_VALUES = np.repeat(np.arange(21, dtype=np.uint8), 24).reshape(18, 28)  # every class


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def run(dataset: str, root: Path, *flags) -> int:
    return prepare([dataset, "--root", str(root), "--workers", "0", *map(str, flags)])


def archive(folder: Path, path: Path, prefix: str = "") -> Path:
    """A zip or tar of a folder's files, their paths below `prefix`."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True)  # no order is promised
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as target:
            for file in files:
                target.write(file, prefix + file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as target:
            for file in files:
                target.add(file, prefix + file.relative_to(folder).as_posix())
    return path


def snapshot(folder: Path) -> dict[str, tuple]:
    """Content and time of every file, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else () for p in paths}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def found_by_main(dataset: str, root: Path) -> list[str]:
    """The ids that a training run would find, each decoded."""
    args = main.parse_args(["--training", "--dataset", dataset, "--data-root", str(root)])
    spec = data_utils.load_spec(args.dataset)
    samples = data_utils.index(spec, Path(args.data_root), args.split)
    for sample in samples:
        data_utils.decode(sample, spec, (16, 16))
    return [sample.id for sample in samples]


def error_line(capsys) -> str:
    """What stands on stderr, which is one error line."""
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def make_voc2012(folder: Path) -> Path:
    """VOCdevkit/VOC2012 as VOC gives it out: train 2007_000000 and 2007_000001, val 2007_000002, two more images."""
    home = make_voc(folder, 2) / "VOCdevkit" / "VOC2012"
    (home / "SegmentationClassAug").rename(home / "SegmentationClass")
    lists = home / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").rename(lists / "train.txt")
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    for name in "2008_000001", "2008_000002":
        Image.new("RGB", (28, 18)).save(home / "JPEGImages" / f"{name}.jpg")
    (home / "Annotations").mkdir()
    (home / "Annotations" / "2007_000000.xml").write_text("boxes, never read")
    return home


def make_sbd(folder: Path) -> Path:
    """SBD's folder: train has an image of its own and one of VOC's train, val one of its own and one of VOC's val."""
    parts = {"train": ["2008_000001", "2007_000001"], "val": ["2008_000002", "2007_000002"]}
    for kind in "cls", "inst":
        (folder / kind).mkdir(parents=True)
    for part, ids in parts.items():
        (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in ids))
        for name in ids:
            struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": SBD_VALUES, "CategoriesPresent": [15]}
            savemat(folder / "cls" / f"{name}.mat", {"GTcls": struct}, do_compression=True)
            savemat(folder / "inst" / f"{name}.mat", {"GTinst": {"Segmentation": SBD_VALUES}})
    return folder


AUGMENTED = ["2007_000000", "2007_000001", "2008_000001", "2008_000002"]


@pytest.fixture
def voc_archives(tmp_path) -> tuple[Path, Path]:
    home, sbd = make_voc2012(tmp_path / "official"), make_sbd(tmp_path / "sbd")
    tar = archive(home, tmp_path / "VOCtrainval_11-May-2012.tar", "VOCdevkit/VOC2012/")
    return tar, archive(sbd, tmp_path / "benchmark.tgz", "benchmark_RELEASE/dataset/")


# VOC


def test_train_aug_is_sbd_without_vocs_val_and_with_vocs_train():
    # a is VOC's alone, b and c stand in both, d in SBD alone; c is one that VOC validates on, e SBD does not know
    assert train_aug({"b", "a"}, {"c", "e"}, {"d", "c", "b"}) == ["a", "b", "d"]


def test_voc_from_both_archives_is_what_main_reads(root, voc_archives):
    assert run("voc", root, "--from", *voc_archives) == 0
    home = root / "VOCdevkit" / "VOC2012"
    assert (home / "ImageSets" / "Segmentation" / "train_aug.txt").read_text().split() == AUGMENTED
    assert found_by_main("voc", root) == AUGMENTED
    assert {p.stem for p in (home / "SegmentationClassAug").iterdir()} == {*AUGMENTED, "2007_000002"}
    assert not (home / "Annotations").exists()
    assert not [name for name in files(root) if name.endswith((".mat", ".tmp"))]


def test_masks_of_sbd_keep_their_values_as_indexed_png_with_vocs_palette(root, voc_archives):
    run("voc", root, "--from", *voc_archives)
    with Image.open(root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug" / "2008_000001.png") as mask:
        assert (mask.format, mask.mode) == ("PNG", "P")
        assert (np.array(mask) == SBD_VALUES).all()
        colours = np.reshape(mask.getpalette(), (-1, 3)).tolist()
    assert colours[:21] == [list(colour) for colour in data_utils.load_spec("voc").palette]
    assert colours[255] == [224, 224, 192]


@pytest.mark.parametrize("name", ["2007_000000", "2007_000001", "2007_000002"])
def test_vocs_own_masks_are_taken_byte_by_byte_before_sbds(root, voc_archives, name):
    home = root / "VOCdevkit" / "VOC2012"
    write_indexed(home / "SegmentationClassAug" / f"{name}.png", SBD_VALUES)  # as another tool may have left it
    run("voc", root, "--from", *voc_archives)
    mask = home / "SegmentationClassAug" / f"{name}.png"
    assert mask.read_bytes() == (home / "SegmentationClass" / f"{name}.png").read_bytes()
    assert 255 in data_utils.read_mask(mask)


@pytest.mark.parametrize("home", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_folders_that_lie_under_the_root_are_found(root, tmp_path, home):
    make_voc2012(tmp_path)
    (root / home).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "VOCdevkit" / "VOC2012", root / home)
    make_sbd(root / "benchmark_RELEASE" / "dataset")
    assert run("voc", root) == 0
    assert (root / home / "ImageSets" / "Segmentation" / "train_aug.txt").is_file()
    assert found_by_main("voc", root) == AUGMENTED


def test_another_train_aug_is_put_right_and_the_same_one_in_another_order_stays(root, voc_archives):
    run("voc", root, "--from", *voc_archives)
    path = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train_aug.txt"
    path.write_text("\n".join(AUGMENTED[::-1]))
    run("voc", root, "--from", *voc_archives)
    assert path.read_text().split() == AUGMENTED[::-1]
    path.write_text("\n".join([*AUGMENTED, "2007_000002"]))  # an image that VOC validates on
    run("voc", root, "--from", *voc_archives)
    assert path.read_text().split() == AUGMENTED


def test_without_sbd_the_error_says_what_to_do(root, voc_archives, capsys):
    assert run("voc", root, "--from", voc_archives[0]) == 2
    line = error_line(capsys)
    assert all(word in line for word in ("SBD", "--download", "benchmark.tgz", "--from"))


def test_without_sbd_a_train_aug_that_is_there_is_used(root):
    make_voc(root, 2)
    assert run("voc", root) == 0


def test_without_scipy_the_error_names_the_requirements(root, voc_archives, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert run("voc", root, "--from", *voc_archives) == 2
    assert "pip install -r tools/requirements.txt" in error_line(capsys)


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """What torchvision's classes, replaced by copies from nowhere, were asked for."""
    asked = []

    def voc(root, year, image_set, download):
        asked.append("voc")
        assert (year, download) == ("2012", True)
        make_voc2012(root)

    def sbd(root, image_set, mode, download):
        asked.append("sbd")
        assert download
        make_sbd(root)

    monkeypatch.setattr(tool, "VOCSegmentation", voc)
    sbd.url = tool.SBDataset.url
    monkeypatch.setattr(tool, "SBDataset", sbd)
    return asked


def test_download_gets_what_is_missing_once(root, downloads):
    assert run("voc", root, "--download") == 0
    assert downloads == ["voc", "sbd"]
    assert found_by_main("voc", root) == AUGMENTED
    assert run("voc", root, "--download") == 0
    assert downloads == ["voc", "sbd"]


def test_download_leaves_sbd_alone_where_it_is_given(root, downloads, voc_archives):
    assert run("voc", root, "--download", "--from", voc_archives[1]) == 0
    assert downloads == ["voc"]


def test_download_passes_flags_that_torchvision_knows():
    for dataset, flags in (
        (torchvision.datasets.VOCSegmentation, {"year": "2012"}),
        (torchvision.datasets.SBDataset, {"mode": "segmentation"}),
    ):
        with pytest.raises(RuntimeError, match="not found"):  # of the data, not of a flag
            dataset("/nonexistent", image_set="train", download=False, **flags)


def test_a_download_that_fails_is_one_line(root, monkeypatch, capsys):
    def unreachable(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.voc, "download_and_extract_archive", unreachable)
    assert run("voc", root, "--download") == 1
    line = error_line(capsys)
    assert all(word in line for word in ("--download", "Name or service not known", "--from"))


# Cityscapes


@pytest.fixture
def cityscapes_zips(tmp_path) -> list[Path]:
    """The two official archives, with a part and files that are never read."""
    official = make_cityscapes(tmp_path / "official", 3, 2)
    shutil.copytree(official / "leftImg8bit" / "val", official / "leftImg8bit" / "test")
    for kind in "leftImg8bit", "gtFine":
        (official / kind / "README").write_text("terms")
        (official / kind / "val" / "frankfurt" / f"frankfurt_9_{kind}_labelIds.png.part").write_text("rest")
        (official / kind / "val" / "frankfurt" / f"frankfurt_9_{kind}.png.part").write_text("rest")
    kinds = "leftImg8bit", "gtFine"
    return [archive(official / kind, tmp_path / f"{kind}_trainvaltest.zip", f"{kind}/") for kind in kinds]


CITYSCAPES_FILES = {
    f"{kind}/{part}/{city}/{city}_{number:06d}_000019_{ending}.png"
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
    for part, city, n in (("train", "aachen", 3), ("val", "frankfurt", 2))
    for number in range(n)
}


def test_of_cityscapes_only_what_the_layout_reads_is_unpacked(root, cityscapes_zips):
    assert run("cityscapes", root, "--from", *cityscapes_zips) == 0
    assert files(root) == CITYSCAPES_FILES
    assert len(found_by_main("cityscapes", root)) == 5


def test_archives_that_lie_in_the_root_or_in_a_given_folder_are_taken(root, cityscapes_zips, tmp_path):
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(cityscapes_zips[0], root)
    shutil.move(cityscapes_zips[1], tmp_path / "elsewhere")
    assert run("cityscapes", root, "--from", tmp_path / "elsewhere") == 0
    assert files(root) == CITYSCAPES_FILES | {"leftImg8bit_trainvaltest.zip"}


def test_a_file_that_was_cut_short_is_taken_again(root, cityscapes_zips):
    run("cityscapes", root, "--from", *cityscapes_zips)
    before = snapshot(root)
    cut = root / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-9])
    assert run("cityscapes", root, "--from", *cityscapes_zips) == 0
    assert cut.read_bytes() == whole
    assert {path for path, state in snapshot(root).items() if state != before[path]} == {str(cut)}


def test_of_two_sources_the_first_counts(root, cityscapes_zips, tmp_path):
    first, second = tmp_path / "gtFine/train/aachen", tmp_path / "second/gtFine/train/aachen"
    for folder, text in (first, "first"), (second, "the second"):
        folder.mkdir(parents=True)
        (folder / "aachen_9_gtFine_labelIds.png").write_text(text)
    assert run("cityscapes", root, "--from", first, second, *cityscapes_zips) == 0
    assert (root / "gtFine/train/aachen/aachen_9_gtFine_labelIds.png").read_text() == "first"


@pytest.mark.parametrize("given", [0, 1])
def test_the_error_names_the_archive_that_is_missing(root, cityscapes_zips, given, capsys):
    assert run("cityscapes", root, "--from", cityscapes_zips[given]) == 2
    assert cityscapes_zips[1 - given].name in error_line(capsys)


@pytest.mark.parametrize("ending", ["zip", "tar"])
@pytest.mark.parametrize("start", ["../", "x/../../", "/"])
def test_a_member_that_would_leave_the_root_is_refused(root, tmp_path, ending, start, capsys):
    evil, name = tmp_path / f"evil.{ending}", f"{start}leftImg8bit/train/aachen/aachen_0_leftImg8bit.png"
    if ending == "zip":
        with zipfile.ZipFile(evil, "w") as target:
            target.writestr(name, b"evil")
    else:
        with tarfile.open(evil, "w") as target:
            member = tarfile.TarInfo(name)
            member.size = 4
            target.addfile(member, io.BytesIO(b"evil"))
    assert run("cityscapes", root, "--from", evil) == 2
    assert repr(name) in error_line(capsys)
    assert files(tmp_path) == {evil.name}


def test_a_damaged_member_is_named(root, cityscapes_zips, capsys):
    with zipfile.ZipFile(cityscapes_zips[0]) as target:
        member = next(m for m in target.infolist() if "/train/" in m.filename)
    content = bytearray(cityscapes_zips[0].read_bytes())
    content[member.header_offset + 200] ^= 255
    cityscapes_zips[0].write_bytes(content)
    assert run("cityscapes", root, "--from", *cityscapes_zips) == 2
    assert member.filename in error_line(capsys)
    assert not (root / member.filename).exists()


# ACDC


@pytest.fixture
def acdc_files(tmp_path) -> Path:
    """database/ as the official archive nests it: 2 exams in training, 1 in testing, whole series and a Mac's junk."""
    database = make_acdc(tmp_path / "database", 3, 3)
    (database / "testing").mkdir()
    shutil.move(database / "training" / "patient003", database / "testing")
    for exam in database.glob("*/patient*"):
        write_volume(exam / f"{exam.name}_4d.nii.gz", np.zeros((4, 4, 2, 3), np.int16))
        (exam / "MANDATORY_CITATION.md").write_text("cite")
        for folder in exam, database / "__MACOSX" / "ACDC" / "database" / exam.relative_to(database):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"._{exam.name}_frame01.nii.gz").write_bytes(b"Mac OS X")
            (folder / "._Info.cfg").write_bytes(b"Mac OS X")
    return database


ACDC_FILES = {
    f"{exam}/{name}"
    for exam in ("training/patient001", "training/patient002", "testing/patient003")
    for name in (
        "Info.cfg",
        "MANDATORY_CITATION.md",
        *(f"{exam[-10:]}_frame{frame}{gt}.nii.gz" for frame in ("01", "12") for gt in ("", "_gt")),
    )
}


def test_of_acdc_the_frames_that_count_are_taken_from_the_nested_archive(root, acdc_files, tmp_path):
    assert run("acdc", root, "--from", archive(acdc_files, tmp_path / "ACDC.zip", "ACDC/database/")) == 0
    assert files(root) == ACDC_FILES
    assert len(found_by_main("acdc", root)) == 12  # 2 exams, 2 frames, 3 slices


@pytest.mark.parametrize("given", [".", "training"])
def test_acdc_is_taken_from_a_folder(root, acdc_files, given):
    assert run("acdc", root, "--from", acdc_files / given) == 0
    assert files(root) == {name for name in ACDC_FILES if given == "." or name.startswith(given)}


def test_acdc_that_was_unpacked_too_deep_is_put_right(root, acdc_files):
    root.mkdir()
    shutil.move(acdc_files, root / "ACDC" / "database")
    assert run("acdc", root) == 0
    assert files(root) >= ACDC_FILES


# All of them


@pytest.fixture(params=["voc", "cityscapes", "acdc"])
def prepared(request, root, tmp_path) -> tuple[str, Path, list[Path]]:
    """A dataset that was prepared from archives: its name, its root, the archives."""
    if request.param == "acdc":
        folder = request.getfixturevalue("acdc_files")
        archives = [archive(folder, tmp_path / "ACDC.zip", "ACDC/database/")]
    else:
        archives = [*request.getfixturevalue({"voc": "voc_archives"}.get(request.param, "cityscapes_zips"))]
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
    lost = max(p for p in root.rglob("*") if re.search(r"Aug/|labelIds|_gt\.", p.relative_to(root).as_posix()))
    lost.unlink()  # and preparing would bring it back
    before = snapshot(root)
    assert run(dataset, root, "--verify") == 2
    assert lost.name in error_line(capsys)
    assert snapshot(root) == before


def test_workers_find_the_same(prepared, capsys):
    dataset, root, _ = prepared
    capsys.readouterr()
    said = [(run(dataset, root, "--verify", "--workers", n), capsys.readouterr()) for n in (0, 2)]
    assert said[0] == said[1]


# What verifying says


def truncate(voc_home: Path) -> str:
    path = voc_home / "JPEGImages" / "2007_000001.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    return f"{path}: image file is truncated"


def shrink(voc_home: Path) -> str:
    path = voc_home / "SegmentationClassAug" / "2007_000001.png"
    write_indexed(path, np.zeros((26, 17)))
    return f"{path}: 17x26 pixels, but its image has 18x26"


def mislabel(voc_home: Path) -> str:
    path = voc_home / "SegmentationClassAug" / "2007_000002.png"  # of val
    write_indexed(path, np.full((20, 28), 21))
    return f"{path}: label 21 is out of range"


@pytest.mark.parametrize("damage", [truncate, shrink, mislabel])
def test_a_bad_file_is_one_error_line(root, damage, capsys):
    expected = damage(make_voc(root, 2) / "VOCdevkit" / "VOC2012")
    assert run("voc", root, "--verify") == 2
    line = error_line(capsys)
    assert line.startswith("error: bad files, to be replaced (1): ")
    assert expected in line


def test_of_many_bad_files_ten_are_named(root, capsys):
    home = make_voc(root, 12) / "VOCdevkit" / "VOC2012"
    for mask in (home / "SegmentationClassAug").iterdir():
        mask.unlink()
    assert run("voc", root, "--verify") == 2
    line = error_line(capsys)
    assert "(13): " in line
    assert line.count("No such file") == 10
    assert "and 3 more" in line


def test_counts_and_shares_are_those_of_the_files(root, capsys):
    home = make_voc(root, 1) / "VOCdevkit" / "VOC2012"
    mask = np.full((20, 28), 255)
    mask[:10] = 0
    mask[:10, :7] = 15  # 70 of the 280 pixels that count, of 560
    write_indexed(home / "SegmentationClassAug" / "2007_000000.png", mask)
    assert run("voc", root, "--verify") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["voc", "in", str(root)]
    assert lines[1] == ["train", "1", "of", "10,582", "images"]
    assert lines[2][:5] == ["val", "1", "of", "1,449", "images"]
    shares = {line[0]: line[-2] for line in lines if len(line) > 2}
    assert (shares["background"], shares["person"], shares["cat"], shares["void,"]) == ("75.00", "25.00", "-", "50.00")
    assert "every image and mask can be used; not of the official size: train, val" in " ".join(map(" ".join, lines))


def test_pixels_of_cityscapes_void_class_do_not_count(root, capsys):
    make_cityscapes(root, 1, 0)
    road, bicycle, void = [7] * 17, [33] * 8, [0, 1, 2, 3, 4, 5, 6, 9, 10]
    mask = np.repeat([road + bicycle + void], 16, 0).astype(np.uint8)
    Image.fromarray(mask).save(next(root.glob("gtFine/train/*/*_labelIds.png")))
    assert run("cityscapes", root, "--verify") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = {line[0]: line[-1] for line in lines if line}
    assert (shares["road"], shares["bicycle"], shares["void,"]) == ("68.00", "32.00", "26.47")  # of 25, of 34


def test_exams_are_counted_and_a_missing_part_is_said(root, capsys):
    make_acdc(root, 2, 3)
    assert run("acdc", root, "--verify") == 0
    said = capsys.readouterr().out
    assert "train      2 of 100 exams, 12 slices\n" in said
    assert "test       0 of 50 exams   (read with --split standard alone)\n" in said


def test_the_official_number_is_complete(root, monkeypatch, capsys):
    make_cityscapes(root, 2, 1)
    toml = root / "cityscapes.toml"
    toml.write_text((data_utils.CONFIG / "cityscapes.toml").read_text().replace("[2975, 500]", "[2, 1]"))
    tool.verify(data_utils.load_spec(str(toml)), root, 0)
    assert "every image and mask can be used; complete\n" in capsys.readouterr().out


def test_what_no_paper_split_could_train_on_is_not_usable(root, acdc_files, capsys):
    root.mkdir()
    shutil.move(acdc_files / "testing", root)
    assert run("acdc", root, "--verify") == 2
    assert str(root) in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["voc", "--verify", "--download"], ["--verify", "--download"]),
        (["voc", "--verify", "--from", "x.zip"], ["--verify", "--from"]),
        (["cityscapes", "--download"], ["--download", "gtFine_trainvaltest.zip"]),
        (["acdc", "--from", "nowhere.zip"], ["nowhere.zip", "No such file"]),
        (["acdc", "--from", "text.zip"], ["text.zip", "neither"]),
        (["acdc", "--root", "text.zip"], ["--root", "text.zip"]),
        (["acdc"], ["data/acdc", "the ACDC archive"]),
        (["acdc", "--verify"], ["data/acdc", "no such folder"]),
        (["phantom"], ["phantom", "cityscapes"]),
        (["acdc", "--worker", "1"], ["--worker"]),
    ],
)
def test_wrong_flags_and_sources_are_one_error_line(tmp_path, monkeypatch, flags, words, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.zip").write_text("not a zip")
    assert prepare(flags) == 2
    line = error_line(capsys)
    assert all(word in line for word in words), line


def test_the_command_ends_with_the_exit_code(root, monkeypatch, capsys):
    make_acdc(root, 1, 1)
    for argv, code in (["acdc", "--verify", "--root", str(root), "--workers", "0"], 0), (["acdc", "--unknown"], 2):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(tool.__file__, run_name="__main__")
        assert end.value.code == code
