"""Time a training step, beside a plain step that calls each generator image set by image set, in the same process.

    python tools/benchmark.py --rounds 10 --dataset acdc --size 64 64 --ngf 16
    python tools/benchmark.py --rounds 1 --plain 0 --dataset voc        (one full-size step, and its peak memory)

All other flags are main.py's. Both steps see the same batches in turn; the ratio is taken round by round.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import main
import utils
from data_utils import DatasetSpec, load_spec
from model import METHODS, CycleGAN, cycle_I, cycle_S, fool, frozen, gen_I, gen_S


class PlainCycleGAN(CycleGAN):
    """The same terms with a generator call an image set: the five that Eq. 8 needs, or the released code's six."""

    six_calls = True

    def generator_terms(self, x: Tensor, y: Tensor, x_u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fake_x = self.paint(y)
        fake_y = self.segment(x_u).softmax(1)
        logits = self.segment(x)
        rec_x_u = self.paint(fake_y)
        if self.six_calls:
            self.paint(logits.softmax(1))  # the released code repaints the labeled image too, and does not use it
        rec_logits = self.segment(fake_x)
        terms = {"gen_S": gen_S(logits, y), "gen_I": gen_I(fake_x, x), "cycle_S": cycle_S(rec_logits, y)}
        terms["cycle_I"] = cycle_I(rec_x_u, x_u)
        with frozen(self.D_S, self.D_I):
            terms |= {"disc_S": fool(self.D_S(fake_y)), "disc_I": fool(self.D_I(fake_x))}
        return terms, {"y": fake_y, "x": fake_x}


def random_batch(args: argparse.Namespace, spec: DatasetSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise in the shapes of a training step: (x, y, x_u)."""
    x, x_u = torch.rand(2, args.batch_size, spec.channels, *args.size, device=device) - 0.5
    return x, torch.randint(len(spec.classes), (args.batch_size, *args.size), device=device), x_u


def seconds(step: Callable, batch: tuple[Tensor, Tensor, Tensor], device: torch.device) -> float:
    """Wall time of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step(*batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """GiB: the most that the GPU held, or on the CPU that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def benchmark(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--plain", type=int, default=6, choices=[0, 5, 6], help="generator calls of the plain step")
    ours, rest = parser.parse_known_args(argv)
    args = main.parse_args(["--training", *rest])
    device = utils.pick_device(args.device, args.precision)
    spec = load_spec(args.dataset)
    steps = []
    for method in [METHODS[args.method]] + [PlainCycleGAN] * bool(ours.plain):
        utils.seed_everything(args.seed)
        model = method(spec, args).to(device, memory_format=utils.memory_format(args.channels_last))
        if args.compile:
            for network in model.children():
                network.compile()
        model.six_calls = ours.plain == 6
        steps.append(model.step)
    times: list[list[float]] = []
    for _ in range(ours.warmup + ours.rounds):
        batch = random_batch(args, spec, device)
        times.append([seconds(step, batch, device) for step in steps])
    times = times[ours.warmup :]
    setting = f"{spec.name} {args.size[0]}x{args.size[1]}, ngf {args.ngf}, batch {args.batch_size}, {args.precision}"
    print(f"{args.method}, {setting}, on {device} with {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"median of {ours.rounds} steps: {statistics.median(t[0] for t in times):.3f} s")
    if ours.plain:
        ratios = [plain / step for step, plain in times]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"plain step of {ours.plain} generator calls: {statistics.median(ratios):.3f} times as long ({spread})")
    print(f"peak memory: {peak_memory(device):.2f} GiB")


if __name__ == "__main__":
    benchmark(sys.argv[1:])
