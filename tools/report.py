"""Reports: what `tools/experiments.py report` writes. Runs become rows, and rows become tables."""

import csv
import io
import statistics
from collections.abc import Iterable
from pathlib import Path

from scipy.special import stdtrit

import utils
from datasets.splits import ROLES
from tools.plan import DATASETS, EXPERIMENTS, paper_iou, paper_scores, references
from tools.runs import PAPER, RunRecord, as_flags, read_runs

VOLUME_MEASURES = {"dice": "Dice", "hd95_mm": "HD95, mm", "assd_mm": "ASSD, mm"}

# Statistics: runs to rows


def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None for that of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(values: list[float], overlap: float = 0.0) -> tuple[float, float] | tuple[None, None]:
    """The 95% interval of Student's t for a mean; (None, None) for a single value.

    `overlap` is the number of validation images per training image: Nadeau and Bengio's correction
    (2003) for random splits, which share images (variance times 1 / n + overlap, not 1 / n).
    """
    mean, sd = mean_and_sd(values)
    if sd is None:
        return None, None
    reach = float(stdtrit(len(values) - 1, 0.975)) * sd * (1 / len(values) + overlap) ** 0.5
    return mean - reach, mean + reach


def span(values: Iterable[int]) -> str:
    """'3', or '3 to 5'."""
    values = sorted({*values})
    return " to ".join(map(str, dict.fromkeys([values[0], values[-1]])))


def by_cell(runs: list[RunRecord]) -> dict[tuple, dict[int, RunRecord]]:
    """The finished runs of each cell by seed."""
    cells: dict[tuple, dict[int, RunRecord]] = {}
    for run in runs:
        if run.finished:
            cells.setdefault(run.cell, {})[run.settings["seed"]] = run
    return cells


def head(run: RunRecord) -> dict:
    """The columns with which every row of a run's cell begins."""
    dataset, ratio, name = run.cell
    return {"dataset": dataset, "ratio": ratio, "labels": run.labels, "name": name}


def score_rows(runs: list[RunRecord]) -> list[dict]:
    """One row per dataset, ratio and experiment with finished runs: mIoU over seeds."""
    rows = []
    for seeds in by_cell(runs).values():
        group = list(seeds.values())
        row = head(group[0]) | {"paper": paper_score(group[0]), "n": len(group)}
        for epoch in "last", "best":
            row[epoch], row[f"{epoch}_sd"] = mean_and_sd([getattr(run, epoch) for run in group])
        row |= {role: span(run.split[role] for run in group) for role in ROLES}
        row["steps"] = span(run.evaluations[-1]["step"] for run in group)
        rows.append(row | {"flags": EXPERIMENTS[row["name"]]["flags"]})
    return rows


def paper_score(run: RunRecord) -> float | None:
    """The paper's mIoU for a run's cell; None if whole exams are labeled."""
    return paper_scores().get(run.cell) if run.settings["label_unit"] == "image" else None


def difference_rows(runs: list[RunRecord], scale: str) -> list[dict]:
    """One row per cell and reference: the mean difference, paired by seed, and its intervals."""
    cells, rows = by_cell(runs), []
    for (dataset, ratio, name), seeds in cells.items():
        for title, other in references(name, scale).items():
            reference = cells.get((dataset, ratio, other), {})
            pairs = [(run, reference[seed]) for seed, run in seeds.items() if seed in reference]
            if not pairs:
                continue
            row = head(pairs[0][0]) | {"to": title, "minus": other}
            numbers = [paper_score(run) for run in pairs[0]]
            row["paper"] = None if None in numbers else numbers[0] - numbers[1]
            row["n"] = len(pairs)
            splits = [run.split for run, _ in pairs]
            n_val = sum(split["val"] for split in splits)
            overlap = n_val / sum(split["labeled"] + split["unlabeled"] for split in splits)
            for epoch in "last", "best":
                values = [getattr(run, epoch) - getattr(pair, epoch) for run, pair in pairs]
                row[epoch] = statistics.mean(values)
                for end, correction in {"": 0.0, "_corrected": overlap}.items():
                    low, high = interval(values, correction)
                    row |= {f"{epoch}_low{end}": low, f"{epoch}_high{end}": high}
            rows.append(row)
    return rows


def class_rows(runs: list[RunRecord]) -> list[dict]:
    """IoU of each scored class after the last epoch, mean over the seeds where it occurs."""
    rows = []
    for cell, seeds in by_cell(runs).items():
        group = list(seeds.values())
        scored = [group[0].dataset["classes"][k] for k in group[0].dataset["scored"]]
        paper = paper_iou().get(cell, ())
        paper = paper if len(paper) == len(scored) else [None] * len(scored)
        for label, number in zip(scored, paper, strict=True):
            values = [run.evaluations[-1]["iou"][label] for run in group]
            values = [value for value in values if value is not None]
            row = head(group[0]) | {"class": label, "paper": number}
            row["iou"] = statistics.mean(values) if values else None
            rows.append(row | {"n": len(values), "of": len(group)})
    return rows


def volume_rows(runs: list[RunRecord]) -> list[dict]:
    """One row per cell whose runs were tested on whole volumes: scores over seeds."""
    rows = []
    for seeds in by_cell(runs).values():
        group = list(seeds.values())
        tests = [run.volumes["all"] for run in group if "all" in run.volumes]
        if not tests:
            continue
        row = head(group[0]) | {"n": len(tests)}
        classes = [scores for test in tests for scores in test["classes"].values()]
        n_missed = sum(scores["missed"] for scores in classes)
        n = sum(scores["n"] - scores.get("invented", 0) for scores in classes)
        row["missed"] = n_missed / n if n else None  # no volume is complete under --split image
        for measure in VOLUME_MEASURES:
            means = (test["mean"][measure] for test in tests)
            known = [mean for mean in means if mean is not None]
            row[measure], row[f"{measure}_sd"] = mean_and_sd(known) if known else (None, None)
        rows.append(row)
    return rows


# Rows to text


def number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def score(row: dict) -> str:
    """Mean ± standard deviation (n); the paper's."""
    sd = f" ± {row['last_sd']:.4f}" if row["last_sd"] is not None else ""
    paper = f"; paper {number(row['paper'])}" if row["paper"] is not None else ""
    return f"{number(row['last'])}{sd} (n = {row['n']}){paper}"


def difference(row: dict) -> str:
    """Mean [low, high], corrected [low, high] (n); the paper's."""
    text = number(row["last"], "+")
    if row["last_low"] is not None:
        text += f" [{row['last_low']:+.4f}, {row['last_high']:+.4f}], corrected "
        text += f"[{row['last_low_corrected']:+.4f}, {row['last_high_corrected']:+.4f}]"
    paper = f"; paper {number(row['paper'], '+')}" if row["paper"] is not None else ""
    return f"{text} (n = {row['n']}){paper}"


def class_iou(row: dict) -> str:
    """IoU (the paper's), and the number of runs with the class if others lack it."""
    note = f" (n = {row['n']})" if 0 < row["n"] < row["of"] else ""
    return number(row["iou"]) + note + (f" ({number(row['paper'])})" if row["paper"] else "")


def volume_score(row: dict, measure: str) -> str:
    """Mean ± standard deviation: Dice with four digits, distances with two."""
    digits = 4 if measure == "dice" else 2
    values = [row[measure], row[f"{measure}_sd"]]
    return " ± ".join(f"{value:.{digits}f}" for value in values if value is not None) or "-"


def markdown(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A table and an empty line."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines) + "\n"


def grid(corner: str, cells: dict[tuple[str, str], str], columns: Iterable[str]) -> str:
    """A table of cells by (row, column) without empty columns; "-" where there is no cell."""
    rows, found = (dict.fromkeys(keys) for keys in zip(*cells, strict=True))
    columns = [column for column in columns if column in found]
    lines = [[row, *(cells.get((row, column), "-") for column in columns)] for row in rows]
    return markdown([corner, *columns], lines)


def csv_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def commits_of(runs: list[RunRecord]) -> str:
    """The commits that the runs of each experiment were made with."""
    commits: dict[str, dict[str, None]] = {}
    for run in runs:
        commit = run.versions.get("commit") or "unknown"
        dirty = "-dirty" * commit.endswith("-dirty")
        commits.setdefault(run.name, {})[commit[:7] + dirty] = None
    return "; ".join(f"{name} {', '.join(found)}" for name, found in commits.items())


def section(dataset: str, runs: list[RunRecord], *tables: list[dict]) -> str:
    """The tables of one dataset, from the rows of all datasets."""
    rows = [[row for row in table if row["dataset"] == dataset] for table in tables]
    scores, differences, classes, volumes = rows
    columns = dict.fromkeys(row["labels"] for row in scores)  # few labels first
    for table in scores, differences, volumes:
        table.sort(key=lambda row: [*EXPERIMENTS].index(row["name"]))
    text = f"## {DATASETS.get(dataset, dataset)}\n\n"
    shared = {}
    for key, value in runs[0].settings.items():
        same = key not in ("ratio", "seed") and all(run.settings[key] == value for run in runs)
        if same and value != PAPER[key]:
            shared[key] = value
    text += f"All runs: `{' '.join(as_flags(shared))}`\n\nCommits: {commits_of(runs)}\n\n"
    unfinished = []
    for run in runs:
        if not run.finished:
            unfinished.append(f"{run.run} (epoch {run.epoch} of {run.settings['epochs']})")
    if unfinished:
        text += f"Unfinished, and in no mean: {', '.join(unfinished)}\n\n"
    cells = {(row["name"], row["labels"]): score(row) for row in scores}
    cells |= {(row["name"], "flags"): f"`{row['flags']}`" for row in scores}
    if scores:
        text += f"### mIoU\n\n{grid('experiment', cells, [*columns, 'flags'])}"
    titles = dict.fromkeys(row["to"] for row in differences)
    for title in sorted(titles, key=lambda title: title != "partial"):
        cells = {}
        for row in differences:
            if row["to"] == title:
                cells[f"{row['name']} minus {row['minus']}", row["labels"]] = difference(row)
        text += f"### Difference to {title}\n\n{grid('experiments', cells, columns)}"
    table = {"voc": " (Table 3)", "cityscapes": " (Table 4)"}.get(dataset, "")
    cells = {(f"{row['name']}, {row['labels']}", row["class"]): class_iou(row) for row in classes}
    names = dict.fromkeys(row["class"] for row in classes)
    text += f"### IoU of each class{table}\n\n{grid('experiment', cells, names)}" if cells else ""
    cells = {}
    for row in volumes:
        experiment = f"{row['name']}, {row['labels']}"
        cells[experiment, "n"] = str(row["n"])
        for measure, title in VOLUME_MEASURES.items():
            cells[experiment, title] = volume_score(row, measure)
        cells[experiment, "missed"] = "-" if row["missed"] is None else f"{row['missed']:.1%}"
    if cells:
        about = (
            "Mean over volumes at their original size and classes without background, then seeds. "
            "Structures that are missed have Dice 0 and no distance."
        )
        text += f"### Scores of whole volumes\n\n{about}\n\n"
        text += grid("experiment", cells, ["n", *VOLUME_MEASURES.values(), "missed"])
    return text


def page(
    scale: str, runs: list[RunRecord], tables: list[list[dict]], captions: dict[str, dict]
) -> str:
    """The report, from the rows of its tables and the captions of each dataset's figures."""
    text = f"""# Results: {scale}

mIoU (Section 4.2 of the paper) on the validation set after the last epoch: mean ± sample standard \
deviation over n seeds. Differences are paired by seed, with the 95% interval of Student's t, and \
with Nadeau and Bengio's correction, as the splits of the seeds share images. The paper's numbers \
are for 400 epochs at full size. `flags` lists what an experiment adds to the flags of all runs. \
[{scale}.csv]({scale}.csv) also has numbers of images and steps, and the best epoch, which is \
chosen on the validation images. Written by `tools/experiments.py report` from {len(runs)} runs.

"""
    if any(r.settings["method"] == "meanteacher" and "any_orientation" in r.dataset for r in runs):
        text += "`meanteacher` runs of this page flipped and rotated images inside the method, "
        text += "as no flag does today.\n\n"
    for dataset, figures in captions.items():
        text += section(dataset, [run for run in runs if run.dataset["name"] == dataset], *tables)
        for name, caption in figures.items():
            text += f"{caption}\n\n![{caption}]({name})\n\n"
    return text.rstrip() + "\n"


def write(source: Path, scale: str, out: Path) -> None:
    """The report on a folder of runs or a kept log: SCALE.md, its tables as CSV, its figures."""
    from tools import figures  # here: `list` and `run` work without matplotlib

    runs, others = read_runs(source, scale)
    utils.make_folder(out, "--out")
    tables = [score_rows(runs), difference_rows(runs, scale), class_rows(runs), volume_rows(runs)]
    for end, rows in zip(("", "_differences", "_classes", "_volumes"), tables, strict=True):
        path = out / f"{scale}{end}.csv"
        if rows:
            utils.write_atomically(path, csv_text(rows))
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    captions: dict[str, dict[str, str]] = {}
    for dataset in dict.fromkeys(run.dataset["name"] for run in runs):
        group, captions[dataset] = [run for run in runs if run.dataset["name"] == dataset], {}
        for kind, draw in {"labels": figures.draw_labels, "curves": figures.draw_curves}.items():
            name = f"{scale}_{dataset}_{kind}.png"
            if caption := draw(group, out / name):
                captions[dataset][name] = caption
            else:
                (out / name).unlink(missing_ok=True)
    utils.write_atomically(out / f"{scale}.md", page(scale, runs, tables, captions))
    n_finished = sum(run.finished for run in runs)
    print(f"{len(runs)} runs in {source}, {n_finished} finished: {out / scale}.md")
    if others:
        print(f"left out, not named as runs of experiments: {utils.first_ten(others)}")
