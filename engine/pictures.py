"""Masks and images as colors: grids for TensorBoard and panels, overlays for predictions."""

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

from datasets.files import flat_palette
from utils import write_atomically

Palette = tuple[tuple[int, int, int], ...]


def colorize(mask: Tensor, palette: Palette) -> Tensor:
    """Masks (B, H, W) to colors (B, 3, H, W) in [0, 1]."""
    table = torch.tensor(flat_palette(palette), device=mask.device).view(256, 3) / 255
    return table[mask.long()].permute(0, 3, 1, 2)


def picture_grid(x: Tensor, columns: dict[str, Tensor], palette: Palette) -> Tensor:
    """Draw one row per image of x, with titled columns for x and each of `columns`.

    Columns are masks (B, H, W) or images (B, C, H, W); the minimum of x is shown black, its maximum
    white. Returns (3, height, width) in [0, 1].
    """
    darkest, brightest = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    span = torch.where(brightest > darkest, brightest - darkest, 1)

    def show(picture: Tensor) -> Tensor:
        if picture.dim() == 3:
            return colorize(picture, palette)
        return ((picture - darkest) / span).clamp(0, 1).expand(-1, 3, -1, -1)

    pictures = [show(picture).float().cpu() for picture in (x, *columns.values())]
    cells = torch.stack(pictures, 1).flatten(0, 1)  # row by row
    grid = make_grid(cells, nrow=len(pictures), padding=2, pad_value=1.0)
    width = x.shape[-1] + 2
    font = ImageFont.load_default(min(20, max(8, width // 8)))
    titles = Image.new("RGB", (grid.shape[-1], int(1.5 * font.size)), "white")
    for i, title in enumerate(("x", *columns)):
        ImageDraw.Draw(titles).text((2 + i * width, 0), title, "black", font)
    return torch.cat([pil_to_tensor(titles) / 255, grid], 1)


def shades(picture: Tensor) -> Tensor:
    """A picture (C, H, W) as (3, H, W) in [0, 1]: bytes by 255, floats by their own range."""
    low, high = (0, 255) if picture.dtype == torch.uint8 else (picture.min(), picture.max())
    return ((picture.float() - low) / ((high - low) or 1)).expand(3, -1, -1)


def save_overlay(path: Path, picture: Tensor, mask: Tensor, palette: Palette) -> None:
    """Write a picture (C, H, W) of any range with its half-transparent mask (H, W) on top.

    Pixels of the first class show the picture only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shown, mask = shades(picture.cpu()), mask.cpu()
    half = (shown + colorize(mask[None], palette)[0]) / 2
    save_picture(path, torch.where(mask > 0, half, shown))


def save_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1] as a PNG."""
    content = io.BytesIO()
    save_image(picture, content, format="png")
    write_atomically(path, content.getvalue())
