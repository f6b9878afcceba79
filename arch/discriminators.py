"""Discriminators with one output per pixel: those of Section 3.3 and of Hung et al."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from arch.generators import NormedConv2d, init_weights
from arch.norm import InstanceNorm2d


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; gradients are summed likewise."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, grad)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes together, on GPUs and CPUs alike.

    One all-reduce of count, sum and sum of squares, through which gradients pass; with one process,
    PyTorch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        v = x if x.dtype == torch.float64 else x.float()
        count = v.new_full((1,), v.numel() / self.num_features)
        own = torch.cat([count, v.sum((0, 2, 3)), v.square().sum((0, 2, 3))])
        n, total, squares = SumOverProcesses.apply(own).split([1, *2 * [self.num_features]])
        mean = total / n
        var = (squares / n - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = (var * n / (n - 1)).to(self.running_var.dtype)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (v * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


class PixelDiscriminator(nn.Module):
    """(B, C, H, W) to (B, 1, H, W), unbounded (least squares, [19]).

    Three convolutions of width ndf, 2 ndf and 1. Leaky ReLU of slope 0.2 follows the first two;
    norm follows the second convolution: "batch" (the paper) or "instance" (the released code, which
    then gives the last two convolutions a bias). The paper does not state the widths, whether a
    leaky ReLU follows the last convolution, or the (odd) `kernel`: 1 is the released code's; with
    3, each score depends on 7x7 pixels, with zero padding.
    ValueError for another norm or an even kernel.
    """

    def __init__(self, in_channels: int, ndf: int = 64, norm: str = "batch", kernel: int = 1):
        super().__init__()
        if norm not in ("batch", "instance"):
            raise ValueError(f"norm is {norm!r}: expected 'batch' or 'instance'")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}: expected an odd number")
        if norm == "batch":
            second = nn.Conv2d(ndf, 2 * ndf, kernel, padding="same", bias=False)
            normed = [second, BatchNorm2d(2 * ndf)]
        else:
            second = NormedConv2d(ndf, 2 * ndf, kernel, padding="same")
            normed = [second, InstanceNorm2d()]
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, ndf, kernel, padding="same"),
            nn.LeakyReLU(0.2),
            *normed,
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 1, kernel, padding="same", bias=norm == "instance"),
        )
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # so few channels are faster channels last
            x = x.contiguous(memory_format=torch.channels_last)
        return self.layers(x)


class FCDiscriminator(nn.Module):
    """(B, C, H, W) to logits (B, 1, H, W): Hung et al.'s five 4x4 convolutions of stride 2.

    Widths ndf, 2 ndf, 4 ndf, 8 ndf and 1; leaky ReLU of slope 0.2 between them, no norm, PyTorch's
    default initialization; then bilinear up-sampling with aligned corners, as in their code. Sides
    under 32 are padded with zeros.
    """

    def __init__(self, in_channels: int, ndf: int = 64):
        super().__init__()
        widths = [in_channels, ndf, 2 * ndf, 4 * ndf, 8 * ndf]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, 32 - width), 0, max(0, 32 - height)))
        logits = self.layers(x)  # (B, 1, H // 32, W // 32)
        logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=True)
        return logits[..., :height, :width]
