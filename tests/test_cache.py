"""The cache of decoded images."""

import dataclasses
import errno
import fcntl
import functools
import inspect
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import (
    error_of,
    folder_spec,
    make_acdc,
    make_folder,
    picture_sample,
    write_volume,
)
from PIL import Image

import datasets.cache
from datasets import files, writers
from datasets.cache import cache_key, decode, open_cache, resize
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


def voc_cache(root: Path, folder: Path, size=(8, 8), workers: int = 0, **changes):
    """The cache of a made VOC, and its samples."""
    spec = dataclasses.replace(load_spec("voc"), **changes)
    samples = index(spec, root)
    return open_cache(spec, samples, size, folder, workers), samples


def test_cache_holds_what_decode_returns(voc, tmp_path):
    cache, samples = voc_cache(voc, tmp_path / "cache", (8, 12))
    assert (cache.images.shape, cache.images.dtype) == ((4, 3, 8, 12), np.uint8)
    assert (cache.masks.shape, cache.masks.dtype) == ((4, 8, 12), np.uint8)
    for sample in samples:
        image, mask = decode(sample, load_spec("voc"), (8, 12))
        assert np.array_equal(cache.images[cache.rows[sample.id]], image)
        assert np.array_equal(cache.masks[cache.rows[sample.id]], mask)


def test_nifti_cache_is_float32(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)
    cache = open_cache(spec, samples, (14, 18), tmp_path / "cache")
    assert cache.images.dtype == np.float32
    volume = nibabel.load(samples[4].image.path).get_fdata()
    assert np.array_equal(cache.images[cache.rows["patient001_frame12_s01"], 0], volume[:, :, 1].T)


def test_volumes_of_a_color_dataset_fill_three_equal_channels(tmp_path):
    volume = np.random.default_rng(0).integers(0, 4000, (6, 5, 3)).astype(np.int16)
    write_volume(tmp_path / "images" / "case.nii", volume)
    spec = folder_spec()
    cache = open_cache(spec, index(spec, tmp_path), (5, 6), tmp_path / "cache")
    assert (cache.images.shape, cache.images.dtype) == ((3, 3, 5, 6), np.float32)
    assert all(np.array_equal(channel, volume[:, :, 1].T) for channel in cache.images[1])


def test_one_deep_picture_makes_the_cache_float32(tmp_path):
    root, spec = make_folder(tmp_path, 3), folder_spec()
    values = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    Image.fromarray(values).save(root / "images" / "picture 1.png")
    cache = open_cache(spec, index(spec, root), (20, 24), tmp_path / "cache")
    assert cache.images.dtype == np.float32
    assert all(np.array_equal(channel, values) for channel in cache.images[1])
    assert np.array_equal(cache.images[0], decode(index(spec, root)[0], spec, (20, 24))[0])


def test_phantom_cache_holds_the_drawn_picture(tmp_path):
    spec = load_spec("phantom")
    samples = index(spec, tmp_path)[5:7]
    cache = open_cache(spec, samples, (96, 96), tmp_path / "cache")
    image, mask = draw_phantom(samples[1].image)
    assert np.array_equal(cache.images[1, 0], image)
    assert np.array_equal(cache.masks[1], mask)


def test_second_call_reads_no_image_and_maps_the_same_files(voc, tmp_path, monkeypatch):
    first, _ = voc_cache(voc, tmp_path / "cache")

    def state():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}

    before = state()
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was read"))
    second, _ = voc_cache(voc, tmp_path / "cache")
    assert state() == before
    for kind in "images", "masks":
        assert isinstance(getattr(second, kind), np.memmap)
        assert np.array_equal(getattr(first, kind), getattr(second, kind))


def repaint(path: Path) -> None:
    Image.fromarray(np.ascontiguousarray(np.array(Image.open(path))[::-1])).save(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))


def grow(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")  # decoders stop at the picture's end
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [repaint, touch, grow])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_changed_file_gives_a_new_cache(voc, tmp_path, change, kind):
    _, samples = voc_cache(voc, tmp_path / "cache", (20, 28))
    change(getattr(samples[2], kind))
    cache, _ = voc_cache(voc, tmp_path / "cache", (20, 28))
    assert len([*(tmp_path / "cache").iterdir()]) == 2
    image, mask = decode(samples[2], load_spec("voc"), (20, 28))
    assert np.array_equal(cache.images[2], image)
    assert np.array_equal(cache.masks[2], mask)


def test_changed_volume_gives_a_new_cache(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)[:3]  # one volume and its mask
    open_cache(spec, samples, (14, 18), tmp_path / "cache")
    write_volume(samples[0].image.path, np.full((18, 14, 3), 7, np.int16))
    cache = open_cache(spec, samples, (14, 18), tmp_path / "cache")
    assert {*np.unique(cache.images[:3])} == {7}


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (8, 9)},
        {"channels": 1},
        {"ignore": 0, "label_ids": (255, *range(1, 21))},
        {"label_ids": (1, 0, *range(2, 21))},
        {"void": 20, "void_ids": (20, 200)},
        {"name": "other"},
    ],
)
def test_another_size_or_meaning_gives_a_new_cache(voc, tmp_path, changes):
    voc_cache(voc, tmp_path / "cache")
    voc_cache(voc, tmp_path / "cache", **changes)
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def hashed_code(monkeypatch, voc) -> list:
    """The modules and functions whose source is part of a cache's key."""
    hashed = []
    monkeypatch.setattr(inspect, "getsource", lambda code: hashed.append(code) or "code")
    cache_key(load_spec("voc"), index(load_spec("voc"), voc), (8, 8))
    monkeypatch.undo()
    return hashed


def test_changed_code_gives_a_new_cache(voc, monkeypatch):
    spec, samples = load_spec("voc"), index(load_spec("voc"), voc)
    before = cache_key(spec, samples, (8, 8))
    assert before == cache_key(spec, samples, (8, 8))
    monkeypatch.setattr(inspect, "getsource", lambda code: "changed")
    assert before != cache_key(spec, samples, (8, 8))


def test_code_that_reads_is_part_of_a_caches_key_and_code_that_writes_is_not(voc, monkeypatch):
    source = "".join(map(inspect.getsource, hashed_code(monkeypatch, voc)))
    for reader in files.read_sample, files.read_volume, draw_phantom, decode, resize:
        assert inspect.getsource(reader) in source
    for writer in writers.save_mask, writers.save_prediction, writers.as_values:
        assert inspect.getsource(writer) not in source


def test_palette_and_scored_classes_share_a_cache(voc, tmp_path):
    voc_cache(voc, tmp_path / "cache")
    voc_cache(voc, tmp_path / "cache", palette=((1, 2, 3),) * 21, scored=(4,), counts=(1, 1))
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_fewer_samples_give_their_own_cache(voc, tmp_path):
    _, samples = voc_cache(voc, tmp_path / "cache")
    cache = open_cache(load_spec("voc"), samples[1:], (8, 8), tmp_path / "cache")
    assert len(cache.images) == 3
    mask = decode(samples[3], load_spec("voc"), (8, 8))[1]
    assert np.array_equal(cache.masks[cache.rows[samples[3].id]], mask)


def test_two_workers_fill_the_same_cache(acdc, tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, acdc)
    alone, shared = (
        open_cache(spec, samples, (9, 7), tmp_path / str(n), workers=n) for n in (0, 2)
    )
    assert np.array_equal(alone.images, shared.images)
    assert np.array_equal(alone.masks, shared.masks)
    assert alone.rows == shared.rows


@pytest.mark.parametrize("workers", [0, 2])
def test_each_volume_is_decompressed_once(acdc, tmp_path, monkeypatch, workers):
    read, log = files.read_volume.__wrapped__, tmp_path / "log"

    def logged(path):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return read(path)

    monkeypatch.setattr(files, "read_volume", functools.lru_cache(maxsize=4)(logged))
    open_cache(load_spec("acdc"), index(load_spec("acdc"), acdc), (9, 7), tmp_path / "c", workers)
    names = log.read_text().splitlines()
    assert len(names) == len({*names}) == len([*acdc.rglob("*frame*")])


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_a_damaged_cache_is_filled_again(voc, tmp_path, damage):
    images = voc_cache(voc, tmp_path / "cache")[0].images.copy()
    (file,) = (tmp_path / "cache").glob("*/images.npy")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 300 if damage == "cut" else 0])
    assert (voc_cache(voc, tmp_path / "cache")[0].images == images).all()


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
    stored = voc_cache(voc, cache)[0]
    folders += [folder.stat().st_ino for folder in cache.iterdir()]
    assert folders == folders[:1] * 2  # the other run's folder is still the only one
    expected = voc_cache(voc, tmp_path / "alone")[0]
    assert (stored.images == expected.images).all()
    assert (stored.masks == expected.masks).all()


def test_nothing_is_left_behind_after_a_failure(voc, tmp_path, monkeypatch):
    mask = index(load_spec("voc"), voc)[3].mask
    good = mask.read_bytes()
    mask.write_bytes(b"junk")
    error_of(voc_cache, voc, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            voc_cache(voc, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []
    mask.write_bytes(good)
    assert len(voc_cache(voc, tmp_path / "cache")[0].images) == 4


def test_leftovers_of_killed_processes_are_swept(voc, tmp_path):
    cache = tmp_path / "cache"
    dead, alive, other = ".voc_8x8_0.a.partial", ".voc_8x8_0.b.partial", ".notes"
    for name in dead, alive, other:
        (cache / name).mkdir(parents=True)
        (cache / name / "images.npy").write_text("half")
    lock = os.open(cache / alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    voc_cache(voc, cache)
    os.close(lock)
    hidden = {path.name for path in cache.iterdir() if path.name.startswith(".")}
    assert hidden == {alive, other}


def test_a_cache_in_the_making_is_not_swept(voc, tmp_path, monkeypatch):
    fill = datasets.cache._fill_cache

    def fill_beside_another_run(*args):
        monkeypatch.setattr(datasets.cache, "_fill_cache", fill)
        voc_cache(voc, tmp_path / "cache", (9, 9))
        fill(*args)

    monkeypatch.setattr(datasets.cache, "_fill_cache", fill_beside_another_run)
    assert voc_cache(voc, tmp_path / "cache")[0].images.shape[-2:] == (8, 8)


def test_a_cache_is_made_where_folders_cannot_be_locked(voc, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "cache" / ".a.partial").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(voc_cache(voc, tmp_path / "cache")[0].images) == 4
    assert (tmp_path / "cache" / ".a.partial").is_dir()


def test_one_bad_file_is_named_alone(voc, tmp_path):
    samples = index(load_spec("voc"), voc)
    samples[2].mask.unlink()
    message = error_of(voc_cache, voc, tmp_path / "cache")
    assert message == f"1 bad file: {samples[2].mask}: No such file or directory"


def test_bad_volume_is_named_once_whatever_its_slices(tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, make_acdc(tmp_path, 1, 4))
    (tmp_path / "training/patient001/patient001_frame01_gt.nii.gz").write_bytes(b"junk")
    message = error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert message.startswith("1 bad file: ")
    assert "; " not in message


def test_volumes_with_several_bad_slices_are_counted_once(tmp_path):
    spec = load_spec("acdc")
    samples = index(spec, make_acdc(tmp_path, 1, 4))
    exam = tmp_path / "training" / "patient001"
    for frame in "01", "12":
        mask = exam / f"patient001_frame{frame}_gt.nii.gz"
        volume = nibabel.load(mask)
        values = np.full(volume.shape, np.nan, np.float32)
        nibabel.save(nibabel.Nifti1Image(values, volume.affine), mask)
    message = error_of(open_cache, spec, samples, (8, 8), tmp_path / "cache")
    assert message.startswith("2 bad files: ")
    assert message.count("not finite") == 2
