"""Scores of whole volumes, as in the medical literature: overlap, surface distances, volumes in ml.

Volumes are (Z, Y, X) and hold class indices. Lengths are in mm, from the voxel sizes in the file's
header; its affine may carry none, as in ACDC.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from datasets.files import depth_of, spacing_of
from datasets.spec import DatasetSpec, Sample
from utils import IGNORE, counted


class Score(NamedTuple):
    """One class of one volume; its fields are the columns of volumes.csv.

    A class that is missed (in the truth alone) or invented (in the prediction alone) has Dice 0 and
    no distance.
    """

    volume: str
    exam: str
    phase: str  # ED or ES in ACDC, otherwise empty
    name: str  # of the class; its column is called "class"
    dice: float
    jaccard: float
    hd95_mm: float | None
    assd_mm: float | None
    hd95_voxels: float | None
    truth_ml: float
    predicted_ml: float


MEASURES = Score._fields[4:]
AVERAGED = MEASURES[:5]  # over classes; a mean volume of different structures means nothing


# Scores of one class, from boolean volumes; distances need a voxel in both


def overlap(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Dice and Jaccard of two masks, at least one of which contains a voxel."""
    both, total = np.count_nonzero(truth & predicted), truth.sum() + predicted.sum()
    return float(2 * both / total), float(both / (total - both))


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask with a face on the outside or on the volume's border."""
    return mask & ~ndimage.binary_erosion(mask)


def surface_distances(
    truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of truth's surface voxels to predicted's surface, and of predicted's to truth's.

    Distances are computed within the box around both masks.
    """
    (box,) = ndimage.find_objects((truth | predicted).astype(np.uint8))
    borders = surface(truth[box]), surface(predicted[box])
    to_truth, to_predicted = (
        ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders
    )
    return to_predicted[borders[0]], to_truth[borders[1]]


def hd95(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """The 95th percentile of both directions' distances together, as in MedPy."""
    return float(np.percentile(np.concatenate(distances), 95))


def assd(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """The average symmetric surface distance: the mean of both directions' means."""
    return float(np.mean([direction.mean() for direction in distances]))


def score(
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing: Sequence[float],
    classes: dict[int, str],
    about: tuple[str, str, str] = ("", "", ""),
) -> list[Score]:
    """Score the classes of a volume; those in neither truth nor prediction have no entry.

    spacing: the size of a voxel (z, y, x) in mm. about: volume, exam, phase.
    Voxels whose truth is IGNORE count in neither mask.
    """
    scores, counts = [], truth != IGNORE
    ml = float(np.prod(spacing)) / 1000
    for k, name in classes.items():
        masks = truth == k, (predicted == k) & counts
        n_truth, n_predicted = (int(mask.sum()) for mask in masks)
        if not n_truth and not n_predicted:
            continue
        distances: tuple[float | None, ...] = None, None, None
        if n_truth and n_predicted:
            in_mm = surface_distances(*masks, spacing)
            in_voxels = surface_distances(*masks, (1, 1, 1))
            distances = hd95(in_mm), assd(in_mm), hd95(in_voxels)
        scores.append(
            Score(*about, name, *overlap(*masks), *distances, n_truth * ml, n_predicted * ml)
        )
    return scores


def to_csv(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Rows as CSV under a line with the names of the columns."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
    return file.getvalue()


class SliceStacker:
    """Put slices together, in any order."""

    def __init__(self):
        self.slices: dict[Path, dict[int, Tensor]] = {}  # of incomplete volumes

    def add(self, volume: Path, z: int, depth: int, plane: Tensor) -> Tensor | None:
        """Add a slice; return the volume (depth, ...) if it was the last one."""
        slices = self.slices.setdefault(volume, {})
        slices[z] = plane
        if len(slices) < depth:
            return None
        del self.slices[volume]
        return torch.stack([slices[z] for z in range(depth)])


class VolumeScores:
    """The scores of all volumes whose slices were added."""

    def __init__(self, spec: DatasetSpec):
        self.void, self.stacker = spec.void, SliceStacker()
        self.classes = {k: spec.classes[k] for k in spec.structures()}
        self.scores: list[Score] = []
        self.volumes: dict[str, tuple[str, str]] = {}  # exam and phase of each one

    @property
    def n_incomplete(self) -> int:
        """The number of volumes with missing slices, which have no scores."""
        return len(self.stacker.slices)

    def add(self, sample: Sample, truth: Tensor, predicted: Tensor) -> None:
        """Add one slice's masks (H, W), uint8; voxels of a void class count as ignored ones."""
        path, z = sample.image
        masks = torch.stack([truth, predicted])
        volume = self.stacker.add(path, z, depth_of(path), masks)
        if volume is not None:
            truth, predicted = volume.numpy().swapaxes(0, 1)
            if self.void is not None:
                truth[truth == self.void] = IGNORE
            self.volumes[sample.volume] = sample.group, sample.phase
            about = sample.volume, sample.group, sample.phase
            self.scores += score(truth, predicted, spacing_of(path), self.classes, about)

    def csv(self) -> str:
        """One line per volume and class, under a line with the names of the columns."""
        return to_csv(["volume", "exam", "phase", "class", *MEASURES], self.scores)

    def title(self) -> str:
        """What was scored, and what was not."""
        exams = counted(len({exam for exam, _ in self.volumes.values()}), "exam")
        volumes = counted(len(self.volumes), "volume")
        title = f"{volumes} of {exams}, each scored at its masks' original size"
        if self.n_incomplete:
            incomplete = counted(self.n_incomplete, "volume")
            title += f" ({incomplete} with slices outside this set not scored)"
        return f"{title}, mean ± standard deviation"

    def summary(self) -> dict:
        """Counts, and by phase (first all of them) the scores' means over the volumes."""
        summary = {
            "n_volumes": len(self.volumes),
            "n_exams": len({exam for exam, _ in self.volumes.values()}),
            "n_incomplete": self.n_incomplete,
            "all": self._means(self.scores),
        }
        for phase in sorted({phase for _, phase in self.volumes.values() if phase}):
            summary[phase] = self._means([row for row in self.scores if row.phase == phase])
        return summary

    def _means(self, scores: list[Score]) -> dict:
        """By class: counts, mean and standard deviation of each score; the classes' mean."""
        by_class: dict[str, dict] = {}
        for name in self.classes.values():
            rows = [row for row in scores if row.name == name]
            by_class[name] = {
                "n": len(rows),
                "missed": sum(not row.predicted_ml for row in rows),
                "invented": sum(not row.truth_ml for row in rows),
            }
            for column in MEASURES:
                values = [v for row in rows if (v := getattr(row, column)) is not None]
                by_class[name][column] = float(np.mean(values)) if values else None
                by_class[name][f"{column}_std"] = float(np.std(values)) if values else None
        mean: dict[str, float | None] = {}
        for column in AVERAGED:
            known = [row[column] for row in by_class.values() if row[column] is not None]
            mean[column] = float(np.mean(known)) if known else None
        return {"classes": by_class, "mean": mean}

    def table(self) -> str:
        """The summary as text: a line per class, below it one per phase; Dice and Jaccard in %."""
        summary = self.summary()
        phases = [key for key, value in summary.items() if isinstance(value, dict)]
        titles = "Dice %", "Jaccard %", "HD95 mm", "ASSD mm", "HD95 voxels", "ml", "predicted"
        below = [f"  {phase}" for phase in phases[1:]]
        lines = [["class", "n", *titles, "missed", "invented"]]
        for name in self.classes.values():
            rows = [summary[phase]["classes"][name] for phase in phases]
            lines += [_cells(*row) for row in zip([name, *below], rows, strict=True)]
        means = [summary[phase]["mean"] for phase in phases]
        title = f"mean of {len(self.classes)} classes"
        lines += [_cells(*row) for row in zip([title, *below], means, strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for title, *cells in lines:
            aligned = [title.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
            text.append("  ".join(aligned).rstrip())
        return "\n".join(text)


def _cells(title: str, row: dict) -> list[str]:
    """One line of the table; a dash where nothing has a value."""
    cells = []
    for column in MEASURES:
        mean, deviation = row.get(column), row.get(f"{column}_std")
        factor = 100 if column in ("dice", "jaccard") else 1
        cell = "-" if column in row else ""
        if mean is not None:
            cell = f"{factor * mean:.2f}"
        if deviation is not None and not column.endswith("_ml"):
            cell += f" ± {factor * deviation:.2f}"
        cells.append(cell)
    counts = [str(row.get(key, "")) for key in ("n", "missed", "invented")]
    return [title, counts[0], *cells, *counts[1:]]


class PredictedVolumes:
    """The volumes in ml of the classes in predicted masks, by frame."""

    def __init__(self, spec: DatasetSpec):
        self.classes = {k: spec.classes[k] for k in spec.structures()}
        self.rows: list[tuple[Path, int, str, float]] = []  # file, frame, class, ml

    def add(self, path: Path, masks: Tensor) -> None:
        """Add the masks (T * Z, H, W) of a file."""
        z, y, x = spacing_of(path)
        for t, frame in enumerate(masks.view(-1, depth_of(path), *masks.shape[1:])):
            counts = frame.flatten().bincount(minlength=256).tolist()
            for k, name in self.classes.items():
                self.rows.append((path, t, name, counts[k] * z * y * x / 1000))

    def csv(self, earlier: str = "") -> str:
        """One line per file, frame and class, under a line with the names of the columns.

        The lines of other files in `earlier`, the text of an earlier call, come first.
        """
        rows = []
        for path, *others in self.rows:  # as write_atomically writes a name that is not UTF-8
            name = str(path.resolve()).encode(errors="backslashreplace").decode()
            rows.append((name, *others))
        files = {file for file, *_ in rows}
        before = [*csv.reader(io.StringIO(earlier))][1:]
        kept = [row for row in before if row and row[0] not in files]
        return to_csv(["file", "frame", "class", "ml"], [*kept, *rows])

    def lines(self) -> str:
        """One line per file: each class's volume, or its smallest and largest over time."""
        by_file: dict[Path, dict[str, list[float]]] = {}
        for path, _, name, ml in self.rows:
            by_file.setdefault(path, {}).setdefault(name, []).append(ml)
        lines = []
        for path, by_class in by_file.items():
            cells = []
            for name, values in by_class.items():
                low, high = f"{min(values):.1f}", f"{max(values):.1f}"
                span = low if len(values) == 1 else f"{low} to {high}"
                cells.append(f"{name} {span} ml")
            if (n_frames := len(next(iter(by_class.values())))) > 1:
                cells.append(f"{n_frames} frames")
            lines.append(f"{path}: {', '.join(cells)}")
        return "\n".join(lines)
