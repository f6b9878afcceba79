"""A trained run: find its checkpoint and load its networks."""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import utils
from data_utils import Data, check_split, load_data, open_data
from datasets.cache import SAVE_INDICES
from datasets.files import axes_of
from datasets.layouts import index, parts_of
from datasets.spec import DatasetSpec, load_spec, make_spec, read_toml
from datasets.splits import ByFile, Split, digest, read_lists
from engine import checkpoint
from engine.flags import Flags, flag_of, setting_names
from model import METHODS, Method, move
from utils import InputError


@dataclass(frozen=True)
class Trained:
    """A checkpoint's networks, and its settings overridden by the flags that may differ."""

    path: Path
    state: dict
    args: Flags
    spec: DatasetSpec
    device: torch.device
    model: Method

    @property
    def image_dtype(self) -> str:
        """The type of the training images: uint8 or float32."""
        usual = "float32" if self.spec.layout == "acdc" else "uint8"
        return self.state.get("image_dtype", usual)  # older checkpoints do not say

    def other_axes(self, volumes: Iterable[Path]) -> Iterator[str]:
        """Messages about volumes whose axes point elsewhere than those of the training volumes."""
        known = self.state.get("axes")  # older checkpoints do not say
        trained_on = "the training images were pictures"
        if known:
            trained_on = f"the training volumes' to {' or '.join(known)}"
        for path in volumes if known is not None else ():
            if (axes := axes_of(path)) not in known:
                yield f"{path}: its axes point to {axes}, {trained_on}; it is not reoriented"

    def check_colors(self, data: Data) -> None:
        """InputError for indexed masks in other colors than the training masks."""
        known = self.state.get("colors", {})
        for value, color in data.colors(self.spec).items():
            if known.get(value, color) != color:
                drawn = f"index {value} is drawn in {color}, in training it was in {known[value]}"
                raise InputError(f"masks in {self.args.data_root}: {drawn}; {SAVE_INDICES}")

    def data(self) -> Data:
        """The images of the run's split, or of --part."""
        if self.args.part:
            return self.part_data()
        return load_data(self.args, self.spec, self.state["split"])

    def lists(self) -> dict[str, list[str]]:
        """The names in the run's split by role, from split.json or --split; perhaps empty.

        InputError if split.json is not the run's.
        """
        own, rule = self.path.with_name("split.json"), self.args.rule
        if not own.is_file():
            return read_lists(rule.path) if isinstance(rule, ByFile) else {}
        lists = read_lists(own)
        if digest(lists) != self.state["split"]:
            raise InputError(f"{own}: not the split of {self.path}; restore the run's")
        return lists

    def is_own_path(self) -> bool:
        """Whether --data-root is the run's."""
        return os.path.realpath(self.args.data_root) == checkpoint.data_path(self.state)

    def is_copy(self, used: set[str]) -> bool:
        """Whether --data-root has all images `used` by the run, not only in --part."""
        samples = index(self.spec, Path(self.args.data_root), "file")
        names = {name for s in samples for name in s.names}
        of_part = {name for s in samples if s.part == self.args.part for name in s.names}
        return used <= names and not (used and used <= of_part)

    def part_data(self) -> Data:
        """The images of --part, which the run has not trained on, as validation images.

        A split file's own test images take precedence over the layout's. InputError if the run's
        split uses the part or some of its images, or if the part has no masks.

        Another --data-root than the run's is another dataset, unless it has all of the split's
        images, not only in the part.
        """
        args, spec, part, lists = self.args, self.spec, self.args.part, self.lists()
        rule, root = args.rule, Path(args.data_root)
        used = {*itertools.chain(*lists.values())}
        is_own = self.is_own_path() or self.is_copy(used)
        if is_own and isinstance(rule, ByFile):
            if "split" in args.given or (part == "test" and part in lists):
                split = rule.apply(index(spec, root, rule.kind), spec, args.seed)
                check_split(args, split, self.state["split"])
                if part == "test" and split.test:
                    return open_data(args, spec, Split((), (), split.test))
        elif is_own and part in parts_of(spec, rule.kind):
            advice = "--testing alone scores the run's validation images"
            raise InputError(f"--part {part}: the run's split uses this part; {advice}")
        if not lists:
            unknown = f"no split.json beside {self.path} says which images it was trained on"
            if self.is_own_path():
                raise InputError(f"--part {part}: {unknown}; copy the run's to it")
            print(f"--part {part}: {unknown}")
        found = index(spec, root, part)
        samples = [s for s in found if s.mask is not None]
        if seen := sorted(s.id for s in samples if used.intersection(s.names)):
            if is_own:
                raise InputError(f"--part {part}: in the run's split: {utils.first_ten(seen)}")
            advice = "the scores are too optimistic if they are the same images"
            print(f"--part {part}: the run's split has images of these names, too; {advice}")
        if not samples:
            raise InputError(f"--part {part}: no image has a mask")
        if n_unscored := len(found) - len(samples):
            unscored = f"{n_unscored} of {len(found)} images have no mask and are not scored"
            print(f"--part {part}: {unscored}")
        return open_data(args, spec, Split((), (), tuple(samples)))


def load(args: Flags) -> Trained:
    """Load the checkpoint that the flags name or find; InputError if flags contradict it."""
    utils.check_single_process()
    path = find_checkpoint(args)
    state = checkpoint.load(path)
    spec = make_spec(state["dataset"], str(path))
    layer = state["settings"] | {"data_root": checkpoint.data_root(state)}
    known = [*setting_names(), "data_root"]
    before = Flags({}).over({path: layer}, known)
    own = path.with_name("split.json")
    if isinstance(before.rule, ByFile) and own.is_file():
        layer["split"] = str(own)
    args = args.over({path: layer}, known)
    check_flags(args, before, spec, path)
    device = utils.pick_device(args.device, args.precision)
    model = move(METHODS[args.method].from_args(spec, args), device)
    checkpoint.load_weights(model, state["model"], path)
    return Trained(path, state, args, spec, device, model.eval())


def check_flags(args: Flags, before: Flags, spec: DatasetSpec, path: Path) -> None:
    """InputError if flags on the command line contradict those of the checkpoint."""
    fixed = {**before.settings, "dataset": spec.name}
    asked = {key: args.given[key] for key in args.given if key in fixed and key != "batch_size"}
    if "dataset" in asked:
        asked["dataset"] = dataset_name(args.dataset)
        print_differences(args.dataset, spec, path)
    if isinstance(args.rule, ByFile):
        asked.pop("split", None)  # the split's hash decides
    if differ := [key for key, value in asked.items() if value != fixed[key]]:
        flags = [f"{flag_of(k)} {asked[k]}, but it was trained with {fixed[k]}" for k in differ]
        raise InputError(f"{path}: {utils.first_ten(flags)}; leave these flags out")


def print_differences(dataset: str, spec: DatasetSpec, path: Path) -> None:
    """Name the keys in which a file given as --dataset differs from a checkpoint's description."""
    if utils.is_file(Path(dataset)):
        own, trained_on = asdict(load_spec(dataset)), asdict(spec)
        keys = [key for key in own if own[key] != trained_on[key]]
        if keys and own["name"] == spec.name:  # another name is an error
            found = f"{', '.join(keys)} of [dataset] differ from those of {path}"
            print(f"{dataset}: {found}, which are used")


def dataset_name(dataset: str) -> str:
    """The name of --dataset: the one that its file gives, or the file's stem."""
    return load_spec(dataset).name if utils.is_file(Path(dataset)) else Path(dataset).stem


def find_checkpoint(args: Flags) -> Path:
    """--checkpoint, or best.pt of the most recent run that matches the flags given.

    These are --name, --dataset, --method, --ratio, --labeled, --label-unit and --seed; InputError
    if no run matches.
    """
    if args.checkpoint:
        return checkpoint.file_of(args.checkpoint)
    keys = "name", "method", "ratio", "labeled", "label_unit", "seed"
    wanted = {key: args.given[key] for key in keys if key in args.given}
    if "dataset" in args.given:
        wanted["dataset"] = dataset_name(args.dataset)
    finished, unfinished = {}, []
    with utils.naming(Path(args.checkpoints)):
        configs = list(Path(args.checkpoints).glob("*/config.toml"))
    for config in configs:
        best, last = config.with_name("best.pt"), config.with_name("last.pt")
        try:
            table = read_toml(config)
            found = table | {"dataset": table["dataset"]["name"], "name": config.parent.name}
        except (InputError, LookupError, TypeError):  # not written by a run
            continue
        if all(found.get(key) == value for key, value in wanted.items()):
            if best.is_file():
                finished[best] = (last if last.is_file() else best).stat().st_mtime_ns
            elif last.is_file():
                unfinished.append(str(config.parent))
    if not finished and unfinished:
        advice = "resume it, or give its last.pt as --checkpoint"
        raise InputError(f"{utils.first_ten(unfinished)}: not evaluated yet; {advice}")
    if not finished:
        flags = "".join(f" {flag_of(key)} {args.given[key]}" for key in wanted)
        advice = f"start one with python main.py --training{flags}"
        raise InputError(f"{args.checkpoints} contains no trained run{flags}: {advice}")
    return max(finished, key=finished.get)
