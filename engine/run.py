"""A run's folder: lock, checkpoints, resuming, progress."""

import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from data_utils import Data, normalize
from datasets.spec import DatasetSpec, make_spec
from datasets.splits import rule_of
from engine.logs import Logs, write_manifest
from engine.pictures import picture_grid
from engine.signals import stop
from utils import InputError, TrainingError

PROGRESS = ("epoch", "step", "evaluated", "best", "metrics")  # of a run, kept in last.pt
BROKEN = (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class Run:
    """A training run: its folder and its progress.

    last.pt holds networks, optimizers, schedulers, counters, the running sums of the losses, and
    each process's replay pools and random generators; the order of the images follows from seed and
    epoch. A resumed run therefore continues as if it had never stopped.
    """

    def __init__(self, args, spec: DatasetSpec, device: torch.device):
        self.args, self.spec, self.device = args, spec, device
        name = args.name or f"{spec.name}_{args.method}_{args.rule.label}_s{args.seed}"
        if not utils.is_folder_name(name):
            expected = f"expected the name of a folder in {args.checkpoints}, not a path"
            raise InputError(f"--name {name}: {expected}")
        self.folder = Path(args.checkpoints) / name
        self.epoch = self.step = 0  # epochs done, steps done within the next one
        self.evaluated = 0  # the epoch of the last evaluation
        self.best = {"miou": -1.0, "epoch": 0}
        self.metrics: dict = {}  # of the last evaluation
        self.sums: dict[str, Tensor] = {}  # of each loss since then
        self.stopped = 0  # the signal on which all processes end
        self.speed = ""
        self.shown: tuple[Tensor, Tensor] | None = None  # TensorBoard's images and masks

    def __enter__(self) -> "Run":
        """Lock the folder and read its last.pt; InputError if it belongs to other settings."""
        with ExitStack() as stack:
            if utils.rank() == 0:
                stack.enter_context(locked(self.folder, "--checkpoints"))
            self.state = utils.from_first(None if utils.rank() else self._previous_state())
            if self.args.init and not self.state:
                self.initial = utils.load_checkpoint(utils.checkpoint_file(self.args.init))
            self.exit = stack.pop_all()
        return self

    def __exit__(self, *_error) -> None:
        stop.training = False
        self.exit.close()

    @property
    def split_hash(self) -> str | None:
        """The hash of the split that the run started with; None for a new run."""
        return self.state["split"] if self.state else None

    @property
    def finished(self) -> bool:
        """Whether the folder holds a finished run, which is then reported."""
        if not self.state or self.state["progress"].get("evaluated") != self.args.epochs:
            return False
        best = self.state["progress"]["best"]
        result = f"best mIoU {best['miou']:.4f} at epoch {best['epoch']}"
        print(f"{self.folder} is finished after {self.args.epochs} epochs: {result}")
        return True

    def start(self, model: nn.Module, data: Data) -> None:
        """Resume from last.pt, or create the folder of a new run (--init); open its logs."""
        args, self.model, self.data = self.args, model, data
        self.n_steps = data.train.n_steps(args.batch_size)
        self.n_images = self.n_steps * args.batch_size
        decay = utils.linear_decay(args.epochs, args.decay_epoch)
        self.schedulers = {
            side: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: decay(step / self.n_steps))
            for side, opt in model.optimizers.items()
        }
        if self.state:
            self._restore(self.state)
        elif args.init:
            self._initialize(self.initial)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if utils.rank() == 0:
            if not self.state:
                self._make_folder()
            write_manifest(self.folder, self.device, **{} if self.state else {"started": now})
        done = self.epoch * self.n_images + self.step * args.batch_size
        first_step = self.global_step and self.global_step + 1
        self.logs = Logs(self.folder, first_step, args.epochs * self.n_images, done)
        self.exit.callback(self.logs.close)
        if utils.rank() == 0 and self.state:
            self.logs.forget_after(self.evaluated)
            print(f"resuming at epoch {self.epoch + 1}, step {self.step}")
        if utils.rank() == 0 and not self.global_step:
            about = {"dataset": self.spec.name, "labeled images": len(data.labeled)}
            about["run"] = self.folder.name
            self.logs.events.settings(about | args.settings, "val/miou")
        self.saved_at = time.monotonic()
        stop.training = True

    # Progress

    @property
    def global_step(self) -> int:
        return self.epoch * self.n_steps + self.step

    @property
    def progress(self) -> float:
        """The share of the run's steps that are done."""
        return self.global_step / (self.args.epochs * self.n_steps)

    @property
    def done(self) -> bool:
        return self.evaluated == self.args.epochs

    @property
    def evaluation_due(self) -> bool:
        """Whether the last finished epoch still has to be evaluated."""
        due = self.epoch % self.args.eval_every == 0 or self.epoch == self.args.epochs
        return due and self.evaluated < self.epoch

    def rest_of_epoch(self) -> list[tuple[int, ...]]:
        """The items of data.train in the current epoch, from the next step on."""
        args = self.args
        self.logs.bar.set_description(f"epoch {self.epoch + 1}/{args.epochs}")
        self.epoch_started, self.first_image = time.monotonic(), self.step * args.batch_size
        return self.data.train.epoch(args.seed, self.epoch, args.batch_size)[self.first_image :]

    def after_step(self, losses: dict[str, Tensor]) -> None:
        """Count a step; log, save and agree on a signal when due."""
        counted = losses | {"steps": torch.ones((), device=self.device)}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in counted.items()}
        self.step += 1
        self.logs.bar.update(self.args.batch_size)
        if self.global_step % self.args.log_every == 0:
            self.logs.losses(losses, self.global_step, self.schedulers["G"].get_last_lr()[0])
        for scheduler in self.schedulers.values():
            scheduler.step()
        save_due = time.monotonic() - self.saved_at > 60 * self.args.save_every
        self.stopped, save_due = utils.agree(stop.signum, save_due)
        if save_due and not self.stopped:
            self._save("last.pt")

    def after_epoch(self) -> None:
        """Count an epoch, all of whose steps are done."""
        seconds = time.monotonic() - self.epoch_started
        self.speed = f", {(self.n_images - self.first_image) / seconds:.1f} images/s"
        self.epoch, self.step = self.epoch + 1, 0

    def diverged(self, error: ArithmeticError) -> TrainingError:
        """The error for a loss that is not finite; files on disk stay as they are."""
        last = self.folder / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint exists"
        where = f"epoch {self.epoch + 1}, step {self.step + 1}"
        return TrainingError(f"{where}: a loss is not finite ({error}); {kept}; try a lower --lr")

    def record(self, counts: Tensor) -> None:
        """Log an evaluation's confusion matrix (K, K) and save best.pt and last.pt.

        After a signal, which cuts an evaluation short, do neither: the resumed run evaluates again.
        """
        (self.stopped,) = utils.agree(stop.signum)
        if self.stopped:
            return
        if not self.evaluated and not self.state:  # no best.pt without a last.pt
            self._save("last.pt")
        losses, self.sums, self.evaluated = self._mean_losses(), {}, self.epoch
        self.metrics = utils.segmentation_metrics(utils.total(counts), self.spec)
        miou, best = self.metrics["miou"] or 0.0, f"best {self.best['miou']:.4f}"
        if miou > self.best["miou"]:
            self.best, best = {"miou": miou, "epoch": self.epoch}, "the best so far"
            self._save("best.pt")
        if utils.rank() == 0:
            step = {"epoch": self.epoch, "step": self.global_step}
            title = f"epoch {self.epoch}/{self.args.epochs}{self.speed}"
            title = f"{title}: {utils.format_means(self.metrics)} ({best})"
            self.logs.evaluation(step | self.metrics | {"losses": losses}, self._grid())
        self._save("last.pt")
        if utils.rank() == 0:
            self.logs.say(title, losses)

    def end(self) -> int:
        """Save, print how the run ended, and return the exit code: 0, or 128 + n after signal n."""
        self.logs.bar.close()
        best = self.folder / "best.pt"
        if self.stopped:
            self._save("last.pt")
            name = signal.Signals(self.stopped).name
            print(f"{name}: saved {self.folder / 'last.pt'}; the same command resumes the run")
            return 128 + self.stopped
        if utils.rank() == 0:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_manifest(self.folder, self.device, finished=now)
            result = f"best mIoU {self.best['miou']:.4f} after epoch {self.best['epoch']}"
            print(utils.format_metrics(self.metrics))
            print(f"after the last epoch {utils.format_means(self.metrics)}; {result}")
            print(f"curves: tensorboard --logdir {self.folder}")
            print(f"test it: python main.py --testing --checkpoint {best}")
            print(f"use it:  python main.py --predict PICTURES --checkpoint {best}")
        return 0

    def _mean_losses(self) -> dict[str, float]:
        """Each loss's mean since the last evaluation. Waits for the device."""
        values = utils.total(torch.stack(list(self.sums.values()))).tolist() if self.sums else []
        sums = dict(zip(self.sums, values, strict=True))
        steps = sums.pop("steps", 1)
        return {name: value / steps for name, value in sums.items()}

    @torch.inference_mode()
    def _grid(self) -> Tensor:
        """Four fixed validation images with many classes, and the networks' outputs for them."""
        if self.shown is None:
            items = [self.data.val[i] for i in self.data.val.of_many_classes(4)]
            images, masks = map(torch.stack, zip(*items, strict=True))
            x = normalize(images.to(self.device), self.args.normalization)
            self.shown = x, masks.to(self.device).long()
        x, y = self.shown
        self.model.eval()
        return picture_grid(x, {"y": y, **self.model.pictures(x, y)}, self.spec.palette)

    # Checkpoints

    def _save(self, name: str) -> None:
        """Write last.pt, with everything that resuming needs, or best.pt, for testing."""
        state = {
            "settings": self.args.settings,
            "dataset": asdict(self.spec),
            "data_root": self.args.data_root,
            "split": self.data.split.hash(),
            "image_dtype": self.data.labeled.image_dtype,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
        }
        if name == "last.pt":
            self.saved_at = time.monotonic()
            optimizers, schedulers = self.model.optimizers, self.schedulers
            cuda = self.device.type == "cuda"
            pools = self.model.pools.items()
            own = {
                "pools": {key: [fake.cpu() for fake in pool.fakes] for key, pool in pools},
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
                "sums": {key: value.cpu() for key, value in self.sums.items()},
            }
            state |= {
                "optimizers": {side: opt.state_dict() for side, opt in optimizers.items()},
                "schedulers": {side: each.state_dict() for side, each in schedulers.items()},
                "progress": {key: getattr(self, key) for key in PROGRESS},
                "processes": utils.from_each(own),
            }
        if utils.rank() == 0:
            utils.save_checkpoint(self.folder / name, state)

    def _previous_state(self) -> dict | None:
        """The last.pt of a run with the same settings; None for a new run.

        InputError if the folder has another run, or files that a new one would delete.
        """
        path = self.folder / "last.pt"
        if self.args.overwrite:
            if self._old_files() and not (self.folder / "config.toml").is_file():
                raise InputError(f"--overwrite: {self.folder} contains no run; delete it by hand")
            return None
        if not path.is_file():
            results = "best.pt", "metrics.jsonl"
            if found := [name for name in results if (self.folder / name).exists()]:
                lacking = f"contains {found[0]} but no last.pt, so no run can resume"
                advice = "give --name for another folder, or --overwrite to start over"
                raise InputError(f"{self.folder}: {lacking}; {advice}")
            return None
        state = utils.load_checkpoint(path)
        progress = state.get("progress")
        if type(progress) is not dict or not progress.keys() >= {*PROGRESS}:
            reason = "a run cannot resume from it; --overwrite starts over"
            raise InputError(f"checkpoint {path}: {reason}")
        before, now = dict(state["settings"]), dict(self.args.settings)
        spec = make_spec(state["dataset"], f"checkpoint {path}")  # adds keys it does not have
        for settings, described in (before, spec), (now, self.spec):
            settings |= {f"[dataset] {key}": value for key, value in asdict(described).items()}
        if self.args.rule.same_kind(rule_of(before)):
            del now["split"]  # of two files, the split's hash decides
        keys = [key for key in now if str(before.get(key)) != str(now[key])]
        if keys:
            differ = utils.first_ten(f"{key} was {before.get(key)}, is {now[key]}" for key in keys)
            advice = "give --name for another folder, or --overwrite to start over"
            raise InputError(f"{self.folder}: holds a run with other settings ({differ}); {advice}")
        return state

    def _restore(self, state: dict) -> None:
        """Restore the state of a last.pt; InputError if parts are missing."""
        path = self.folder / "last.pt"
        utils.load_weights(self.model, state["model"], path)
        try:
            for side, optimizer in self.model.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][side])
                keep_strides(optimizer)
                self.schedulers[side].load_state_dict(state["schedulers"][side])
            vars(self).update({key: state["progress"][key] for key in PROGRESS})
            own = state["processes"][utils.rank() % len(state["processes"])]
            for key, fakes in own["pools"].items():
                self.model.pools[key].fakes = [fake.to(self.device) for fake in fakes]
            torch.set_rng_state(own["rng"])
            if self.device.type == "cuda" and own["cuda_rng"] is not None:
                torch.cuda.set_rng_state(own["cuda_rng"], self.device)
            self.sums = {key: value.to(self.device) for key, value in own["sums"].items()}
        except BROKEN as error:
            reason = f"a run cannot resume from it ({error!r})"
            raise InputError(f"checkpoint {path}: {reason}") from error

    def _initialize(self, state: dict) -> None:
        """Load networks of another run's checkpoint: all of the same method, otherwise G_IS.

        A mean teacher starts from the other run's average, or from its G_IS if it has none.
        """
        weights = state["model"]
        same = state["settings"].get("method") == self.args.method
        children = [name for name, _ in self.model.named_children()]
        names = [name for name in children if same or name in ("G_IS", "teacher")]
        has_teacher = any(key.startswith("teacher.") for key in weights)
        for name in names:
            source = "G_IS." if name == "teacher" and not has_teacher else f"{name}."
            own = {k.removeprefix(source): v for k, v in weights.items() if k.startswith(source)}
            network = getattr(self.model, name)
            utils.load_weights(network, own, f"--init {self.args.init}: {name}")
        print(f"starting from {', '.join(names)} of {self.args.init}")

    def _make_folder(self) -> None:
        """A new run's config.toml and split.json; --overwrite deletes the run that was there."""
        folder, config = self.folder, self.folder / "config.toml"
        if self.args.overwrite:
            old = self._old_files()
            for path in sorted(old, key=lambda path: path == config):  # the sign of a run goes last
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink()
        for path in folder.glob("events.out.tfevents*"):  # of a run without any last.pt
            path.unlink()
        note = f"# python main.py --training --dataset {config} --name NAME repeats this run"
        tables = f"{to_toml(self.args.flags)}\n[dataset]\n{to_toml(asdict(self.spec))}"
        utils.write_atomically(config, f"{note}\n{tables}")
        parts = self.data.split
        lists = json.dumps({**parts.ids(), "hash": parts.hash()}, indent=1)
        utils.write_atomically(folder / "split.json", lists)

    def _old_files(self) -> list[Path]:
        """What the folder contains besides the lock."""
        return [path for path in self.folder.iterdir() if path.name != "lock"]


def keep_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory layout of its parameters, as fused kernels require."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)


def to_toml(table: dict) -> str:
    """A flat table of strings, numbers, booleans and (nested) lists as TOML; None is left out."""
    known = {key: value for key, value in table.items() if value is not None}
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in known.items())


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Create a folder and hold its lock, which is released however this process ends.

    InputError if the folder cannot be written or another process holds the lock.
    """
    utils.make_folder(folder, flag)
    path = folder / "lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(file, 200).decode() or "another process"
            os.close(file)
            advice = "wait for it, or give --name"
            raise InputError(f"{folder}: {holder} is already training there; {advice}") from error
        except OSError as error:
            reason = f"cannot be locked here ({error.strerror})"
            print(f"{folder}: {reason}: do not start a second run in it")
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # the process that held it has deleted it
    for leftover in folder.glob(".*.tmp"):  # of a process killed while writing
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
