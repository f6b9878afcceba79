"""What the method does not define: metrics, checkpoints, seeds, schedule, replay pool, colours, and the errors."""

import fcntl
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

IGNORE = 255  # in every mask tensor: a pixel that neither trains nor counts (VOC's void)
IGNORE_COLOUR = (224, 224, 192)  # as in VOC's own masks
CHECKPOINT_FORMAT = 1
CHECKPOINT_PARTS = {"config": dict, "dataset": dict, "data_root": str, "split": str, "epoch": int, "model": dict}


class InputError(Exception):
    """Wrong flags, configuration or data; main prints it as one `error: ...` line and exits with 2."""


class TrainingError(Exception):
    """A run that cannot go on; main prints it as one `error: ...` line and exits with 1."""


def first_ten(items: Iterable[str]) -> str:
    """'a; b; c', and after ten of them how many more there are."""
    items = list(items)
    return "; ".join(items[:10]) + (f"; and {len(items) - 10} more" if len(items) > 10 else "")


# Metrics (Section 4.2)


class ConfusionMatrix:
    """Counts pixels by (truth, prediction) in an int64 K x K matrix that stays on the device."""

    def __init__(self, n_classes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a batch of class indices; pixels whose truth is IGNORE are left out."""
        k = len(self.counts)
        valid = truth != IGNORE
        # K * K collects the ignored pixels, so that no boolean index has to wait for the device
        index = torch.where(valid, truth.long() * k + prediction, k * k).flatten()
        self.counts += torch.bincount(index, minlength=k * k + 1)[:-1].view(k, k)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _iou(counts: Tensor) -> list[float | None]:
    """TP / (TP + FP + FN) of each class; None for a class in neither truth nor prediction."""
    tp = counts.diag()
    union = counts.sum(0) + counts.sum(1) - tp
    return [t / u if u else None for t, u in zip(tp.tolist(), union.tolist(), strict=True)]


def segmentation_metrics(counts: Tensor, spec) -> dict:
    """Every figure that is reported, from a K x K confusion matrix (rows truth, columns prediction).

    `miou` is Section 4.2: TP / (TP + FP + FN), mean over `spec.scored`; pixels whose truth is `spec.void` are skipped,
    a void predicted on a real class is a miss. `miou_all` takes all K classes, void as one like any other.
    `miou_official` is the released code's: rows and columns of unscored classes are cut out first, so that
    confusions with them cost nothing. A class in neither truth nor prediction is None and stays out of every mean.
    """
    counts = counts.cpu()
    judged = counts.clone()
    if spec.void is not None:
        judged[spec.void] = 0
    tp, support = judged.diag(), judged.sum(0) + judged.sum(1)
    iou = _iou(judged)
    dice = [2 * t / s if s else None for t, s in zip(tp.tolist(), support.tolist(), strict=True)]
    if spec.void is not None:
        iou[spec.void] = dice[spec.void] = None
    total = judged.sum().item()
    keep = torch.tensor(spec.scored)
    return {
        "miou": _mean(iou[k] for k in spec.scored),
        "miou_all": _mean(_iou(counts)),
        "miou_official": _mean(_iou(counts[keep][:, keep])),
        "pixel_accuracy": tp.sum().item() / total if total else None,
        "iou": dict(zip(spec.classes, iou, strict=True)),
        "dice": dict(zip(spec.classes, dice, strict=True)),
    }


def format_means(metrics: dict) -> str:
    """The three means of IoU in a line, side by side."""
    miou, every, released = (metrics[key] or 0 for key in ("miou", "miou_all", "miou_official"))
    return f"mIoU {miou:.4f}, every class {every:.4f}, as released {released:.4f}"


def format_metrics(metrics: dict) -> str:
    """Every class's IoU and Dice, then the means, in per cent; a dash where a class does not occur."""

    def per_cent(value: float | None) -> str:
        return "      -" if value is None else f"{100 * value:7.2f}"

    means = {"mIoU": "miou", "mIoU, every class": "miou_all", "mIoU, as released": "miou_official"}
    means["pixel accuracy"] = "pixel_accuracy"
    width = max(map(len, [*metrics["iou"], *means]))
    lines = [f"{'class':{width}}    IoU   Dice"]
    lines += [f"{name:{width}}{per_cent(v)}{per_cent(metrics['dice'][name])}" for name, v in metrics["iou"].items()]
    return "\n".join([*lines, *(f"{title:{width}}{per_cent(metrics[key])}" for title, key in means.items())])


# Training


def linear_decay(epochs: int, decay_epoch: int) -> Callable[[float], float]:
    """The learning rate's factor by epoch (Section 3.3): 1 until decay_epoch, then linearly to 0 at `epochs`.

    It falls from epoch to epoch: within one it stays.
    """

    def factor(epoch: float) -> float:
        epoch = int(epoch)
        return 1.0 if epoch < decay_epoch else max(0.0, (epochs - epoch) / max(1, epochs - decay_epoch))

    return factor


def poly_decay(epochs: int, _decay_epoch: int = 0) -> Callable[[float], float]:
    """Hung et al.'s: (1 - t / epochs) ** 0.9, where t, in epochs, grows with every step."""
    return lambda epoch: max(0.0, 1 - epoch / epochs) ** 0.9


def no_decay(_epochs: int, _decay_epoch: int = 0) -> Callable[[float], float]:
    """1: the released code's learning rate for Partial."""
    return lambda epoch: 1.0


SCHEDULES = {"linear": linear_decay, "poly": poly_decay, "constant": no_decay}


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch on every device; `deterministic` also makes it choose kernels that repeat bit for bit."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def pick_device(name: str | None, precision: str) -> torch.device:
    """The device of that name, or the GPU where there is one; --precision tf32 lets its float32 products round."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{local_rank()}" if name == "cuda" and world_size() > 1 else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return device


def compile_networks(model: nn.Module) -> None:
    """torch.compile each network in place, for the few shapes that a run has: training's, evaluation's last batch."""
    torch._dynamo.config.cache_size_limit = 64  # the generators share their code, and so its limit of 8 variants
    for network in model.children():
        network.compile(dynamic=False)


def memory_format(channels_last: bool) -> torch.memory_format:
    """How activations lie in memory."""
    return torch.channels_last if channels_last else torch.contiguous_format


class ReplayPool:
    """The released code's buffer of past fakes: each new one is, with probability 1/2, swapped for a stored one.

    A pool of size 0 (the paper) returns what it is given.
    """

    def __init__(self, size: int):
        self.size = size
        self.fakes: list[Tensor] = []

    def __call__(self, batch: Tensor) -> Tensor:
        if self.size == 0:
            return batch
        returned = []
        for fake in batch:
            if len(self.fakes) < self.size:
                self.fakes.append(fake.clone())  # alone: a view would keep its whole batch
            elif torch.rand(()) < 0.5:
                slot = int(torch.randint(self.size, ()))
                fake, self.fakes[slot] = self.fakes[slot], fake.clone()
            returned.append(fake)
        return torch.stack(returned)


# Processes: one, or as many as torchrun starts. Each trains on its part of every batch.


def rank() -> int:
    """This process's number; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine, and that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def meet(device: torch.device) -> None:
    """Connect the processes: gloo for what lies on the CPU, NCCL for what lies on a GPU."""
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def share(count: Tensor) -> Tensor:
    """A count over all processes, at least 1, divided by their number.

    Each process divides its own sum by it: the mean of the quotients is then the mean over all that was counted.
    """
    return total(count).clamp(min=1) / world_size()


def agree(*values: int) -> list[int]:
    """The largest of each value over all processes, so that all of them decide alike."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def from_first(value):
    """Process 0's value, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def from_each(value) -> list:
    """Every process's value, in order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def failure(error: Exception) -> str | None:
    """What a failure of the machine means to who started the run; None for one of the program."""
    signs = "out of memory", "not enough memory", "allocate memory", "size calculation overflow"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        return (
            "out of memory; half of --batch-size or of --size's area needs half, --ngf 32 instead of 64 two thirds, "
            "--precision bf16 three quarters (docs/performance.md)"
        )
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process of this run has ended; the last checkpoint is whole"
    return None


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process of each machine goes through the body alone, the others then."""
    if local_rank():
        agree(0)
    yield
    if not local_rank():
        agree(0)


# Files


def unwritten(path: Path, size: int, error: OSError) -> TrainingError:
    """What to raise where a file of `size` bytes could not be written."""
    need = f"{size / 2**20:.1f} MiB are needed, {shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free"
    return TrainingError(f"{path}: cannot be written ({error.strerror}): {need}; what is on disk is whole")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside, flush to disk, rename: a reader finds the old file or the new one, whole."""
    content = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise unwritten(path, len(content), error) from error
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Create a folder and hold its lock, which ends with this process, however that ends.

    InputError where the folder cannot be written, or where another process holds the lock.
    """
    make_folder(folder, flag)
    path = folder / "lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(file, 200).decode() or "another process"
            os.close(file)
            raise InputError(f"{folder}: {holder} is training there; wait for it, or give --name") from error
        except OSError as error:
            print(f"{folder}: cannot be locked here ({error.strerror}): do not start a second run on it")
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # it was deleted by the one who held it before
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
            folder.rmdir()  # if nothing else is in it
        os.close(file)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint of tensors and plain values: nothing that needs pickle's code to load."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU; InputError where the file is damaged or none of this program's."""
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as records:
            damaged = records.testzip()  # torch writes each record's CRC-32, but does not look at it
        content.seek(0)
        state = None if damaged else torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on hostile bytes
        raise InputError(f"checkpoint {path}: cannot be read as one ({type(error).__name__})") from error
    if damaged:
        raise InputError(f"checkpoint {path}: damaged (its record {damaged})")
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"checkpoint {path}: not one of this program's, format {CHECKPOINT_FORMAT}")
    wrong = [key for key, kind in CHECKPOINT_PARTS.items() if not isinstance(state.get(key), kind)]
    wrong = wrong or [k for k in ("config", "dataset", "model") if not all(type(name) is str for name in state[k])]
    if wrong or not all(isinstance(weight, Tensor) for weight in state["model"].values()):
        raise InputError(f"checkpoint {path}: lacks {first_ten(wrong) or 'weights that are tensors'}")
    return state


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Put saved weights into a network; InputError that lists the differences where they do not fit."""
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in weights.items()}
    if ours != theirs:
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        differences = [f"{key} is {theirs.get(key, 'missing')}, expected {ours.get(key, 'none')}" for key in keys]
        raise InputError(f"{source}: other networks: {first_ten(differences)}")
    network.load_state_dict(weights)


def make_folder(path: Path, flag: str) -> None:
    """Create a folder and check that it can be written; InputError names it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag} {path}: cannot be written ({reason})") from error


class EventLog:
    """TensorBoard's events of a run, each on disk once it is logged.

    tensorboardX's SummaryWriter writes in a thread, which ends at a full disk and leaves the run waiting for ever;
    here the error reaches the caller, as TrainingError. What an earlier process logged from `first_step` on is hidden.
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / "events.out.tfevents"
        try:
            self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        except OSError as error:
            raise unwritten(self.path, 0, error) from error
        if first_step:
            self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._write(Event(step=step, summary=summary.scalar(tag, value)))

    def settings(self, table: dict, metric: str) -> None:
        """The settings, in the text tab and in the hparams table, which compares runs by the curve `metric`."""
        values = {key: value for key, value in table.items() if value is not None}
        rows = [f"| {key} | {value} |" for key, value in values.items()]
        self._write(Event(summary=summary.text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))))
        plain = {k: v if isinstance(v, (str, int, float)) else " ".join(map(str, v)) for k, v in values.items()}
        experiment, session, _end = summary.hparams(plain, {metric: None})
        for part in experiment, session:
            self._write(Event(summary=part))

    def image(self, tag: str, picture: Tensor, step: int) -> None:
        """A picture (3, H, W) in [0, 1]."""
        self._write(Event(step=step, summary=summary.image(tag, picture.numpy())))

    def close(self) -> None:
        """End the file."""
        self.writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        try:
            self.writer.write_event(event)
            self.writer.flush()
        except OSError as error:
            raise unwritten(self.path, event.ByteSize(), error) from error


def to_toml(table: dict) -> str:
    """A flat table of strings, numbers, booleans and (nested) lists as TOML lines; None is left out."""
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in table.items() if v is not None)


def write_manifest(folder: Path, device: torch.device, **more) -> None:
    """Add to manifest.json: the command, its versions, device and commit, and what else is said."""
    path = folder / "manifest.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a checkout, or no git
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    now = {"command": " ".join(sys.argv), "device": str(device), "gpu": gpu, "commit": commit}
    now |= {name: version(name) for name in ("torch", "torchvision", "numpy")}
    now |= {"python": platform.python_version(), "platform": platform.platform()}
    write_atomically(path, json.dumps({**before, **now, **more}, indent=1))


# Colour


def voc_palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """VOC's colours of the first n classes: bits 0, 1, 2 of an index become the highest of R, G, B, and so on."""

    def colour(k: int) -> tuple[int, int, int]:
        return tuple(sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))

    return tuple(map(colour, range(n)))


def flat_palette(palette: tuple[tuple[int, int, int], ...]) -> list[int]:
    """256 RGB triples in a row: the classes' colours, black, and IGNORE's colour last."""
    colours = [*palette, *[(0, 0, 0)] * (255 - len(palette)), IGNORE_COLOUR]
    return [value for colour in colours for value in colour]


def save_mask(path: Path, mask: Tensor, palette: tuple[tuple[int, int, int], ...] | None) -> None:
    """Write an (H, W) mask as a PNG whose pixel values are the mask's: indexed, or grey without a palette."""
    image = Image.fromarray(mask.to("cpu", torch.uint8).numpy())
    if palette:
        image.putpalette(flat_palette(palette))
    image.save(path)


def save_overlay(path: Path, picture: Tensor, mask: Tensor, palette: tuple[tuple[int, int, int], ...]) -> None:
    """Write a picture (C, H, W) of any range with its mask (H, W) over it, half transparent but for the first class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, mask = picture.float().cpu(), mask.cpu()
    low, high = (0, 255) if picture.dtype == torch.uint8 else (x.min(), x.max().clamp(min=x.min() + 1e-12))
    shown = ((x - low) / (high - low)).expand(3, -1, -1)
    save_image(torch.where(mask > 0, (shown + colourize(mask[None], palette)[0]) / 2, shown), path)


def colourize(mask: Tensor, palette: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Masks (B, H, W) to colours (B, 3, H, W) in [0, 1]."""
    table = torch.tensor(flat_palette(palette), device=mask.device).view(256, 3) / 255
    return table[mask.long()].permute(0, 3, 1, 2)


def picture_grid(x: Tensor, columns: dict[str, Tensor], palette: tuple[tuple[int, int, int], ...]) -> Tensor:
    """A row for each image of x, a titled column for x and each of `columns`; (3, height, width) in [0, 1].

    Columns are masks (B, H, W) or images (B, C, H, W) on x's scale: x's own range is shown from black to white.
    """
    darkest, brightest = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    reach = torch.where(brightest > darkest, brightest - darkest, 1)

    def show(picture: Tensor) -> Tensor:
        if picture.dim() == 3:
            return colourize(picture, palette)
        return ((picture - darkest) / reach).clamp(0, 1).expand(-1, 3, -1, -1)

    pictures = [show(picture).float().cpu() for picture in (x, *columns.values())]
    grid = make_grid(torch.stack(pictures, 1).flatten(0, 1), nrow=len(pictures), padding=2, pad_value=1.0)
    width = x.shape[-1] + 2
    font = ImageFont.load_default(min(20, max(8, width // 8)))
    titles = Image.new("RGB", (grid.shape[-1], int(1.5 * font.size)), "white")
    for i, title in enumerate(("x", *columns)):
        ImageDraw.Draw(titles).text((2 + i * width, 0), title, "black", font)
    return torch.cat([pil_to_tensor(titles) / 255, grid], 1)
