"""Reading and writing pictures and NIfTI volumes, and the errors that name an unusable file."""

import errno
import gzip
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
    read_errors,
    toy_spec,
    write_volume,
)
from PIL import ExifTags, Image, ImageOps

from datasets import files, writers
from datasets.layouts import index
from datasets.spec import Sample, Slice, load_spec
from engine import inputs
from utils import IGNORE

VOC, ACDC = load_spec("voc"), load_spec("acdc")


def png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path, "PNG")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def volume_sample(
    folder: Path, image: np.ndarray, mask: np.ndarray, z: int = 0, affines=(ACDC_AFFINE,) * 2
) -> Sample:
    """Slice z of an image and of its mask, which are NIfTI files in a folder."""
    paths = folder / "image.nii.gz", folder / "mask.nii.gz"
    for path, volume, affine in zip(paths, (image, mask), affines, strict=True):
        write_volume(path, volume, affine)
    return Sample("a", "a", *(Slice(path, z) for path in paths))


# Pictures


def test_a_picture_has_the_channels_of_the_dataset_and_without_a_mask_no_pixel_counts(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "a.png"
    png(path, pixels)
    image, mask = files.read_sample(Sample("a", "a", path, None), VOC)
    assert image.dtype == np.uint8
    assert np.array_equal(image, pixels)
    assert (mask.shape, {*np.unique(mask)}) == ((5, 7), {IGNORE})
    gray = np.array(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(files.read_image(path, 1), gray)
    png(path, gray)
    assert np.array_equal(files.read_image(path, 3), np.stack([gray] * 3, 2))


def test_a_folders_deep_gray_pictures_keep_their_values_which_are_finite(tmp_path):
    values = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    floats = values.astype(np.float32) / 7
    for file, expected in ("a.png", values), ("b.tif", floats):
        Image.fromarray(expected).save(tmp_path / file)
        image, _ = files.read_sample(Sample("a", "a", tmp_path / file, None), folder_spec())
        assert image.dtype == np.float32
        assert np.array_equal(image, expected)
        assert np.array_equal(files.as_pixels(image, 3), [expected] * 3)
    for inverted in values, floats:
        Image.fromarray(inverted).save(tmp_path / "c.tif", tiffinfo={262: 0})
        message = error_of(
            files.read_sample, Sample("c", "c", tmp_path / "c.tif", None), folder_spec()
        )
        assert message.startswith(f"{tmp_path / 'c.tif'}: its 0 is white")
    floats[3, 4] = np.nan
    Image.fromarray(floats).save(tmp_path / "b.tif")
    message = error_of(files.read_sample, Sample("a", "a", tmp_path / "b.tif", None), folder_spec())
    assert message.startswith(f"{tmp_path / 'b.tif'}: contains values that are not finite, or ")


def png16(path: Path) -> None:
    """A 28x20 RGB PNG of 16 bits per channel, which Pillow reads as 8 and does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 20, 16, 2, 0, 0, 0))
    rows = png_chunk(b"IDAT", zlib.compress((b"\0" + bytes(28 * 6)) * 20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + png_chunk(b"IEND", b""))


def ppm16(path: Path) -> None:
    path.write_bytes(b"P6 28 20 65535\n" + bytes(28 * 20 * 6))


def jp2_16(path: Path) -> None:
    """A JPEG 2000 whose header says 16 bits per channel; Pillow writes 8."""
    Image.new("RGB", (28, 20)).save(path, "JPEG2000")
    content = bytearray(path.read_bytes())
    depths = content.index(b"\xff\x4f\xff\x51") + 42
    content[depths : depths + 9 : 3] = bytes([15]) * 3
    path.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_checksum(path: Path) -> None:
    """Damage the CRC of a PNG's pixels, which 12 bytes of an IEND chunk follow."""
    content = bytearray(path.read_bytes())
    content[-13] ^= 1
    path.write_bytes(content)


def filled(value: int, *shape: int):
    return lambda path: png(path, np.full(shape, value, np.uint8))


@pytest.mark.parametrize(
    ("kind", "breakage", "reason"),
    [
        ("image", Path.unlink, "No such file"),
        ("image", cut, "truncated"),
        ("image", lambda p: Image.new("CMYK", (28, 20)).save(p), "mode CMYK"),
        *(("image", deep, "of more than 8 bits") for deep in (png16, ppm16, jp2_16)),
        (
            "image",
            lambda p: Image.new("RGB", (28, 20)).save(p, "EPS"),
            "EPS cannot be read; save it as PNG",
        ),
        ("image", pipe, "not a regular file"),
        ("mask", pipe, "not a regular file"),
        ("mask", flip_checksum, "bad header checksum"),
        ("mask", filled(0, 20, 27), "27x20 pixels, but its image has 28x20"),
        ("mask", filled(21, 20, 28), "label 21 is out of range; expected one of 0, 1, 2, 3"),
    ],
)
def test_a_bad_picture_is_named(voc, kind, breakage, reason):
    samples = index(VOC, voc)
    file = getattr(samples[2], kind)
    breakage(file)
    (message,) = read_errors(samples, VOC)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert reason in message


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
    arrays = volume.astype(image_type), truth.astype(mask_type)
    for z in range(4):
        sample = volume_sample(tmp_path, *arrays, z, affines=(affine, affine))
        image, mask = files.read_sample(sample, ACDC)
        assert (image.dtype, mask.dtype, image.shape) == (np.float32, np.uint8, (5, 7))
        assert image.tolist() == [[volume[x, y, z] for x in range(7)] for y in range(5)]
        assert mask.tolist() == [[truth[x, y, z] for x in range(7)] for y in range(5)]


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path):
    volume = np.random.default_rng(0).integers(0, 99, (7, 5, 4, 1)).astype(np.int16)
    write_volume(tmp_path / "i.nii.gz", volume)
    assert np.array_equal(files.read_slice(Slice(tmp_path / "i.nii.gz", 2)), volume[:, :, 2, 0].T)


@pytest.mark.parametrize(
    ("affine", "differ"),
    [
        (np.diag([1.5, 1.5, 10.01, 1]), None),  # rounded by another program
        (np.array([[1.5, 0, 0, 0.4], [0, 1.5, 0, 0], [0, 0, 10, 4], [0, 0, 0, 1]]), None),
        (np.array([[1.5, 0, 0, 40], [0, 1.5, 0, 0], [0, 0, 10, 0], [0, 0, 0, 1]]), "origin"),
        (np.array([[1.5, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 10, 10], [0, 0, 0, 1]]), "origin"),
        (np.diag([-1.5, 1.5, 10, 1]), "axes"),
        (np.diag([1.55, 1.5, 10, 1]), "axes, voxel sizes"),
        (np.array([[0, 1.5, 0, 0], [1.5, 0, 0, 0], [0, 0, 10, 0], [0, 0, 0, 1]]), "axes"),
    ],
)
def test_a_mask_volume_has_the_geometry_of_its_image(tmp_path, affine, differ):
    affines = np.diag([1.5, 1.5, 10, 1]), affine
    sample = volume_sample(tmp_path, *np.zeros((2, 6, 6, 2), np.uint8), affines=affines)
    if differ:
        message = error_of(files.read_sample, sample, ACDC)
        found = f"its geometry differs from its image's ({differ})"
        assert message.startswith(f"{sample.mask.path}: {found}; resample")
    else:
        files.read_sample(sample, ACDC)


def test_a_mask_volume_has_the_voxel_sizes_of_its_image_where_affines_have_none(tmp_path):
    """As in ACDC: sizes are in the header's zooms alone."""
    for name, size in ("image", 1.4), ("mask", 2):
        volume = nibabel.Nifti1Image(np.zeros((6, 6, 2), np.uint8), np.eye(4))
        volume.header["pixdim"][1:4] = size, size, 10
        nibabel.save(volume, tmp_path / f"{name}.nii")
    slices = (Slice(tmp_path / f"{name}.nii", 0) for name in ("image", "mask"))
    message = error_of(files.read_sample, Sample("a", "a", *slices), ACDC)
    assert "its geometry differs from its image's (voxel sizes)" in message


def test_slopes_and_intercepts_of_images_and_masks_are_applied(tmp_path):
    values = np.array([[0, 1, 2, 3], [0, 85, 170, 255]], np.uint8).reshape(2, 4, 1, 1)
    sample = volume_sample(tmp_path, *values)
    for part, stored, scale in zip(
        (sample.image, sample.mask), values, ((0.5, -3), (1 / 85, 0)), strict=True
    ):
        volume = nibabel.Nifti1Image(stored, ACDC_AFFINE)
        volume.header.set_slope_inter(*scale)
        nibabel.save(volume, part.path)
    image, mask = files.read_sample(sample, ACDC)
    assert image.tolist() == [[-3, -2.5, -2, -1.5]]
    assert mask.tolist() == [[0, 1, 2, 3]]


def with_value(value: float, dtype: type):
    def write(path: Path) -> None:
        volume = np.zeros((18, 14, 3), dtype)
        volume[5, 6, 1] = value
        write_volume(path, volume)

    return write


def without_checksum(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def volume_of(*shape: int):
    return lambda path: write_volume(path, np.zeros(shape, np.uint8))


def with_header(place: int, value: float):
    """A float32 of the header, in bytes from its start, is replaced."""

    def write(path: Path) -> None:
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[place : place + 4] = struct.pack("<f", value)
        path.write_bytes(gzip.compress(content))

    return write


UNEVEN = "label 1.5 is not an integer; save labels as integers, resampled to the nearest neighbor"


@pytest.mark.parametrize(
    ("suffix", "breakage", "reason"),
    [
        ("", Path.unlink, "No such file"),
        ("", lambda p: p.write_bytes(b""), "Empty file"),
        ("", lambda p: write_volume(p, np.zeros((18, 14, 3), np.complex64)), "of complex64: "),
        ("", without_checksum, "CRC"),
        ("", with_value(np.nan, np.float32), "slice 1 contains values"),
        ("", with_value(1e300, np.float64), "not finite, or beyond 1e+30"),
        ("", with_value(-np.finfo(np.float32).max, np.float32), "not finite, or beyond 1e+30"),
        *(
            ("", with_header(80, value), "expected positive voxel sizes and a finite affine")
            for value in (np.inf, np.nan)
        ),
        (
            "",
            with_header(280, np.nan),
            "expected positive voxel sizes and a finite affine",
        ),  # of the affine
        ("", with_header(88, 0), "voxel sizes 1.41421 x 1.33417 x 0 in the header (pixdim); write"),
        ("", with_header(80, 3), "in the header (pixdim), but 1.414 x 1.334 x 9.813 in the affine"),
        ("", volume_of(18, 14, 3, 2), "(18, 14, 3, 2)"),
        ("", volume_of(18, 14), "expected a volume (X, Y, Z)"),
        ("", volume_of(18, 14, 0), "expected a volume (X, Y, Z)"),
        ("", volume_of(0, 14, 3), "expected a volume (X, Y, Z)"),
        ("", volume_of(18, 14, 3, 2, 2), "expected a volume (X, Y, Z) or"),
        ("_gt", volume_of(18, 14, 2), "has 2 slices; slice 2 is missing"),
        ("_gt", volume_of(18, 14, 5), "has 5 slices, but its image has"),
        ("_gt", volume_of(14, 18, 3), "14x18"),
        ("_gt", with_value(-1, np.int16), "label -1 "),
        ("_gt", with_value(259, np.int16), "label 259 "),  # 3 + 256
        ("_gt", with_value(1.5, np.float32), UNEVEN),
    ],
)
def test_a_bad_volume_is_named(tmp_path, suffix, breakage, reason):
    exam = make_acdc(tmp_path, 1, 3) / "training/patient001"
    file = exam / f"patient001_frame12{suffix}.nii.gz"
    breakage(file)
    messages = read_errors(index(ACDC, tmp_path), ACDC)
    assert any(reason in message for message in messages)
    assert all(message.startswith(f"{file}: ") for message in messages)
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("error", [0, 3.7e-9, -3.7e-9, 9e-4, -9e-4])
@pytest.mark.parametrize("byte_order", "<>")
def test_labels_that_a_slope_rounds_are_integers(tmp_path, error, byte_order):
    truth = np.random.default_rng(0).integers(0, 4, (4, 5, 3))
    mask = (truth + error * (truth > 0)).astype(f"{byte_order}f8")
    sample = volume_sample(tmp_path, np.zeros((4, 5, 3), np.int16), mask, 1)
    assert np.array_equal(files.read_sample(sample, ACDC)[1], truth[:, :, 1].T)


# What --predict finds and reads


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_pictures_and_volumes_are_found_in_folders_and_other_files_listed(tmp_path):
    touch(tmp_path, *"a.png b/a.jpg b/c.nii.gz D.NII notes.pdf scan.h5 ._a.png b/.nii.gz".split())
    touch(tmp_path, "a.nii")  # whose mask is a.nii.gz, not a.png
    found, other = inputs.find_pictures([tmp_path, tmp_path / "b" / "c.nii.gz"])
    places = {str(file.relative_to(tmp_path)): str(place) for file, place in found.items()}
    expected = {"a.png": "a", "b/a.jpg": "b/a", "b/c.nii.gz": "b/c", "D.NII": "D", "a.nii": "a"}
    assert places == expected
    neither = "neither an image nor a NIfTI volume"
    assert other == [f"{tmp_path / name}: {neither}" for name in ("notes.pdf", "scan.h5")]


def test_masks_beside_images_are_listed_as_one_folder_and_a_folder_given_by_name_is_read(tmp_path):
    touch(tmp_path, "train/images/a.png", "train/masks/a.png", "masks/b.png")
    found, other = inputs.find_pictures([tmp_path])
    assert names_of(found, tmp_path) == {"train/images/a.png", "masks/b.png"}
    assert other == [f"{tmp_path / 'train/masks'}: masks of the images beside it"]
    found, other = inputs.find_pictures([tmp_path / "train/masks"])
    assert (names_of(found, tmp_path), other) == ({"train/masks/a.png"}, [])


def names_of(found: dict, folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in found}


def test_paths_to_predict_must_exist_and_their_results_differ(tmp_path):
    gone = tmp_path / "gone"
    long = tmp_path / ("1" * 300)  # no file system has such a name
    assert error_of(inputs.find_pictures, [gone]) == f"--predict {gone}: no such file or folder"
    assert str(long) in error_of(inputs.find_pictures, [long])
    touch(tmp_path, "a/x.png", "b/x.jpg")
    message = error_of(inputs.find_pictures, [tmp_path / "a", tmp_path / "b"])
    assert "several files would be written as x;" in message


def test_linked_folders_are_searched_once_and_hidden_ones_not(tmp_path):
    touch(tmp_path, "mine/a.png", "mine/.hidden/b.png", "elsewhere/c.png", "mine/real/d.png")
    mine = tmp_path / "mine"
    (mine / "link").symlink_to(tmp_path / "elsewhere")
    (mine / "loop").symlink_to(mine)
    for number in range(9):  # a folder is found where it is, not through a link
        (mine / f"{number}").symlink_to(mine / "real")
    found, other = inputs.find_pictures([mine])
    assert {*map(str, found.values())} == {"a", "link/c", "real/d"}
    assert not other


def test_a_folder_that_cannot_be_listed_is_skipped_and_named(tmp_path, monkeypatch, capsys):
    touch(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found, _ = inputs.find_pictures([tmp_path])
    assert [*found] == [tmp_path / "a.png"]
    line = f"skipped {tmp_path / 'closed'}: unreadable (Permission denied)\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("mask", ["a_GT.NII.GZ", "a_gt.nii", "a_Gt.nii.gz"])
@pytest.mark.parametrize("image", ["a.NII.GZ", "a.nii", "a.Nii.gz"])
def test_the_mask_beside_a_volume_is_no_image(tmp_path, image, mask):
    touch(tmp_path / "volumes", image, mask, "a_2.nii.gz", "b_gt.nii.gz")
    found, other = inputs.find_pictures([tmp_path / "volumes"])
    assert {path.name for path in found} == {image, "a_2.nii.gz", "b_gt.nii.gz"}
    assert other == [f"{tmp_path / 'volumes' / mask}: the mask of {image}"]


@pytest.mark.parametrize("draw", [png16, ppm16, jp2_16])
def test_a_color_picture_of_more_than_8_bits_is_not_predicted_from_its_highest_8(tmp_path, draw):
    path = tmp_path / "a"
    draw(path)
    assert "of more than 8 bits; save it as 8-bit RGB" in error_of(inputs.read_planes, path, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_a_picture_of_any_mode_is_one_plane(tmp_path, mode):
    Image.new(mode, (5, 4), 1).save(tmp_path / "a.tif")
    for channels in 1, 3:
        (plane,) = inputs.read_planes(tmp_path / "a.tif", channels)
        assert plane.shape == (channels, 4, 5)
        assert plane.dtype == (torch.float32 if mode in ("I;16", "F") else torch.uint8)


# Orientation and pages


RED = np.zeros((20, 24, 3), np.uint8)
RED[:6, :9, 0] = 255  # upper left
MASK = (RED[..., 0] > 0).astype(np.uint8)
EXTRA_IMAGE = {"save_all": True, "append_images": [Image.new("L", (9, 9))]}


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def with_exif(path: Path, orientation: int) -> None:
    options = EXTRA_IMAGE if path.suffix == ".mpo" else {}
    Image.fromarray(RED).save(path, exif=oriented(orientation), **options)


def with_raw_profile(path: Path, orientation: int) -> None:
    """A PNG with EXIF data as text, as ImageMagick writes them, behind its pixels."""
    Image.fromarray(RED).save(path)
    exif = oriented(orientation).tobytes()
    lines = f"\nAPP1\n{len(exif):8}\n{exif.hex()}\n"
    data = b"Raw profile type APP1\0\0" + zlib.compress(lines.encode())
    content = path.read_bytes()
    path.write_bytes(content[:-12] + png_chunk(b"zTXt", data) + content[-12:])


def with_exif_box(path: Path, orientation: int) -> None:
    """A JPEG 2000 with EXIF data in a box before its pixels."""
    Image.fromarray(RED).save(path)
    box = b"uuidJpgTiffExif->JP2" + oriented(orientation).tobytes().removeprefix(b"Exif\0\0")
    before, header, after = path.read_bytes().partition(b"jp2h")
    size = before[-4:]
    path.write_bytes(before[:-4] + struct.pack(">I", 4 + len(box)) + box + size + header + after)


def read_mask(mask: Path, spec=None) -> np.ndarray:
    """Read a mask of RED's size, beside RED."""
    image = mask.parent / "image.bmp"
    Image.fromarray(RED).save(image)
    return files.read_sample(Sample("a", "a", image, mask), spec or folder_spec())[1]


def mask_error(mask: Path, spec=None) -> str:
    """The error of a sample with this mask, after its file."""
    message = error_of(read_mask, mask, spec)
    assert message.startswith(f"{mask}: ")
    return message.removeprefix(f"{mask}: ")


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.jpg", with_exif),
        ("a.png", with_exif),
        ("a.png", with_raw_profile),
        ("a.jp2", with_exif_box),
        ("a.mpo", with_exif),
    ],
)
def test_a_picture_that_viewers_rotate_is_named_but_not_orientations_without_a_meaning(
    tmp_path, name, save, orientation
):
    path = tmp_path / name
    save(path, orientation)
    if orientation not in range(2, 9):
        assert files.read_image(path, 3).shape == (20, 24, 3)
        return
    found = f"viewers rotate it (EXIF orientation {orientation}); save it upright"
    for read in files.read_image, inputs.read_planes:
        assert error_of(read, path, 3).startswith(f"{path}: {found}")


@pytest.mark.parametrize("damage", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\xff", b""])
def test_damaged_exif_data_are_none(tmp_path, damage):
    Image.fromarray(RED).save(tmp_path / "a.jpg", exif=damage)
    files.read_image(tmp_path / "a.jpg", 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
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
    assert np.array_equal(inputs.read_planes(image, 3)[0].permute(1, 2, 0), shown)


@pytest.mark.parametrize("read", [files.read_mask, lambda path: files.read_image(path, 1)])
def test_a_picture_with_more_pixels_than_pillow_opens_is_named(tmp_path, monkeypatch, read):
    path = tmp_path / "slide.png"
    Image.new("L", (30, 30)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    error = error_of(read, path)
    assert error == f"{path}: more than 800 pixels; downsample or crop it"


@pytest.mark.parametrize("ending", ["tif", "gif", "png", "webp"])
def test_several_pages_are_an_error_of_images_and_masks_that_names_their_number(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    pages = [Image.fromarray(k == MASK).convert("L") for k in (0, 1)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    message = f"{path}: has 2 pages; expected one image per file"
    assert error_of(files.read_image, path, 3) == error_of(files.read_mask, path) == message


# Values of masks


@pytest.mark.parametrize(
    ("name", "options", "format_name"),
    [
        ("a.jpg", {}, "JPEG"),
        ("a.png", {"format": "JPEG", "quality": 100}, "JPEG"),
        ("a.webp", {"lossless": True}, "WEBP"),
        ("a.tif", {"compression": "jpeg"}, "TIFF with JPEG compression"),
        ("a.jp2", {}, "JPEG2000"),
    ],
)
def test_a_mask_in_a_lossy_format_is_an_error_that_names_it(tmp_path, name, options, format_name):
    Image.fromarray(MASK).save(tmp_path / name, **options)
    expected = "may change the values of labels; export the labels again as an indexed or gray"
    assert mask_error(tmp_path / name) == f"{format_name} {expected} 8-bit PNG"


@pytest.mark.parametrize(
    "ending", "png PNG bmp gif tif TIFF/tiff_lzw tif/tiff_adobe_deflate pgm tga pcx".split()
)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_mask_in_a_lossless_format_has_its_values(tmp_path, ending, indexed):
    ending, _, compression = ending.partition("/")
    path = tmp_path / f"a.{ending}"
    values = MASK if ending == "gif" else MASK * 3  # Pillow renumbers a GIF's values
    mask = Image.fromarray(values)
    if indexed and ending != "pgm":
        mask.putpalette([9, 9, 9, 0, 200, 0, 0, 0, 0, 8, 8, 200])  # whose colors say nothing
    mask.save(path, compression=compression or None)
    assert np.array_equal(read_mask(path, folder_spec(classes=[*"abcd"])), values)


def test_white_of_a_palette_may_be_the_color_of_void(tmp_path):
    void = {"classes": [*"abv"], "void": 2, "void_ids": [255], "ignore": 254, "scored": [0, 1]}
    mask = Image.fromarray(np.ones_like(MASK))
    mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png", folder_spec(**void)) == 1).all()


def test_a_plain_pbm_is_read_as_an_image(tmp_path):
    (tmp_path / "a.pbm").write_text("P1\n2 2\n0 1\n1 0\n")
    assert files.read_image(tmp_path / "a.pbm", 1).tolist() == [[255, 0], [0, 255]]


def test_grays_of_a_palette_that_are_other_labels_are_an_error(tmp_path):
    Image.fromarray(MASK * 3).save(tmp_path / "a.gif")  # which Pillow renumbers 0 and 1
    spec = folder_spec(classes=[*"abcd"])
    assert mask_error(tmp_path / "a.gif", spec).startswith("its index 1 is drawn in the gray 3")
    ignored = MASK * 3
    ignored[0] = IGNORE
    Image.fromarray(ignored).save(tmp_path / "a.gif")
    assert mask_error(tmp_path / "a.gif", spec).startswith("its index 1 is drawn in the gray 3")
    Image.fromarray(np.full_like(MASK, 3)).save(tmp_path / "a.gif")
    assert mask_error(tmp_path / "a.gif", spec).startswith("its index 0 is drawn in the gray 3")
    for colors in (
        [0, 0, 0, 255, 255, 255],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 3, 3, 4],
        [1, 1, 1, 9, 9, 9],
    ):
        mask = Image.fromarray(MASK)
        mask.putpalette(colors)
        mask.save(tmp_path / "a.png")
        assert np.array_equal(read_mask(tmp_path / "a.png", spec), MASK)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_of_fewer_bits_gives_its_indices(tmp_path, bits):
    mask = Image.fromarray(MASK)
    mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.save(tmp_path / "a.png", bits=bits)
    assert np.array_equal(files.read_mask(tmp_path / "a.png"), MASK)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.png", lambda path: Image.fromarray(MASK * 255).convert("1").save(path)),
        ("a.png", lambda path: Image.fromarray(MASK * 15).save(path, bits=4)),
        ("a.pgm", lambda path: path.write_bytes(b"P5\n24 20\n1\n" + MASK.tobytes())),
    ],
)
def test_gray_of_fewer_bits_is_black_and_white_where_label_ids_say_so(tmp_path, name, save):
    save(tmp_path / name)
    message = mask_error(tmp_path / name)
    assert ", fewer than 8 bits" in message
    assert "; save the labels with 8 bits" in message
    spec = folder_spec(label_ids=[0, 255], ignore=254)
    assert np.array_equal(read_mask(tmp_path / name, spec), MASK)
    spec = folder_spec(classes=[*"abc"], label_ids=[0, 1, 255], ignore=254)
    assert ", fewer than 8 bits" in mask_error(tmp_path / name, spec)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        ("I;16", "save the same values with 8 bits"),
        ("LA", "save it without its alpha channel"),
        ("RGBA", "save a single channel"),
        ("CMYK", "replace each color by its class index"),
    ],
)
def test_a_mask_of_another_mode_is_an_error_with_a_remedy(tmp_path, mode, remedy):
    Image.fromarray(MASK).convert(mode).save(tmp_path / "a.tif")
    message = mask_error(tmp_path / "a.tif")
    assert message.startswith(f"mode {mode}: ")
    assert message.endswith(f": {remedy}")


@pytest.mark.parametrize(
    "changes", [{"label_ids": [0, 256]}, {"label_ids": [-1, 1]}, {"ignore": -1}]
)
def test_values_beyond_a_byte_are_an_error_where_masks_are_pictures(tmp_path, changes):
    root, key = make_folder(tmp_path, 3), next(iter(changes))
    message = error_of(index, folder_spec(**changes), root)
    assert message.startswith(f"{root / 'masks' / 'picture 0.png'}: [dataset] has {key} ")
    assert message.endswith("; image files hold 0 to 255; only NIfTI masks can hold others")


# Writing


def test_a_written_mask_reads_back_whatever_the_values_of_the_classes(tmp_path):
    void = {"void": 2, "void_ids": [3, 5], "scored": [0, 1]}
    spec = toy_spec(classes=["no", "yes", "void"], label_ids=[9, 200], ignore=7, **void)
    mask = torch.tensor([[0, 1, 2, IGNORE]])
    writers.save_mask(tmp_path / "m.png", mask, spec)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        assert np.array(image).tolist() == [[9, 200, 3, 7]]
        colors = np.array(image.convert("RGB"))[0].tolist()
    assert colors == [*map(list, spec.palette), [224, 224, 192]]
    assert spec.lookup()[files.read_mask(tmp_path / "m.png")].tolist() == mask.tolist()
    writers.save_prediction(tmp_path / "new" / "a.b", Path("a.b.jpg"), mask[None], spec)
    assert files.read_mask(tmp_path / "new" / "a.b.png").tolist() == [[9, 200, 3, 7]]


@pytest.mark.parametrize("values", [(0, 500, 600), (-1, 0, 32767), (-32768, 255, 7)])
def test_any_int16_values_of_nifti_masks_are_read_and_written_back(tmp_path, values):
    truth = np.random.default_rng(0).integers(0, 3, (4, 5, 3))
    stored = np.array(values, np.int16)[truth]
    sample = volume_sample(tmp_path, np.zeros((4, 5, 3), np.int16), stored, 2)
    spec = folder_spec(classes=[*"abc"], label_ids=values, ignore=99)
    masks = torch.from_numpy(truth.transpose(2, 1, 0).astype(np.uint8))
    assert np.array_equal(files.read_sample(sample, spec)[1], masks[2])
    writers.save_prediction(tmp_path / "p", sample.image.path, masks, spec)
    written = nibabel.load(tmp_path / "p.nii.gz")
    assert written.get_data_dtype() == np.int16
    assert np.array_equal(written.dataobj, stored)
    writers.save_mask(tmp_path / "p.png", masks[0], spec)  # a PNG has too few bits
    assert np.array_equal(Image.open(tmp_path / "p.png"), masks[0])


def test_prediction_of_a_volume_has_its_header_and_affine(tmp_path):
    source = nibabel.Nifti1Image(np.zeros((4, 5, 3), np.int16), ACDC_AFFINE)
    source.header.set_slope_inter(0.5, -3)
    source.header.set_xyzt_units("mm", "sec")
    source.header["cal_max"] = 1000  # viewers would show the mask as black
    nibabel.save(source, tmp_path / "a.nii.gz")
    masks = torch.randint(4, (3, 5, 4), dtype=torch.uint8)
    writers.save_prediction(tmp_path / "new" / "a", tmp_path / "a.nii.gz", masks, ACDC)
    written = nibabel.load(tmp_path / "new" / "a.nii.gz")
    assert np.array_equal(written.get_fdata(), masks.permute(2, 1, 0))
    assert (written.get_data_dtype(), written.header.get_xyzt_units()) == (np.uint8, ("mm", "sec"))
    assert written.header["cal_max"] == 0
    np.testing.assert_allclose(written.affine, ACDC_AFFINE, rtol=1e-6)
