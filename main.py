"""Train, test and use semi-supervised segmentation networks: python main.py --training | --testing | --predict FILE...

A TOML is a command line written down: parser default (the paper's) < config/<dataset>.toml < --config < command line.
"""

import os
import signal
import time


class Stop:
    """What SIGINT, SIGTERM or SIGUSR1 asks for: an end, once the step is done and a checkpoint is saved."""

    signum = 0
    heard_at = 0.0
    can_wait = False  # True while training, where leaving at once would lose steps

    def __call__(self, signum: int, _frame) -> None:
        if signum == self.signum and time.monotonic() < self.heard_at + 1:  # torchrun hands on what all have heard
            return
        if self.signum:  # the second one does not wait; what is on disk is whole
            os._exit(128 + signum)
        self.signum, self.heard_at = signum, time.monotonic()
        if not self.can_wait:
            if int(os.environ.get("RANK", 0)) == 0:
                os.write(1, f"{signal.Signals(signum).name}: stopped; there was nothing to save\n".encode())
            raise SystemExit(128 + signum)


stop = Stop()
if __name__ == "__main__":  # before the slow imports, so that a signal during them is heard
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, stop)

import argparse
import csv
import difflib
import io
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.utils import save_image
from tqdm import tqdm

import data_utils
import utils
from arch.generators import MIN_SIZE
from data_utils import DatasetSpec, Epoch, Sample, Split, Stored, read_toml
from model import METHODS, NonFiniteLoss, diagnose, distribute
from utils import IGNORE, InputError, TrainingError

# Settings that change the result: kept in a checkpoint, compared when a run goes on, fixed when it is tested.
RESULT = ("method", "ratio", "seed", "size", "epochs", "decay_epoch", "batch_size", "lr", "betas", "init", "precision")
RESULT += ("split", "label_unit", "normalization", "ignored", "ngf", "ndf", "n_blocks", "dropout")
RESULT += ("optimizer", "momentum", "weight_decay", "schedule", "disc_lr", "disc_betas")
RESULT += ("lambda1", "lambda2", "lambda3", "lambda4", "lambda5", "pool_size", "disc_norm", "disc_input")
RESULT += ("disc_kernel",)
RESULT += ("lambda6", "ema", "confidence", "cutmix_on", "ramp_up", "cycle_s_trains")
RESULT += ("lambda_adv", "lambda_semi_adv", "lambda_semi", "semi_threshold", "semi_start")
MODES = ("training", "testing", "predict")
PROGRESS = ("epoch", "step", "evaluated", "skipped", "best", "metrics")  # of a run, kept in last.pt
NOT_IN_TOML = {*MODES, "config", "checkpoint", "overwrite", "overlay", "save_probabilities", "tta", "native_size"}

# Flags


class Parser(argparse.ArgumentParser):
    """Says what is wrong as one error line."""

    def error(self, message: str):
        raise InputError(message + ("; --help lists the flags" if message.startswith("unrecognized") else ""))


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite int or float from `low` (with `above`: over it) to `high`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {'over' if above else 'at least'} {low:g}{limit}")
        return value

    convert.__name__ = kind.__name__  # argparse puts it into "invalid int value"
    return convert


def odd(text: str) -> int:
    """An argparse type: an odd number from 1 to 31."""
    if int(text) not in range(1, 32, 2):
        raise argparse.ArgumentTypeError(f"{text} must be odd, from 1 to 31")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag with its default, the paper's (Section 3.3) where it has one."""
    about = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser("main.py", description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=about)
    share, weight, count = number(float, 0, 1, above=True), number(float, 0), number(int, 1, 10**9)
    size, beta, chance = number(int, MIN_SIZE, 16384), number(float, 0, 0.9999), number(float, 0, 0.99)
    rate, part = number(float, 0, above=True), number(float, 0, 1)
    switch = argparse.BooleanOptionalAction

    flag = parser.add_argument_group("what to do").add_argument
    flag("--training", action="store_true", help="train, or go on with a run that was stopped")
    flag("--testing", action="store_true", help="score a run's best.pt and write its masks and panels")
    flag("--predict", nargs="+", metavar="PATH", help="write the masks of pictures, NIfTI volumes and folders of them")
    flag("--overlay", action="store_true", help="with --predict: also the masks' colours over the pictures")
    flag("--save-probabilities", action="store_true", help="with --predict: also every class's, as .npz")
    flag("--tta", action="store_true", help="with --predict: the mean over the picture and its mirror image")
    flag("--native-size", action="store_true", help="with --testing: score at the masks' own size too")

    flag = parser.add_argument_group("experiment").add_argument
    flag("--dataset", default="voc", help="a name in config/ or a .toml file")
    methods = "cyclegan: Ours; supervised: Partial or Full; advsemi: Hung et al.; meanteacher: CutMix consistency"
    flag("--method", default="cyclegan", choices=list(METHODS), help=methods)
    flag("--ratio", type=share, default=0.2, help="share of the training images that are labeled")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="of the split, the weights and the order")
    splits = "paper: no exam on both sides; standard: as other papers; image: 85/15 of single images, as released"
    flag("--split", default="paper", choices=data_utils.SPLITS, help=splits)
    flag("--label-unit", default="image", choices=["image", "exam"], help="what --ratio counts and labels")
    flag("--config", metavar="FILE", help="a TOML with flags, read after the dataset's")
    flag("--data-root", metavar="DIR", help="where the files lie; data/<dataset> if not given")
    flag("--size", type=size, nargs=2, default=[200, 200], metavar=("H", "W"), help="of the networks' input")
    scales = "range: (v - mean) / (max - min); half: (v - 0.5) / 0.5, as released"
    flag("--normalization", default="range", choices=["range", "half"], help=scales)
    ignored = "pixels to ignore in training masks: skipped, or class 0, as released"
    flag("--ignored", default="skip", choices=["skip", "background"], help=ignored)

    flag = parser.add_argument_group("optimization").add_argument
    flag("--epochs", type=count, default=400, help="passes over the longer list of images")
    flag("--decay-epoch", type=number(int, 0), help="where the learning rate starts to fall; a quarter if not given")
    flag("--batch-size", type=count, default=5, help="images of each kind in a step")
    flag("--lr", type=rate, default=2e-4, help="learning rate")
    flag("--betas", type=beta, nargs=2, default=[0.5, 0.999], metavar=("B1", "B2"), help="Adam's betas")
    flag("--optimizer", default="adam", choices=["adam", "sgd"], help="of the generators")
    flag("--momentum", type=beta, default=0.9, help="of --optimizer sgd")
    flag("--weight-decay", type=weight, default=0.0, help="of --optimizer")
    flag("--schedule", default="linear", choices=list(utils.SCHEDULES), help="how the learning rates fall")
    flag("--disc-lr", type=rate, help="the discriminators' Adam; --lr if not given")
    flag("--disc-betas", type=beta, nargs=2, metavar=("B1", "B2"), help="likewise; --betas if not given")
    flag("--lambda1", type=weight, default=1.0, metavar="W", help="weight of L_gen^I in Eq. 8")
    flag("--lambda2", type=weight, default=0.05, metavar="W", help="weight of L_cycle^S")
    flag("--lambda3", type=weight, default=1.0, metavar="W", help="weight of L_cycle^I")
    flag("--lambda4", type=weight, default=1.0, metavar="W", help="weight of L_disc^S")
    flag("--lambda5", type=weight, default=1.0, metavar="W", help="weight of L_disc^I")
    flag("--pool-size", type=number(int, 0), default=0, metavar="N", help="past fakes shown to the discriminators")
    flag("--disc-input", default="softmax", choices=["softmax", "argmax"], help="what D_S sees of G_IS(x')")
    flag("--init", metavar="FILE", help="start from the networks of another run's checkpoint")

    flag = parser.add_argument_group("Hung et al. (--method advsemi)").add_argument
    flag("--lambda-adv", type=weight, default=0.01, metavar="W", help="of fooling D with labeled images")
    flag("--lambda-semi-adv", type=weight, default=0.001, metavar="W", help="of fooling D with unlabeled images")
    flag("--lambda-semi", type=weight, default=0.1, metavar="W", help="of learning from predictions that D trusts")
    flag("--semi-threshold", type=part, default=0.2, metavar="T", help="D's confidence from which it does")
    flag("--semi-start", type=part, default=0.25, metavar="P", help="part of the run after which that begins")

    flag = parser.add_argument_group("beyond the paper").add_argument
    consistency = "weight of CutMix consistency on unlabeled images; 1 for meanteacher, 0 for cyclegan if not given"
    flag("--lambda6", type=weight, metavar="W", help=consistency)
    average = "decay of the moving average of G_IS, which then is evaluated; 0: none; 0.99 with --lambda6 if not given"
    flag("--ema", type=number(float, 0, 0.99999), metavar="DECAY", help=average)
    flag("--confidence", type=part, default=0.7, metavar="P", help="of the average in a pixel that --lambda6 uses")
    shown = "images of --lambda6: labeled ones have their true masks"
    flag("--cutmix-on", default="unlabeled", choices=["unlabeled", "both", "labeled"], help=shown)
    flag("--ramp-up", type=part, default=0.0, metavar="P", help="part of the run over which unlabeled terms grow")
    trains = "what L_cycle^S trains: both generators, or G_IS alone"
    flag("--cycle-s-trains", default="both", choices=["both", "G_IS"], help=trains)

    flag = parser.add_argument_group("networks").add_argument
    flag("--ngf", type=count, default=64, help="width of the generators' first layer")
    flag("--ndf", type=count, default=64, help="width of the discriminators' first layer")
    flag("--n-blocks", type=number(int, 0), default=9, help="residual blocks of the generators")
    flag("--dropout", type=chance, default=0.0, metavar="P", help="in the residual blocks")
    flag("--disc-norm", default="batch", choices=["batch", "instance"], help="normalization in the discriminators")
    flag("--disc-kernel", type=odd, default=1, metavar="K", help="width of the discriminators' convolutions, odd")

    flag = parser.add_argument_group("machine").add_argument
    flag("--device", help="cpu, cuda, cuda:1; cuda where there is one if not given")
    flag("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help="of products; losses stay fp32")
    flag("--compile", action=switch, default=False, help="torch.compile the networks")
    flag("--channels-last", action=switch, default=False, help="store activations channels last")
    flag("--deterministic", action=switch, default=False, help="kernels that repeat bit for bit")
    flag("--workers", type=number(int, 0, 1000), default=2, metavar="N", help="processes that read images")

    flag = parser.add_argument_group("files").add_argument
    flag("--name", help="of the run's folder; <dataset>_<method>_<ratio>_s<seed> if not given")
    flag("--checkpoints", default="checkpoints", metavar="DIR", help="a folder a run")
    flag("--results", default="results", metavar="DIR", help="what --testing and --predict write")
    flag("--cache", default="data/cache", metavar="DIR", help="decoded and resized images")
    flag("--checkpoint", metavar="FILE", help="use this file, or folder's best.pt, not the most recent run's")
    flag("--overwrite", action="store_true", help="delete the run's folder and start anew")
    flag("--eval-every", type=count, default=1, metavar="N", help="epochs between evaluations")
    flag("--save-every", type=weight, default=10.0, metavar="MIN", help="minutes between checkpoints")
    flag("--log-every", type=count, default=20, metavar="N", help="steps between loss values")
    told = "with every evaluation: each term's gradient in G_IS, the discriminators' answers"
    flag("--diagnose", action=switch, default=False, help=told)
    then = "what a loss that is not finite does to the run; skip leaves that step out"
    flag("--on-nonfinite", default="stop", choices=["stop", "skip"], help=then)
    return parser


def toml_flags(path: Path, table: dict, method: str, parser: argparse.ArgumentParser, known: set[str]) -> list[str]:
    """A TOML's top-level keys, and those of the method's own table, as a command line; InputError names the file."""
    sections = {key: value for key, value in table.items() if isinstance(value, dict)}
    keys = {key: value for key, value in table.items() if key not in sections}
    for key in [*(sections.keys() - METHODS), *keys, *(key for section in sections.values() for key in section)]:
        if key not in known:
            close = difflib.get_close_matches(key, known | METHODS.keys(), 1)
            raise InputError(f"{path}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    flags = []
    for key, value in (keys | sections.get(str(method), {})).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags.append(f"{flag}={value}")
    try:
        parser.parse_args(flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return flags


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Flags with the TOMLs' under them, resolved; `given` holds what the command line itself says."""
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {key: value for key, value in given.items() if value is not unset}
    if sum(mode in given for mode in MODES) != 1:
        raise InputError(f"give one of {', '.join(f'--{mode}' for mode in MODES)}")

    flags = []
    if "training" in given:  # a test takes everything from the checkpoint
        config = {Path(given["config"]): read_toml(Path(given["config"]))} if "config" in given else {}
        said = {key: value for table in (*config.values(), given) for key, value in table.items()}
        if any(isinstance(table.get("dataset"), dict) for table in config.values()):
            raise InputError(f"{given['config']}: describes a dataset; give it as --dataset")
        described = data_utils.dataset_toml(str(said.get("dataset", defaults["dataset"])))
        tables = {described: {key: value for key, value in read_toml(described).items() if key != "dataset"}, **config}
        method = said.get("method", tables[described].get("method", defaults["method"]))
        known = set(defaults) - NOT_IN_TOML
        flags = [flag for path, table in tables.items() for flag in toml_flags(path, table, method, parser, known)]
    args = parser.parse_args([*flags, *argv])
    args.given = given
    args.decay_epoch = args.epochs // 4 if args.decay_epoch is None else args.decay_epoch
    args.disc_lr = args.lr if args.disc_lr is None else args.disc_lr
    args.disc_betas = args.disc_betas or args.betas
    args.lambda6 = float(args.method == "meanteacher") if args.lambda6 is None else args.lambda6
    consistent = args.lambda6 > 0 and args.method in ("cyclegan", "meanteacher")
    args.ema = 0.99 * consistent if args.ema is None else args.ema
    args.data_root = args.data_root or f"data/{Path(args.dataset).stem}"
    return args


# Training


class Run:
    """A training run: its folder, its networks and how far it is.

    A checkpoint holds networks, optimizers, schedulers, counters, the running sums of the losses, and each process's
    replay pools and random generators; the order of the images follows from seed and epoch. So a run goes on as if
    never stopped.
    """

    def __init__(self, args: argparse.Namespace, spec: DatasetSpec, folder: Path, parts: Split, device: torch.device):
        self.args, self.spec, self.folder, self.parts, self.device = args, spec, folder, parts, device
        utils.seed_everything(args.seed, args.deterministic)
        self.model = METHODS[args.method](spec, args)
        self.model.to(device, memory_format=utils.memory_format(args.channels_last))
        if utils.rank():
            torch.manual_seed(args.seed + 2**33 * utils.rank())  # drop-out and pools differ between processes
        self.n_steps = math.ceil(max(len(parts.labeled), len(parts.unlabeled)) / args.batch_size)  # of an epoch
        self.n_images = self.n_steps * args.batch_size
        decay = utils.SCHEDULES[args.schedule](args.epochs, args.decay_epoch)
        self.schedulers = {
            key: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step / self.n_steps))
            for key, optimizer in self.model.optimizers.items()
        }
        self.epoch = self.step = 0  # epochs done, steps done within the next one
        self.evaluated = 0  # the epoch of the last evaluation
        self.skipped = 0  # steps whose loss was not finite
        self.best = {"miou": -1.0, "epoch": 0}
        self.metrics: dict = {}  # of the last evaluation
        self.sums: dict[str, Tensor] = {}  # of each loss since then
        self.saved_at = time.monotonic()
        self.diagnosis: dict[str, dict[str, float]] = {}  # of the last evaluation, where it is asked for
        self.stopped = 0  # the signal that every process has agreed to end at

    @property
    def global_step(self) -> int:
        return self.epoch * self.n_steps + self.step

    def batches(self, data: Dataset) -> Iterator[list[Tensor]]:
        """`data` in order, as the networks take it: this process's share of each batch."""
        args, n = self.args, utils.world_size()
        mine = Subset(data, range(utils.rank(), len(data), n))
        how = args.workers, args.channels_last, args.normalization
        return data_utils.batches(mine, args.batch_size // n, self.device, *how)

    def save(self, name: str) -> None:
        """Write last.pt with all that going on needs, or best.pt with what testing needs."""
        state = {
            "config": {key: getattr(self.args, key) for key in RESULT},
            "dataset": asdict(self.spec),
            "data_root": self.args.data_root,
            "split": self.parts.hash(),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
        }
        if name == "last.pt":
            self.saved_at = time.monotonic()
            state |= {
                "optimizers": {key: optimizer.state_dict() for key, optimizer in self.model.optimizers.items()},
                "schedulers": {key: scheduler.state_dict() for key, scheduler in self.schedulers.items()},
                "progress": {key: getattr(self, key) for key in PROGRESS},
            }
            own = {
                "pools": {k: [x.cpu() for x in pool.fakes] for k, pool in getattr(self.model, "pools", {}).items()},
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "sums": {key: value.cpu() for key, value in self.sums.items()},
            }
            state["processes"] = utils.from_each(own)
        if utils.rank() == 0:
            utils.save_checkpoint(self.folder / name, state)

    def restore(self, state: dict) -> None:
        """Go on where a last.pt was written; InputError where it is not whole."""
        path = self.folder / "last.pt"
        utils.load_weights(self.model, state["model"], path)
        try:
            for key, optimizer in self.model.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][key])
                self.schedulers[key].load_state_dict(state["schedulers"][key])
            vars(self).update({key: state["progress"][key] for key in PROGRESS})
            own = state["processes"][utils.rank() % len(state["processes"])]
            for key, fakes in own["pools"].items():
                self.model.pools[key].fakes = [fake.to(self.device) for fake in fakes]
            torch.set_rng_state(own["rng"])
            if self.device.type == "cuda" and own["cuda_rng"] is not None:
                torch.cuda.set_rng_state(own["cuda_rng"], self.device)
            self.sums = {key: value.to(self.device) for key, value in own["sums"].items()}
        except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint {path}: a run cannot go on from it ({error!r})") from error
        if utils.rank():
            return
        log = self.folder / "metrics.jsonl"  # lines of epochs after the checkpoint will be written again
        lines = log.read_text().splitlines() if log.is_file() else []
        lines = [line for line in lines if json.loads(line)["epoch"] <= self.evaluated]
        utils.write_atomically(log, "".join(f"{line}\n" for line in lines))
        print(f"resuming at epoch {self.epoch + 1}, step {self.step}")

    def initialize(self, state: dict) -> None:
        """Take over the networks of another run's checkpoint: all from one of the same method, else G_IS.

        The average of G_IS starts from that run's average, or from its G_IS where it kept none.
        """
        weights, same = state["model"], state["config"].get("method") == self.args.method
        names = [name for name, _ in self.model.named_children() if same or name in ("G_IS", "teacher")]
        for name in names:
            of = name if name != "teacher" or any(k.startswith("teacher.") for k in weights) else "G_IS"
            network = {k.removeprefix(f"{of}."): v for k, v in weights.items() if k.startswith(f"{of}.")}
            utils.load_weights(getattr(self.model, name), network, f"--init {self.args.init}: {name}")
        print(f"starting from {', '.join(names)} of {self.args.init}")

    def mean_losses(self) -> dict[str, float]:
        """Each loss's mean since the last evaluation. It waits for the device: not for every step."""
        values = utils.total(torch.stack(list(self.sums.values()))).tolist() if self.sums else []
        sums = dict(zip(self.sums, values, strict=True))
        steps = sums.pop("steps", 1)
        return {name: value / steps for name, value in sums.items()}

    def skip(self, error: NonFiniteLoss) -> None:
        """Count a step that was not made; TrainingError unless --on-nonfinite skip. What is on disk stays."""
        if self.args.on_nonfinite == "stop":
            last = self.folder / "last.pt"
            kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was written yet"
            where = f"epoch {self.epoch + 1}, step {self.step + 1}"
            raise TrainingError(f"{where}: a loss is not finite ({error}); {kept}; see --on-nonfinite") from error
        self.skipped += 1

    def train(self, labeled: Stored, unlabeled: Stored, val: Stored) -> int:
        """Train to the last epoch; returns 0, or 128 + n where signal n ended it."""
        args, model = self.args, self.model
        hidden = utils.rank() > 0 or None
        self.events = None if hidden else utils.EventLog(self.folder, self.global_step and self.global_step + 1)
        if self.events and not self.global_step:
            about = {"dataset": self.spec.name, "labeled": len(self.parts.labeled), "run": self.folder.name}
            self.events.settings(about | {key: getattr(args, key) for key in RESULT}, "val/miou")
        done = self.epoch * self.n_images + self.step * args.batch_size
        bar = tqdm(total=args.epochs * self.n_images, initial=done, unit=" images", disable=hidden, dynamic_ncols=True)
        speed = ""
        model.train()
        while not self.stopped:
            if self.evaluated < self.epoch and (self.epoch % args.eval_every == 0 or self.epoch == args.epochs):
                first = Subset(Epoch(labeled, unlabeled, args.seed, 0, args.batch_size), range(args.batch_size))
                self.diagnosis = diagnose(model, next(iter(self.batches(first)))) if args.diagnose else {}
                self.evaluate(val, f"epoch {self.epoch}/{args.epochs}{speed}")
                continue
            if self.epoch == args.epochs:
                break
            started, first = time.monotonic(), self.step * args.batch_size
            bar.set_description(f"epoch {self.epoch + 1}/{args.epochs}")
            epoch = Epoch(labeled, unlabeled, args.seed, self.epoch, args.batch_size)
            for x, y, *x_u in self.batches(Subset(epoch, range(first, self.n_images))):
                model.progress = self.global_step / (args.epochs * self.n_steps)
                try:
                    losses = model.step(x, y.masked_fill(y == IGNORE, 0) if args.ignored == "background" else y, *x_u)
                    counted = losses | {"steps": torch.ones((), device=self.device)}
                    self.sums = {name: self.sums.get(name, 0) + value for name, value in counted.items()}
                except NonFiniteLoss as error:
                    self.skip(error)
                    losses = {}
                self.step += 1
                bar.update(args.batch_size)
                if losses and self.global_step % args.log_every == 0:
                    self.log(losses, bar)
                for scheduler in self.schedulers.values():
                    scheduler.step()
                self.stopped, due = utils.agree(stop.signum, time.monotonic() - self.saved_at > 60 * args.save_every)
                if self.stopped:
                    break
                if due:
                    self.save("last.pt")
            if self.step == self.n_steps:
                speed = f", {(self.n_images - first) / (time.monotonic() - started):.1f} images/s"
                self.epoch, self.step = self.epoch + 1, 0
        bar.close()
        if self.events:
            self.events.close()
        if self.evaluated == args.epochs:
            return 0
        self.save("last.pt")
        name = signal.Signals(self.stopped).name
        print(f"{name}: saved {self.folder / 'last.pt'}; the same command goes on from there")
        return 128 + self.stopped

    def log(self, losses: dict[str, Tensor], bar: tqdm) -> None:
        """This step's losses, on the bar and in TensorBoard."""
        means = utils.total(torch.stack(list(losses.values()))) / utils.world_size()
        if self.events is None:
            return
        values = dict(zip(losses, means.tolist(), strict=True))
        for name, value in values.items():
            self.events.scalar(f"loss/{name}", value, self.global_step)
        self.events.scalar("lr", self.schedulers["G"].get_last_lr()[0], self.global_step)
        bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)

    def evaluate(self, val: Stored, title: str) -> None:
        """Score the validation set, write metrics.jsonl, TensorBoard, best.pt and last.pt, print a line.

        A signal ends it before anything is written: who goes on evaluates again.
        """
        batches = itertools.takewhile(lambda _: not stop.signum, self.batches(val))
        counts = evaluate(self.model, batches, self.spec, self.device)
        (self.stopped,) = utils.agree(stop.signum)
        if self.stopped:
            return
        losses, self.sums, self.evaluated = self.mean_losses(), {}, self.epoch
        self.metrics = utils.segmentation_metrics(utils.total(counts), self.spec)
        miou = self.metrics["miou"] or 0.0
        if miou > self.best["miou"]:
            self.best = {"miou": miou, "epoch": self.epoch}
            self.save("best.pt")
        if utils.rank() == 0:
            self.record(val, losses, title)
        self.save("last.pt")

    def record(self, val: Stored, losses: dict[str, float], title: str) -> None:
        """An evaluation's line in metrics.jsonl and on the screen, its curves and pictures in TensorBoard."""
        record = {"epoch": self.epoch, "step": self.global_step, **self.metrics, "losses": losses, **self.diagnosis}
        log = self.folder / "metrics.jsonl"
        before = log.read_text(encoding="utf-8") if log.is_file() else ""
        utils.write_atomically(log, f"{before}{json.dumps(record | {'skipped': self.skipped})}\n")
        curves = {f"val/{key}": self.metrics[key] for key in ("miou", "miou_all", "miou_official", "pixel_accuracy")}
        for kind in "iou", "dice":
            curves |= {f"{kind}/{name}": value for name, value in self.metrics[kind].items()}
        for kind, values in self.diagnosis.items():
            curves |= {f"{kind}/{name}": value for name, value in values.items()}
        for tag, value in curves.items():
            if value is not None:
                self.events.scalar(tag, value, self.global_step)
        self.draw(val)
        best = f"best {self.best['miou']:.4f}"
        if self.best["epoch"] == self.epoch:
            utils.write_atomically(self.folder / "README.md", self.card())
            best = "the best so far"
        terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        skipped = f"; {self.skipped} steps skipped" if self.skipped else ""
        with tqdm.external_write_mode():
            print(f"{title}: {utils.format_means(self.metrics)} ({best}), {terms}{skipped}", flush=True)

    def card(self) -> str:
        """What best.pt is, for whoever is given this folder."""
        args, spec, metrics = self.args, self.spec, self.metrics
        sizes = {role: len(ids) for role, ids in self.parts.ids().items()}
        rows = [f"| {name} | {100 * iou:.2f} |" for name, iou in metrics["iou"].items() if iou is not None]
        best = self.folder / "best.pt"
        return "\n".join(
            [
                f"# {self.folder.name}",
                "",
                f"`best.pt` segments images of {spec.name} into {len(spec.classes)} classes. It was trained by the",
                f"method `{args.method}` of main.py with {sizes['labeled']} annotated and {sizes['unlabeled']} other",
                f"images (ratio {args.ratio:g}, seed {args.seed}) at {args.size[0]}x{args.size[1]} pixels.",
                "",
                f"After epoch {self.epoch} of {args.epochs}, on {sizes['val']} validation images, on which the epoch",
                f"was chosen: mIoU (the mean over the scored classes) {100 * (metrics['miou'] or 0):.2f} per cent.",
                "",
                "| class | IoU in per cent |",
                "| --- | --- |",
                *rows,
                "",
                "```",
                f"python main.py --predict PICTURES --checkpoint {best}",
                f"python main.py --training --dataset {self.folder / 'config.toml'} --name again",
                "```",
                "",
                f"The weights are derived from {spec.name}: its terms of use hold for them too. `split.json` lists",
                "the images, `manifest.json` the versions. Not tested on images of other origin; no medical device.",
                "",
            ]
        )

    @torch.inference_mode()
    def draw(self, val: Stored) -> None:
        """TensorBoard's grid: four fixed validation images of many classes, and what the networks make of them."""
        shown = Subset(val, val.of_many_classes(4))
        how = 0, self.args.channels_last, self.args.normalization
        x, y = next(data_utils.batches(shown, len(shown), self.device, *how))
        self.model.eval()
        pictures = self.model.pictures(x, y)
        self.model.train()
        grid = utils.picture_grid(x, {"y": y, **pictures}, self.spec.palette)
        self.events.image("validation", grid, self.global_step)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable, spec: DatasetSpec, device: torch.device, visit=None) -> Tensor:
    """The confusion matrix (K, K) of the model over batches (x, y); `visit(x, y, logits)` sees each of them."""
    matrix = utils.ConfusionMatrix(len(spec.classes), device)
    model.eval()
    for x, y in batches:
        logits = model.segment(x)
        matrix.update(logits.argmax(1), y)
        if visit:
            visit(x, y, logits)
    model.train()
    return matrix.counts


def previous_state(folder: Path, args: argparse.Namespace, spec: DatasetSpec) -> dict | None:
    """The last.pt of a run with the same settings; None for a new run, InputError where settings differ."""
    if args.overwrite or not (folder / "last.pt").is_file():
        return None
    state = utils.load_checkpoint(folder / "last.pt")
    if type(state.get("progress")) is not dict:
        raise InputError(f"checkpoint {folder / 'last.pt'}: a run cannot go on from it; --overwrite starts anew")
    before = state["config"] | {f"[dataset] {key}": value for key, value in state["dataset"].items()}
    now = {key: getattr(args, key) for key in RESULT}
    now |= {f"[dataset] {key}": value for key, value in asdict(spec).items()}
    if differ := [
        f"{key} was {before.get(key)}, is {now[key]}" for key in now if str(before.get(key)) != str(now[key])
    ]:
        what = f"{folder}: a run with other settings stands there ({utils.first_ten(differ)})"
        raise InputError(f"{what}; give --name for another folder, or --overwrite to start anew")
    return state


def make_run_folder(folder: Path, args: argparse.Namespace, spec: DatasetSpec, parts: Split) -> None:
    """A new run's folder with its config.toml and split.json; --overwrite deletes the run that stood there."""
    if args.overwrite:
        files = [path for path in folder.iterdir() if path.name != "lock"]
        if files and not (folder / "config.toml").is_file():
            raise InputError(f"--overwrite: {folder} holds no run; delete it by hand")
        for path in sorted(files, key=lambda path: path.name == "config.toml"):  # which says that this is a run, last
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first last.pt
    flags = {key: value for key, value in vars(args).items() if key not in {*NOT_IN_TOML, "given", "name", "dataset"}}
    note = f"# python main.py --training --dataset {folder / 'config.toml'} --name NAME repeats this run"
    toml = f"{note}\n{utils.to_toml(flags)}\n[dataset]\n{utils.to_toml(asdict(spec))}"
    utils.write_atomically(folder / "config.toml", toml)
    utils.write_atomically(folder / "split.json", json.dumps({**parts.ids(), "hash": parts.hash()}, indent=1))


def train(args: argparse.Namespace) -> int:
    """--training: a new run, or the rest of one that was stopped."""
    device = utils.pick_device(args.device, args.precision)
    spec = data_utils.load_spec(args.dataset)
    if args.batch_size % utils.world_size():
        raise InputError(f"--batch-size {args.batch_size} cannot be divided among {utils.world_size()} processes")
    utils.meet(device)
    name = args.name or f"{spec.name}_{args.method}_{args.ratio:g}_s{args.seed}"
    if Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise InputError(f"--name {name}: expected the name of a folder in {args.checkpoints}, not a path")
    folder = Path(args.checkpoints) / name
    with nullcontext() if utils.rank() else utils.locked(folder, "--checkpoints"):
        return train_in(folder, args, spec, device)


def train_in(folder: Path, args: argparse.Namespace, spec: DatasetSpec, device: torch.device) -> int:
    """Train in a folder that no other process trains in."""
    state = utils.from_first(None if utils.rank() else previous_state(folder, args, spec))
    if state and state["progress"].get("evaluated") == args.epochs:
        best = state["progress"]["best"]
        print(f"{folder} is finished after {args.epochs} epochs: best mIoU {best['miou']:.4f} at epoch {best['epoch']}")
        return 0

    source = utils.load_checkpoint(Path(args.init)) if args.init and not state else None
    samples = data_utils.index(spec, Path(args.data_root), args.split)
    parts = data_utils.split(samples, args.ratio, args.seed, spec, args.split, args.label_unit)
    if args.method != "supervised" and not parts.unlabeled:
        raise InputError(f"--ratio {args.ratio:g} leaves no unlabeled image for --method {args.method}")
    if state and state["split"] != parts.hash():
        raise InputError(f"{folder}: {args.data_root} holds other files than at its start; give --name or --overwrite")
    standard = args.split == "standard"
    found, expected = len({s.group for s in samples}), sum((spec.standard_counts if standard else spec.counts) or ())
    if expected not in (0, found):
        then = "all are used" if standard else "split in the same proportions"
        print(f"{args.data_root}: {found} of {spec.name}'s {expected} images or exams: {then}")
    sizes = f"{len(parts.labeled)} labeled, {len(parts.unlabeled)} unlabeled, {len(parts.val)} validation images"
    count, threads = utils.world_size(), torch.get_num_threads()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
    print(f"method:  {args.method}, ratio {args.ratio:g}, seed {args.seed}, {args.epochs} epochs")
    print(f"data:    {spec.name} in {args.data_root}: {sizes}")
    print(f"network: {args.size[0]}x{args.size[1]} pixels, ngf {args.ngf}, batches of {args.batch_size}")
    print(f"device:  {f'{count} processes, each on ' if count > 1 else ''}{machine}, {args.precision}")
    print(f"files:   {folder}", flush=True)
    with utils.in_turn():
        cache = data_utils.open_cache(spec, samples, tuple(args.size), Path(args.cache), args.workers)
    seen = sum(np.bincount(cache.masks[cache.rows[s.id]].ravel(), minlength=256) for s in parts.labeled)
    if absent := [name for k, name in enumerate(spec.classes) if not seen[k]]:
        print(f"no labeled mask shows {utils.first_ten(absent)}: is every value of the masks the class's index?")
    run = Run(args, spec, folder, parts, device)
    if state:
        run.restore(state)
    elif source:
        run.initialize(source)
    if utils.rank() == 0:
        if not state:
            make_run_folder(folder, args, spec, parts)
        utils.write_manifest(folder, device, started=datetime.now(UTC).isoformat(timespec="seconds"))
    if utils.world_size() > 1:
        distribute(run.model, device)
    if args.compile:
        utils.compile_networks(run.model)
    stop.can_wait = True
    code = run.train(*(Stored(cache, [cache.rows[i] for i in ids]) for ids in parts.ids().values()))
    stop.can_wait = False
    if code == 0 and utils.rank() == 0:
        utils.write_manifest(folder, device, finished=datetime.now(UTC).isoformat(timespec="seconds"))
        best = f"best mIoU {run.best['miou']:.4f} after epoch {run.best['epoch']}"
        print(utils.format_metrics(run.metrics))
        print(f"after the last epoch {utils.format_means(run.metrics)}; {best}")
        print(f"curves: tensorboard --logdir {folder}")
        print(f"test it: python main.py --testing --checkpoint {folder / 'best.pt'}")
        print(f"use it:  python main.py --predict PICTURES --checkpoint {folder / 'best.pt'}")
    return code


# Testing and predicting


def find_checkpoint(args: argparse.Namespace) -> Path:
    """--checkpoint, or best.pt of the most recent run that --name, --dataset, --method, --ratio and --seed mean."""
    if args.checkpoint:
        path = Path(args.checkpoint)
        return path / "best.pt" if path.is_dir() else path
    wanted = {key: args.given[key] for key in ("name", "method", "ratio", "seed") if key in args.given}
    if "dataset" in args.given:
        wanted["dataset"] = Path(args.dataset).stem
    runs = {}
    for config in Path(args.checkpoints).glob("*/config.toml"):
        table = read_toml(config)
        has = {**table, "dataset": table.get("dataset", {}).get("name"), "name": config.parent.name}
        files = [file for file in (config.with_name("last.pt"), config.with_name("best.pt")) if file.is_file()]
        if config.with_name("best.pt") in files and all(has.get(key) == value for key, value in wanted.items()):
            runs[config.with_name("best.pt")] = files[0].stat().st_mtime_ns
    if not runs:
        which = "".join(f" --{key} {value}" for key, value in wanted.items())
        raise InputError(f"{args.checkpoints} holds no trained run{which}: python main.py --training{which} makes one")
    return max(runs, key=runs.get)


@dataclass(frozen=True)
class Trained:
    """A checkpoint's network, and the settings that it was trained with under those of the command line."""

    path: Path
    state: dict
    args: argparse.Namespace
    spec: DatasetSpec
    device: torch.device
    model: nn.Module


def load_trained(args: argparse.Namespace) -> Trained:
    """What --testing and --predict mean; InputError where the flags contradict the checkpoint."""
    path = find_checkpoint(args)
    state = utils.load_checkpoint(path)
    spec = data_utils.make_spec(state["dataset"], str(path))
    parser, config = build_parser(), {key: value for key, value in state["config"].items() if value is not None}
    config = vars(parser.parse_args(toml_flags(path, config, "", parser, set(RESULT))))  # a stranger's may be anything
    config = {key: config[key] for key in RESULT if key in state["config"]}
    fixed = {**config, "dataset": spec.name}
    asked = {key: value for key, value in args.given.items() if key in fixed and key != "batch_size"}
    if "dataset" in asked:
        asked["dataset"] = Path(args.dataset).stem
    if differ := [f"--{k.replace('_', '-')} is {fixed[k]}, not {v}" for k, v in asked.items() if v != fixed[k]]:
        raise InputError(f"{path}: {utils.first_ten(differ)}; a checkpoint fixes these")
    args = argparse.Namespace(**{**vars(args), **config})
    args.batch_size = args.given.get("batch_size", args.batch_size)
    args.data_root = args.given.get("data_root", state["data_root"])
    device = utils.pick_device(args.device, args.precision)
    model = METHODS[args.method](spec, args).to(device, memory_format=utils.memory_format(args.channels_last))
    utils.load_weights(model, state["model"], path)
    return Trained(path, state, args, spec, device, model.eval())


def split_again(trained: Trained) -> tuple[list[Sample], Split]:
    """All samples, and the split that a checkpoint was trained with; InputError where the files are others."""
    args, spec = trained.args, trained.spec
    samples = data_utils.index(spec, Path(args.data_root), args.split)
    parts = data_utils.split(samples, args.ratio, args.seed, spec, args.split, args.label_unit)
    if parts.hash() != trained.state["split"]:
        raise InputError(f"--data-root {args.data_root}: holds other files than {trained.path} was trained with")
    return samples, parts


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, K, H, W) at another size, bilinearly, in float32."""
    return torch.nn.functional.interpolate(logits.float(), size, mode="bilinear")


def test(trained: Trained) -> int:
    """--testing: metrics.json, per_class.csv, masks and panels of a checkpoint's validation images."""
    path, state, args, spec = trained.path, trained.state, trained.args, trained.spec
    device, model = trained.device, trained.model
    samples, parts = split_again(trained)
    folder = Path(args.results) / path.resolve().parent.name
    for sub in ("masks", "panels"):
        utils.make_folder(folder / sub, "--results")
        for old in (folder / sub).glob("*.png"):  # of an earlier test
            old.unlink()
    cache = data_utils.open_cache(spec, samples, tuple(args.size), Path(args.cache), args.workers)
    names = [sample.id for sample in parts.val]
    waiting, native = iter(parts.val), utils.ConfusionMatrix(len(spec.classes))
    bar = tqdm(total=len(names), desc=f"testing {folder.name}", unit=" images", disable=None)

    def write(x: Tensor, y: Tensor, logits: Tensor) -> None:
        prediction = logits.argmax(1)
        columns = {"y": y, "G_IS(x)": prediction}
        if hasattr(model, "paint"):
            columns["G_SI(y)"] = model.paint(y)
        for i in range(len(x)):
            sample = next(waiting)
            name = sample.id
            if args.native_size:
                truth = torch.from_numpy(data_utils.read_sample(sample, spec)[1])[None]
                native.update(enlarge(logits[i : i + 1], truth.shape[-2:]).argmax(1).cpu(), truth)
            utils.save_mask(folder / "masks" / f"{name}.png", prediction[i], spec.palette)
            row = {title: column[i : i + 1] for title, column in columns.items()}
            panel = utils.picture_grid(x[i : i + 1], row, spec.palette)
            save_image(panel, folder / "panels" / f"{name}.png")
        bar.update(len(x))

    val = Stored(cache, [cache.rows[name] for name in names])
    how = args.workers, args.channels_last, args.normalization
    images = data_utils.batches(val, args.batch_size, device, *how)
    counts = evaluate(model, images, spec, device, write)
    bar.close()
    metrics = utils.segmentation_metrics(counts, spec)
    about = {"n_images": len(names), "split": state["split"], "epoch": state["epoch"], "checkpoint": str(path)}
    about |= {"dataset": spec.name, "method": args.method, "ratio": args.ratio, "seed": args.seed}
    if args.native_size:
        about["native_size"] = utils.segmentation_metrics(native.counts, spec)
    utils.write_atomically(folder / "metrics.json", json.dumps({**metrics, **about}, indent=1))
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["class", "iou", "dice", "scored"])
    rows.writerows([c, metrics["iou"][c], metrics["dice"][c], k in spec.scored] for k, c in enumerate(spec.classes))
    utils.write_atomically(folder / "per_class.csv", table.getvalue())
    print(f"{path} after epoch {state['epoch']}, on {len(names)} validation images of {spec.name}, in per cent:")
    print(utils.format_metrics(metrics))
    if args.native_size:
        print(f"at the masks' own size: {utils.format_means(about['native_size'])}")
    painted = ", image painted from the truth" if hasattr(model, "paint") else ""
    print(f"metrics.json, per_class.csv, masks/ and panels/ (image, truth, prediction{painted}) are in {folder}")
    return 0


@torch.inference_mode()
def predict(trained: Trained) -> int:
    """--predict: the masks of pictures and NIfTI volumes at their own size; what is none is listed."""
    args, spec = trained.args, trained.spec
    files, skipped = data_utils.find_pictures(list(map(Path, args.predict)))
    folder = Path(args.results) / trained.path.resolve().parent.name / "predict"
    utils.make_folder(folder / "masks", "--results")

    def planes() -> Iterator[tuple[Path, int, Tensor]]:
        for path in tqdm(files, desc="predicting", unit=" files", disable=None):
            try:
                pixels = data_utils.read_planes(path, spec.channels)
            except InputError as error:
                skipped.append(str(error))
                continue
            yield from ((path, len(pixels), plane) for plane in pixels)

    waiting, n_written = planes(), 0
    masks: dict[Path, list[Tensor]] = {}
    while batch := list(itertools.islice(waiting, args.batch_size)):
        x = [data_utils.resize(plane, args.size)[None].to(trained.device) for _, _, plane in batch]
        x = torch.cat([data_utils.normalize(each, args.normalization) for each in x])
        logits = trained.model.segment(x)
        if args.tta:
            both = logits.softmax(1), trained.model.segment(x.flip(3)).softmax(1).flip(3)
            logits = (sum(both) / 2).log()
        for (path, n_planes, plane), one in zip(batch, logits, strict=True):
            large = enlarge(one[None], plane.shape[-2:])[0]
            done = masks.setdefault(path, [])
            done.append(large.argmax(0).to("cpu", torch.uint8))
            place = files[path]
            name = place.with_name(f"{place.name}_s{len(done) - 1:02d}") if n_planes > 1 else place
            if args.overlay:
                utils.save_overlay(folder / "overlays" / f"{name}.png", plane, done[-1], spec.palette)
            if args.save_probabilities:
                probabilities = folder / "probabilities" / f"{name}.npz"
                probabilities.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(probabilities, large.softmax(0).half().cpu().numpy())
            if len(done) == n_planes:
                volume = torch.stack(masks.pop(path))
                data_utils.save_prediction(folder / "masks" / place, path, volume, spec)
                if spec.label_ids:
                    values = torch.from_numpy(spec.file_values())[volume.long()]
                    data_utils.save_prediction(folder / "label_ids" / place, path, values)
                n_written += 1
    for problem in skipped:
        print(f"skipped {problem}")
    if not n_written:
        raise InputError("--predict: found no picture and no NIfTI volume")
    print(f"{n_written} masks by {trained.path} are in {folder / 'masks'}")
    return 0


def do(argv: list[str]) -> int:
    """What a command line of this program asks for."""
    args = parse_args(argv)
    if args.training:
        return train(args)
    if utils.world_size() > 1:
        raise InputError("--testing and --predict run in one process: without torchrun")
    return (test if args.testing else predict)(load_trained(args))


def main(argv: list[str] | None = None, command: Callable[[list[str]], int] = do) -> int:
    """Do a command, this program's or a tool's; what is wrong becomes one error line.

    Exit code: 0 done, 1 failed while running, 2 wrong flags, configuration or data, 128 + n after signal n.
    """
    if utils.rank():  # of several processes, the first one speaks
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except (InputError, TrainingError) as error:
        said, code = str(error), 2 if isinstance(error, InputError) else 1
    except OSError as error:
        said, code = f"{error.filename or 'a file'}: {error.strerror or error}", 1
    except (MemoryError, RuntimeError) as error:
        said, code = utils.failure(error), 1
        if said is None:
            raise
    if utils.rank() == 0 or said.startswith("out of memory"):
        print(f"error: {said}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
