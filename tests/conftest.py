"""Miniature datasets in the real layouts of Section 4.1, drawn from fixed seeds.

Each make_... function returns the dataset's root.
"""

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: more threads slow such small networks down

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SIMPLE, SUPERVISED, Program

import main
from datasets import files
from datasets.spec import CONFIG, DatasetSpec, Sample, make_spec
from engine.signals import stop
from utils import InputError

# axes turned and flipped
ACDC_AFFINE = np.array([[-1.4, 0.3, 0, 9], [0.2, 0, -9.8, -7], [0, -1.3, 0.5, 3], [0, 0, 0, 1]])
TABLE = {
    "layout": "voc",
    "classes": ["sky", "tree", "cat"],
    "palette": [[0, 0, 255], [0, 128, 0], [128, 0, 0]],
    "scored": [1, 2],
}


def toy_spec(**changes) -> DatasetSpec:
    """The dataset of TABLE, with some keys changed."""
    return make_spec({"name": "toy", **TABLE, **changes}, "toy.toml")


def folder_spec(**changes) -> DatasetSpec:
    """A description of what make_folder draws."""
    table = {"name": "own", "layout": "folder", "classes": ["dark", "bright"]}
    return make_spec({**table, **changes}, "own.toml")


def error_of(function, *args) -> str:
    """The message, one line, of the InputError that a call must raise."""
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made_up(n: int, group_of=str) -> list[Sample]:
    """n samples that no file stands behind; by default each is its own group."""
    return [Sample(f"{i:05d}", group_of(i), i, i, "train") for i in range(n)]


def read_errors(samples: list[Sample], spec: DatasetSpec) -> list[str]:
    """The messages of all samples that cannot be read, each once."""
    messages = []
    for sample in samples:
        try:
            files.read_sample(sample, spec)
        except InputError as error:
            messages.append(str(error))
    return list(dict.fromkeys(messages))


def write_indexed(path: Path, values: np.ndarray) -> None:
    """A palette PNG with VOC's first colors; 255 is drawn in VOC's void."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(
        [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128] + [0] * 750 + [224, 224, 192]
    )
    image.save(path)


def picture_sample(folder: Path, image: np.ndarray, mask: np.ndarray) -> Sample:
    """A picture and its mask as PNGs in a folder."""
    Image.fromarray(image).save(folder / "image.png")
    write_indexed(folder / "mask.png", mask)
    return Sample("a", "a", folder / "image.png", folder / "mask.png")


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray = ACDC_AFFINE) -> None:
    """A compressed NIfTI file in the array's own type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, affine, dtype=volume.dtype), path)


def make_voc(root: Path, n: int) -> Path:
    """VOCdevkit/VOC2012 under root: n ids in train_aug.txt, one in val.txt.

    Images have two shapes; masks hold all 21 classes and 255.
    """
    home = root / "VOCdevkit" / "VOC2012"
    ids = [f"2007_{number:06d}" for number in range(n + 1)]
    for number, name in enumerate(ids):
        rng = np.random.default_rng(number)
        height, width = ((20, 28), (26, 18))[number % 2]
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        mask = rng.integers(0, 21, (height, width))
        mask[:, -2:] = 255
        (home / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(home / "JPEGImages" / f"{name}.jpg")
        write_indexed(home / "SegmentationClassAug" / f"{name}.png", mask)
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train_aug.txt").write_text("".join(f"{name}\n" for name in ids[:n]))
    (lists / "val.txt").write_text(f"{ids[n]}\n")
    return root


def make_cityscapes(root: Path, n_train: int, n_val: int) -> Path:
    """leftImg8bit and gtFine under root: train in aachen, val in frankfurt.

    Images are 34x16; masks hold every labelId from 0 to 33.
    """
    for part, city, n in ("train", "aachen", n_train), ("val", "frankfurt", n_val):
        images, masks = root / "leftImg8bit" / part / city, root / "gtFine" / part / city
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(n):
            rng, name = np.random.default_rng(number), f"{city}_{number:06d}_000019"
            image = rng.integers(0, 256, (16, 34, 3), np.uint8)
            mask = np.tile(np.arange(34, dtype=np.uint8), (16, 1))
            Image.fromarray(image).save(images / f"{name}_leftImg8bit.png")
            Image.fromarray(np.roll(mask, number, 1)).save(masks / f"{name}_gtFine_labelIds.png")
            Image.fromarray(image).save(masks / f"{name}_gtFine_color.png")  # never read
    return root


def make_acdc(root: Path, n_exams: int, depth: int) -> Path:
    """training/patientNNN under root: ED is frame 1, ES frame 12.

    Volumes have `depth` slices of 18x14 with all four classes. As in ACDC, file types differ
    between exams: int16 images with float32 masks, float32 images with uint8 masks.
    """
    for number in range(1, n_exams + 1):
        exam, rng = root / "training" / f"patient{number:03d}", np.random.default_rng(number)
        exam.mkdir(parents=True)
        info = "ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        (exam / "Info.cfg").write_text(info)
        image_type, mask_type = ((np.float32, np.uint8), (np.int16, np.float32))[number % 2]
        for frame in 1, 12:
            image = rng.integers(0, 4032, (18, 14, depth))
            mask = rng.integers(0, 4, (18, 14, depth))
            write_volume(exam / f"{exam.name}_frame{frame:02d}.nii.gz", image.astype(image_type))
            write_volume(exam / f"{exam.name}_frame{frame:02d}_gt.nii.gz", mask.astype(mask_type))
    return root


def add_acdc_testing(root: Path, n: int) -> Path:
    """n exams of two slices in testing/, numbered from 3."""
    (root / "testing").mkdir()
    for number in range(3, 3 + n):
        name = f"patient{number:03d}"
        exam = make_acdc(root / "more" / name, number, 2) / "training" / name
        exam.rename(root / "testing" / name)
    return root


def make_folder(
    root: Path, n: int, n_unlabeled: int = 0, n_val: int = 0, ending: str = ".png"
) -> Path:
    """images/ and masks/, optionally unlabeled/ and val/: 24x20 pictures.

    A mask is 1 where the picture's red is bright.
    """
    for number in range(n + n_unlabeled + n_val):
        folder = "" if number < n else "unlabeled" if number < n + n_unlabeled else "val"
        images = root / folder if folder == "unlabeled" else root / folder / "images"
        image = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        images.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(images / f"picture {number}{ending}")
        if folder != "unlabeled":
            write_indexed(root / folder / "masks" / f"picture {number}.png", image[..., 0] > 127)
    return root


def same(a, b) -> bool:
    """Whether two nested values of a checkpoint are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def make_tiny(n_train: int, n_val: int) -> None:
    """tiny.toml in the working folder: phantoms, with no settings but the parser's."""
    phantom = (CONFIG / "phantom.toml").read_text()
    table = phantom.split("[dataset]")[1].replace("[160, 40]", f"[{n_train}, {n_val}]")
    Path("tiny.toml").write_text(f"[dataset]{table}")


@pytest.fixture
def voc(tmp_path) -> Path:
    return make_voc(tmp_path / "voc", 4)


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    return make_cityscapes(tmp_path / "cityscapes", 4, 2)


@pytest.fixture
def acdc(tmp_path) -> Path:
    return make_acdc(tmp_path / "acdc", 2, 3)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Iterator[None]:
    """A working folder of the test's own, with tiny.toml: 24 phantoms, 20 of them to train on.

    Programs that a failed test leaves running are killed: Python would wait for them at its end.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stop, "signum", 0)
    make_tiny(20, 4)
    yield
    for child in multiprocessing.active_children():
        if isinstance(child, Program):
            child.kill()
            child.join()


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """A folder where a supervised run of one epoch has ended."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        make_tiny(20, 4)
        assert main.main(["--training", *SUPERVISED]) == 0
    return folder


@pytest.fixture
def trained(trained_once, in_tmp) -> Path:
    """The best.pt of a supervised run of one epoch, copied to the working folder."""
    shutil.copytree(trained_once, ".", dirs_exist_ok=True)
    return SIMPLE / "best.pt"
