"""The plan: scales and experiments of tools/experiments.toml, their flags, the paper's numbers."""

from functools import cache
from pathlib import Path

from datasets.spec import CONFIG, load_spec, read_toml
from engine.flags import parse_args

PLAN = read_toml(Path(__file__).with_name("experiments.toml"))
EXPERIMENTS, SCALES = PLAN["experiments"], PLAN["scales"]
DATASETS = {
    "voc": "PASCAL VOC 2012",
    "cityscapes": "Cityscapes",
    "acdc": "ACDC",
    "camvid": "CamVid",
}
AUGMENT = "_augment"  # the ending of experiments with --augment


@cache
def paper_scores(*tables: int) -> dict[tuple[str, float, str], float]:
    """mIoU in Tables 1 and 2, or in `tables`, by dataset, share of labels and experiment."""
    scores = {}
    for table in tables or (1, 2):
        for name, experiment in EXPERIMENTS.items():
            for dataset, numbers in experiment.get(f"table{table}", {}).items():
                for ratio, number in numbers.items():
                    scores[dataset, float(ratio), name] = number
    return scores


@cache
def paper_iou() -> dict[tuple[str, float, str], tuple[float, ...]]:
    """IoU of each class in Tables 3 and 4, by the same keys."""
    scores = {}
    for table in PLAN["table3"], PLAN["table4"]:
        columns = zip(*table["rows"], strict=True)
        for (name, ratio), iou in zip(table["columns"], columns, strict=True):
            scores[table["dataset"], ratio, name] = iou
    return scores


def paper_cells(table: int | None) -> list[tuple[str, float, str]]:
    """(dataset, ratio, experiment) in a table of the paper, or in Tables 1 and 2."""
    if table in (3, 4):
        return [key for key in paper_iou() if key[0] == PLAN[f"table{table}"]["dataset"]]
    return [*(paper_scores(table) if table else paper_scores())]


def short_name(dataset: str) -> str:
    """The dataset's name, from a value of --dataset."""
    return dataset if dataset in DATASETS else load_spec(dataset).name


def scale_flags(dataset: str, scale: str) -> list[str]:
    """main.py's flags for a dataset of this name at a scale."""
    table = SCALES[scale].get("flags", {})
    return [*table.get("*", "").split(), *table.get(dataset, "").split()]


def command_flags(
    cell: tuple[str, str, float], scale: str, seed: int, extra: list[str]
) -> list[str]:
    """main.py's flags for a run of (--dataset, experiment, ratio); `extra` are the user's."""
    dataset, name, ratio = cell
    short = short_name(dataset)
    flags = ["--training", "--dataset", dataset, "--ratio", f"{ratio:g}", "--seed", str(seed)]
    flags += [*scale_flags(short, scale), *extra, *EXPERIMENTS[name]["flags"].split()]
    flags += ["--checkpoints", f"checkpoints/{scale}"]
    return [*flags, "--name", f"{short}_{name}_{ratio:g}_s{seed}"]


@cache
def planned(dataset: str, name: str, scale: str) -> dict:
    """The settings of an experiment's runs at a scale, without seed and ratio.

    For a dataset without a TOML in config/, only those that the scale and the experiment set.
    """
    known = (CONFIG / f"{dataset}.toml").is_file()
    flags = ["--training", "--dataset", dataset if known else "phantom"]
    flags += [*scale_flags(dataset, scale), *EXPERIMENTS[name]["flags"].split()]
    args = parse_args(flags)
    keys = args.settings.keys() if known else args.settings.keys() & args.given.keys()
    return {key: args.settings[key] for key in args.settings if key in keys - {"seed", "ratio"}}


def references(name: str, scale: str) -> dict[str, str]:
    """Map the title of each comparison to the experiment that `name` is compared with.

    Augmented ones are compared with augmented ones, and with themselves without augmentation.
    """
    ending = AUGMENT if name.endswith(AUGMENT) else ""
    names = [*EXPERIMENTS[name].get("compare", ["partial"]), *SCALES[scale].get("compare", [])]
    others = {other: f"{other}{ending}" for other in names}
    if ending:
        others["the same without --augment"] = name.removesuffix(AUGMENT)
    return {title: other for title, other in others.items() if other != name}
