"""Flags: the parser, and the tables that lie under a command line.

A TOML is a command line written down: parser defaults (the paper's) < config/<dataset>.toml <
--config FILE < command line. A checkpoint's settings take the place of the TOMLs.
"""

import argparse
import difflib
import itertools
import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from arch.generators import MIN_SIZE
from datasets.spec import dataset_toml, read_toml
from datasets.splits import SPLITS, ByFile, rule_of, split_file
from model import METHODS
from utils import InputError

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
AMOUNTS = {"ratio", "labeled"}  # of labels; one takes the place of the other

# The parser


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


def bounded(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
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


@cache
def build_parser() -> Parser:
    """All flags, with the paper's defaults (Section 3.3)."""
    parser = Parser("main.py", description="Train, test and use segmentation networks.")
    share, weight = bounded(float, 0, 1, above=True), bounded(float, 0)
    count = bounded(int, 1, 10**9)
    size, beta = bounded(int, MIN_SIZE, 16384), bounded(float, 0, 0.9999)
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
    flag("--labeled", type=count, metavar="N", help="their number, in place of --ratio")
    flag("--seed", type=bounded(int, 0, 2**32), default=0, help="seed of split, weights and order")
    splits = "paper, standard (as in other papers), image (85/15, as released)"
    splits += ", a name in config/splits/ or a split.json"
    flag("--split", type=split_kind, default="paper", metavar="SPLIT", help=splits)
    unit = "unit of --ratio and --labeled: single images or whole exams"
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
    flag("--decay-epoch", type=bounded(int, 0), metavar="N", help=decay)
    flag("--batch-size", type=count, default=5, metavar="B", help="images of each kind per step")
    flag("--lr", type=bounded(float, 0, above=True), default=2e-4, help="Adam's learning rate")
    betas = {"nargs": 2, "default": [0.5, 0.999], "metavar": ("B1", "B2")}
    flag("--betas", type=beta, **betas, help="Adam's betas")
    pool = "size of the pool of past fakes for the discriminators (released code: 50)"
    flag("--pool-size", type=bounded(int, 0), default=0, metavar="N", help=pool)
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
    flag("--n-blocks", type=bounded(int, 0), default=9, metavar="N", help="residual blocks")
    chance = bounded(float, 0, 0.99)
    flag("--dropout", type=chance, default=0.0, metavar="P", help="dropout in residual blocks")
    norms = ["batch", "instance"]
    flag("--disc-norm", default="batch", choices=norms, help="norm of the discriminators")
    flag("--disc-kernel", type=odd, default=1, metavar="K", help="kernel of the discriminators")

    flag = parser.group("machine")
    flag("--device", help="cpu, cuda or cuda:1; default: cuda if there is a GPU")
    flag("--compile", action=switch, default=False, help="torch.compile the networks")
    flag("--deterministic", action=switch, default=False, help="deterministic kernels")
    workers = bounded(int, 0, 1000)
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


# Flags


class Flags(argparse.Namespace):
    """The value of every flag, from those `given` over tables of others, the lowest first.

    given: the flags of the command line itself. rule: which images are labeled, of datasets.splits.
    """

    def __init__(self, given: dict, tables: Iterable[dict] = ()):
        values = vars(build_parser().parse_args([]))
        for table in (*tables, given):
            if AMOUNTS & table.keys():
                values |= dict.fromkeys(AMOUNTS)
            values |= table
        rule = rule_of(values)
        if isinstance(rule, ByFile):
            if amount := AMOUNTS & given.keys():
                raise InputError(f"--{min(amount)}: {rule.name} says which images are labeled")
            values |= dict.fromkeys(AMOUNTS)
        if values["decay_epoch"] is None:
            values["decay_epoch"] = values["epochs"] // 4
        values["data_root"] = values["data_root"] or f"data/{Path(values['dataset']).stem}"
        super().__init__(**values)
        self.given, self.rule = given, rule

    def over(self, layers: dict[Path, dict], known: list[str]) -> "Flags":
        """The same command line over other tables, each with its file, of `known` flags."""
        return Flags(self.given, [read_table(*layer, known) for layer in layers.items()])

    @property
    def settings(self) -> dict:
        """The flags that change the result: a checkpoint keeps them, a resumed run has the same."""
        return {key: getattr(self, key) for key in setting_names()}

    @property
    def flags(self) -> dict:
        """The flags of a run's config.toml."""
        hidden = {*build_parser().keys["mode"], "dataset", "name"}
        return {key: getattr(self, key) for key in all_names() if key not in hidden}


def all_names() -> list[str]:
    """The names of all flags."""
    return [*itertools.chain(*build_parser().keys.values())]


def setting_names() -> list[str]:
    """The flags that change a result; checkpoints contain them and resumed runs must match them."""
    keys = build_parser().keys
    return [key for group in SETTINGS for key in keys[group] if key != "dataset"]


def parse_args(argv: list[str]) -> Flags:
    """The flags of a command line, over the TOMLs of --dataset and --config in training."""
    given = read_flags(argv)
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
    args = Flags(given)
    if not args.training:
        return args

    layers, config = {}, read_toml(Path(args.config)) if args.config else {}
    if isinstance(config.get("dataset"), dict):
        raise InputError(f"{args.config}: describes a dataset; give it as --dataset")
    path = dataset_toml(str(given.get("dataset", config.get("dataset", args.dataset))))
    layers[path] = {key: value for key, value in read_toml(path).items() if key != "dataset"}
    if args.config:
        layers[Path(args.config)] = config
    modes = build_parser().keys["mode"]
    return args.over(layers, [key for key in all_names() if key not in modes])


def read_flags(argv: list[str]) -> dict:
    """The values of the flags on a command line, without defaults."""
    unset = object()
    empty = argparse.Namespace(**dict.fromkeys(all_names(), unset))
    values = vars(build_parser().parse_args(argv, empty))
    given = {key: value for key, value in values.items() if value is not unset}
    if given.keys() >= AMOUNTS:
        raise InputError("--ratio and --labeled: give one of them")
    return given


def read_table(path: Path, table: dict, known: list[str]) -> dict:
    """The values of the flags in a table; InputError names the file that it comes from."""
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
        return read_flags(flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
