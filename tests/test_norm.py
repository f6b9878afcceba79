"""Our instance norm: PyTorch's, except that a constant plane and its gradient are 0."""

import pytest
import torch
from torch import nn

from arch.generators import ResNetGenerator
from arch.norm import InstanceNorm2d, NormalizePlanes, normalize_planes_on_gpu

FORMS = [NormalizePlanes.apply, normalize_planes_on_gpu]
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 2), (3, 8, 16, 16), (2, 5, 33, 1)]


def values_and_gradients(norm, x, grad):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_pytorchs_norm(form, shape, dtype, offset):
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64, generator=random) + offset).to(dtype)
    grad = torch.randn(shape, dtype=dtype, generator=random)
    rounding = 16 * torch.finfo(dtype).eps * (1 + offset)
    expected = values_and_gradients(nn.InstanceNorm2d(shape[1]), x, grad)
    for own, reference in zip(values_and_gradients(form, x, grad), expected, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, reference, rtol=0, atol=rounding)


def test_statistics_of_bfloat16_are_float32():
    x = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 20).bfloat16()
    expected = nn.functional.instance_norm(x.double())
    torch.testing.assert_close(NormalizePlanes.apply(x).double(), expected, rtol=0, atol=2**-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_plane_and_its_gradient_are_exactly_0_and_others_are_not(form, dtype):
    random, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps
    level = torch.tensor([1e-6, 0.1, -3.0, 1e4, 0.0, 1e-3], dtype=dtype).view(1, 6, 1, 1)
    noise = eps * torch.randint(-2, 3, (2, 6, 9, 9), generator=random).to(dtype)
    x = level * (1 + noise)  # planes of one value each, up to rounding
    x[:, 5] += noise[:, 5]  # sums of terms as large as 1 that nearly cancel
    x[1, 3] = torch.randn(9, 9, dtype=dtype, generator=random)
    constant = torch.ones(2, 6, dtype=torch.bool)
    constant[1, 3] = False
    y, grad = values_and_gradients(form, x, torch.randn_like(x))
    for result in y, grad:
        largest = result.abs().amax((2, 3))
        assert largest[constant].eq(0).all()
        assert largest[~constant].gt(0.1).all()


def test_a_plane_of_small_contrast_is_not_taken_for_a_constant_one():
    plane = 1 + 2**-17 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert NormalizePlanes.apply(plane).std() > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_have_the_memory_layout_of_the_input(layout, dtype):
    x = torch.randn(2, 8, 6, 5, dtype=dtype).contiguous(memory_format=layout)
    y, grad = values_and_gradients(InstanceNorm2d(), x, torch.randn_like(x))
    assert y.is_contiguous(memory_format=layout)
    assert grad.is_contiguous(memory_format=layout)


def test_a_mask_of_one_class_gives_a_constant_image_and_no_large_gradient():
    torch.manual_seed(0)
    G_SI, x = ResNetGenerator(4, 1, ngf=8, n_blocks=3, tanh=True), torch.randn(2, 1, 32, 32)
    masks = torch.zeros(2, 4, 32, 32)
    masks[:, 2] = 1
    fake_x = G_SI(masks)
    assert fake_x.amax((2, 3)).equal(fake_x.amin((2, 3)))
    (fake_x - x).square().mean().backward()
    *others, last = [p for p in G_SI.parameters() if p.grad is not None and p.dim() == 4]
    assert all(parameter.grad.eq(0).all() for parameter in others)
    assert last.grad.eq(0).all()  # its input is 0; its bias learns
