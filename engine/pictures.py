"""Masks and images as colors: grids for TensorBoard and panels, overlays for predictions."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from datasets.spec import DatasetSpec
from datasets.writers import flat_palette
from utils import IGNORE, write_atomically

SMALLEST = 128  # height and width in pixels below which a picture is enlarged
GAP = 4  # pixels between pictures
WORDS = {  # for the paper's symbols
    "x": "image",
    "y": "truth",
    "G_IS(x)": "prediction",
    "G_SI(y)": "generated image",
    "G_SI(G_IS(x))": "reconstructed image",
    "G_IS(G_SI(y))": "reconstructed mask",
}


def colorize(mask: Tensor, palette: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Masks (B, H, W) to colors (B, 3, H, W) in [0, 1]."""
    table = torch.tensor(flat_palette(palette), device=mask.device).view(256, 3) / 255
    return table[mask.long()].permute(0, 3, 1, 2)


def legend(masks: Tensor, spec: DatasetSpec) -> list[tuple[str, tuple[int, int, int]]]:
    """The name and the color of each class in the masks, "ignored" for IGNORE."""
    classes = masks.unique().tolist()
    names = ["ignored" if k == IGNORE else spec.classes[k] for k in classes]
    colors = np.array(flat_palette(spec.palette)).reshape(256, 3)[classes].tolist()
    return [*zip(names, map(tuple, colors), strict=True)]


def limits(image: Tensor) -> tuple[Tensor, Tensor]:
    """The values of an image (C, H, W) to show black and white, each (C, 1, 1).

    Gray: percentiles 1 and 99, because a few bright pixels make a scan dark. Color: each channel's
    darkest and brightest.
    """
    values = image.flatten(1).float()
    low, high = values.amin(1), values.amax(1)
    if len(values) == 1:
        window = torch.tensor(np.percentile(values.numpy(), (1, 99)), dtype=torch.float32)
        low, high = window.split(1) if window[0] < window[1] else (low, high)
    return low.view(-1, 1, 1), high.view(-1, 1, 1)


def stretch(image: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Images (..., C, H, W) as (..., 3, H, W) in [0, 1]: `low` and less is 0, `high` and more 1."""
    span = torch.where(high > low, high - low, 1)
    scaled = ((image.float() - low) / span).clamp(0, 1)
    return scaled.expand(*image.shape[:-3], 3, -1, -1)


def shades(image: Tensor) -> Tensor:
    """Map an image (C, H, W), as read, to (3, H, W) in [0, 1]; the color balance is kept."""
    if len(image) == 3 and image.dtype == torch.uint8:
        return image / 255
    low, high = limits(image)
    return stretch(image, low.min(), high.max())


def enlarge(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) at least SMALLEST high and wide; each pixel becomes a square."""
    zoom = math.ceil(SMALLEST / min(pictures.shape[-2:]))
    return pictures.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)


def font_for(width: int) -> ImageFont.FreeTypeFont:
    """The font for text at pictures of this width."""
    return ImageFont.load_default(min(32, max(12, width // 12)))


def with_legend(picture: Tensor, masks: Tensor, spec: DatasetSpec, font) -> Tensor:
    """A picture (3, H, W) above the legend of the masks; widened if a name needs more space."""
    line, width = int(1.5 * font.size), picture.shape[-1]
    places, left, top = [], GAP, 0
    for name, color in legend(masks, spec):
        length = math.ceil(font.getlength(name)) + 2 * line  # with its color and a space
        if left > GAP and left + length > picture.shape[-1]:
            left, top = GAP, top + line
        places.append((left, top, name, color))
        left += length
        width = max(width, left)
    text = Image.new("RGB", (width, top + line + GAP), "white")
    draw = ImageDraw.Draw(text)
    for left, top, name, color in places:
        middle, half = top + line // 2 + GAP // 2, font.size // 2
        draw.rectangle((left, middle - half, left + 2 * half, middle + half), color, "gray")
        draw.text((left + line, middle), name, "black", font, anchor="lm")
    picture = F.pad(picture, (0, width - picture.shape[-1]), value=1.0)
    return torch.cat([picture, from_image(text)], 1)


def from_image(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def picture_grid(x: Tensor, columns: dict[str, Tensor], spec: DatasetSpec) -> Tensor:
    """Draw one row per image of x, with titled columns for x and each of `columns`, and a legend.

    Columns are masks (B, H, W) or images (B, C, H, W), shown with the contrast of x. Returns
    (3, height, width) in [0, 1].
    """
    columns = {title: column.cpu() for title, column in {"x": x, **columns}.items()}
    low, high = map(torch.stack, zip(*map(limits, columns["x"]), strict=True))
    pictures, masks = [], []
    for column in columns.values():
        if column.dim() == 3:
            masks.append(column.flatten().long())
            pictures.append(colorize(column, spec.palette))
        else:
            pictures.append(stretch(column, low, high))
    cells = enlarge(torch.stack(pictures, 1).flatten(0, 1))  # row by row
    font = font_for(cells.shape[-1])
    titles = [f"{WORDS.get(title, '')}\n{title}".strip() for title in columns]
    lengths = [font.getlength(line) for title in titles for line in title.split("\n")]
    width = max(cells.shape[-1], math.ceil(max(lengths)))
    cells = F.pad(cells, (0, width - cells.shape[-1]), value=1.0)
    cells = F.pad(cells, (0, GAP, 0, GAP), value=1.0).unflatten(0, (-1, len(pictures)))
    grid = cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    grid = F.pad(grid, (GAP, 0, GAP, 0), value=1.0)
    head = Image.new("RGB", (grid.shape[-1], int(2.6 * font.size) + GAP), "white")
    for i, title in enumerate(titles):
        place = GAP + i * (width + GAP), GAP
        ImageDraw.Draw(head).text(place, title, "black", font, spacing=GAP // 2)
    grid = torch.cat([from_image(head), grid], 1)
    return with_legend(grid, torch.cat(masks), spec, font)


def save_overlay(path: Path, picture: Tensor, mask: Tensor, spec: DatasetSpec) -> None:
    """Write a picture (C, H, W) of any range with its half-transparent mask (H, W) on top.

    Pixels of the first class show the picture only. Below is a legend.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    gray, mask = shades(picture.cpu()), mask.cpu()
    mixed = torch.where(mask > 0, (gray + colorize(mask[None], spec.palette)[0]) / 2, gray)
    mixed = enlarge(mixed[None])[0]
    save_picture(path, with_legend(mixed, mask[mask > 0], spec, font_for(mixed.shape[-1])))


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1] as a PNG."""
    content = io.BytesIO()
    values = (255 * picture + 0.5).clamp(0, 255).byte()
    Image.fromarray(values.permute(1, 2, 0).cpu().numpy()).save(content, "PNG")
    write_atomically(path, content.getvalue())
