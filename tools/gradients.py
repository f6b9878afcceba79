"""Gradients: of the loss terms in a run's segmentation network, or with two instance norms.

    python tools/gradients.py terms checkpoints/ours/last.pt checkpoints/partial/last.pt
    python tools/gradients.py norms --dataset acdc --size 64 64 --ngf 16 --ndf 16 --ratio 0.1

`terms`: a RUN is a run's folder, whose best.pt is taken, or a checkpoint. Every term is weighted as
in the run, and computed on its training batches. A term without a gradient in G_IS has no column.

`norms`: the gradients of G_SI's first layer after masks of one class and after others. All flags
but --steps are main.py's. Each norm trains the same networks on the same batches: ours
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
from engine.trained import Trained, load_runs, run_flags
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


def norms(argv: list[str]) -> int:
    """Print one line per norm."""
    parser = Parser("gradients.py norms", description=__doc__)
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
        found: dict[bool, list[float]] = {True: [], False: []}
        order = data.train.epoch(args.seed, 0, args.batch_size)[: own.steps * args.batch_size]
        batches = Batches(data.train, args.batch_size, device, 0, args.normalization)
        for x, y, x_u in batches.of(order):
            model.step(x, y, x_u)
            one_class = any(len(mask.unique()) == 1 for mask in y)
            found[one_class].append(weight.grad.norm().item())
        medians = [f"{statistics.median(each):.3g}" if each else "none" for each in found.values()]
        root = model.optimizers["G"].state[weight]["exp_avg_sq"].sqrt().mean().item()
        print(f"| {norm} | {' | '.join(medians)} | {root:.3g} |", flush=True)
    return 0


def of_terms(run: Trained, steps: int) -> dict[str, float]:
    """The median over training batches of the norm of each weighted term's gradient in G_IS."""
    args, model = run.args, run.model.train()
    model.progress = run.state["epoch"] / args.epochs  # some weights depend on it
    utils.seed_everything(args.seed, args.deterministic)
    data = load_data(args, run.spec, run.state["split"], model.uses_unlabeled)
    orientation = run.spec.orientation if args.augment else None
    options = args.batch_size, run.device, 0, args.normalization, orientation
    order = data.train.epoch(args.seed, 0, args.batch_size)[: steps * args.batch_size]
    parameters, found = [*model.G_IS.parameters()], {}
    for batch in Batches(data.train, *options).of(order):
        terms, _ = model.generator_terms(*batch)
        for name, term in terms.items():
            parts = []
            if term.requires_grad:  # not that of --disc-input argmax
                weighted, options = model.weights[name] * term, {"allow_unused": True}
                parts = torch.autograd.grad(weighted, parameters, retain_graph=True, **options)
            norm = nn.utils.get_total_norm([part for part in parts if part is not None])
            found.setdefault(name, []).append(norm.item())
    return {name: statistics.median(values) for name, values in found.items()}


def terms(argv: list[str]) -> int:
    """Print one line per run: the gradient of the labels' term, and the others' relative to it."""
    parser = Parser("gradients.py terms", description=__doc__)
    run_flags(parser)
    parser.add_argument("--steps", type=bounded(int, 1), default=10, help="training batches")
    own = parser.parse_args(argv)
    found = [of_terms(run, own.steps) for run in load_runs(own)]
    others = dict.fromkeys(name for norms in found for name in norms if norms[name])
    others.pop("gen_S")
    print(f"| run | gen_S | {' | '.join(f'{name} / gen_S' for name in others)} |")
    print(f"|{' --- |' * (2 + len(others))}")
    for run, medians in zip(own.runs, found, strict=True):
        cells = [f"{medians['gen_S']:.3g}"]
        for name in others:
            cells.append(f"{medians[name] / medians['gen_S']:.3g}" if name in medians else "-")
        print(f"| {run} | {' | '.join(cells)} |")
    return 0


def gradients(argv: list[str]) -> int:
    """The command line: terms or norms."""
    commands = {"terms": terms, "norms": norms}
    parser = Parser("tools/gradients.py", description=__doc__)
    parser.add_argument("command", choices=[*commands])
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    sys.exit(program.execute(gradients))
