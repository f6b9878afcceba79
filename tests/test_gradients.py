"""tools/gradients.py: the terms' gradients in G_IS; two instance norms on the same batches."""

import pytest
import torch
from torch import nn

import main
from arch.generators import ResNetGenerator
from arch.norm import InstanceNorm2d
from data_utils import Batches, load_data
from engine.flags import Flags
from engine.trained import load
from model import CycleGAN
from tools import gradients


def test_both_norms_get_a_row_with_every_column(in_tmp, capsys):
    flags = "--dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --device cpu --steps 4"
    assert gradients.gradients(["norms", *flags.split()]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["PyTorch's", "ours"]
    assert all(len(row) == title.count("|") - 1 for row in cells)
    # the same, up to rounding, where no plane is constant
    assert float(cells[0][2]) == pytest.approx(float(cells[1][2]), rel=0.2)


def test_every_instance_norm_is_replaced():
    torch.manual_seed(0)
    network, x = ResNetGenerator(1, 4, ngf=2, n_blocks=1), torch.randn(1, 1, 16, 16)
    before = network(x)
    gradients.use_pytorchs_norm(network)
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
    assert gradients.gradients(["terms", "--steps", "1", "checkpoints/ours"]) == 0
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
        ("--method cyclegan --disc-input argmax", ["cycle_S", "cycle_I"]),
        ("--method cyclegan --lambda2 0 --lambda3 0 --precision bf16", ["disc_S"]),
    ],
)
def test_each_method_has_a_column_per_term_that_trains_G_IS(in_tmp, capsys, flags, terms):
    size = "--training --dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --epochs 1"
    assert main.main([*size.split(), *flags.split(), "--name", "run"]) == 0
    capsys.readouterr()
    assert gradients.gradients(["terms", "--steps", "2", "checkpoints/run"]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    columns = [cell.strip() for cell in title.strip("|").split("|") if cell.strip()]
    assert columns == ["run", "gen_S", *(f"{name} / gen_S" for name in terms)]
