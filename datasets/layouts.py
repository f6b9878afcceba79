"""Layouts (Section 4.1): find a dataset's samples under its root folder.

A layout is a function (spec, root) -> list[Sample]. It reads no pixels; decoding does.
"""

import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

import nibabel

from datasets.files import is_picture, is_volume, stem_of
from datasets.spec import PARTS, DatasetSpec, Sample, Slice
from utils import InputError, check_regular, first_ten, naming, read_lines

MOST_SLICES = 2**15 - 1  # of a NIfTI-1 volume; beyond it, a header is damaged
IMAGE_FOLDERS = {name: name for name in ("images", "masks")} | {"image": "images", "mask": "masks"}
PART_FOLDERS = {name: name for name in ("unlabeled", "val", "test")} | {"unlabelled": "unlabeled"}
PART_FOLDERS |= {"valid": "val", "validation": "val", "testing": "test"}
FOLDERS = {*IMAGE_FOLDERS.values(), *PART_FOLDERS.values()}


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden, such as the ._* files of macOS."""
    return path.name.startswith(".")


def right_name(folder: Path, at_root: bool) -> str:
    """The correct name of a misspelled folder such as Image/; "" if it is right or unrelated.

    A folder that should be val/ or test/ counts only if it contains images/, or images.
    """
    lower = folder.name.lower()
    name = IMAGE_FOLDERS.get(lower) or (at_root and PART_FOLDERS.get(lower)) or folder.name
    if name == folder.name or not folder.is_dir() or (folder.parent / name).is_dir():
        return ""
    if name not in ("val", "test"):
        return name
    inside = [*folder.iterdir()]
    has_folder = any(IMAGE_FOLDERS.get(path.name.lower()) == "images" for path in inside)
    return name if has_folder or any(is_picture(p) or is_volume(p) for p in inside) else ""


def voc_homes(root: Path) -> tuple[Path, ...]:
    """Where VOC2012 may be: the root, or below it."""
    return root, root / "VOC2012", root / "VOCdevkit/VOC2012"


def voc_home(root: Path, folder: str) -> Path:
    """The VOC2012 folder that contains `folder`; InputError if there is none."""
    home = next((h for h in voc_homes(root) if (h / folder).is_dir()), None)
    if home is None:
        expected = f"VOC2012 (a folder with {folder})"
        raise InputError(f"{root}: contains no {expected}; point --data-root at it")
    return home


def index_voc(spec: DatasetSpec, root: Path) -> list[Sample]:
    """VOC2012, or a folder above it: train_aug.txt (part train), val.txt (part val)."""
    home = voc_home(root, "ImageSets/Segmentation")
    images, masks = home / "JPEGImages", home / "SegmentationClassAug"
    samples = []
    for part, file in ("train", "train_aug.txt"), ("val", "val.txt"):
        path = home / "ImageSets" / "Segmentation" / file
        if path.is_file():
            ids = read_ids(path)
            samples += [Sample(i, i, images / f"{i}.jpg", masks / f"{i}.png", part) for i in ids]
        elif part in spec.pool:
            raise InputError(f"{path}: no such file; it lists the ids to train on, one per line")
    return samples


def index_voc_images(root: Path) -> list[Sample]:
    """All images of VOC2012, listed or not; the masks of those that have one.

    Masks of SegmentationClassAug take precedence over SegmentationClass.
    """
    home = voc_home(root, "JPEGImages")
    folders = home / "SegmentationClass", home / "SegmentationClassAug"
    masks = {mask.stem: mask for folder in folders for mask in folder.glob("*.png")}
    images = [image for image in (home / "JPEGImages").glob("*.jpg") if not is_hidden(image)]
    return [Sample(i.stem, i.stem, i, masks.get(i.stem)) for i in images]


def read_ids(path: Path) -> list[str]:
    """Read a list of ids, file names without folder and extension, one per line."""
    ids = read_lines(path)
    if not ids:
        raise InputError(f"{path}: lists no image")
    wrong = [i for i in ids if Path(i).name != i or i == ".." or not i.isprintable()]
    if wrong:
        expected = "ids, file names without folder and extension"
        raise InputError(f"{path}: expected {expected}: {first_ten(map(repr, wrong))}")
    return ids


def index_cityscapes(spec: DatasetSpec, root: Path) -> list[Sample]:
    """leftImg8bit/PART/CITY/ID_leftImg8bit.png with gtFine/PART/CITY/ID_gtFine_labelIds.png."""
    samples = []
    for part in "train", "val":
        for image in sorted((root / "leftImg8bit" / part).glob("*/*")):
            name, ending = image.name[: -len("_leftImg8bit.png")], "_leftimg8bit.png"
            if not image.name.lower().endswith(ending) or is_hidden(image):
                continue
            city = root / "gtFine" / part / image.parent.name
            mask = city / f"{name}_gtFine_labelIds.png"
            samples.append(Sample(name, name, image, mask, part))
    return samples


def index_acdc(spec: DatasetSpec, root: Path) -> list[Sample]:
    """training/ and testing/ with patientNNN/patientNNN_frameMM.nii.gz and _gt.

    Every slice of the ED and ES frames is a sample, its exam the group.
    """
    samples, problems = [], []
    for part, folder in ("train", "training"), ("test", "testing"):
        exams = (p for p in (root / folder).glob("*") if p.name.lower().startswith("patient"))
        for exam in sorted(exams):
            try:
                lines = read_lines(exam / "Info.cfg")
                info = dict(re.split(r"\s*:", line, maxsplit=1) for line in lines if ":" in line)
                frames = {phase: int(info[phase]) for phase in ("ED", "ES")}
            except InputError as error:
                problems.append(str(error))
                continue
            except (KeyError, ValueError) as error:
                expected = "expected lines 'ED: frame' and 'ES: frame'"
                problems.append(f"{exam / 'Info.cfg'}: {expected} ({error!r})")
                continue
            for phase, frame in frames.items():
                name = f"{exam.name}_frame{frame:02d}"
                image, mask = exam / f"{name}.nii.gz", exam / f"{name}_gt.nii.gz"
                samples += slices(name, exam.name, image, mask, part, phase)
    if problems:
        raise InputError(first_ten(problems))
    return samples


def slices(
    name: str, group: str, image: Path, mask: Path | None, part: str, phase: str = ""
) -> list[Sample]:
    """One sample per slice of a NIfTI volume and of its mask."""
    depth = 1
    with suppress(Exception):  # anything, for a broken file; decoding reports it
        check_regular(image)
        found = nibabel.load(image).shape[2]
        depth = found if 0 < found <= MOST_SLICES else 1
    samples = []
    for z in range(depth):
        mask_slice = None if mask is None else Slice(mask, z)
        samples.append(Sample(f"{name}_s{z:02d}", group, Slice(image, z), mask_slice, part, phase))
    return samples


def group_of(spec: DatasetSpec, image: Path) -> str:
    """The patient in an image's name, by default the stem; empty if `group` does not match."""
    if spec.group is None:
        return stem_of(image)
    match = re.search(spec.group, normalize("NFC", stem_of(image)))
    return (match[1] or "") if match else ""


def index_folder(spec: DatasetSpec, root: Path) -> list[Sample]:
    """images/ and masks/ by stem; optionally unlabeled/, and val/ and test/ with the same two.

    Files are pictures or NIfTI volumes, whose slices are samples. Images without a mask are
    unlabeled. A patient (spec.group), or a stem, is in one of train, val and test.
    """
    samples, problems = [], []
    parts: dict[str, str] = {}  # of each patient, or image
    spellings: dict[str, str] = {}  # of each patient, by its name in lower case

    def by_stem(folder: Path) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            stem = normalize("NFC", stem_of(file))  # macOS may write "u" and dots for "ü"
            if is_hidden(file):
                continue
            if file.is_dir():
                problems.append(f"{file}: a folder; files must be directly in {folder}")
            elif not (is_volume(file) or is_picture(file)):
                problems.append(f"{file}: neither an image nor a NIfTI volume")
            elif stem in files:
                problems.append(f"{file}: {files[stem].name} has the same stem")
            else:
                files[stem] = file
        return files

    for home in (root, root / "val", root / "test"):
        for folder in sorted(home.iterdir()) if home.is_dir() else ():
            if name := right_name(folder, home == root):
                problems.append(f"{folder}: such a folder must be named {name!r}")
            elif folder.name in FOLDERS and not folder.is_dir():
                problems.append(f"{folder}: not a folder, or a link to one that is missing")
        if home != root and home.is_dir() and not os.path.lexists(home / "images"):
            problems.append(f"{home}: contains no images/; see docs/own_data.md")
    places = (
        ("train", "images", "masks"),
        ("train", "unlabeled", None),
        ("val", "val/images", "val/masks"),
        ("test", "test/images", "test/masks"),
    )
    for part, images, masks in places:
        found, truths = by_stem(root / images), by_stem(root / masks) if masks else {}
        orphans = [file for stem, file in truths.items() if stem not in found]
        problems += [f"{file}: has no image in {root / images}" for file in orphans]
        for stem, image in found.items():
            mask, own = truths.get(stem), stem_of(image)
            group = group_of(spec, image)
            if not group:
                problems.append(f"{image}: the name does not match group = {spec.group!r}")
                continue
            spelling = normalize("NFC", group)
            first = spellings.setdefault(spelling.casefold(), spelling)
            if first != spelling and spec.group is not None:
                message = f"patient {group} is also written {first}; use one spelling"
                problems.append(f"{image}: {message}")
                continue
            if (other := parts.setdefault(spelling, part)) != part:
                message = f"an image of this name is also among the {other} images; rename one"
                if spec.group is not None:
                    message = f"patient {group} is also among the {other} images"
                    message += "; keep all files of a patient together"
                problems.append(f"{image}: {message}")
                continue
            if part == "val" and mask is None:
                problems.append(f"{image}: has no mask in {root / masks}")
            elif mask and is_volume(image) != is_volume(mask):
                problems.append(f"{mask}: image and mask must be two volumes or two image files")
            elif is_volume(image):
                samples += slices(own, group, image, mask, part)
            else:
                samples.append(Sample(own, group, image, mask, part))
    if problems:
        raise InputError(first_ten(problems))
    return samples


def index_phantom(spec: DatasetSpec, root: Path) -> list[Sample]:
    """Phantoms by number, as many as `counts` says."""
    names = [f"phantom_{number:04d}" for number in range(sum(spec.counts or (160, 40)))]
    return [Sample(name, name, number, number, "train") for number, name in enumerate(names)]


INDEX = {
    "voc": index_voc,
    "cityscapes": index_cityscapes,
    "acdc": index_acdc,
    "folder": index_folder,
    "phantom": index_phantom,
}


def parts_of(spec: DatasetSpec, kind: str) -> tuple[str, ...]:
    """The parts of the layout that a kind of split uses; a "file" may use all of them.

    `kind` may be a part's name: then only that part. InputError if the dataset has no standard
    split.
    """
    if kind in PARTS:
        return (kind,)
    if kind == "file":
        return PARTS
    if spec.layout == "folder":
        return "train", "val"
    if kind != "standard":
        return spec.pool
    if spec.standard is None:
        lacking = f"{spec.name} has no such split; its [dataset] table lacks 'standard'"
        raise InputError(f"--split standard: {lacking}")
    return spec.standard


def index(spec: DatasetSpec, root: Path, kind: str = "paper") -> list[Sample]:
    """The samples under root that a split or part uses, sorted by id; InputError if none."""
    page = "docs/own_data.md" if spec.layout == "folder" else "docs/data.md"
    with naming(root):
        is_folder = spec.layout == "phantom" or root.is_dir()
    if not is_folder:
        raise InputError(f"--data-root {root}: no such folder; {page} describes the layout")
    parts = parts_of(spec, kind)
    if spec.layout == "voc" and kind == "file":
        samples = index_voc_images(root)
    else:
        samples = [s for s in INDEX[spec.layout](spec, root) if s.part in parts]
    if not samples:
        which = f"{kind} image" if kind in PARTS else "image"
        found = f"contains no {which} in the layout {spec.layout!r}"
        raise InputError(f"--data-root {root}: {found}; {page} describes the layout")
    counts = Counter(normalize("NFC", sample.id) for sample in samples)
    samples.sort(key=lambda sample: sample.id)
    if twice := [s for s in samples if counts[normalize("NFC", s.id)] > 1]:
        files = [f"{s.id} ({getattr(s.image, 'path', s.image)})" for s in twice]
        raise InputError(f"--data-root {root}: duplicate ids: {first_ten(files)}")
    if long := [s.id for s in samples if len(f"{s.id}.png".encode(errors="replace")) > 255]:
        raise InputError(f"--data-root {root}: names too long for a mask file: {first_ten(long)}")
    pictures = (str(s.mask) for s in samples if isinstance(s.mask, Path))
    if (value := spec.beyond_png()) and (picture := next(pictures, "")):
        reason = "image files hold 0 to 255; only NIfTI masks can hold others"
        raise InputError(f"{picture}: [dataset] has {value}; {reason}")
    return samples
