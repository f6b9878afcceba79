"""Discriminators, whose output has the size of their input: the pixel-wise ones of Section 3.3, and Hung et al.'s."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arch.generators import init_weights


class PixelDiscriminator(nn.Module):
    """(B, C, H, W) to (B, 1, H, W): three convolutions of width ndf, 2 ndf and 1, unbounded (least squares, [19]).

    Leaky ReLU of slope 0.2 follows the first two; norm follows the second convolution: "batch" (the paper) or
    "instance" (the released code, which then gives the last two convolutions a bias). The paper does not name the
    odd `kernel`: 1 is the released code's; with 3 a judgement sees a neighborhood of 7x7 pixels, zeros around it.
    """

    def __init__(self, in_channels: int, ndf: int = 64, norm: str = "batch", kernel: int = 1):
        super().__init__()
        norms = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
        if norm not in norms:
            raise ValueError(f"norm is {norm!r}: expected one of {sorted(norms)}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}: expected an odd number")
        bias = norm == "instance"
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, ndf, kernel, padding="same"),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, 2 * ndf, kernel, padding="same", bias=bias),
            norms[norm](2 * ndf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * ndf, 1, kernel, padding="same", bias=bias),
        )
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # where so few channels are faster channels last; the judgements are the same
            x = x.contiguous(memory_format=torch.channels_last)
        return self.layers(x)


class FCDiscriminator(nn.Module):
    """(B, C, H, W) to logits (B, 1, H, W): Hung et al.'s five 4x4 convolutions of stride 2, and then up-sampling.

    Widths ndf, 2 ndf, 4 ndf, 8 ndf and 1; leaky ReLU of slope 0.2 between them, no norm, PyTorch's own first weights.
    Sides under 32 are padded with zeros, as their ignored pixels are; corners are aligned, as in their code.
    """

    def __init__(self, in_channels: int, ndf: int = 64):
        super().__init__()
        widths = [in_channels, ndf, 2 * ndf, 4 * ndf, 8 * ndf]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, 32 - width), 0, max(0, 32 - height)))
        logits = self.layers(x)  # (B, 1, H // 32, W // 32)
        return F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=True)[..., :height, :width]
