"""The networks of Section 3.3: sizes, first weights, shapes, and the formulas written out here."""

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


def mirror(x, before, after_y, after_x):
    """Reflection as an index: -1 is pixel 1, `size` is pixel size - 2; no border is repeated."""

    def index(size, after):
        return [abs(i) if i < size else 2 * (size - 1) - i for i in range(-before, size + after)]

    return x[..., index(x.shape[-2], after_y), :][..., index(x.shape[-1], after_x)]


def normalize(x, over):
    mean = x.mean(over, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(over, keepdim=True) + 1e-5).sqrt()


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def generator_by_hand(parameters, x, n_blocks):
    """Section 3.3: reflection for 7x7 and residual convolutions, zeros for stride 2, norm."""
    take = iter(parameters)

    def conv(x, **options):
        return F.conv2d(x, next(take), next(take), **options)

    def norm(x):
        return normalize(x, over=(2, 3))

    x = norm(conv(mirror(x, 3, 3, 3))).relu()
    for _ in range(2):
        x = norm(conv(x, stride=2, padding=1)).relu()
    for _ in range(n_blocks):
        inner = norm(conv(mirror(x, 1, 1, 1))).relu()
        x = x + norm(conv(mirror(inner, 1, 1, 1)))
    for _ in range(2):
        weight, bias = next(take), next(take)
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)
        x = norm(x).relu()
    return conv(mirror(x, 3, 3, 3))


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: ResNetGenerator(3, 21), 11_434_645),
        (lambda: ResNetGenerator(21, 3, tanh=True), 11_434_627),
        (lambda: PixelDiscriminator(3), 8_832),
        (lambda: PixelDiscriminator(21), 9_984),
        (lambda: PixelDiscriminator(21, kernel=3), 9 * (21 * 64 + 64 * 128 + 128) + 64 + 2 * 128),
        (lambda: PixelDiscriminator(3, norm="instance"), 3 * 64 + 64 + 64 * 128 + 128 + 128 + 1),
        (
            lambda: FCDiscriminator(21),
            16 * (21 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 128 + 256 + 512 + 1,
        ),
    ],
    ids=["G_IS", "G_SI", "D_I", "D_S", "D_S, kernel 3", "D_I, instance norm", "Hung et al.'s D"],
)
def test_parameter_counts_at_the_papers_width(build, count):
    assert sum(p.numel() for p in build().parameters()) == count


@pytest.mark.parametrize(
    "build",
    [
        lambda: ResNetGenerator(8, 21, ngf=16, n_blocks=1),
        lambda: PixelDiscriminator(8, 64, norm="instance"),
        lambda: PixelDiscriminator(8, 64, norm="instance", kernel=3),
    ],
    ids=["generator", "discriminator", "discriminator, kernel 3"],
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


@pytest.mark.parametrize(
    ("n_blocks", "height", "width", "below", "right"),
    [(0, 16, 20, 0, 0), (2, 16, 16, 0, 0), (1, 17, 20, 3, 0), (1, 18, 31, 2, 1), (1, 21, 18, 3, 2)],
)
def test_generator_equals_section_3_3_written_out_padded_by_reflection_right_and_below(
    n_blocks, height, width, below, right
):
    G, x = with_random_parameters(tiny(n_blocks)), image(height, width)
    expected = generator_by_hand(G.parameters(), mirror(x, 0, below, right), n_blocks)
    expected = expected[..., :height, :width]
    torch.testing.assert_close(G(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(G.eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_tanh_generator_is_tanh_of_the_logits():
    logits, G_SI = with_random_parameters(tiny()), tiny(tanh=True).double()
    G_SI.load_state_dict(logits.state_dict())
    torch.testing.assert_close(G_SI(image()), logits(image()).tanh())


@pytest.mark.parametrize("size", [(15, 16), (16, 15), (3, 200)])
def test_generator_refuses_under_16_pixels_and_names_the_size(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        tiny()(image(*size).float())


def test_dropout_exists_only_where_asked_for_once_a_residual_block():
    def rates(G):
        return [m.p for m in G.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]

    assert rates(tiny(n_blocks=3)) == []
    assert rates(tiny(n_blocks=3, dropout=0.25)) == [0.25] * 3


# Discriminators


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("norm", "over"), [("batch", (0, 2, 3)), ("instance", (2, 3))])
def test_discriminator_equals_section_3_3_written_out(norm, over, kernel):
    D, x = with_random_parameters(PixelDiscriminator(3, 4, norm, kernel)), image(5, 7)
    if norm == "batch":  # no bias before the norm nor in the last convolution
        w1, b1, w2, gain, shift, w3 = D.parameters()
        b2 = b3 = None
    else:
        w1, b1, w2, b2, w3, b3 = D.parameters()
        gain, shift = x.new_ones(1), x.new_zeros(1)
    around = kernel // 2  # zeros
    hidden = leaky(F.conv2d(x, w1, b1, padding=around))
    hidden = normalize(F.conv2d(hidden, w2, b2, padding=around), over)
    hidden = leaky(hidden * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    torch.testing.assert_close(D(x), F.conv2d(hidden, w3, b3, padding=around))


@pytest.mark.parametrize(("kernel", "reach"), [(1, 0), (3, 3)])
def test_a_judgment_sees_one_pixel_or_with_kernel_3_a_neighborhood_of_7x7(kernel, reach):
    D, x = with_random_parameters(PixelDiscriminator(3, 4, kernel=kernel)).eval(), image(17, 19)
    changed = x.clone()
    changed[1, :, 8, 9] += 1
    rows, columns = range(8 - reach, 9 + reach), range(9 - reach, 10 + reach)
    where = [[1, 0, i, j] for i in rows for j in columns]
    assert (D(x) != D(changed)).nonzero().tolist() == where


@pytest.mark.parametrize(
    ("settings", "named"), [({"norm": "layer"}, "'layer'"), ({"kernel": 2}, "kernel is 2")]
)
def test_discriminator_refuses_unknown_settings_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        PixelDiscriminator(3, **settings)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 70), (16, 20), (31, 40)])
def test_fully_convolutional_discriminator_equals_five_convolutions_up_sampled(height, width):
    D, x = with_random_parameters(FCDiscriminator(3, 2)), image(height, width)
    rows, columns = max(32, height), max(32, width)
    hidden = x.new_zeros(2, 3, rows, columns)  # what is under 32 pixels is filled up with zeros
    hidden[:, :, :height, :width] = x
    weights = list(D.parameters())
    assert [w.shape[0] for w in weights[::2]] == [2, 4, 8, 16, 1]
    for i in range(0, 10, 2):
        hidden = F.conv2d(hidden, weights[i], weights[i + 1], stride=2, padding=1)
        hidden = leaky(hidden) if i < 8 else hidden

    def spread(values, n):  # linear along the last axis, ends on ends
        at = torch.arange(n, dtype=torch.float64) * (values.shape[-1] - 1) / (n - 1)
        low = at.floor().long().clamp(max=max(0, values.shape[-1] - 2))
        high = (low + 1).clamp(max=values.shape[-1] - 1)
        return values[..., low] + (at - low) * (values[..., high] - values[..., low])

    expected = spread(spread(hidden, columns).mT, rows).mT[..., :height, :width]
    torch.testing.assert_close(D(x), expected)


@pytest.mark.parametrize(
    "build", [lambda: tiny(n_blocks=2), lambda: PixelDiscriminator(3, 4, "instance")]
)
def test_biases_that_instance_norm_cancels_are_kept_but_left_out(build):
    network, x = with_random_parameters(build()), image()
    modules = [*network.modules()]
    before_norm = zip(modules, modules[1:], strict=False)
    cancelled = [conv.bias for conv, norm in before_norm if isinstance(norm, InstanceNorm2d)]
    assert len(cancelled) > 0
    before = network(x)
    for bias in cancelled:
        bias.data.add_(1)
    assert torch.equal(network(x), before)
    before.sum().backward()
    without_gradient = {p for p in network.parameters() if p.grad is None}
    assert without_gradient == {*cancelled}
