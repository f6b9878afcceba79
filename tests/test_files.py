"""Reading and writing pictures and NIfTI volumes, and the errors that name a bad file."""

import os
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import (
    ACDC_AFFINE,
    error_of,
    folder_spec,
    make_acdc,
    make_folder,
    picture_sample,
    read_errors,
    toy_spec,
    write_indexed,
    write_volume,
)
from PIL import ExifTags, Image, ImageOps

from datasets import files, writers
from datasets.layouts import index
from datasets.spec import Sample, Slice, load_spec
from utils import IGNORE

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path, "PNG")


# Pictures


def test_palette_png_gives_its_indices_and_255_is_ignored(tmp_path):
    values = np.array([[0, 1, 2], [20, 255, 15]])
    sample = picture_sample(tmp_path, np.zeros((2, 3, 3), np.uint8), values)
    mask = files.read_sample(sample, load_spec("voc"))[1]
    assert mask.dtype == np.uint8
    assert mask.tolist() == values.tolist()


def test_another_ignore_value_becomes_IGNORE(tmp_path):
    mask = np.array([[0, 11], [2, 1]])
    sample = picture_sample(tmp_path, np.zeros((2, 2, 3), np.uint8), mask)
    assert files.read_sample(sample, toy_spec(ignore=11))[1].tolist() == [[0, IGNORE], [2, 1]]


def test_cityscapes_label_ids_become_classes(cityscapes):
    spec = load_spec("cityscapes")
    sample = index(spec, cityscapes)[1]
    mask = files.read_sample(sample, spec)[1]
    assert np.array_equal(mask, spec.lookup()[np.array(Image.open(sample.mask))])
    assert {*np.unique(mask)} == {*range(20)}


def test_picture_is_the_file_and_without_a_mask_no_pixel_counts(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    png(tmp_path / "a.png", pixels)
    image, mask = files.read_sample(Sample("a", "a", tmp_path / "a.png", None), load_spec("voc"))
    assert image.dtype == np.uint8
    assert np.array_equal(image, pixels)
    assert (mask.shape, {*np.unique(mask)}) == ((5, 7), {IGNORE})


def test_gray_voc_jpeg_becomes_three_equal_channels(voc):
    sample, gray = index(load_spec("voc"), voc)[0], np.arange(20 * 28, dtype=np.uint8)
    Image.fromarray(gray.reshape(20, 28)).save(sample.image)
    pixels = files.as_pixels(files.read_sample(sample, load_spec("voc"))[0], 3)
    assert pixels.shape == (3, 20, 28)
    assert all(np.array_equal(channel, Image.open(sample.image)) for channel in pixels)


def test_color_picture_becomes_one_channel_where_the_spec_says_so(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    sample = picture_sample(tmp_path, pixels, np.zeros((4, 5)))
    image = files.read_sample(sample, toy_spec(channels=1))[0]
    assert np.array_equal(image, Image.fromarray(pixels).convert("L"))


def test_a_folders_deep_gray_pictures_keep_their_values(tmp_path):
    values = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    floats = values.astype(np.float32) / 7
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(floats).save(tmp_path / "b.tif")
    for file, expected in ("a.png", values), ("b.tif", floats):
        image, _ = files.read_sample(Sample("a", "a", tmp_path / file, None), folder_spec())
        assert image.dtype == np.float32
        assert np.array_equal(image, expected)


def png16(path: Path) -> None:
    """A 28x20 RGB PNG of 16 bits per channel, which Pillow reads as 8 and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 20, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + bytes(28 * 6)) * 20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_checksum(path: Path) -> None:
    """Damage the CRC of a PNG's pixels, which 12 bytes of an IEND chunk follow."""
    content = bytearray(path.read_bytes())
    content[-13] ^= 1
    path.write_bytes(content)


def zeros(*shape: int, dtype: type = np.uint8, value: float = 0):
    return lambda path: png(path, np.full(shape, value, dtype))


def replace_by(make):
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


@pytest.mark.parametrize(
    ("kind", "breakage", "reason"),
    [
        ("image", Path.unlink, "No such file"),
        ("mask", Path.unlink, "No such file"),
        ("image", lambda p: p.write_bytes(b""), "cannot identify"),
        ("image", cut, "truncated"),
        ("mask", cut, ""),
        ("mask", flip_checksum, "bad header checksum"),
        ("image", zeros(20, 28, dtype=np.uint16), "mode I"),
        ("mask", zeros(28, 20), "20x28"),
        ("mask", zeros(20, 28, 3), "RGB"),
        ("mask", zeros(20, 28, 4), "RGBA"),
        ("mask", zeros(20, 28, 2), "LA"),
        ("mask", zeros(20, 28, dtype=bool), "mode 1"),
        ("mask", zeros(20, 28, dtype=np.uint16), "mode I"),
        ("mask", png16, "mode RGB"),
        ("image", png16, "of 16 bits"),
        ("image", lambda p: Image.new("CMYK", (28, 20)).save(p), "mode CMYK"),
        ("image", replace_by(lambda p: p.symlink_to("gone")), "No such file"),
        ("mask", replace_by(lambda p: p.symlink_to(p)), ""),
        ("image", replace_by(Path.mkdir), "Is a directory"),
        ("mask", replace_by(Path.mkdir), "Is a directory"),
        ("image", lambda p: p.rename(p.with_suffix(".JPG")), "No such file"),
        pytest.param("mask", lambda p: p.chmod(0), "Permission denied", marks=needs_permissions),
        ("mask", zeros(20, 28, value=21), "label 21 "),
        ("mask", zeros(20, 28, value=254), "label 254 "),
    ],
)
def test_bad_picture_is_named(voc, kind, breakage, reason):
    spec = load_spec("voc")
    samples = index(spec, voc)
    file = getattr(samples[2], kind)
    breakage(file)
    (message,) = read_errors(samples, spec)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert reason in message


def test_an_image_of_another_size_than_its_mask_names_the_mask(voc):
    sample = index(load_spec("voc"), voc)[2]
    png(sample.image, np.zeros((20, 27), np.uint8))
    message = error_of(files.read_sample, sample, load_spec("voc"))
    assert message == f"{sample.mask}: 28x20 pixels, but its image has 27x20"


@pytest.mark.parametrize("label", [34, 254])
def test_label_that_cityscapes_does_not_know_is_named(cityscapes, label):
    sample = index(load_spec("cityscapes"), cityscapes)[0]
    png(sample.mask, np.full((16, 34), label, np.uint8))
    message = error_of(files.read_sample, sample, load_spec("cityscapes"))
    assert message.startswith(f"{sample.mask}: label {label} ")


@pytest.mark.parametrize(
    ("breakage", "named"),
    [
        (lambda root: (root / "images/picture 0.png").write_bytes(b"junk"), "picture 0.png: "),
        (
            lambda root: write_indexed(root / "masks/picture 0.png", np.full((20, 24), 2)),
            "picture 0.png: label 2 is out of range; expected one of 0, 1, 255",
        ),
        (
            lambda root: Image.new("F", (24, 20), np.nan).save(root / "unlabeled/nan.tif"),
            "nan.tif: holds values that are not finite",
        ),
    ],
)
def test_bad_picture_of_a_folder_is_named(tmp_path, breakage, named):
    root, spec = make_folder(tmp_path, 4, n_unlabeled=2, n_val=1), folder_spec()
    breakage(root)
    (message,) = read_errors(index(spec, root), spec)
    assert named in message


# Volumes


@pytest.mark.parametrize(
    ("image_type", "mask_type"), [(np.int16, np.float32), (np.float32, np.uint8)]
)
@pytest.mark.parametrize("affine", [ACDC_AFFINE, np.eye(4), np.diag([-1, -2, 3, 1])])
def test_decoded_slice_is_the_arrays_slice_with_y_as_rows_whatever_the_affine(
    tmp_path, image_type, mask_type, affine
):
    rng = np.random.default_rng(0)
    volume, truth = rng.integers(-50, 4032, (7, 5, 4)), rng.integers(0, 4, (7, 5, 4))
    write_volume(tmp_path / "i.nii.gz", volume.astype(image_type), affine)
    write_volume(tmp_path / "m.nii.gz", truth.astype(mask_type), affine)
    for z in range(4):
        sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", z), Slice(tmp_path / "m.nii.gz", z))
        image, mask = files.read_sample(sample, load_spec("acdc"))
        assert (image.dtype, mask.dtype, image.shape) == (np.float32, np.uint8, (5, 7))
        assert image.tolist() == [[volume[x, y, z] for x in range(7)] for y in range(5)]
        assert mask.tolist() == [[truth[x, y, z] for x in range(7)] for y in range(5)]


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path):
    volume = np.random.default_rng(0).integers(0, 99, (7, 5, 4, 1)).astype(np.int16)
    write_volume(tmp_path / "i.nii.gz", volume)
    assert np.array_equal(files.read_slice(Slice(tmp_path / "i.nii.gz", 2)), volume[:, :, 2, 0].T)


@pytest.mark.parametrize(
    ("affine", "fits"),
    [
        (np.diag([1.5, 1.5, 10, 1]), True),
        (np.diag([1.5, 1.5, 10.01, 1]), True),  # rounded by another program
        (np.array([[1.5, 0, 0, 40], [0, 1.5, 0, 0], [0, 0, 10, 0], [0, 0, 0, 1]]), True),
        (np.diag([-1.5, 1.5, 10, 1]), False),
        (np.array([[0, 1.5, 0, 0], [1.5, 0, 0, 0], [0, 0, 10, 0], [0, 0, 0, 1]]), False),
        (np.eye(4), False),
    ],
)
def test_a_mask_volume_has_the_axes_of_its_image(tmp_path, affine, fits):
    write_volume(tmp_path / "i.nii.gz", np.zeros((6, 6, 2), np.int16), np.diag([1.5, 1.5, 10, 1]))
    write_volume(tmp_path / "m.nii.gz", np.zeros((6, 6, 2), np.uint8), affine)
    sample = Sample("a", "a", *(Slice(tmp_path / f"{name}.nii.gz", 0) for name in "im"))
    if fits:
        files.read_sample(sample, load_spec("acdc"))
    else:
        message = error_of(files.read_sample, sample, load_spec("acdc"))
        assert message.startswith(f"{tmp_path / 'm.nii.gz'}: its affine has other axes")


def test_nifti_slope_and_intercept_are_applied(tmp_path):
    volume = nibabel.Nifti1Image(np.arange(12, dtype=np.int16).reshape(3, 4, 1), np.eye(4))
    volume.header.set_slope_inter(0.5, -3)
    nibabel.save(volume, tmp_path / "i.nii.gz")
    sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", 0), None)
    image, mask = files.read_sample(sample, load_spec("acdc"))
    assert np.array_equal(image, nibabel.load(tmp_path / "i.nii.gz").get_fdata()[:, :, 0].T)
    assert image[1].tolist() == [-2.5, -0.5, 1.5]
    assert {*np.unique(mask)} == {IGNORE}


def with_value(value: float, dtype: type):
    def write(path: Path) -> None:
        volume = np.zeros((18, 14, 3), dtype)
        volume[5, 6, 1] = value
        write_volume(path, volume)

    return write


def without_checksum(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def volume_of(*shape: int, dtype: type = np.uint8):
    return lambda path: write_volume(path, np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("suffix", "breakage", "reason"),
    [
        ("", Path.unlink, "No such file"),
        ("", lambda p: p.write_bytes(b"junk"), ""),
        ("", lambda p: p.write_bytes(p.read_bytes()[:-300]), ""),
        ("", without_checksum, "CRC"),
        ("_gt", without_checksum, "CRC"),
        ("", lambda p: p.write_bytes(b""), ""),
        ("", with_value(np.nan, np.float32), "slice 1 holds values"),
        ("", with_value(np.inf, np.float32), "slice 1 holds values"),
        ("", with_value(1e300, np.float64), "not finite as float32"),
        ("", volume_of(18, 14, 3, 2), "(18, 14, 3, 2)"),
        ("", volume_of(18, 14, 0), "expected a volume (X, Y, Z)"),
        ("_gt", Path.unlink, "No such file"),
        ("_gt", volume_of(18, 14, 2), "has 2 slices, but its image has"),
        ("_gt", volume_of(18, 14, 5), "has 5 slices, but its image has"),
        ("_gt", volume_of(14, 18, 3), "14x18"),
        ("_gt", with_value(4, np.uint8), "label 4 "),
        ("_gt", with_value(-1, np.int16), "label -1 "),
        ("_gt", with_value(259, np.int16), "label 259 "),  # 3 + 256
        ("_gt", with_value(1.5, np.float32), "label 1.5 "),
        ("_gt", with_value(np.nan, np.float32), "slice 1 holds values"),
    ],
)
def test_bad_volume_is_named(tmp_path, suffix, breakage, reason):
    spec = load_spec("acdc")
    exam = make_acdc(tmp_path, 1, 3) / "training/patient001"
    file = exam / f"patient001_frame12{suffix}.nii.gz"
    breakage(file)
    messages = read_errors(index(spec, tmp_path), spec)
    assert messages
    assert all(message.startswith(f"{file}: ") for message in messages)
    assert reason in messages[0]
    assert not any("\n" in message for message in messages)


def test_slice_beyond_a_volume_is_an_error(tmp_path):
    write_volume(tmp_path / "a.nii.gz", np.zeros((4, 3, 2), np.int16))
    message = error_of(files.read_slice, Slice(tmp_path / "a.nii.gz", 2))
    assert message == f"{tmp_path / 'a.nii.gz'}: has 2 slices; slice 2 is missing"


# What --predict reads and writes


def test_pictures_and_volumes_are_found_in_folders_and_other_files_listed(tmp_path):
    for name in "a.png", "b/a.jpg", "b/c.nii.gz", "D.NII", "notes.txt", "._a.png", "b/.nii.gz":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found, other = files.find_pictures([tmp_path, tmp_path / "b" / "c.nii.gz"])
    places = {str(file.relative_to(tmp_path)): str(place) for file, place in found.items()}
    assert places == {"a.png": "a", "b/a.jpg": "b/a", "b/c.nii.gz": "b/c", "D.NII": "D"}
    assert other == [f"{tmp_path / 'notes.txt'}: neither a picture nor a NIfTI volume"]


def test_paths_to_predict_must_exist_and_their_results_differ(tmp_path):
    gone = tmp_path / "gone"
    assert error_of(files.find_pictures, [gone]) == f"--predict {gone}: no such file or folder"
    for name in "a.png", "a.jpg":
        (tmp_path / name).write_text("")
    assert "several files would be written as a;" in error_of(files.find_pictures, [tmp_path])
    (tmp_path / "a.jpg").rename(tmp_path / "a.nii")  # which becomes a.nii.gz
    assert len(files.find_pictures([tmp_path])[0]) == 2


def test_linked_folders_are_searched_once_and_hidden_ones_not(tmp_path):
    for name in "mine/a.png", "mine/.hidden/b.png", "elsewhere/c.png":
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    mine = tmp_path / "mine"
    (mine / "link").symlink_to(tmp_path / "elsewhere")
    (mine / "loop").symlink_to(mine)
    found, other = files.find_pictures([mine])
    assert {*map(str, found.values())} == {"a", "link/c"}
    assert not other
    for number in range(9):  # a folder is found where it is, not through a link
        (mine / f"{number}").symlink_to(mine / "real")
    (mine / "real").mkdir()
    (mine / "real/d.png").write_text("")
    assert {*map(str, files.find_pictures([mine])[0].values())} == {"a", "link/c", "real/d"}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_a_picture_of_any_mode_is_one_plane(tmp_path, mode):
    Image.new(mode, (5, 4), 1).save(tmp_path / "a.tif")
    for channels in 1, 3:
        (plane,) = files.read_planes(tmp_path / "a.tif", channels)
        assert plane.shape == (channels, 4, 5)
        assert plane.dtype == (torch.float32 if mode in ("I;16", "F") else torch.uint8)


RED = np.zeros((20, 24, 3), np.uint8)
RED[:6, :9, 0] = 255  # upper left
MASK = (RED[..., 0] > 0).astype(np.uint8)
needs_avif = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="no AVIF")


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def with_exif(path: Path, orientation: int, **options) -> None:
    Image.fromarray(RED).save(path, exif=oriented(orientation), **options)


def with_raw_profile(kind: str):
    """A PNG with EXIF data as text, as ImageMagick writes them, behind its pixels."""

    def write(path: Path, orientation: int) -> None:
        Image.fromarray(RED).save(path)
        exif = oriented(orientation).tobytes()
        lines = f"\n{kind}\n{len(exif):8}\n{exif.hex()}\n"
        data = b"Raw profile type %s\0\0" % kind.encode() + zlib.compress(lines.encode())
        chunk = struct.pack(">I", len(data)) + b"zTXt" + data
        chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
        content = path.read_bytes()
        path.write_bytes(content[:-12] + chunk + content[-12:])

    return write


def with_xmp(path: Path, orientation: int) -> None:
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'
    Image.fromarray(RED).save(path, xmp=xmp.encode())


def with_exif_box(path: Path, orientation: int) -> None:
    """A JPEG 2000 with EXIF data in a box before its pixels."""
    Image.fromarray(RED).save(path)
    box = b"uuidJpgTiffExif->JP2" + oriented(orientation).tobytes().removeprefix(b"Exif\0\0")
    before, header, after = path.read_bytes().partition(b"jp2h")
    size = before[-4:]
    path.write_bytes(before[:-4] + struct.pack(">I", 4 + len(box)) + box + size + header + after)


ORIENTED = [
    ("a.jpg", with_exif),
    ("a.JPEG", with_xmp),
    ("a.png", with_exif),
    ("a.png", with_raw_profile("exif")),
    ("a.png", with_raw_profile("APP1")),
    ("a.webp", with_exif),
    ("a.jp2", with_exif_box),
    (
        "a.mpo",
        lambda path, n: with_exif(path, n, save_all=True, append_images=[Image.new("L", (9, 9))]),
    ),
    pytest.param("a.avif", with_exif, marks=needs_avif),
]


def reading(path: Path) -> list:
    """Reading a picture as --predict does, and in every layout."""
    sample = Sample("a", "a", path, None)
    return [
        lambda: files.read_planes(path, 3)[0],
        lambda: files.read_sample(sample, folder_spec())[0],
        lambda: files.read_sample(sample, load_spec("voc"))[0],
        lambda: files.read_sample(sample, load_spec("cityscapes"))[0],
    ]


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(("name", "save"), ORIENTED)
def test_a_picture_that_viewers_rotate_is_named_whatever_its_format(
    tmp_path, name, save, orientation
):
    path = tmp_path / name
    save(path, orientation)
    found = f"viewers rotate it (EXIF orientation {orientation}); save it upright"
    for read in reading(path):
        assert error_of(read).startswith(f"{path}: {found}")


@pytest.mark.parametrize("orientation", [0, 1, 9])
@pytest.mark.parametrize(("name", "save"), ORIENTED)
def test_orientations_without_a_meaning_are_upright(tmp_path, name, save, orientation):
    if name == "a.avif" and orientation != 1:
        pytest.skip("Pillow does not write it")
    save(tmp_path / name, orientation)
    for read in reading(tmp_path / name):
        assert {*read().shape} == {3, 20, 24}


@pytest.mark.parametrize("damage", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\xff", b""])
def test_damaged_exif_data_are_none(tmp_path, damage):
    Image.fromarray(RED).save(tmp_path / "a.jpg", exif=damage)
    for read in reading(tmp_path / "a.jpg"):
        read()


@pytest.mark.parametrize(
    ("orientation", "compression"),
    [*((n, None) for n in range(10)), *((n, "tiff_lzw") for n in range(1, 9))],
)
def test_a_tiff_is_read_as_viewers_show_it(tmp_path, orientation, compression):
    image, mask = tmp_path / "a.tif", tmp_path / "mask.tif"
    for file, pixels in (image, RED), (mask, MASK):
        exif = oriented(orientation)
        Image.fromarray(pixels).save(file, exif=exif, compression=compression)
    shown = Image.fromarray(RED)
    shown.getexif()[ExifTags.Base.Orientation] = orientation
    shown = np.array(ImageOps.exif_transpose(shown))
    x, y = files.read_sample(Sample("a", "a", image, mask), folder_spec())
    assert np.array_equal(x, shown)
    assert np.array_equal(y, shown[..., 0] > 0)
    assert np.array_equal(files.read_planes(image, 3)[0].permute(1, 2, 0), shown)


def mask_error(mask: Path, spec=None) -> str:
    """The one error of a sample with this mask, after its file."""
    image = mask.parent / "image.bmp"
    Image.fromarray(RED).save(image)
    message = error_of(files.read_sample, Sample("a", "a", image, mask), spec or folder_spec())
    assert message.startswith(f"{mask}: ")
    return message.removeprefix(f"{mask}: ")


@pytest.mark.parametrize("layout", ["folder", "voc", "cityscapes"])
def test_a_mask_that_viewers_rotate_is_an_error_too(tmp_path, layout):
    spec = folder_spec() if layout == "folder" else load_spec(layout)
    Image.fromarray(MASK).save(tmp_path / "a.png", exif=oriented(6))
    assert mask_error(tmp_path / "a.png", spec).startswith("viewers rotate it")


@pytest.mark.parametrize("layout", ["folder", "voc", "cityscapes"])
@pytest.mark.parametrize("ending", ["tif", "gif", "png", "webp"])
def test_several_pages_are_an_error_of_images_and_masks_that_names_their_number(
    tmp_path, ending, layout
):
    spec, path = (
        folder_spec() if layout == "folder" else load_spec(layout),
        tmp_path / f"a.{ending}",
    )
    pages = [Image.fromarray(k == MASK).convert("L") for k in (0, 1)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    reason = "has 2 pages; expected one picture per file"
    for read in reading(path):
        assert error_of(read) == f"{path}: {reason}"
    assert mask_error(path, spec) == reason


LOSSY = [
    ("a.jpg", {}, "JPEG"),
    ("a.png", {"format": "JPEG", "quality": 100}, "JPEG"),
    ("a.mpo", {"save_all": True, "append_images": [Image.new("L", (9, 9))]}, "MPO"),
    ("a.webp", {}, "WEBP"),
    ("a.webp", {"lossless": True}, "WEBP"),
    ("a.jp2", {"irreversible": True}, "JPEG2000"),
    ("a.jp2", {"quality_mode": "dB", "quality_layers": [40]}, "JPEG2000"),
    ("a.tif", {"compression": "jpeg"}, "TIFF with JPEG compression"),
    pytest.param("a.avif", {}, "AVIF", marks=needs_avif),
]


@pytest.mark.parametrize("n_classes", [2, 5, 21])
@pytest.mark.parametrize(("name", "options", "format_name"), LOSSY)
def test_a_mask_in_a_lossy_format_is_an_error_that_names_it_whatever_the_classes(
    tmp_path, name, options, format_name, n_classes
):
    Image.fromarray(MASK * (n_classes - 1)).save(tmp_path / name, **options)
    expected = "may change the values of labels; export the labels again as an indexed or gray"
    spec = folder_spec(classes=[f"k{k}" for k in range(n_classes)])
    assert mask_error(tmp_path / name, spec) == f"{format_name} {expected} 8-bit PNG"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.PNG", {}),
        ("a.bmp", {}),
        ("a.gif", {}),
        ("a.tif", {}),
        ("a.TIFF", {"compression": "tiff_lzw"}),
        ("a.tif", {"compression": "tiff_adobe_deflate"}),
        ("a.pgm", {}),
        ("a.tga", {}),
        ("a.pcx", {}),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_mask_in_a_lossless_format_has_its_values(tmp_path, name, options, indexed):
    values = MASK if name == "a.gif" else MASK * 3  # Pillow renumbers a GIF's values
    mask = Image.fromarray(values)
    if indexed and name != "a.pgm":
        mask.putpalette([9, 9, 9, 0, 200, 0, 0, 0, 0, 8, 8, 200])  # whose colors say nothing
    mask.save(tmp_path / name, **options)
    Image.fromarray(RED).save(tmp_path / "image.bmp")
    sample = Sample("a", "a", tmp_path / "image.bmp", tmp_path / name)
    spec = folder_spec(classes=[*"abcd"])
    assert np.array_equal(files.read_sample(sample, spec)[1], values)


def test_grays_of_a_palette_that_are_other_labels_are_an_error(tmp_path):
    Image.fromarray(MASK * 3).save(tmp_path / "a.gif")  # which Pillow renumbers 0 and 1
    spec = folder_spec(classes=[*"abcd"])
    assert mask_error(tmp_path / "a.gif", spec).startswith("its index 1 is drawn in the gray 3")
    for colors in (
        [0, 0, 0, 255, 255, 255],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 3, 3, 4],
        [1, 1, 1, 9, 9, 9],
    ):
        mask = Image.fromarray(MASK)
        mask.putpalette(colors)
        mask.save(tmp_path / "a.png")
        sample = Sample("a", "a", tmp_path / "image.bmp", tmp_path / "a.png")
        assert np.array_equal(files.read_sample(sample, spec)[1], MASK)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_of_fewer_bits_gives_its_indices(tmp_path, bits):
    mask = Image.fromarray(MASK)
    mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.save(tmp_path / "a.png", bits=bits)
    assert np.array_equal(files.read_mask(tmp_path / "a.png"), MASK)


def pgm(path: Path) -> None:
    path.write_bytes(b"P5\n24 20\n1\n" + MASK.tobytes())


STRETCHED = [
    ("a.png", lambda path: Image.fromarray(MASK * 255).convert("1").save(path)),
    ("a.tif", lambda path: Image.fromarray(MASK * 255).convert("1").save(path)),
    ("a.bmp", lambda path: Image.fromarray(MASK * 255).convert("1").save(path)),
    ("a.png", lambda path: Image.fromarray(MASK * 15).save(path, bits=4)),
    ("a.pgm", pgm),
]


@pytest.mark.parametrize(("name", "save"), STRETCHED)
def test_gray_of_fewer_bits_is_black_and_white_where_label_ids_say_so(tmp_path, name, save):
    save(tmp_path / name)
    assert "of fewer than 8 bits" in mask_error(tmp_path / name)
    assert "; save the labels with 8 bits" in mask_error(tmp_path / name, load_spec("cityscapes"))
    spec = folder_spec(label_ids=[0, 255], ignore=254)
    sample = Sample("a", "a", tmp_path / "image.bmp", tmp_path / name)
    assert np.array_equal(files.read_sample(sample, spec)[1], MASK)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        ("I;16", "save the same values with 8 bits"),
        ("LA", "save it without its alpha channel"),
        ("RGB", "save one of its equal channels alone"),
        ("RGBA", "save one of its equal channels alone"),
        ("CMYK", "replace each color by its class index"),
    ],
)
def test_a_mask_of_another_mode_is_an_error_with_a_remedy(tmp_path, mode, remedy):
    Image.fromarray(MASK).convert(mode).save(tmp_path / "a.tif")
    assert mask_error(tmp_path / "a.tif").startswith(f"mode {mode}: ")
    assert mask_error(tmp_path / "a.tif").endswith(f": {remedy}")


def test_a_mask_of_colors_is_an_error_with_a_remedy(tmp_path):
    Image.fromarray(RED).save(tmp_path / "a.png")
    assert mask_error(tmp_path / "a.png").endswith(": replace each color by its class index")


def test_upright_photos_and_phones_photos_with_extras_are_read(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    Image.new("RGB", (24, 20)).save(tmp_path / "a.jpg", exif=exif)
    thumbnail = Image.new("RGB", (24, 20))
    Image.new("RGB", (24, 20)).save(tmp_path / "b.mpo", save_all=True, append_images=[thumbnail])
    for name in "a.jpg", "b.mpo":
        (plane,) = files.read_planes(tmp_path / name, 3)
        assert plane.shape == (3, 20, 24)


def test_a_volumes_planes_are_its_slices(tmp_path):
    volume = np.random.default_rng(0).integers(-9, 9, (4, 5, 3)).astype(np.int16)
    write_volume(tmp_path / "a.nii.gz", volume)
    planes = files.read_planes(tmp_path / "a.nii.gz", 3)
    assert len(planes) == 3
    for z, plane in enumerate(planes):
        assert plane.dtype == torch.float32
        assert all(np.array_equal(channel, volume[:, :, z].T) for channel in plane)


PALETTE = ((0, 0, 0), (70, 130, 180), (240, 200, 80), (200, 60, 60))


def test_saved_mask_keeps_its_indices_and_shows_the_palette(tmp_path):
    mask = torch.tensor([[0, 1, 2], [3, IGNORE, 1]])
    writers.save_mask(tmp_path / "m.png", mask, toy_spec(classes=[*"abcd"], palette=PALETTE))
    with Image.open(tmp_path / "m.png") as image:
        assert (image.mode, image.size) == ("P", (3, 2))
        assert np.array(image).tolist() == mask.tolist()
        colors = np.array(image.convert("RGB")).reshape(-1, 3).tolist()
    assert colors == [
        [*PALETTE[0]], [*PALETTE[1]], [*PALETTE[2]], [*PALETTE[3]], [224, 224, 192], [*PALETTE[1]],
    ]  # fmt: skip


def test_a_written_mask_reads_back_whatever_the_values_of_the_classes(tmp_path):
    void = {"void": 2, "void_ids": [3, 5], "scored": [0, 1]}
    spec = toy_spec(classes=["no", "yes", "void"], label_ids=[9, 200], ignore=7, **void)
    mask = torch.tensor([[0, 1, 2, IGNORE]])
    writers.save_mask(tmp_path / "m.png", mask, spec)
    with Image.open(tmp_path / "m.png") as image:
        assert np.array(image).tolist() == [[9, 200, 3, 7]]
        colors = np.array(image.convert("RGB"))[0].tolist()
    assert colors == [*map(list, spec.palette), [224, 224, 192]]
    assert spec.lookup()[files.read_mask(tmp_path / "m.png")].tolist() == mask.tolist()
    write_volume(tmp_path / "a.nii.gz", np.zeros((4, 1, 1), np.int16))
    writers.save_prediction(tmp_path / "m", tmp_path / "a.nii.gz", mask[None].byte(), spec)
    written = np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj)
    assert written[:, 0, 0].tolist() == [9, 200, 3, 7]


@pytest.mark.parametrize("values", [(0, 500, 600), (-1, 0, 32767), (-32768, 255, 7)])
def test_any_int16_values_of_nifti_masks_are_read_and_written_back(tmp_path, values):
    truth = np.random.default_rng(0).integers(0, 3, (4, 5, 3))
    write_volume(tmp_path / "i.nii.gz", np.zeros((4, 5, 3), np.int16))
    write_volume(tmp_path / "m.nii.gz", np.array(values, np.int16)[truth])
    slices = Slice(tmp_path / "i.nii.gz", 2), Slice(tmp_path / "m.nii.gz", 2)
    spec = folder_spec(classes=[*"abc"], label_ids=values, ignore=99)
    masks = torch.from_numpy(truth.transpose(2, 1, 0).astype(np.uint8))
    read = files.read_sample(Sample("a", "a", *slices), spec)[1]
    assert np.array_equal(read, masks[2])
    writers.save_prediction(tmp_path / "p", tmp_path / "i.nii.gz", masks, spec)
    written = nibabel.load(tmp_path / "p.nii.gz")
    assert written.get_data_dtype() == np.int16
    assert np.array_equal(written.dataobj, np.array(values)[truth])
    writers.save_mask(tmp_path / "p.png", masks[0], spec)  # a PNG has too few bits
    assert np.array_equal(Image.open(tmp_path / "p.png"), masks[0])


@pytest.mark.parametrize(
    "changes", [{"label_ids": [0, 256]}, {"label_ids": [-1, 1]}, {"ignore": -1}]
)
def test_values_beyond_a_byte_are_an_error_where_masks_are_pictures(tmp_path, changes):
    root, key = make_folder(tmp_path, 3), next(iter(changes))
    message = error_of(index, folder_spec(**changes), root)
    assert message.startswith(f"{root / 'masks' / 'picture 0.png'}: [dataset] has {key} ")
    assert message.endswith("; a picture holds values from 0 to 255, only a NIfTI mask others")


@pytest.mark.parametrize("error", [0, 3.7e-9, -3.7e-9, 9e-4, -9e-4])
@pytest.mark.parametrize("big_endian", [False, True])
def test_labels_that_a_slope_rounds_are_integers(tmp_path, error, big_endian):
    truth = np.random.default_rng(0).integers(0, 4, (4, 5, 3))
    dtype = np.dtype(np.float64).newbyteorder(">" if big_endian else "<")
    write_volume(tmp_path / "i.nii.gz", np.zeros((4, 5, 3), np.int16))
    write_volume(tmp_path / "m.nii.gz", (truth + error * (truth > 0)).astype(dtype))
    sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", 1), Slice(tmp_path / "m.nii.gz", 1))
    assert np.array_equal(files.read_sample(sample, load_spec("acdc"))[1], truth[:, :, 1].T)


def test_a_slope_and_an_offset_of_a_mask_are_applied(tmp_path):
    stored = nibabel.Nifti1Image(np.array([0, 85, 170, 255], np.uint8).reshape(4, 1, 1), np.eye(4))
    stored.header.set_slope_inter(1 / 85, 0)
    nibabel.save(stored, tmp_path / "m.nii.gz")
    write_volume(tmp_path / "i.nii.gz", np.zeros((4, 1, 1), np.int16), np.eye(4))
    sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", 0), Slice(tmp_path / "m.nii.gz", 0))
    assert files.read_sample(sample, load_spec("acdc"))[1].tolist() == [[0, 1, 2, 3]]


def test_a_label_between_integers_is_an_error_with_its_value_and_a_remedy(tmp_path):
    write_volume(tmp_path / "i.nii.gz", np.zeros((4, 1, 1), np.int16))
    write_volume(tmp_path / "m.nii.gz", np.array([0, 1, 0.4, 2.0]).reshape(4, 1, 1))
    sample = Sample("a", "a", Slice(tmp_path / "i.nii.gz", 0), Slice(tmp_path / "m.nii.gz", 0))
    expected = "label 0.4 is not an integer; save labels as integers, resampled to the nearest"
    message = error_of(files.read_sample, sample, load_spec("acdc"))
    assert message == f"{tmp_path / 'm.nii.gz'}: {expected} neighbor"


def test_prediction_of_a_volume_has_its_header_and_affine(tmp_path):
    source = nibabel.Nifti1Image(np.zeros((4, 5, 3), np.int16), ACDC_AFFINE)
    source.header.set_slope_inter(0.5, -3)
    source.header.set_xyzt_units("mm", "sec")
    source.header["cal_max"] = 1000  # viewers would show the mask as black
    nibabel.save(source, tmp_path / "a.nii.gz")
    masks = torch.randint(4, (3, 5, 4), dtype=torch.uint8)
    writers.save_prediction(tmp_path / "new" / "a", tmp_path / "a.nii.gz", masks, load_spec("acdc"))
    written = nibabel.load(tmp_path / "new" / "a.nii.gz")
    assert np.array_equal(written.get_fdata(), masks.permute(2, 1, 0))
    assert (written.get_data_dtype(), written.header.get_xyzt_units()) == (np.uint8, ("mm", "sec"))
    assert written.header["cal_max"] == 0
    np.testing.assert_allclose(written.affine, ACDC_AFFINE, rtol=1e-6)


def test_prediction_of_a_picture_is_an_indexed_png(tmp_path):
    masks = torch.tensor([[[0, 1], [20, 2]]], dtype=torch.uint8)
    writers.save_prediction(tmp_path / "new" / "a.b", Path("a.b.jpg"), masks, load_spec("voc"))
    assert files.read_mask(tmp_path / "new" / "a.b.png").tolist() == masks[0].tolist()
