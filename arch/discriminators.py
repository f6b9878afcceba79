"""The pixel-wise discriminators of Section 3.3: the output has the size of the input, one judgement a pixel."""

from torch import Tensor, nn

from arch.generators import init_weights


class PixelDiscriminator(nn.Module):
    """(B, C, H, W) to (B, 1, H, W): three 1x1 convolutions of width ndf, 2 ndf and 1, unbounded (least squares, [19]).

    Leaky ReLU of slope 0.2 follows the first two; norm follows the second convolution: "batch" (the paper) or
    "instance" (the released code, which then gives the last two convolutions a bias).
    """

    def __init__(self, in_channels: int, ndf: int = 64, norm: str = "batch"):
        super().__init__()
        norms = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
        if norm not in norms:
            raise ValueError(f"norm is {norm!r}: expected one of {sorted(norms)}")
        bias = norm == "instance"
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, ndf, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            norms[norm](2 * ndf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
