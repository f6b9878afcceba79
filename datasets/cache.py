"""The cache: every image of a split decoded and resized once, memory-mapped."""

import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets import files
from datasets.phantom import draw_phantom
from datasets.spec import DatasetSpec, Sample, Slice
from datasets.workers import image_loader, loaded
from utils import (
    PATIENCE,
    InputError,
    check_regular,
    counted,
    exclusive,
    first_ten,
    make_folder,
    writing,
)

SAVE_INDICES = "save the class indices as gray 8-bit PNGs"
TEMPORARY = ".partial"  # ending of a folder in which a cache is being made


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (C, H, W) at the networks' size, bilinear; a constant stays one."""
    resized = F.interpolate(pixels[None], tuple(size), mode="bilinear", antialias=True)[0]
    if not pixels.is_floating_point():
        return resized
    return resized.clamp(*torch.aminmax(pixels))  # weights sum to 1 up to rounding alone


def decode(sample: Sample, spec: DatasetSpec, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read a sample at the networks' size.

    Image (C, H, W) uint8 or float32, bilinear; mask (H, W) uint8, nearest.
    """
    image, mask = files.read_sample(sample, spec)
    pixels = resize(files.as_pixels(image, spec.channels), size)
    labels = F.interpolate(torch.from_numpy(mask)[None, None], size, mode="nearest-exact")
    return pixels.contiguous(), labels[0, 0].contiguous()


class Decoder(Dataset):
    """Item i writes sample i into a cache's files and returns its error or files.colors_of().

    Worker processes thus send back no pixels, however many slices a volume has.
    """

    def __init__(
        self, samples: list[Sample], spec: DatasetSpec, size: tuple[int, int], home: Path, dtype
    ):
        self.samples, self.spec, self.size = samples, spec, size
        self.files: list[tuple[Path, int, np.dtype]] = []  # each with the byte offset of row 0
        arrays = ("images", dtype, (spec.channels, *size)), ("masks", np.uint8, size)
        for name, kind, shape in arrays:
            header = {"descr": np.dtype(kind).str, "fortran_order": False}
            header["shape"] = (len(samples), *shape)
            with open(home / f"{name}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                self.files.append((home / f"{name}.npy", file.tell(), np.dtype(kind)))

    def __getitem__(self, i: int) -> InputError | OSError | dict[int, tuple]:
        try:
            arrays = decode(self.samples[i], self.spec, self.size)
            for (path, start, dtype), pixels in zip(self.files, arrays, strict=True):
                row = pixels.numpy().astype(dtype).tobytes()
                # not through a memory map: there a full disk is a crash, not an error
                with open(path, "r+b") as file:
                    file.seek(start + i * len(row))
                    file.write(row)
            return files.colors_of(self.samples[i], arrays[1].numpy(), self.spec)
        except (InputError, OSError) as error:
            return error


@dataclass(frozen=True)
class Cache:
    """All samples, memory-mapped: images (N, C, H, W), masks (N, H, W) uint8, and rows by id."""

    images: np.memmap
    masks: np.memmap
    rows: dict[str, int]

    def __reduce__(self):  # a worker process that is not forked maps the files itself
        return _map_cache, (Path(self.images.filename).parent, self.rows)


def _map_cache(home: Path, rows: dict[str, int]) -> Cache:
    images, masks = (np.load(home / f"{name}.npy", mmap_mode="r") for name in ("images", "masks"))
    return Cache(images, masks, rows)


def cache_key(spec: DatasetSpec, samples: list[Sample], size: tuple[int, int]) -> str:
    """A digest of everything that a cache depends on.

    Ids, files with their sizes, times and numbers (inodes), the meaning of labels, the size, the
    code that reads.
    """

    def stamp(source: Path | Slice | int | None):
        if isinstance(source, int) or source is None:
            return source
        path, z = source if isinstance(source, Slice) else (source, None)
        try:
            status = path.stat()
        except OSError:
            return str(path)
        # A tool that replaces a file may keep its size and time, but not its number
        return str(path.resolve()), z, status.st_size, status.st_mtime_ns, status.st_ino

    stamps = [(s.id, stamp(s.image), stamp(s.mask)) for s in samples]
    labels = spec.channels, spec.lookup().tolist()
    code = [inspect.getsource(reader) for reader in (files, draw_phantom, decode, resize)]
    content = json.dumps([stamps, labels, list(size), code])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_cache(
    spec: DatasetSpec, samples: list[Sample], size: tuple[int, int], folder: Path, workers: int = 0
) -> Cache:
    """Open the decoded samples in `folder`; decode and store them first if they are not there.

    InputError names the unusable files (the first ten, then the count).
    """
    rows = {sample.id: row for row, sample in enumerate(samples)}
    key = cache_key(spec, samples, size)
    home = folder / f"{spec.name}_{size[0]}x{size[1]}_{key}"
    with suppress(OSError, ValueError, EOFError):  # missing or damaged
        return _map_cache(home, rows)
    make_folder(folder, "--cache")
    with _temporary_folder(folder, home.name) as partial:
        _fill_cache(partial, spec, samples, size, workers)
        if cache_key(spec, samples, size) != key:
            raise InputError("images or masks changed while they were read; repeat the command")
        home.mkdir(exist_ok=True)
        for file in partial.iterdir():  # other runs may be storing equal files
            with file.open("rb") as stored:  # on the disk before it gets its name
                os.fsync(stored.fileno())
            file.replace(home / file.name)
    return _map_cache(home, rows)


@contextmanager
def _temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder, deleted at the end; first, delete those left behind by killed processes."""
    with ExitStack() as stack:
        with exclusive(parent, PATIENCE):
            for leftover in parent.glob(f".*{TEMPORARY}"):
                if not re.fullmatch(r"\..+_\d+x\d+_[0-9a-f]{16}\..+", leftover.stem):
                    continue  # not made here
                with exclusive(leftover) as abandoned:
                    if abandoned:
                        shutil.rmtree(leftover, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(TEMPORARY, f".{name}.", parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(exclusive(folder))
        yield folder


def _needs_float(source: Path | Slice | int, spec: DatasetSpec) -> bool:
    """Whether an image has more than 8 bits; decoding reports broken files."""
    if spec.layout == "folder" and isinstance(source, Path):
        with suppress(Exception):
            check_regular(source)  # opening a pipe would wait for its writer
            with Image.open(source) as image:
                return files.is_deep(image)
    return isinstance(source, Slice)


def other_color(found: dict[int, tuple], sample: Sample, colors: dict[int, tuple]) -> str:
    """The problem of an indexed mask whose colors differ from earlier masks'; "" if there is none.

    Programs that convert colors to a palette number them anew in each file.
    """
    for value, color in found.items():
        known, first = colors.setdefault(value, (color, sample.mask))
        if color != known:
            drawn = f"its index {value} is drawn in {color}, that of {first} in {known}"
            return f"{sample.mask}: {drawn}; {SAVE_INDICES}"
    return ""


def _fill_cache(
    home: Path, spec: DatasetSpec, samples: list[Sample], size: tuple[int, int], workers: int
) -> None:
    dtype = np.float32 if any(_needs_float(s.image, spec) for s in samples) else np.uint8
    volumes = [s.image.path if isinstance(s.image, Slice) else s.id for s in samples]
    rows = itertools.groupby(range(len(samples)), key=volumes.__getitem__)
    files.forget_volumes()
    problems: dict[str, str] = {}  # the first of each volume or image
    colors: dict[int, tuple] = {}  # of each value in indexed masks: the color, the first file
    per_pixel = spec.channels * np.dtype(dtype).itemsize + 1
    try:
        with writing(home, len(samples) * size[0] * size[1] * per_pixel):
            decoded = image_loader(
                Decoder(samples, spec, size, home, dtype),
                workers,
                batch_sampler=[list(group) for _, group in rows],  # a worker reads a whole volume
                collate_fn=list,
            )
            items = itertools.chain.from_iterable(loaded(decoded))
            bar = tqdm(items, f"decoding {spec.name}", len(samples), unit=" images", disable=None)
            for volume, sample, item in zip(volumes, samples, bar, strict=True):
                if isinstance(item, InputError):
                    problems.setdefault(str(volume), str(item))
                elif isinstance(item, OSError):
                    raise item
                elif problem := other_color(item, sample, colors):
                    problems.setdefault(str(volume), problem)
    finally:
        files.forget_volumes()
    if problems:
        unique = list(dict.fromkeys(problems.values()))
        raise InputError(f"{counted(len(unique), 'unusable file')}: {first_ten(unique)}")
