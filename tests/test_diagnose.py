"""tools/diagnose.py: the terms' gradients in G_IS; the image cycle; two instance norms."""

import pytest
import torch
from torch import nn

import main
from arch.generators import ResNetGenerator
from arch.norm import InstanceNorm2d
from data_utils import Batches, load_data, normalize
from engine.flags import Flags
from engine.trained import load
from model import CycleGAN, Supervised
from tools import diagnose
from utils import InputError


def test_both_norms_get_a_row_with_every_column(in_tmp, capsys):
    flags = "--dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --device cpu --steps 4"
    assert diagnose.diagnose(["norms", *flags.split()]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["PyTorch's", "ours"]
    assert all(len(row) == title.count("|") - 1 for row in cells)
    # the same, up to rounding, where no plane is constant
    assert float(cells[0][2]) == pytest.approx(float(cells[1][2]), rel=0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method supervised", "--method supervised has no G_SI"),
        ("--lambda1 0 --lambda2 0 --lambda3 0 --lambda5 0", "no term .* trains G_SI"),
        ("--ratio 1", "--ratio 1 leaves no unlabeled image for --method cyclegan"),
    ],
)
def test_norms_are_those_of_cyclegan_with_unlabeled_images(in_tmp, flags, message):
    with pytest.raises(InputError, match=message):
        diagnose.diagnose(["norms", "--dataset", "tiny.toml", *flags.split()])


def test_norms_may_take_more_steps_than_an_epoch_has(in_tmp, monkeypatch):
    steps, step = [], CycleGAN.step
    monkeypatch.setattr(CycleGAN, "step", lambda *batch: steps.append(1) or step(*batch))
    flags = "--dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --device cpu --steps 25"
    assert diagnose.diagnose(["norms", *flags.split()]) == 0
    assert len(steps) == 2 * 25


def test_terms_may_take_more_steps_than_an_epoch_has(trained, monkeypatch):
    batches, terms = [], Supervised.generator_terms
    monkeypatch.setattr(
        Supervised, "generator_terms", lambda *batch: batches.append(1) or terms(*batch)
    )
    assert diagnose.diagnose(["terms", str(trained), "--steps", "25"]) == 0
    assert len(batches) == 25


def test_every_instance_norm_is_replaced():
    torch.manual_seed(0)
    network, x = ResNetGenerator(1, 4, ngf=2, n_blocks=1), torch.randn(1, 1, 16, 16)
    before = network(x)
    diagnose.use_pytorchs_norm(network)
    assert not any(isinstance(module, InstanceNorm2d) for module in network.modules())
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)


def test_a_terms_gradient_is_that_of_a_step_on_it_alone(in_tmp, capsys):
    flags = "--training --dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --epochs 1"
    assert main.main([*flags.split(), "--name", "ours", "--lambda4", "0.3"]) == 0
    run = load(Flags({"checkpoint": "checkpoints/ours"}))
    data = load_data(run.args, run.spec, run.state["split"])
    order = data.train.epoch(run.args.seed, 0, run.args.batch_size)
    batch = next(Batches(data.train, run.args.batch_size, run.device).of(order))
    norms, sizes = {}, {"ngf": 2, "ndf": 2, "n_blocks": 0}
    for name in "gen_S", "cycle_S", "cycle_I", "disc_S", "gen_I":
        alone = {key: weight * (key == name) for key, weight in run.model.weights.items()}
        model = CycleGAN(run.spec.channels, len(run.spec.classes), weights=alone, **sizes)
        model.load_state_dict(run.model.state_dict())
        model.step(*batch)
        norms[name] = nn.utils.get_total_norm(
            [p.grad for p in model.G_IS.parameters() if p.grad is not None]
        ).item()
    capsys.readouterr()
    assert diagnose.diagnose(["terms", "--steps", "1", "checkpoints/ours"]) == 0
    title, _, row = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in title.strip("|").split("|")]
    assert columns == ["run", "gen_S", *(f"{n} / gen_S" for n in ("cycle_S", "cycle_I", "disc_S"))]
    found = [float(cell) for cell in row.strip("|").split("|")[1:]]
    ratios = [norms[name] / norms["gen_S"] for name in ("cycle_S", "cycle_I", "disc_S")]
    assert found == pytest.approx([norms["gen_S"], *ratios], rel=0.01)
    assert norms["gen_I"] == 0


@pytest.mark.parametrize(
    ("flags", "terms"),
    [
        ("--method supervised", []),
        ("--method advsemi", ["adv", "semi_adv", "semi"]),
        ("--method meanteacher", ["cutmix"]),
        ("--method meanteacher --cutmix-on labeled --ratio 1", ["cutmix"]),
        ("--method cyclegan --disc-input argmax", ["cycle_S", "cycle_I"]),
        ("--method cyclegan --lambda2 0 --lambda3 0 --precision bf16", ["disc_S"]),
    ],
)
def test_each_method_has_a_column_per_term_that_trains_G_IS(in_tmp, capsys, flags, terms):
    size = "--training --dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --epochs 1"
    assert main.main([*size.split(), *flags.split(), "--name", "run"]) == 0
    capsys.readouterr()
    assert diagnose.diagnose(["terms", "--steps", "2", "checkpoints/run"]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    columns = [cell.strip() for cell in title.strip("|").split("|") if cell.strip()]
    assert columns == ["run", "gen_S", *(f"{name} / gen_S" for name in terms)]


def test_weights_that_grow_are_those_of_the_checkpoints_epoch(in_tmp):
    flags = "--training --dataset tiny.toml --size 16 16 --ngf 2 --n-blocks 0 --epochs 1"
    assert main.main([*flags.split(), "--method", "meanteacher", "--name", "run"]) == 0
    run, found = load(Flags({"checkpoint": "checkpoints/run"})), []
    for epochs in 1, 8:  # the end of the run, and half of the ramp of a quarter of it
        run.args.epochs = epochs
        found.append(diagnose.of_terms(run, 1)["cutmix"])
    assert found[1] == pytest.approx(found[0] / 2, rel=1e-4)


def test_the_cycles_errors_are_those_of_images_painted_from_each_kind_of_mask(in_tmp, capsys):
    flags = "--training --dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --epochs 1"
    assert main.main([*flags.split(), "--name", "ours", "--normalization", "half"]) == 0
    run = load(Flags({"checkpoint": "checkpoints/ours"}))
    data = load_data(run.args, run.spec, run.state["split"])
    G_IS, G_SI, errors = run.model.G_IS.eval(), run.model.G_SI.eval(), []
    for i in range(len(data.val)):  # image by image
        x, y = (part.unsqueeze(0) for part in data.val[i])
        x = normalize(x, "half")
        p = G_IS(x).softmax(1)
        masks = p, nn.functional.one_hot(p.argmax(1), 4).permute(0, 3, 1, 2).float()
        truth = torch.stack([(y == k).float() for k in range(4)], 1)
        painted = [G_SI(mask) for mask in (*masks, truth)]
        errors.append([(each - x).abs().mean().item() for each in (*painted, x.mean())])
    expected = [sum(column) / len(errors) for column in zip(*errors, strict=True)]
    found = list(diagnose.of_cycle(run).values())
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-4)  # a softmax map is not its argmax
    capsys.readouterr()
    assert diagnose.diagnose(["cycle", "checkpoints/ours"]) == 0
    title, _, row = capsys.readouterr().out.splitlines()
    assert title == "| run | softmax map | its argmax | true mask | the image's mean |"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["checkpoints/ours", *(f"{error:.3f}" for error in found)]


def test_a_method_without_an_image_cycle_is_an_error(trained):
    with pytest.raises(InputError, match="best.pt.*supervised has no image cycle"):
        diagnose.diagnose(["cycle", str(trained)])
