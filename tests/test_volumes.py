"""engine/volumes.py: scores of whole volumes against numbers worked by hand and by brute force."""

import csv
import io
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import make_acdc, toy_spec, write_volume

from datasets.files import read_sample
from datasets.layouts import index
from datasets.spec import Sample, Slice, load_spec
from engine import volumes
from engine.volumes import SliceStacker, VolumeScores, assd, hd95, score, surface_distances
from utils import IGNORE

REAL_DATA = os.environ.get("SEG_REAL_DATA")
CLASSES = {1: "tree"}


def brute_force(truth: np.ndarray, predicted: np.ndarray, spacing) -> list[np.ndarray]:
    """Both directions' surface distances from all pairs of surface voxels."""
    points = []
    for mask in truth, predicted:
        padded = np.pad(mask, 1)
        inside = padded.copy()
        for axis in range(3):
            for step in -1, 1:
                inside &= np.roll(padded, step, axis)
        points.append(np.argwhere(padded & ~inside) * np.array(spacing))
    pairs = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))
    return [pairs.min(1), pairs.min(0)]


def test_overlap_of_a_bar_and_its_shifted_copy():
    truth, predicted = np.zeros((2, 1, 1, 10), bool)
    truth[..., 0:4] = predicted[..., 2:6] = True
    assert volumes.overlap(truth, predicted) == (2 * 2 / 8, 2 / 6)


def test_hd95_pools_both_directions_and_assd_averages_them():
    truth, predicted = np.zeros((2, 1, 1, 40), bool)
    truth[..., 0] = True
    predicted[..., [0, 1, 2]] = True
    distances = surface_distances(truth, predicted, (1, 1, 1))
    assert [d.tolist() for d in distances] == [[0], [0, 1, 2]]
    assert hd95(distances) == pytest.approx(1.85)  # of 0, 0, 1, 2
    assert assd(distances) == 0.5  # of 0 and 1; pooled it would be 0.75


def test_a_slab_moved_by_three_voxels_is_three_voxels_away():
    truth, predicted = np.zeros((2, 12, 4, 4), np.uint8)
    truth[1:3], predicted[4:6] = 1, 1
    (row,) = score(truth, predicted, (8, 2, 2), CLASSES)
    # each slab is all surface, half of it 3 and half of it 2 slices from the other
    assert (row.hd95_mm, row.hd95_voxels, row.assd_mm) == (24, 3, 20)
    assert (row.dice, row.jaccard) == (0, 0)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (10, 1.37, 1.37), (3, 1, 2)])
def test_distances_equal_those_of_all_pairs_of_surface_voxels(spacing):
    z, y, x = np.mgrid[:16, :16, :16] - 8
    truth = z**2 + y**2 + x**2 <= 25
    noise = np.random.default_rng(0).random(truth.shape) < 0.01
    predicted = (z**2 + y**2 + (x - 2) ** 2 <= 16) | noise
    expected = brute_force(truth, predicted, spacing)
    found = surface_distances(truth, predicted, spacing)
    for direction, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.sort(direction), np.sort(reference))
    assert hd95(found) == pytest.approx(np.percentile(np.concatenate(expected), 95))


def test_ignored_voxels_count_in_neither_mask():
    truth, predicted = np.zeros((2, 1, 4, 4), np.uint8)
    truth[0, 1], predicted[0, 1:3] = 1, 1
    truth[0, 2] = IGNORE
    (row,) = score(truth, predicted, (1, 1, 1), CLASSES)
    assert (row.dice, row.hd95_mm, row.predicted_ml) == (1, 0, 0.004)


def test_slices_are_put_together_in_their_own_order():
    assembly, planes = SliceStacker(), torch.arange(3)
    for name, z, depth in ("a", 2, 3), ("b", 0, 2), ("a", 0, 3):
        assert assembly.add(Path(name), z, depth, planes[z]) is None
    assert assembly.add(Path("a"), 1, 3, planes[1]).tolist() == [0, 1, 2]
    assert list(assembly.slices) == [Path("b")]


def volume_scores(tmp_path, masks: dict[str, tuple[np.ndarray, np.ndarray]], **changes):
    """VolumeScores of (truth, predicted) volumes (Z, Y, X) by name; exam_scan."""
    affine = np.diag([2.0, 1.0, 5.0, 1])
    scores = VolumeScores(toy_spec(**changes))
    for name, (truth, predicted) in masks.items():
        path = tmp_path / f"{name}.nii.gz"
        write_volume(path, np.zeros(truth.shape[::-1], np.int16), affine)
        for z in range(len(truth)):
            source = Slice(path, z)
            sample = Sample(f"{name}_s{z:02d}", name.split("_")[0], source, source)
            scores.add(sample, *(torch.from_numpy(mask[z].copy()) for mask in (truth, predicted)))
    return scores


def test_summary_counts_missed_and_invented_apart_and_averages_the_others(tmp_path):
    nothing, small, large = np.zeros((3, 2, 4, 4), np.uint8)
    small[0, 0, 0], large[0, 0, :3] = 1, 1
    pairs = {"a_1": (small, small), "a_2": (small, large), "b_1": (small, nothing)}
    pairs |= {"c_1": (nothing, small), "c_2": (nothing, small), "d_1": (nothing, nothing)}
    scores = volume_scores(tmp_path, pairs)
    summary = scores.summary()
    assert (summary["n_volumes"], summary["n_exams"]) == (6, 4)
    tree, cat = (summary["all"]["classes"][name] for name in ("tree", "cat"))
    assert (tree["n"], tree["missed"], tree["invented"]) == (5, 1, 2)
    assert tree["dice"] == pytest.approx((1 + 0.5) / 5)
    assert tree["dice_std"] == pytest.approx(np.std([1, 0.5, 0, 0, 0]))
    assert tree["hd95_mm"] == pytest.approx(np.mean([0, np.percentile([0, 0, 2, 4], 95)]))
    assert tree["truth_ml"] == pytest.approx(0.01 * 3 / 5)  # voxels of 2 x 1 x 5 mm
    assert (cat["n"], cat["dice"]) == (0, None)
    assert summary["all"]["mean"]["dice"] == tree["dice"]  # of the classes that have a value
    (line,) = [line for line in scores.table().splitlines() if line.startswith("tree")]
    percent, distances = ["30.00 ± 40.00", "26.67 ± 38.87"], ["1.85 ± 1.85", "0.50 ± 0.50"]
    cells = re.split("  +", line)
    assert cells[:6] == ["tree", "5", *percent, *distances]  # Dice, Jaccard; HD95, ASSD
    assert cells[-4:] == ["0.01", "0.01", "1", "2"]  # ml, predicted; missed, invented


def test_csv_has_a_line_per_volume_and_class(tmp_path):
    small, other = np.zeros((2, 2, 4, 4), np.uint8)
    small[0, 0, 0], other[:, 1] = 1, 2
    scores = volume_scores(tmp_path, {"a_1": (small, small), "a_2": (other, small)})
    rows = list(csv.DictReader(io.StringIO(scores.csv())))
    columns = "volume", "exam", "class", "dice", "hd95_mm", "truth_ml", "predicted_ml"
    assert [[row[column] for column in columns] for row in rows] == [
        ["a_1", "a", "tree", "1", "0", "0.01", "0.01"],
        ["a_2", "a", "tree", "0", "", "0", "0.01"],  # invented
        ["a_2", "a", "cat", "0", "", "0.08", "0"],  # missed
    ]


def test_a_void_class_counts_as_ignored_and_background_is_no_structure(tmp_path):
    truth, predicted = np.zeros((2, 1, 2, 4), np.uint8)
    truth[0, 0], truth[0, 1] = 1, 2
    predicted[0] = 1
    classes = {"classes": ["Background", "heart", "void"], "void": 2, "scored": [0, 1]}
    scores = volume_scores(tmp_path, {"a": (truth, predicted)}, **classes)
    assert [(row.name, row.dice) for row in scores.scores] == [("heart", 1)]


def test_a_volume_with_missing_slices_is_not_scored(tmp_path):
    path = tmp_path / "a.nii.gz"
    write_volume(path, np.zeros((4, 4, 3), np.int16))
    scores, mask = VolumeScores(toy_spec()), torch.ones(4, 4, dtype=torch.uint8)
    for z in 0, 2:
        scores.add(Sample(f"a_s{z:02d}", "a", Slice(path, z), Slice(path, z)), mask, mask)
    assert (scores.n_incomplete, scores.scores) == (1, [])
    assert "0 volumes of 0 exams" in scores.title()
    assert "(1 volume with slices outside this set not scored)" in scores.title()


def test_acdc_is_scored_by_exam_and_phase(tmp_path):
    spec = load_spec("acdc")
    scores = VolumeScores(spec)
    for sample in index(spec, make_acdc(tmp_path, 2, 3)):
        mask = torch.full((14, 18), 1 if sample.phase == "ED" else 3, dtype=torch.uint8)
        scores.add(sample, mask, mask)
    about = [(row.volume, row.exam, row.phase, row.name) for row in scores.scores]
    assert about[:2] == [
        ("patient001_frame01", "patient001", "ED", "right ventricle"),
        ("patient001_frame12", "patient001", "ES", "left ventricle"),
    ]
    summary = scores.summary()
    assert (summary["n_volumes"], summary["n_exams"]) == (4, 2)
    assert summary["all"]["classes"]["right ventricle"]["n"] == 2
    assert summary["ES"]["classes"]["right ventricle"]["n"] == 0
    titles = [line[:19].strip() for line in scores.table().splitlines()]
    classes = "right ventricle", "myocardium", "left ventricle", "mean of 3 classes"
    assert titles == ["class", *(t for name in classes for t in (name, "ED", "ES"))]


@pytest.mark.parametrize(
    ("unit", "mm"),
    [("micron", 0.001), ("meter", 1000), ("mm", 1), ("unknown", 1), ("undefined", 1)],
)
def test_spacing_is_the_headers_in_mm_whatever_its_unit_and_the_affine(tmp_path, unit, mm):
    path, volume = tmp_path / "a.nii.gz", nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    volume.header.set_zooms((0.5, 2, 4))
    volume.header.set_sform(np.eye(4), 1)
    if unit == "undefined":
        volume.header["xyzt_units"] = 8 + 5  # seconds, and a code that NIfTI does not define
    else:
        volume.header.set_xyzt_units(unit, "sec")
    nibabel.save(volume, path)
    assert np.allclose(nibabel.load(path).affine, np.eye(4))
    assert volumes.spacing_of(path) == pytest.approx((4 * mm, 2 * mm, mm / 2))


def test_a_header_whose_zooms_are_1_has_its_voxel_sizes_in_the_affine(tmp_path):
    file = nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), None)
    file.set_sform(np.diag([0.5, 2, 4, 1]), 1)
    nibabel.save(file, tmp_path / "a.nii.gz")
    assert nibabel.load(tmp_path / "a.nii.gz").header.get_zooms() == (1, 1, 1)
    assert volumes.spacing_of(tmp_path / "a.nii.gz") == pytest.approx((4, 2, 0.5))


@pytest.mark.skipif(not REAL_DATA, reason="SEG_REAL_DATA is not set")
def test_real_exams_against_their_own_slightly_moved_masks():
    spec = load_spec("acdc")
    samples = [s for s in index(spec, Path(REAL_DATA, "acdc")) if s.group == "patient001"]
    scores = VolumeScores(spec)
    for sample in samples:
        truth = torch.from_numpy(read_sample(sample, spec)[1])
        scores.add(sample, truth, truth.roll(2, 1))
    assert len(scores.scores) == 6
    for row in scores.scores:  # two voxels of 1.5625 mm
        assert 0.7 < row.dice < 1
        assert row.hd95_mm == pytest.approx(2 * 1.5625)
        assert row.hd95_voxels <= 2
        assert row.truth_ml == row.predicted_ml > 20
