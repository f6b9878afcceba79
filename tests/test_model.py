"""Eq. 1 to 9 and the baselines against numbers worked by hand; where gradients go."""

import copy
import doctest
import functools
import itertools
import math

import pytest
import torch
from conftest import same
from torch import nn

import model
from arch.discriminators import FCDiscriminator, PixelDiscriminator
from arch.generators import ResNetGenerator
from datasets.spec import load_spec
from engine.flags import parse_args
from model import METHODS, ReplayPool, frozen
from utils import IGNORE, InputError, NonFiniteLoss

SPEC = load_spec("phantom")  # 1 channel, 4 classes
TERMS = ("gen_S", "gen_I", "cycle_S", "cycle_I", "disc_S", "disc_I")
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def build(method, *flags):
    """Tiny networks in float64 from one seed; voc.toml keeps the parser's defaults, the paper's."""
    tiny = "--training --dataset voc --ngf 4 --ndf 4 --n-blocks 1 --method".split()
    torch.manual_seed(0)
    return METHODS[method].from_args(SPEC, parse_args([*tiny, method, *flags])).double()


def batch(height=16, width=20):
    """x, y, x_u of two images; a quarter of the first mask is ignored."""
    random = torch.Generator().manual_seed(1)
    x, x_u = 2 * torch.rand(2, 2, 1, height, width, dtype=torch.float64, generator=random) - 1
    y = torch.randint(4, (2, height, width), generator=random)
    y[0, : height // 4] = IGNORE
    return x, y, x_u


def parameters(ours, *names):
    return [p for name in names for p in getattr(ours, name).parameters()]


def copies(weights):
    return [p.detach().clone() for p in weights]


def hot(y):
    return torch.stack([(y == k).double() for k in range(4)], 1)


def cross_entropy(logits, y):
    counts = y != IGNORE
    return -logits.log_softmax(1).movedim(1, -1)[counts].gather(1, y[counts].unsqueeze(1)).mean()


def count_images(ours):
    """Count the images that each network is given from here on."""
    counts = {}
    for name, network in ours.named_children():
        counts[name] = 0

        def add(_, inputs, name=name):
            counts[name] += len(inputs[0])

        network.register_forward_pre_hook(add)
    return counts


# Equations; their values are in test_reference.py


def test_a_mean_over_pixels_of_which_none_counts_is_0_and_passes_none_as_gradient():
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = model.gen_S(logits, torch.full((2, 3, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()
    real, none = torch.rand(2, 1, 3, 5), torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    assert model.bce(real, 1.0, none).item() == 0
    assert model.disc(real, torch.zeros(2, 1, 3, 5), none).item() == 0


# Eq. 8 and 9


def test_the_sums_that_the_paper_prints_are_the_weights_of_reduction_sum():
    """All are divided by H W: sums over pixels become means.

    Eq. 3 and 6 sum over the channels too; Eq. 4 and 5 hold one probability per image.
    """
    factors = 1, 3, 1, 3, 1 / 200, 1 / 200
    sums = model.as_sums(dict.fromkeys(TERMS, 1.0), 3, 10, 20)
    assert sums == dict(zip(TERMS, factors, strict=True))
    ours = build("cyclegan", "--size", "16", "20", "--reduction", "sum")
    assert ours.weights == model.as_sums({"gen_S": 1.0, **model.WEIGHTS}, 1, 16, 20)


def test_the_weights_of_eq_8_leave_the_discriminators_loss_as_it_is():
    gradients = []
    for flags in [], ["--lambda4=0.5", "--lambda5=2"]:
        ours = build("cyclegan", *flags)
        ours.step(*batch())
        gradients.append([p.grad for p in parameters(ours, "D_S", "D_I")])
    assert same(*gradients)


def test_each_discriminator_is_given_what_its_pool_returns():
    ours, (x, y, x_u) = build("cyclegan", "--pool-size", "3"), batch()
    assert [pool.size for pool in ours.pools.values()] == [3, 3]
    fakes, past = {"y": hot(y), "x": x}, {"y": hot(y.flip(0)), "x": x.flip(0)}
    ours.pools = {"y": lambda _: past["y"], "x": lambda _: past["x"]}
    found = ours.discriminator_terms(x, y, x_u, fakes)
    ours.pools = build("cyclegan").pools  # the paper's: they return what they are given
    assert same(found, ours.discriminator_terms(x, y, x_u, past))


def test_replay_pool_fills_then_swaps_about_half_for_stored_ones_and_loses_none():
    torch.manual_seed(0)
    pool, given = ReplayPool(10), torch.arange(2010.0)
    returned = torch.cat([pool(fakes) for fakes in given.view(-1, 5, 1, 1, 1)]).flatten()
    assert torch.equal(returned[:10], given[:10])
    late, swapped = returned[10:], returned[10:] != given[10:]
    assert 0.45 < swapped.float().mean() < 0.55
    assert (late[swapped] < given[10:][swapped]).all()  # a stored one is an earlier one
    assert {fake.untyped_storage().nbytes() for fake in pool.fakes} == {4}  # no views of a batch
    stored = torch.stack(pool.fakes).flatten()
    everything = torch.cat([late, stored])  # only the ten that filled the pool came out twice
    assert torch.equal(everything.sort().values, given)


# Gradients


@pytest.mark.parametrize("method", ["cyclegan", "advsemi"])
def test_the_terms_of_generators_leave_no_gradient_in_discriminators(method):
    ours = build(method)
    ours.progress = 1.0
    terms, _ = ours.generator_terms(*batch(64, 96))
    sum(terms.values()).backward()
    assert all(p.grad is None for p in ours.sides["D"].parameters())
    assert all(p.requires_grad for p in ours.sides["D"].parameters())


def test_argmax_gives_D_S_index_maps_and_G_IS_no_gradient_from_it():
    ours, data = build("cyclegan", "--disc-input", "argmax"), batch()
    terms, fakes = ours.generator_terms(*data)
    assert not terms["disc_S"].requires_grad
    assert torch.equal(fakes["y"], hot(ours.G_IS(data[2]).argmax(1)))
    torch.testing.assert_close(terms["disc_S"], model.fool(ours.D_S(fakes["y"])), **CLOSE)
    # this one still reads the softmax map
    softmax_terms, _ = build("cyclegan").generator_terms(*data)
    torch.testing.assert_close(terms["cycle_I"], softmax_terms["cycle_I"], **CLOSE)


def test_frozen_ends_even_after_an_error():
    network = nn.Conv2d(1, 1, 1)
    with pytest.raises(KeyError), frozen(network):
        raise KeyError
    assert network.weight.requires_grad


# A weight of 0


def assert_trains(ours, networks):
    """Check which networks, by side, the paper's Adam updates and DDP wraps."""
    assert ours.optimizers.keys() == ours.sides.keys() == networks.keys()
    for side, names in networks.items():
        assert list(ours.sides[side].networks) == [getattr(ours, name) for name in names]
        assert type(ours.optimizers[side]) is torch.optim.Adam
        (group,) = ours.optimizers[side].param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
        assert list(map(id, group["params"])) == list(map(id, parameters(ours, *names)))


@functools.cache
def losses_of_every_term():
    return build("cyclegan").step(*batch())


SUBSETS = [off for n in range(6) for off in itertools.combinations(TERMS[1:], n)]


@pytest.mark.parametrize("off", SUBSETS, ids="-".join)
def test_a_weight_of_0_drops_the_term_and_its_networks_and_nothing_else(off):
    every = losses_of_every_term()
    ours = build("cyclegan", *(f"--lambda{TERMS.index(name)}=0" for name in off))
    on, (x, y, x_u) = set(TERMS).difference(off), batch()
    assert ours.uses_unlabeled == bool(on & {"cycle_I", "disc_S", "disc_I"})
    counts, losses = count_images(ours), ours.step(x, y, x_u if ours.uses_unlabeled else None)
    assert counts == {  # two images for each reading of x, x_u, y or a fake
        "G_IS": 2 + 2 * bool(on & {"cycle_I", "disc_S"}) + 2 * ("cycle_S" in on),
        "G_SI": 2 * bool(on & {"gen_I", "cycle_S", "disc_I"}) + 2 * ("cycle_I" in on),
        "D_S": 6 * ("disc_S" in on),  # judging for the generators; real and fake for itself
        "D_I": 6 * ("disc_I" in on),
    }
    networks = {"G": [name for name in ("G_IS", "G_SI") if counts[name]]}
    if on & {"disc_S", "disc_I"}:
        networks["D"] = [name for name in ("D_S", "D_I") if counts[name]]
    assert_trains(ours, networks)
    names = [name for name in every if name.replace("D_", "disc_") in on]
    torch.testing.assert_close(losses, {name: every[name] for name in names}, **CLOSE)


# Hung et al.


def test_baselines_have_the_constants_of_their_papers():
    hung, teacher = build("advsemi"), build("meanteacher")
    assert hung.weights == {"gen_S": 1.0, "adv": 0.01, "semi_adv": 0.001, "semi": 0.1}
    assert (hung.threshold, hung.start) == (0.2, 0.25)
    assert teacher.weights == {"gen_S": 1.0, "cutmix": 1.0}
    assert (teacher.decay, teacher.ramp_up, teacher.cutmix_on) == (0.99, 0.25, "both")


def adversarial(progress=1.0):
    """AdvSemi whose D_S differs from place to place; half of batch(64, 96)'s x_u passes."""
    ours = build("advsemi")
    for p in ours.D_S.parameters():
        p.data *= 3
    ours.progress = progress
    maps = ours.G_IS(batch(64, 96)[2]).softmax(1)
    ours.threshold = ours.D_S(maps).sigmoid().median().item()
    return ours


def adversarial_by_hand(ours, x, y, x_u):
    """The terms of G_IS by name, and the loss of D_S."""
    logits, logits_u, counts = ours.G_IS(x), ours.G_IS(x_u), y != IGNORE
    maps, maps_u = logits.softmax(1), logits_u.softmax(1)
    fake, fake_u, real = (ours.D_S(masks)[:, 0].sigmoid() for masks in (maps, maps_u, hot(y)))
    passing = fake_u >= ours.threshold
    assert 0.2 < passing.double().mean() < 0.8
    terms = {
        "gen_S": cross_entropy(logits, y),
        "adv": -fake[counts].log().mean(),
        "semi_adv": -fake_u.log().mean(),
        "semi": -logits_u.log_softmax(1).amax(1)[passing].mean(),
    }
    fakes = torch.cat([fake[counts], fake_u.flatten()])
    return terms, -(1 - fakes).log().mean() / 2 - real[counts].log().mean() / 2


def test_adversarial_step_descends_the_weighted_terms_and_then_the_loss_of_D():
    ours, data = adversarial(), batch(64, 96)
    ours.weights = {"gen_S": 1.0, "adv": 0.3, "semi_adv": 0.7, "semi": 1.9}
    generator, discriminator = parameters(ours, "G_IS"), parameters(ours, "D_S")
    for _ in range(2):  # the second step's gradients are not added to the first's
        terms, loss_D = adversarial_by_hand(ours, *data)
        loss = sum(ours.weights[name] * term for name, term in terms.items())
        options = {"retain_graph": True, "allow_unused": True}
        expected = [*torch.autograd.grad(loss, generator, **options)]
        expected += torch.autograd.grad(loss_D, discriminator)
        losses = ours.step(*data)
        found = [p.grad for p in (*generator, *discriminator)]
        torch.testing.assert_close(found, expected, **CLOSE)
        values = {name: term.detach() for name, term in (terms | {"D_S": loss_D}).items()}
        torch.testing.assert_close(losses, values, **CLOSE)


@pytest.mark.parametrize(("progress", "begun"), [(0.2499, False), (0.25, True)])
def test_learning_alone_begins_after_a_part_of_the_run(progress, begun):
    losses = adversarial(progress).step(*batch(64, 96))
    assert (losses["semi"] > 0) == begun
    assert losses["semi_adv"] > 0


# The mean teacher


def test_boxes_are_rectangles_of_a_quarter_to_three_quarters_of_each_side():
    x = torch.zeros(200, 1, 40, 60)
    inside = model.boxes(x)
    assert (inside.shape, inside.dtype) == ((200, 1, 40, 60), torch.bool)
    rows, columns = inside.any(3), inside.any(2)
    assert torch.equal(inside, rows.unsqueeze(3) & columns.unsqueeze(2))
    outside = torch.zeros(200, 1, dtype=torch.int)
    for line, n in (rows, 40), (columns, 60):
        line = line[:, 0].int()
        ends = line.diff(dim=1, prepend=outside, append=outside).abs().sum(1)
        assert (ends == 2).all()
        assert n / 4 - 1 <= line.sum(1).min() < n / 3
        assert 2 * n / 3 < line.sum(1).max() <= 3 * n / 4 + 1
        assert line.any(0).all()  # at every place


def test_perturbed_images_differ_in_contrast_brightness_and_noise():
    ramp = torch.linspace(-1, 1, 10000, dtype=torch.float64).view(1, 1, 100, 100)
    x = ramp.expand(300, 1, 100, 100)
    moved = model.perturb(x)
    brightness = moved.mean((1, 2, 3))
    contrast = (moved * x).mean((1, 2, 3)) / (x * x).mean((1, 2, 3))
    noise = moved - contrast.view(-1, 1, 1, 1) * x - brightness.view(-1, 1, 1, 1)
    for value, low, high in (brightness, -0.1, 0.1), (contrast, 0.8, 1.2):
        assert low - 0.005 < value.min() < value.max() < high + 0.005
        assert value.max() - value.min() > 0.9 * (high - low)
        assert value.mean() == pytest.approx((low + high) / 2, abs=0.03)
    expected = torch.full((300,), 0.1, dtype=torch.float64)
    torch.testing.assert_close(noise.std((1, 2, 3)), expected, rtol=0, atol=0.005)


def test_cutmix_of_one_image_is_an_error():
    x, y = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="two images per process; give a larger --batch-size"):
        model.cutmix(lambda mixed: mixed, x, y)


def test_cutmix_by_hand(monkeypatch):
    box = torch.zeros(2, 1, 1, 4, dtype=torch.bool)
    box[0, ..., 0], box[1, ..., 2:] = True, True
    monkeypatch.setattr(model, "boxes", lambda x: box)
    shift = torch.tensor([100.0, 200.0]).view(2, 1, 1, 1)
    monkeypatch.setattr(model, "perturb", lambda x: x + shift)  # after mixing, so per mixed image
    even, odd = [0.0, 0.0], [math.log(3), 0.0]  # probabilities (1/2, 1/2) and (3/4, 1/4)
    rows = torch.tensor([[odd] * 4, [odd, even, odd, even]])
    student = rows.movedim(-1, 1).unsqueeze(2).requires_grad_()  # (2, 2, 1, 4)
    y_u = torch.tensor([[[1, IGNORE, 1, IGNORE]], [[IGNORE, 1, 1, IGNORE]]])
    x_u, inputs = torch.arange(8.0).view(2, 1, 1, 4), []
    loss = model.cutmix(lambda x: inputs.append(x) or student, x_u, y_u)
    assert (inputs[0] - shift).flatten().tolist() == [4, 1, 2, 3, 4, 5, 2, 3]
    # mixed masks: IGNORE, IGNORE, 1, IGNORE; and IGNORE, 1, 1 (of image 0), IGNORE
    assert loss.item() == pytest.approx((math.log(4) + math.log(2) + math.log(4)) / 8)
    loss.backward()
    assert student.grad.any()


@pytest.mark.parametrize(
    ("images", "progress", "weight"),
    [("labeled", 0.0, 0.0), ("unlabeled", 0.125, 0.5), ("both", 0.25, 1.0), ("both", 0.9, 1.0)],
)
def test_mean_teacher_descends_gen_S_and_cutmix_whose_weight_grows_over_a_quarter_of_a_run(
    images, progress, weight
):
    ours, (x, y, x_u) = build("meanteacher", "--cutmix-on", images), batch()
    assert ours.uses_unlabeled == (images != "labeled")
    ours.progress = progress
    for p in ours.teacher.parameters():
        p.data *= 3  # an average that is not its student
    y_u = ours.teacher(x_u).argmax(1)
    mixed = {
        "labeled": (x, y),
        "unlabeled": (x_u, y_u),
        "both": (torch.cat([x, x_u]), torch.cat([y, y_u])),
    }
    torch.manual_seed(5)
    terms = {"gen_S": cross_entropy(ours.G_IS(x), y)}
    terms["cutmix"] = model.cutmix(ours.G_IS, *mixed[images])
    loss = terms["gen_S"] + weight * terms["cutmix"]
    expected = torch.autograd.grad(loss, parameters(ours, "G_IS"), allow_unused=True)
    torch.manual_seed(5)
    losses = ours.step(x, y, x_u)
    torch.testing.assert_close([p.grad for p in parameters(ours, "G_IS")], [*expected], **CLOSE)
    values = {name: term.detach() for name, term in terms.items()}
    torch.testing.assert_close(losses, values, **CLOSE)


def test_the_average_follows_G_IS_and_is_what_is_evaluated():
    ours, (x, y, x_u) = build("meanteacher", "--lr", "0.01"), batch()
    expected = copies(ours.G_IS.parameters())
    for _ in range(3):
        ours.step(x, y, x_u)
        pairs = zip(expected, copies(ours.G_IS.parameters()), strict=True)
        expected = [0.99 * average + 0.01 * p for average, p in pairs]
    torch.testing.assert_close(copies(ours.teacher.parameters()), expected, **CLOSE)
    assert not any(p.requires_grad for p in ours.teacher.parameters())
    assert torch.equal(ours.segment(x), ours.G_IS(x))
    assert torch.equal(ours.eval().segment(x), ours.teacher(x))


def test_running_statistics_of_the_average_are_those_of_G_IS():
    ours = build("meanteacher", "--cutmix-on", "labeled")
    for network in ours.G_IS, ours.teacher:
        network.register_buffer("running", torch.zeros(2))
    ours.G_IS.running += 3
    ours.step(*batch())
    assert ours.teacher.running.tolist() == [3, 3]


# Methods


@pytest.mark.parametrize(
    ("method", "networks", "terms", "fakes"),
    [
        ("supervised", {"G": ["G_IS"]}, ["gen_S"], []),
        ("cyclegan", {"G": ["G_IS", "G_SI"], "D": ["D_S", "D_I"]}, [*TERMS], ["y", "x"]),
        ("advsemi", {"G": ["G_IS"], "D": ["D_S"]}, ["gen_S", "adv", "semi_adv", "semi"], ["y"]),
        ("meanteacher", {"G": ["G_IS"]}, ["gen_S", "cutmix"], []),
    ],
)
def test_every_method_gives_terms_and_fakes_by_name_and_trains_its_own_networks(
    method, networks, terms, fakes
):
    ours, data = build(method), batch()
    assert_trains(ours, networks)
    assert set(ours.weights) == set(terms)
    assert list(ours.generator_terms(*data)[1]) == fakes
    losses = ours.step(*data)
    assert list(losses) == [*terms, *networks.get("D", [])]
    assert not any(loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_terms(method):
    ours, (x, y, x_u) = build(method), batch()
    before = copy.deepcopy(ours.state_dict())
    x[0, 0, 3, 5] = math.nan
    with pytest.raises(NonFiniteLoss, match="gen_S nan"):
        ours.step(x, y, x_u)
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("method", ["cyclegan", "advsemi", "meanteacher"])
def test_one_seed_gives_every_method_the_same_first_G_IS(method):
    expected = build("supervised").G_IS.state_dict()
    torch.testing.assert_close(build(method).G_IS.state_dict(), expected, rtol=0, atol=0)


def test_the_flags_shape_the_networks():
    flags = "--ngf 5 --n-blocks 2 --dropout 0.25 --ndf 6 --disc-norm instance --disc-kernel 3"
    generator, discriminator = (5, 2, 0.25), (6, "instance", 3)
    G_IS = ResNetGenerator(1, 4, *generator)
    expected = {
        "supervised": [G_IS],
        "cyclegan": [
            G_IS,
            ResNetGenerator(4, 1, *generator, tanh=True),
            PixelDiscriminator(4, *discriminator),
            PixelDiscriminator(1, *discriminator),
        ],
        "advsemi": [G_IS, FCDiscriminator(4, 6)],
        "meanteacher": [G_IS, G_IS],
    }
    for method, networks in expected.items():
        ours = build(method, *flags.split())
        assert list(map(repr, ours.children())) == list(map(repr, networks)), method


def test_bf16_runs_every_network_in_bf16_with_losses_in_fp32_close_to_those_of_fp32():
    x, y, x_u = (data.float() if data.is_floating_point() else data for data in batch())
    losses = {}
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        partial = build("supervised", "--precision", precision).float()
        ours = build("cyclegan", "--precision", precision).float()
        dtypes = []

        def hook(_network, _inputs, output, dtypes=dtypes):
            dtypes.append(output.dtype)

        for network in (*partial.children(), *ours.children()):
            network.register_forward_hook(hook)
        losses[precision] = [partial.step(x, y)["gen_S"], *ours.step(x, y, x_u).values()]
        assert dtypes == [dtype] * (1 + 3 + 2 + 4)
    # assert_close also compares the types: both are float32
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.02, atol=0)


def test_pictures_show_masks_and_images_of_every_network():
    ours, (x, y, _) = build("cyclegan").float(), batch()
    x, vectors = x.float(), hot(y).float()
    expected = {
        "G_IS(x)": ours.G_IS(x).argmax(1),
        "G_SI(y)": ours.G_SI(vectors),
        "G_SI(G_IS(x))": ours.G_SI(ours.G_IS(x).softmax(1)),
        "G_IS(G_SI(y))": ours.G_IS(ours.G_SI(vectors)).argmax(1),
    }
    logits = ours.segment(x)
    torch.testing.assert_close(ours.pictures(y, logits), expected)
    assert torch.equal(build("supervised").pictures(y, logits)["G_IS(x)"], expected["G_IS(x)"])


# Without a command line


@pytest.mark.parametrize(
    ("method", "options", "flags"),
    [
        ("supervised", {"lr": 0.01}, ["--lr", "0.01"]),
        ("cyclegan", {"ndf": 4, "weights": {"gen_I": 0.5}}, ["--lambda1", "0.5"]),
        ("advsemi", {"ndf": 4, "betas": (0.9, 0.99)}, ["--betas", "0.9", "0.99"]),
        ("meanteacher", {"cutmix_on": "unlabeled"}, ["--cutmix-on", "unlabeled"]),
    ],
)
def test_a_method_of_values_is_the_one_of_equal_flags(method, options, flags):
    torch.manual_seed(0)
    of_values = METHODS[method](1, 4, ngf=4, n_blocks=1, **options).double()
    steps = []
    for ours in of_values, build(method, *flags):
        torch.manual_seed(1)
        losses = [ours.step(*batch()) for _ in range(2)]
        steps.append([losses, ours.weights, copies(ours.parameters())])
    assert same(*steps)


def test_weights_of_unknown_terms_are_an_error():
    with pytest.raises(ValueError, match="gen_X.*expected some of gen_S, gen_I, cycle_S"):
        model.CycleGAN(1, 4, weights={"gen_X": 1.0})


def test_the_example_of_the_docstring_runs():
    failed, tried = doctest.testmod(model)
    assert (failed, tried) == (0, 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_hides_no_synchronization_with_the_gpu(method, precision):
    ours = build(method, "--precision", precision).float().cuda()
    ours.progress = 1.0
    x, y, x_u = batch(64, 64)
    data = x.float().cuda(), y.cuda(), x_u.float().cuda()
    ours.step(*data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(*data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
