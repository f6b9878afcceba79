"""A dataset's description, from the [dataset] table of a TOML (DatasetSpec), and a Sample."""

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import IGNORE, InputError, is_file, is_folder_name, read_text

CONFIG = Path(__file__).parents[1] / "config"
LAYOUTS = ("voc", "cityscapes", "acdc", "folder", "phantom")  # see datasets/layouts.py
PARTS = ("train", "val", "test")
ORIENTATIONS = {  # what --augment does to images and masks
    "any": "flips and 90-degree rotations",
    "mirror": "horizontal flips",
    "fixed": "no flips",
}


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset; the field names are the keys of the [dataset] table."""

    name: str
    layout: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB of each class
    scored: tuple[int, ...]  # classes in the mean IoU
    channels: int = 3
    ignore: int = IGNORE  # value of pixels that do not count, in the mask files
    void: int | None = None  # a class that is trained but skipped in evaluation
    group: str | None = None  # folder: regular expression; its first group in a stem is the patient
    orientation: str = "fixed"  # what --augment may change: see ORIENTATIONS
    label_ids: tuple[int, ...] | None = None  # values of classes 0, 1, ... in the mask files
    void_ids: tuple[int, ...] = ()  # values in the mask files that become the void class
    pool: tuple[str, ...] = ("train",)  # parts of the layout that the paper's split divides
    counts: tuple[int, int] | None = None  # training and validation groups; default: 85%, 15%
    standard: tuple[str, str] | None = None  # parts that other papers train and validate on
    standard_counts: tuple[int, int] | None = None  # their groups

    def class_values(self) -> tuple[int, ...]:
        """The value of each class in mask files, without that of a void class with void_ids."""
        n = len(self.classes) - bool(self.void_ids)
        return tuple(range(n)) if self.label_ids is None else self.label_ids

    def mask_values(self) -> tuple[int, ...]:
        """The value of each class in mask files; of a void class with void_ids, their first."""
        return *self.class_values(), *self.void_ids[:1]

    def legal_values(self) -> set[int]:
        """Every value that mask files may contain: of classes, and of pixels that do not count."""
        return {*self.mask_values(), *self.void_ids, self.ignore}

    def beyond_png(self) -> str:
        """The first value, with its key, that an 8-bit PNG cannot hold; "" if there is none."""
        keys = {"label_ids": self.label_ids or (), "void_ids": self.void_ids}
        keys["ignore"] = (self.ignore,)
        values = [(key, value) for key, values in keys.items() for value in values]
        return next((f"{key} {value}" for key, value in values if not 0 <= value <= 255), "")

    def structures(self) -> tuple[int, ...]:
        """The scored classes except one named background."""
        return tuple(k for k in self.scored if self.classes[k].lower() != "background")

    def lookup(self) -> np.ndarray:
        """(65536,) int16: the class of each value of a mask file, IGNORE, or -1 if it is invalid.

        Its index is the value as int16: a negative one counts from the end.
        """
        table = np.full(2**16, -1, np.int16)
        table[self.ignore] = IGNORE
        table[list(self.mask_values())] = np.arange(len(self.mask_values()))
        table[list(self.void_ids)] = -1 if self.void is None else self.void
        return table


class Slice(NamedTuple):
    """One slice of a NIfTI volume, along its third axis."""

    path: Path
    z: int


@dataclass(frozen=True)
class Sample:
    """An image and its mask, not yet read. Both may also be the number of a phantom."""

    id: str
    group: str  # what no split may divide: an exam or patient; without one, the image itself
    image: Path | Slice | int
    mask: Path | Slice | int | None
    part: str = "train"  # train, val or test
    phase: str = ""  # ED or ES in ACDC

    @property
    def volume(self) -> str:
        """The name of the volume whose slice this is; the id of an image that is none."""
        return self.id.rpartition("_s")[0] if isinstance(self.image, Slice) else self.id

    @property
    def names(self) -> tuple[str, str, str]:
        """What a split file may call it."""
        return self.id, self.volume, self.group


def read_toml(path: Path) -> dict:
    """A TOML file's tables; InputError with the line if it is not TOML."""
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also of numbers and lists without end
        raise InputError(f"{path}: not TOML: {error}") from error


def dataset_toml(name_or_toml: str) -> Path:
    """The TOML file of --dataset: a name in config/, or a path that ends in .toml."""
    is_path = name_or_toml.lower().endswith(".toml")
    path = Path(name_or_toml) if is_path else CONFIG / f"{name_or_toml}.toml"
    if not is_file(path):
        known = sorted(p.stem for p in CONFIG.glob("*.toml") if "dataset" in read_toml(p))
        expected = f"give one of {', '.join(known)} or a .toml file"
        raise InputError(f"--dataset {name_or_toml}: no such dataset; {expected}")
    return path


def load_spec(name_or_toml: str) -> DatasetSpec:
    """The dataset of config/NAME.toml or of a TOML file, named after the file by default."""
    path = dataset_toml(str(name_or_toml))
    table = read_toml(path).get("dataset")
    if not isinstance(table, dict):
        raise InputError(f"{path}: has no [dataset] table")
    return make_spec({"name": path.stem, **table}, str(path))


def make_spec(table: dict, source: str) -> DatasetSpec:
    """A DatasetSpec from a [dataset] table; InputError names `source` and the key that is wrong."""
    known = [field.name for field in fields(DatasetSpec)]
    if "any_orientation" in table:
        advice = 'write orientation = "any", "mirror" or "fixed"; --augment uses it'
        raise InputError(f"{source}: [dataset] any_orientation is now orientation: {advice}")
    if unknown := [key for key in table if key not in known]:
        expected = ", ".join(known)
        raise InputError(f"{source}: [dataset] unknown key {unknown[0]!r}; expected {expected}")
    if missing := [key for key in ("layout", "classes") if key not in table]:
        raise InputError(f"{source}: [dataset] lacks {missing[0]!r}")
    k = len(table["classes"]) if isinstance(table["classes"], (list, tuple)) else 0
    scored = [i for i in range(k) if i != table.get("void")]
    table = {"palette": voc_palette(k), "scored": scored, **table}
    spec = DatasetSpec(**{key: _frozen(value) for key, value in table.items()})
    for key, (holds, expected) in _checks(spec, k).items():
        if not holds:
            found = f"[dataset] {key} is {table.get(key)!r}"
            raise InputError(f"{source}: {found}; expected {expected}")
    if spec.void in spec.scored:
        raise InputError(f"{source}: [dataset] scored contains the void class {spec.void}")
    counts = Counter([*spec.class_values(), *{*spec.void_ids}, spec.ignore])
    if clashes := [str(value) for value, count in counts.items() if count > 1]:
        keys = "label_ids, void_ids and ignore (default 255)"
        found = f"mask value {', '.join(clashes)} has two meanings"
        raise InputError(f"{source}: [dataset] {found}: {keys} must differ")
    return spec


def _frozen(value):
    """Lists as tuples, recursively."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _ints(values, low: int, below: int) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and low <= v < below for v in values)


def _captures(pattern) -> bool:
    """Whether a value is a regular expression with a group."""
    try:
        return type(pattern) is str and re.compile(pattern).groups > 0
    except (re.error, OverflowError, RecursionError):
        return False


def _wrong_values(values, n: int | None = None) -> str:
    """The expected value of a key with mask values, or "" if its value is valid.

    With `n`, one distinct value for each of n classes.
    """
    if not isinstance(values, tuple) or not all(type(value) is int for value in values):
        return "a list of integers"
    if n not in (None, len(values)):
        return f"{n} values, one per class without void_ids"
    if beyond := [value for value in values if not -(2**15) <= value < 2**15]:
        return f"values from -32768 to 32767; {beyond[0]} is not"
    if n and len({*values}) < n:
        return f"different values; {Counter(values).most_common(1)[0][0]} is repeated"
    return ""


def _checks(spec: DatasetSpec, k: int) -> dict[str, tuple[bool, str]]:
    """By key: whether its value is valid, and the expected one."""
    names = spec.classes if isinstance(spec.classes, tuple) else ()
    lines = names and all(type(name) is str and name.isprintable() for name in names)
    colors = spec.palette if isinstance(spec.palette, tuple) else ()
    triples = all(_ints(color, 0, 256) and len(color) == 3 for color in colors)
    ids, n_ids = spec.label_ids, k - bool(spec.void_ids)
    wrong_ids = "" if ids is None else _wrong_values(ids, n_ids)
    wrong_voids, wrong_ignore = _wrong_values(spec.void_ids), _wrong_values((spec.ignore,))
    if spec.void_ids and spec.void != k - 1:
        wrong_voids = wrong_voids or f"void = {k - 1}, the last class, beside it"
    if type(spec.ignore) is not int:
        wrong_ignore = "an integer"
    pool = isinstance(spec.pool, tuple) and spec.pool and all(p in PARTS for p in spec.pool)
    standard = isinstance(spec.standard, tuple) and all(p in PARTS for p in spec.standard)
    scored = _ints(spec.scored, 0, k) and 0 < len(spec.scored) == len({*spec.scored})
    name = type(spec.name) is str and is_folder_name(spec.name)
    checks = {
        "name": (name, "a name without slashes"),
        "layout": (spec.layout in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
        "classes": (
            lines and 2 <= k < IGNORE and len({*names}) == k,
            "2 to 254 different names of one line",
        ),
        "palette": (len(colors) == k and triples, f"{k} RGB triples"),
        "scored": (scored, f"indices from 0 to {k - 1}"),
        "channels": (type(spec.channels) is int and spec.channels in (1, 3), "1 or 3"),
        "ignore": (not wrong_ignore, wrong_ignore),
        "group": (
            spec.group is None or (spec.layout == "folder" and _captures(spec.group)),
            "a regular expression with a (group), for the layout 'folder'",
        ),
        "orientation": (spec.orientation in [*ORIENTATIONS], f"one of {', '.join(ORIENTATIONS)}"),
        "void": (spec.void is None or _ints((spec.void,), 0, k), f"an index from 0 to {k - 1}"),
        "label_ids": (not wrong_ids, wrong_ids),
        "void_ids": (not wrong_voids, wrong_voids),
        "pool": (pool, f"some of {', '.join(PARTS)}"),
        "standard": (
            spec.standard is None
            or (standard and len({*spec.standard}) == len(spec.standard) == 2),
            f"two of {', '.join(PARTS)}",
        ),
    }
    for key in "counts", "standard_counts":
        counts = getattr(spec, key)
        checks[key] = (
            counts is None or (_ints(counts, 1, 2**31) and len(counts) == 2),
            "two counts",
        )
    return checks


def voc_palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """VOC's colors of the first n classes.

    Bits 0, 1, 2 of an index become the highest of R, G, B, bits 3, 4, 5 the next, and so on.
    """

    def level(k: int, channel: int) -> int:
        return sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))

    return tuple((level(k, 0), level(k, 1), level(k, 2)) for k in range(n))
