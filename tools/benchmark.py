"""Time training steps against plain ones, or count their operations.

    python tools/benchmark.py --dataset acdc --size 64 64 --ngf 16             two CPU cores
    python tools/benchmark.py --dataset voc --options fp32 tf32 bf16+compile   a GPU, full size
    python tools/benchmark.py --dataset voc --options bf16 --rounds 0          memory only
    python tools/benchmark.py --dataset voc --count                            without a GPU

All other flags are main.py's. A plain step is like the released code's: eager, fp32, with separate
generator calls for each input. "plain tf32" is PyTorch's default on GPUs, TF32 in convolutions.
Steps are timed alternately. Ratios are between medians, with extremes over rounds in parentheses.
"""

import argparse
import copy
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, to handle signals during them
    from engine import signals

    signals.install()

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
import utils
from datasets.spec import load_spec
from engine import program
from engine.flags import Flags, Parser, bounded, parse_args


class PlainCycleGAN(model.CycleGAN):
    """The same terms with the released code's six generator calls, one of which it does not use."""

    def generator_terms(self, x: Tensor, y: Tensor, x_u: Tensor) -> tuple[dict, dict]:
        logits, fake_y = self.G_IS(x), self.G_IS(x_u).softmax(1)
        fake_x = self.G_SI(model.one_hot(y, logits.shape[1], x.dtype))
        self.G_SI(logits.softmax(1))  # the unused one
        terms = {
            "gen_S": model.gen_S(logits, y),
            "gen_I": model.gen_I(fake_x, x),
            "cycle_S": model.cycle_S(self.G_IS(fake_x), y),
            "cycle_I": model.cycle_I(self.G_SI(fake_y), x_u),
        }
        with model.frozen(self.D_S, self.D_I):
            terms["disc_S"] = model.fool(self.D_S(fake_y))
            terms["disc_I"] = model.fool(self.D_I(fake_x))
        return terms, {"y": fake_y, "x": fake_x}


class OperationCounter(TorchDispatchMode):
    """Count operations on tensors, without views and allocations, and the bytes that they move.

    Bytes are the sizes of all tensors that an operation takes and returns.
    """

    operations = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.operations += 1
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


class Step:
    """A method's training step on random images; `option` is PRECISION[+compile]."""

    def __init__(self, run: Flags, option: str, plain: bool = False):
        self.args = args = copy.copy(run)
        args.precision, plus, _ = option.partition("+")
        args.compile = bool(plus)
        self.spec = spec = load_spec(args.dataset)
        self.device = utils.pick_device(args.device, args.precision)
        utils.seed_everything(args.seed, args.deterministic)
        method = model.METHODS[args.method]
        if plain and args.method == "cyclegan":
            method = PlainCycleGAN
        self.model = model.move(method.from_args(spec, args), self.device)
        self.model.progress = 1.0  # of the run: all terms are on
        if args.compile:
            utils.compile_networks(self.model)
        shape = args.batch_size, spec.channels, *args.size
        x, x_u = (torch.rand(shape, device=self.device) - 0.5 for _ in range(2))
        y = torch.randint(len(spec.classes), (args.batch_size, *args.size), device=self.device)
        self.batch = x, y, x_u

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, steps: int = 1) -> float:
        """Wall time per step, including the device's work."""
        tf32 = self.args.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.model.step(*self.batch)
        self.wait()
        return (time.perf_counter() - start) / steps

    def count(self) -> dict[str, float]:
        """Operations, GB moved and TFLOP of convolutions and products of a step, on the CPU."""
        self.seconds()  # creates the optimizers' state
        with FlopCounterMode(display=False) as flops, OperationCounter() as counter:
            self.seconds()
        tflop = flops.get_total_flops() / 1e12
        return {"operations": counter.operations, "GB moved": counter.bytes / 1e9, "TFLOP": tflop}

    def peak(self) -> float:
        """GiB that a step needs: on a GPU what it allocates, else the memory of this process."""
        self.seconds()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.seconds()
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        Path("/proc/self/clear_refs").write_text("5")
        self.seconds()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def take_turns(args: argparse.Namespace, *steps: Step) -> list[dict]:
    """Time steps in turn: median ms, its ratio to the first step's, and extremes over rounds."""
    times = []
    for _ in range(args.warmup + args.rounds):
        times.append([1000 * step.seconds(args.steps) for step in steps])
    columns = [*zip(*times[args.warmup :], strict=True)]
    rows = []
    for column in columns:
        ms = statistics.median(column)
        ratios = sorted(ms / first for ms, first in zip(column, columns[0], strict=True))
        ratio = ms / statistics.median(columns[0])
        rows.append({"ms": ms, "ratio": ratio, "low": ratios[0], "high": ratios[-1]})
    return rows


def time_options(args: argparse.Namespace, run: Flags) -> Iterator[dict]:
    """Each option's step, and plain ones in turn with it."""
    for option in args.options:
        gc.collect()  # the option before: a method's sides refer to it, so `del` leaves it
        step = Step(run, option)
        row = {"option": option, "peak GiB": step.peak()}
        if args.rounds:
            plain = ["fp32", "tf32"] if step.device.type == "cuda" else ["fp32"]
            plain_steps = [Step(run, precision, plain=True) for precision in plain]
            own, *others = take_turns(args, step, *plain_steps)
            row |= {"ms": own["ms"], "images/s": 1000 * step.args.batch_size / own["ms"]}
            row |= {f"speedup over plain {name}": None for name in ("fp32", "tf32")}
            for name, other in zip(plain, others, strict=True):
                row[f"speedup over plain {name}"] = other
            del plain_steps
        del step
        yield row


def count_options(args: argparse.Namespace, run: Flags) -> Iterator[dict]:
    """Operations of a plain step and of each option."""
    yield {"step": "plain fp32", **Step(run, "fp32", plain=True).count()}
    for option in args.options:
        yield {"step": option, **Step(run, option).count()}


def text(value: str | float | dict | None) -> str:
    """Format a table's cell."""
    if isinstance(value, dict):
        return f"{value['ratio']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value or "n/a"


def benchmark(argv: list[str]) -> int:
    """Print a table, row by row, and write it to --json."""
    parser = Parser("benchmark.py", usage="benchmark.py [flags]", description=__doc__)
    flag, count = parser.add_argument, bounded(int, 0)
    flag("--options", nargs="+", default=["fp32", "bf16"], help="fp32, tf32 or bf16[+compile]")
    flag("--count", action="store_true", help="count operations on the CPU instead of timing")
    flag("--rounds", type=count, default=10, metavar="N", help="timed rounds; 0: memory only")
    flag("--warmup", type=count, default=2, metavar="N", help="warm-up rounds")
    flag("--steps", type=bounded(int, 1), default=1, metavar="N", help="steps per round")
    flag("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    args, argv = parser.parse_known_args(argv)
    if args.count and "+compile" in " ".join(args.options):
        raise utils.InputError("--count: operations of compiled networks cannot be counted")
    for option in args.options:
        if not re.fullmatch(r"(fp32|tf32|bf16)(\+compile)?", option):
            raise utils.InputError(f"--options {option}: expected fp32, tf32 or bf16[+compile]")
    run = parse_args(["--training", *argv])
    utils.check_single_process()
    if args.json:
        utils.check_output(args.json, "--json")
    if args.count:
        run.device = "cpu"
    device = utils.pick_device(run.device, run.precision)
    machine = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    size = f"{run.size[0]}x{run.size[1]}, ngf {run.ngf}, batches of {run.batch_size}"
    title = f"{run.method}, {run.dataset} {size}; {machine}, torch {torch.__version__}"
    print(title)
    rows = []
    table = count_options if args.count else time_options
    for row in table(args, run):
        if not rows:
            print(f"\n| {' | '.join(row)} |\n|{' --- |' * len(row)}")
        print(f"| {' | '.join(map(text, row.values()))} |", flush=True)
        rows.append(row)
    if args.json:
        result = json.dumps({"title": title, "rounds": args.rounds, "rows": rows}, indent=1)
        utils.write_atomically(args.json, f"{result}\n")
    return 0


if __name__ == "__main__":
    sys.exit(program.execute(benchmark))
