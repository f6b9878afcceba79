"""Masks as files: indexed PNGs and NIfTI volumes with the values of the training masks."""

import gzip
import io
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.files import depth_of, is_volume
from datasets.spec import DatasetSpec
from utils import IGNORE, write_atomically

IGNORE_COLOR = (224, 224, 192)  # as in VOC's own masks


def flat_palette(palette: tuple[tuple[int, int, int], ...]) -> list[int]:
    """256 RGB triples, flat: the colors of the classes, black, and last IGNORE's color."""
    colors = [*palette, *[(0, 0, 0)] * (255 - len(palette)), IGNORE_COLOR]
    return [value for color in colors for value in color]


def as_values(mask: Tensor, spec: DatasetSpec) -> np.ndarray:
    """A mask of class indices and IGNORE as the values of mask files: uint8, or int16 if needed."""
    values = spec.mask_values()
    table = np.full(256, spec.ignore, np.int16 if spec.beyond_png() else np.uint8)
    table[: len(values)] = values
    return table[mask.to("cpu", torch.uint8).numpy()]


def save_mask(path: Path, mask: Tensor, spec: DatasetSpec) -> None:
    """Write an (H, W) mask of class indices as an indexed PNG with the values of the mask files.

    If a PNG cannot hold these values, it keeps the class indices.
    """
    if spec.beyond_png():
        spec = replace(spec, label_ids=None, void_ids=(), ignore=IGNORE)
    image = Image.fromarray(as_values(mask, spec))
    colors = dict(zip(spec.mask_values(), spec.palette, strict=True)) | {spec.ignore: IGNORE_COLOR}
    image.putpalette([c for value in range(256) for c in colors.get(value, (0, 0, 0))])
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomically(path, content.getvalue())


def prediction_file(place: Path, source: Path) -> Path:
    """The file of a predicted mask: `place` and an extension."""
    return place.with_name(place.name + (".nii.gz" if is_volume(source) else ".png"))


def save_prediction(place: Path, source: Path, masks: Tensor, spec: DatasetSpec) -> None:
    """Write the masks of a volume as NIfTI with its header, of a picture as a PNG.

    masks: (T * Z, H, W), in the order of read_planes.
    """
    target = prediction_file(place, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_volume(source):
        save_mask(target, masks[0], spec)
        return
    volume = nibabel.load(source)
    header = volume.header.copy()
    frames = as_values(masks, spec).reshape(-1, depth_of(source), *masks.shape[1:])
    values = frames.transpose(3, 2, 1, 0)  # (X, Y, Z, T)
    values = values[..., 0] if len(frames) == 1 else values
    if len(frames) > 1:  # the fourth axis of (X, Y, Z, T), the fifth of (X, Y, Z, 1, T)
        duration = header.get_zooms()[int(np.argmax(volume.shape[3:])) + 3]
        header.set_data_shape(values.shape)
        header.set_zooms((*header.get_zooms()[:3], abs(duration)))
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's display range
    labels = volume.__class__(values, volume.affine, header)
    content = gzip.compress(labels.to_bytes(), compresslevel=1, mtime=0)
    write_atomically(target, content)
