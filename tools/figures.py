"""Rows of images with their predictions, as in the paper's Figures 3 to 7.

    python tools/figures.py rows checkpoints/partial checkpoints/ours --out rows.png --n 4

A RUN is a run's folder, whose best.pt is taken, or a checkpoint; FILE ends in .png, .pdf or .svg.
The pictures have the networks' input size; the legend has the classes that they show. The figures
of reports are drawn here, too, for tools/report.py.
"""

import io
import math
import statistics
import sys
import textwrap
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, to handle signals during them
    from engine import signals

    signals.install()

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ImportError:
    print("error: figures need matplotlib: pip install -r tools/requirements.txt", file=sys.stderr)
    sys.exit(2)
import torch
from torch import Tensor

import data_utils
import utils
from data_utils import Stored
from datasets.spec import DatasetSpec
from engine import program
from engine.flags import Parser, bounded
from engine.pictures import colorize, legend, shades
from engine.trained import Trained
from tools.plan import AUGMENT, EXPERIMENTS
from tools.runs import RunRecord, load_runs, run_flags
from utils import InputError

rcParams["text.parse_math"] = False  # a $ in the name of a class or run is no formula
CELL, GAP = 1.8, 0.06  # inches: width of a picture, space around it
LINE, LETTER = 0.175, 0.085  # inches: height of a line of text, width of a wide letter
# Experiments, augmented or not, in the order of their lines and colors in every chart
KINDS = [*dict.fromkeys(["partial", *(name.removesuffix(AUGMENT) for name in EXPERIMENTS)])]
TITLES = {
    "supervised": "Partial",
    "advsemi": "Hung et al.",
    "cyclegan": "Ours",
    "meanteacher": "Mean teacher",
}


def titles_of(runs: list[Trained]) -> list[str]:
    """Distinct names for the runs: Table 1's, or with the ratio, or the folder's, or the path."""
    names = []
    for run in runs:
        is_full = run.args.method == "supervised" and run.args.ratio == 1
        is_control = run.args.method == "meanteacher" and run.args.cutmix_on == "labeled"
        name = "Control" if is_control else TITLES.get(run.args.method, run.args.method)
        names.append("Full" if is_full else name)
    labels = [f"{100 * r:g}%" if (r := run.args.ratio) else run.args.rule.label for run in runs]
    shares = [f"{name}, {label}" for name, label in zip(names, labels, strict=True)]
    folders = [run.path.resolve().parent.name for run in runs]
    distinct = (titles for titles in (names, shares, folders) if len({*titles}) == len(runs))
    return next(distinct, [str(run.path) for run in runs])


def shared_images(runs: list[Trained], ids: list[str] | None, n: int) -> Stored:
    """Images that every run validates on: these ids, or n images with many classes.

    InputError if the runs do not match or an id is not among them.
    """
    first, *others = runs
    facts = []
    for run in runs:
        root = str(Path(run.args.data_root).resolve())
        facts.append({**asdict(run.spec), "size": run.args.size, "--data-root": root})
    for run, other in zip(others, facts[1:], strict=True):
        if differ := [key for key in other if other[key] != facts[0][key]]:
            names = [
                "{} ({} at {}x{})".format(r.path, r.spec.name, *r.args.size) for r in (first, run)
            ]
            what = f"{' and '.join(names)} cannot be in one figure"
            raise InputError(f"{what}: they differ in {', '.join(differ)}")
    data = [run.data() for run in runs]
    common = set.intersection(*({*each.split.ids()["val"]} for each in data))
    samples = {sample.id: sample for sample in data[0].split.val if sample.id in common}
    if not samples:
        raise InputError(f"{first.path}: shares no validation image with the others; see --seed")
    if unknown := [name for name in ids or () if name not in samples]:
        known = f"the {len(samples)} images that every run validates on"
        what = f"--ids {utils.first_ten(unknown)}: not among {known}"
        raise InputError(f"{what}: {utils.first_ten(samples)}")
    cache, val = data[0].val.cache, Stored(data[0].val.cache, tuple(samples.values()))
    chosen = ids or [val.samples[i].id for i in val.of_many_classes(n)]
    return Stored(cache, tuple(samples[name] for name in chosen))


@torch.inference_mode()
def predictions(run: Trained, images: Stored) -> Tensor:
    """The run's predictions for the images: masks (N, H, W)."""
    args = run.args
    batches = data_utils.Batches(
        images, args.batch_size, run.device, normalization=args.normalization
    )
    masks = []
    for x, _ in batches:
        logits = run.model.segment(x)
        if not logits.isfinite().all():
            raise utils.TrainingError(f"{run.path}: the network's outputs are not finite")
        masks.append(logits.argmax(1).cpu())
    return torch.cat(masks)


def draw_rows(
    images: list[Tensor], titles: list[str], masks: list[Tensor], spec: DatasetSpec
) -> Figure:
    """One row per image (C, H, W): itself and its mask from each titled (N, H, W); a legend below.

    Pixels become squares: pictures are enlarged by a whole number.
    """
    (height, width), zoom = images[0].shape[-2:], math.ceil(320 / images[0].shape[-1])
    dpi = zoom * width / CELL
    height, width, gap = zoom * height, zoom * width, round(GAP * dpi)
    titles = [textwrap.fill(title, int(CELL / LETTER)) for title in ("Image", *titles)]
    full_width = gap + len(titles) * (width + gap)
    classes = legend(torch.cat([mask.long() for mask in masks]), spec)
    labels = [name for name, _ in classes]
    columns = int(full_width / dpi / (0.5 + LETTER * max(map(len, labels))))
    columns = max(1, min(len(labels), columns))
    head = round((LINE * (1 + max(title.count("\n") for title in titles)) + GAP) * dpi)
    foot = round((LINE * math.ceil(len(labels) / columns) + 2 * GAP) * dpi)
    full_height = head + len(images) * (height + gap) + foot

    figure = Figure((full_width / dpi, full_height / dpi), dpi)
    for i, image in enumerate(images):
        colors = [colorize(mask[i : i + 1], spec.palette)[0] for mask in masks]
        for j, picture in enumerate([shades(image), *colors]):
            left, bottom = gap + j * (width + gap), full_height - head - (i + 1) * height - i * gap
            box = left / full_width, bottom / full_height, width / full_width, height / full_height
            axes = figure.add_axes(box)
            pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
            axes.imshow(pixels, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if i == 0:
                axes.set_title(titles[j], fontsize=10, pad=4)
    patches = []
    for label, color in classes:
        rgb = [value / 255 for value in color]
        patches.append(Patch(facecolor=rgb, edgecolor="grey", label=f" {label}"))
    spacing = {"handlelength": 1.2, "labelspacing": 0.3, "columnspacing": 1.2, "borderaxespad": 0.2}
    figure.legend(
        handles=patches, loc="lower center", ncols=columns, fontsize=9, frameon=False, **spacing
    )
    return figure


# Figures of reports


def save(figure: Figure, handles: list[Line2D], path: Path) -> None:
    """Write a figure with a legend above its panels; the same bytes for the same figure."""
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 3)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, metadata={"Software": None})
    utils.write_atomically(path, content.getvalue())


def draw_curves(runs: list[RunRecord], path: Path) -> str:
    """mIoU by step: one panel per experiment and share of labels of a dataset; the caption.

    Each has Full and Partial too: the augmented one beside augmented experiments.
    """
    cells = dict.fromkeys((run.labels, run.name) for run in runs)
    others = [cell for cell in cells if cell[1] not in ("full", "partial")]
    cells = others or [*cells]
    n_rows = math.ceil(len(cells) / 4)
    n_columns = math.ceil(len(cells) / n_rows)
    figure = Figure((max(4, 3.25 * n_columns), 2.6 * n_rows + 0.8), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).ravel()
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    legend = {}
    for axes, (labels, name) in zip(panels, cells, strict=False):
        augmented = name.endswith(AUGMENT) and name != f"partial{AUGMENT}"
        partial = f"partial{AUGMENT}" if augmented else "partial"
        for run in runs:
            if run.name == "full":
                color = legend["Full"] = "0.6"
            elif (run.labels, run.name) == (labels, name):
                color = legend["the experiment"] = "tab:red"
            elif (run.labels, run.name) == (labels, partial):
                color = legend["Partial"] = "tab:blue"
            else:
                continue
            steps = [line["step"] for line in run.evaluations]
            scores = [line["miou"] or 0.0 for line in run.evaluations]
            axes.plot(steps, scores, "-" if run.finished else "--", color=color, linewidth=1)
        axes.set_xlim(0, None)
        title = f"{name}, {labels}"
        axes.set_title(title, fontsize="medium" if len(title) < 40 else "small")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, None)  # shared, so after the last line
    figure.supxlabel("steps", fontsize="medium")
    figure.supylabel("mIoU", fontsize="medium")
    lines = [Line2D([], [], color=color, label=name) for name, color in legend.items()]
    save(figure, lines, path)
    caption = f"mIoU by step, one line per run; each panel shows {', '.join(legend)}."
    if any(name.endswith(AUGMENT) for _, name in cells):
        caption += " Panels of experiments with --augment show Partial with it, too; "
        caption += "that of partial_augment shows it without."
    return caption


def draw_labels(runs: list[RunRecord], path: Path) -> str:
    """mIoU against the number of labeled exams, one line per experiment; the caption.

    Augmented experiments have a panel of their own. "" if the runs of a dataset have fewer than two
    numbers of labeled exams.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        if run.finished and run.n_exams:
            scores.setdefault(run.name, {}).setdefault(run.n_exams, []).append(run.last)
    full = [score for values in scores.pop("full", {}).values() for score in values]
    numbers = sorted({number for values in scores.values() for number in values})
    if len(numbers) < 2:
        return ""
    kinds = [kind for kind in KINDS if {kind, f"{kind}{AUGMENT}"} & scores.keys()]
    titles = {"": "no augmentation", AUGMENT: "--augment"}
    endings = [e for e in titles if any(f"{kind}{e}" in scores for kind in kinds)]
    figure = Figure((4.5 * len(endings) + 1, 4.5), layout="constrained")
    panels = figure.subplots(1, len(endings), squeeze=False, sharex=True, sharey=True)[0]
    legend = {}
    for axes, ending in zip(panels, endings, strict=True):
        for place, kind in enumerate(kinds):
            values = scores.get(f"{kind}{ending}", {})
            if not values:
                continue
            offset = 0.012 * (numbers[-1] - numbers[0]) * (place - (len(kinds) - 1) / 2)
            means = [statistics.mean(group) for group in values.values()]
            spread = [statistics.stdev(g) if len(g) > 1 else 0.0 for g in values.values()]
            look = KINDS.index(kind)
            style = {"color": f"C{look}", "marker": "os^D"[look // 10 % 4], "markersize": 4}
            axes.errorbar([n + offset for n in values], means, spread, capsize=2, **style)
            experiment = EXPERIMENTS.get(kind) or EXPERIMENTS[f"{kind}{AUGMENT}"]
            legend[experiment.get("title", kind)] = style
        if full:
            legend[EXPERIMENTS["full"]["title"]] = style = {"color": "0.6"}
            axes.axhline(statistics.mean(full), **style)
        axes.set(xticks=numbers, xlabel="labeled exams")
        if len(endings) > 1:
            axes.set_title(titles[ending], fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mIoU")
    save(figure, [Line2D([], [], label=name, **style) for name, style in legend.items()], path)
    return "mIoU after the last epoch by labeled exams: mean and standard deviation over seeds."


# The command


def rows(args: Namespace) -> Figure:
    """The figure of the command `rows`."""
    runs = load_runs(args)
    stored = shared_images(runs, args.ids, args.n)
    images, truths = zip(*stored, strict=True)
    masks = [torch.stack(truths), *(predictions(run, stored) for run in runs)]
    names = ", ".join(sample.id for sample in stored.samples)
    print(f"{runs[0].spec.name}, from top to bottom: {names}")
    titles = ["Ground truth", *(args.titles or titles_of(runs))]
    return draw_rows(images, titles, masks, runs[0].spec)


def figures(argv: list[str]) -> int:
    """The command line: draw, then write."""
    parser = Parser("figures.py", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="rows")
    text = "draw images, true masks and the predictions of runs"
    command = commands.add_parser("rows", help=text, description=text)
    run_flags(command)
    flag = command.add_argument
    flag("--out", required=True, type=Path, metavar="FILE", help="a .png, .pdf or .svg to write")
    flag("--titles", nargs="+", metavar="TITLE", help="one title per run, in order")
    flag("--ids", nargs="+", metavar="ID", help="validation images to show")
    flag("--n", type=bounded(int, 1, 100), default=4, help="images to show without --ids")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out}: the name must end in .png, .pdf or .svg")
    if args.titles and len(args.titles) != len(args.runs):
        counts = f"{len(args.titles)} for {len(args.runs)} runs"
        raise InputError(f"--titles: {counts}; give one per run, in order")
    utils.check_output(args.out, "--out")
    content = io.BytesIO()
    rows(args).savefig(content, format=args.out.suffix[1:])
    utils.write_atomically(args.out, content.getvalue())
    print(f"{args.out}: rows of {', '.join(args.runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(program.execute(figures))
