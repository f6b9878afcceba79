"""Data (Section 4.1): dataset descriptions, layouts on disk, the paper's splits, the decoded cache, batches.

A dataset is a TOML's [dataset] table (DatasetSpec); a layout finds its samples; split() divides them; open_cache()
decodes and resizes every image once; Epoch and Stored hand them out as uint8 or float32, and normalize() brings them
to the networks' range on the device. Masks hold class indices, IGNORE where a pixel does not count.
"""

import glob
import gzip
import hashlib
import inspect
import json
import os
import shutil
import signal
import socket
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

import utils
from utils import IGNORE, InputError, first_ten

CONFIG = Path(__file__).parent / "config"
PARTS = ["train", "val", "test"]
SPLITS = ["paper", "standard", "image"]

# Descriptions


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset as its TOML describes it; the field names are the keys of the [dataset] table."""

    name: str
    layout: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB, a triple a class
    scored: tuple[int, ...]  # classes that the mean IoU takes
    channels: int = 3
    ignore: int = IGNORE  # value in the mask files of a pixel that does not count
    void: int | None = None  # a class that is trained, but whose pixels the evaluation skips
    label_ids: tuple[int, ...] | None = None  # value in the mask files of class 0, 1, ...; without it the index
    void_ids: tuple[int, ...] = ()  # values in the mask files that become the void class
    pool: tuple[str, ...] = ("train",)  # parts of the layout that the paper's split divides
    counts: tuple[int, int] | None = None  # groups to train on, to validate; without it 85 % and 15 %
    standard: tuple[str, str] | None = None  # the parts that other papers train on and validate on
    standard_counts: tuple[int, int] | None = None  # their groups

    def lookup(self) -> np.ndarray:
        """(256,) int16: the class of each value of a mask file, IGNORE, or -1 where the value is not legal."""
        table = np.full(256, -1, np.int16)
        table[self.ignore] = IGNORE
        ids = range(len(self.classes)) if self.label_ids is None else self.label_ids
        table[list(ids)] = np.arange(len(ids))
        table[list(self.void_ids)] = -1 if self.void is None else self.void
        return table

    def file_values(self) -> np.ndarray:
        """(K,) uint8: each class's value in the mask files, the first one of void."""
        return np.array([np.flatnonzero(self.lookup() == k)[0] for k in range(len(self.classes))], np.uint8)


class Slice(NamedTuple):
    """One short-axis slice of a NIfTI volume."""

    path: Path
    z: int


@dataclass(frozen=True)
class Sample:
    """An image and its mask, not yet read. `image` may also be the number of a phantom, which is drawn."""

    id: str
    group: str  # what no split may divide: the exam in ACDC, else the image itself
    image: Path | Slice | int
    mask: Path | Slice | None
    part: str | None = None  # train, val or test where the layout says so


def read_toml(path: Path) -> dict:
    """A TOML file's tables; InputError with the line where it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error


def dataset_toml(name_or_toml: str) -> Path:
    """The TOML file that --dataset means: a name in config/, or a path that ends in .toml."""
    path = Path(name_or_toml) if name_or_toml.endswith(".toml") else CONFIG / f"{name_or_toml}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in CONFIG.glob("*.toml") if "dataset" in read_toml(p))
        raise InputError(f"--dataset {name_or_toml}: no such dataset; give one of {', '.join(known)} or a .toml file")
    return path


def load_spec(name_or_toml: str) -> DatasetSpec:
    """The dataset of config/NAME.toml or of a TOML file; its name is the file's stem unless [dataset] says another."""
    path = dataset_toml(str(name_or_toml))
    table = read_toml(path).get("dataset")
    if not isinstance(table, dict):
        raise InputError(f"{path}: has no [dataset] table")
    return make_spec({"name": path.stem, **table}, str(path))


def make_spec(table: dict, source: str) -> DatasetSpec:
    """A DatasetSpec from a [dataset] table; InputError that names `source` and the key where one is wrong."""
    known = [field.name for field in fields(DatasetSpec)]
    if unknown := [key for key in table if key not in known]:
        raise InputError(f"{source}: [dataset] unknown key {unknown[0]!r}; expected {', '.join(known)}")
    if missing := [key for key in ("layout", "classes") if key not in table]:
        raise InputError(f"{source}: [dataset] lacks {missing[0]!r}")
    k = len(table["classes"]) if isinstance(table["classes"], (list, tuple)) else 0
    table = {"palette": utils.voc_palette(k), "scored": list(range(k)), **table}

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value

    def ints(values, low: int, below: int) -> bool:
        return isinstance(values, tuple) and all(type(v) is int and low <= v < below for v in values)

    spec = DatasetSpec(**{key: frozen(value) for key, value in table.items()})
    names = spec.classes if isinstance(spec.classes, tuple) else ()
    colours = spec.palette if isinstance(spec.palette, tuple) else ()
    ids, void_ids = spec.label_ids, spec.void_ids
    if ids is None:
        ids = tuple(range(k - bool(void_ids)))
    legal = {
        "name": (type(spec.name) is str and Path(spec.name).name == spec.name, "a name without slashes"),
        "layout": (spec.layout in list(LAYOUTS), f"one of {', '.join(LAYOUTS)}"),
        "classes": (2 <= k < IGNORE and all(type(c) is str for c in names) and len({*names}) == k, "2 to 254 names"),
        "palette": (len(colours) == k and all(ints(c, 0, 256) and len(c) == 3 for c in colours), f"{k} RGB triples"),
        "scored": (
            ints(spec.scored, 0, k) and 0 < len(spec.scored) == len({*spec.scored}),
            f"indices from 0 to {k - 1}",
        ),
        "channels": (ints((spec.channels,), 1, 4) and spec.channels != 2, "1 or 3"),
        "ignore": (ints((spec.ignore,), 0, 256), "a value from 0 to 255"),
        "void": (spec.void is None or ints((spec.void,), 0, k), f"a class index from 0 to {k - 1}"),
        "label_ids": (ints(ids, 0, 256) and len({*ids}) == len(ids) == k - bool(void_ids), "a value a class"),
        "void_ids": (
            ints(void_ids, 0, 256) and not (void_ids and spec.void != k - 1),
            "values, where void is the last class",
        ),
        "pool": (
            isinstance(spec.pool, tuple) and spec.pool != () and all(p in PARTS for p in spec.pool),
            f"some of {PARTS}",
        ),
        "standard": (
            spec.standard is None
            or (isinstance(spec.standard, tuple) and len({*spec.standard} & {*PARTS}) == len(spec.standard) == 2),
            f"two of {PARTS}",
        ),
    }
    for key in "counts", "standard_counts":
        counts = getattr(spec, key)
        legal[key] = counts is None or (ints(counts, 1, 2**31) and len(counts) == 2), "two counts"
    for key, (holds, expected) in legal.items():
        if not holds:
            raise InputError(f"{source}: [dataset] {key} is {table.get(key)!r}; expected {expected}")
    if {*ids} & {*void_ids} or spec.ignore in {*ids, *void_ids} or spec.void in spec.scored:
        raise InputError(f"{source}: [dataset] a value means two things: see label_ids, void_ids, ignore, void, scored")
    return spec


# Layouts: index(spec, root) -> list[Sample]. Files are looked into when they are decoded.


def index_voc(spec: DatasetSpec, root: Path) -> list[Sample]:
    """VOC2012, or a folder above it: train_aug.txt (part train), val.txt (part val), masks in SegmentationClassAug."""
    homes = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    home = next((h for h in homes if (h / "ImageSets" / "Segmentation").is_dir()), None)
    if home is None:
        raise InputError(f"{root}: holds no VOC2012 (a folder with ImageSets/Segmentation); point --data-root at it")
    samples = []
    for part, file in ("train", "train_aug.txt"), ("val", "val.txt"):
        path = home / "ImageSets" / "Segmentation" / file
        if not path.is_file():
            if part in spec.pool:
                raise InputError(f"{path}: no such file; it lists the ids to train on, one a line")
            continue
        with naming(path):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        ids = [line.strip() for line in lines if line.strip()]
        if not ids and part in spec.pool:
            raise InputError(f"{path}: lists no image")
        if wrong := [repr(name) for name in ids if Path(name).name != name or name == ".." or not name.isprintable()]:
            raise InputError(f"{path}: expected ids, file names without folder and ending: {first_ten(wrong)}")
        images, masks = home / "JPEGImages", home / "SegmentationClassAug"
        samples += [Sample(i, i, images / f"{i}.jpg", masks / f"{i}.png", part) for i in ids]
    return samples


def index_cityscapes(spec: DatasetSpec, root: Path) -> list[Sample]:
    """leftImg8bit/{train,val}/CITY/ID_leftImg8bit.png with gtFine/{train,val}/CITY/ID_gtFine_labelIds.png."""
    samples = []
    for part in "train", "val":
        for image in sorted((root / "leftImg8bit" / part).glob("*/*")):
            name, ending = image.name[: -len("_leftImg8bit.png")], image.name[-len("_leftImg8bit.png") :]
            if ending.lower() != "_leftimg8bit.png":
                continue
            mask = root / "gtFine" / part / image.parent.name / f"{name}_gtFine_labelIds.png"
            samples.append(Sample(name, name, image, mask, part))
    return samples


def index_acdc(spec: DatasetSpec, root: Path) -> list[Sample]:
    """training/ and testing/ with patientNNN/patientNNN_frameMM.nii.gz and _gt: ED and ES, a sample a slice."""
    samples, problems = [], []
    for part, folder in ("train", "training"), ("test", "testing"):
        for exam in sorted(p for p in (root / folder).glob("*") if p.name.lower().startswith("patient")):
            try:
                lines = (exam / "Info.cfg").read_text().splitlines()
                info = dict(line.split(":", 1) for line in lines if ":" in line)
                frames = [int(info["ED"]), int(info["ES"])]
            except (OSError, KeyError, ValueError) as error:
                problems.append(f"{exam / 'Info.cfg'}: expected lines 'ED: frame' and 'ES: frame' ({error!r})")
                continue
            for frame in frames:
                name = f"{exam.name}_frame{frame:02d}"
                image, mask = exam / f"{name}.nii.gz", exam / f"{name}_gt.nii.gz"
                samples += slices(name, exam.name, image, mask, part)
    if problems:
        raise InputError(first_ten(problems))
    return samples


def slices(name: str, group: str, image: Path, mask: Path | None, part: str) -> list[Sample]:
    """A sample a slice of a NIfTI volume and of its mask."""
    try:
        depth = max(1, nibabel.load(image).shape[2])
    except Exception:  # whatever a broken file raises: decoding it tells what is wrong
        depth = 1
    masks = [None if mask is None else Slice(mask, z) for z in range(depth)]
    return [Sample(f"{name}_s{z:02d}", group, Slice(image, z), masks[z], part) for z in range(depth)]


def index_folder(spec: DatasetSpec, root: Path) -> list[Sample]:
    """images/ and masks/ by stem, and where they are there unlabeled/, val/images and val/masks.

    Files are pictures or NIfTI volumes, of which each slice is a sample. Images without a mask are unlabeled.
    """
    samples, problems = [], []

    def by_stem(folder: Path) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            stem = file.name.removesuffix(".nii.gz").removesuffix(".nii") if is_volume(file) else file.stem
            if file.name.startswith("."):
                continue
            if file.is_dir() or not (is_volume(file) or file.suffix.lower() in Image.registered_extensions()):
                problems.append(f"{file}: neither a picture nor a NIfTI volume")
            elif stem in files:
                problems.append(f"{file}: {files[stem].name} has the same stem")
            else:
                files[stem] = file
        return files

    places = ("train", "images", "masks"), ("train", "unlabeled", "none"), ("val", "val/images", "val/masks")
    for part, images, masks in places:
        found, truths = by_stem(root / images), by_stem(root / masks) if masks != "none" else {}
        problems += [f"{file}: has no image in {root / images}" for stem, file in truths.items() if stem not in found]
        for stem, image in found.items():
            mask = truths.get(stem)
            if part == "val" and mask is None:
                problems.append(f"{image}: has no mask in {root / masks}")
            elif mask and is_volume(image) != is_volume(mask):
                problems.append(f"{mask}: image and mask must both be volumes or both be pictures")
            elif is_volume(image):
                samples += slices(stem, stem, image, mask, part)
            else:
                samples.append(Sample(stem, stem, image, mask, part))
    if problems:
        raise InputError(first_ten(problems))
    return samples


def is_volume(path: Path) -> bool:
    """Whether its name says that a file is a NIfTI volume."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def index_phantom(spec: DatasetSpec, root: Path) -> list[Sample]:
    """As many phantoms as `counts` says, drawn by number."""
    names = [f"phantom_{number:04d}" for number in range(sum(spec.counts or (160, 40)))]
    return [Sample(name, name, number, number, "train") for number, name in enumerate(names)]


LAYOUTS = {
    "voc": index_voc,
    "cityscapes": index_cityscapes,
    "acdc": index_acdc,
    "folder": index_folder,
    "phantom": index_phantom,
}


def parts_of(spec: DatasetSpec, kind: str) -> tuple[str, ...]:
    """The parts of the layout that a kind of split takes."""
    if spec.layout == "folder":
        return "train", "val"
    if kind != "standard":
        return spec.pool
    if spec.standard is None:
        raise InputError(f"--split standard: {spec.name} has no such split; its [dataset] table lacks 'standard'")
    return spec.standard


def index(spec: DatasetSpec, root: Path, kind: str = "paper") -> list[Sample]:
    """The samples under root that a kind of split takes, sorted by id; InputError where there are none."""
    if spec.layout != "phantom" and not root.is_dir():
        raise InputError(f"--data-root {root}: no such folder; it must hold {spec.name} as README.md lays it out")
    samples = [s for s in LAYOUTS[spec.layout](spec, root) if s.part in parts_of(spec, kind)]
    if not samples:
        raise InputError(
            f"--data-root {root}: holds no image in the layout {spec.layout!r}; README.md shows how files must lie"
        )
    counts = Counter(sample.id for sample in samples)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise InputError(f"--data-root {root}: ids that stand twice: {first_ten(twice)}")
    return sorted(samples, key=lambda sample: sample.id)


# Splits


@dataclass(frozen=True)
class Split:
    """Which samples are trained on with and without their mask, and which are validated on; each sorted by id."""

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    val: tuple[Sample, ...]

    def ids(self) -> dict[str, list[str]]:
        """The ids by role."""
        return {role: [s.id for s in getattr(self, role)] for role in ("labeled", "unlabeled", "val")}

    def hash(self) -> str:
        """A digest of the ids by role: equal splits have equal hashes."""
        return hashlib.sha256(json.dumps(self.ids()).encode()).hexdigest()[:16]


def split(
    samples: list[Sample], ratio: float, seed: int, spec: DatasetSpec, kind: str = "paper", label_unit: str = "image"
) -> Split:
    """Training samples, `ratio` of them labeled, and validation samples, by one of three kinds of split.

    "paper" (Section 4.1): spec.counts groups to train on and to validate, or their proportions where there are fewer
    groups; no group is on both sides. "image": the released code's 85 % and 15 % of single images, whichever exam they
    are of. "standard": the parts of the layout that other papers train on and validate on. Where a "folder" has a
    val/, that is what is validated on.

    The validation set and the order in which samples get labels depend on the seed alone, so a smaller labeled set is
    part of a larger one. `ratio` counts training samples that have a mask, one by one ("image") or as whole groups
    ("exam"); samples without a mask are always unlabeled.
    """
    taken = parts_of(spec, kind)
    samples = sorted((s for s in samples if s.part is None or s.part in taken), key=lambda s: s.id)
    rng = np.random.default_rng(seed)
    if kind == "standard" or (spec.layout == "folder" and kind == "paper" and any(s.part == "val" for s in samples)):
        val = {s for s in samples if s.part == taken[1] and s.mask is not None}
        if not val:
            raise InputError(f"--split standard: {spec.name}'s part {taken[1]!r} is not there; see README.md")
        train = [s for s in samples if s.part == taken[0]]
    else:
        n_train, n_val = spec.counts if spec.counts and kind == "paper" else (85, 15)
        units = [s.group if kind == "paper" else s.id for s in samples]
        known = sorted({unit for unit, s in zip(units, samples, strict=True) if s.mask is not None})
        held_out = max(1, round(len(known) * n_val / (n_train + n_val)))
        val_units = {known[i] for i in rng.permutation(len(known))[:held_out]}
        val = {s for unit, s in zip(units, samples, strict=True) if unit in val_units}
        train = [s for s in samples if s not in val]

    def unit(sample: Sample) -> str:
        return sample.group if label_unit == "exam" else sample.id

    masked = sorted({unit(s) for s in train if s.mask is not None})
    n_labeled = round(ratio * len(masked))
    if not n_labeled:
        raise InputError(f"--ratio {ratio:g} of {len(masked)} training {label_unit}s leaves no labeled {label_unit}")
    chosen = {masked[i] for i in rng.permutation(len(masked))[:n_labeled]}
    labeled = {s for s in train if s.mask is not None and unit(s) in chosen}
    return Split(
        tuple(s for s in train if s in labeled),
        tuple(s for s in train if s not in labeled),
        tuple(s for s in samples if s in val),
    )


# Reading files


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: {str(reason) or type(error).__name__}".splitlines()[0]) from error


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose checksums hold, where its format has them; InputError that names it."""
    with naming(path):
        with Image.open(path) as image:
            image.verify()  # all of a PNG's, while decoding stops at the last pixel
        with Image.open(path) as image:
            yield image


def is_deep(image: Image.Image) -> bool:
    """Whether a picture's grey values need more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def as_array(image: Image.Image, channels: int) -> np.ndarray:
    """A picture of any mode as (H, W) or (H, W, 3) uint8, a deep one as (H, W) float32."""
    if not is_deep(image):
        return np.array(image.convert("L" if channels == 1 else "RGB"))
    values = np.array(image, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    return values


def read_image(path: Path, channels: int, deep: bool = False) -> np.ndarray:
    """An 8-bit picture as (H, W) or (H, W, 3) uint8; with `deep` also one of more bits, as (H, W) float32."""
    with opened(path) as image:
        if deep and is_deep(image):
            return as_array(image, channels)
        raw = " of 16 bits" if ";16" in str([tile[-1] for tile in image.tile]) else ""  # Pillow would make 8 of them
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") or raw:
            raise InputError(f"{path}: mode {image.mode}{raw}: expected an 8-bit grey or RGB image")
        return as_array(image, channels)


def read_mask(path: Path) -> np.ndarray:
    """An indexed or grey 8-bit PNG as (H, W) uint8."""
    with opened(path) as image:
        if image.mode not in ("L", "P"):
            raise InputError(f"{path}: mode {image.mode}: a mask must be an indexed or grey 8-bit PNG of class indices")
        return np.array(image)


@lru_cache(maxsize=4)
def read_volume(path: Path) -> np.ndarray:
    """A NIfTI volume (X, Y, Z) as it is stored; neighbouring samples are slices of the same one."""
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            while stream.read(2**20):  # to its end, where the checksum is, which nibabel does not reach
                pass
    volume = np.asanyarray(nibabel.load(path).dataobj)
    if volume.ndim != 3 or volume.dtype.kind not in "uif":
        raise InputError(f"{path}: shape {volume.shape} of {volume.dtype}: expected a volume (X, Y, Z) of numbers")
    return volume


def read_slice(source: Slice) -> np.ndarray:
    """One slice of a volume as rows and columns, (Y, X) in the file's own type."""
    with naming(source.path):
        volume = read_volume(source.path)
        if source.z >= volume.shape[2]:
            raise InputError(f"{source.path}: has {volume.shape[2]} slices; slice {source.z} is missing")
        pixels = volume[:, :, source.z].T
        with np.errstate(over="ignore"):
            finite = np.isfinite(pixels.astype(np.float32))
        if not finite.all():
            raise InputError(f"{source.path}: slice {source.z} holds values that are no finite float32")
        return pixels


def as_pixels(image: np.ndarray, channels: int) -> Tensor:
    """(H, W) or (H, W, 3) to (C, H, W); a grey image becomes `channels` equal ones."""
    pixels = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
    return pixels.expand(channels, -1, -1)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (C, H, W) at the networks' size, bilinearly."""
    return transforms.resize(pixels, list(size), transforms.InterpolationMode.BILINEAR, antialias=True)


def read_sample(sample: Sample, spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Read and check a sample: image (H, W) or (H, W, 3) uint8 or float32, mask (H, W) uint8 of class indices.

    Raises InputError that names the file.
    """
    if isinstance(sample.image, int):
        image, values = draw_phantom(sample.image)
    elif isinstance(sample.image, Slice):
        image = read_slice(sample.image).astype(np.float32)
        values = None if sample.mask is None else read_slice(sample.mask)
        if values is not None and read_volume(sample.mask.path).shape[2] != read_volume(sample.image.path).shape[2]:
            raise InputError(f"{sample.mask.path}: has another number of slices than its image")
    else:
        image = read_image(sample.image, spec.channels, deep=spec.layout == "folder")
        values = None if sample.mask is None else read_mask(sample.mask)

    mask_file = sample.mask.path if isinstance(sample.mask, Slice) else sample.mask
    if values is None:
        mask = np.full(image.shape[:2], IGNORE, np.uint8)
    else:
        if values.shape != image.shape[:2]:
            (h, w), (rows, columns) = image.shape[:2], values.shape
            raise InputError(f"{mask_file}: {columns}x{rows} pixels, but its image has {w}x{h}")
        classes = spec.lookup()
        whole = (values == values.round()) & (values >= 0) & (values <= 255)
        legal = whole & (classes[np.where(whole, values, 0).astype(np.uint8)] >= 0)
        if not legal.all():
            known = ", ".join(map(str, np.flatnonzero(classes >= 0)))
            raise InputError(f"{mask_file}: label {values[~legal][0]} is out of range; expected one of {known}")
        mask = classes[values.astype(np.uint8)].astype(np.uint8)
    return image, mask


def decode(sample: Sample, spec: DatasetSpec, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A sample at the networks' size: image (C, H, W) uint8 or float32 (bilinear), mask (H, W) uint8 (nearest)."""
    image, mask = read_sample(sample, spec)
    pixels = resize(as_pixels(image, spec.channels), size)
    labels = torch.from_numpy(mask)[None]
    labels = transforms.resize(labels, list(size), transforms.InterpolationMode.NEAREST_EXACT)
    return pixels.contiguous(), labels[0].contiguous()


# Predicting: any picture, any volume


def find_pictures(paths: list[Path]) -> tuple[dict[Path, Path], list[str]]:
    """The pictures and NIfTI volumes among files and in folders: each with the place, without ending, of its result.

    Also what is neither. InputError where a path does not exist, or where two would write one result.
    """
    found, other = {}, []
    for path in paths:
        if not path.exists():
            raise InputError(f"--predict {path}: no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inside:
            stem = file.name.removesuffix(".gz").removesuffix(".nii") if is_volume(file) else file.stem
            if is_volume(file) or file.suffix.lower() in Image.registered_extensions():
                place = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_name(stem)
                found.setdefault(file, place)
            else:
                other.append(f"{file}: neither a picture nor a NIfTI volume")
    twice = [str(place) for place, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise InputError(f"--predict: several files would be written as {first_ten(twice)}; predict them one by one")
    return found, other


def read_planes(path: Path, channels: int) -> list[Tensor]:
    """A picture of any mode, or every slice of a NIfTI volume, as (C, H, W) uint8 or float32."""
    if is_volume(path):
        with naming(path):
            depth = read_volume(path).shape[2]
        return [as_pixels(read_slice(Slice(path, z)).astype(np.float32), channels) for z in range(depth)]
    with opened(path) as image:
        return [as_pixels(as_array(image, channels), channels)]


def save_prediction(place: Path, source: Path, masks: Tensor, spec: DatasetSpec | None = None) -> None:
    """Write masks (Z, H, W): a volume's as NIfTI with its header and affine, a picture's as PNG.

    The PNG is indexed with the dataset's palette, or grey where no dataset is given.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if not is_volume(source):
        utils.save_mask(place.with_name(f"{place.name}.png"), masks[0], spec and spec.palette)
        return
    volume = nibabel.load(source)
    header = volume.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    labels = volume.__class__(masks.permute(2, 1, 0).numpy(), volume.affine, header)  # (X, Y, Z)
    nibabel.save(labels, place.with_name(f"{place.name}.nii.gz"))


# The cache


class Decoder(Dataset):
    """Item i is sample i decoded, with None, or (None, None, what is wrong with it)."""

    def __init__(self, samples: list[Sample], spec: DatasetSpec, size: tuple[int, int]):
        self.samples, self.spec, self.size = samples, spec, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor | None, Tensor | None, str | None]:
        try:
            return *decode(self.samples[i], self.spec, self.size), None
        except InputError as error:
            return None, None, str(error)


@dataclass(frozen=True)
class Cache:
    """Every sample decoded and resized, memory-mapped: images (N, C, H, W), masks (N, H, W) uint8, rows by id."""

    images: np.ndarray
    masks: np.ndarray
    rows: dict[str, int]


def cache_key(spec: DatasetSpec, samples: list[Sample], size: tuple[int, int]) -> str:
    """A digest of all that a cache depends on: ids, files with their sizes and times, the labels' meaning, the size."""

    def stamp(source: Path | Slice | int | None):
        if isinstance(source, int) or source is None:
            return source
        path, z = source if isinstance(source, Slice) else (source, None)
        try:
            status = path.stat()
        except OSError:
            return str(path)
        return str(path.resolve()), z, status.st_size, status.st_mtime_ns

    files = [(s.id, stamp(s.image), stamp(s.mask)) for s in samples]
    labels = spec.channels, spec.ignore, spec.lookup().tolist()
    readers = decode, read_sample, read_image, read_mask, read_slice, read_volume, as_array, as_pixels, resize
    code = [inspect.getsource(reader) for reader in (*readers, draw_phantom)]
    return hashlib.sha256(json.dumps([files, labels, list(size), code]).encode()).hexdigest()[:16]


def open_cache(
    spec: DatasetSpec, samples: list[Sample], size: tuple[int, int], folder: Path, workers: int = 0
) -> Cache:
    """The decoded samples, from `folder` where they are there, else decoded now, into a new folder that is renamed.

    Raises InputError that names every file that cannot be used (the first ten, then the count).
    """
    home = folder / f"{spec.name}_{size[0]}x{size[1]}_{cache_key(spec, samples, size)}"
    arrays = _map_cache(home)
    if arrays is None:
        utils.make_folder(folder, "--cache")
        _sweep(folder)
        beside = folder / f".{home.name}.{socket.gethostname()}.{os.getpid()}"
        beside.mkdir(exist_ok=True)
        try:
            _fill_cache(beside, spec, samples, size, workers)
            if _map_cache(home) is None:  # else another run was faster
                shutil.rmtree(home, ignore_errors=True)
                beside.rename(home)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        arrays = _map_cache(home)
    return Cache(*arrays, {sample.id: row for row, sample in enumerate(samples)})


def _sweep(folder: Path) -> None:
    """Delete what processes of this machine left behind that were killed while they filled a cache."""
    for leftover in folder.glob(f".*.{glob.escape(socket.gethostname())}.*"):
        pid = leftover.name.rpartition(".")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except (OSError, ValueError):
            continue  # another user's, or none of ours


def _map_cache(home: Path) -> list[np.ndarray] | None:
    """Images and masks, memory-mapped; None where they are not there, or damaged."""
    try:
        return [np.load(home / file, mmap_mode="r") for file in ("images.npy", "masks.npy")]
    except (OSError, ValueError, EOFError):
        return None


def _needs_float(source: Path | Slice | int, spec: DatasetSpec) -> bool:
    if spec.layout == "folder" and isinstance(source, Path):
        with suppress(Exception), Image.open(source) as image:  # what a broken file raises, decoding it tells
            return is_deep(image)
    return isinstance(source, Slice)


def _fill_cache(home: Path, spec: DatasetSpec, samples: list[Sample], size: tuple[int, int], workers: int) -> None:
    dtype = np.float32 if any(_needs_float(s.image, spec) for s in samples) else np.uint8
    decoded = DataLoader(
        Decoder(samples, spec, size),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_let_parent_decide,
        generator=torch.Generator(),
    )
    read_volume.cache_clear()  # the files may have changed
    problems = []
    # written piece by piece, not through a memory map: a full disk is then an error, not a crash
    try:
        with open(home / "images.npy", "wb") as images, open(home / "masks.npy", "wb") as masks:
            for file, kind, shape in (images, dtype, (spec.channels, *size)), (masks, np.uint8, size):
                header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (len(samples), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            for image, mask, problem in tqdm(decoded, desc=f"decoding {spec.name}", unit=" images", disable=None):
                if problem:
                    problems.append(problem)
                elif not problems:
                    images.write(image.numpy().astype(dtype).tobytes())
                    masks.write(mask.numpy().tobytes())
    except OSError as error:
        need = len(samples) * size[0] * size[1] * (spec.channels * np.dtype(dtype).itemsize + 1)
        raise utils.unwritten(home, need, error) from error
    if problems:
        unique = list(dict.fromkeys(problems))
        raise InputError(f"{len(unique)} bad {'file' if len(unique) == 1 else 'files'}: {first_ten(unique)}")


# Batches


class Stored(Dataset):
    """Cached samples in the order of `rows`: (image, mask), not yet normalized."""

    def __init__(self, cache: Cache, rows: list[int]):
        self.cache, self.rows = cache, rows

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        """Image i alone, (C, H, W)."""
        return torch.from_numpy(self.cache.images[self.rows[i]].copy())

    def of_many_classes(self, n: int) -> list[int]:
        """n images (or all, where there are fewer) whose masks show many classes, spread over the data."""
        variety = np.array([len(np.unique(self.cache.masks[row])) for row in self.rows])
        rich = np.flatnonzero(variety >= np.sort(variety)[-n:][0])
        return rich[np.linspace(0, len(rich) - 1, min(n, len(rich))).astype(int)].tolist()

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.image(i), torch.from_numpy(self.cache.masks[self.rows[i]].copy())


class Epoch(Dataset):
    """One epoch: item i is (x, y, x_u), or (x, y) where nothing is unlabeled.

    One pass over the longer list in random order, the shorter one cycled, each pass in a new order; the last batch is
    filled up by a next pass's first images. The order follows from seed and epoch alone, so that a run can go on
    within an epoch.
    """

    def __init__(self, labeled: Stored, unlabeled: Stored, seed: int, epoch: int, batch_size: int = 1):
        self.labeled, self.unlabeled = labeled, unlabeled
        length = batch_size * -(-max(len(labeled), len(unlabeled)) // batch_size)
        rng = np.random.default_rng([seed, epoch])
        self.order, self.order_u = self._cycle(len(labeled), length, rng), self._cycle(len(unlabeled), length, rng)

    @staticmethod
    def _cycle(n: int, length: int, rng: np.random.Generator) -> list[int]:
        passes = -(-length // n) if n else 0
        return [int(i) for _ in range(passes) for i in rng.permutation(n)][:length]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        x_u = (self.unlabeled.image(self.order_u[i]),) if self.order_u else ()
        return *self.labeled[self.order[i]], *x_u


def normalize(x: Tensor, how: str = "range") -> Tensor:
    """Images (B, C, H, W) of bytes or floats to float32 within [-1, 1].

    "range": Section 3.3, for each image and channel (v - mean) / (max - min); a constant becomes 0. "half": the
    released code's (v - 0.5) / 0.5, where v is a byte / 255, and a float, which has no scale of its own, is placed
    between its image's extremes.
    """
    v = x.float()
    lowest, highest = (extreme[..., None, None] for extreme in torch.aminmax(v.flatten(2), dim=2))
    reach = torch.where(highest > lowest, highest - lowest, torch.inf)
    if how == "range":
        return (v - v.mean((2, 3), keepdim=True)) / reach
    return ((v / 255 if x.dtype == torch.uint8 else (v - lowest) / reach) - 0.5) / 0.5


def _let_parent_decide(_worker: int) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they reach the whole process group
        signal.signal(signum, signal.SIG_IGN)


def batches(
    data: Dataset,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    channels_last: bool = False,
    normalization: str = "range",
) -> Iterator[list[Tensor]]:
    """Batches of (image, mask, ...) in order, on the device: images normalized, masks int64."""
    loader = DataLoader(
        data,
        batch_size,
        num_workers=workers,
        worker_init_fn=_let_parent_decide,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: reading images must not move the one that training draws from
    )
    layout = utils.memory_format(channels_last)
    for x, y, *x_u in loader:
        images = [normalize(image.to(device, non_blocking=True), normalization) for image in (x, *x_u)]
        images = [image.contiguous(memory_format=layout) for image in images]
        yield [images[0], y.to(device, non_blocking=True).long(), *images[1:]]


# The embedded dataset


def draw_phantom(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Phantom `number`, a 96x96 short-axis view of a heart: grey uint8, and its mask in ACDC's four classes.

    The left ventricle in its ring of myocardium and the right ventricle's crescent beside it, in a chest with lung,
    liver, vessels as bright as ventricles, a coil's uneven gain and noise. One in ten shows no heart, one in ten the
    apex alone.
    """
    rng = np.random.default_rng([2019, number])
    u = rng.uniform
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]

    def ellipse(x: float, y: float, a: float, b: float, turn: float = 0.0, wobble: float = 0.0) -> np.ndarray:
        """About the signed distance to an ellipse's edge, negative inside."""
        across = (columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)
        along = (rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)
        angle = np.arctan2(along, across)
        edge = 1 + wobble * (np.cos(2 * angle + u(0, 6)) + np.cos(3 * angle + u(0, 6)))
        return (np.hypot(across / a, along / b) - edge) * min(a, b)

    picture, mask = np.full((96, 96), u(0, 0.05)), np.zeros((96, 96), np.uint8)

    def paint(shape: np.ndarray, value: float, label: int | None = None) -> None:
        cover = 1 / (1 + np.exp(np.clip(shape / 0.012, -40, 40)))  # partial volume at the edge
        picture[:] = picture * (1 - cover) + value * cover
        if label is not None:
            mask[shape < 0] = label

    paint(ellipse(0, 0, u(0.85, 1.0), u(0.75, 0.95)), u(0.3, 0.5))  # chest
    paint(ellipse(u(0.5, 0.7), u(-0.3, 0.1), u(0.2, 0.35), u(0.4, 0.6), u(-0.3, 0.3), 0.05), u(0.02, 0.12))  # lung
    paint(ellipse(u(-0.7, -0.4), u(0.4, 0.7), u(0.3, 0.5), u(0.2, 0.35), u(-0.5, 0.5), 0.05), u(0.3, 0.55))  # liver
    for _ in range(rng.integers(2, 6)):  # vessels
        paint(ellipse(u(-0.8, 0.8), u(-0.8, 0.8), u(0.03, 0.13), u(0.03, 0.13), u(0, 3)), u(0.5, 0.9))

    kind = u()
    x, y, turn, outer = u(-0.2, 0.25), u(-0.2, 0.2), u(-0.6, 0.6), u(0.24, 0.34) * (0.5 if kind < 0.1 else 1)
    inner, squeeze, blood, muscle = outer * u(0.5, 0.78), u(0.88, 1.12), u(0.6, 0.85), u(0.22, 0.38)
    if kind < 0.9:
        if kind >= 0.1:
            reach = outer * u(0.85, 1.1)
            across, along = outer * u(0.7, 1), outer * u(0.9, 1.3)
            right = ellipse(x - reach * np.cos(turn), y - reach * np.sin(turn), across, along, turn, 0.04)
            paint(right - 0.03, muscle)
            paint(right, blood * u(0.9, 1.1), label=1)
        paint(ellipse(x, y, outer * squeeze, outer / squeeze, turn, 0.02), muscle, label=2)
        paint(ellipse(x, y, inner * squeeze, inner / squeeze, turn, 0.03), blood, label=3)
        for angle in u(0, 6.28, rng.integers(0, 3)):  # papillary muscles: dark, but counted with the cavity
            paint(ellipse(x + 0.6 * inner * np.cos(angle), y + 0.6 * inner * np.sin(angle), 0.03, 0.03), muscle)

    picture *= 1 + u(-0.3, 0.3) * columns + u(-0.3, 0.3) * rows
    picture += rng.normal(0, u(0.02, 0.06), picture.shape)
    return (255 * picture.clip(0, 1)).astype(np.uint8), mask
