"""A run's folder: its name, lock, config.toml and split.json, and whether its last.pt fits."""

import fcntl
import hashlib
import json
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import utils
from datasets.spec import DatasetSpec, make_spec
from datasets.splits import Split
from engine import checkpoint
from engine.flags import Flags, flag_of
from engine.logs import EVENTS
from utils import InputError, TrainingError

NOTE = "# python main.py --training"  # a run's config.toml begins with it
TOGETHER = "eval_every", "log_every"  # flags that control when processes synchronize
PROGRESS = ("epoch", "step", "evaluated", "best")  # of a run, kept in last.pt


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, locked by this process or by the first of several."""

    path: Path
    state: dict | None  # of its last.pt; None for a new run
    initial: dict | None  # a new run's initial weights: the checkpoint of --init
    lock: int | None = None  # the locked file's descriptor, on the first process

    @property
    def split_hash(self) -> str | None:
        """The hash of the split that the run started with; None for a new run."""
        return self.state["split"] if self.state else None

    def finished(self, epochs: int) -> str | None:
        """The message for a run that has finished all `epochs`; None if it has not."""
        if not self.state or self.state["progress"]["evaluated"] != epochs:
            return None
        best = self.state["progress"]["best"]
        result = f"best mIoU {best['miou']:.4f} at epoch {best['epoch']}"
        return f"{self.path} is finished after {utils.counted(epochs, 'epoch')}: {result}"

    def begin(self, args: Flags, spec: DatasetSpec, split: Split) -> None:
        """Write a new run's config.toml and split.json; --overwrite deletes the old run first."""
        config = self.path / "config.toml"
        if args.overwrite:
            # config.toml last: it marks a run's folder
            for path in sorted(contents(self.path), key=lambda path: path == config):
                utils.remove(path)
        for path in self.path.glob(f"{EVENTS}*"):  # of a run without any last.pt
            path.unlink()
        quoted = shlex.quote(str(config)).replace("\n", "\\n")
        note = f"{NOTE} --dataset {quoted} --name NAME repeats this run"
        tables = f"{to_toml(args.flags)}\n[dataset]\n{to_toml(asdict(spec))}"
        utils.write_atomically(config, f"{note}\n{tables}")
        lists = json.dumps({**split.ids(), "hash": split.hash()}, indent=1)
        utils.write_atomically(self.path / "split.json", lists)

    def save(self, name: str, state: dict) -> None:
        """Write a checkpoint, on the first process."""
        if utils.rank() == 0:
            self.check_lock()
            checkpoint.save(self.path / name, state)

    def check_lock(self) -> None:
        """TrainingError if the lock was deleted: another run may be training in the folder."""
        if self.lock is not None and not is_open_file(self.lock, self.path / "lock"):
            lost = "its lock was deleted or replaced, so another run may be training there"
            raise TrainingError(f"{self.path}: {lost}; this one stops and writes nothing more")


@contextmanager
def open_folder(args: Flags, spec: DatasetSpec) -> Iterator[RunFolder]:
    """Lock a run's folder, then read its last.pt.

    InputError if it belongs to other settings, has files that a new run would delete, or is on a
    machine without process 0.
    """
    path, lock = Path(args.checkpoints) / folder_name(args, spec), None
    with ExitStack() as stack:
        if utils.rank() == 0:
            lock = stack.enter_context(locked(path, "--checkpoints"))
        check_machines(path / "last.pt", args, spec)
        state = utils.from_first(None if utils.rank() else previous_state(path, args, spec))
        if utils.rank() == 0:
            for leftover in path.glob(".*.[0-9]*.tmp"):  # of a process killed while writing
                leftover.unlink(missing_ok=True)
        is_new = args.init and not state
        initial = checkpoint.load(checkpoint.file_of(args.init)) if is_new else None
        yield RunFolder(path, state, initial, lock)


def check_machines(last: Path, args: Flags, spec: DatasetSpec) -> None:
    """InputError, on every process, if machines have other settings or another last.pt."""
    own = {key: value for key, value in args.settings.items() if key not in ("init", "split")}
    own |= {key: getattr(args, key) for key in TOGETHER}
    utils.check_same(own | asdict(spec), "flags or [dataset]")
    digest = None
    if utils.local_rank() == 0 and last.is_file() and not args.overwrite:
        with open(last, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    (host, first), *others = utils.from_each((socket.gethostname(), digest))
    for other, found in others:
        if found and not first:
            lacking = f"{other} has the run's {last}, but {host}, where process 0 is, has none"
            advice = "give --checkpoints on a disk that all share, or set torchrun's --node-rank"
            raise InputError(f"{lacking}; {advice}")
        if found not in (None, first):
            different = f"{last} differs between {host}, where process 0 is, and {other}"
            raise InputError(f"{different}; delete the older run")


def folder_name(args: Flags, spec: DatasetSpec) -> str:
    """--name, by default <dataset>_<method>_<labels>_s<seed>."""
    name = args.name or f"{spec.name}_{args.method}_{args.rule.label}_s{args.seed}"
    if not utils.is_folder_name(name):
        expected = f"expected the name of a folder in {args.checkpoints}, not a path"
        raise InputError(f"--name {name}: {expected}")
    return name


def previous_state(folder: Path, args: Flags, spec: DatasetSpec) -> dict | None:
    """The last.pt of a run with the same settings; None for a new run.

    InputError if the folder has another run, or files that a new one would delete.
    """
    path = folder / "last.pt"
    if args.overwrite:
        if contents(folder) and not is_run(folder):
            raise InputError(f"--overwrite: {folder} contains no run; delete it by hand")
        check_kept(folder, args)
        return None
    advice = "give --name for another folder, or --overwrite to start over"
    if not path.is_file():
        results = "best.pt", "metrics.jsonl"
        if found := [name for name in results if (folder / name).exists()]:
            lacking = f"contains {found[0]} but no last.pt, so no run can resume"
            raise InputError(f"{folder}: {lacking}; {advice}")
        written = {"config.toml", "split.json", "manifest.json"}
        names = {path.name for path in contents(folder)}
        others = {name for name in names if name in written or name.startswith(EVENTS)}
        if others and not is_run(folder):
            found = f"contains {min(others)}, which is not from a run"
            raise InputError(f"{folder}: {found}; give --name for another folder")
        return None
    start_over = "give --overwrite to start over"
    try:
        state = checkpoint.load(path)
    except InputError as error:
        raise InputError(f"{error}; {start_over}") from error
    own, asked = Path(checkpoint.data_path(state)), Path(args.data_root)
    if own.exists() and str(own) != os.path.realpath(asked):  # it was not moved
        found = f"contains a run on {checkpoint.data_root(state)}, which still exists"
        raise InputError(f"{folder}: {found}, not on --data-root {asked}; {advice}")
    progress = state.get("progress")
    if type(progress) is not dict or not progress.keys() >= {*PROGRESS}:
        reason = "a run cannot resume from it (it lacks the progress)"
        raise InputError(f"checkpoint {path}: {reason}; {start_over}")
    if progress["evaluated"] and not path.with_name("best.pt").is_file():
        raise InputError(f"{folder}: contains last.pt but no best.pt; restore it, or {start_over}")
    old = Flags({}, [state["settings"]])  # adds the defaults of flags newer than the run
    old_spec = make_spec(state["dataset"], f"checkpoint {path}")  # adds keys it does not have
    before, now = old.settings, args.settings
    if args.rule.kind == old.rule.kind:
        del now["split"]  # of two files, the split's hash decides
    for settings, described in (before, old_spec), (now, spec):
        settings |= {f"[dataset] {key}": value for key, value in asdict(described).items()}
    if unknown := [key for key in state["settings"] if key not in old.settings]:
        found = f"contains a run of another version, with {utils.first_ten(unknown)}"
        raise InputError(f"{folder}: {found}; resume it with that version")
    if keys := [key for key in now if str(before.get(key)) != str(now[key])]:
        differ = utils.first_ten(f"{key} was {before.get(key)}, is {now[key]}" for key in keys)
        raise InputError(f"{folder}: contains a run with other settings ({differ}); {advice}")
    return state


def check_kept(folder: Path, args: Flags) -> None:
    """InputError if --overwrite would delete files that the new run reads."""
    for key in ("init", "config", "dataset", "split", "data_root", "cache"):
        path = Path(getattr(args, key) or folder.parent).absolute()
        with utils.naming(path):
            if key in ("dataset", "split"):  # names, too, and files that the new run writes again
                own = path.parent.resolve() == folder.resolve()
                if not path.is_file() or (own and path.name in ("config.toml", "split.json")):
                    continue
            if folder.resolve() in (path.resolve(), *path.resolve().parents):
                advice = "move it, or give --name for another folder"
                raise InputError(f"{flag_of(key)} {path}: --overwrite deletes it; {advice}")


def is_run(folder: Path) -> bool:
    """Whether a run wrote the folder's config.toml."""
    config = folder / "config.toml"
    return config.is_file() and config.read_bytes().startswith(NOTE.encode())


def contents(folder: Path) -> list[Path]:
    """What a run's folder contains besides the lock."""
    return [path for path in folder.iterdir() if path.name != "lock"]


def to_toml(table: dict) -> str:
    """A flat table of strings, numbers, booleans and (nested) lists as TOML; None is left out."""
    known = {key: value for key, value in table.items() if value is not None}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in known.items()]
    return "".join(lines).replace("\x7f", "\\u007f")  # the control character that JSON allows


def is_open_file(file: int, path: Path) -> bool:
    """Whether a path still leads to the open file with this descriptor."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[int]:
    """Create a folder and hold its lock, which is released however this process ends.

    Yield the locked file's descriptor.

    InputError if the folder cannot be written, another process holds the lock, or another program
    wrote a file of its name.
    """
    utils.make_folder(folder, flag)
    path = folder / "lock"
    while True:
        with utils.naming(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT)
        holder = os.pread(file, 200, 0).decode(errors="replace").strip("\0")
        if holder and not holder.startswith("process "):
            os.close(file)
            raise InputError(f"{path}: not written by a run; give --name for another folder")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = holder or "another process"
            os.close(file)
            advice = "wait for it, or give --name"
            raise InputError(f"{folder}: {holder} is already training there; {advice}") from error
        except OSError as error:
            reason = f"cannot be locked here ({error.strerror})"
            print(f"{folder}: {reason}: do not start a second run in it")
        if is_open_file(file, path):
            break
        os.close(file)  # the process that held it has deleted it
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield file
    finally:
        with suppress(OSError):
            if is_open_file(file, path):  # not another process's lock
                path.unlink()
                folder.rmdir()  # if nothing else is in it
        os.close(file)
