"""Every method steps on the meta device, so without a host wait or a tensor of another device.

Meta tensors have shapes but no values: a `bool(tensor)` or `.item()` fails, and so does an
operation with a tensor made on the CPU. The one intended wait, for a finite loss, is replaced here.
"""

from contextlib import nullcontext

import pytest
import torch

import model
from datasets.spec import load_spec
from engine.flags import parse_args
from model import METHODS


def descend(optimizer, loss, terms):
    """model.descend without its wait for the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize(
    "flags",
    [
        "--method supervised",
        "--method supervised --dropout 0.5",
        "",
        "--disc-input argmax",
        "--disc-norm instance --disc-kernel 3",
        "--lambda1 0 --lambda2 0",
        "--lambda3 0 --lambda4 0",
        "--lambda5 0",
        "--pool-size 50",
        "--method advsemi",
        "--method meanteacher",
        "--method meanteacher --cutmix-on unlabeled",
        "--method meanteacher --cutmix-on labeled",
    ],
)
def test_a_step_needs_no_value_on_the_host(monkeypatch, flags, progress):
    monkeypatch.setattr(model, "descend", descend)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown on meta
    small = "--training --dataset acdc --device cpu --ngf 4 --ndf 4 --n-blocks 1"
    args = parse_args([*small.split(), *flags.split()])
    method = METHODS[args.method].from_args(load_spec("acdc"), args).to("meta").train()
    for side in method.optimizers:  # the fused one has no meta kernel
        method.optimizers[side] = torch.optim.Adam(method.sides[side].networks.parameters())
    method.progress = progress
    x, x_u = torch.empty(2, 3, 1, 20, 24, device="meta")
    y = torch.empty(3, 20, 24, dtype=torch.int64, device="meta")
    for _ in range(2):
        losses = method.step(x, y, x_u)
        assert losses
        assert all(loss.is_meta for loss in losses.values())
