"""The generator of Section 3.3: the residual network of Johnson et al. [14], for G_IS and G_SI.

Shapes: B images, C_in and C_out channels, H x W pixels. What the paper leaves open follows the
released code: reflection padding for the 7x7 convolutions and inside the residual blocks, zero
padding elsewhere, instance norm without parameters, a bias on every convolution, weights from
N(0, 0.02).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arch.norm import InstanceNorm2d

MIN_SIZE = 16  # pixels; below, reflection padding and instance norm have too few left


def init_weights(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 0.02) and zero its bias; for `nn.Module.apply`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class NormedConv2d(nn.Conv2d):
    """A convolution before instance norm, which cancels its bias.

    The bias stays a parameter, as in the released code, but is left out and never trained.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)


class NormedConvTranspose2d(nn.ConvTranspose2d):
    """As NormedConv2d, for a fractionally-strided convolution."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.stride, self.padding, self.output_padding
        return F.conv_transpose2d(x, self.weight, None, *sizes)


class ResidualBlock(nn.Module):
    """x + conv(conv(x)), each 3x3 with instance norm; (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            NormedConv2d(channels, channels, 3),
            InstanceNorm2d(),
            nn.ReLU(),
            *([nn.Dropout(dropout)] if dropout else []),
            nn.ReflectionPad2d(1),
            NormedConv2d(channels, channels, 3),
            InstanceNorm2d(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNetGenerator(nn.Module):
    """(B, C_in, H, W) to (B, C_out, H, W), for any H, W >= 16; ValueError if smaller.

    Returns logits (G_IS: the softmax belongs to the losses), or with `tanh` values in [-1, 1]
    (G_SI). Sides that 4 does not divide are padded by reflection on the right and below, and the
    output is cropped. `dropout` is the released code's; the paper has none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ngf: int = 64,
        n_blocks: int = 9,
        dropout: float = 0.0,
        tanh: bool = False,
    ):
        super().__init__()
        down = {"stride": 2, "padding": 1}
        up = {"stride": 2, "padding": 1, "output_padding": 1}

        def block(conv: nn.Module) -> list[nn.Module]:
            # not in place: instance norm's backward pass needs its output
            return [conv, InstanceNorm2d(), nn.ReLU()]

        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3),
            *block(NormedConv2d(in_channels, ngf, 7)),
            *block(NormedConv2d(ngf, 2 * ngf, 3, **down)),
            *block(NormedConv2d(2 * ngf, 4 * ngf, 3, **down)),
            *[ResidualBlock(4 * ngf, dropout) for _ in range(n_blocks)],
            *block(NormedConvTranspose2d(4 * ngf, 2 * ngf, 3, **up)),
            *block(NormedConvTranspose2d(2 * ngf, ngf, 3, **up)),
            nn.ReflectionPad2d(3),
            nn.Conv2d(ngf, out_channels, 7),
            *([nn.Tanh()] if tanh else []),
        )
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if min(height, width) < MIN_SIZE:
            least = f"the generator needs {MIN_SIZE}x{MIN_SIZE} pixels or more"
            raise ValueError(f"images are {height}x{width}: {least}")
        if x.device.type == "cpu":  # its convolutions' backward passes are faster channels last
            x = x.contiguous(memory_format=torch.channels_last)
        below, right = -height % 4, -width % 4
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="reflect")
        return self.layers(x)[..., :height, :width]
