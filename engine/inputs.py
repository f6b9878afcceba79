"""The images and NIfTI volumes of --predict: find them among other files, and read them."""

import glob
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.files import (
    as_array,
    as_pixels,
    finite,
    is_deep,
    is_picture,
    is_reduced,
    is_volume,
    opened,
    read_frames,
    stem_of,
)
from utils import InputError, first_ten, naming, reason

RESULTS_NOTE = "checkpoint.txt"  # in a folder of results: whose they are


def visible_files(folder: Path) -> list[Path]:
    """The files under a folder and in folders that it links to, except hidden ones."""
    found, entered = [], set()

    def unreadable(error: OSError) -> None:
        print(f"skipped {error.filename}: unreadable ({reason(error)})")

    for home, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(home)
        if real in entered:  # already visited, through a link
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (Path(home, name).is_symlink(), name))  # links come last
        found += [Path(home, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def image_of_mask(file: Path) -> Path | None:
    """The volume NAME.nii.gz if `file` is its mask NAME_gt.nii.gz, as in ACDC; otherwise None."""
    if not (is_volume(file) and stem_of(file).lower().endswith("_gt")):
        return None
    stem = stem_of(file)[: -len("_gt")]
    beside = sorted(file.parent.glob(f"{glob.escape(stem)}.*"))
    return next((p for p in beside if is_volume(p) and stem_of(p) == stem and p.is_file()), None)


def find_pictures(paths: list[Path]) -> tuple[dict[Path, Path], list[str]]:
    """Find the pictures and NIfTI volumes among files and folders.

    Returns each file's output path without extension, and messages about other files and about
    folders of masks: results, and masks/ beside images/. InputError if a path does not exist or two
    files have the same output path.
    """
    found, other = {}, []
    for path in paths:
        with naming(path):
            exists = path.exists()
        if not exists:
            raise InputError(f"--predict {path}: no such file or folder")
        inside = visible_files(path) if path.is_dir() else [path]
        masks = {f.parent: "results of a run" for f in inside if f.name == RESULTS_NOTE}
        for folder in {folder for file in inside for folder in file.parents}:
            below = path in folder.parents
            if below and folder.name == "masks" and folder.with_name("images").is_dir():
                masks[folder] = "masks of the images beside it"
        other += [f"{folder}: {kind}" for folder, kind in sorted(masks.items())]
        for file in inside:
            if not masks.keys().isdisjoint(file.parents):
                continue
            if image := image_of_mask(file):
                other.append(f"{file}: the mask of {image.name}")
            elif is_volume(file) or is_picture(file):
                place = file.relative_to(path) if path.is_dir() else Path(file.name)
                found.setdefault(file, place.with_name(stem_of(file)))
            else:
                other.append(f"{file}: neither an image nor a NIfTI volume")
    places = Counter((place, is_volume(file)) for file, place in found.items())
    if clashes := [str(place) for (place, _), count in places.items() if count > 1]:
        result = f"several files would be written as {first_ten(clashes)}"
        advice = "rename one, predict their parent folder, or each with its own --results"
        raise InputError(f"--predict: {result}; {advice}")
    return found, other


def read_planes(path: Path, channels: int) -> list[Tensor]:
    """Read a picture of any mode, or all slices of a volume, as (C, H, W) uint8 or float32.

    Of a volume with time, the slices of its first frame come first.
    """
    if is_volume(path):
        with naming(path):
            volume = read_frames(path)
            depth, n_frames = volume.shape[2:]
        planes = []
        for t, z in itertools.product(range(n_frames), range(depth)):
            name = f"frame {t}, slice {z}" if n_frames > 1 else f"slice {z}"
            plane = finite(volume[:, :, z, t].T, f"{path}: {name}")
            planes.append(as_pixels(plane.astype(np.float32), channels))
        return planes
    with opened(path) as image:
        if not is_deep(image) and is_reduced(path, image):
            raise InputError(f"{path}: mode {image.mode} of more than 8 bits; save it as 8-bit RGB")
        return [as_pixels(as_array(image, channels), channels)]
