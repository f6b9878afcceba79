"""The paper's numbers and those of our runs beside them: what `tools/experiments.py report` and `keep` write.

Runs are read from config.toml, metrics.jsonl and split.json alone; runs -> rows -> text and pictures.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import main
import utils
from data_utils import load_spec, read_toml
from utils import InputError

ABLATIONS = {"cycle_S": "lambda2", "cycle_I": "lambda3", "disc_S": "lambda4", "disc_I": "lambda5"}  # Table 2
TITLES = {"voc": "PASCAL VOC 2012", "cityscapes": "Cityscapes", "acdc": "ACDC"}
COLOURS = {"Full": "0.5", "Hung et al.": "tab:green", "Partial": "tab:blue", "Ours": "tab:red"}  # in the paper's order
COLOURS["Mean teacher"] = "tab:purple"
NAMES = {"advsemi": "Hung et al.", "cyclegan": "Ours", "meanteacher": "Mean teacher"}

# The paper


class Key(NamedTuple):
    """What runs share that differ by the seed alone."""

    dataset: str
    method: str
    ratio: float
    without: str = ""  # the term that Table 2 leaves out

    @property
    def title(self) -> str:
        """The paper's name of the method."""
        return NAMES.get(self.method) or ("Full" if self.ratio == 1 else "Partial")

    @property
    def place(self) -> tuple:
        """To sort by: the paper's order of datasets and methods, more labels first."""
        dataset = [*TITLES, self.dataset].index(self.dataset), self.dataset
        return *dataset, ["", *ABLATIONS].index(self.without), [*COLOURS].index(self.title), -self.ratio

    def run(self, seed: int) -> str:
        """The name of a run's folder."""
        name = f"{self.dataset}_{self.method}_{self.ratio:g}_s{seed}"
        return f"{name}_without_{self.without}" if self.without else name


@dataclass(frozen=True)
class Cell:
    """A number of the paper, or beside them (`paper` is None); Tables 3 and 4 have the IoU of each class."""

    table: int
    dataset: str  # as main.py's --dataset takes it
    method: str
    ratio: float
    without: str = ""
    paper: float | None = None
    iou: tuple[float, ...] = ()

    @property
    def key(self) -> Key:
        name = self.dataset if self.dataset in TITLES else load_spec(self.dataset).name
        return Key(name, self.method, self.ratio, self.without)


@cache
def paper_cells() -> tuple[Cell, ...]:
    """Every cell of Tables 1 to 4, from paper.toml; the number of one of Tables 3 and 4 is the mean of its classes."""
    paper, cells = read_toml(Path(__file__).with_name("paper.toml")), []
    for dataset, methods in paper["table1"].items():
        for method, numbers in methods.items():
            cells += [Cell(1, dataset, method, float(ratio), "", number) for ratio, number in numbers.items()]
    cells += [Cell(2, "voc", "cyclegan", 0.2, term, number) for term, number in paper["table2"].items()]
    columns = [(method, ratio) for method in ("supervised", "cyclegan") for ratio in (0.1, 0.2, 0.3)]
    for table, (dataset, classes) in enumerate(paper["classes"].items(), 3):
        for column, iou in zip(columns, zip(*classes, strict=True), strict=True):
            cells.append(Cell(table, dataset, *column, "", round(statistics.mean(iou), 4), iou))
    return tuple(cells)


# Runs


@dataclass(frozen=True)
class Run:
    """What its files say of a run."""

    name: str
    config: dict
    lines: list[dict]  # an evaluation each
    images: dict[str, int]  # how many are labeled, unlabeled, val

    @property
    def key(self) -> Key:
        ours = self.config["method"] == "cyclegan"
        terms = [term for term, weight in ABLATIONS.items() if ours and self.config[weight] == 0]
        without = terms[0] if len(terms) == 1 else ""
        return Key(self.config["dataset"]["name"], self.config["method"], self.config["ratio"], without)

    @property
    def epoch(self) -> int:
        """The last one that was evaluated."""
        return self.lines[-1]["epoch"] if self.lines else 0

    @property
    def finished(self) -> bool:
        return self.epoch == self.config["epochs"]

    @property
    def last(self) -> float:
        return self.lines[-1]["miou"] or 0.0  # null as main.py counts it

    @property
    def best(self) -> float:
        return max(line["miou"] or 0.0 for line in self.lines)

    @property
    def settings(self) -> dict:
        """All that runs of a method must share to stand in one table."""
        own = {"method", "ratio", "seed", ABLATIONS.get(self.key.without)}
        known = {**usual(self.config), **self.config}  # an older run has fewer flags
        return {key: known[key] for key in ("dataset", *main.RESULT) if key not in own}


def usual(config: dict) -> dict:
    """main.py's defaults for a run of this method, epochs, learning rate and betas."""
    flags = {"decay_epoch": config["epochs"] // 4, "disc_lr": config["lr"], "disc_betas": config["betas"]}
    consistent = config.get("lambda6", 0) > 0 and config["method"] in ("cyclegan", "meanteacher")
    flags |= {"lambda6": float(config["method"] == "meanteacher"), "ema": 0.99 * consistent}
    return vars(main.build_parser().parse_args([])) | flags


def read_run(folder: Path) -> Run:
    """A run; InputError that names the file where one is not as main.py writes it."""
    path = folder / "config.toml"
    try:
        config = read_toml(path)
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        path = folder / "split.json"
        images = {role: len(json.loads(path.read_text())[role]) for role in ("labeled", "unlabeled", "val")}
        path = folder
        run = Run(folder.name, config, lines, images)
        _ = run.key.place, run.finished, [(line["step"], line["miou"], line["iou"]) for line in lines]
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not as main.py writes it ({error!r})") from error


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder that are named as cells, and the names of others; InputError where their settings mix."""
    found = [read_run(path.parent) for path in sorted(folder.glob("*/config.toml"))]
    runs = [run for run in found if run.name == run.key.run(run.config["seed"])]
    if not runs:
        raise InputError(f"{folder}: holds no run that is a cell of a table; `experiments.py run` makes them")
    shared = {}
    for run in runs:
        for key, value in run.settings.items():
            name, first = shared.setdefault((run.key.dataset, run.key.method, key), (run.name, value))
            if value != first:
                what = f"{name} and {run.name} differ in {key} ({first}, {value})"
                raise InputError(f"{folder}: {what}; a table holds runs of the same settings: move one elsewhere")
    return runs, [run.name for run in found if run not in runs]


# Statistics: runs to rows, where "missing" or "unfinished" stands for a number that no finished run gives


def mean_and_sd(values: list[float], none: str = "missing") -> tuple[float | str, float | None]:
    """Mean and sample standard deviation; `none` and None where there are too few values for them."""
    return statistics.mean(values) if values else none, statistics.stdev(values) if len(values) > 1 else None


def interval(values: list[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of Student's t for the mean of two or more values."""
    from scipy.special import stdtrit  # here, as list and run do without scipy

    mean, sd = mean_and_sd(values)
    if sd is None:
        return None, None
    reach = float(stdtrit(len(values) - 1, 0.975)) * sd / len(values) ** 0.5
    return mean - reach, mean + reach


def span(values: Iterable[int]) -> str:
    """'3', or '3 to 5'."""
    values = sorted({*values})
    return " to ".join(map(str, dict.fromkeys([*values[:1], *values[-1:]])))


def in_order(keys: Iterable[Key]) -> list[Key]:
    return sorted({*keys}, key=lambda key: key.place)


def cell_rows(runs: list[Run]) -> list[dict]:
    """A row a cell of Tables 1 and 2, and of what runs add to them; means are of finished runs."""
    paper, rows = {cell.key: cell.paper for cell in paper_cells() if cell.table <= 2}, []
    for key in in_order([*paper, *(run.key for run in runs)]):
        mine = [run for run in runs if run.key == key]
        done = [run for run in mine if run.finished]
        row = {**key._asdict(), "title": key.title, "paper": paper.get(key), "n": len(done)}
        row["unfinished"] = len(mine) - len(done)
        for which in "last", "best":
            values = [getattr(run, which) for run in done]
            row[which], row[f"{which}_sd"] = mean_and_sd(values, "unfinished" if mine else "missing")
        row |= {role: span(run.images[role] for run in done) for role in ("labeled", "unlabeled", "val")}
        rows.append(row | {"steps": span(run.lines[-1]["step"] for run in done)})
    return rows


def difference_rows(runs: list[Run]) -> list[dict]:
    """Ours - Partial at each ratio, paired by seed, with the 95 % interval of the mean."""
    paper, rows = {cell.key: cell.paper for cell in paper_cells() if cell.table == 1}, []
    done = {(run.key, run.config["seed"]): run for run in runs if run.finished}
    known = [*paper, *(run.key for run in runs)]
    for ours in in_order(key for key in known if key.title == "Ours" and not key.without):
        partial = ours._replace(method="supervised")
        seeds = [seed for key, seed in done if key == ours and (partial, seed) in done]
        row = {"dataset": ours.dataset, "ratio": ours.ratio, "n": len(seeds)}
        row["paper"] = paper[ours] - paper[partial] if ours in paper else None
        for which in "last", "best":
            values = [getattr(done[ours, seed], which) - getattr(done[partial, seed], which) for seed in seeds]
            row[which] = mean_and_sd(values)[0]
            row[f"{which}_low"], row[f"{which}_high"] = interval(values)
        rows.append(row)
    return rows


def class_rows(runs: list[Run]) -> list[dict]:
    """IoU of each scored class after the last epoch, mean over finished runs, for each dataset that has runs."""
    paper, rows = {cell.key: cell.iou for cell in paper_cells() if cell.table > 2}, []
    described = {run.key.dataset: run.config["dataset"] for run in runs}
    known = [*paper, *(run.key for run in runs)]
    for key in in_order(key for key in known if key.dataset in described and not key.without):
        done = [run.lines[-1]["iou"] for run in runs if run.key == key and run.finished]
        scored = [described[key.dataset]["classes"][k] for k in described[key.dataset]["scored"]]
        for name, number in zip(scored, [*paper.get(key, ()), *[None] * len(scored)], strict=False):
            row = {"dataset": key.dataset, "method": key.method, "ratio": key.ratio, "title": key.title, "class": name}
            iou, _ = mean_and_sd([each[name] for each in done if each[name] is not None], "-" if done else "missing")
            rows.append(row | {"paper": number, "iou": iou, "n": len(done)})
    return rows


# Rows to text


def recorded(runs: list[Run]) -> str:
    """The settings of a dataset's runs as flags, by method: size, epochs, and what is not main.py's default."""
    changed: dict[str, dict] = {}
    for run in runs:
        same = usual(run.config) | {"size": None, "epochs": None}
        of_method = changed.setdefault(run.key.method, {})
        for key, value in run.settings.items():
            if key != "dataset" and value not in (None, same[key]):
                of_method[key] = value if isinstance(value, list) else [value]
    methods: dict[str, list[str]] = {}
    for method, settings in changed.items():
        flags = []
        for key in sorted(settings, key=main.RESULT.index):
            flags += [f"--{key.replace('_', '-')}", *settings[key]]
        methods.setdefault(" ".join(map(str, flags)), []).append(method)
    return "; ".join(f"{', '.join(those)} `{flags}`" for flags, those in methods.items())


def number(value: float | str | None, sign: str = "") -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:{sign}.4f}"


def percent(row: dict) -> str:
    return f"{100 * row['ratio']:g} %"


def score(row: dict, which: str) -> str:
    """Mean ± standard deviation."""
    return number(row[which]) + (f" ± {row[f'{which}_sd']:.4f}" if row[f"{which}_sd"] is not None else "")


def difference(row: dict, which: str) -> str:
    """Mean [low, high]."""
    low, high = row[f"{which}_low"], row[f"{which}_high"]
    return number(row[which], "+") + (f" [{low:+.4f}, {high:+.4f}]" if low is not None else "")


def markdown(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A table and an empty line."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [titles, ["---"] * len(titles), *rows]) + "\n"


def csv_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def score_table(first: str, rows: list[dict]) -> str:
    """Table 1 or 2; `first` is the column that tells rows of one ratio apart."""
    lines = []
    for row in rows:
        n = f"{row['n']}" + f", {row['unfinished']} unfinished" * bool(row["unfinished"])
        scores = number(row["paper"]), score(row, "last"), score(row, "best"), n
        images = (row[key] or "-" for key in ("labeled", "unlabeled", "val", "steps"))
        lines.append([row[first] or "nothing", percent(row), *scores, *images])
    titles = ["without" if first == "without" else "method", "labeled", "paper", "last epoch", "best epoch", "n"]
    return markdown([*titles, "labeled images", "unlabeled", "validation", "steps"], lines)


def class_table(rows: list[dict]) -> str:
    """A line a class, a column a method and ratio, the paper's number in brackets."""
    counts = {f"{row['title']} {percent(row)}": str(row["n"]) for row in rows}
    lines: dict[str, list[str]] = {}
    for row in rows:
        paper = "" if row["paper"] is None else f" ({number(row['paper'])})"
        lines.setdefault(row["class"], []).append(number(row["iou"]) + paper)
    return markdown(["class", *counts], [*([name, *line] for name, line in lines.items()), ["n", *counts.values()]])


def section(dataset: str, runs: list[Run], cells: list[dict], differences: list[dict], classes: list[dict]) -> str:
    """All tables of one dataset."""
    text = f"## {TITLES.get(dataset, dataset)}\n\n"
    if not runs:
        return f"{text}No run: all {len(cells)} cells of Tables 1 and 2 are missing.\n\n"
    text += f"Settings, as recorded: {recorded(runs)}\n\n"
    if cut := [f"{run.name} ({run.epoch} of {run.config['epochs']} epochs)" for run in runs if not run.finished]:
        text += f"Unfinished, and in no mean: {', '.join(cut)}\n\n"
    text += "### Table 1\n\n" + score_table("title", [row for row in cells if not row["without"]])
    titles = ["labeled", "paper", "last epoch", "best epoch", "n"]
    text += "### Ours - Partial\n\n" + markdown(
        titles,
        (
            [percent(r), number(r["paper"], "+"), difference(r, "last"), difference(r, "best"), str(r["n"])]
            for r in differences
        ),
    )
    if ratios := {row["ratio"] for row in cells if row["without"]}:
        rows = [row for row in cells if row["title"] == "Ours" and row["ratio"] in ratios]
        text += "### Table 2: Ours without one term\n\n" + score_table("without", rows)
    table = {"voc": "Table 3: ", "cityscapes": "Table 4: "}.get(dataset, "")
    return text + f"### {table}IoU of each class after the last epoch\n\n" + class_table(classes)


def page(scale: str, runs: list[Run], *tables: list[dict]) -> str:
    """The report, from cell_rows, difference_rows and class_rows."""
    text = f"""# Results: {scale}

mIoU (Section 4.2 of the paper) on the validation set, after the last epoch and after the best one (chosen on the same \
set): mean ± sample standard deviation over n seeds, beside the paper's number, which is of 400 epochs at full size. \
Ours - Partial is paired by seed, with the 95 % interval of Student's t. Where the paper has the IoU of a class, it \
stands in brackets. Written by `tools/experiments.py report` from {len(runs)} runs.

"""
    for dataset in dict.fromkeys(row["dataset"] for row in tables[0]):
        mine = [run for run in runs if run.key.dataset == dataset]
        text += section(dataset, mine, *([row for row in rows if row["dataset"] == dataset] for rows in tables))
        if mine:
            caption = "mIoU by step, a line a run; unfinished runs are dashed."
            text += f"### Learning curves\n\n{caption}\n\n![{caption}]({scale}_{dataset}_curves.png)\n\n"
    if ratio_panels(tables[0]):
        caption = "mIoU after the last epoch by the share of labeled images; bars are ± standard deviation."
        text += f"## Labeled images\n\n{caption}\n\n![{caption}]({scale}_ratios.png)\n"
    return text


# Pictures: a panel is a heading and its lines, a line is (method's title, line style, points), a point (x, y, error)


def curve_panels(runs: list[Run]) -> dict[str, list[tuple]]:
    """mIoU by step, a line a run, dashed where it is unfinished; a panel a ratio, with Full in each of them."""
    full = [run for run in runs if run.key.title == "Full"]
    panels: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.key._replace(method="cyclegan").place, run.name)):
        if run not in full:
            heading = f"{100 * run.key.ratio:g} % labeled" + f", without {run.key.without}" * bool(run.key.without)
            panels.setdefault(heading, [*full]).append(run)

    def line(run: Run) -> tuple:
        points = [(line["step"], line["miou"] or 0.0, 0) for line in run.lines]
        return run.key.title, "-" if run.finished else "--", points

    return {heading: [line(run) for run in those] for heading, those in (panels or {"100 % labeled": full}).items()}


def ratio_panels(cells: list[dict]) -> dict[str, list[tuple]]:
    """mIoU after the last epoch by ratio, a panel a dataset, a line a method."""
    panels: dict[str, dict[str, list]] = {}
    for row in cells:
        if row["n"] and not row["without"]:
            lines = panels.setdefault(TITLES.get(row["dataset"], row["dataset"]), {})
            beside = 0.6 * [*COLOURS].index(row["title"]) - 0.9  # so that the bars of methods do not hide each other
            lines.setdefault(row["title"], []).append((100 * row["ratio"] + beside, row["last"], row["last_sd"] or 0))
    return {heading: [(title, "-", points) for title, points in lines.items()] for heading, lines in panels.items()}


def draw(panels: dict[str, list[tuple]], x_label: str, path: Path) -> None:
    """The panels in rows of four, as a PNG."""
    from matplotlib.figure import Figure  # here, as list and run do without matplotlib
    from matplotlib.lines import Line2D

    columns, rows = min(4, len(panels)), math.ceil(len(panels) / 4)
    figure = Figure((3.2 * columns + 0.8, 2.7 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=x_label == "steps").ravel()
    for ax, (heading, lines) in zip(axes, panels.items(), strict=False):
        for title, style, points in lines:
            x, y, error = zip(*points, strict=True) if points else ((), (), ())
            look = {"color": COLOURS[title], "linestyle": style, "linewidth": 1, "capsize": 3}
            ax.errorbar(x, y, error if any(error) else None, **look, marker="." if len(points) < 20 else None)
        ax.set_title(heading, fontsize="medium")
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        if x_label != "steps":
            ax.set(xlim=(0, 105), ylim=(0, 1.05 * ax.get_ylim()[1]))
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel("mIoU", fontsize="medium")
    names = [name for name in COLOURS if any(name == line[0] for lines in panels.values() for line in lines)]
    handles = [Line2D([], [], color=COLOURS[name], marker=".", label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


# Files


def write(folder: Path, out: Path) -> None:
    """The report on a folder's runs, named as the folder: NAME.md, its tables as CSV, its pictures."""
    scale, (runs, others) = folder.resolve().name, read_runs(folder)
    cells, differences, classes = cell_rows(runs), difference_rows(runs), class_rows(runs)
    for name, rows in {"": cells, "_differences": differences, "_classes": classes}.items():
        utils.write_atomically(out / f"{scale}{name}.csv", csv_text(rows))
    for dataset in dict.fromkeys(run.key.dataset for run in runs):
        mine = [run for run in runs if run.key.dataset == dataset]
        draw(curve_panels(mine), "steps", out / f"{scale}_{dataset}_curves.png")
    if panels := ratio_panels(cells):
        draw(panels, "labeled images, %", out / f"{scale}_ratios.png")
    utils.write_atomically(out / f"{scale}.md", page(scale, runs, cells, differences, classes))
    print(f"{len(runs)} runs in {folder}, {sum(run.finished for run in runs)} finished: {out / scale}.md")
    if others:
        print(f"left out, as they are not named as cells: {utils.first_ten(others)}")


def keep(runs: list[Run], folder: Path, out: Path) -> None:
    """Copy what tells of a folder's finished runs to out/NAME/RUN, without this machine's paths."""
    scale = folder.resolve().name
    for run in runs:
        source, kept = folder / run.name, out / scale / run.name
        kept.mkdir(parents=True, exist_ok=True)
        manifest = json.loads((source / "manifest.json").read_text())
        manifest.pop("platform", None)
        manifest["command"] = without_paths(manifest["command"], run.config, scale)
        config = without_paths((source / "config.toml").read_text(), run.config, scale)
        files = {"config.toml": config, "manifest.json": json.dumps(manifest, indent=1)}
        files |= {name: (source / name).read_bytes() for name in ("metrics.jsonl", "split.json")}
        for name, content in files.items():
            utils.write_atomically(kept / name, content)
    print(f"{len(runs)} finished runs of {folder}: kept in {out / scale}")


def without_paths(text: str, config: dict, scale: str) -> str:
    """A command or a config.toml with the usual folders for a machine's; other absolute paths keep their last part."""
    usual = {"data_root": f"data/{config['dataset']['name']}", "cache": "data/cache", "results": "results"}
    for key, value in {**usual, "checkpoints": f"checkpoints/{scale}"}.items():
        was = re.escape(config[key])
        text = re.sub(rf"(--{key.replace('_', '-')}[ =])(?:{was}|\S+)", rf"\g<1>{value}", text)
        text = re.sub(rf"(?m)^({key} = ).*", rf'\g<1>"{value}"', text)
    text = re.sub(r"--dataset .*config\.toml --name NAME", "--dataset config.toml --name NAME", text)
    return re.sub(r"(?<![^\s\"'=])/\S*/", "", text)
