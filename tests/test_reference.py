"""Section 3 written once more with torch.nn.functional in float64; only the weights are shared."""

import pytest
import torch
from torch.nn import functional as F

from datasets.spec import load_spec
from engine.flags import parse_args
from model import METHODS

LAMBDA = {  # Section 3.3
    "gen_S": 1.0,
    "gen_I": 1.0,
    "cycle_S": 0.05,
    "cycle_I": 1.0,
    "disc_S": 1.0,
    "disc_I": 1.0,
}
VOID = 255


def generator(weights, x, tanh):
    """Johnson et al.'s network with two residual blocks, from its parameters in data flow order."""
    height, width = x.shape[-2:]
    take = iter(weights)

    def conv(x, function=F.conv2d, **options):
        return function(x, next(take), next(take), **options)

    def reflect(x, by):
        return F.pad(x, by, mode="reflect")

    x = reflect(x, (0, -width % 4, 0, -height % 4))
    x = F.relu(F.instance_norm(conv(reflect(x, (3, 3, 3, 3)))))
    x = F.relu(F.instance_norm(conv(x, stride=2, padding=1)))
    x = F.relu(F.instance_norm(conv(x, stride=2, padding=1)))
    for _ in range(2):
        inner = F.relu(F.instance_norm(conv(reflect(x, (1, 1, 1, 1)))))
        x = x + F.instance_norm(conv(reflect(inner, (1, 1, 1, 1))))
    for _ in range(2):
        x = conv(x, F.conv_transpose2d, stride=2, padding=1, output_padding=1)
        x = F.relu(F.instance_norm(x))
    x = conv(reflect(x, (3, 3, 3, 3)))[..., :height, :width]
    assert next(take, None) is None  # every weight was used
    return torch.tanh(x) if tanh else x


def discriminator(weights, x):
    first, bias, second, gain, shift, third = weights
    x = F.leaky_relu(F.conv2d(x, first, bias), 0.2)
    x = F.leaky_relu(F.batch_norm(F.conv2d(x, second), None, None, gain, shift, training=True), 0.2)
    return F.conv2d(x, third)


def reference(w, x, y, x_u, n_classes):
    """The six terms of the generators' update, and the discriminators' two losses."""
    counts = y != VOID
    mask = F.one_hot(y.where(counts, 0), n_classes).movedim(-1, 1) * counts[:, None].to(x.dtype)
    fake_y = F.softmax(generator(w["G_IS"], x_u, tanh=False), 1)
    fake_x = generator(w["G_SI"], mask, tanh=True)
    terms = {
        "gen_S": F.cross_entropy(generator(w["G_IS"], x, tanh=False), y, ignore_index=VOID),
        "gen_I": ((fake_x - x) ** 2).mean(),
        "cycle_S": F.cross_entropy(generator(w["G_IS"], fake_x, tanh=False), y, ignore_index=VOID),
        "cycle_I": (generator(w["G_SI"], fake_y, tanh=True) - x_u).abs().mean(),
        "disc_S": ((discriminator(w["D_S"], fake_y) - 1) ** 2).mean(),
        "disc_I": ((discriminator(w["D_I"], fake_x) - 1) ** 2).mean(),
    }
    real_y = discriminator(w["D_S"], mask)[:, 0][counts]
    losses = {
        "D_S": ((real_y - 1) ** 2).mean() + (discriminator(w["D_S"], fake_y.detach()) ** 2).mean(),
        "D_I": ((discriminator(w["D_I"], x_u) - 1) ** 2).mean()
        + (discriminator(w["D_I"], fake_x.detach()) ** 2).mean(),
    }
    return terms, losses


def gradients(parameters):
    """Their gradients; 0 for the biases that instance norm cancels, which are left out."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@pytest.mark.parametrize(
    ("dataset", "size"), [("voc", (18, 21)), ("acdc", (16, 20)), ("cityscapes", (16, 32))]
)
def test_one_step_has_the_papers_six_terms_and_their_gradients(dataset, size):
    spec = load_spec(dataset)
    K, C = len(spec.classes), spec.channels
    random = torch.Generator().manual_seed(1)
    x, x_u = 2 * torch.rand(2, 3, C, *size, dtype=torch.float64, generator=random) - 1
    y = torch.randint(K, (3, *size), generator=random)
    y[0, :5], y[2, :, -4:] = VOID, VOID
    flags = "--training --ngf 4 --ndf 4 --n-blocks 2 --dataset".split()
    torch.manual_seed(0)
    ours = METHODS["cyclegan"].from_args(spec, parse_args([*flags, dataset])).double()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=random)
    names = {"G_IS": [], "G_SI": [], "D_S": [], "D_I": []}
    for name, parameter in ours.named_parameters():
        names[name.split(".")[0]].append(parameter.detach().clone().requires_grad_())

    terms, losses = reference(names, x, y, x_u, K)
    generators, discriminators = [*names["G_IS"], *names["G_SI"]], [*names["D_S"], *names["D_I"]]
    exact = {"rtol": 1e-8, "atol": 1e-8}
    found, _ = ours.generator_terms(x, y, x_u)
    parameters = [*ours.G_IS.parameters(), *ours.G_SI.parameters()]
    options = {"retain_graph": True, "materialize_grads": True}
    for name, term in terms.items():
        expected = torch.autograd.grad(term, generators, **options)
        gradient = torch.autograd.grad(found[name], parameters, **options)
        torch.testing.assert_close(gradient, expected, **exact)

    before = {name: value.detach().clone() for name, value in ours.state_dict().items()}
    step = ours.step(x, y, x_u)  # leaves its gradients, of Eq. 8 and of Eq. 4 + 5, in place
    expected = {name: value.detach() for name, value in (terms | losses).items()}
    torch.testing.assert_close(step, expected, **exact)
    eq_8 = sum(LAMBDA[name] * term for name, term in terms.items())
    expected = [*torch.autograd.grad(eq_8, generators)]
    torch.testing.assert_close(gradients(parameters), expected, **exact)
    expected = [*torch.autograd.grad(sum(losses.values()), discriminators)]
    parameters = [*ours.D_S.parameters(), *ours.D_I.parameters()]
    torch.testing.assert_close(gradients(parameters), expected, **exact)
    for name, p in ours.named_parameters():
        assert p.grad is None or p.grad.abs().max() <= 1e-6 or not torch.equal(p, before[name]), (
            name
        )
