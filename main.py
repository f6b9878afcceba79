"""Train, test and use semi-supervised segmentation networks.

python main.py --training | --testing | --predict PATH...

A TOML is a command line written down: parser defaults (the paper's) < config/<dataset>.toml <
--config FILE < command line.
"""

if __name__ == "__main__":  # before the slow imports, so that a signal during them is heard
    from engine import signals

    signals.install()

import argparse
import difflib
import functools
import io
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data_utils
import utils
from arch.generators import MIN_SIZE
from data_utils import Data, load_data, load_part
from datasets.layouts import SPLITS, split_file
from datasets.spec import DatasetSpec, dataset_toml, load_spec, make_spec, read_toml
from engine import predict
from engine.run import Run
from engine.signals import stop
from engine.train import evaluate, train_one_epoch
from model import METHODS, Method, distribute
from utils import InputError, TrainingError

MODES = ("training", "testing", "predict")
MODE_FLAGS = {  # the flags that only some modes have
    "config": ("training",),
    "overwrite": ("training",),
    "checkpoint": ("testing", "predict"),
    "native_size": ("testing",),
    "part": ("testing",),
    "overlay": ("predict",),
}
SETTINGS = ("experiment", "optimization", "networks")  # groups of flags that change the result


# Flags


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show the description as written, and every default except None, False and []."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raise InputError for wrong flags, and remember the flags of each group."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, allow_abbrev=False, **kwargs)
        self.keys: dict[str, list[str]] = {}  # of each group's flags

    def error(self, message: str):
        hint = "; --help lists the flags" if message.startswith("unrecognized") else ""
        raise InputError(message + hint)

    def group(self, title: str) -> Callable:
        """Like add_argument, for a new group."""
        group, keys = self.add_argument_group(title), self.keys.setdefault(title, [])
        return lambda *flags, **about: keys.append(group.add_argument(*flags, **about).dest)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite int or float from `low` (`above`: exclusive) to `high`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            limit = f" and at most {high:,}" if high < math.inf else ""
            least = f"{'greater than' if above else 'at least'} {low:,}"
            raise argparse.ArgumentTypeError(f"{text} must be {least}{limit}")
        return value

    convert.__name__ = kind.__name__  # argparse puts it into "invalid int value"
    return convert


def odd(text: str) -> int:
    """An argparse type: an odd number from 1 to 31."""
    if int(text) not in range(1, 32, 2):
        raise argparse.ArgumentTypeError(f"{text} must be odd, from 1 to 31")
    return int(text)


def split_kind(text: str) -> str:
    """An argparse type: a rule, a name in config/splits/, or a .json file with lists of ids."""
    path = split_file(text)
    if not (text in SPLITS or text.lower().endswith(".json") or path.is_file()):
        known = [*SPLITS, *sorted(file.stem for file in path.parent.glob("*.json"))]
        raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(known)} or a .json file")
    return text


def build_parser() -> Parser:
    """All flags, with the paper's defaults (Section 3.3)."""
    parser = Parser("main.py", description=__doc__.splitlines()[0])
    share, weight, count = number(float, 0, 1, above=True), number(float, 0), number(int, 1, 10**9)
    size, beta = number(int, MIN_SIZE, 16384), number(float, 0, 0.9999)
    switch = argparse.BooleanOptionalAction

    flag = parser.group("mode")
    flag("--training", action="store_true", help="train, or resume an interrupted run")
    flag("--testing", action="store_true", help="score a run's best.pt; write masks and panels")
    flag("--predict", nargs="+", metavar="PATH", help="segment pictures, NIfTI volumes, folders")
    flag("--config", metavar="FILE", help="TOML with flags, read after the dataset's TOML")
    flag("--checkpoint", metavar="FILE", help="checkpoint to use; default: newest run's best.pt")
    flag("--overlay", action="store_true", help="with --predict, also write masks over pictures")
    flag("--native-size", action="store_true", help="with --testing, also score at full size")
    part = "with --testing, score this part of the dataset (a folder's or ACDC's test images)"
    flag("--part", choices=["val", "test"], help=part)
    flag("--overwrite", action="store_true", help="delete the run's folder and start over")

    flag = parser.group("experiment")
    flag("--dataset", default="voc", help="name in config/ or path of a .toml file")
    methods = "cyclegan: Ours; supervised: Partial or Full; advsemi: Hung et al.; meanteacher"
    flag("--method", default="cyclegan", choices=list(METHODS), help=methods)
    flag("--ratio", type=share, default=0.2, help="share of the training images with labels")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="seed of split, weights and order")
    splits = "paper, standard (as in other papers), image (85/15, as released)"
    splits += ", a name in config/splits/ or a split.json"
    flag("--split", type=split_kind, default="paper", metavar="SPLIT", help=splits)
    unit = "unit of --ratio: single images or whole exams"
    flag("--label-unit", default="image", choices=["image", "exam"], help=unit)
    hw = ("H", "W")
    flag("--size", type=size, nargs=2, default=[200, 200], metavar=hw, help="input size in pixels")
    scales = "range: (v - mean) / (max - min); half: (v - 0.5) / 0.5, as released"
    flag("--normalization", default="range", choices=["range", "half"], help=scales)
    ignored = "ignored pixels of training masks: skipped, or class 0 as released"
    flag("--ignored", default="skip", choices=["skip", "background"], help=ignored)

    flag = parser.group("optimization")
    augmented = "flip and turn images as the dataset's orientation allows, vary their contrast"
    flag("--augment", action=switch, default=False, help=augmented)
    flag("--lambda1", type=weight, default=1.0, metavar="W", help="weight of L_gen^I (Eq. 8)")
    flag("--lambda2", type=weight, default=0.05, metavar="W", help="weight of L_cycle^S")
    flag("--lambda3", type=weight, default=1.0, metavar="W", help="weight of L_cycle^I")
    flag("--lambda4", type=weight, default=1.0, metavar="W", help="weight of L_disc^S")
    flag("--lambda5", type=weight, default=1.0, metavar="W", help="weight of L_disc^I")
    sums = "mean over pixels, or the sum that Eq. 2, 3 and 6 print (a factor on lambda1, 3, 4, 5)"
    flag("--reduction", default="mean", choices=["mean", "sum"], help=sums)
    flag("--epochs", type=count, default=400, help="passes over the longer list of images")
    decay = "epoch at which the learning rate starts to fall; default: a quarter of --epochs"
    flag("--decay-epoch", type=number(int, 0), metavar="N", help=decay)
    flag("--batch-size", type=count, default=5, metavar="B", help="images of each kind per step")
    flag("--lr", type=number(float, 0, above=True), default=2e-4, help="Adam's learning rate")
    betas = {"nargs": 2, "default": [0.5, 0.999], "metavar": ("B1", "B2")}
    flag("--betas", type=beta, **betas, help="Adam's betas")
    pool = "size of the pool of past fakes for the discriminators (released code: 50)"
    flag("--pool-size", type=number(int, 0), default=0, metavar="N", help=pool)
    fakes = "D_S's input from G_IS(x'): softmax maps, or argmax as released"
    flag("--disc-input", default="softmax", choices=["softmax", "argmax"], help=fakes)
    on = "images that meanteacher mixes and perturbs"
    flag("--cutmix-on", default="both", choices=["both", "unlabeled", "labeled"], help=on)
    flag("--init", metavar="FILE", help="checkpoint (or run's folder) with initial weights")
    precision = "precision of the networks; losses stay fp32"
    flag("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help=precision)

    flag = parser.group("networks")
    flag("--ngf", type=count, default=64, metavar="N", help="width of the generators")
    flag("--ndf", type=count, default=64, metavar="N", help="width of the discriminators")
    flag("--n-blocks", type=number(int, 0), default=9, metavar="N", help="residual blocks")
    chance = number(float, 0, 0.99)
    flag("--dropout", type=chance, default=0.0, metavar="P", help="dropout in residual blocks")
    norms = ["batch", "instance"]
    flag("--disc-norm", default="batch", choices=norms, help="norm of the discriminators")
    flag("--disc-kernel", type=odd, default=1, metavar="K", help="kernel of the discriminators")

    flag = parser.group("machine")
    flag("--device", help="cpu, cuda or cuda:1; default: cuda if there is a GPU")
    flag("--compile", action=switch, default=False, help="torch.compile the networks")
    flag("--deterministic", action=switch, default=False, help="deterministic kernels")
    workers = number(int, 0, 1000)
    flag(
        "--workers",
        type=workers,
        default=2,
        metavar="N",
        help="processes that load images, for training and evaluation each",
    )

    flag = parser.group("files")
    flag("--data-root", metavar="DIR", help="folder of the dataset; default: data/<dataset>")
    flag("--name", help="run's folder; default: <dataset>_<method>_<ratio>_s<seed>")
    flag("--checkpoints", default="checkpoints", metavar="DIR", help="parent of the run folders")
    flag("--results", default="results", metavar="DIR", help="output of --testing and --predict")
    flag("--cache", default="data/cache", metavar="DIR", help="cache of resized images")
    flag("--eval-every", type=count, default=1, metavar="N", help="epochs between evaluations")
    minutes = {"default": 10.0, "metavar": "MIN", "help": "minutes between checkpoints"}
    flag("--save-every", type=weight, **minutes)
    flag("--log-every", type=count, default=20, metavar="N", help="steps between logged losses")
    return parser


def setting_names(parser: Parser | None = None) -> list[str]:
    """The flags that change a result; checkpoints contain them and resumed runs must match them."""
    keys = (parser or build_parser()).keys
    return [key for group in SETTINGS for key in keys[group] if key != "dataset"]


def toml_flags(path: Path, table: dict, parser: Parser, known: list[str]) -> list[str]:
    """A TOML's top-level keys as command-line flags; InputError names the file."""
    flags = []
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{path}: unknown key {key!r}{hint}")
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags.append(f"{flag}={value}")
    try:
        parser.parse_args(flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return flags


def parse_args(argv: list[str], checkpoint: tuple[Path, dict] | None = None) -> argparse.Namespace:
    """Flags from the TOMLs of dataset and --config, or from a checkpoint, then the command line.

    Also sets `given`, the flags on the command line; `settings`, those that change the result;
    `flags`, those of a run's config.toml.
    """
    parser = build_parser()
    defaults, unset = vars(parser.parse_args([])), object()
    unset_flags = argparse.Namespace(**dict.fromkeys(defaults, unset))
    given = vars(parser.parse_args(argv, unset_flags))
    given = {key: value for key, value in given.items() if value is not unset}
    if sum(mode in given for mode in MODES) != 1:
        raise InputError(f"give one of {', '.join(f'--{mode}' for mode in MODES)}")

    for key, modes in MODE_FLAGS.items():
        if key in given and given.keys().isdisjoint(modes):
            flag, needed = key.replace("_", "-"), " or ".join(f"--{mode}" for mode in modes)
            hint = "; --init sets a run's first weights" if key == "checkpoint" else ""
            raise InputError(f"--{flag} needs {needed}{hint}")

    for key, value in given.items():  # config.toml and split.json are UTF-8
        if isinstance(value, str) and value != value.encode(errors="ignore").decode():
            raise InputError(f"--{key.replace('_', '-')} {value!r}: expected UTF-8")

    known, layers = [key for key in defaults if key not in parser.keys["mode"]], {}
    if checkpoint:
        known, layers = setting_names(parser), dict([checkpoint])
    elif "training" in given:
        config = read_toml(Path(given["config"])) if "config" in given else {}
        if isinstance(config.get("dataset"), dict):
            raise InputError(f"{given['config']}: describes a dataset; give it as --dataset")
        name = given.get("dataset", config.get("dataset", defaults["dataset"]))
        path = dataset_toml(str(name))
        layers[path] = {key: value for key, value in read_toml(path).items() if key != "dataset"}
        if config:
            layers[Path(given["config"])] = config
    flags = []
    for path, table in layers.items():
        flags += toml_flags(path, table, parser, known)
    args = parser.parse_args([*flags, *argv])
    if args.split not in SPLITS:
        if "ratio" in given:
            raise InputError(f"--ratio: {args.split} says which images are labeled")
        args.ratio = None
    args.decay_epoch = args.epochs // 4 if args.decay_epoch is None else args.decay_epoch
    args.data_root = args.data_root or f"data/{Path(args.dataset).stem}"
    everything = dict(vars(args))
    hidden = {*parser.keys["mode"], "dataset", "name"}
    args.given = given
    args.settings = {key: everything[key] for key in setting_names(parser)}
    args.flags = {key: value for key, value in everything.items() if key not in hidden}
    return args


# Training


def train(args: argparse.Namespace) -> int:
    """--training: start a run, or resume an interrupted one."""
    device = utils.pick_device(args.device, args.precision)
    spec = load_spec(args.dataset)
    if args.batch_size % utils.world_size():
        processes = f"{utils.world_size()} processes"
        raise InputError(f"--batch-size {args.batch_size} cannot be divided among {processes}")
    utils.join_processes(device)
    batches = make_batches(args, device)
    with Run(args, spec, device) as run:
        data = load_data(args, spec, run.split_hash)
        if run.finished:
            return 0
        describe(args, spec, data, device, run.folder)
        model = build_model(args, spec, device)
        run.start(model, data)
        prepare(model, args, device)
        orientation = spec.orientation if args.augment else None
        train_batches = batches(data.train, orientation=orientation)
        val_batches = batches(data.val)
        while not (run.stopped or run.done):
            if run.evaluation_due:
                images = itertools.takewhile(lambda _: not stop.signum, val_batches)
                run.record(evaluate(model, images, len(spec.classes)))
            else:
                train_one_epoch(model, train_batches.of(run.rest_of_epoch()), run)
        return run.end()


def make_batches(args: argparse.Namespace, device: torch.device) -> Callable:
    """The function from a dataset to its batches on the device, as the flags say."""
    return functools.partial(
        data_utils.Batches,
        batch_size=args.batch_size,
        device=device,
        workers=args.workers,
        normalization=args.normalization,
    )


def build_model(args: argparse.Namespace, spec: DatasetSpec, device: torch.device) -> Method:
    """The method with initial weights that are the same in every process."""
    utils.seed_everything(args.seed, args.deterministic)
    model = METHODS[args.method](spec, args).to(device)
    if utils.rank():  # dropout and pools differ between processes
        torch.manual_seed(args.seed + 2**33 * utils.rank())
    return model


def prepare(model: Method, args: argparse.Namespace, device: torch.device) -> None:
    """Prepare the networks for several processes and for --compile."""
    if utils.world_size() > 1:
        distribute(model, device)
    if args.compile:
        utils.compile_networks(model)


def describe(args, spec: DatasetSpec, data: Data, device: torch.device, folder: Path) -> None:
    """Print a summary of the run, with warnings about data that look incomplete.

    InputError if the labeled masks contain fewer than two classes.
    """
    counts = spec.standard_counts if args.split == "standard" else spec.counts
    expected, found = sum(counts or ()), data.n_groups
    by_counts = args.split in SPLITS and not data_utils.has_val(spec, data.split.val)
    if by_counts and expected not in (0, found):
        standard = args.split == "standard"
        used = "all are used" if standard else "split in the same proportions"
        about = f"{found} images or exams with masks instead of {spec.name}'s {expected}"
        print(f"{args.data_root}: {about}: {used}")
    unused = sum(sample.mask is not None for sample in data.split.unlabeled)
    hint = f" ({unused} have masks that are not used)" if unused else ""
    sizes = f"{len(data.labeled)} labeled, {len(data.unlabeled)} unlabeled{hint}, {len(data.val)}"
    share = f"ratio {args.ratio:g}" if args.split in SPLITS else args.split
    cuda = device.type == "cuda"
    machine = f"CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if cuda else machine
    processes = f"{utils.world_size()} processes, each on " if utils.world_size() > 1 else ""
    height, width = args.size
    length = f"{args.epochs} epochs of {data.train.n_steps(args.batch_size)} steps"
    print(f"method:  {args.method}, {share}, seed {args.seed}, {length}")
    print(f"data:    {spec.name} in {args.data_root}: {sizes} validation images")
    print(f"network: {height}x{width} pixels, ngf {args.ngf}, batches of {args.batch_size}")
    print(f"device:  {processes}{machine}, {args.precision}")
    print(f"files:   {folder}", flush=True)
    seen = np.zeros(256, np.int64)
    for i in range(len(data.labeled)):
        seen += np.bincount(data.labeled.mask(i).numpy().ravel(), minlength=256)
    absent = [name for k, name in enumerate(spec.classes) if not seen[k]]
    question = "are the masks' values class indices? docs/own_data.md explains label_ids and ignore"
    if len(absent) >= len(spec.classes) - 1:
        raise InputError(f"the labeled masks contain at most one class: {question}")
    if absent:
        print(f"no labeled mask contains {utils.first_ten(absent)}: {question}")


# Testing and predicting


def dataset_name(dataset: str) -> str:
    """The name of --dataset: the one that its file gives, or the file's stem."""
    return load_spec(dataset).name if Path(dataset).is_file() else Path(dataset).stem


def find_checkpoint(args: argparse.Namespace) -> Path:
    """--checkpoint, or best.pt of the most recent run that matches the flags given.

    These are --name, --dataset, --method, --ratio and --seed; InputError if no run matches.
    """
    if args.checkpoint:
        return utils.checkpoint_file(args.checkpoint)
    keys = "name", "method", "ratio", "seed"
    wanted = {key: args.given[key] for key in keys if key in args.given}
    if "dataset" in args.given:
        wanted["dataset"] = dataset_name(args.dataset)
    runs, unfinished = {}, []
    for config in Path(args.checkpoints).glob("*/config.toml"):
        best, last = config.with_name("best.pt"), config.with_name("last.pt")
        try:
            table = read_toml(config)
            found = table | {"dataset": table["dataset"]["name"], "name": config.parent.name}
        except (InputError, LookupError, TypeError):  # not written by a run
            continue
        if all(found.get(key) == value for key, value in wanted.items()):
            if best.is_file():
                runs[best] = (last if last.is_file() else best).stat().st_mtime_ns
            elif last.is_file():
                unfinished.append(str(config.parent))
    if not runs and unfinished:
        advice = "resume it, or give its last.pt as --checkpoint"
        raise InputError(f"{utils.first_ten(unfinished)}: not evaluated yet; {advice}")
    if not runs:
        flags = "".join(f" --{key} {args.given[key]}" for key in wanted)
        advice = f"start one with python main.py --training{flags}"
        raise InputError(f"{args.checkpoints} contains no trained run{flags}: {advice}")
    return max(runs, key=runs.get)


@dataclass(frozen=True)
class Trained:
    """A checkpoint's networks and settings, with the flags of the command line."""

    path: Path
    state: dict
    args: argparse.Namespace
    spec: DatasetSpec
    device: torch.device
    model: Method


def load_trained(argv: list[str]) -> Trained:
    """Load the checkpoint for --testing or --predict; InputError if flags contradict it."""
    path = find_checkpoint(parse_args(argv))
    state = utils.load_checkpoint(path)
    spec = make_spec(state["dataset"], str(path))
    args = parse_args(argv, (path, state["settings"]))
    args.data_root = args.given.get("data_root", state["data_root"])
    fixed = {**state["settings"], "dataset": spec.name}
    asked = {key: args.given[key] for key in args.given if key in fixed and key != "batch_size"}
    if "dataset" in asked:
        asked["dataset"] = dataset_name(args.dataset)
    if args.split not in SPLITS:
        asked.pop("split", None)  # the split's hash decides
        own = path.with_name("split.json")
        if "split" not in args.given and own.is_file():
            args.split = str(own)
    differ = [key for key, value in asked.items() if value != fixed[key]]
    if differ:
        flags = [f"--{k.replace('_', '-')} is {fixed[k]}, not {asked[k]}" for k in differ]
        raise InputError(f"{path}: {utils.first_ten(flags)}; the checkpoint sets these")
    device = utils.pick_device(args.device, args.precision)
    model = METHODS[args.method](spec, args).to(device)
    utils.load_weights(model, state["model"], path)
    return Trained(path, state, args, spec, device, model.eval())


def test(trained: Trained) -> int:
    """--testing: score a checkpoint on the validation images of its split, or on --part."""
    args = trained.args
    if args.part:
        data = load_part(args, trained.spec)
    else:
        data = load_data(args, trained.spec, trained.state["split"])
    return predict.test(trained, data, make_batches(args, trained.device))


def run(argv: list[str]) -> int:
    """Run a command line of this program."""
    args = parse_args(argv)
    if args.training:
        return train(args)
    if utils.world_size() > 1:
        raise InputError("--testing and --predict run in one process; start them without torchrun")
    trained = load_trained(argv)
    return test(trained) if args.testing else predict.predict(trained)


def main(argv: list[str] | None = None, command: Callable[[list[str]], int] = run) -> int:
    """Run a command, this program's or a tool's, and print errors as one line.

    Exit code: 0 done, 1 failed while running, 2 invalid flags, configuration or data, 128 + n
    after signal n.
    """
    if utils.rank():  # of several processes, the first one prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any file name can be printed
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except (InputError, TrainingError) as error:
        message, code = str(error), 2 if isinstance(error, InputError) else 1
    except OSError as error:
        other = "standard output" if isinstance(error, BrokenPipeError) else "a file"
        message, code = f"{error.filename or other}: {error.strerror or error}", 1
    except KeyboardInterrupt:  # a tool's: this program's own signals are handled
        message, code = "interrupted", 130
    except Exception as error:
        message, code = utils.failure(error), 1
        if message is None:  # a bug; raised, it would keep the loaders' processes alive
            traceback.print_exc()
            return code
    if utils.local_rank() == 0 or message.startswith("out of memory"):
        print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
