"""Errors that name files; devices; processes; the learning rate; atomic writes."""

import codecs
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = 60  # seconds to wait for another process: a holder of a folder, a worker, git
IGNORE = 255  # in every mask tensor: a pixel that neither trains nor counts (VOC's void)


class OneLine(Exception):
    """An error that is printed as one line.

    alone: other processes may not have it, so each one prints its own.
    """

    def __init__(self, message: str = "", alone: bool = False):
        super().__init__(message)
        self.alone = alone


class InputError(OneLine):
    """Invalid flags, configuration or data: one `error: ...` line, exit code 2."""


class TrainingError(OneLine):
    """A failure while running: full disk, diverged loss, unreadable file; one line, exit code 1."""


class NonFiniteLoss(ArithmeticError):
    """A loss is infinite or NaN; the message gives the terms."""


def first_ten(items: Iterable[str]) -> str:
    """'a; b; c', and after ten items the number of the others."""
    items = list(items)
    more = f"; and {len(items) - 10} more" if len(items) > 10 else ""
    return "; ".join(items[:10]) + more


def counted(n: int, noun: str) -> str:
    """'1 epoch', '1,200 epochs'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn exceptions other than InputError and MemoryError into an InputError naming the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        found = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise InputError(f"{path}: {found.splitlines()[0]}") from error


def is_file(path: Path) -> bool:
    """Whether a path is a file; InputError if its name is longer than file systems allow."""
    with naming(path):
        return path.is_file()


def check_regular(path: Path) -> None:
    """InputError if a path exists but is no regular file: a pipe would block its reader."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark, lines ended by a newline.

    InputError names a file that cannot be read or that has another encoding.
    """
    try:
        if not path.is_dir():  # which has an error of its own
            check_regular(path)
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
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def pick_device(name: str | None, precision: str) -> torch.device:
    """The device of that name, by default a GPU if there is one.

    Sets the precision of matrix products and convolutions.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{local_rank()}" if name == "cuda" else name  # set_device needs the number
    try:
        device = torch.device(name)
        if device.type == "cuda":  # otherwise every process also opens a context on GPU 0
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise ValueError("tensors there have no values")
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise InputError(f"--device {name}: {found}", alone=True) from error
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return device


def compile_networks(model: nn.Module) -> None:
    """torch.compile each network in place, for the few input shapes of a run."""
    torch._dynamo.config.cache_size_limit = 64  # both generators share their code and its limit
    for network in model.children():
        network.compile(dynamic=False)


# Processes: one, or as many as torchrun starts. Each trains on its share of every batch.


def from_environment(name: str, least: int = 0) -> int:
    """An integer that torchrun sets, `least` if unset; InputError if it is invalid."""
    text = os.environ.get(name) or str(least)
    if not (text.isdecimal() and least <= int(text) < 2**31):
        raise InputError(f"environment: {name} is {text!r}; unset it, or start with torchrun")
    return int(text)


def rank() -> int:
    """This process's number; process 0 writes and prints."""
    return from_environment("RANK") if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes that train together."""
    return from_environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine, which is also its GPU's."""
    return from_environment("LOCAL_RANK") if world_size() > 1 else 0


def join_processes(device: torch.device) -> None:
    """Connect the processes: gloo for tensors on the CPU, NCCL for those on a GPU."""
    names = "RANK", "MASTER_ADDR", "MASTER_PORT"
    if missing := [name for name in names if not os.environ.get(name)]:
        found = f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} not set"
        raise InputError(f"environment: {found}; unset it, or start with torchrun")
    from_environment("MASTER_PORT")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def check_single_process() -> None:
    """InputError if torchrun, or the environment, announces several processes."""
    if world_size() > 1:
        advice = "only --training can use several; unset it, or start without torchrun"
        raise InputError(f"WORLD_SIZE is {world_size()}: this runs in one process; {advice}")


def total(values: Tensor) -> Tensor:
    """The sum over all connected processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def n_connected() -> int:
    """The number of connected processes: 1 in a notebook, whatever its environment says."""
    return dist.get_world_size() if dist.is_initialized() else 1


def connected_rank() -> int:
    """This process's number among the connected ones: 0 in a notebook."""
    return dist.get_rank() if dist.is_initialized() else 0


def count_per_process(count: Tensor) -> Tensor:
    """A count over all processes (at least 1), divided by their number.

    Each process divides its own sum by it; the mean of the quotients is the overall mean.
    """
    return total(count).clamp(min=1) / n_connected()


def max_over_processes(*values: int) -> list[int]:
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
        values = [None] * n_connected()
        dist.all_gather_object(values, value)
    return values


def check_same(values: dict, name: str) -> None:
    """InputError, on every process, if one has other values than process 0."""
    (host, first), *others = from_each((socket.gethostname(), values))
    for other, own in others:
        if keys := [key for key in first | own if own.get(key) != first.get(key)]:
            raise InputError(f"{name} differ between {host} and {other}: {first_ten(keys)}")


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the body on the first process of each machine, then on the others.

    They wait up to a day, not gloo's 30 minutes: the body may decode a large dataset.
    """
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if local_rank():
        dist.barrier(group)
    yield
    if not local_rank():
        dist.barrier(group)


# Files


def reason(error: Exception) -> str:
    """What went wrong, in one line; the last one of an error from a worker process."""
    return getattr(error, "strerror", None) or str(error).strip().rpartition("\n")[2]


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn an OSError inside into an error that says how many bytes were needed and free."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        need = f"{size / 2**20:.1f} MiB are needed, {free:.1f} MiB are free"
        found = f"cannot be written ({reason(error)}): {need}"
        raise TrainingError(f"{path}: {found}; files already on disk are intact") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file; readers find either the old content or the new, never a part."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # of file names that are not UTF-8
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # in a name's 255 bytes
    try:
        with writing(path, len(content)):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_folder_name(name: str) -> bool:
    """Whether a text names one visible folder, and is not a path."""
    return bool(name) and name == Path(name).name and name[0] != "." and name.isprintable()


def make_folder(path: Path, flag: str) -> None:
    """Create a folder and check that it is writable; InputError names it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: cannot be written ({reason(error)})") from error


def check_output(file: Path, flag: str) -> None:
    """Create the folder of a file that will be written; InputError if it cannot be."""
    if file.is_dir():
        raise InputError(f"{flag} {file}: is a folder; give the name of a file")
    make_folder(file.parent, flag)


@contextmanager
def exclusive(folder: Path, seconds: float = 0) -> Iterator[bool | None]:
    """Wait up to `seconds` for a folder's lock; yield whether it is held, None if it cannot be.

    The lock lasts until the body or this process ends.
    """
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    held, deadline = False, time.monotonic() + seconds
    try:
        while not held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:  # in use
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.1)
            except OSError:  # a file system without locks
                held = None
                break
        yield held
    finally:
        os.close(file)
