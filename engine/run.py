"""A training run: its progress, what is due, saving and resuming."""

import os
import shlex
import signal
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property

import torch
from torch import Tensor, nn

import utils
from data_utils import Data, normalize
from datasets.spec import DatasetSpec
from engine import checkpoint
from engine.flags import Flags
from engine.folder import PROGRESS, RunFolder
from engine.logs import Logs, forget_after, settings_summaries, write_manifest
from engine.metrics import format_means, format_metrics, segmentation_metrics
from engine.pictures import picture_grid
from engine.signals import stop
from utils import InputError, TrainingError

BROKEN = (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class Run:
    """A training run, new or resumed; as a context manager, it handles signals and closes its logs.

    The constructor writes a new run's files, with --overwrite after deleting the old ones, or
    restores the state of last.pt.

    last.pt holds networks, optimizers, counters, the running sums of the losses, and each process's
    replay pools and random generators; the order of the images follows from seed and epoch, the
    learning rate from the epoch. A resumed run therefore continues as if it had never stopped.
    """

    def __init__(
        self, args: Flags, spec: DatasetSpec, data: Data, model: nn.Module, folder: RunFolder
    ):
        self.args, self.spec, self.data, self.model, self.folder = args, spec, data, model, folder
        self.device = next(model.parameters()).device
        self.colors = data.colors(spec)  # --testing expects the same
        self.n_steps = data.train.n_steps(args.batch_size)
        self.n_images = self.n_steps * args.batch_size
        self.decay = utils.linear_decay(args.epochs, args.decay_epoch)
        self.epoch = self.step = 0  # epochs done, steps done within the next one
        self.evaluated = 0  # the epoch of the last evaluation
        self.best = {"miou": -1.0, "epoch": 0}
        self.metrics: dict = {}  # of the last evaluation
        self.sums: dict[str, Tensor] = {}  # of each loss, and the steps, since the last evaluation
        self.signum = 0  # the signal that ends the run on all processes; 0 if none
        self.saved_at = self.epoch_started = time.monotonic()
        self.first_image = 0  # of the current epoch since this start
        self.images_per_second: float | None = None  # of the last epoch
        if folder.state:
            self._restore(folder.state)
        elif folder.initial:
            self._initialize(folder.initial)
        if utils.rank() == 0:
            self._begin()
        done = self.epoch * self.n_images + self.step * args.batch_size
        first_step = self.global_step and self.global_step + 1
        self.logs = Logs(folder.path, first_step, args.epochs * self.n_images, done)
        if utils.rank() == 0 and not self.global_step:
            about = {"dataset": spec.name, "labeled images": len(data.labeled)}
            about["run"] = folder.path.name
            summaries = settings_summaries(about | args.settings, "val/miou")
            self.logs.events.add(0, *summaries)

    def __enter__(self) -> "Run":
        stop.training = True
        return self

    def __exit__(self, *_error) -> None:
        stop.training = False
        self.logs.close()

    def _begin(self) -> None:
        """Write the files of a new run, or say where an interrupted one resumes."""
        folder, started = self.folder.path, {}
        if self.folder.state:
            forget_after(folder, self.evaluated)
            print(f"resuming at epoch {self.epoch + 1}, step {self.step}")
        else:
            self.folder.begin(self.args, self.spec, self.data.split)
            started["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_manifest(folder, self.device, **started)

    # Progress

    @property
    def global_step(self) -> int:
        return self.epoch * self.n_steps + self.step

    @property
    def share_done(self) -> float:
        """The share of the run's steps that are done."""
        return self.global_step / (self.args.epochs * self.n_steps)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.args.lr * self.decay(self.epoch)

    @property
    def ended(self) -> bool:
        """Whether everything is done, or a signal has ended the run."""
        return bool(self.signum) or self.evaluated == self.args.epochs

    @property
    def evaluation_due(self) -> bool:
        """Whether the last finished epoch still has to be evaluated."""
        due = self.epoch % self.args.eval_every == 0 or self.epoch == self.args.epochs
        within_epoch = self.step > 0  # resumed there, perhaps with another --eval-every
        return due and not within_epoch and self.evaluated < self.epoch

    def begin_epoch(self) -> list[tuple[int, ...]]:
        """Begin or resume an epoch; return its items of data.train from the next step on."""
        args = self.args
        self.logs.bar.set_description(f"epoch {self.epoch + 1}/{args.epochs}")
        self.epoch_started, self.first_image = time.monotonic(), self.step * args.batch_size
        return self.data.train.epoch(args.seed, self.epoch, args.batch_size)[self.first_image :]

    def before_step(self) -> None:
        """Give the model its learning rate and the share of the run that is done."""
        self.model.progress = self.share_done
        for optimizer in self.model.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.lr

    def after_step(self, losses: dict[str, Tensor]) -> None:
        """Count a step, agree on signals, and log and save when due."""
        counted = losses | {"steps": torch.ones((), device=self.device)}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in counted.items()}
        self.step += 1
        place = f"epoch {self.epoch + 1}/{self.args.epochs}, step {self.step}/{self.n_steps}"
        self.logs.step(place, losses, self.args.batch_size)
        if self.global_step % self.args.log_every == 0:
            self.logs.losses(losses, self.global_step, self.lr)
        save_due = time.monotonic() - self.saved_at > 60 * self.args.save_every
        self.signum, save_due = utils.max_over_processes(stop.signum, save_due)
        if save_due and not self.signum:
            self._save("last.pt")

    def after_epoch(self) -> None:
        """Count an epoch, all of whose steps are done."""
        seconds = time.monotonic() - self.epoch_started
        self.images_per_second = (self.n_images - self.first_image) / seconds
        self.epoch, self.step = self.epoch + 1, 0

    def diverged(self, error: ArithmeticError) -> TrainingError:
        """The error for a loss that is not finite; files on disk stay as they are."""
        last = self.folder.path / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint exists"
        where = f"epoch {self.epoch + 1}, step {self.step + 1}"
        return TrainingError(f"{where}: a loss is not finite ({error}); {kept}; try a lower --lr")

    def record(self, counts: Tensor) -> None:
        """Log an evaluation's confusion matrix (K, K) and save best.pt and last.pt.

        After a signal, which cuts an evaluation short, do neither: the resumed run evaluates again.
        """
        (self.signum,) = utils.max_over_processes(stop.signum)
        if self.signum:
            return
        if not self.evaluated and not self.folder.state:  # no best.pt without a last.pt
            self._save("last.pt")
        losses, self.sums, self.evaluated = self._mean_losses(), {}, self.epoch
        self.metrics = segmentation_metrics(utils.total(counts), self.spec)
        miou, best = self.metrics["miou"] or 0.0, f"best {self.best['miou']:.4f}"
        if miou > self.best["miou"]:
            self.best, best = {"miou": miou, "epoch": self.epoch}, "the best so far"
            self._save("best.pt")
        if utils.rank() == 0:
            self.folder.check_lock()  # before a line is added to another run's log
            step = {"epoch": self.epoch, "step": self.global_step}
            title = f"epoch {self.epoch}/{self.args.epochs}"
            if self.images_per_second:
                title += f", {self.images_per_second:.1f} images/s"
            title += f": {format_means(self.metrics)} ({best})"
            self.logs.evaluation(step | self.metrics | {"losses": losses}, self._grid())
        self._save("last.pt")
        if utils.rank() == 0:
            self.logs.say(title, losses)

    def end(self) -> int:
        """Save, print how the run ended, and return the exit code: 0, or 128 + n after signal n."""
        self.logs.bar.close()
        folder = self.folder.path
        if self.signum:
            self._save("last.pt")
            name = signal.Signals(self.signum).name
            again = "the same command" + (" without --overwrite" if self.args.overwrite else "")
            print(f"{name}: saved {folder / 'last.pt'}; {again} resumes the run")
            return 128 + self.signum
        if utils.rank() == 0:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_manifest(folder, self.device, finished=now)
            result = f"best mIoU {self.best['miou']:.4f} after epoch {self.best['epoch']}"
            print(format_metrics(self.metrics))
            print(f"after the last epoch {format_means(self.metrics)}; {result}")
            run = shlex.quote(str(folder))
            print(f"curves: tensorboard --logdir {run}")
            print(f"test it: python main.py --testing --checkpoint {run}")
            print(f"use it:  python main.py --predict IMAGES --checkpoint {run}")
        return 0

    def _mean_losses(self) -> dict[str, float]:
        """Each loss's mean since the last evaluation. Waits for the device."""
        values = utils.total(torch.stack(list(self.sums.values()))).tolist() if self.sums else []
        sums = dict(zip(self.sums, values, strict=True))
        steps = sums.pop("steps", 1)
        return {name: value / steps for name, value in sums.items()}

    @cached_property
    def fixed(self) -> tuple[Tensor, Tensor]:
        """Up to four validation images with many classes, and their masks: those in TensorBoard."""
        items = [self.data.val[i] for i in self.data.val.of_many_classes(4)]
        images, masks = map(torch.stack, zip(*items, strict=True))
        x = normalize(images.to(self.device), self.args.normalization)
        return x, masks.to(self.device).long()

    @torch.inference_mode()
    def _grid(self) -> Tensor:
        """The fixed images and masks, and the networks' outputs for them."""
        x, y = self.fixed
        logits = self.model.eval().segment(x)
        return picture_grid(x, {"y": y, **self.model.pictures(y, logits)}, self.spec)

    # Checkpoints

    def _save(self, name: str) -> None:
        """Write last.pt, with everything that resuming needs, or best.pt, for testing."""
        state = {
            "settings": self.args.settings,
            "dataset": asdict(self.spec),
            "data_root": self.args.data_root,
            "data_path": os.path.realpath(self.args.data_root),
            "split": self.data.split.hash(),
            "image_dtype": self.data.labeled.image_dtype,
            "axes": self.data.axes,
            "colors": self.colors,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
        }
        if name == "last.pt":
            self.saved_at = time.monotonic()
            cuda = self.device.type == "cuda"
            pools = self.model.pools.items()
            own = {
                "pools": {key: [fake.cpu() for fake in pool.fakes] for key, pool in pools},
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
                "sums": {key: value.cpu() for key, value in self.sums.items()},
            }
            state |= {
                "optimizers": {k: opt.state_dict() for k, opt in self.model.optimizers.items()},
                "progress": {key: getattr(self, key) for key in PROGRESS},
                "processes": utils.from_each(own),
            }
        self.folder.save(name, state)

    def _restore(self, state: dict) -> None:
        """Restore the state of a last.pt; InputError if parts are missing."""
        path = self.folder.path / "last.pt"
        checkpoint.load_weights(self.model, state["model"], path)
        try:
            for side, optimizer in self.model.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][side])
                checkpoint.keep_strides(optimizer)
            vars(self).update({key: state["progress"][key] for key in PROGRESS})
            own = state["processes"][utils.rank() % len(state["processes"])]
            if utils.rank() < len(state["processes"]):  # a further one has its own random numbers
                for key, fakes in own["pools"].items():
                    self.model.pools[key].fakes = [fake.to(self.device) for fake in fakes]
                torch.set_rng_state(own["rng"])
                if self.device.type == "cuda" and own["cuda_rng"] is not None:
                    torch.cuda.set_rng_state(own["cuda_rng"], self.device)
            self.sums = {key: value.to(self.device) for key, value in own["sums"].items()}
        except BROKEN as error:
            reason = f"a run cannot resume from it ({error!r}); give --overwrite to start over"
            raise InputError(f"checkpoint {path}: {reason}") from error

    def _initialize(self, state: dict) -> None:
        """Load networks of another run's checkpoint: all of the same method, otherwise G_IS."""
        weights = state["model"]
        same = state["settings"].get("method") == self.args.method
        sources = self.model.sources(weights, same)
        for name, source in sources.items():
            start = f"{source}."
            own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
            network = getattr(self.model, name)
            checkpoint.load_weights(network, own, f"--init {self.args.init}: {name}")
        print(f"starting from {', '.join(sources)} of {self.args.init}")
