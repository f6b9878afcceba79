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


def build(flags: str) -> model.Method:
    """A method on the meta device, training."""
    small = "--training --dataset acdc --device cpu --ngf 4 --ndf 4 --n-blocks 1".split()
    args = parse_args([*small, *flags.split()])
    method = METHODS[args.method].from_args(load_spec("acdc"), args).to("meta")
    for side in method.optimizers:  # the fused one has no meta kernel
        method.optimizers[side] = torch.optim.Adam(method.sides[side].networks.parameters())
    return method.train()


def step(method: model.Method) -> dict[str, torch.Tensor]:
    """One step on meta images of 20x24 pixels."""
    x, x_u = torch.empty(2, 3, 1, 20, 24, device="meta")
    y = torch.empty(3, 20, 24, dtype=torch.int64, device="meta")
    return method.step(x, y, x_u)


@pytest.fixture(autouse=True)
def _on_meta(monkeypatch):
    monkeypatch.setattr(model, "descend", descend)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown on meta


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
def test_a_step_needs_no_value_on_the_host(flags, progress):
    method = build(flags)
    method.progress = progress
    for losses in step(method), step(method):
        assert losses
        assert all(loss.is_meta for loss in losses.values())


def wait(method, loss):
    return loss * (2 if loss > 0 else 1)


def use_a_cpu_tensor(method, loss):
    return loss + (method.G_IS.layers[1].weight * torch.zeros(4, 1, 7, 7)).sum()


@pytest.mark.parametrize("defect", [wait, use_a_cpu_tensor])
def test_a_host_wait_or_a_cpu_tensor_in_the_step_fails(defect, monkeypatch):
    method, gen_S = build(""), model.gen_S
    monkeypatch.setattr(model, "gen_S", lambda *args: defect(method, gen_S(*args)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(method)
