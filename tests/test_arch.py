"""The networks of Section 3.3: sizes, first weights, and discriminators written out here."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from arch.discriminators import FCDiscriminator, PixelDiscriminator
from arch.generators import ResNetGenerator
from arch.norm import InstanceNorm2d


def tiny(n_blocks=1, **more):
    torch.manual_seed(0)
    return ResNetGenerator(3, 4, ngf=4, n_blocks=n_blocks, **more)


def with_random_parameters(network):
    """Large and none of them 0 or 1, so that each counts; float64."""
    torch.manual_seed(0)
    for parameter in network.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def image(height=16, width=20):
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=random)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: ResNetGenerator(3, 21), 11_434_645),
        (lambda: ResNetGenerator(21, 3, tanh=True), 11_434_627),
        (lambda: PixelDiscriminator(3), 8_832),
        (lambda: PixelDiscriminator(21), 9_984),
    ],
    ids=["G_IS", "G_SI", "D_I", "D_S"],
)
def test_parameter_counts_at_the_papers_width(build, count):
    assert sum(p.numel() for p in build().parameters()) == count


@pytest.mark.parametrize(
    "build",
    [
        lambda: ResNetGenerator(8, 21, ngf=16, n_blocks=1),
        lambda: PixelDiscriminator(8, 64, norm="instance"),
    ],
    ids=["generator", "discriminator"],
)
def test_first_weights_have_mean_0_and_deviation_002_and_biases_are_0(build):
    torch.manual_seed(0)
    for conv in build().modules():
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            n = conv.weight.numel()
            assert abs(conv.weight.mean()) < 5 * 0.02 / n**0.5  # five standard errors
            assert abs(conv.weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
            assert conv.bias.eq(0).all()


# Generators


def test_generator_refuses_under_16_pixels_and_names_the_size():
    for height, width in (15, 16), (16, 15):
        with pytest.raises(ValueError, match=f"{height}x{width}"):
            tiny()(image(height, width))


def test_dropout_exists_only_where_asked_for_once_a_residual_block():
    def rates(G):
        return [m.p for m in G.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]

    assert rates(tiny(n_blocks=3)) == []
    assert rates(tiny(n_blocks=3, dropout=0.25)) == [0.25] * 3


# Discriminators


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_discriminator_equals_section_3_3_written_out(norm, kernel):
    D, x = with_random_parameters(PixelDiscriminator(3, 4, norm, kernel)), image(5, 7)
    around = kernel // 2  # zeros
    if norm == "batch":  # no bias before the norm nor in the last convolution
        w1, b1, w2, gain, shift, w3 = D.parameters()
        b3 = None
        hidden = F.leaky_relu(F.conv2d(x, w1, b1, padding=around), 0.2)
        hidden = F.conv2d(hidden, w2, padding=around)
        hidden = F.batch_norm(hidden, None, None, gain, shift, training=True)
    else:
        w1, b1, w2, b2, w3, b3 = D.parameters()
        hidden = F.leaky_relu(F.conv2d(x, w1, b1, padding=around), 0.2)
        hidden = F.instance_norm(F.conv2d(hidden, w2, b2, padding=around))
    expected = F.conv2d(F.leaky_relu(hidden, 0.2), w3, b3, padding=around)
    torch.testing.assert_close(D(x), expected)


@pytest.mark.parametrize(
    ("settings", "named"), [({"norm": "layer"}, "'layer'"), ({"kernel": 2}, "kernel is 2")]
)
def test_discriminator_refuses_unknown_settings_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        PixelDiscriminator(3, **settings)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 70), (16, 20), (31, 40)])
def test_fully_convolutional_discriminator_equals_five_convolutions_up_sampled(height, width):
    D, x = with_random_parameters(FCDiscriminator(3, 2)), image(height, width)
    size = max(32, height), max(32, width)
    hidden = x.new_zeros(2, 3, *size)  # what is under 32 pixels is filled up with zeros
    hidden[:, :, :height, :width] = x
    weights = list(D.parameters())
    assert [w.shape[0] for w in weights[::2]] == [2, 4, 8, 16, 1]
    for i in range(0, 10, 2):
        hidden = F.conv2d(hidden, weights[i], weights[i + 1], stride=2, padding=1)
        hidden = F.leaky_relu(hidden, 0.2) if i < 8 else hidden
    expected = F.interpolate(hidden, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(D(x), expected[..., :height, :width])


@pytest.mark.parametrize(
    "build", [lambda: tiny(n_blocks=2), lambda: PixelDiscriminator(3, 4, "instance")]
)
def test_biases_that_instance_norm_cancels_are_kept_but_left_out(build):
    network, x = with_random_parameters(build()), image()
    modules = [*network.modules()]
    before_norm = zip(modules, modules[1:], strict=False)
    cancelled = [conv.bias for conv, norm in before_norm if isinstance(norm, InstanceNorm2d)]
    assert len(cancelled) > 0
    network(x).sum().backward()
    without_gradient = {p for p in network.parameters() if p.grad is None}
    assert without_gradient == {*cancelled}
