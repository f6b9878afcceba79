"""Which images are labeled, unlabeled and for validation (Section 4.1)."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, folder_spec, made_up, make_folder, toy_spec

from datasets.layouts import index
from datasets.spec import Sample, Slice, load_spec
from datasets.splits import ROLES, ByCount, ByFile, ByRatio, Split, read_split, split, split_file


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
        (load_spec("voc"), 160, 0.2, (27, 136, 24)),  # or their proportions
        (load_spec("cityscapes"), 5, 0.2, (1, 4, 1)),
        (load_spec("voc"), 8, 1, (7, 7, 1)),  # 1.2 to validate
        (load_spec("voc"), 11, 1, (9, 9, 2)),  # 1.65 to validate
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


def test_split_depends_on_the_seed_and_not_on_the_order_of_the_samples():
    samples, spec = made_up(300), load_spec("voc")
    parts, other = (split(samples, 0.2, seed, spec) for seed in (1, 2))
    assert split(samples[::-1], 0.2, 1, spec) == parts
    assert other.val != parts.val
    places = []
    for each in parts, other:
        train = sorted([*each.labeled, *each.unlabeled], key=lambda s: s.id)
        places.append([train.index(s) for s in each.labeled])
    assert places[0] != places[1]  # labels are drawn too, not only the validation set
    assert list(range(len(places[0]))) not in places  # and not taken from the top of the list


def test_split_leaves_the_global_generators_and_its_input_alone():
    samples = made_up(50)[::-1]

    def state() -> tuple:
        generators = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return random.getstate(), *generators, samples.copy()

    before = state()
    split(samples, 0.2, 1, toy_spec())
    assert state() == before


def test_splits_are_those_of_earlier_runs():
    spec = load_spec("phantom")
    samples = index(spec, Path())
    hashes = {
        (0.1, 0): "e4dc6ead43c54f94", (0.1, 1): "e9832191dd9a8bfd", (0.2, 0): "543181b7879defe4",
        (0.2, 2): "269337fbc47e62d2", (1.0, 1): "50673ef4324a5f18",
    }  # fmt: skip
    for (ratio, seed), expected in hashes.items():
        assert split(list(samples), ratio, seed, spec).hash() == expected


def test_hash_follows_the_ids_and_their_roles_alone():
    samples, spec = made_up(100), toy_spec()
    parts = split(samples, 0.2, 0, spec)
    elsewhere = {"image": Path("elsewhere"), "mask": Path("too"), "part": None}
    moved = [dataclasses.replace(s, **elsewhere) for s in samples]
    assert split(moved, 0.2, 0, spec).hash() == parts.hash()
    renamed = [dataclasses.replace(s, id=s.id.replace("00099", "00100")) for s in samples]
    others = [(renamed, 0.2, 0), (samples, 0.3, 0), (samples, 0.2, 1), (samples[1:], 0.2, 0)]
    hashes = {split(*other, spec).hash() for other in others}
    assert len(hashes | {parts.hash()}) == 5


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


def test_image_split_is_the_released_codes_85_to_15_over_slices(tmp_path):
    samples = acdc_like(100)
    parts = split(samples, 0.2, 0, load_spec("acdc"), "image")
    assert len(parts.val) == round(0.15 * len(samples))
    assert len(groups(parts.labeled + parts.unlabeled) & groups(parts.val)) > 50
    message = error_of(read_lists, tmp_path / "split.json", parts.ids(), samples)
    assert "in training and validation: patient0" in message  # refused as a file


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
        assert [rule.same_kind(other) for other in rules] == [kind == other for other in kinds]


def test_summary_counts_the_units_that_get_labels():
    spec, samples = load_spec("acdc"), acdc_like(100)
    by_exam = ByCount("paper", "exam", 8).apply(samples, spec, 0)
    expected = "8 of 75 exams labeled (152 slices), 67 unlabeled (1,388), 25 for validation (478)"
    assert by_exam.summary() == by_exam.summary("exam") == expected
    parts = ByRatio("paper", "image", 0.1).apply(without_masks(samples, 100), spec, 0)
    unused = sum(sample.mask is not None for sample in parts.unlabeled)
    n_labeled, n_unlabeled, n_val = map(len, (parts.labeled, parts.unlabeled, parts.val))
    expected = f"{n_labeled:,} of {n_labeled + n_unlabeled:,} images labeled, "
    expected += f"{n_unlabeled:,} unlabeled ({unused:,} have masks that are not used), "
    assert 0 < unused < n_unlabeled
    assert parts.summary() == parts.summary("image") == f"{expected}{n_val:,} for validation"
    single = ByRatio("paper", "exam", 0.2).apply(made_up(20), folder_spec(), 0)
    assert single.unit() == "image"


# Masks that are missing


@pytest.mark.parametrize("unit", ["image", "exam"])
def test_an_image_without_a_mask_is_neither_labeled_nor_counted_nor_validated_on(unit):
    samples = without_masks(made_up(200), 2)
    parts, half = (split(samples, ratio, 0, toy_spec(), "paper", unit) for ratio in (1, 0.5))
    assert len(parts.val) == 15  # of the 100 with a mask
    assert (len(parts.labeled), len(half.labeled)) == (85, 42)
    assert all(s.mask is not None for s in parts.labeled + parts.val)
    assert {s.mask for s in parts.unlabeled} == {None}


def test_an_exams_slice_without_a_mask_is_never_labeled():
    samples = without_masks(acdc_like(40), 7)
    parts = split(samples, 1, 0, load_spec("acdc"), "paper", "exam")
    assert all(s.mask is not None for s in parts.labeled)
    assert {s.mask for s in parts.unlabeled} == {None}


@pytest.mark.parametrize(
    ("samples", "spec", "ratio", "kind", "unit", "message"),
    [
        (made_up(1), folder_spec(), 1, "paper", "image",
         "own: no training image has a mask; all masks are held out for validation"),
        (without_masks(made_up(1), 1), folder_spec(), 1, "paper", "image",
         "own: no training image has a mask; masks/ must contain their masks"),
        (made_up(118), toy_spec(), 0.004, "paper", "image",
         "--ratio 0.004 of 100 training images leaves no labeled image"),
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


@pytest.mark.parametrize("kind", ["paper", "standard"])
def test_a_runs_own_split_reads_back_as_the_same_split(tmp_path, kind):
    samples = [*acdc_like(20), *TEST]
    parts = split(samples, 0.3, 1, load_spec("acdc"), kind)
    lists = {**parts.ids(), "hash": parts.hash()}  # as engine.folder writes it
    same = read_lists(tmp_path / "split.json", lists, samples)
    assert same == parts
    assert same.hash() == parts.hash()


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
    lists |= {"labeled": ["P1"], "unlabeled": []}
    parts = read_lists(tmp_path / "split.json", lists, samples)
    assert len(parts.labeled) == 4


@pytest.mark.parametrize("n", [1, 3, 7, 14])
def test_splits_of_the_literature_have_70_10_and_20_exams(n):
    lists = json.loads(split_file(f"acdc_{n}of70").read_text())
    assert [len(lists[role]) for role in (*ROLES, "test")] == [n, 70 - n, 10, 20]
    exams = [exam for names in lists.values() for exam in names]
    assert sorted(exams) == [f"patient{i:03d}" for i in range(1, 101)]
    smaller = {1: 1, 3: 1, 7: 3, 14: 7}[n]
    fewer = json.loads(split_file(f"acdc_{smaller}of70").read_text())
    assert {*fewer["labeled"]} <= {*lists["labeled"]}
    assert fewer["test"] == lists["test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled": None}, "expected a list of ids as 'labeled'"),
        ({"unlabeled": "exam2"}, "expected a list of ids as 'unlabeled'"),
        ({"val": [3]}, "expected a list of ids as 'val'"),
        ({"labeled": []}, "'labeled' is empty"),
        ({"val": []}, "'val' is empty"),
        ({"val": ["exam9", "exam3", "exam3_s3"]}, "not in the dataset: exam9; exam3_s3"),
        ({"unlabeled": slices_of(1, 1)}, "both labeled and unlabeled: exam1_s1"),
        ({"val": ["exam1"]}, "both labeled and val: exam1_s0; exam1_s1; exam1_s2"),
        ({"val": slices_of(2, 2)}, "both unlabeled and val: exam2_s2"),
        ({"labeled": slices_of(1, 0), "val": slices_of(1, 1)}, "in training and validation: exam1"),
        ({"unlabeled": slices_of(3, 0), "val": slices_of(3, 1)},
         "in training and validation: exam3"),
        ({"labeled": ["exam1", "exam5_s1"]}, "labeled, but without a mask: exam5_s1"),
        ({"val": ["exam5"]}, "val, but without a mask: exam5_s0; exam5_s1; exam5_s2"),
        ({"test": ["exam5"]}, "test, but without a mask: exam5_s0; exam5_s1; exam5_s2"),
        ({"test": []}, "'test' is empty"),
        ({"test": "exam4"}, "expected a list of ids as 'test'"),
        ({"test": ["exam9"]}, "not in the dataset: exam9"),
        ({"test": slices_of(3, 1)}, "both val and test: exam3_s1"),
        ({"val": slices_of(3, 0), "test": slices_of(3, 1)}, "in validation and test: exam3"),
        ({"labeled": slices_of(1, 0), "test": slices_of(1, 1)}, "in training and test: exam1"),
        ({"labelled": ["exam1"]},
         "unknown key 'labelled'; expected labeled, unlabeled, val and test"),
    ],
)  # fmt: skip
def test_wrong_split_file_is_named_with_its_ids(tmp_path, changes, message):
    path = tmp_path / "split.json"
    assert error_of(read_lists, path, {**LISTS, **changes}) == f"{path}: {message}"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff", b"[" * 100000])
def test_file_that_is_no_split_is_named(tmp_path, content):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_bytes(content)
    assert error_of(read_split, path, SLICES).startswith(f"{path}: ")
