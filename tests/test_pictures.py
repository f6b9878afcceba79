"""Masks as colors, picture grids and overlays against known pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pictures import colorize, picture_grid, save_overlay
from utils import IGNORE

PALETTE = ((0, 0, 0), (70, 130, 180), (240, 200, 80), (200, 60, 60))


def test_colorize_gives_each_pixel_its_class_color():
    colors = colorize(torch.tensor([[[0, 1], [2, IGNORE]]] * 2), PALETTE)
    assert colors.shape == (2, 3, 2, 2)
    expected = torch.tensor([[0, 0, 0], [70, 130, 180], [240, 200, 80], [224, 224, 192]]) / 255
    torch.testing.assert_close(colors[1].flatten(1).T, expected)


def test_picture_grid_has_one_row_per_image_and_one_column_per_picture():
    # two gray 4x6 images, their masks and reconstructions, each with 2 white pixels around it
    x = torch.stack([torch.full((1, 4, 6), -0.25), torch.zeros(1, 4, 6)])
    x[0, 0, 3, 5] = 0.75
    mask = torch.zeros(2, 4, 6, dtype=torch.int64)
    mask[1, 0, 0] = 2
    grid = picture_grid(x, {"y": mask, "rec": x + 0.5}, PALETTE)
    assert (grid.shape[0], grid.shape[2]) == (3, 3 * (6 + 2) + 2)
    grid = grid[:, -(2 * (4 + 2) + 2) :]  # below the titles
    assert grid[:, 2 + 3, 2 + 5].tolist() == [1, 1, 1]  # the image's brightest pixel
    assert grid[:, 2, 2].tolist() == [0, 0, 0]  # and its darkest
    assert grid[:, 8, 2].tolist() == [0, 0, 0]  # the second image's, by its own scale
    # second row, second column
    torch.testing.assert_close(grid[:, 8, 10], torch.tensor([240, 200, 80]) / 255)
    assert grid[:, 8, 11].tolist() == [0, 0, 0]
    assert grid[:, 2, 18].tolist() == [0.5, 0.5, 0.5]  # -0.25 + 0.5, on the image's scale
    assert grid[:, 5, 23].tolist() == [1, 1, 1]  # 1.25: clamped
    assert grid[:, 0].min() == 1


def test_each_column_of_a_picture_grid_has_its_title():
    x = torch.zeros(1, 1, 50, 90)
    titles = picture_grid(x, {"y": x, "": x, "rec": x}, PALETTE)[:, : -(50 + 4)]
    dark = [bool((titles[:, :, left : left + 92] < 0.5).any()) for left in range(0, 4 * 92, 92)]
    assert dark == [True, True, False, True]


def test_picture_grid_shows_each_color_channel_from_its_darkest_to_its_brightest():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1] = torch.tensor([[-0.2, 0.3], [0.8, 0]])  # the paper's normalization: a range of 1
    x[0, 2] = torch.tensor([[-1, 1], [0, 0]])  # the released code's: up to 2
    grid = picture_grid(x, {"same": x}, PALETTE)[:, -(2 + 4) :]
    torch.testing.assert_close(grid[:, 2, 3], torch.tensor([0, 0.5, 1]))
    torch.testing.assert_close(grid[:, 3, 2], torch.tensor([0, 1, 0.5]))


@pytest.mark.parametrize(
    ("picture", "gray"),
    [
        (torch.tensor([[[0, 100], [200, 40]]], dtype=torch.uint8), [0, 100, 200, 40]),
        (torch.tensor([[[-3.0, -1], [7, 2]]]), [0, 51, 255, 127.5]),  # darkest to brightest
        (torch.zeros(1, 2, 2), [0, 0, 0, 0]),
        (torch.full((1, 2, 2), 100.0), [0, 0, 0, 0]),
    ],
)
def test_overlay_mixes_picture_and_colors_but_for_the_first_class(tmp_path, picture, gray):
    path = tmp_path / "new" / "a.png"
    save_overlay(path, picture, torch.tensor([[0, 1], [2, 0]]), PALETTE)
    pixels = np.array(Image.open(path)).reshape(4, 3).astype(float)
    expected = [[value] * 3 for value in gray]
    for i, label in (1, 1), (2, 2):
        expected[i] = (np.array(expected[i]) + PALETTE[label]) / 2
    assert np.abs(pixels - expected).max() <= 1


def test_overlay_of_a_color_picture_keeps_its_colors(tmp_path):
    picture = torch.randint(256, (3, 4, 5), dtype=torch.uint8)
    save_overlay(tmp_path / "a.png", picture, torch.zeros(4, 5, dtype=torch.int64), PALETTE)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), picture.permute(1, 2, 0))
