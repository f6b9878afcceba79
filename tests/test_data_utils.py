"""Epochs, normalization, batches and load_data."""

import dataclasses
import json
import math
import multiprocessing
import os
import pickle
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import error_of, made_up

import data_utils
from data_utils import Batches, Pairs, Stored, normalize
from datasets.cache import Cache, decode, open_cache
from datasets.layouts import index
from datasets.spec import Sample, load_spec
from datasets.splits import ByFile, split
from engine.flags import parse_args
from utils import IGNORE

CPU = torch.device("cpu")
REAL = Path(os.environ.get("SEG_REAL_DATA", "/nonexistent"))
needs_real_data = pytest.mark.skipif(
    "SEG_REAL_DATA" not in os.environ, reason="SEG_REAL_DATA names no folder"
)


# Epochs and batches


def stored(first: int, n: int) -> Stored:
    """Samples first, first + 1, ...: image and mask hold the sample's number."""
    pixels, samples = np.arange(30, dtype=np.uint8), made_up(30)
    rows = {sample.id: row for row, sample in enumerate(samples)}
    cache = Cache(pixels.reshape(30, 1, 1, 1), pixels.reshape(30, 1, 1), rows)
    return Stored(cache, tuple(samples[first : first + n]))


def test_ignored_pixels_are_kept_or_become_the_ignored_class():
    masks = np.array([[[0, IGNORE], [2, 1]]], np.uint8)
    cache = Cache(np.zeros((1, 1, 2, 2), np.uint8), masks, {"a": 0})
    samples = (Sample("a", "a", 0, 0),)
    assert Stored(cache, samples).mask(0).tolist() == masks[0].tolist()
    _, mask = Stored(cache, samples, ignored_class=0)[0]
    assert mask.tolist() == [[0, 0], [2, 1]]
    assert masks[0, 0, 1] == IGNORE  # the cache is unchanged


def test_images_of_many_classes_are_those_with_the_most_values_spread_out():
    pictures = stored(0, 6)
    masks = np.zeros((6, 2, 2), np.uint8)
    masks[[1, 2, 4], 0] = [1, 2]
    masks[5, 0, 0] = 1
    pictures.cache = dataclasses.replace(pictures.cache, masks=masks)
    masks[0, 1] = [3, IGNORE]  # ignored pixels are no class
    expected = {2: [1, 4], 3: [1, 2, 4], 5: [0, 1, 2, 4, 5], 99: [0, 1, 2, 3, 4, 5]}
    assert {n: pictures.of_many_classes(n) for n in expected} == expected


def drawn(n: int, n_u: int, seed: int = 0, epoch: int = 0, *batch_size: int) -> list[list[int]]:
    """The numbers of x, y and x_u in an epoch over samples 0 to n and 10 to 10 + n_u."""
    pairs = Pairs(stored(0, n), stored(10, n_u))
    items = [pairs[rows] for rows in pairs.epoch(seed, epoch, *batch_size)]
    return [[int(number) for number in column] for column in zip(*items, strict=True)]


@pytest.mark.parametrize(("n", "n_u"), [(4, 10), (10, 4), (1, 10), (5, 5), (5, 20), (6, 0)])
def test_epoch_passes_once_over_the_longer_list_and_cycles_the_shorter(n, n_u):
    x, y, *x_u = drawn(n, n_u)
    assert x == y
    for numbers, start, count in [(x, 0, n), *((u, 10, n_u) for u in x_u)]:
        assert len(numbers) == max(n, n_u)
        for i in range(0, len(numbers), count):
            one_pass = numbers[i : i + count]
            assert len({*one_pass}) == len(one_pass)
            assert {*one_pass} <= {*range(start, start + count)}


def test_last_batch_is_filled_up_by_a_next_pass():
    x_u = drawn(3, 7, 0, 0, 5)[2]
    assert len(x_u) == 10
    assert sorted(x_u[:7]) == list(range(10, 17))
    assert len({*x_u[7:]}) == 3


def test_order_follows_from_seed_and_epoch_alone_and_each_pass_has_its_own():
    torch.manual_seed(0)
    np.random.seed(0)
    before = drawn(4, 10, 1, 2)
    assert before[0][:4] != before[0][4:8]
    torch.manual_seed(9)
    np.random.seed(9)
    assert drawn(4, 10, 1, 2) == before
    for seed, epoch in (1, 3), (2, 2), (2, 1):
        other = drawn(4, 10, seed, epoch)
        assert other[0] != before[0]
        assert other[2] != before[2]


# Normalization


def test_normalize_by_hand_for_each_image_and_channel():
    x = torch.tensor(
        [[[[0, 1], [2, 5]], [[10, 10], [10, 50]]], [[[100, 0], [0, 0]], [[7, 7], [7, 7]]]]
    )
    expected = [
        [[[-0.4, -0.2], [0, 0.6]], [[-0.25, -0.25], [-0.25, 0.75]]],
        [[[0.75, -0.25], [-0.25, -0.25]], [[0, 0]] * 2],
    ]
    assert normalize(x.to(torch.uint8)).dtype == torch.float32
    torch.testing.assert_close(normalize(x.to(torch.uint8)), torch.tensor(expected))


def test_constant_channel_becomes_zero():
    rng = torch.Generator().manual_seed(0)
    values = 4031 * torch.rand(1, 99, 1, 1, generator=rng)  # few have an exact mean
    assert normalize(values.expand(1, 99, 33, 31)).abs().max() == 0


def test_released_normalization_of_bytes_is_fixed_and_of_floats_between_their_extremes():
    x = torch.tensor([[[[0, 51], [102, 255]]], [[[51, 51], [51, 51]]]])
    expected = torch.tensor([[[[-1, -0.6], [-0.2, 1]]], [[[-0.6, -0.6], [-0.6, -0.6]]]])
    torch.testing.assert_close(normalize(x.to(torch.uint8), "half"), expected)
    floats = torch.tensor([[[[100.0, 200], [400, 500]]], [[[3, 3], [3, 3]]]])
    expected = torch.tensor([[[[-1, -0.5], [0.5, 1]]], [[[-1, -1], [-1, -1]]]])
    torch.testing.assert_close(normalize(floats, "half"), expected)


# Batches

PHANTOM = load_spec("phantom")
SAMPLES = index(PHANTOM, Path())[:11]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Cache:
    """The first 11 phantoms at 16x16."""
    return open_cache(PHANTOM, SAMPLES, (16, 16), tmp_path_factory.mktemp("cache"))


def of(cache: Cache, rows: list[int]) -> Stored:
    return Stored(cache, tuple(SAMPLES[row] for row in rows))


@pytest.mark.parametrize("normalization", ["range", "half"])
def test_batches_come_in_order_normalized_and_end_with_a_smaller_one(phantoms, normalization):
    rows = [3, 1, 4, 0, 5, 9, 2]
    batches = list(Batches(of(phantoms, rows), 3, CPU, normalization=normalization))
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x, normalize(torch.from_numpy(phantoms.images[rows]), normalization))
    assert np.array_equal(y, phantoms.masks[rows])


def test_batches_hold_all_images_unless_processes_are_connected(monkeypatch):
    for key, value in ("WORLD_SIZE", "2"), ("RANK", "1"):
        monkeypatch.setenv(key, value)  # left over, in a notebook
    batches = [y.flatten().tolist() for _, y in Batches(stored(0, 6), 4, CPU)]
    assert batches == [[0, 1, 2, 3], [4, 5]]


def test_worker_processes_live_through_epochs_and_each_epoch_has_its_order():
    others = {*multiprocessing.active_children()}
    batches, readers = Batches(stored(0, 8), 2, CPU, workers=2), []
    for order in [0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4], [3, 1]:
        assert torch.cat([y for _, y in batches.of(order)]).flatten().tolist() == order
        readers.append({*multiprocessing.active_children()} - others)
    assert len(readers[0]) == 2
    assert readers == readers[:1] * 3


# load_data

EIGHT = dataclasses.replace(PHANTOM, counts=(6, 2))


def load(folder: Path, *flags: str, spec=EIGHT, expected=None) -> data_utils.Data:
    """What load_data gives for a split at seed 3, with the cache in a folder."""
    common = ["--training", "--seed", "3", "--size", "16", "16", "--workers", "0"]
    args = parse_args([*common, "--cache", str(folder / "cache"), *flags])
    return data_utils.load_data(args, spec, expected)


def test_workers_that_are_not_forked_map_the_cache_themselves(phantoms):
    again = pickle.loads(pickle.dumps(of(phantoms, [0, 1])))
    assert again.cache.images.filename == phantoms.images.filename
    assert np.array_equal(again.image(1), phantoms.images[1])


def test_load_data_splits_as_the_flags_say_and_opens_the_cache(tmp_path, phantoms):
    data = load(tmp_path, "--ratio", "0.5")
    assert data.n_groups == 8
    assert data.split == split(SAMPLES[:8], 0.5, 3, EIGHT)
    assert len(data.val) == 2
    for role in "labeled", "unlabeled", "val":
        stored_role, samples = getattr(data, role), getattr(data.split, role)
        assert stored_role.samples == samples
        for i, sample in enumerate(samples):
            assert np.array_equal(stored_role.image(i), phantoms.images[sample.image])
            assert np.array_equal(stored_role.mask(i), phantoms.masks[sample.image])


def test_load_data_decodes_only_what_the_split_uses(voc):
    """The pool's own split.json, in a folder that also holds val.txt, gives the same cache."""
    spec, flags = load_spec("voc"), ["--data-root", str(voc)]
    parts = load(voc, *flags, spec=spec).split
    next(voc.rglob("2007_000004.jpg")).write_bytes(b"junk")  # of val.txt
    (voc / "split.json").write_text(json.dumps(parts.ids()))
    again = load(voc, *flags, "--split", str(voc / "split.json"), spec=spec)
    assert again.split.hash() == parts.hash()
    assert len([*(voc / "cache").iterdir()]) == 1


def test_another_split_than_expected_is_refused_before_decoding(tmp_path, monkeypatch):
    expected = split(SAMPLES[:8], 0.5, 3, EIGHT)
    assert load(tmp_path, "--ratio", "0.5", expected=expected.hash()).split == expected
    monkeypatch.setattr(data_utils, "open_cache", lambda *_: pytest.fail("images were decoded"))
    message = error_of(partial(load, tmp_path, "--ratio", "0.3", expected=expected.hash()))
    started = "than the run started with, which its split.json names"
    remedy = "; give --name for another folder, or --overwrite to start over"
    assert message == f"--data-root data/voc: contains other images or masks {started}{remedy}"


# The real datasets, where SEG_REAL_DATA names their folder


@needs_real_data
def test_real_acdc_has_100_exams_and_1902_slices():
    spec = load_spec("acdc")
    samples = index(spec, REAL / "acdc")
    assert (len(samples), len({s.group for s in samples})) == (1902, 100)
    parts = split(samples, 0.1, 0, spec)
    train = {s.group for s in parts.labeled + parts.unlabeled}
    val = {s.group for s in parts.val}
    assert (len(train), len(val), train & val) == (75, 25, set())
    seen = set()
    for sample in samples[4:1902:380]:
        volume, truth = (
            nibabel.load(part.path).get_fdata() for part in (sample.image, sample.mask)
        )
        image, mask = decode(sample, spec, volume.shape[1::-1])
        assert np.array_equal(image[0], volume[:, :, sample.image.z].T.astype(np.float32))
        assert np.array_equal(mask, truth[:, :, sample.mask.z].T)
        seen |= {*mask.unique().tolist()}
    assert seen == {0, 1, 2, 3}


@needs_real_data
def test_real_acdc_in_the_literatures_split_has_136_labeled_slices():
    rule = ByFile("acdc_7of70")
    parts = rule.apply(index(load_spec("acdc"), REAL / "acdc", rule.kind), load_spec("acdc"), 0)
    assert len(parts.labeled) == 136  # as SSL4MIS counts them
    assert len(parts.labeled + parts.unlabeled) == 1312
    assert len({s.group for s in parts.test}) == 20


@needs_real_data
def test_real_voc_decodes():
    spec = load_spec("voc")
    samples = index(spec, REAL / "voc")
    seen = set()
    for sample in samples[:: max(1, len(samples) // 160)]:
        image, mask = decode(sample, spec, (64, 64))
        assert (image.shape, mask.shape) == ((3, 64, 64), (64, 64))
        seen |= {*mask.unique().tolist()}
    assert seen == {*range(21), IGNORE}


@needs_real_data
def test_real_cityscapes_decodes():
    spec = load_spec("cityscapes")
    samples = index(spec, REAL / "cityscapes")
    for sample in samples[:: max(1, len(samples) // 5)]:
        mask = decode(sample, spec, (128, 256))[1]
        assert mask.max() <= 19
        assert len(mask.unique()) > 5


# Augmentation


@pytest.mark.parametrize(
    ("orientation", "shape", "angles", "flips"),
    [
        ("any", (6, 6), range(4), [False, True]),
        ("any", (6, 8), [0, 2], [False, True]),
        ("mirror", (6, 6), [0], [False, True]),
        ("fixed", (6, 6), [0], [False]),
    ],
)
def test_images_and_masks_are_flipped_and_rotated_alike_as_the_orientation_allows(
    orientation, shape, angles, flips
):
    torch.manual_seed(0)
    x = torch.linspace(-0.5, 0.5, math.prod(shape)).expand(400, 2, -1).reshape(400, 2, *shape)
    y = torch.arange(math.prod(shape)).view(1, *shape).expand(400, -1, -1)
    moved_x, moved_y = data_utils.augment(x, orientation, y)
    expected = []
    for k in angles:
        turned = y[0].rot90(k)
        expected += [turned.flip(1) if flip else turned for flip in flips]
    counts = [0] * len(expected)
    for image, mask in zip(moved_x, moved_y, strict=True):
        (i,) = (i for i, variant in enumerate(expected) if torch.equal(mask, variant))
        counts[i] += 1
        for channel in image:  # brighter pixels keep larger values: the same move as the mask's
            assert torch.equal(channel.flatten().argsort(), mask.flatten().argsort())
    assert min(counts) > 0.6 * 400 / len(expected)


def test_augmented_images_differ_in_contrast_and_brightness_within_the_networks_range():
    torch.manual_seed(0)
    x = torch.tensor([-0.5, 0.5]).view(1, 1, 1, 2).expand(500, 1, 1, 2)
    low, high = data_utils.augment(x, "fixed")[0].flatten(1).unbind(1)
    for value, least, most in (high - low, 0.8, 1.2), ((high + low) / 2, -0.1, 0.1):
        assert least - 1e-6 <= value.min() < least + 0.02 * (most - least)
        assert most - 0.02 * (most - least) < value.max() <= most + 1e-6
    bright, _ = data_utils.augment(torch.ones(50, 1, 4, 4), "any")
    assert bright.max() == 1


def test_batches_augment_labeled_and_unlabeled_images_and_draw_nothing_without(phantoms):
    pairs, items = Pairs(of(phantoms, [0, 1]), of(phantoms, [2, 3])), [(0, 0), (1, 1)]
    state = torch.get_rng_state()
    ((x, y, x_u),) = Batches(pairs, 2, CPU).of(items)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([x, x_u]), normalize(torch.tensor(phantoms.images[:4])))
    expected = *data_utils.augment(x, "any", y), data_utils.augment(x_u, "any")[0]
    torch.set_rng_state(state)
    (augmented,) = Batches(pairs, 2, CPU, orientation="any").of(items)
    assert all(map(torch.equal, augmented, expected))
    assert not torch.equal(x_u, augmented[2])
