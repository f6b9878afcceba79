"""Instance norm (Section 3.3) that maps a constant plane to 0 instead of amplifying its rounding.

Shapes: B images, C channels, H x W pixels; a plane is one channel of one image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5  # added to variances, as in PyTorch's norm


def varies(mean: Tensor, var: Tensor) -> Tensor:
    """Whether a plane's variance is more than rounding; (B, C, 1, 1) bool.

    The threshold is the rounding error of a convolution's sum, whose terms may be larger than the
    result: 8 epsilon times |mean|, or times 1 (the assumed size of a term) if that is larger.
    """
    rounding = 8 * torch.finfo(mean.dtype).eps  # 2^-20 in float32
    return var > (rounding * mean.abs().clamp(min=1)).square()


class NormalizePlanes(torch.autograd.Function):
    """y = scale (x - mean), with scale = 1 / sqrt(var + EPS), or 0 for a constant plane."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        v = x if x.dtype == torch.float64 else x.float()
        mean = v.mean((2, 3), keepdim=True)
        y = v - mean
        var = y.square().mean((2, 3), keepdim=True)
        scale = torch.where(varies(mean, var), (var + EPS).rsqrt(), 0)
        y = y.mul_(scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        g, v = grad.to(scale.dtype), y.to(scale.dtype)
        along = (g * v).mean((2, 3), keepdim=True)
        result = torch.addcmul(g, v, along, value=-1)
        return result.sub_(g.mean((2, 3), keepdim=True)).mul_(scale).to(grad.dtype)


def normalize_planes_on_gpu(x: Tensor) -> Tensor:
    """NormalizePlanes with PyTorch's fused kernels: a third of the operations outside of compile.

    Batch norm over B C channels of one image, whose weights are 0 for constant planes.
    """
    planes = x.reshape(1, -1, *x.shape[2:])
    with torch.no_grad():
        wide = planes.dtype if planes.dtype == torch.float64 else torch.float32
        var, mean = torch.var_mean(planes.to(wide), (0, 2, 3), correction=0)
        weight = varies(mean, var).to(wide)
    y = F.batch_norm(planes, None, None, weight, training=True, eps=EPS)
    return y.view(x.shape)


class InstanceNorm2d(nn.Module):
    """(B, C, H, W) to the same shape, without parameters; on a CPU, also to the same memory layout.

    Statistics are float32, or float64 for float64. nn.InstanceNorm2d divides the rounding error of
    a constant plane, and its gradient, by sqrt(EPS) in every layer: a mask of one class makes every
    plane of G_SI constant. Here the output and the gradient of such a plane are exactly 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not torch.compiler.is_compiling():
            return normalize_planes_on_gpu(x)
        return NormalizePlanes.apply(x)
