"""Time a training step, each option beside a plain step in the same process; the loader alone; the evaluation alone.

    python tools/benchmark.py --dataset acdc --size 64 64 --ngf 16                             two CPU cores, small
    python tools/benchmark.py --dataset voc --options fp32 tf32 bf16 bf16+compile --json FILE  a GPU, full size
    python tools/benchmark.py --dataset voc --rounds 1 --warmup 0 --plain 0 --parts step       memory alone

All other flags are main.py's. The plain step is eager fp32 with a generator call an image set, as the released code
runs it. Both steps see the same batch in turn, and the ratio is taken round by round.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import main
import utils
from data_utils import Cache, DatasetSpec, Epoch, Stored, batches, load_spec
from model import METHODS, CycleGAN, cycle_I, cycle_S, fool, frozen, gen_I, gen_S

PARTS = ("step", "loader", "evaluation")


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


def with_option(args: argparse.Namespace, option: str) -> argparse.Namespace:
    """The settings under an option: precision, then "+compile" and "+channels-last" as wanted."""
    precision, *more = option.split("+")
    if precision not in ("fp32", "tf32", "bf16") or {*more} - {"compile", "channels-last"}:
        raise utils.InputError(f"--options {option}: expected fp32, tf32 or bf16, then +compile, +channels-last")
    changes = {"precision": precision, "compile": "compile" in more, "channels_last": "channels-last" in more}
    return argparse.Namespace(**{**vars(args), **changes})


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable, device: torch.device) -> float:
    """Wall time of an action, the device's work included."""
    wait(device)
    start = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - start


def forget_peak(device: torch.device) -> None:
    """Let peak_memory count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB: the most that the GPU held, or on the CPU that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(held.split()[1]) / 2**20


def ceiling(precision: str, device: torch.device) -> float:
    """TFLOP/s of a large matrix product: the best of ten."""
    utils.pick_device(str(device), precision)
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10)) / 1e12


def random_batch(args: argparse.Namespace, spec: DatasetSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise in the shapes of a training step: (x, y, x_u)."""
    x, x_u = torch.rand(2, args.batch_size, spec.channels, *args.size, device=device) - 0.5
    layout = utils.memory_format(args.channels_last)
    y = torch.randint(len(spec.classes), (args.batch_size, *args.size), device=device)
    return x.contiguous(memory_format=layout), y, x_u.contiguous(memory_format=layout)


def build(method: Callable, args: argparse.Namespace, spec: DatasetSpec, device: torch.device):
    """A method's networks, as a run makes them."""
    utils.seed_everything(args.seed)
    model = method(spec, args).to(device, memory_format=utils.memory_format(args.channels_last))
    model.progress = 1.0
    return model


def count_flops(args: argparse.Namespace, spec: DatasetSpec, device: torch.device) -> int:
    """Floating-point operations of a step's convolutions, forward and backward, two a multiplication with its sum."""
    model = build(METHODS[args.method], args, spec, device)
    with FlopCounterMode(display=False) as counter:
        model.step(*random_batch(args, spec, device))
    return counter.get_total_flops()


def time_steps(option: str, ours: argparse.Namespace, args: argparse.Namespace, spec: DatasetSpec, device) -> dict:
    """One option's step beside the plain one: seconds, images, ratio, peak memory."""
    settings, plain_settings = with_option(args, option), with_option(args, "fp32")
    pairs = [(build(METHODS[args.method], settings, spec, device), settings)]
    if settings.compile:
        utils.compile_networks(pairs[0][0])
    if ours.plain:
        pairs.append((build(PlainCycleGAN, plain_settings, spec, device), plain_settings))
        pairs[1][0].six_calls = ours.plain == 6
    times: list[list[float]] = []
    for _ in range(ours.warmup + ours.rounds):
        times.append([])
        for model, how in pairs:
            batch = random_batch(how, spec, device)
            utils.pick_device(str(device), how.precision)
            times[-1].append(seconds(lambda model=model, batch=batch: model.step(*batch), device))
    times = times[ours.warmup :]
    del pairs[1:], model
    forget_peak(device)
    utils.pick_device(str(device), settings.precision)
    pairs[0][0].step(*random_batch(settings, spec, device))
    step = statistics.median(t[0] for t in times)
    row = {"option": option, "seconds": step, "images_per_s": args.batch_size / step, "peak_gib": peak_memory(device)}
    if ours.plain:
        ratios = [plain / own for own, plain in times]
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return row


def noise(args: argparse.Namespace, spec: DatasetSpec, folder: Path) -> tuple[Stored, Stored]:
    """400 labeled and unlabeled images of noise in a cache on disk, as open_cache leaves one, memory-mapped."""
    n, rng = 400, np.random.default_rng(0)
    kind = np.float32 if spec.layout == "acdc" else np.uint8
    np.save(folder / "images.npy", rng.integers(0, 255, (n, spec.channels, *args.size)).astype(kind))
    np.save(folder / "masks.npy", rng.integers(0, len(spec.classes), (n, *args.size)).astype(np.uint8))
    images, masks = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "masks"))
    cache = Cache(images, masks, {})
    return Stored(cache, list(range(n // 2))), Stored(cache, list(range(n // 2, n)))


def time_loader(args: argparse.Namespace, labeled: Stored, unlabeled: Stored, device: torch.device) -> dict:
    """Batches alone, as training takes them: images of each kind a second, over ten epochs at once."""
    epochs = torch.utils.data.ConcatDataset([Epoch(labeled, unlabeled, 0, e, args.batch_size) for e in range(10)])
    how = args.batch_size, device, args.workers, args.channels_last, args.normalization
    waiting = batches(epochs, *how)
    next(waiting)  # the worker processes have started
    took = seconds(lambda: deque(waiting, maxlen=0), device)
    return {"images_per_s": (len(epochs) - args.batch_size) / took, "workers": args.workers}


def time_evaluation(args: argparse.Namespace, spec: DatasetSpec, data: Stored, device: torch.device) -> dict:
    """An evaluation alone, from the loader to the confusion matrix: images a second."""
    data.rows = data.rows[: 20 * args.batch_size]
    model = build(METHODS[args.method], args, spec, device)
    how = args.batch_size, device, args.workers, args.channels_last, args.normalization
    took = seconds(lambda: main.evaluate(model, batches(data, *how), spec, device), device)
    return {"images_per_s": len(data) / took}


def benchmark(argv: list[str]) -> int:
    """Everything that was asked for: printed, and written to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=["fp32", "bf16"], help="PRECISION[+compile][+channels-last]")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--plain", type=int, default=6, choices=[0, 5, 6], help="generator calls of the plain step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    ours, rest = parser.parse_known_args(argv)
    args = main.parse_args(["--training", *rest])
    device, spec = utils.pick_device(args.device, args.precision), load_spec(args.dataset)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    size = f"{args.size[0]}x{args.size[1]}"
    result = {
        "command": " ".join(["python tools/benchmark.py", *argv]),
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "setting": f"{args.method}, {spec.name} {size}, ngf {args.ngf}, batch {args.batch_size}",
        "plain_calls": ours.plain,
        "rounds": ours.rounds,
        "steps": [],
    }
    print(f"{result['setting']}; {name}, torch {torch.__version__}", flush=True)
    if "step" in ours.parts:
        result["tflop"] = count_flops(with_option(args, "fp32"), spec, device) / 1e12
        print(f"{result['tflop']:.4g} TFLOP a step; median of {ours.rounds} rounds\n")
        print("| option | ms | images/s | TFLOP/s | of the ceiling | peak GiB | plain step, times as long |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for option in ours.options:
            row = time_steps(option, ours, args, spec, device)
            row["tflop_per_s"] = result["tflop"] / row["seconds"]
            row["ceiling"] = ceiling(option.split("+")[0], device)
            result["steps"].append(row)
            rate = f"{row['images_per_s']:.3g} | {row['tflop_per_s']:.3g}"
            share = f"{row['tflop_per_s'] / row['ceiling']:.0%} of {row['ceiling']:.3g}"
            ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})" if ours.plain else "-"
            cells = f"{1000 * row['seconds']:.3g} | {rate} | {share} | {row['peak_gib']:.2f} | {ratio}"
            print(f"| {option} | {cells} |", flush=True)
        print()
    with tempfile.TemporaryDirectory() as folder:
        if {"loader", "evaluation"} & {*ours.parts}:
            labeled, unlabeled = noise(args, spec, Path(folder))
        if "loader" in ours.parts:
            result["loader"] = time_loader(args, labeled, unlabeled, device)
            fastest = max((row["images_per_s"] for row in result["steps"]), default=None)
            times = f", {result['loader']['images_per_s'] / fastest:.1f} times the fastest step's" if fastest else ""
            print(f"loader alone: {result['loader']['images_per_s']:.0f} images of each kind a second{times}")
        if "evaluation" in ours.parts:
            result["evaluation"] = time_evaluation(args, spec, unlabeled, device)
            print(f"evaluation alone: {result['evaluation']['images_per_s']:.0f} images a second")
    if ours.json:
        utils.write_atomically(ours.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main.main(command=benchmark))
