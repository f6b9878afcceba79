"""Metrics, learning-rate schedule, devices, processes, checkpoint files, errors."""

import codecs
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

IGNORE = 255  # in every mask tensor: a pixel that neither trains nor counts (VOC's void)
CHECKPOINT_FORMAT = 2
CHECKPOINT_PARTS = {
    "settings": dict,
    "dataset": dict,
    "data_root": str,
    "split": str,
    "epoch": int,
    "model": dict,
}


class InputError(Exception):
    """Invalid flags, configuration or data; main prints one `error: ...` line and exits with 2."""


class TrainingError(Exception):
    """A run that cannot continue; main prints one `error: ...` line and exits with 1."""


class NonFiniteLoss(ArithmeticError):
    """A loss is infinite or NaN; the message gives the terms."""


def first_ten(items: Iterable[str]) -> str:
    """'a; b; c', and after ten items the number of the others."""
    items = list(items)
    more = f"; and {len(items) - 10} more" if len(items) > 10 else ""
    return "; ".join(items[:10]) + more


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark, lines ended by a newline.

    InputError names a file that cannot be read or that has another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or content.count(0) > len(content) / 4:
        raise InputError(f"{path}: UTF-16 or not text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"line {line} has the byte 0x{content[error.start]:02x}, which is not UTF-8"
        raise InputError(f"{path}: {found}; save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without blanks around them, except empty ones; see read_text."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


# Metrics (Section 4.2)


class ConfusionMatrix:
    """Count pixels by (truth, prediction) in an int64 K x K matrix that stays on the device."""

    def __init__(self, n_classes: int, device: torch.device | str = "cpu"):
        # the last count collects the ignored pixels: no index has to wait for the device
        self.flat = torch.zeros(n_classes**2 + 1, dtype=torch.int64, device=device)
        self.counts = self.flat[:-1].view(n_classes, n_classes)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a batch of class indices; pixels whose truth is IGNORE do not count."""
        k = len(self.counts)
        index = torch.where(truth != IGNORE, truth.long() * k + prediction, k * k).flatten()
        self.flat.scatter_add_(0, index, torch.ones_like(index))


OTHER_MEANS = {"miou_all": "every class", "miou_official": "as released"}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _iou(counts: Tensor) -> list[float | None]:
    """TP / (TP + FP + FN) of each class; None for a class in neither truth nor prediction."""
    tp = counts.diag()
    union = counts.sum(0) + counts.sum(1) - tp
    return [t / u if u else None for t, u in zip(tp.tolist(), union.tolist(), strict=True)]


def segmentation_metrics(counts: Tensor, spec) -> dict:
    """All reported metrics, from a K x K confusion matrix (rows truth, columns prediction).

    miou: Section 4.2, the mean of TP / (TP + FP + FN) over `spec.scored`. Pixels whose truth is
        `spec.void` are skipped; a void predicted on a real class is a miss.
    miou_all: the mean over all K classes, void being one like any other.
    miou_official: the released code's. Rows and columns of unscored classes are cut out first, so
        confusions with them cost nothing.
    miou_foreground, dice_foreground: the means over spec.structures(), if background is scored.
    constant: the class that is predicted for every pixel, if it is one alone.

    Pixels are pooled over all images, in Dice as well. A class in neither truth nor prediction is
    None and enters no mean.
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
    structures, foreground = spec.structures(), {}
    if len(structures) < len(spec.scored):
        foreground["miou_foreground"] = _mean(iou[k] for k in structures)
        foreground["dice_foreground"] = _mean(dice[k] for k in structures)
    predicted = counts.sum(0).nonzero().flatten().tolist()
    return {
        "miou": _mean(iou[k] for k in spec.scored),
        "miou_all": _mean(_iou(counts)),
        "miou_official": _mean(_iou(counts[keep][:, keep])),
        **foreground,
        "pixel_accuracy": tp.sum().item() / total if total else None,
        "constant": spec.classes[predicted[0]] if len(predicted) == 1 else None,
        "iou": dict(zip(spec.classes, iou, strict=True)),
        "dice": dict(zip(spec.classes, dice, strict=True)),
    }


def format_means(metrics: dict) -> str:
    """The mean IoU on one line, with the others where they differ, and a warning."""
    line = f"mIoU {metrics['miou'] or 0:.4f}"
    for key, title in OTHER_MEANS.items():
        if metrics.get(key, metrics["miou"]) != metrics["miou"]:
            line += f", {title} {metrics[key] or 0:.4f}"
    if name := metrics.get("constant"):
        line += f", predicts {name} alone"
    return line


def format_metrics(metrics: dict) -> str:
    """A table of IoU and Dice by class, then the means, in %; a dash for an absent class."""

    def row(title: str, *values: float | None) -> str:
        cells = ("-" if value is None else f"{100 * value:.2f}" for value in values)
        return f"{title:{width}}" + "".join(map(str.rjust, cells, (7, 15)))

    others = {
        f"mIoU, {title}": metrics.get(key, metrics["miou"]) for key, title in OTHER_MEANS.items()
    }
    width = max(map(len, [*metrics["iou"], *others]))
    lines = [f"{'class':{width}}    IoU  Dice (pooled)"]
    lines += [row(name, iou, metrics["dice"][name]) for name, iou in metrics["iou"].items()]
    lines.append(row("mIoU", metrics["miou"]))
    if "dice_foreground" in metrics:
        means = metrics["miou_foreground"], metrics["dice_foreground"]
        lines.append(row("without background", *means))
    lines += [row(title, value) for title, value in others.items() if value != metrics["miou"]]
    lines.append(row("pixel accuracy", metrics["pixel_accuracy"]))
    if name := metrics.get("constant"):
        miou = metrics["miou"] or 0
        lines.append(f"predicts {name} alone: mIoU {miou:.3f} is what that scores")
    return "\n".join(lines)


# Training


def linear_decay(epochs: int, decay_epoch: int) -> Callable[[float], float]:
    """The learning rate's factor by epoch (Section 3.3), constant within an epoch.

    1 until decay_epoch, then linearly to 0 at `epochs`.
    """

    def factor(epoch: float) -> float:
        if epoch < decay_epoch:
            return 1.0
        return max(0.0, (epochs - int(epoch)) / max(1, epochs - decay_epoch))

    return factor


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch on every device; `deterministic` also selects kernels that repeat bit for bit."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic  # all batches have one size
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def pick_device(name: str | None, precision: str) -> torch.device:
    """The device of that name, by default a GPU if there is one; sets the precision of products."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{local_rank()}" if name == "cuda" else name  # set_device needs the number
    try:
        device = torch.device(name)
        if device.type == "cuda":  # otherwise every process also opens a context on GPU 0
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return device


def compile_networks(model: nn.Module) -> None:
    """torch.compile each network in place, for the few input shapes of a run."""
    torch._dynamo.config.cache_size_limit = 64  # both generators share their code and its limit
    for network in model.children():
        network.compile(dynamic=False)


# Processes: one, or as many as torchrun starts. Each trains on its share of every batch.


def rank() -> int:
    """This process's number; process 0 writes and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join_processes(device: torch.device) -> None:
    """Connect the processes: gloo for tensors on the CPU, NCCL for those on a GPU."""
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def share(count: Tensor) -> Tensor:
    """A count over all processes (at least 1), divided by their number.

    Each process divides its own sum by it; the mean of the quotients is the overall mean.
    """
    return total(count).clamp(min=1) / world_size()


def agree(*values: int) -> list[int]:
    """The maximum of each value over all processes, so that all of them decide alike."""
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


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the body on the first process of each machine, then on the others."""
    if local_rank():
        agree(0)
    yield
    if not local_rank():
        agree(0)


def failure(error: Exception) -> str | None:
    """A message for a failure of the machine; None for a bug in the program."""
    signs = "out of memory", "not enough memory", "allocate memory", "size calculation overflow"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        return (
            "out of memory; in training, half the --batch-size or half the area of --size needs "
            "half of it, --ngf 32 instead of 64 two thirds, --precision bf16 three quarters"
        )
    if str(error).startswith("DataLoader worker (pid"):
        advice = "if it ran out of memory, give fewer --workers; checkpoints are intact"
        return f"a process that loads images ended: {str(error).partition('. ')[0]}; {advice}"
    if "InvalidCxxCompiler" in str(error) or "Failed to find C compiler" in str(error):
        return "--compile: found no C++ compiler; install g++, or train without --compile"
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"the connection between the processes failed ({reason}); checkpoints are intact"
    return None


# Files


def reason(error: Exception) -> str:
    """What went wrong, in one line; the last one of an error from a worker process."""
    return getattr(error, "strerror", None) or str(error).strip().rpartition("\n")[2]


def unwritten(path: Path, size: int, error: OSError) -> TrainingError:
    """The error for a file of `size` bytes that could not be written."""
    free = shutil.disk_usage(path.parent).free / 2**20
    need = f"{size / 2**20:.1f} MiB are needed, {free:.1f} MiB are free"
    found = f"cannot be written ({reason(error)}): {need}"
    return TrainingError(f"{path}: {found}; files already on disk are intact")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file; readers find either the old content or the new, never a part."""
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritten(path, len(content), error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_folder_name(name: str) -> bool:
    """Whether a text names one visible folder, and is not a path."""
    return bool(name) and name == Path(name).name and name[0] != "." and name.isprintable()


def make_folder(path: Path, flag: str) -> None:
    """Create a folder and check that it is writable; InputError names it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag} {path}: cannot be written ({reason})") from error


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint of tensors and plain values; loading it runs no code from the file."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def checkpoint_file(path: str) -> Path:
    """A checkpoint, or a run folder's best.pt."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU; InputError if it is damaged or not from this program."""
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as records:
            damaged = records.testzip()  # torch writes each record's CRC-32 but does not check it
        content.seek(0)
        state = None if damaged else torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on hostile bytes
        reason = f"not a readable checkpoint ({type(error).__name__})"
        raise InputError(f"checkpoint {path}: {reason}") from error
    if damaged:
        raise InputError(f"checkpoint {path}: damaged (record {damaged})")
    if isinstance(state, dict) and state.get("format") == 1:
        advice = "use the version of this program that wrote it, or train again"
        raise InputError(f"checkpoint {path}: from an earlier version (format 1); {advice}")
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            f"checkpoint {path}: not from this program (expected format {CHECKPOINT_FORMAT})"
        )
    if isinstance(state.get("dataset"), dict) and "any_orientation" in state["dataset"]:
        _rename_orientation(state)
    wrong = [key for key, kind in CHECKPOINT_PARTS.items() if not isinstance(state.get(key), kind)]
    for key in [] if wrong else ("settings", "dataset", "model"):
        wrong += [key] * any(type(name) is not str for name in state[key])
    if wrong or not all(isinstance(weight, Tensor) for weight in state["model"].values()):
        lacking = first_ten(wrong) or "weights that are tensors"
        raise InputError(f"checkpoint {path}: lacks {lacking}")
    return state


def _rename_orientation(state: dict) -> None:
    """Give a checkpoint of the time before --augment the keys of today."""
    turned = state["dataset"].pop("any_orientation") is True
    state["dataset"]["orientation"] = "any" if turned else "fixed"
    if isinstance(settings := state.get("settings"), dict):  # meanteacher turned its own images
        augmented = turned and settings.get("method") == "meanteacher"
        state["settings"] = {"augment": augmented, "reduction": "mean", **settings}


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Load saved weights into a network; InputError lists what does not fit."""
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in weights.items()}
    differences = [
        f"{key} is {theirs.get(key, 'missing')}, expected {ours.get(key, 'none')}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise InputError(f"{source}: does not fit the networks: {first_ten(differences)}")
    network.load_state_dict(weights)
