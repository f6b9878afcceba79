"""What a run's masks hold: files of another convention than the others are never trained on."""

from pathlib import Path

import numpy as np
import pytest
from conftest import error_of, folder_spec, make_folder, write_indexed, write_volume
from runs import SUPERVISED, TINY, error_line, run, tiny_on

from datasets.cache import decode
from datasets.files import read_sample
from datasets.labels import check_classes, check_ignored
from datasets.layouts import index
from datasets.spec import DatasetSpec, Sample, Slice

SIZE = 20, 24
TABLE = 'ratio = 1\n[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n'


def drawn(*values: int) -> np.ndarray:
    """A mask with a stripe of each value, all of them equally wide."""
    return np.repeat([values], SIZE[0], 0).repeat(24 // len(values), 1).astype(np.uint8)


def samples_of(root: Path, masks: list[np.ndarray]) -> list[Sample]:
    """Pictures with these masks."""
    make_folder(root, len(masks))
    for number, mask in enumerate(masks):
        write_indexed(root / "masks" / f"picture {number}.png", mask)
    return index(folder_spec(), root)


def checked(samples: list[Sample], spec: DatasetSpec, *unused: Sample) -> None:
    check_ignored([(sample, read_sample(sample, spec)[1]) for sample in samples], spec, unused)


CONTOUR, OBJECT, HOLLOW = drawn(0, 255, 1), drawn(0, 1), drawn(0, 255, 0, 0)
EMPTY, WHITE = drawn(0), drawn(0, 255)


@pytest.mark.parametrize(("hollow", "share"), [((1, 255), "50.0%"), ((255, 0, 0), "33.3%")])
def test_files_that_alone_ignore_pixels_and_lack_objects_are_an_error_that_names_them(
    tmp_path, hollow, share
):
    samples = samples_of(tmp_path, [OBJECT, drawn(*hollow), EMPTY, OBJECT])
    message = error_of(checked, samples, folder_spec())
    found = f"1 mask file holds only ignored pixels ({share}) and one class: {samples[1].mask}; "
    assert message.startswith(found)
    assert message.endswith("index, or as 254 with ignore = 254 to ignore it")


@pytest.mark.parametrize("masks", [[OBJECT, EMPTY], [CONTOUR, OBJECT], [CONTOUR, EMPTY]])
def test_contours_and_empty_masks_are_as_they_should_be(tmp_path, capsys, masks):
    checked(samples_of(tmp_path, masks), folder_spec())
    ignored = np.mean([mask == 255 for mask in masks])
    expected = f"masks:   {ignored:.1%} of the pixels are ignored\n" if ignored else ""
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("masks", "changes"),
    [
        ([CONTOUR, OBJECT, HOLLOW], {}),  # as objects of VOC that were too difficult
        ([OBJECT, drawn(255)], {}),  # nothing was annotated
        ([EMPTY, HOLLOW], {}),  # no other file has objects
        ([OBJECT, drawn(0, 7)], {"ignore": 7}),  # which is not white
    ],
)
def test_such_files_are_a_warning_where_ignoring_is_likely(tmp_path, capsys, masks, changes):
    samples = samples_of(tmp_path, masks)
    checked(samples, folder_spec(**changes))
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith("1 mask file holds only ignored pixels (")
    assert f": {samples[-1].mask}: check that mask values are class indices;" in line


def test_masks_that_are_not_used_may_show_that_objects_have_contours(tmp_path, capsys):
    *samples, unused = samples_of(tmp_path, [OBJECT, HOLLOW, CONTOUR])
    assert "no other mask has any" in error_of(checked, samples, folder_spec())
    checked(samples, folder_spec(), unused)
    assert "1 mask file holds" in capsys.readouterr().out


def test_a_void_class_hides_objects_as_ignored_pixels_do(tmp_path):
    samples = samples_of(tmp_path, [OBJECT, HOLLOW])
    void = {"void": 2, "void_ids": [255], "ignore": 254}
    spec = folder_spec(classes=["dark", "bright", "void"], **void)
    assert "only ignored or void pixels (25.0%)" in error_of(checked, samples, spec)


def test_an_object_that_resizing_loses_is_an_object(tmp_path, capsys):
    small = HOLLOW.copy()
    small[1, 1] = 1
    samples, spec = samples_of(tmp_path, [OBJECT, small]), folder_spec()
    masks = [(sample, decode(sample, spec, (4, 4))[1].numpy()) for sample in samples]
    assert 1 not in masks[1][1]
    check_ignored(masks, spec)
    assert capsys.readouterr().out == "masks:   12.5% of the pixels are ignored\n"
    thin = OBJECT.copy()
    thin[1, 1] = 255  # a contour that resizing loses
    write_indexed(samples[0].mask, thin)
    write_indexed(samples[1].mask, HOLLOW)
    checked(samples, spec)


def test_a_class_that_no_mask_contains_is_printed(tmp_path, capsys):
    samples, spec = samples_of(tmp_path, [OBJECT]), folder_spec(classes=["dark", "bright", "third"])
    check_classes([(samples[0], OBJECT)], spec, role="validation", advice="look")
    assert capsys.readouterr().out == "no validation mask contains third: look\n"


def test_the_slices_of_a_volume_are_one_file(tmp_path):
    samples = []
    for name, value in ("a", 1), ("b", 255):
        write_volume(tmp_path / f"{name}.nii", np.zeros((6, 5, 3), np.int16))
        labels = np.zeros((6, 5, 3), np.uint8)
        labels[:2, :, 1] = 1
        labels[:2, :, 2] = value
        write_volume(tmp_path / f"{name}_gt.nii", labels)
        files = tmp_path / f"{name}.nii", tmp_path / f"{name}_gt.nii"
        samples += [Sample(f"{name}{z}", name, *(Slice(f, z) for f in files)) for z in range(3)]
    checked(samples, folder_spec(channels=1))


@pytest.fixture
def mixed(in_tmp) -> list[str]:
    """The flags of a training on eight masks of 0 and 1, with val/ and test/ like them."""
    root = make_folder(Path("pictures"), 8, n_val=2)
    make_folder(Path("more"), 2).rename(root / "test")
    for path in (root / "test").rglob("*.png"):
        path.rename(path.with_stem(f"test {path.stem}"))
    Path("own.toml").write_text(TABLE)
    return [*tiny_on("own.toml"), *SUPERVISED[len(TINY) :], "--data-root", str(root)]


def replace(folder: str, mask: np.ndarray, step: int = 1) -> None:
    """Save this mask in place of every so manieth one of a folder."""
    for path in sorted(Path("pictures", folder).iterdir())[::step]:
        write_indexed(path, mask)


@pytest.mark.parametrize(("part", "role"), [("masks", "labeled"), ("val/masks", "validation")])
def test_labeled_and_validation_masks_with_one_class_only_are_an_error(mixed, capsys, part, role):
    replace(part, EMPTY)
    message = error_line(capsys, "--training", *mixed)
    assert message.startswith(f"error: the {role} masks contain at most one class: ")


@pytest.mark.parametrize(("part", "step"), [("masks", 2), ("val/masks", 1)])
def test_no_training_starts_with_masks_of_two_conventions(mixed, capsys, part, step):
    replace(part, WHITE, step)
    line = error_line(capsys, "--training", *mixed)
    assert "only ignored pixels (50.0%) and one class: pictures/" in line
    assert not [*Path("checkpoints").glob("*/last.pt")]


def test_no_test_is_scored_silently_with_masks_of_two_conventions(mixed, capsys):
    assert run("--training", *mixed) == 0
    part = "--testing", "--part", "test"
    replace("test/masks", WHITE, 2)
    assert "1 mask file holds only ignored pixels" in error_line(capsys, *part)
    replace("test/masks", WHITE)
    assert run(*part) == 0
    assert "2 mask files hold only ignored pixels" in capsys.readouterr().out
