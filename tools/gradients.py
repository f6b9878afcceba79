"""Gradients of G_SI's first layer after masks of one class and after others, for two norms.

    python tools/gradients.py --dataset acdc --size 64 64 --ngf 16 --ndf 16 --ratio 0.1 --seed 1

All flags but --steps are main.py's. Each norm trains the same networks on the same batches: ours
(arch/norm.py), which maps constant planes to 0, and PyTorch's, which amplifies their rounding.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, so that a signal during them is heard
    from engine import signals

    signals.install()

import torch
from torch import nn

import utils
from arch.norm import InstanceNorm2d
from data_utils import Batches, load_data
from datasets.spec import load_spec
from engine import program
from engine.flags import Parser, bounded, parse_args
from model import METHODS, move


class PyTorchsNorm(nn.Module):
    """nn.InstanceNorm2d for any number of channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.instance_norm(x)


def use_pytorchs_norm(network: nn.Module) -> None:
    """Replace each of our instance norms by PyTorch's."""
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, InstanceNorm2d):
                setattr(module, name, PyTorchsNorm())


def gradients(argv: list[str]) -> int:
    """Print one line per norm."""
    parser = Parser("gradients.py", description=__doc__)
    parser.add_argument("--steps", type=bounded(int, 1), default=60, help="training steps")
    own, argv = parser.parse_known_args(argv)
    args = parse_args(["--training", *argv])
    device = utils.pick_device(args.device, args.precision)
    spec = load_spec(args.dataset)
    data = load_data(args, spec)
    print("| norm | steps with a one-class mask | other steps | mean of sqrt(v) |")
    print("| --- | --- | --- | --- |")
    for norm in "PyTorch's", "ours":
        utils.seed_everything(args.seed, args.deterministic)
        model = move(METHODS[args.method].from_args(spec, args), device).train()
        if norm == "PyTorch's":
            use_pytorchs_norm(model)
        weight = next(model.G_SI.parameters())
        norms: dict[bool, list[float]] = {True: [], False: []}
        order = data.train.epoch(args.seed, 0, args.batch_size)[: own.steps * args.batch_size]
        batches = Batches(data.train, args.batch_size, device, 0, args.normalization)
        for x, y, x_u in batches.of(order):
            model.step(x, y, x_u)
            one_class = any(len(mask.unique()) == 1 for mask in y)
            norms[one_class].append(weight.grad.norm().item())
        values = [norms[kind] for kind in (True, False)]
        medians = [f"{statistics.median(each):.3g}" if each else "none" for each in values]
        root = model.optimizers["G"].state[weight]["exp_avg_sq"].sqrt().mean().item()
        print(f"| {norm} | {' | '.join(medians)} | {root:.3g} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(program.execute(gradients))
