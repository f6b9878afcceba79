"""Kept logs and reports: what `tools/experiments.py report` and `keep` write.

A run is read from its folder or from its line in docs/results/<scale>.jsonl. Runs become rows, and
rows become tables. tools/experiments.toml has the experiments and the paper's numbers.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from scipy.special import stdtrit

import utils
from datasets.spec import make_spec, read_toml
from datasets.splits import ROLES
from engine.flags import build_parser, setting_names
from utils import InputError

PLAN = read_toml(Path(__file__).with_name("experiments.toml"))
EXPERIMENTS, SCALES = PLAN["experiments"], PLAN["scales"]
DATASETS = {
    "voc": "PASCAL VOC 2012",
    "cityscapes": "Cityscapes",
    "acdc": "ACDC",
    "camvid": "CamVid",
}
VERSIONS = "torch torchvision numpy python device gpu commit started finished".split()
EVALUATION = "epoch step miou miou_all miou_official pixel_accuracy iou dice losses".split()
PARSER = build_parser()
# Flags that change no result; main.py has dropped the last three since
MACHINE = {*PARSER.keys["machine"], *PARSER.keys["files"]}
MACHINE |= {"channels_last", "diagnose", "on_nonfinite"}
# Keys of [dataset] that say what masks mean
LABELS = "classes scored channels ignore void label_ids void_ids".split()
# Settings that all runs of a dataset and scale share; the others may differ between experiments
SHARED = "size split label_unit epochs decay_epoch batch_size lr betas precision".split()
SHARED += "ngf ndf n_blocks".split()
# Settings without effect where a weight is 0, and settings that take the value of another one
NEEDS = {"confidence": "lambda6", "cutmix_on": "lambda6"}
NEEDS |= {"cycle_s_trains": "lambda2", "cycle_input": "lambda3"}
SAME = {"disc_lr": "lr", "disc_betas": "betas"}

# The paper


@cache
def paper_scores() -> dict[tuple[str, float, str], float]:
    """mIoU of Tables 1 and 2 by dataset, share of labeled images and experiment."""
    scores = {}
    for name, experiment in EXPERIMENTS.items():
        for table in experiment.get("table1", {}), experiment.get("table2", {}):
            for dataset, numbers in table.items():
                scores |= {
                    (dataset, float(ratio), name): number for ratio, number in numbers.items()
                }
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


# Runs


@dataclass(frozen=True)
class Run:
    """A run, as one line of a kept log."""

    name: str  # of the experiment
    run: str  # of the folder
    settings: dict  # flags that change the result, including those that main.py has dropped since
    dataset: dict  # the [dataset] table
    evaluations: list[dict]
    versions: dict
    split: dict  # number of images that are labeled, unlabeled, val; hash

    @property
    def cell(self) -> tuple[str, float, str]:
        """Dataset, share of labeled images, experiment: what runs of different seeds share."""
        return self.dataset["name"], self.settings["ratio"], self.name

    @property
    def place(self) -> tuple:
        """Sort key: the paper's order of datasets, fewer labels first, then experiments.toml's."""
        dataset, ratio, name = self.cell
        position = [*DATASETS, dataset].index(dataset), dataset, ratio
        return *position, [*EXPERIMENTS, name].index(name), name, self.settings["seed"]

    @property
    def epoch(self) -> int:
        """The last evaluated epoch."""
        return self.evaluations[-1]["epoch"] if self.evaluations else 0

    @property
    def finished(self) -> bool:
        return self.epoch == self.settings["epochs"]

    @property
    def last(self) -> float:
        return self.evaluations[-1]["miou"] or 0.0  # null where no scored class occurs

    @property
    def best(self) -> float:
        return max(line["miou"] or 0.0 for line in self.evaluations)


def read_folder(folder: Path) -> Run:
    """A run from its folder, or InputError that names the file with an error.

    Its `name` is "" if the folder is not named <dataset>_<experiment>_<ratio>_s<seed>.
    """
    path = folder / "config.toml"
    try:
        config = read_toml(path)
        dataset = config.pop("dataset")
        settings = {key: portable(value) for key, value in config.items() if key not in MACHINE}
        ratio = f"{settings['ratio']:g}" if "ratio" in settings else ""  # none with a split file
        name = rf"{re.escape(dataset['name'])}_(.+)_{ratio}_s{settings['seed']}"
        match = re.fullmatch(name, folder.name) if ratio else None
        path = folder / "metrics.jsonl"
        lines = []
        for text in utils.read_lines(path) if path.is_file() else []:
            line = json.loads(text)
            lines.append({key: line[key] for key in EVALUATION if key in line})
        path = folder / "split.json"
        ids = json.loads(utils.read_text(path))
        split = {role: len(ids[role]) for role in ROLES} | {"hash": ids["hash"]}
        path = folder / "manifest.json"
        manifest = json.loads(utils.read_text(path)) if path.is_file() else {}
        versions = {key: manifest[key] for key in VERSIONS if key in manifest}
        path, name = folder, match[1] if match else ""
        run = Run(name, folder.name, settings, dataset, lines, versions, split)
        return checked(run) if name else run
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not as main.py writes it ({error!r})") from error


def portable(value):
    """A setting; of a path, its last two parts."""
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and "/" in value else value


def checked(run: Run) -> Run:
    """The run, after access to every field that a report needs."""
    _ = run.place, run.finished, flags_of(run), [run.split[role] for role in ROLES]
    _ = [(line["step"], line["miou"], line["iou"]) for line in run.evaluations]
    _ = [run.dataset["classes"][k] for k in run.dataset["scored"]]
    return run


def read_lines(path: Path) -> list[Run]:
    """The runs of a kept log, or InputError with the number of the line with an error."""
    runs: dict[tuple, Run] = {}
    for number, line in enumerate(utils.read_lines(path), 1):
        try:
            run = checked(Run(**json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number} is not a kept run ({error!r})") from error
        if run.place in runs:
            raise InputError(f"{path}: line {number} repeats {run.run}")
        runs[run.place] = run
    return [*runs.values()]


def read_runs(source: Path) -> tuple[list[Run], list[str]]:
    """The sorted runs of a folder or kept log, and the folders without an experiment's name."""
    found = read_lines(source) if source.is_file() else []
    found += [read_folder(path.parent) for path in sorted(source.glob("*/config.toml"))]
    runs = sorted((run for run in found if run.name), key=lambda run: run.place)
    if not runs:
        raise InputError(f"{source}: no run of an experiment; `experiments.py run` makes them")
    check_settings(runs, source)
    return runs, [run.run for run in found if not run.name]


@cache
def defaults(method: str) -> dict:
    """The values of settings that a run does not record: [usual], else main.py's defaults."""
    parsed, usual = vars(PARSER.parse_args([])), PLAN["usual"]
    settings = {key: parsed[key] for key in setting_names()}
    settings |= {key: value for key, value in usual.items() if not isinstance(value, dict)}
    return settings | usual.get(method, {})


def effective(run: Run) -> dict:
    """All settings that have an effect on a run, except seed and ratio."""
    known = defaults(run.settings["method"])
    settings = run.settings | {key: known[key] for key in known if key not in run.settings}
    unused = {key for key, weight in NEEDS.items() if not settings[weight]} | {"seed", "ratio"}
    unused |= {key for key, other in SAME.items() if settings.get(key) in (None, settings[other])}
    return {key: value for key, value in settings.items() if key not in unused}


def check_settings(runs: list[Run], source: Path) -> None:
    """InputError if runs differ in what their dataset, experiment, or ratio and seed must share."""
    first: dict[tuple, tuple] = {}
    for run in runs:
        dataset, ratio, name = run.cell
        table = {key: value for key, value in run.dataset.items() if key != "any_orientation"}
        if run.dataset.get("any_orientation"):  # of a log from before --augment
            table["orientation"] = "any"
        spec = make_spec(table, run.run)
        labels = {f"[dataset] {key}": getattr(spec, key) for key in LABELS}
        split = {"split.json's hash": run.split["hash"]}
        settings = effective(run)
        if settings["method"] == "meanteacher":
            settings["[dataset] orientation"] = spec.orientation
        for key, value in {**settings, **labels, **split}.items():
            group = (dataset, key) if key in SHARED or key in labels else (dataset, name, key)
            group = (dataset, ratio, run.settings["seed"], key) if key in split else group
            other, expected = first.setdefault(group, (run.run, value))
            if value != expected:
                message = f"{other} and {run.run} differ in {key} ({expected}, {value})"
                raise InputError(f"{source}: {message}; move one of them to another folder")


def flags_of(run: Run) -> str:
    """A run's settings as flags, without the shared ones and those with their default."""
    settings, usual = effective(run), defaults(run.settings["method"])
    changed = {"method": settings.pop("method")}
    for key, value in settings.items():
        if key not in SHARED and (value != usual.get(key) or key == "cutmix_on"):
            changed[key] = value
    return as_flags(changed)


def as_flags(settings: dict) -> str:
    words = []
    for key, value in settings.items():
        words += [f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return " ".join(map(str, words))


# Statistics: runs to rows


def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None for that of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(values: list[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95% interval of Student's t for the mean of two or more values."""
    mean, sd = mean_and_sd(values)
    if sd is None:
        return None, None
    reach = float(stdtrit(len(values) - 1, 0.975)) * sd / len(values) ** 0.5
    return mean - reach, mean + reach


def span(values: Iterable[int]) -> str:
    """'3', or '3 to 5'."""
    values = sorted({*values})
    return " to ".join(map(str, dict.fromkeys([values[0], values[-1]])))


def by_cell(runs: list[Run]) -> dict[tuple, dict[int, Run]]:
    """The finished runs of each cell by seed."""
    cells: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        if run.finished:
            cells.setdefault(run.cell, {})[run.settings["seed"]] = run
    return cells


def score_rows(runs: list[Run]) -> list[dict]:
    """One row per dataset, ratio and experiment with finished runs: mIoU over seeds."""
    rows = []
    for (dataset, ratio, name), seeds in by_cell(runs).items():
        group = list(seeds.values())
        row = {"dataset": dataset, "ratio": ratio, "name": name}
        row |= {"paper": paper_score(group[0]), "n": len(group)}
        for epoch in "last", "best":
            row[epoch], row[f"{epoch}_sd"] = mean_and_sd([getattr(run, epoch) for run in group])
        row |= {role: span(run.split[role] for run in group) for role in ROLES}
        row["steps"] = span(run.evaluations[-1]["step"] for run in group)
        rows.append(row | {"flags": flags_of(group[0])})
    return rows


def paper_score(run: Run) -> float | None:
    """The paper's mIoU for a run's cell, whose labels are single images."""
    by_image = effective(run)["label_unit"] == "image"
    return paper_scores().get(run.cell) if by_image else None


def references(name: str, scale: str) -> list[str]:
    """The experiments that one is compared with."""
    own = EXPERIMENTS.get(name, {}).get("compare", ["partial"])
    names = dict.fromkeys([*own, *SCALES.get(scale, {}).get("compare", [])])
    return [other for other in names if other != name]


def difference_rows(runs: list[Run], scale: str) -> list[dict]:
    """One row per cell and reference: the mean difference, paired by seed, and its interval."""
    cells, rows = by_cell(runs), []
    for (dataset, ratio, name), seeds in cells.items():
        for other in references(name, scale):
            reference = cells.get((dataset, ratio, other), {})
            pairs = [(run, reference[seed]) for seed, run in seeds.items() if seed in reference]
            if not pairs:
                continue
            row = {"dataset": dataset, "ratio": ratio, "name": name, "minus": other}
            numbers = [paper_score(run) for run in pairs[0]]
            row["paper"] = None if None in numbers else numbers[0] - numbers[1]
            row["n"] = len(pairs)
            for epoch in "last", "best":
                values = [getattr(run, epoch) - getattr(pair, epoch) for run, pair in pairs]
                row[epoch], _ = mean_and_sd(values)
                row[f"{epoch}_low"], row[f"{epoch}_high"] = interval(values)
            rows.append(row)
    return rows


def class_rows(runs: list[Run]) -> list[dict]:
    """IoU of each scored class after the last epoch, mean over the seeds where it occurs."""
    rows = []
    for (dataset, ratio, name), seeds in by_cell(runs).items():
        group = list(seeds.values())
        scored = [group[0].dataset["classes"][k] for k in group[0].dataset["scored"]]
        paper = paper_iou().get((dataset, ratio, name), ())
        paper = paper if len(paper) == len(scored) else [None] * len(scored)
        for label, number in zip(scored, paper, strict=True):
            values = [run.evaluations[-1]["iou"][label] for run in group]
            values = [value for value in values if value is not None]
            row = {"dataset": dataset, "ratio": ratio, "name": name, "class": label}
            row |= {"paper": number, "iou": statistics.mean(values) if values else None}
            rows.append(row | {"n": len(values)})
    return rows


# Rows to text


def number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def percent(ratio: float) -> str:
    return f"{100 * ratio:g}%"


def score(row: dict, epoch: str) -> str:
    """Mean ± standard deviation."""
    sd = row[f"{epoch}_sd"]
    return number(row[epoch]) + (f" ± {sd:.4f}" if sd is not None else "")


def difference(row: dict, epoch: str) -> str:
    """Mean [low, high]."""
    low, high = row[f"{epoch}_low"], row[f"{epoch}_high"]
    return number(row[epoch], "+") + (f" [{low:+.4f}, {high:+.4f}]" if low is not None else "")


def markdown(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A table and an empty line."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines) + "\n"


def csv_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def score_table(scores: list[dict], differences: list[dict]) -> str:
    """The scores of one dataset and ratio, with two columns per reference."""
    pairs = {(row["ratio"], row["name"], row["minus"]): row for row in differences}
    found = {row["minus"] for row in differences}
    others = sorted(found, key=lambda name: (name != "partial", name))
    titles, lines = ["experiment", "paper", "last epoch", "best epoch", "n"], []
    for other in others:
        titles += [f"minus {other}", f"minus {other}, best epoch"]
    for row in scores:
        line = [row["name"], number(row["paper"]), score(row, "last"), score(row, "best")]
        line.append(str(row["n"]))
        for other in others:
            pair = pairs.get((row["ratio"], row["name"], other))
            if pair is None:
                line += ["-", "-"]
                continue
            note = f" (n = {pair['n']})" if pair["n"] != row["n"] else ""
            paper = f"; paper {pair['paper']:+.4f}" if pair["paper"] is not None else ""
            line += [difference(pair, "last") + note + paper, difference(pair, "best") + note]
        images = " / ".join(row[role] for role in ROLES)
        lines.append([*line, images, row["steps"], f"`{row['flags']}`"])
    return markdown([*titles, "labeled / unlabeled / validation images", "steps", "flags"], lines)


def class_table(rows: list[dict]) -> str:
    """One line per class, one column per experiment and ratio, the paper's IoU in parentheses."""
    titles = [f"{row['name']} {percent(row['ratio'])}" for row in rows]
    counts: dict[str, int] = {}
    for title, row in zip(titles, rows, strict=True):
        counts[title] = max(row["n"], counts.get(title, 0))
    lines: dict[str, list[str]] = {}
    for title, row in zip(titles, rows, strict=True):
        paper = "" if row["paper"] is None else f" ({number(row['paper'])})"
        note = f" (n = {row['n']})" if 0 < row["n"] < counts[title] else ""
        lines.setdefault(row["class"], [row["class"]]).append(number(row["iou"]) + note + paper)
    return markdown(["class", *counts], [*lines.values(), ["n", *map(str, counts.values())]])


def without_run(scores: list[dict]) -> str:
    """A line with the cells of the paper's Tables 1 and 2 that have no finished run."""
    found, missing = {(row["dataset"], row["ratio"], row["name"]) for row in scores}, {}
    for dataset, ratio, name in paper_scores():
        if (dataset, ratio, name) not in found:
            missing.setdefault(dataset, []).append(f"{name} {percent(ratio)}")
    parts = []
    for dataset in filter(missing.get, DATASETS):
        some = any(row["dataset"] == dataset for row in scores)
        parts.append(f"{DATASETS[dataset]}: {', '.join(missing[dataset]) if some else 'all'}")
    title = "Cells of the paper's Tables 1 and 2 without a finished run"
    return f"{title}: {'; '.join(parts)}.\n\n" if parts else ""


def commits_of(runs: list[Run]) -> str:
    """The commits that the runs of each experiment were made with."""
    commits: dict[str, dict[str, None]] = {}
    for run in runs:
        commit = run.versions.get("commit") or "unknown"
        dirty = "-dirty" * commit.endswith("-dirty")
        commits.setdefault(run.name, {})[commit[:7] + dirty] = None
    return "; ".join(f"{name} {', '.join(found)}" for name, found in commits.items())


def section(dataset: str, runs: list[Run], *tables: list[dict]) -> str:
    """The tables of one dataset, from the rows of all datasets."""
    rows = [[row for row in table if row["dataset"] == dataset] for table in tables]
    scores, differences, classes = rows
    shared = {key: runs[0].settings[key] for key in SHARED}
    text = f"## {DATASETS.get(dataset, dataset)}\n\nAll runs: `{as_flags(shared)}`\n\n"
    text += f"Commits: {commits_of(runs)}\n\n"
    unfinished = []
    for run in runs:
        if not run.finished:
            unfinished.append(f"{run.run} (epoch {run.epoch} of {run.settings['epochs']})")
    if unfinished:
        text += f"Unfinished, and in no mean: {', '.join(unfinished)}\n\n"
    ratios = sorted({row["ratio"] for row in scores})
    for ratio in ratios if ratios == [1] else [ratio for ratio in ratios if ratio < 1]:
        rows = [row for row in scores if row["ratio"] in (ratio, 1)]  # Full is in every table
        rows.sort(key=lambda row: row["ratio"] < 1)
        pairs = [row for row in differences if row["ratio"] == ratio]
        text += f"### {percent(ratio)} labeled\n\n{score_table(rows, pairs)}"
    rows = [row for row in classes if "table1" in EXPERIMENTS.get(row["name"], {})]
    table = {"voc": " (Table 3)", "cityscapes": " (Table 4)"}.get(dataset, "")
    title = f"### IoU of each class after the last epoch{table}"
    return text + (f"{title}\n\n{class_table(rows)}" if rows else "")


def page(scale: str, runs: list[Run], tables: list[list[dict]], figures: dict[str, dict]) -> str:
    """The report, from score_rows, difference_rows, class_rows, and each dataset's captions."""
    text = f"""# Results: {scale}

mIoU (Section 4.2 of the paper) on the validation set after the last epoch, and after the best \
one, which is chosen on the same images: mean ± sample standard deviation over n seeds. \
Differences are paired by seed, with the 95% interval of Student's t. The paper's numbers are for \
400 epochs at full size. `flags` lists what differs from the paper's settings. The IoU of each \
class of every experiment is in [{scale}_classes.csv]({scale}_classes.csv). Written by \
`tools/experiments.py report` from {len(runs)} runs.

{without_run(tables[0])}"""
    for dataset in dict.fromkeys(run.dataset["name"] for run in runs):
        text += section(dataset, [run for run in runs if run.dataset["name"] == dataset], *tables)
        for name, caption in figures[dataset].items():
            text += f"{caption}\n\n![{caption}]({name})\n\n"
    return text.rstrip() + "\n"


# Figures


def draw_lines(axes, runs: list[Run], colors: dict[str, str]) -> None:
    """mIoU by step, one line per run, dashed if it is unfinished."""
    for run in runs:
        steps = [line["step"] for line in run.evaluations]
        scores = [line["miou"] or 0.0 for line in run.evaluations]
        style = "-" if run.finished else "--"
        axes.plot(steps, scores, style, color=colors.get(run.name, "tab:red"), linewidth=1)


def save(figure, grid, colors: dict[str, str], path: Path) -> None:
    """Write a figure with a legend above its panels."""
    from matplotlib.lines import Line2D

    for axes in grid.ravel():
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    columns = min(4, int(figure.get_figwidth() / 2.5))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    figure.supxlabel("steps", fontsize="medium")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_curves(runs: list[Run], path: Path) -> str:
    """One panel per ratio and experiment of a dataset, with Partial and Full; the caption."""
    from matplotlib.figure import Figure  # here: `list` and `run` work without matplotlib

    colors, names = {"full": "0.6", "partial": "tab:blue"}, {run.name for run in runs}
    colors = {name: color for name, color in colors.items() if name in names}
    cells = dict.fromkeys(run.cell[1:] for run in runs)
    cells = [cell for cell in cells if cell[1] not in colors] or [*cells]
    n_columns = min(4, len(cells))
    n_rows = math.ceil(len(cells) / n_columns)
    figure = Figure((max(4, 3.25 * n_columns), 2.6 * n_rows + 0.8), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for axes in grid.ravel()[len(cells) :]:
        axes.set_axis_off()
    for axes, (ratio, name) in zip(grid.ravel(), cells, strict=False):
        same = [run for run in runs if run.cell[1] == ratio and run.name in ("partial", name)]
        draw_lines(axes, [*(run for run in runs if run.name == "full"), *same], colors)
        axes.set_title(f"{name}, {percent(ratio)}", fontsize="medium")
    figure.supylabel("mIoU", fontsize="medium")
    save(figure, grid, colors | {"the experiment": "tab:red"}, path)
    lines = ", ".join(["one experiment", *reversed(colors)])
    return f"mIoU by step, one line per run; each panel shows {lines}."


def learning_rate(run: Run) -> tuple[list[float], list[float]]:
    """Steps at which an epoch begins or the run ends, and the learning rate from there."""
    settings, line = run.settings, run.evaluations[-1]
    factor = utils.linear_decay(settings["epochs"], settings["decay_epoch"])
    epochs = range(settings["epochs"] + 1)
    steps = [epoch * line["step"] / line["epoch"] for epoch in epochs]
    return steps, [settings["lr"] * factor(epoch) for epoch in epochs]


def draw_schedule(runs: list[Run], path: Path) -> str:
    """Partial, Ours and the mean teacher, one column per ratio with the first two; the caption.

    "" if there is no such ratio.
    """
    from matplotlib.figure import Figure

    kinds = "partial", "ours", "meanteacher"
    names = [name for name in EXPERIMENTS if name.startswith(kinds) and "_without_" not in name]
    colors = {name: f"C{k}" for k, name in enumerate(names)}
    runs = [run for run in runs if run.name in colors and run.evaluations]
    partial, ours = (
        {run.cell[1] for run in runs if run.name == name} for name in ("partial", "ours")
    )
    ratios = sorted(partial & ours)
    if not ratios:
        return ""
    runs = [run for run in runs if run.cell[1] in ratios]
    figure = Figure((4.5 * len(ratios) + 1, 5.5), layout="constrained")
    shape = {"squeeze": False, "sharex": "col", "sharey": "row", "height_ratios": [3, 1]}
    grid = figure.subplots(2, len(ratios), **shape)
    for (upper, lower), ratio in zip(grid.T, ratios, strict=True):
        column = [run for run in runs if run.cell[1] == ratio]
        draw_lines(upper, column, colors)
        lower.step(*learning_rate(column[0]), where="post", color="0.3")
        upper.set_title(f"{percent(ratio)} labeled", fontsize="medium")
    grid[0, 0].set_ylabel("mIoU")
    grid[1, 0].set_ylabel("learning rate")
    drawn = {run.name for run in runs}
    save(figure, grid, {name: colors[name] for name in colors if name in drawn}, path)
    return "mIoU by step, one line per run, and the learning rate."


# Files


def write(source: Path, scale: str, out: Path) -> None:
    """The report on a folder of runs or a kept log: SCALE.md, its tables as CSV, its figures."""
    runs, others = read_runs(source)
    tables = [score_rows(runs), difference_rows(runs, scale), class_rows(runs)]
    for end, rows in zip(("", "_differences", "_classes"), tables, strict=True):
        if rows:
            utils.write_atomically(out / f"{scale}{end}.csv", csv_text(rows))
    figures: dict[str, dict] = {}
    for dataset in dict.fromkeys(run.dataset["name"] for run in runs):
        group, figures[dataset] = [run for run in runs if run.dataset["name"] == dataset], {}
        for kind, draw in {"curves": draw_curves, "schedule": draw_schedule}.items():
            name = f"{scale}_{dataset}_{kind}.png"
            if caption := draw(group, out / name):
                figures[dataset][name] = caption
    utils.write_atomically(out / f"{scale}.md", page(scale, runs, tables, figures))
    n_finished = sum(run.finished for run in runs)
    print(f"{len(runs)} runs in {source}, {n_finished} finished: {out / scale}.md")
    if others:
        print(f"left out, not named as runs of experiments: {utils.first_ten(others)}")


def keep(source: Path, scale: str, out: Path) -> None:
    """Add the finished runs of `source` to out/SCALE.jsonl, and replace those that it has."""
    path, (runs, _) = out / f"{scale}.jsonl", read_runs(source)
    finished = {run.place: run for run in runs if run.finished}
    kept = {run.place: run for run in read_lines(path)} if path.is_file() else {}
    kept |= finished
    runs = [kept[place] for place in sorted(kept)]
    check_settings(runs, path)
    utils.write_atomically(path, "".join(f"{json.dumps(asdict(run))}\n" for run in runs))
    print(f"{len(finished)} finished runs of {source} are in {path}, which has {len(runs)}")
