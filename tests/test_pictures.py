"""Masks as colors, picture grids and overlays against known pixels."""

import numpy as np
import pytest
import torch
from conftest import toy_spec
from PIL import Image

from engine.pictures import WORDS, font_for, legend, picture_grid, save_overlay, shades
from utils import IGNORE

PALETTE = ((0, 0, 0), (70, 130, 180), (240, 200, 80), (200, 60, 60))
SPEC = toy_spec(classes=["background", "wall", "muscle", "blood"], palette=[*map(list, PALETTE)])
IGNORED = (224, 224, 192)


def top_of(grid: torch.Tensor, width: int) -> int:
    """The first line of a grid's pictures: of y, in columns of this width, without white pixels."""
    y = grid[:, :, width + 8 : width + 8 + 128]
    return int((y < 1).any(0).all(1).nonzero().min())


def cell(grid: torch.Tensor, row: int, column: int, height: int, width: int) -> torch.Tensor:
    """A picture of a grid whose pictures have this size."""
    top, left = top_of(grid, width) + row * (height + 4), 4 + column * (width + 4)
    return grid[:, top : top + height, left : left + width]


def holds(picture: torch.Tensor, color: tuple[int, int, int]) -> bool:
    """Whether some pixel of a picture (3, H, W) in [0, 1] has this color."""
    return bool(((255 * picture).round() == torch.tensor(color).view(3, 1, 1)).all(0).any())


def test_picture_grid_has_one_row_per_image_and_one_column_per_picture_of_squares():
    # two gray 5x6 images, their masks and reconstructions, enlarged 26 times: at least 128 high
    x = torch.stack([torch.full((1, 5, 6), -0.25), torch.zeros(1, 5, 6)])
    x[0, 0, :2] = 0.75  # on the upper part of the first
    mask = torch.zeros(2, 5, 6, dtype=torch.int64)
    mask[1, 0, 0] = 2
    grid = picture_grid(x, {"y": mask, "rec": x + 0.5}, SPEC)
    assert (grid.shape[0], grid.shape[2]) == (3, 3 * (156 + 4) + 4)
    colors = torch.tensor(PALETTE)[mask].permute(0, 3, 1, 2) / 255
    squares = colors.repeat_interleave(26, -1).repeat_interleave(26, -2)
    for i in range(2):
        torch.testing.assert_close(cell(grid, i, 1, 130, 156), squares[i])
    first, second, rec = (cell(grid, i, j, 130, 156) for i, j in ((0, 0), (1, 0), (0, 2)))
    assert first[:, :52].min() == 1  # the image's brightest pixels
    assert first[:, 52:].max() == 0  # and its darkest
    assert second.max() == 0  # by its own scale
    assert rec[:, :52].min() == 1  # 1.25 on the image's scale: clamped
    assert (rec[:, 52:] == 0.5).all()  # 0.25


@pytest.mark.parametrize("width", [128, 130, 200, 256, 500, 2000])
def test_the_words_and_the_symbol_of_each_title_fit_into_the_width_of_a_picture(width):
    font = font_for(width)
    assert max(font.getlength(text) for title in WORDS.items() for text in title) <= width
    assert font.size >= 12


def test_each_column_of_a_picture_grid_has_its_title_which_is_never_cut_off():
    x, mask = torch.zeros(1, 1, 128, 128), torch.zeros(1, 128, 128, dtype=torch.int64)
    name = "the teacher's prediction for a turned image"
    grid, size = picture_grid(x, {"y": mask, "": x, name: x, "G_IS(x)": mask}, SPEC), 12
    width = (grid.shape[-1] - 4) // 5
    assert width >= font_for(128).getlength(name) > 132
    dark = (grid[:, : top_of(grid, width - 4) - 4] < 0.5).any(0)
    assert not dark[-1].any()  # the lowest letters are whole
    titles = dark[:, 4:].split(width, 1)
    lines = [title.any(1).nonzero().flatten().tolist() or [0] for title in titles]
    heights = [line[-1] - line[0] for line in lines]
    assert (heights[2], heights[3] < 1.5 * size) == (0, True)
    assert min(heights[0], heights[1], heights[4]) > 1.75 * size  # words and symbol
    assert titles[3].any(0).nonzero().max() > 200  # to the last letters
    assert not titles[3][:, -1].any()


def test_a_legend_names_the_colors_that_occur_and_ignored_pixels():
    mask = torch.zeros(1, 128, 128, dtype=torch.int64)
    prediction = mask.clone()
    mask[0, 0, :9] = IGNORE
    prediction[0, 5] = 2
    found = [("background", PALETTE[0]), ("muscle", PALETTE[2]), ("ignored", IGNORED)]
    assert legend(torch.cat([mask, prediction]), SPEC) == found
    grid = picture_grid(torch.zeros(1, 1, 128, 128), {"y": mask, "G_IS(x)": prediction}, SPEC)
    drawn = grid[:, top_of(grid, 128) + 128 + 4 :]
    colors = [*PALETTE, IGNORED]
    assert [holds(drawn, color) for color in colors] == [True, False, True, False, True]


def test_a_legend_wraps_and_makes_room_for_a_long_name():
    names = [f"class {k} with a name much longer than that" for k in range(4)]
    spec = toy_spec(classes=names, palette=[*map(list, PALETTE)])
    x, mask = torch.zeros(1, 1, 128, 128), torch.arange(4).repeat(1, 128, 32)
    grid = picture_grid(x, {"y": mask}, spec)
    drawn = grid[:, top_of(grid, 128) + 128 + 4 :]
    assert drawn.shape[-2] >= 4 * font_for(128).size
    assert drawn.shape[-1] > 2 * 132 + 4
    assert drawn[:, :, -1].min() == 1
    assert (drawn.flip(-1) < 0.5).any(0).any(0).nonzero().min() < 30  # to the last letters


def test_picture_grid_shows_each_color_channel_from_its_darkest_to_its_brightest():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1] = torch.tensor([[-0.2, 0.3], [0.8, 0]])  # the paper's normalization: a range of 1
    x[0, 2] = torch.tensor([[-1, 1], [0, 0]])  # the released code's: up to 2
    grid = picture_grid(x, {"y": torch.zeros(1, 2, 2, dtype=torch.int64)}, SPEC)
    picture = cell(grid, 0, 0, 128, 128)[:, ::64, ::64]
    torch.testing.assert_close(picture[:, 0, 1], torch.tensor([0, 0.5, 1]))
    torch.testing.assert_close(picture[:, 1, 0], torch.tensor([0, 1, 0.5]))


def test_a_few_bright_pixels_do_not_make_a_gray_image_dark():
    image = torch.arange(200).repeat(200, 1)[None] // 2
    image[0, 0, :50] = 255
    low, high = np.percentile(image.numpy(), (1, 99))  # 1 and 98 or so
    expected = ((image - low) / (high - low)).clamp(0, 1).expand(3, -1, -1)
    torch.testing.assert_close(shades(image.to(torch.uint8)), expected.float())


def test_a_gray_image_with_less_than_one_percent_of_bright_pixels_still_shows_them():
    image = torch.zeros(1, 100, 100)
    image[0, 7, 7:9] = torch.tensor([3.0, 1.5])
    assert torch.equal(shades(image), (image / 3).expand(3, -1, -1))
    assert not shades(torch.full((1, 2, 2), 100.0)).any()  # without any contrast: black


def test_a_deep_color_image_keeps_its_colors():
    image = torch.tensor([100.0, 300, 500]).view(3, 1, 1) + torch.tensor([[0, 500]])
    torch.testing.assert_close(shades(image), (image - 100) / 900)


# Overlays


def overlay(folder, picture: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    path = folder / "new" / "a.png"
    save_overlay(path, picture, mask, SPEC)
    return np.array(Image.open(path))


def test_overlay_mixes_picture_and_colors_but_for_the_first_class(tmp_path):
    picture = torch.tensor([[[0, 100], [200, 40]]], dtype=torch.uint8)
    pixels = overlay(tmp_path, picture, torch.tensor([[0, 1], [2, 0]]))[:128:64, :128:64]
    mixed = [(gray + np.array(PALETTE[k])) / 2 for k, gray in {1: 128, 2: 255}.items()]
    expected = [np.zeros(3), *mixed, np.full(3, 50)]
    assert np.abs(pixels.reshape(4, 3) - expected).max() <= 4  # percentiles


def test_overlay_of_a_color_picture_keeps_its_colors(tmp_path):
    picture = torch.randint(10, 200, (3, 128, 130), dtype=torch.uint8)
    pixels = overlay(tmp_path, picture, torch.zeros(128, 130, dtype=torch.int64))
    assert np.array_equal(pixels[:128, :130], picture.permute(1, 2, 0))


def test_the_legend_of_an_overlay_has_the_classes_drawn_and_its_height_does_not_depend_on_them(
    tmp_path,
):
    picture, mask = torch.zeros(1, 200, 300), torch.zeros(200, 300, dtype=torch.uint8)
    empty = overlay(tmp_path, picture, mask)
    assert (empty[200:] == 255).all()
    mask[:9] = 3
    one = overlay(tmp_path, picture, mask)
    assert one.shape == empty.shape
    drawn = torch.from_numpy(one[200:]).permute(2, 0, 1) / 255
    assert [holds(drawn, color) for color in PALETTE[1:]] == [False, False, True]
