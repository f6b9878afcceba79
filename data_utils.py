"""From a dataset to batches: its split, epochs, normalization, augmentation (Section 4.1).

load_data() finds a dataset's samples, splits them and opens the cache of decoded images; Batches
brings them to the device in the networks' range. Masks hold class indices, IGNORE where a pixel
does not count.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import utils
from datasets.cache import Cache, open_cache
from datasets.files import axes_of, colors_of
from datasets.layouts import index
from datasets.spec import DatasetSpec, Sample, Slice
from datasets.splits import ByFile, Split
from datasets.workers import image_loader, loaded
from utils import IGNORE, InputError

# Batches


class Stored(Dataset):
    """Cached samples: item i is (image, mask), not yet normalized.

    With `ignored_class`, ignored pixels of the masks become that class.
    """

    def __init__(self, cache: Cache, samples: tuple[Sample, ...], ignored_class: int = IGNORE):
        self.cache, self.samples, self.ignored_class = cache, samples, ignored_class
        self.rows = [cache.rows[sample.id] for sample in samples]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_dtype(self) -> str:
        """uint8, or float32 where the dataset has volumes or deeper images."""
        return str(self.cache.images.dtype)

    def image(self, i: int) -> Tensor:
        """Image i, (C, H, W)."""
        return torch.from_numpy(self.cache.images[self.rows[i]].copy())

    def mask(self, i: int) -> Tensor:
        """Mask i, (H, W) uint8."""
        mask = torch.from_numpy(self.cache.masks[self.rows[i]].copy())
        return mask.masked_fill_(mask == IGNORE, self.ignored_class)

    def cached_masks(self) -> Iterator[tuple[Sample, np.ndarray]]:
        """The samples and their masks as cached, IGNORE kept."""
        for sample, row in zip(self.samples, self.rows, strict=True):
            yield sample, self.cache.masks[row]

    def of_many_classes(self, n: int) -> list[int]:
        """Indices of up to n images whose masks have the most classes, spread over the list."""
        masks = (mask for _, mask in self.cached_masks())
        variety = np.array([len(np.setdiff1d(mask, IGNORE)) for mask in masks])
        rich = np.flatnonzero(variety >= np.sort(variety)[-n:][0])
        return rich[np.linspace(0, len(rich) - 1, min(n, len(rich))).astype(int)].tolist()

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.image(i), self.mask(i)


class Pairs(Dataset):
    """Labeled samples beside unlabeled images: item (i, j) is (x, y, x_u), item (i,) is (x, y)."""

    def __init__(self, labeled: Stored, unlabeled: Stored):
        self.labeled, self.unlabeled = labeled, unlabeled

    def __getitem__(self, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        i, *j = rows
        return *self.labeled[i], *map(self.unlabeled.image, j)

    def n_steps(self, batch_size: int) -> int:
        """The batches of one epoch."""
        return -(-max(len(self.labeled), len(self.unlabeled)) // batch_size)

    def epoch(self, seed: int, epoch: int, batch_size: int = 1) -> list[tuple[int, ...]]:
        """The items of one epoch, in order: (i, j), or (i,) if nothing is unlabeled.

        One pass over the longer list in random order, the shorter one cycled, each pass in a new
        order; the next pass's first images complete the last batch. The order follows from seed and
        epoch alone, so that a run can resume within an epoch.
        """
        counts = len(self.labeled), len(self.unlabeled)
        length = batch_size * self.n_steps(batch_size)
        rng = np.random.default_rng([seed, epoch])
        columns: list[list[int]] = []
        for n in filter(None, counts):
            passes = [rng.permutation(n) for _ in range(-(-length // n))]
            columns.append(np.concatenate(passes)[:length].tolist())
        return list(zip(*columns, strict=True))


def normalize(x: Tensor, normalization: str = "range") -> Tensor:
    """Images (B, C, H, W) of bytes or floats to float32 within [-1, 1].

    "range": Section 3.3, (v - mean) / (max - min) per image and channel; a constant becomes 0.
    "half": the released code's (v - 0.5) / 0.5, with v = byte / 255; float images are first scaled
    to [0, 1] by their own extremes.
    """
    v = x.float()
    extremes = torch.aminmax(v.flatten(2), dim=2)
    lowest, highest = (extreme[..., None, None] for extreme in extremes)
    span = torch.where(highest > lowest, highest - lowest, torch.inf)
    if normalization == "range":
        return (v - v.mean((2, 3), keepdim=True)) / span
    unit = v / 255 if x.dtype == torch.uint8 else (v - lowest) / span
    return (unit - 0.5) / 0.5


def augment(x: Tensor, orientation: str, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """--augment, for each image (B, C, H, W) and its mask (B, H, W) at random.

    Flips and 90-degree rotations if the dataset's orientation is "any" (180 degrees if H != W),
    horizontal flips if it is "mirror", neither if "fixed"; then contrast ±20% and brightness ±0.1,
    clipped to [-1, 1].
    """
    angles = [0]  # in quarter turns
    if orientation == "any":
        is_square = x.shape[-2] == x.shape[-1]
        angles = [0, 1, 2, 3] if is_square else [0, 2]
    flips = [False] if orientation == "fixed" else [False, True]
    variant = torch.randint(len(flips) * len(angles), (len(x),), device=x.device)

    def turned(maps: Tensor) -> Tensor:
        variants = []
        for flip in flips:
            flipped = maps.flip(-1) if flip else maps
            variants += [flipped.rot90(angle, (-2, -1)) for angle in angles]
        return torch.stack(variants)[variant, torch.arange(len(maps), device=maps.device)]

    contrast, brightness = 2 * torch.rand(2, len(x), 1, 1, 1, device=x.device) - 1
    x = turned(x) * (1 + 0.2 * contrast) + 0.1 * brightness
    return x.clamp(-1, 1), None if y is None else turned(y)


def _stacked(items: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
    """A batch as arrays, which reach the main process through a pipe.

    Tensors would need shared memory and a file descriptor each.
    """
    return [torch.stack(column).numpy() for column in zip(*items, strict=True)]


class Batches:
    """Batches (image, mask, ...) on the device: images normalized, masks int64.

    With `orientation` (the dataset's), images and masks are also augmented.

    Iterating a Stored goes through all of it in order; `of` takes the items of Pairs. With several
    processes, each gets its share of every batch, of `batch_size` images in all. The worker
    processes live as long as this object.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        normalization: str = "range",
        orientation: str | None = None,
    ):
        self.data, self.device, self.normalization = data, device, normalization
        self.orientation = orientation
        self.items: list = []  # of the pass under way; the DataLoader's sampler
        self.loader = image_loader(
            data,
            workers,
            batch_size=batch_size // utils.n_connected(),
            sampler=self.items,
            persistent_workers=workers > 0,
            collate_fn=_stacked,
        )

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self.of(range(len(self.data)))

    def of(self, items: Sequence) -> Iterator[list[Tensor]]:
        """The batches of some items of the data, in the order given."""
        self.items[:] = items[utils.connected_rank() :: utils.n_connected()]
        for arrays in loaded(self.loader):
            x, y, *x_u = map(self._on_device, arrays)
            x, *x_u = (normalize(image, self.normalization) for image in (x, *x_u))
            y = y.long()
            if self.orientation:
                x, y = augment(x, self.orientation, y)
                x_u = [augment(image, self.orientation)[0] for image in x_u]
            yield [x, y, *x_u]

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # from pinned memory, the copy does not block
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def volumes_of(samples: Iterable[Sample]) -> set[Path]:
    """The NIfTI files of the images that are slices."""
    return {sample.image.path for sample in samples if isinstance(sample.image, Slice)}


@dataclass(frozen=True)
class Data:
    """A run's dataset: its split and the cached images of each role."""

    split: Split
    labeled: Stored
    unlabeled: Stored
    val: Stored

    @property
    def train(self) -> Pairs:
        """Labeled and unlabeled images together."""
        return Pairs(self.labeled, self.unlabeled)

    @cached_property
    def axes(self) -> list[str]:
        """Where the axes of the volumes point (files.axes_of), without duplicates."""
        return sorted({axes_of(path) for path in volumes_of(self.split.samples)})

    def colors(self, spec: DatasetSpec) -> dict[int, tuple]:
        """The color of each class value in indexed masks (files.colors_of)."""
        colors: dict[int, tuple] = {}
        for sample, mask in self.masks():
            colors |= colors_of(sample, mask, spec)
        return colors

    @property
    def n_groups(self) -> int:
        """The number of images or exams with masks."""
        return len({sample.group for sample in self.split.samples if sample.mask is not None})

    def masks(self) -> list[tuple[Sample, np.ndarray]]:
        """The labeled and the validation masks, with their samples."""
        return [*self.labeled.cached_masks(), *self.val.cached_masks()]


def training_batches(
    data: Data, args, spec: DatasetSpec, device: torch.device, workers: int = 0
) -> Batches:
    """The batches of labeled and unlabeled images, augmented if the flags say so."""
    orientation = spec.orientation if args.augment else None
    return Batches(data.train, args.batch_size, device, workers, args.normalization, orientation)


def validation_batches(data: Data, args, device: torch.device, workers: int = 0) -> Batches:
    """The batches of validation images, in order."""
    return Batches(data.val, args.batch_size, device, workers, args.normalization)


def load_data(
    args, spec: DatasetSpec, expected_split: str | None = None, uses_unlabeled: bool = False
) -> Data:
    """load_split, then open_data."""
    return open_data(args, spec, load_split(args, spec, expected_split, uses_unlabeled))


def load_split(
    args, spec: DatasetSpec, expected_split: str | None = None, uses_unlabeled: bool = False
) -> Split:
    """Index --data-root and split it as the flags say.

    InputError if files are missing or too few (none unlabeled where the method uses them), or if
    the split does not have the expected hash (a checkpoint's).
    """
    rule = args.rule
    samples = index(spec, Path(args.data_root), rule.kind)
    split = rule.apply(samples, spec, args.seed)
    if uses_unlabeled and not split.unlabeled:
        found = f"{rule.flag} leaves no unlabeled image for --method {args.method}"
        raise InputError(f"{found}; add images without masks, or label fewer")
    if expected_split is not None:
        check_split(args, split, expected_split)
    utils.check_same(split.ids(), "the split's images")
    return split


def check_split(args, split: Split, expected: str) -> None:
    """InputError if a split does not have the hash of the run's."""
    if split.hash() == expected:
        return
    cause = f"--data-root {args.data_root}: contains other images or masks"
    if isinstance(args.rule, ByFile):
        cause = f"{args.rule.flag}: lists other images"
    advice = "give the run's split.json as --split"
    if args.training:
        advice = "give --name for another folder, or --overwrite to start over"
    raise InputError(f"{cause} than the run started with, which its split.json names; {advice}")


def open_data(args, spec: DatasetSpec, split: Split) -> Data:
    """Open the cache of a split's images; InputError names unusable files."""
    used = sorted(split.samples, key=lambda sample: sample.id)
    with utils.first_process_first():
        cache = open_cache(spec, used, tuple(args.size), Path(args.cache), args.workers)
    ignored_class = 0 if args.ignored == "background" else IGNORE
    return Data(
        split,
        Stored(cache, split.labeled, ignored_class),
        Stored(cache, split.unlabeled),
        Stored(cache, split.val),
    )
