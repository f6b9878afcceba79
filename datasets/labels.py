"""Check the masks of a run: absent classes, and files that seem to follow another convention."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from datasets.files import mask_file, read_labels
from datasets.spec import DatasetSpec, Sample
from utils import IGNORE, InputError, first_ten

ADVICE = "check that mask values are class indices; docs/own_data.md explains label_ids and ignore"
MAX_READ = 1000  # files to read again at full size
Masks = Iterable[tuple[Sample, np.ndarray]]  # samples and their masks, (H, W) uint8


def count_pixels(masks: Masks) -> dict[Path | int, np.ndarray]:
    """By mask file: its pixels by class index and IGNORE, (256,), in all slices of a volume."""
    counts: dict[Path | int, np.ndarray] = {}
    for sample, mask in masks:
        found = np.bincount(mask.ravel(), minlength=256)
        counts[mask_file(sample)] = counts.get(mask_file(sample), 0) + found
    return counts


def check_classes(
    masks: Masks,
    spec: DatasetSpec,
    ignored_class: int = IGNORE,
    role: str = "labeled",
    advice: str = ADVICE,
) -> None:
    """Print the classes that the masks lack; InputError if they have fewer than two.

    Ignored pixels are of `ignored_class`.
    """
    absent = absent_classes(masks, spec, ignored_class)
    if len(absent) >= len(spec.classes) - 1:
        raise InputError(f"the {role} masks contain at most one class: {advice}")
    if absent:
        print(f"no {role} mask contains {first_ten(absent)}: {advice}")


def absent_classes(masks: Masks, spec: DatasetSpec, ignored_class: int = IGNORE) -> list[str]:
    """The classes that the masks lack; ignored pixels are of `ignored_class`."""
    seen = sum(count_pixels(masks).values())
    seen[ignored_class] += seen[IGNORE]
    return [name for k, name in enumerate(spec.classes) if not seen[k]]


def check_ignored(masks: Masks, spec: DatasetSpec, unused: Iterable[Sample] = ()) -> None:
    """Print the share of ignored pixels, and the files that hold only them and one class.

    Their ignored pixels may be objects after all: half of a dataset may use the values 0 and 1, the
    other half 0 and 255. InputError if 255 (white) is ignored and files with several classes exist
    but none of those has an ignored pixel; otherwise a warning, since contours may be ignored, as
    in VOC. Pixels of a void class count as ignored; the masks of `unused` samples are also read to
    find files with several classes and ignored pixels.
    """
    masks = list(masks)
    void = [IGNORE] if spec.void is None else [IGNORE, spec.void]

    def n_ignored(pixels: np.ndarray) -> int:
        return pixels[void].sum()

    def n_classes(pixels: np.ndarray) -> int:
        return np.count_nonzero(np.delete(pixels, void))

    samples: dict[Path | int, list[Sample]] = {}
    for sample in itertools.chain((sample for sample, _ in masks), unused):
        if sample.mask is not None:
            samples.setdefault(mask_file(sample), []).append(sample)

    def at_full_size(file: Path | int) -> np.ndarray:
        """The pixels of the file itself; resizing may have lost small objects."""
        return count_pixels((sample, read_labels(sample, spec)) for sample in samples[file])[file]

    counts = count_pixels(masks)
    total = sum(counts.values())
    if not n_ignored(total):
        return
    name = "ignored" if spec.void is None else "ignored or void"
    print(f"masks:   {n_ignored(total) / total.sum():.1%} of the pixels are {name}")
    few = [file for file in counts if n_ignored(counts[file]) and n_classes(counts[file]) < 2]
    lost = {file for file in few[:MAX_READ] if n_classes(at_full_size(file)) > 1}
    hollow = {file: counts[file] for file in few if file not in lost}
    if not hollow:
        return
    pixels = sum(hollow.values())
    n = f"{len(hollow)} mask files hold" if len(hollow) > 1 else "1 mask file holds"
    share = f"{n_ignored(pixels) / pixels.sum():.1%}"
    found = f"{n} only {name} pixels ({share}) and one class: {first_ten(map(str, hollow))}"
    is_white = 255 in (spec.ignore, *spec.void_ids)
    has_objects = any(n_classes(counts[file]) > 1 for file in counts)

    def is_usual() -> bool:
        others = [file for file in samples if file not in hollow][:MAX_READ]
        pixels = map(at_full_size, others)
        return any(n_ignored(each) and n_classes(each) > 1 for each in pixels)

    if is_white and has_objects and n_classes(pixels) and not is_usual():
        reason = "no other mask has any, so 255 may be a class in these"
        advice = "save it as the class's index, or as 254 with ignore = 254 to ignore it"
        raise InputError(f"{found}; {reason}; {advice}")
    print(f"{found}: {ADVICE}")
