"""Diagnose a run: what trains its segmentation network, and what its image cycle has learned.

    python tools/diagnose.py terms checkpoints/ours/last.pt checkpoints/partial/last.pt
    python tools/diagnose.py cycle checkpoints/ours/last.pt
    python tools/diagnose.py norms --dataset acdc --size 64 64 --ngf 16 --ndf 16 --ratio 0.1

A RUN is a run's folder, whose best.pt is taken, or a checkpoint.

`terms`: the gradients of the loss terms in G_IS, weighted as in the run, on its training batches.
A term without a gradient in G_IS has no column.

`cycle`: L_cycle^I (Eq. 6) on the validation images, where G_SI generates from the softmax map of
G_IS(x), from its argmax, and from the true mask. If only the softmax map restores the image, it
carries the image in small probabilities that the argmax does not show. For comparison: the error of
a blank image of the mean value.

`norms`: the gradients of G_SI's first layer after masks of one class and after others. All flags
but --steps are main.py's. Each norm trains the same networks on the same batches: ours
(arch/norm.py), which maps constant planes to 0, and PyTorch's, which amplifies rounding errors.
"""

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, to handle signals during them
    from engine import signals

    signals.install()

import torch
from torch import nn

import utils
from arch.norm import InstanceNorm2d
from data_utils import Data, load_data, training_batches, validation_batches
from datasets.spec import DatasetSpec, load_spec
from engine import program
from engine.flags import Flags, Parser, bounded, parse_args
from engine.trained import Trained
from model import CycleGAN, cycle_I, move
from tools.report import markdown
from tools.runs import load_runs, run_flags
from utils import InputError


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


def first_batches(
    data: Data, args: Flags, spec: DatasetSpec, device: torch.device, n_steps: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches of a training's first steps, loaded in this process."""
    epochs = (data.train.epoch(args.seed, i, args.batch_size) for i in itertools.count())
    items = itertools.islice(itertools.chain.from_iterable(epochs), n_steps * args.batch_size)
    return training_batches(data, args, spec, device).of([*items])


def norms(argv: list[str]) -> int:
    """Print one line per norm."""
    parser = Parser("diagnose.py norms", description=__doc__)
    parser.add_argument("--steps", type=bounded(int, 1), default=60, help="training steps")
    own, argv = parser.parse_known_args(argv)
    args = parse_args(["--training", *argv])
    utils.check_single_process()
    if args.method != "cyclegan":
        raise InputError(f"--method {args.method} has no G_SI")
    device = utils.pick_device(args.device, args.precision)
    spec = load_spec(args.dataset)
    data = load_data(args, spec, uses_unlabeled=True)
    rows = []
    for norm in "PyTorch's", "ours":
        utils.seed_everything(args.seed, args.deterministic)
        model = move(CycleGAN.from_args(spec, args), device).train()
        if norm == "PyTorch's":
            use_pytorchs_norm(model)
        weight = next(model.G_SI.parameters())
        trained = model.optimizers["G"].param_groups[0]["params"]
        if not any(weight is parameter for parameter in trained):
            raise InputError("no term whose weight is not 0 trains G_SI; leave out its --lambda")
        found: dict[bool, list[float]] = {True: [], False: []}
        for x, y, x_u in first_batches(data, args, spec, device, own.steps):
            model.step(x, y, x_u)
            one_class = any(len(mask.unique()) == 1 for mask in y)
            found[one_class].append(weight.grad.norm().item())
        medians = [f"{statistics.median(each):.3g}" if each else "none" for each in found.values()]
        root = model.optimizers["G"].state[weight]["exp_avg_sq"].sqrt().mean().item()
        rows.append([norm, *medians, f"{root:.3g}"])
    titles = ["norm", "steps with a one-class mask", "other steps", "mean of sqrt(v)"]
    print(markdown(titles, rows).strip())
    return 0


def of_terms(run: Trained, steps: int) -> dict[str, float]:
    """The median over training batches of the norm of each weighted term's gradient in G_IS."""
    args, model = run.args, run.model.train()
    model.progress = run.state["epoch"] / args.epochs  # some weights depend on it
    utils.seed_everything(args.seed, args.deterministic)
    parameters, found = [*model.G_IS.parameters()], {}
    for x, y, *x_u in first_batches(run.data(), args, run.spec, run.device, steps):
        terms, _ = model.generator_terms(x, y, *x_u or [None])
        for name, term in terms.items():
            parts = []
            if term.requires_grad:  # not disc_S of --disc-input argmax, nor semi before its start
                weighted, options = model.weights[name] * term, {"allow_unused": True}
                parts = torch.autograd.grad(weighted, parameters, retain_graph=True, **options)
            norm = nn.utils.get_total_norm([part for part in parts if part is not None])
            found.setdefault(name, []).append(norm.item())
    return {name: statistics.median(values) for name, values in found.items()}


def terms(argv: list[str]) -> int:
    """Print one line per run: the gradient of the labels' term, and the others' relative to it."""
    parser = Parser("diagnose.py terms", description=__doc__)
    run_flags(parser)
    parser.add_argument("--steps", type=bounded(int, 1), default=10, help="training batches")
    own = parser.parse_args(argv)
    found = [of_terms(run, own.steps) for run in load_runs(own)]
    others = dict.fromkeys(name for norms in found for name in norms if norms[name])
    others.pop("gen_S")
    rows = []
    for run, medians in zip(own.runs, found, strict=True):
        cells = [f"{medians['gen_S']:.3g}"]
        for name in others:
            cells.append(f"{medians[name] / medians['gen_S']:.3g}" if name in medians else "-")
        rows.append([run, *cells])
    print(markdown(["run", "gen_S", *(f"{name} / gen_S" for name in others)], rows).strip())
    return 0


@torch.inference_mode()
def of_cycle(run: Trained) -> dict[str, float]:
    """Mean of |G_SI(mask) - x| over the validation images, for masks of several kinds."""
    args, model, sums = run.args, run.model.eval(), {}
    if not isinstance(model, CycleGAN):
        raise InputError(f"{run.path}: --method {args.method} has no image cycle")
    data = run.data()
    for x, y in validation_batches(data, args, run.device):
        maps = model.segment(x).softmax(1)
        painted = {
            "softmax map": model.paint(maps),
            "its argmax": model.paint(maps.argmax(1)),
            "true mask": model.paint(y),
            "the image's mean": x.mean((2, 3), keepdim=True).expand_as(x),
        }
        for name, rec_x in painted.items():
            sums[name] = sums.get(name, 0.0) + len(x) * cycle_I(rec_x, x).item()
    return {name: value / len(data.val) for name, value in sums.items()}


def cycle(argv: list[str]) -> int:
    """Print one line per run: the error of the image painted from each kind of mask."""
    parser = Parser("diagnose.py cycle", description=__doc__)
    run_flags(parser)
    own = parser.parse_args(argv)
    found = [of_cycle(run) for run in load_runs(own)]
    rows = []
    for run, errors in zip(own.runs, found, strict=True):
        rows.append([run, *(f"{error:.3f}" for error in errors.values())])
    print(markdown(["run", *found[0]], rows).strip())
    return 0


def diagnose(argv: list[str]) -> int:
    """The command line: terms, cycle or norms."""
    commands = {"terms": terms, "cycle": cycle, "norms": norms}
    usage = "diagnose.py terms RUN... | cycle RUN... | norms [flags]"
    parser = Parser("diagnose.py", usage=usage, description=__doc__)
    parser.add_argument("command", choices=[*commands])
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    sys.exit(program.execute(diagnose))
