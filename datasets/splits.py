"""Which images are labeled, unlabeled and for validation (Section 4.1).

A Rule is made once from --split, --ratio, --labeled and --label-unit; applied to a dataset's
samples, it returns their Split.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import numpy as np

from datasets.layouts import parts_of
from datasets.spec import CONFIG, DatasetSpec, Sample
from utils import InputError, first_ten, naming, read_text

SPLITS = ("paper", "standard", "image")  # --split; anything else is a file with lists of ids
ROLES = ("labeled", "unlabeled", "val")


def split_file(name: str) -> Path:
    """The file of --split: a path that ends in .json, or a name in config/splits/."""
    is_path = name.lower().endswith(".json")
    return Path(name) if is_path else CONFIG / "splits" / f"{name}.json"


def digest(lists: dict[str, list[str]]) -> str:
    """A digest of the ids that a run uses, by role."""
    used = {role: lists[role] for role in ROLES}
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Labeled and unlabeled training samples, and validation samples; each sorted by id."""

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()  # of a split file that lists some; no run uses them

    def ids(self) -> dict[str, list[str]]:
        """The ids by role, without an empty test."""
        roles = (*ROLES, "test") if self.test else ROLES
        return {role: [s.id for s in getattr(self, role)] for role in roles}

    def hash(self) -> str:
        """A digest of the ids that a run uses, by role; equal for equal splits."""
        return digest(self.ids())

    def unit(self) -> str:
        """What is counted: "exam" if exams have several slices and none is labeled in part."""
        exams = [{sample.group for sample in role} for role in (self.labeled, self.unlabeled)]
        return "exam" if len(exams[0]) < len(self.labeled) and not exams[0] & exams[1] else "image"

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples that a run uses."""
        return self.labeled + self.unlabeled + self.val

    def summary(self, unit: str | None = None) -> str:
        """'8 of 75 exams labeled (152 slices), 67 unlabeled (1,282), 25 for validation (468)'."""
        by_exam = (unit or self.unit()) == "exam"

        def n(samples: tuple[Sample, ...]) -> str:
            return f"{len({s.group if by_exam else s.id for s in samples}):,}"

        units = "exams" if by_exam else "images"
        labeled = f"{n(self.labeled)} of {n(self.labeled + self.unlabeled)} {units} labeled"
        unlabeled = f"{n(self.unlabeled)} unlabeled"
        val = f"{n(self.val)} for validation"
        if by_exam:
            labeled += f" ({len(self.labeled):,} slices)"
            unlabeled += f" ({len(self.unlabeled):,})"
            val += f" ({len(self.val):,})"
        elif n_unused := sum(sample.mask is not None for sample in self.unlabeled):
            unlabeled += f" ({n_unused:,} have masks that are not used)"
        return f"{labeled}, {unlabeled}, {val}"


def split(
    samples: list[Sample],
    ratio: float | None,
    seed: int,
    spec: DatasetSpec,
    kind: str = "paper",
    label_unit: str = "image",
    labeled: int | None = None,
) -> Split:
    """Divide samples into labeled, unlabeled and validation ones.

    kind: "paper" (Section 4.1): spec.counts groups, or the same proportions of another number; no
        group is on both sides. "image": 85% and 15% of single images, as released. "standard":
        the parts that other papers train and validate on. A "folder" with val/ validates on it.
    ratio, labeled: the share or the number of training units that are labeled; one of them is None.
    label_unit: training samples that have a mask ("image") or whole groups ("exam").

    The validation set and the order in which samples get labels depend on the seed alone, so that a
    smaller labeled set is part of a larger one. Samples without a mask are unlabeled, or unused if
    their group is held out for validation.
    """
    parts = parts_of(spec, kind)
    samples = [s for s in samples if s.part in parts]
    samples.sort(key=lambda s: s.id)
    rng = np.random.default_rng(seed)
    if kind == "standard" or has_val(spec, samples):
        val = {s for s in samples if s.part == parts[1] and s.mask is not None}
        if not val:
            missing = f"{spec.name}'s part {parts[1]!r} is missing"
            raise InputError(f"--split standard: {missing}; see docs/data.md")
        train = [s for s in samples if s.part == parts[0]]
    else:
        n_train, n_val = spec.counts if spec.counts and kind == "paper" else (85, 15)
        units = [s.group if kind == "paper" else s.id for s in samples]
        masked = {unit for unit, s in zip(units, samples, strict=True) if s.mask is not None}
        held_out = max(1, round(len(masked) * n_val / (n_train + n_val)))
        val_units = _first(masked, held_out, rng)
        of_units = list(zip(units, samples, strict=True))
        val = {s for unit, s in of_units if unit in val_units and s.mask is not None}
        train = [s for unit, s in of_units if unit not in val_units]

    def unit(sample: Sample) -> str:
        return sample.group if label_unit == "exam" else sample.id

    masked = {unit(s) for s in train if s.mask is not None}
    if not masked:
        expected = "; masks/ must contain their masks" if spec.layout == "folder" else ""
        reason = "; all masks are held out for validation" if val else expected
        raise InputError(f"{spec.name}: no training image has a mask{reason}")
    n_labeled = round(ratio * len(masked)) if labeled is None else labeled
    if not n_labeled:
        found = f"of {len(masked)} training {label_unit}s leaves no labeled {label_unit}"
        raise InputError(f"--ratio {ratio:g} {found}")
    if n_labeled > len(masked):
        found = f"{spec.name} has {len(masked)} training {label_unit}s with masks"
        raise InputError(f"--labeled {labeled}: {found}")
    chosen = _first(masked, n_labeled, rng)
    with_labels = {s for s in train if s.mask is not None and unit(s) in chosen}
    return Split(
        tuple(s for s in train if s in with_labels),
        tuple(s for s in train if s not in with_labels),
        tuple(s for s in samples if s in val),
    )


def has_val(spec: DatasetSpec, samples: Sequence[Sample]) -> bool:
    """Whether some of a folder's samples are from its val/."""
    return spec.layout == "folder" and any(sample.part == "val" for sample in samples)


def _first(units: set[str], n: int, rng: np.random.Generator) -> set[str]:
    """The first n units in random order: for the same rng state, a smaller n gives a subset."""
    ordered = sorted(units)
    return {ordered[i] for i in rng.permutation(len(ordered))[:n]}


# Split files


def read_json(path: Path) -> dict:
    """The object in a split.json; InputError if a key is repeated."""

    def unique(pairs: list[tuple]) -> dict:
        if repeated := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
            raise InputError(f"{path}: repeats the key {repeated[0]!r}")
        return dict(pairs)

    with naming(path):
        lists = json.loads(read_text(path), object_pairs_hook=unique)
    return lists if isinstance(lists, dict) else {}


def read_lists(path: Path) -> dict[str, list[str]]:
    """Read a split.json: lists `labeled`, `unlabeled`, `val` and perhaps `test`.

    They contain ids, volumes or whole groups. A run's own has a hash, which is not returned.
    """
    lists = read_json(path)
    lists.pop("hash", None)
    if unknown := lists.keys() - {*ROLES, "test"}:
        expected = f"expected {', '.join(ROLES)} and test"
        raise InputError(f"{path}: unknown key {sorted(unknown)[0]!r}; {expected}")
    for role in *ROLES, *(["test"] if "test" in lists else []):
        names = lists.get(role)
        if not isinstance(names, list) or not all(type(name) is str for name in names):
            raise InputError(f"{path}: expected a list of ids as {role!r}")
        if not names and role != "unlabeled":
            raise InputError(f"{path}: {role!r} is empty")
    return lists


def check_groups(
    path: Path, chosen: Mapping[str, Iterable[Sample]], by_image: bool = False
) -> None:
    """InputError if a group is on two of the sides training, validation and test.

    by_image: training and validation may share groups, as with --split image.
    """
    groups = {role: {sample.group for sample in samples} for role, samples in chosen.items()}
    sides = {
        "training": groups["labeled"] | groups["unlabeled"],
        "validation": groups["val"],
        "test": groups.get("test", set()),
    }
    for one, other in itertools.combinations(sides, 2):
        if by_image and other == "validation":
            continue
        if both := sorted(sides[one] & sides[other]):
            raise InputError(f"{path}: in {one} and {other}: {first_ten(both)}")


def read_split(path: Path, samples: list[Sample]) -> Split:
    """The split that a split.json lists.

    A name is an id, otherwise a volume, otherwise a group. InputError names ids that are unknown,
    have two roles, or are scored or labeled without a mask, and groups that are on two of the sides
    training, validation and test; a run (with --split image) may have groups on the first two.
    """
    lists = read_lists(path)
    ids = {sample.id: [sample] for sample in samples}
    volumes: dict[str, list[Sample]] = {}
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        volumes.setdefault(sample.volume, []).append(sample)
        groups.setdefault(sample.group, []).append(sample)
    by_name = {normalize("NFC", name): found for name, found in (groups | volumes | ids).items()}
    chosen: dict[str, set[Sample]] = {}
    for role, names in lists.items():
        found = {name: by_name.get(normalize("NFC", name)) for name in names}
        if unknown := [name for name, samples in found.items() if samples is None]:
            raise InputError(f"{path}: not in the dataset: {first_ten(unknown)}")
        chosen[role] = {sample for samples in found.values() for sample in samples}
    for one, other in itertools.combinations(chosen, 2):
        if both := sorted(s.id for s in chosen[one] & chosen[other]):
            raise InputError(f"{path}: both {one} and {other}: {first_ten(both)}")
    for role, used in chosen.items():
        unmasked = sorted(s.id for s in used if s.mask is None)
        if unmasked and role != "unlabeled":
            raise InputError(f"{path}: {role}, but without a mask: {first_ten(unmasked)}")
    found = Split(**{role: tuple(sorted(chosen[role], key=lambda s: s.id)) for role in chosen})
    check_groups(path, chosen, by_image=found.hash() == read_json(path).get("hash"))
    return found


# Rules


@dataclass(frozen=True)
class Drawn:
    """A rule that draws the labeled units at random: single images or whole exams."""

    kind: str  # of split()
    unit: str

    def n_expected(self, spec: DatasetSpec, samples: Sequence[Sample]) -> int | None:
        """The number of groups with masks that the dataset should have, where that is known."""
        counts = spec.standard_counts if self.kind == "standard" else spec.counts
        return sum(counts) if counts and not has_val(spec, samples) else None


@dataclass(frozen=True)
class ByRatio(Drawn):
    """--ratio: a share of the training units is labeled."""

    ratio: float

    @property
    def label(self) -> str:
        """The rule in the name of a run's folder."""
        return f"{self.ratio:g}"

    @property
    def flag(self) -> str:
        """The rule on the command line."""
        return f"--ratio {self.ratio:g}"

    def apply(self, samples: list[Sample], spec: DatasetSpec, seed: int) -> Split:
        """The split of a dataset's samples; InputError if there are too few."""
        return split(samples, self.ratio, seed, spec, self.kind, self.unit)


@dataclass(frozen=True)
class ByCount(Drawn):
    """--labeled: a number of the training units is labeled."""

    n: int

    @property
    def label(self) -> str:
        return f"{self.n}{self.unit}{'s' if self.n > 1 else ''}"

    @property
    def flag(self) -> str:
        return f"--labeled {self.n}"

    def apply(self, samples: list[Sample], spec: DatasetSpec, seed: int) -> Split:
        return split(samples, None, seed, spec, self.kind, self.unit, self.n)


@dataclass(frozen=True)
class ByFile:
    """--split FILE: lists of ids or groups decide."""

    name: str  # of split_file()
    kind, unit = "file", None

    @property
    def path(self) -> Path:
        return split_file(self.name)

    @property
    def label(self) -> str:
        return self.path.stem

    @property
    def flag(self) -> str:
        return f"--split {self.name}"

    def apply(self, samples: list[Sample], spec: DatasetSpec, seed: int) -> Split:
        return read_split(self.path, samples)

    def n_expected(self, spec: DatasetSpec, samples: Sequence[Sample]) -> None:
        return None


Rule = ByRatio | ByCount | ByFile


def rule_of(settings: Mapping) -> Rule:
    """The rule that --split, --ratio, --labeled and --label-unit state together."""
    kind, unit = settings.get("split"), settings.get("label_unit")
    if kind not in SPLITS:
        return ByFile(str(kind))
    if settings.get("labeled") is not None:
        return ByCount(kind, unit, settings["labeled"])
    return ByRatio(kind, unit, settings.get("ratio"))
