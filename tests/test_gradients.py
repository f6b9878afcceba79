"""tools/gradients.py compares two instance norms on the same batches."""

import pytest
import torch

from arch.generators import ResNetGenerator
from arch.norm import InstanceNorm2d
from tools import gradients


def test_both_norms_get_a_row_with_every_column(in_tmp, capsys):
    flags = "--dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 0 --device cpu --steps 4"
    assert gradients.gradients(flags.split()) == 0
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
