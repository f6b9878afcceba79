"""The cache of decoded images."""

import dataclasses
import errno
import fcntl
import functools
import inspect
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    error_of,
    folder_spec,
    make_acdc,
    make_folder,
    make_voc,
    picture_sample,
    write_volume,
)
from PIL import Image

import datasets.cache
from datasets import files, writers
from datasets.cache import Cache, cache_key, decode, open_cache, resize
from datasets.layouts import index
from datasets.phantom import draw_phantom
from datasets.spec import Sample, Slice, load_spec


# even, from odd: no pixel center falls on an edge
@pytest.mark.parametrize("size", [(10, 14), (40, 50), (30, 6)])
def test_images_are_resized_bilinearly_and_masks_to_the_nearest(tmp_path, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (25, 31, 3), np.uint8)
    mask = rng.integers(0, 5, (25, 31), np.uint8) * 4
    mask[:3] = 255
    pixels, labels = decode(picture_sample(tmp_path, image, mask), load_spec("voc"), size)
    assert (pixels.shape, labels.shape) == ((3, *size), size)  # H, W
    shape = size[::-1]
    resized = Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR)
    difference = pixels.permute(1, 2, 0).numpy().astype(int) - np.array(resized)
    assert np.abs(difference).max() <= 1
    assert np.array_equal(labels, Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST))
    assert set(labels.unique().tolist()) <= {0, 4, 8, 12, 16, 255}


def test_slices_are_resized_in_floating_point(tmp_path):
    volume = np.random.default_rng(0).normal(0, 1000, (24, 30, 1)).astype(np.float32)
    write_volume(tmp_path / "i.nii.gz", volume)
    sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", 0), None)
    pixels, _ = decode(sample, load_spec("acdc"), (13, 11))
    image = Image.fromarray(np.ascontiguousarray(volume[:, :, 0].T))
    expected = image.resize((11, 13), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(pixels[0], expected, atol=1e-2)


def voc_cache(root: Path, folder: Path, size=(8, 8)) -> Cache:
    """The cache of a made VOC."""
    return open_cache(load_spec("voc"), index(load_spec("voc"), root), size, folder)


def deep(root: Path) -> Path:
    """A folder with one deep picture among others of bytes."""
    make_folder(root, 3)
    values = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    Image.fromarray(values).save(root / "images" / "picture 1.png")
    return root


@pytest.mark.parametrize(
    ("spec", "make", "shape", "dtype"),
    [
        (load_spec("voc"), lambda root: make_voc(root, 4), (4, 3, 8, 12), np.uint8),
        (load_spec("acdc"), lambda root: make_acdc(root, 2, 3), (12, 1, 8, 12), np.float32),
        (folder_spec(), deep, (3, 3, 8, 12), np.float32),
    ],
    ids=["voc", "acdc", "deep"],
)
def test_a_cache_holds_what_decode_returns_as_bytes_or_floats(tmp_path, spec, make, shape, dtype):
    samples = index(spec, make(tmp_path / "data"))
    cache = open_cache(spec, samples, (8, 12), tmp_path / "cache")
    assert (cache.images.shape, cache.images.dtype) == (shape, dtype)
    assert (cache.masks.shape, cache.masks.dtype) == ((shape[0], 8, 12), np.uint8)
    for sample in samples[::-1]:
        image, mask = decode(sample, spec, (8, 12))
        assert np.array_equal(cache.images[cache.rows[sample.id]], image)
        assert np.array_equal(cache.masks[cache.rows[sample.id]], mask)


def test_second_call_reads_no_image_and_maps_the_same_files(voc, tmp_path, monkeypatch):
    first = voc_cache(voc, tmp_path / "cache")

    def state():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}

    before = state()
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was read"))
    second = voc_cache(voc, tmp_path / "cache")
    assert state() == before
    for kind in "images", "masks":
        assert isinstance(getattr(second, kind), np.memmap)
        assert np.array_equal(getattr(first, kind), getattr(second, kind))


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_key_follows_the_size_and_the_time_of_every_file_and_the_samples(voc, kind):
    spec, samples = load_spec("voc"), index(load_spec("voc"), voc)
    path = getattr(samples[2], kind)
    before, status = cache_key(spec, samples, (8, 8)), path.stat()
    os.utime(path, ns=(10**18, 10**18))
    touched = cache_key(spec, samples, (8, 8))
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    grown = cache_key(spec, samples, (8, 8))
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)  # as rsync does
    keys = {before, touched, grown, cache_key(spec, samples, (8, 8))}
    assert len(keys | {cache_key(spec, samples[1:], (8, 8))}) == 5


@pytest.mark.parametrize(
    ("size", "changes", "is_new"),
    [
        ((8, 9), {}, True),
        ((8, 8), {"channels": 1}, True),
        ((8, 8), {"ignore": 0, "label_ids": (255, *range(1, 21))}, True),
        ((8, 8), {"void": 20, "void_ids": (20, 200)}, True),
        ((8, 8), {"palette": ((1, 2, 3),) * 21, "scored": (4,), "counts": (1, 1)}, False),
    ],
)
def test_a_key_follows_the_size_and_the_meaning_of_pixels(voc, size, changes, is_new):
    spec, samples = load_spec("voc"), index(load_spec("voc"), voc)
    key = cache_key(dataclasses.replace(spec, **changes), samples, size)
    assert (key != cache_key(spec, samples, (8, 8))) == is_new


def test_a_changed_volume_gives_a_new_cache(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)[:3]  # one volume and its mask
    open_cache(spec, samples, (14, 18), tmp_path / "cache")
    write_volume(samples[0].image.path, np.full((18, 14, 3), 7, np.int16))
    assert open_cache(spec, samples, (14, 18), tmp_path / "cache").images.max() == 7


def test_code_that_reads_is_part_of_a_caches_key_and_code_that_writes_is_not(voc, monkeypatch):
    spec, samples, hashed = load_spec("voc"), index(load_spec("voc"), voc), []
    before = cache_key(spec, samples, (8, 8))
    assert before == cache_key(spec, samples, (8, 8))
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "getsource", lambda code: hashed.append(code) or "changed")
        assert before != cache_key(spec, samples, (8, 8))
    source = "".join(map(inspect.getsource, hashed))
    for reader in files.read_sample, files.read_volume, draw_phantom, decode, resize:
        assert inspect.getsource(reader) in source
    for writer in writers.save_mask, writers.save_prediction, writers.as_values:
        assert inspect.getsource(writer) not in source


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_decompresses_each_volume_once(acdc, tmp_path, monkeypatch, workers):
    read, log = files.read_volume.__wrapped__, tmp_path / "log"

    def logged(path):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return read(path)

    monkeypatch.setattr(files, "read_volume", functools.lru_cache(maxsize=4)(logged))
    spec, samples = load_spec("acdc"), index(load_spec("acdc"), acdc)
    cache = open_cache(spec, samples, (9, 7), tmp_path / "cache", workers)
    names = log.read_text().splitlines()
    assert len(names) == len({*names}) == len([*acdc.rglob("*frame*")])
    for sample in samples:
        image, mask = decode(sample, spec, (9, 7))
        assert np.array_equal(cache.images[cache.rows[sample.id]], image)
        assert np.array_equal(cache.masks[cache.rows[sample.id]], mask)


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_damaged_cache_is_filled_again(voc, tmp_path, damage):
    images = voc_cache(voc, tmp_path / "cache").images.copy()
    (file,) = (tmp_path / "cache").glob("*/images.npy")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 300 if damage == "cut" else 0])
    assert (voc_cache(voc, tmp_path / "cache").images == images).all()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(("owner", "name"), [(datasets.cache, "_fill_cache"), (Path, "replace")])
def test_another_run_may_store_the_same_cache_meanwhile(
    voc, tmp_path, monkeypatch, owner, name, damaged
):
    cache = tmp_path / "cache"
    if damaged:
        voc_cache(voc, cache)
        next(cache.glob("*/masks.npy")).write_bytes(b"")
    original, folders = getattr(owner, name), []

    def with_another_run(*args):
        if name == "_fill_cache":
            original(*args)
        monkeypatch.setattr(owner, name, original)
        voc_cache(voc, cache)
        folders.append(next(cache.glob("voc*")).stat().st_ino)
        if name == "replace":
            original(*args)

    monkeypatch.setattr(owner, name, with_another_run)
    stored = voc_cache(voc, cache)
    folders += [folder.stat().st_ino for folder in cache.iterdir()]
    assert folders == folders[:1] * 2  # the other run's folder is still the only one
    expected = voc_cache(voc, tmp_path / "alone")
    assert (stored.images == expected.images).all()
    assert (stored.masks == expected.masks).all()


def test_nothing_is_left_behind_after_a_failure(voc, tmp_path, monkeypatch):
    mask = index(load_spec("voc"), voc)[3].mask
    mask.unlink()
    message = error_of(voc_cache, voc, tmp_path / "cache")
    assert message == f"1 unusable file: {mask}: No such file or directory"
    assert [*(tmp_path / "cache").iterdir()] == []

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            voc_cache(voc, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []


def test_leftovers_of_killed_processes_are_swept(voc, tmp_path):
    cache = tmp_path / "cache"
    dead, alive = (f".voc_8x8_{'0' * 16}.{letter}.partial" for letter in "ab")
    others = ".notes", ".download.partial"
    for name in dead, alive, *others:
        (cache / name).mkdir(parents=True)
        (cache / name / "images.npy").write_text("half")
    lock = os.open(cache / alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    voc_cache(voc, cache)
    os.close(lock)
    hidden = {path.name for path in cache.iterdir() if path.name.startswith(".")}
    assert hidden == {alive, *others}


def test_a_cache_in_the_making_is_not_swept(voc, tmp_path, monkeypatch):
    fill = datasets.cache._fill_cache

    def fill_beside_another_run(*args):
        monkeypatch.setattr(datasets.cache, "_fill_cache", fill)
        voc_cache(voc, tmp_path / "cache", (9, 9))
        fill(*args)

    monkeypatch.setattr(datasets.cache, "_fill_cache", fill_beside_another_run)
    assert voc_cache(voc, tmp_path / "cache").images.shape[-2:] == (8, 8)


def test_a_suspended_process_that_holds_the_lock_is_not_waited_for(voc, tmp_path, monkeypatch):
    home = tmp_path / "cache"
    home.mkdir()
    lock, naps = os.open(home, os.O_RDONLY), []
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "monotonic", lambda: len(naps))
    monkeypatch.setattr(time, "sleep", naps.append)
    assert len(voc_cache(voc, home).images) == 4
    os.close(lock)
    assert len(naps) == datasets.cache.PATIENCE


def test_a_cache_is_made_where_folders_cannot_be_locked(voc, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    leftover = tmp_path / f"cache/.voc_8x8_{'0' * 16}.a.partial"
    leftover.mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(voc_cache(voc, tmp_path / "cache").images) == 4
    assert leftover.is_dir()


def test_a_caches_files_are_on_the_disk_before_they_get_their_names(voc, tmp_path, monkeypatch):
    stored = []
    monkeypatch.setattr(
        os, "fsync", lambda file: stored.append([*(tmp_path / "cache").glob("voc*/*")])
    )
    voc_cache(voc, tmp_path / "cache")
    assert [len(named) for named in stored] == [0, 1]


def test_a_mask_whose_geometry_changed_is_checked_again(tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, make_acdc(tmp_path, 1, 2))[:2]
    open_cache(spec, samples, (8, 8), tmp_path / "cache")
    write_volume(samples[0].mask.path, np.zeros((18, 14, 2), np.uint8), np.diag([1.0, 1, 1, 1]))
    message = error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert "its geometry differs from its image's" in message


def test_images_that_change_while_they_are_read_are_an_error(tmp_path, monkeypatch):
    spec = folder_spec()
    samples, read = index(spec, make_folder(tmp_path, 4)), files.read_sample

    def changing(sample, spec):
        os.utime(samples[0].image, (0, 0))
        return read(sample, spec)

    monkeypatch.setattr(files, "read_sample", changing)
    message = error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert message == "images or masks changed while they were read; repeat the command"
    open_cache(spec, samples, (8, 8), tmp_path / "cache")


def test_a_pipe_among_the_images_of_a_folder_is_named_and_not_waited_for(tmp_path):
    spec = folder_spec()
    samples = index(spec, make_folder(tmp_path, 4))
    samples[0].image.unlink()
    os.mkfifo(samples[0].image)
    message = error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert f"{samples[0].image}: not a regular file" in message


@pytest.mark.parametrize("value", [-1024.0, 1000.0, 1e5])
def test_a_constant_stays_one_at_another_size(value):
    x = resize(torch.full((1, 512, 300), value), (200, 256))
    assert (x == value).all()


def test_each_bad_volume_is_named_once_whatever_its_slices(tmp_path):
    spec, exam = load_spec("acdc"), tmp_path / "training" / "patient001"
    samples = index(spec, make_acdc(tmp_path, 1, 4))
    (exam / "patient001_frame01_gt.nii.gz").write_bytes(b"junk")
    write_volume(exam / "patient001_frame12_gt.nii.gz", np.full((18, 14, 4), np.nan, np.float32))
    message = error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert message.startswith("2 unusable files: ")
    assert message.count("slice 0 contains") == message.count("not finite") == 1


def test_an_index_has_one_color_in_all_masks_that_use_it(tmp_path):
    """Programs that convert colors to a palette number them anew in each file."""
    spec, samples = folder_spec(classes=["dark", "bright", "red"]), []
    black, red, green = [0, 0, 0], [255, 0, 0], [0, 255, 0]
    for name, colors, values in (
        ("a", [black, red, green], [0, 1]),
        ("b", [black, red, red], [0, 1]),  # another color of an index that it does not use
        ("c", [black, red, green], [0, 2]),
        ("d", [black, [1, 1, 1], [2, 2, 2]], [0, 1, 2]),  # gray: each index is its own color
    ):
        (tmp_path / name).mkdir()
        mask = np.resize(values, (8, 8)).astype(np.uint8)
        sample = picture_sample(tmp_path / name, 9 * mask, mask)
        image = Image.open(sample.mask)
        image.putpalette(np.ravel(colors).tolist())
        image.save(sample.mask)
        samples.append(dataclasses.replace(sample, id=name, group=name))
    open_cache(spec, samples, (8, 8), tmp_path / "cache")
    image = Image.open(samples[1].mask)
    image.putpalette([*black, *green])
    image.save(samples[1].mask)
    found = "b/mask.png: its index 1 is drawn in (0, 255, 0), that of"
    assert found in error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
