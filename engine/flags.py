"""Flags: the parser, and the TOML tables that a command line overrides.

A TOML is a command line written down: parser defaults (the paper's) < config/<dataset>.toml <
--config FILE < command line. A checkpoint's settings take the place of the TOMLs.
"""

import argparse
import difflib
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from arch.generators import MIN_SIZE
from datasets.spec import dataset_toml, read_toml
from datasets.splits import SPLITS, ByFile, rule_of, split_file
from model import METHODS, WEIGHTS
from utils import InputError, is_file

MODES = ("training", "testing", "predict")
MODE_FLAGS = {  # the flags that only some modes have
    "config": ("training",),
    "overwrite": ("training",),
    "checkpoint": ("testing", "predict"),
    "native_size": ("testing",),
    "split": ("training", "testing"),
    "part": ("testing",),
    "overlay": ("predict",),
}
METHOD_FLAGS = {"cutmix_on": "meanteacher", "reduction": "cyclegan"}  # the flags of one method
# Groups whose flags change the result, except those in DATA
SETTINGS = ("data", "method", "training", "networks", "released code")
DATA = ("dataset", "data_root")
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
        self.actions: dict[str, argparse.Action] = {}  # by key

    def error(self, message: str):
        hint = "; --help lists the flags" if message.startswith("unrecognized") else ""
        raise InputError(message + hint)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for before, value in zip(["the first argument", *args], args, strict=False):
            if value == "" or re.fullmatch("--[a-z0-9-]+=", value):
                raise InputError(f"{value or before}: is empty; give a value")  # an unset variable?
        return super().parse_known_args(args, namespace)

    def group(self, title: str, description: str | None = None) -> Callable:
        """Like add_argument, for a new group."""
        group, keys = self.add_argument_group(title, description), self.keys.setdefault(title, [])

        def add(*flags: str, **about) -> None:
            action = group.add_argument(*flags, **about)
            self.actions[action.dest] = action
            keys.append(action.dest)

        return add


def bounded(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite int or float from `low` (`above`: exclusive) to `high`.

    An int is at most a billion, if `high` is not given.
    """
    high = 10**9 if kind is int and high == math.inf else high

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
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
    if not (is_file(path) or text in SPLITS or text.lower().endswith(".json")):
        known = [*SPLITS, *sorted(file.stem for file in path.parent.glob("*.json"))]
        raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(known)} or a .json file")
    return text


@cache
def build_parser() -> Parser:
    """All flags, with the paper's defaults (Section 3.3)."""
    usage = "python main.py --training | --testing | --predict PATH... [flags]"
    description = (
        "Train segmentation networks with a few labeled images, test them, and predict masks.\n"
        "Defaults are the paper's; the dataset's TOML, --config and the command line override them."
    )
    parser = Parser("main.py", usage=usage, description=description)
    share, weight = bounded(float, 0, 1, above=True), bounded(float, 0)
    count = bounded(int, 1)
    size, beta = bounded(int, MIN_SIZE, 16384), bounded(float, 0, 0.9999)
    switch = argparse.BooleanOptionalAction

    flag = parser.group("mode")
    flag("--training", action="store_true", help="train, or resume an interrupted run")
    flag("--testing", action="store_true", help="score a trained run; write masks and panels")
    predicted = "segment images, NIfTI volumes, or all of them in a folder"
    flag("--predict", nargs="+", metavar="PATH", help=predicted)
    flag("--config", metavar="FILE", help="TOML with flags, read after the dataset's TOML")
    trained = "checkpoint, or a run's folder (its best.pt); default: newest run that fits the flags"
    flag("--checkpoint", metavar="FILE", help=trained)
    flag("--overlay", action="store_true", help="with --predict, also write masks over images")
    native = "with --testing, also score at the masks' original size"
    flag("--native-size", action="store_true", help=native)
    part = (
        "with --testing, score other images: test is a folder's test/, ACDC's testing/ or a split "
        "file's test list, val is VOC's val.txt"
    )
    flag("--part", choices=["val", "test"], help=part)
    flag("--overwrite", action="store_true", help="delete the run's folder and start over")

    flag = parser.group("data")
    described = "name in config/, or a .toml file that describes your own images"
    flag("--dataset", default="voc", help=described)
    flag("--data-root", metavar="DIR", help="folder of the dataset; default: data/<dataset>")
    ratio = "share of the training images that are labeled; masks of the others are not used"
    flag("--ratio", type=share, default=0.2, help=ratio)
    number = "number of labeled images or exams, in place of --ratio"
    flag("--labeled", type=count, metavar="N", help=number)
    unit = "what --ratio and --labeled count: images, or whole exams (patients)"
    flag("--label-unit", default="image", choices=["image", "exam"], help=unit)
    splits = (
        "division into training and validation images: paper, standard (as in other papers), "
        "image (85/15 of single images, as in the authors' code), a name in config/splits/ "
        "or a split.json"
    )
    flag("--split", type=split_kind, default="paper", metavar="SPLIT", help=splits)
    resized = "size in pixels to which images are resized"
    flag("--size", type=size, nargs=2, default=[200, 200], metavar=("H", "W"), help=resized)

    symbols = (
        "G_IS turns an image x into a mask y (it segments), G_SI a mask into an image.\n"
        "The discriminators D_S and D_I tell true masks and images from generated ones.\n"
        "--lambda1 to 5 and --reduction belong to cyclegan, --cutmix-on to meanteacher."
    )
    flag = parser.group("method", symbols)
    methods = (
        "cyclegan: the paper's method (Ours); supervised: labeled images only (Partial, Full); "
        "advsemi: adversarial training of predictions (Hung et al. 2018); meanteacher: consistency "
        "with a moving average of the network on mixed images (CutMix)"
    )
    flag("--method", default="cyclegan", choices=list(METHODS), help=methods)
    terms = {
        "gen_I": "L_gen^I (Eq. 3): G_SI(y) matches the image x",
        "cycle_S": "L_cycle^S (Eq. 7): mask to image to the same mask",
        "cycle_I": "L_cycle^I (Eq. 6): image to mask to the same image",
        "disc_S": "L_disc^S (Eq. 4): predicted masks look true to D_S",
        "disc_I": "L_disc^I (Eq. 5): generated images look true to D_I",
    }
    for i, (name, default) in enumerate(WEIGHTS.items(), 1):
        about = f"weight of {terms[name]}"
        flag(f"--lambda{i}", type=weight, default=default, metavar="W", help=about)
    sums = "mean over pixels, or sum as Eq. 2, 3, 6 are printed (rescales lambda1, 3, 4 and 5)"
    flag("--reduction", default="mean", choices=["mean", "sum"], help=sums)
    on = "images that are mixed and perturbed; labeled: no unlabeled images (the control)"
    flag("--cutmix-on", default="both", choices=["both", "unlabeled", "labeled"], help=on)

    flag = parser.group("training")
    passes = "passes over the longer list, unlabeled or labeled images"
    flag("--epochs", type=count, default=400, help=passes)
    decay = "epoch at which the learning rate starts to fall; default: a quarter of --epochs"
    flag("--decay-epoch", type=bounded(int, 0), metavar="N", help=decay)
    per_step = "labeled images per step, and as many unlabeled ones"
    flag("--batch-size", type=bounded(int, 1, 65536), default=5, metavar="B", help=per_step)
    flag("--lr", type=bounded(float, 0, above=True), default=2e-4, help="Adam's learning rate")
    betas = {"nargs": 2, "default": [0.5, 0.999], "metavar": ("B1", "B2")}
    flag("--betas", type=beta, **betas, help="Adam's betas")
    augmented = (
        "vary contrast and brightness; flip and rotate as orientation in the dataset's TOML allows "
        "(by default neither)"
    )
    flag("--augment", action=switch, default=False, help=augmented)
    flag("--init", metavar="FILE", help="checkpoint (or run's folder) with initial weights")
    precision = "precision of the networks; losses stay fp32"
    flag("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help=precision)
    seed = "seed of the split, the initial weights and the order of images"
    flag("--seed", type=bounded(int, 0, 2**32), default=0, help=seed)

    flag = parser.group("networks")
    width = "channels after the first layer of each"
    flag("--ngf", type=count, default=64, metavar="N", help=f"{width} generator")
    flag("--ndf", type=count, default=64, metavar="N", help=f"{width} discriminator")
    blocks = "residual blocks of each generator"
    flag("--n-blocks", type=bounded(int, 0, 1000), default=9, metavar="N", help=blocks)
    side = "kernel size of the discriminators, odd"
    flag("--disc-kernel", type=odd, default=1, metavar="K", help=side)

    released = "Where the released code departs from the paper; config/official.toml sets them all."
    flag = parser.group("released code", released)
    scales = "range: (v - mean) / (max - min) per channel; half: (v - 0.5) / 0.5, as released"
    flag("--normalization", default="range", choices=["range", "half"], help=scales)
    ignored = "pixels with the ignore value in training masks: skipped, or class 0 as released"
    flag("--ignored", default="skip", choices=["skip", "background"], help=ignored)
    fakes = "what D_S sees of a prediction: softmax maps, or argmax as released, without gradient"
    flag("--disc-input", default="softmax", choices=["softmax", "argmax"], help=fakes)
    pool = "earlier predictions and generated images kept for the discriminators; released: 50"
    flag("--pool-size", type=bounded(int, 0), default=0, metavar="N", help=pool)
    norm = "norm layers of the discriminators; released: instance"
    flag("--disc-norm", default="batch", choices=["batch", "instance"], help=norm)
    chance = "dropout in the generators' residual blocks; released: 0.5"
    flag("--dropout", type=bounded(float, 0, 0.99), default=0.0, metavar="P", help=chance)

    flag = parser.group("machine")
    flag("--device", help="cpu, cuda or cuda:1; default: cuda if there is a GPU")
    flag("--compile", action=switch, default=False, help="torch.compile the networks")
    repeatable = "kernels that repeat bit for bit, where PyTorch has them"
    flag("--deterministic", action=switch, default=False, help=repeatable)
    loaders = "processes that load images; training and evaluation have N each"
    flag("--workers", type=bounded(int, 0, 1000), default=2, metavar="N", help=loaders)

    flag = parser.group("files")
    flag("--name", help="run's folder; default: <dataset>_<method>_<labels>_s<seed>")
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
    """The value of every flag: defaults, overridden by `tables` in order, then by `given`.

    given: the flags of the command line itself. rule: which images are labeled (datasets.splits).
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


def flag_of(key: str) -> str:
    """The flag of a key: --batch-size of batch_size."""
    return f"--{key.replace('_', '-')}"


def all_names() -> list[str]:
    """The names of all flags."""
    return [*itertools.chain(*build_parser().keys.values())]


def setting_names() -> list[str]:
    """The flags that change a result; checkpoints contain them and resumed runs must match them."""
    keys = build_parser().keys
    return [key for group in SETTINGS for key in keys[group] if key not in DATA]


def parse_args(argv: list[str]) -> Flags:
    """The flags of a command line, over the TOMLs of --dataset and --config in training."""
    given = read_flags(argv)
    if sum(mode in given for mode in MODES) != 1:
        raise InputError(f"give one of {', '.join(f'--{mode}' for mode in MODES)}")
    for key, modes in MODE_FLAGS.items():
        if key in given and given.keys().isdisjoint(modes):
            needed = " or ".join(map(flag_of, modes))
            hint = "; --init sets a run's initial weights" if key == "checkpoint" else ""
            raise InputError(f"{flag_of(key)} needs {needed}{hint}")
    for key, value in given.items():  # config.toml and split.json are UTF-8
        if isinstance(value, str) and value != value.encode(errors="ignore").decode():
            raise InputError(f"{flag_of(key)} {value!r}: expected UTF-8")
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
    args = args.over(layers, [key for key in all_names() if key not in modes])
    for key, method in METHOD_FLAGS.items():
        if key in given and not issubclass(METHODS[args.method], METHODS[method]):
            effect = f"has no effect with --method {args.method}"
            raise InputError(f"{flag_of(key)} {effect}; leave it out, or give --method {method}")
    return args


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
    try:
        for key, value in table.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InputError(f"unknown key {key!r}{hint}")
            flag = flag_of(key)
            if value is None:
                continue
            if expected := _other_type(key, value):
                raise InputError(f"argument {flag}: {value!r} is not {expected}")
            if isinstance(value, bool):
                flags.append(flag if value else f"--no-{flag[2:]}")
            elif isinstance(value, (list, tuple)):
                flags += [flag, *map(str, value)]
            else:
                flags.append(f"{flag}={value}")
        return read_flags(flags)
    except (InputError, ValueError) as error:  # also of a number with thousands of digits
        raise InputError(f"{path}: {error}") from error


def _other_type(key: str, value) -> str:
    """The type of a flag's values in a table if `value` has another one, otherwise ""."""
    action = build_parser().actions[key]
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "true or false"
    if action.type in (None, split_kind):
        return "" if isinstance(value, str) else "text"
    if action.nargs:
        of_numbers = isinstance(value, (list, tuple)) and all(map(_is_number, value))
        return "" if of_numbers else f"{action.nargs} numbers"
    return "" if _is_number(value) else "a number"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
