"""Which images are labeled, unlabeled and for validation (Section 4.1)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of, folder_spec, made_up, make_folder, toy_spec

from datasets.layouts import index
from datasets.spec import Sample, Slice, load_spec
from datasets.splits import ROLES, ByCount, ByFile, ByRatio, Split, read_split, rule_of, split


def ids(samples) -> list[str]:
    return [s.id for s in samples]


def groups(samples) -> set[str]:
    return {s.group for s in samples}


def acdc_like(n_exams: int) -> list[Sample]:
    """12 to 28 slices per exam, in two frames, as in ACDC."""
    depths = np.random.default_rng(0).integers(6, 15, n_exams)
    exams = [f"patient{e:03d}" for e, depth in enumerate(depths) for _ in range(2 * depth)]
    return made_up(len(exams), exams.__getitem__)


TEST = [Sample(f"t{i}", "t", i, i, "test") for i in range(9)]


def without_masks(samples: list[Sample], step: int) -> list[Sample]:
    """The samples, every step-th without its mask."""
    for i in range(0, len(samples), step):
        samples[i] = dataclasses.replace(samples[i], mask=None)
    return samples


# What is drawn


@pytest.mark.parametrize(
    ("spec", "n", "ratio", "expected"),
    [
        (load_spec("voc"), 10582, 0.1, (899, 8994, 1588)),  # the paper's counts
        (load_spec("voc"), 10582, 0.2, (1799, 8994, 1588)),
        (load_spec("voc"), 10582, 0.3, (2698, 8994, 1588)),
        (load_spec("voc"), 10582, 0.5, (4497, 8994, 1588)),
        (load_spec("voc"), 10582, 1, (8994, 8994, 1588)),
        (load_spec("cityscapes"), 3475, 0.2, (591, 2953, 522)),
        (load_spec("phantom"), 200, 0.2, (32, 160, 40)),
        (load_spec("voc"), 11, 1, (9, 9, 2)),  # or their proportions: 1.65 to validate
        (load_spec("voc"), 2, 1, (1, 1, 1)),
        (toy_spec(), 200, 0.1, (17, 170, 30)),  # without counts 15% are held out
    ],
)
def test_numbers_of_labeled_training_and_validation_images(spec, n, ratio, expected):
    parts = split(made_up(n), ratio, 0, spec)
    n_labeled = len(parts.labeled)
    assert (n_labeled, n_labeled + len(parts.unlabeled), len(parts.val)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_split_is_a_partition_sorted_by_id_with_no_exam_on_both_sides(seed):
    samples = acdc_like(100)
    parts = split(samples, 0.3, seed, load_spec("acdc"))
    everything = [*parts.labeled, *parts.unlabeled, *parts.val]
    assert sorted(everything, key=lambda s: s.id) == samples
    for role, names in parts.ids().items():
        assert names == ids(getattr(parts, role)) == sorted(names)
    train, val = groups(parts.labeled + parts.unlabeled), groups(parts.val)
    assert (len(train), len(val), train & val) == (75, 25, set())


@pytest.mark.parametrize("unit", ["image", "exam"])
@pytest.mark.parametrize("kind", ["paper", "standard", "image"])
def test_fewer_labels_are_part_of_more_and_val_stays(kind, unit):
    units = groups if unit == "exam" else ids
    samples, before, val = [*acdc_like(40), *TEST], set(), set()
    for ratio in 0.1, 0.2, 0.5, 1:
        parts = split(samples, ratio, 0, load_spec("acdc"), kind, unit)
        labeled, unlabeled = {*units(parts.labeled)}, {*units(parts.unlabeled)}
        assert len(labeled) == round(ratio * len(labeled | unlabeled))
        assert not labeled & unlabeled
        assert before < labeled
        before = labeled
        val.add(parts.val)
    val.add(split(samples, 0.2, 0, load_spec("acdc"), kind).val)
    assert len(val) == 1


def test_split_does_not_depend_on_the_order_of_the_samples_and_leaves_it_alone():
    samples, spec = made_up(300), load_spec("voc")
    reverse = samples[::-1]
    assert split(reverse, 0.2, 1, spec) == split(samples, 0.2, 1, spec)
    assert reverse == samples[::-1]


def test_splits_follow_from_the_seed_and_are_those_of_earlier_runs():
    spec = load_spec("phantom")
    samples = index(spec, Path())
    hashes = {
        (0.1, 0): "e4dc6ead43c54f94", (0.1, 1): "e9832191dd9a8bfd", (0.2, 0): "543181b7879defe4",
        (0.2, 2): "269337fbc47e62d2", (1.0, 1): "50673ef4324a5f18",
    }  # fmt: skip
    for (ratio, seed), expected in hashes.items():
        assert split(list(samples), ratio, seed, spec).hash() == expected


# Kinds of split


def test_samples_outside_the_pool_are_not_split():
    parts = split([*made_up(20), *TEST], 1, 0, load_spec("acdc"))
    assert sorted(ids(parts.labeled + parts.val)) == ids(made_up(20))


def test_standard_split_validates_on_all_masks_of_its_part_whatever_the_seed():
    spec, samples = load_spec("acdc"), [*made_up(40), *TEST]
    parts, other = (split(samples, 0.25, seed, spec, "standard") for seed in (0, 1))
    for each in parts, other:
        assert (len(each.labeled), len(each.unlabeled), each.val) == (10, 30, tuple(TEST))
    assert parts.labeled != other.labeled
    samples[-1] = dataclasses.replace(samples[-1], mask=None)
    assert split(samples, 0.25, 0, spec, "standard").val == tuple(TEST[:8])


def test_image_split_is_the_released_codes_85_to_15_over_slices():
    samples = acdc_like(100)
    parts = split(samples, 0.2, 0, load_spec("acdc"), "image")
    assert len(parts.val) == round(0.15 * len(samples))
    assert len(groups(parts.labeled + parts.unlabeled) & groups(parts.val)) > 50


def test_a_folders_val_is_what_it_is_validated_on(tmp_path):
    spec, root = folder_spec(), make_folder(tmp_path, 8, n_unlabeled=3, n_val=2)
    for kind in "paper", "standard", "image":
        samples = index(spec, root, kind)
        parts = split(samples, 0.5, 0, spec, kind)
        assert ids(parts.val) == ["picture 11", "picture 12"]
        assert (len(parts.labeled), len(parts.unlabeled)) == (4, 4 + 3)
    whole = split(samples, 1.0, 0, spec)
    assert ids(whole.unlabeled) == ["picture 10", "picture 8", "picture 9"]


# Rules


@pytest.mark.parametrize("unit", ["image", "exam"])
def test_a_number_of_labels_is_the_ratio_that_it_makes(unit):
    spec, samples = load_spec("acdc"), acdc_like(40)
    train = ByRatio("paper", unit, 0.2).apply(samples, spec, 3)
    n = len(train.labeled if unit == "image" else groups(train.labeled))
    assert ByCount("paper", unit, n).apply(samples, spec, 3) == train
    message = error_of(ByCount("paper", unit, 999).apply, samples, spec, 3)
    n_train = len(train.labeled + train.unlabeled) if unit == "image" else 30
    assert message == f"--labeled 999: acdc has {n_train} training {unit}s with masks"


def test_rules_of_one_kind_divide_the_same_parts_in_the_same_way():
    paper = ByRatio("paper", "image", 0.2), ByCount("paper", "exam", 3)
    rules = [*paper, ByRatio("image", "image", 0.2), ByFile("a.json"), ByFile("b.json")]
    kinds = [0, 0, 1, 2, 2]
    for rule, kind in zip(rules, kinds, strict=True):
        assert [rule.kind == other.kind for other in rules] == [kind == other for other in kinds]


def test_summary_counts_the_units_that_get_labels():
    spec, samples = load_spec("acdc"), acdc_like(100)
    by_exam = ByCount("paper", "exam", 8).apply(samples, spec, 0)
    expected = "8 of 75 exams labeled (152 slices), 67 unlabeled (1,388), 25 for validation (478)"
    assert by_exam.summary() == by_exam.summary("exam") == expected
    parts = ByRatio("paper", "image", 0.1).apply(without_masks(samples, 100), spec, 0)
    unlabeled = "1,388 unlabeled (1,372 have masks that are not used)"
    expected = f"152 of 1,540 images labeled, {unlabeled}, 473 for validation"
    assert parts.summary() == parts.summary("image") == expected
    single = ByRatio("paper", "exam", 0.2).apply(made_up(20), folder_spec(), 0)
    assert single.unit() == "image"


# Masks that are missing


def test_an_image_without_a_mask_is_neither_labeled_nor_counted_nor_validated_on():
    samples = without_masks(made_up(200), 2)
    parts, half = (split(samples, ratio, 0, toy_spec()) for ratio in (1, 0.5))
    assert len(parts.val) == 15  # of the 100 with a mask
    assert (len(parts.labeled), len(half.labeled)) == (85, 42)
    assert all(s.mask is not None for s in parts.labeled + parts.val)
    assert {s.mask for s in parts.unlabeled} == {None}


@pytest.mark.parametrize("unit", ["image", "exam"])
def test_an_exams_slice_without_a_mask_is_unlabeled_or_unused(unit):
    samples = without_masks(acdc_like(40), 7)
    parts = split(samples, 1, 0, load_spec("acdc"), "paper", unit)
    assert all(s.mask is not None for s in parts.labeled + parts.val)
    assert {s.mask for s in parts.unlabeled} == {None}
    assert not {*groups(parts.labeled + parts.unlabeled)} & {*groups(parts.val)}


@pytest.mark.parametrize(
    ("samples", "spec", "ratio", "kind", "unit", "message"),
    [
        (made_up(1), folder_spec(), 1, "paper", "image",
         "own: no training image has a mask; all masks are held out for validation"),
        (without_masks(made_up(1), 1), folder_spec(), 1, "paper", "image",
         "own: no training image has a mask; masks/ must contain their masks"),
        (acdc_like(8), load_spec("acdc"), 0.05, "paper", "exam",
         "--ratio 0.05 of 6 training exams leaves no labeled exam"),
        (made_up(40), load_spec("acdc"), 0.5, "standard", "image",
         "--split standard: acdc's part 'test' is missing"),
    ],
)  # fmt: skip
def test_too_few_masks_are_named(samples, spec, ratio, kind, unit, message):
    assert message in error_of(split, samples, ratio, 0, spec, kind, unit)


# Split files

# three slices of each of five exams; the fifth has no masks
SLICES = [
    Sample(f"exam{e}_s{z}", f"exam{e}", 10 * e + z, None if e == 5 else 0, "train")
    for e in (1, 2, 3, 4, 5)
    for z in range(3)
]
LISTS = {"labeled": ["exam1"], "unlabeled": ["exam2"], "val": ["exam3"]}


def slices_of(exam: int, *numbers: int) -> list[str]:
    return [f"exam{exam}_s{z}" for z in numbers]


def read_lists(path: Path, lists, samples: list[Sample] = SLICES) -> Split:
    path.write_text(json.dumps(lists))
    return read_split(path, samples)


def test_split_file_takes_ids_and_whole_groups_and_nothing_else(tmp_path):
    lists = {
        "labeled": ["exam2_s2", "exam1", "exam2_s0", "exam2_s0"],  # in any order, also twice
        "unlabeled": ["exam5", "exam2_s1"],
        "val": ["exam3"],  # exam4 has no role
    }
    parts = read_lists(tmp_path / "split.json", lists)
    assert parts.ids() == {
        "labeled": slices_of(1, 0, 1, 2) + slices_of(2, 0, 2),
        "unlabeled": slices_of(2, 1) + slices_of(5, 0, 1, 2),
        "val": slices_of(3, 0, 1, 2),
    }
    assert read_lists(tmp_path / "split.json", {**LISTS, "unlabeled": []}).unlabeled == ()


def test_test_images_are_kept_but_change_no_hash(tmp_path):
    plain = read_lists(tmp_path / "split.json", LISTS)
    parts = read_lists(tmp_path / "split.json", {**LISTS, "test": ["exam4"]})
    assert [s.id for s in parts.test] == slices_of(4, 0, 1, 2)
    assert parts.ids() == {**plain.ids(), "test": slices_of(4, 0, 1, 2)}
    assert parts.hash() == plain.hash()
    assert "test" not in plain.ids()


def test_a_name_is_an_id_or_a_volume_or_a_group(tmp_path):
    samples = [
        *(Sample(f"P1_a_s0{z}", "P1", Slice(Path("a.nii"), z), 0) for z in range(2)),
        *(Sample(f"P1_b_s0{z}", "P1", Slice(Path("b.nii"), z), 0) for z in range(2)),
        *(Sample(name, "P2", 0, 0) for name in ("P2", "P2 more")),
    ]
    lists = {"labeled": ["P1_a"], "unlabeled": ["P1_b_s01"], "val": ["P2"]}
    parts = read_lists(tmp_path / "split.json", lists, samples)
    assert parts.ids() == {
        "labeled": ["P1_a_s00", "P1_a_s01"],
        "unlabeled": ["P1_b_s01"],
        "val": ["P2"],  # an image of this id, not the whole group: a run's own lists have ids
    }


@pytest.mark.parametrize("n", [1, 3, 7, 14])
def test_splits_of_the_literature_have_70_10_and_20_exams(n):
    lists = json.loads(rule_of({"split": f"acdc_{n}of70"}).path.read_text())
    assert [len(lists[role]) for role in (*ROLES, "test")] == [n, 70 - n, 10, 20]
    exams = [exam for names in lists.values() for exam in names]
    assert sorted(exams) == [f"patient{i:03d}" for i in range(1, 101)]
    smaller = {1: 1, 3: 1, 7: 3, 14: 7}[n]
    fewer = json.loads(rule_of({"split": f"acdc_{smaller}of70"}).path.read_text())
    assert {*fewer["labeled"]} <= {*lists["labeled"]}
    assert fewer["test"] == lists["test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled": None}, "expected a list of ids as 'labeled'"),
        ({"val": [3]}, "expected a list of ids as 'val'"),
        ({"test": "exam4"}, "expected a list of ids as 'test'"),
        ({"test": []}, "'test' is empty"),
        ({"val": ["exam9", "exam3", "exam3_s3"]}, "not in the dataset: exam9; exam3_s3"),
        ({"val": ["exam1"]}, "both labeled and val: exam1_s0; exam1_s1; exam1_s2"),
        ({"labeled": slices_of(1, 0), "val": slices_of(1, 1)}, "in training and validation: exam1"),
        ({"unlabeled": slices_of(3, 0), "val": slices_of(3, 1)},
         "in training and validation: exam3"),
        ({"test": ["exam5"]}, "test, but without a mask: exam5_s0; exam5_s1; exam5_s2"),
        ({"labeled": slices_of(1, 0), "test": slices_of(1, 1)}, "in training and test: exam1"),
        ({"labelled": ["exam1"]},
         "unknown key 'labelled'; expected labeled, unlabeled, val and test"),
    ],
)  # fmt: skip
def test_wrong_split_file_is_named_with_its_ids(tmp_path, changes, message):
    path = tmp_path / "split.json"
    assert error_of(read_lists, path, {**LISTS, **changes}) == f"{path}: {message}"


def test_lists_that_a_run_wrote_may_divide_an_exam_unless_they_were_edited(tmp_path):
    path = tmp_path / "split.json"
    divided = split(SLICES, 0.5, 0, load_spec("acdc"), "image")
    lists = {**divided.ids(), "hash": divided.hash()}
    path.write_text(json.dumps(lists))
    assert read_split(path, SLICES) == divided
    path.write_text(json.dumps({**lists, "unlabeled": lists["unlabeled"][1:]}))
    assert "in training and validation: exam" in error_of(read_split, path, SLICES)


def test_test_images_added_to_a_runs_own_lists_are_of_other_patients(tmp_path):
    path = tmp_path / "split.json"
    parts = Split((SLICES[0],), (), (SLICES[9],))
    lists = {**parts.ids(), "hash": parts.hash(), "test": [SLICES[1].id]}
    path.write_text(json.dumps(lists))
    assert "in training and test: exam1" in error_of(read_split, path, SLICES)


def test_a_repeated_key_of_a_split_file_is_named(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(
        '{"labeled": ["exam1"], "unlabeled": [], "val": ["exam2"], "labeled": ["exam3"]}'
    )
    assert error_of(read_split, path, SLICES) == f"{path}: repeats the key 'labeled'"


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100000])
def test_file_that_is_no_split_is_named(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(content)
    assert error_of(read_split, path, SLICES).startswith(f"{path}: ")
