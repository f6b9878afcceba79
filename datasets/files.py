"""Find, read and check images and NIfTI volumes. Editing this file invalidates every cache."""

import gzip
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import prod
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin
from torch import Tensor

from datasets.phantom import draw_phantom
from datasets.spec import DatasetSpec, Sample, Slice
from utils import IGNORE, InputError, check_regular, naming

LOSSLESS = (  # formats of gray or indexed pictures whose values are those that were saved
    *("BMP", "DIB", "FITS", "FLI", "GBR", "GIF", "IM", "MSP", "PCX", "PNG", "PPM", "PSD", "SGI"),
    *("SUN", "TGA", "TIFF", "XBM", "XPM"),
)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at half the limit
# Formats that Pillow recognizes but cannot read; EPS is a program, which Ghostscript would run
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG"}
LARGEST = 1e30  # of pixels; float32 holds up to 3.4e38
NOT_FINITE = f"contains values that are not finite, or beyond {LARGEST:g}; replace them"
MM = {1: 1000, 3: 0.001}  # by NIfTI's code of a unit of length: m, micron; others are mm
PHOTOMETRIC = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION  # 0: WhiteIsZero
SIZ, SIZE = b"\xff\x4f\xff\x51", 36  # of JPEG 2000: the markers before its sizes, their length
EXIF_IN_JPEG2000 = b"JpgTiffExif->JP2"  # the name of the box that has it


def is_volume(path: Path) -> bool:
    """Whether a file has the extension of a NIfTI volume."""
    return bool(re.search(r".\.nii(\.gz)?$", path.name, re.IGNORECASE))


def is_picture(path: Path) -> bool:
    """Whether a file has an extension of a format that Pillow reads."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN.keys() - STUBS


def stem_of(path: Path) -> str:
    """A file's name without its extension; .nii.gz is one."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I) if is_volume(path) else path.stem


@contextmanager
def within_limit(path: Path) -> Iterator[None]:
    """InputError if a picture has more pixels than Pillow opens."""
    try:
        yield
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path}: more than {limit:,} pixels; downsample or crop it") from error


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture, which the caller then decodes; InputError names it.

    InputError also if its checksums are wrong, it has several pages, or viewers would rotate it.
    """
    with naming(path), within_limit(path):
        check_regular(path)
        with Image.open(path) as image:
            if image.format in STUBS:
                raise InputError(f"{path}: {image.format} cannot be read; save it as PNG")
            image.verify()  # checks all of a PNG; decoding stops at the last pixel
        # as a file: by name, Pillow 13 garbles uncompressed TIFFs that it rotates
        with path.open("rb") as file, Image.open(file) as image:
            check_single(path, image)
            yield image
            # now Pillow has rotated a TIFF, and read what follows the pixels of a PNG
            check_upright(path, image)


def is_deep(image: Image.Image) -> bool:
    """Whether a picture's gray values need more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def check_single(path: Path, image: Image.Image) -> None:
    """InputError if a picture has several pages, frames or images."""
    n_pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if n_pages > 1:  # a phone's MPO has its photo first
        raise InputError(f"{path}: has {n_pages} pages; expected one image per file")


def check_upright(path: Path, image: Image.Image) -> None:
    """InputError if viewers rotate or mirror a decoded picture (EXIF orientation)."""
    orientation, other = None, Image.Exif()
    with suppress(Exception):  # damaged EXIF data
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    with suppress(Exception):  # EXIF data that Pillow leaves alone
        if profile := image.info.get("Raw profile type APP1"):  # of a PNG
            other.load(bytes.fromhex("".join(profile.split("\n")[3:])))
        if image.format == "JPEG2000":
            other.load(path.read_bytes().partition(EXIF_IN_JPEG2000)[2])
        orientation = other.get(ExifTags.Base.Orientation, orientation)
    if orientation in range(2, 9):  # others have no meaning
        advice = "save it upright, for example with `mogrify -auto-orient`"
        raise InputError(f"{path}: viewers rotate it (EXIF orientation {orientation}); {advice}")


def as_array(image: Image.Image, channels: int) -> np.ndarray:
    """A picture of any mode as (H, W) or (H, W, 3) uint8, or (H, W) float32 if it is deep.

    ValueError for a TIFF whose 0 is white, and for values that are not finite.
    """
    if not is_deep(image):
        return np.array(image.convert("L" if channels == 1 else "RGB"))
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:
        raise ValueError("its 0 is white (photometric interpretation 0); save it with black as 0")
    values = np.array(image, np.float32)
    if not is_finite(values):
        raise ValueError(NOT_FINITE)
    return values


def read_image(path: Path, channels: int, own: bool = False) -> np.ndarray:
    """Read an 8-bit picture as (H, W) or (H, W, 3) uint8; with `own`, deeper ones as float32."""
    with opened(path) as image:
        if own and is_deep(image):
            return as_array(image, channels)
        raw = " of more than 8 bits" if is_reduced(path, image) else ""
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") or raw:
            found = f"mode {image.mode}{raw}"
            raise InputError(f"{path}: {found}: expected an 8-bit gray or RGB image")
        return as_array(image, channels)


def is_reduced(path: Path, image: Image.Image) -> bool:
    """Whether Pillow reduces a color picture's values to 8 bits."""
    if image.format == "JPEG2000":
        header = path.read_bytes().partition(SIZ)[2][SIZE:]
        n_channels = int.from_bytes(header[:2])
        return any((bits & 127) > 7 for bits in header[2 : 2 + 3 * n_channels : 3])  # less one
    codec, *_, layout = image.tile[0] if image.tile else ("", "")
    of_ppm = layout[-1] if codec.startswith("ppm") and isinstance(layout, tuple) else 0
    return ";16" in str(layout) or of_ppm > 255


def is_stretched(image: Image.Image) -> bool:
    """Whether decoding changes a picture's gray values: fewer than 8 bits become 0 to 255."""
    codec, *_, layout = image.tile[0] if image.tile else ("", "")
    below_255 = codec.startswith("ppm") and layout[-1] != 255
    return image.mode == "1" or (image.mode == "L" and (";" in str(layout) or below_255))


def remedy_for(image: Image.Image) -> str:
    """How to make a mask of a picture of another mode."""
    if is_deep(image):
        return "save the same values with 8 bits"
    colors = [band for band in image.getbands() if band != "A"]
    if len(colors) == 1:
        return "save it without its alpha channel"
    first, *others = (np.array(image.getchannel(band)) for band in colors)
    if all(np.array_equal(first, other) for other in others):
        return "save a single channel"
    return "replace each color by its class index"


def check_palette(
    path: Path, image: Image.Image, labels: tuple[int, ...], legal: Iterable[int]
) -> None:
    """InputError if the colors of an indexed picture are legal grays, some of them other labels.

    GIF writers renumber gray values and leave the labels to the palette.
    """
    palette = np.reshape(image.getpalette("RGB"), (-1, 3))
    used = np.unique(np.array(image))
    used = used[used < len(palette)]
    grays = palette[used, 0]
    all_gray = (palette[used] == grays[:, None]).all() and len(np.unique(grays)) == len(grays)
    other_labels = (grays != used) & np.isin(grays, labels)
    if all_gray and grays.any() and other_labels.any() and {*grays.tolist()} <= {*labels, *legal}:
        index = np.flatnonzero(other_labels)[0]
        found = f"its index {used[index]} is drawn in the gray {grays[index]}, another label"
        raise InputError(f"{path}: {found}; save the labels as a gray 8-bit PNG")


def read_mask(path: Path, labels: tuple[int, ...] = (), legal: Iterable[int] = ()) -> np.ndarray:
    """Read an indexed or gray 8-bit picture as (H, W) uint8.

    labels: the classes' values; if 255 is one of them, and no value of fewer than 8 bits except 0,
    black and white of fewer bits are 0 and 255. legal: also those of pixels that do not count.
    """
    expected = "a mask must be an indexed or gray 8-bit PNG of class indices"
    with opened(path) as image:
        compression = str(image.info.get("compression")) if image.format == "TIFF" else ""
        lossy = re.search("jpeg|webp", compression)
        if image.format not in LOSSLESS or lossy:
            name = f"TIFF with {lossy[0].upper()} compression" if lossy else image.format
            advice = "export the labels again as an indexed or gray 8-bit PNG"
            raise InputError(f"{path}: {name} may change the values of labels; {advice}")
        if is_stretched(image):
            if 255 in labels and not any(0 < label < 128 for label in labels):
                return np.array(image.convert("L"))
            found = f"mode {image.mode}, fewer than 8 bits, which some programs scale to 0 to 255"
            advice = "save the labels with 8 bits; label_ids = [0, 255] reads black and white"
            raise InputError(f"{path}: {found}; {advice}")
        if image.mode not in ("L", "P"):
            raise InputError(f"{path}: mode {image.mode}: {expected}: {remedy_for(image)}")
        if image.mode == "P":
            check_palette(path, image, labels, legal)
        return np.array(image)


def colors_of(sample: Sample, mask: np.ndarray, spec: DatasetSpec) -> dict[int, tuple]:
    """The palette's color of each class value in an indexed mask.

    Empty for other masks, and for one that draws each index in the gray of that value. mask: the
    sample's, (H, W) uint8 of class indices and IGNORE.
    """
    if not isinstance(sample.mask, Path):
        return {}
    with naming(sample.mask), Image.open(sample.mask) as image:
        if image.mode != "P":
            return {}
        palette = np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()
    values = dict(enumerate(spec.class_values()))
    used = [values[k] for k in np.unique(mask).tolist() if k in values]
    colors = {value: tuple(palette[value]) for value in used if 0 <= value < len(palette)}
    is_gray = all(color == 3 * (value,) for value, color in colors.items())
    return {} if is_gray else colors


def read_frames(path: Path) -> np.ndarray:
    """Read a NIfTI volume with or without time as (X, Y, Z, T)."""
    check_regular(path)
    size = path.stat().st_size
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as stream:  # to the end: nibabel does not reach the checksum
            size = sum(map(len, iter(lambda: stream.read(2**20), b"")))
    file = nibabel.load(path)
    if (needed := prod(file.shape) * file.get_data_dtype().itemsize) > size:
        raise InputError(f"{path}: {size:,} bytes, but its header declares {needed:,}: truncated")
    volume = np.asanyarray(file.dataobj)
    n_frames = max(volume.shape[3:], default=1)
    has_frames = volume.ndim >= 3 and n_frames == prod(volume.shape[3:]) and volume.size
    if not has_frames or volume.dtype.kind not in "uif":
        found = f"shape {volume.shape} of {volume.dtype}"
        expected = "a volume (X, Y, Z) or (X, Y, Z, T) of numbers"
        raise InputError(f"{path}: {found}: expected {expected}")
    voxel = np.array(file.header.get_zooms()[:3])
    if not (np.isfinite(file.affine).all() and (np.isfinite(voxel) & (voxel > 0)).all()):
        expected = "expected positive voxel sizes and a finite affine"
        raise InputError(f"{path}: invalid header with voxel sizes {voxel.tolist()}; {expected}")
    sizes = nibabel.affines.voxel_sizes(file.affine)
    with file.file_map["image"].get_prepare_fileobj("rb") as content:  # nibabel replaces a 0 by 1
        stored = type(file.header).from_fileobj(content, check=False)["pixdim"][1:4]
    if not stored.all() and (stored.any() or np.allclose(sizes, 1)):
        found = f"voxel sizes {' x '.join(f'{size:g}' for size in stored)} in the header (pixdim)"
        raise InputError(f"{path}: {found}; write the true ones")
    known = [each for each in (voxel, sizes) if not np.allclose(each, 1)]  # 1 mm: not set
    if len(known) == 2 and not np.allclose(voxel, sizes, rtol=0.01):
        own, other = (" x ".join(f"{size:.4g}" for size in each) for each in known)
        found = f"voxel sizes {own} in the header (pixdim), but {other} in the affine"
        raise InputError(f"{path}: {found}; correct one of them")
    return volume.reshape(*volume.shape[:3], n_frames)


@lru_cache(maxsize=2)  # an image and its mask
def read_volume(path: Path) -> np.ndarray:
    """Read a NIfTI volume (X, Y, Z); cached, as neighboring samples are slices of one volume."""
    volume = read_frames(path)
    if volume.shape[3] != 1:
        found = f"shape {volume.shape} of {volume.dtype}"
        expected = "a volume (X, Y, Z) of numbers, without time"
        raise InputError(f"{path}: {found}: expected {expected}")
    return volume[..., 0]


@lru_cache(maxsize=4)
def check_geometry(image: Path, mask: Path) -> None:
    """InputError if a mask volume has other slices or axes than its image."""
    depths = [read_volume(path).shape[2] for path in (image, mask)]
    if depths[0] != depths[1]:
        raise InputError(f"{mask}: has {depths[1]} slices, but its image has {depths[0]}")
    first, other = (nibabel.load(path).affine for path in (image, mask))
    axes, shift = first[:3, :3], other[:3, 3] - first[:3, 3]
    differ = []
    if not np.allclose(axes, other[:3, :3], rtol=0, atol=0.01 * np.linalg.norm(axes, axis=0)):
        differ.append("axes")
    if not np.allclose(spacing_of(image), spacing_of(mask), rtol=0.01):
        differ.append("voxel sizes")
    if (np.abs(np.linalg.lstsq(axes, shift, rcond=None)[0]) > 0.5).any():  # in voxels
        differ.append("origin")
    if differ:
        found = f"its geometry differs from its image's ({', '.join(differ)})"
        raise InputError(f"{mask}: {found}; resample it to the image's grid")


def spacing_of(volume: Path) -> tuple[float, float, float]:
    """The size of a voxel (z, y, x) in mm: the header's zooms, or the affine's if those are 1."""
    file = nibabel.load(volume)
    zooms = file.header.get_zooms()[:3]
    if all(zoom == 1 for zoom in zooms):
        zooms = nibabel.affines.voxel_sizes(file.affine)
    mm = MM.get(int(file.header["xyzt_units"]) % 8, 1)
    x, y, z = (float(zoom) * mm for zoom in zooms)
    return z, y, x


def axes_of(volume: Path) -> str:
    """Where the three axes of a volume point, by its affine: "LPS", with "-" for none."""
    with naming(volume):
        return "".join(code or "-" for code in nibabel.aff2axcodes(nibabel.load(volume).affine))


def forget_volumes() -> None:
    """Forget the volumes that were read and checked: their files may have changed."""
    read_volume.cache_clear()
    check_geometry.cache_clear()


def read_slice(source: Slice) -> np.ndarray:
    """One slice of a volume, (Y, X), in the file's own type."""
    path, z = source
    with naming(path):
        volume = read_volume(path)
        if z >= volume.shape[2]:
            raise InputError(f"{path}: has {volume.shape[2]} slices; slice {z} is missing")
        return finite(volume[:, :, z].T, f"{path}: slice {z}")


def is_finite(pixels: np.ndarray) -> bool:
    """Whether all pixels are finite, and sums of them, too."""
    return bool((np.abs(pixels) < LARGEST).all())


def finite(pixels: np.ndarray, name: str) -> np.ndarray:
    """The pixels; InputError unless they are finite."""
    if not is_finite(pixels):
        raise InputError(f"{name} {NOT_FINITE}")
    return pixels


def as_pixels(image: np.ndarray, channels: int) -> Tensor:
    """(H, W) or (H, W, 3) to (C, H, W); gray images are repeated over the channels."""
    pixels = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
    return pixels.expand(channels, -1, -1)


def mask_file(sample: Sample) -> Path | int:
    """The file of a sample's mask: a picture, or the volume of a slice."""
    return sample.mask.path if isinstance(sample.mask, Slice) else sample.mask


def read_labels(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    """Read a sample's mask as (H, W) uint8 of class indices and IGNORE; InputError names it."""
    if isinstance(sample.mask, int):
        values = draw_phantom(sample.mask)[1]
    elif isinstance(sample.mask, Slice):
        values = read_slice(sample.mask)
    else:
        values = read_mask(sample.mask, spec.class_values(), spec.legal_values())
    file, whole = mask_file(sample), values.round()
    if (uneven := np.abs(values - whole) > 1e-3).any():  # a slope rounds integers
        advice = "save labels as integers, resampled to the nearest neighbor"
        raise InputError(f"{file}: label {values[uneven][0]:g} is not an integer; {advice}")
    in_range = (whole >= -(2**15)) & (whole < 2**15)
    classes = spec.lookup()[np.where(in_range, whole, 0).astype(np.int16)]
    if not (legal := in_range & (classes >= 0)).all():
        known = sorted(spec.legal_values())
        found = f"label {whole[~legal][0]:g} is out of range"
        raise InputError(f"{file}: {found}; expected one of {', '.join(map(str, known))}")
    return classes.astype(np.uint8)


def read_sample(sample: Sample, spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Read and check a sample; InputError names the file.

    Returns the image, (H, W) or (H, W, 3) uint8 or float32, and its mask, (H, W) uint8 of class
    indices and IGNORE, all IGNORE if there is none.
    """
    if isinstance(sample.image, int):
        image = draw_phantom(sample.image)[0]
    elif isinstance(sample.image, Slice):
        image = read_slice(sample.image).astype(np.float32)
    else:
        image = read_image(sample.image, spec.channels, own=spec.layout == "folder")
    if sample.mask is None:
        return image, np.full(image.shape[:2], IGNORE, np.uint8)
    mask = read_labels(sample, spec)
    if isinstance(sample.mask, Slice):
        check_geometry(sample.image.path, sample.mask.path)
    if mask.shape != image.shape[:2]:
        (height, width), (rows, columns) = image.shape[:2], mask.shape
        sizes = f"{columns}x{rows} pixels, but its image has {width}x{height}"
        raise InputError(f"{mask_file(sample)}: {sizes}")
    return image, mask


def depth_of(path: Path) -> int:
    """The number of a volume's slices, in each frame; 1 for a picture."""
    return nibabel.load(path).shape[2] if is_volume(path) else 1
