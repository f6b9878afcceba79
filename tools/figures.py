"""Pictures of runs: rows of images with their predictions as in the paper's Figures 3 to 7, and training's course.

    python tools/figures.py rows checkpoints/partial checkpoints/ours --out rows.png --n 4
    python tools/figures.py curves checkpoints/partial checkpoints/ours --out curves.png
    python tools/figures.py grids checkpoints/ours --out grids.png --n 3

A RUN is a run's folder, whose best.pt is taken, or a checkpoint; FILE ends in .png, .pdf or .svg. The pictures of
`rows` are the networks' input, at the run's --size; the legend has the classes that they show.
"""

import io
import json
import math
import sys
import textwrap
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError:
    print("error: figures need matplotlib: pip install -r tools/requirements.txt", file=sys.stderr)
    sys.exit(2)
import torch
from PIL import Image
from torch import Tensor

import data_utils
import main
import utils
from data_utils import DatasetSpec, Stored
from main import Trained
from tools.report import Key
from utils import IGNORE, InputError

CELL, GAP = 1.8, 0.06  # inches: width of a picture, space around it
LINE, LETTER = 0.175, 0.085  # inches: height of a line of text, width of a wide letter


def legend_columns(width: float, labels: list[str]) -> int:
    """How many labels stand side by side in a legend of that many inches."""
    return max(1, min(len(labels), int(width / (0.5 + LETTER * max(map(len, labels))))))


def add_legend(figure: Figure, place: str, columns: int, labels: list[str], colours: list) -> None:
    """A coloured patch for each label, at a place of the figure."""
    colours = zip(labels, colours, strict=True)
    patches = [Patch(facecolor=c, edgecolor="grey", label=f" {label}") for label, c in colours]  # "_x" would be hidden
    looks = {"fontsize": 9, "frameon": False, "handlelength": 1.2, "labelspacing": 0.3, "columnspacing": 1.2}
    figure.legend(handles=patches, loc=place, ncols=columns, borderaxespad=0.2, **looks)


# Rows


def titles_of(runs: list[Trained]) -> list[str]:
    """Table 1's names of the runs; where two are the same, with the ratio, or the folder, or the whole path."""
    names = [Key("", run.args.method, run.args.ratio).title for run in runs]
    shares = [f"{name}, {100 * run.args.ratio:g} %" for name, run in zip(names, runs, strict=True)]
    folders = [run.path.resolve().parent.name for run in runs]
    differ = (titles for titles in (names, shares, folders) if len({*titles}) == len(runs))
    return next(differ, [str(run.path) for run in runs])


def shared_images(runs: list[Trained], ids: list[str] | None, n: int) -> tuple[list[str], Stored]:
    """Images that every run validates on: these ids, or n of many classes; InputError where runs do not match."""
    first, *others = runs
    for run in others:
        one, two = ({**asdict(r.spec), "size": r.args.size} for r in (first, run))
        if differ := [key for key in one if one[key] != two[key]]:
            both = " and ".join("{} ({} at {}x{})".format(r.path, r.spec.name, *r.args.size) for r in (first, run))
            raise InputError(f"{both} cannot stand in one figure: they differ in {', '.join(differ)}")
    samples, parts = main.split_again(first)
    common = {*parts.ids()["val"]}.intersection(*(main.split_again(run)[1].ids()["val"] for run in others))
    names = sorted(common)
    if not names:
        raise InputError(f"{first.path}: no image that it validates on is one for every other run; see --seed, --split")
    if unknown := [name for name in ids or () if name not in common]:
        what = f"--ids {utils.first_ten(unknown)}: not among the {len(names)} images that every run validates on"
        raise InputError(f"{what}: {utils.first_ten(names)}")
    args = first.args
    cache = data_utils.open_cache(first.spec, samples, tuple(args.size), Path(args.cache), args.workers)
    val = Stored(cache, [cache.rows[name] for name in names])
    chosen = ids or [names[i] for i in val.of_many_classes(n)]
    return chosen, Stored(cache, [cache.rows[name] for name in chosen])


@torch.inference_mode()
def predictions(run: Trained, images: Stored) -> Tensor:
    """What the run's network makes of the images: masks (N, H, W)."""
    how = 0, run.args.channels_last, run.args.normalization
    batches = data_utils.batches(images, run.args.batch_size, run.device, *how)
    return torch.cat([run.model.segment(x).argmax(1).cpu() for x, _ in batches])


def draw_rows(images: list[Tensor], titles: list[str], masks: list[Tensor], spec: DatasetSpec) -> Figure:
    """A row for each image (C, H, W): itself, then its mask from each titled (N, H, W); the classes' colours below.

    Pixels become squares: pictures are zoomed by a whole number.
    """
    (height, width), zoom = images[0].shape[-2:], math.ceil(320 / images[0].shape[-1])
    dpi = zoom * width / CELL
    height, width, gap = zoom * height, zoom * width, round(GAP * dpi)
    titles = [textwrap.fill(title, int(CELL / LETTER)) for title in ("Image", *titles)]
    full_width = gap + len(titles) * (width + gap)
    seen = torch.cat([mask.flatten().long() for mask in masks]).unique()
    labels = ["ignored" if k == IGNORE else spec.classes[k] for k in seen.tolist()]
    columns = legend_columns(full_width / dpi, labels)
    head = round((LINE * (1 + max(title.count("\n") for title in titles)) + GAP) * dpi)
    foot = round((LINE * math.ceil(len(labels) / columns) + 2 * GAP) * dpi)
    full_height = head + len(images) * (height + gap) + foot

    figure = Figure((full_width / dpi, full_height / dpi), dpi)
    for i, image in enumerate(images):
        lowest, highest = (0, 255) if image.dtype == torch.uint8 else (image.min(), image.max())
        x = (image.float() - lowest) / max(highest - lowest, 1e-12)
        pictures = [x.expand(3, -1, -1), *(utils.colourize(mask[i : i + 1], spec.palette)[0] for mask in masks)]
        for j, picture in enumerate(pictures):
            left, bottom = gap + j * (width + gap), full_height - head - (i + 1) * height - i * gap
            place = left / full_width, bottom / full_height, width / full_width, height / full_height
            axes = figure.add_axes(place)
            pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
            axes.imshow(pixels, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if i == 0:
                axes.set_title(titles[j], fontsize=10, pad=4)
    colours = utils.colourize(seen.view(1, -1, 1), spec.palette)[0, :, :, 0].T.tolist()
    add_legend(figure, "lower center", columns, labels, colours)
    return figure


def rows(ours: Namespace) -> Figure:
    """The figure of the command `rows`."""
    machine = [f"--{k.replace('_', '-')}={v}" for k in ("data_root", "cache", "device") if (v := getattr(ours, k))]
    runs = [main.load_trained(main.parse_args(["--testing", f"--checkpoint={run}", *machine])) for run in ours.runs]
    names, shown = shared_images(runs, ours.ids, ours.n)
    images, truths = zip(*shown, strict=True)
    masks = [torch.stack(truths), *(predictions(run, shown) for run in runs)]
    print(f"{runs[0].spec.name}, from top to bottom: {', '.join(names)}")
    return draw_rows(images, ["Ground truth", *(ours.titles or titles_of(runs))], masks, runs[0].spec)


# Curves


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """mIoU and each loss by epoch, from a run's metrics.jsonl; InputError where there is none."""
    path = (run if run.is_dir() else run.parent) / "metrics.jsonl"
    curves: dict[str, dict[int, float]] = {"mIoU": {}}
    try:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            for name, value in {"mIoU": record["miou"], **record["losses"]}.items():
                if value is not None:
                    curves.setdefault(name, {})[int(record["epoch"])] = float(value)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a RUN is a run's folder, or a checkpoint in it") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the log of a run ({error!r})") from error
    if not curves["mIoU"]:
        raise InputError(f"{path}: no mIoU stands there yet")
    return curves


def draw_curves(titles: list[str], runs: list[dict[str, dict[int, float]]]) -> Figure:
    """A panel for mIoU and for each loss, with a line for each run that has it; a star marks a run's best mIoU."""
    names = list(dict.fromkeys(name for curves in runs for name in curves))
    best = [max(curves["mIoU"], key=curves["mIoU"].get) for curves in runs]
    found = [f"best {curves['mIoU'][epoch]:.4f} at epoch {epoch}" for curves, epoch in zip(runs, best, strict=True)]
    labels = [f"{title}: {what}" for title, what in zip(titles, found, strict=True)]
    across = math.ceil(math.sqrt(len(names)))
    down, columns = math.ceil(len(names) / across), legend_columns(3.2 * across, labels)
    foot = LINE * (1 + math.ceil(len(runs) / columns))
    figure = Figure((3.2 * across, 2.3 * down + foot), 150, layout="constrained")
    for k, name in enumerate(names):
        axes = figure.add_subplot(down, across, k + 1)
        axes.set_title("mIoU (star: its best)" if name == "mIoU" else name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if k + across >= len(names):
            axes.set_xlabel("epoch", fontsize=9)
        for i, curves in enumerate(runs):
            if name in curves:
                marker = "." if len(curves[name]) <= 30 else ""  # a point alone makes no line
                axes.plot([*curves[name]], [*curves[name].values()], color=f"C{i}", marker=marker, linewidth=1.2)
            if name == "mIoU":
                axes.scatter(best[i], curves[name][best[i]], 110, f"C{i}", marker="*", edgecolors="white", zorder=3)
    add_legend(figure, "outside lower center", columns, labels, [f"C{i}" for i in range(len(runs))])
    return figure


def curves(ours: Namespace) -> Figure:
    """The figure of the command `curves`."""
    folders = [(run if run.is_dir() else run.parent).resolve().name for run in map(Path, ours.runs)]
    titles = ours.titles or (folders if len({*folders}) == len(folders) else ours.runs)
    return draw_curves(titles, [read_curves(Path(run)) for run in ours.runs])


# Grids


def read_grids(run: Path, n: int) -> list[tuple[int, Image.Image]]:
    """TensorBoard's grid of validation images with its step, at n evaluations from the first to the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run if run.is_dir() else run.parent
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    if "validation" not in events.Tags()["images"]:
        raise InputError(f"{folder}: holds no TensorBoard events with pictures; a RUN is a run's folder")
    grids = events.Images("validation")
    chosen = sorted({round(k * (len(grids) - 1) / max(1, n - 1)) for k in range(n)})
    return [(grids[k].step, Image.open(io.BytesIO(grids[k].encoded_image_string))) for k in chosen]


def grids(ours: Namespace) -> Figure:
    """The figure of the command `grids`: a row a run, a column an evaluation."""
    runs = [read_grids(Path(run), ours.n) for run in ours.runs]
    titles = ours.titles or [Path(run).resolve().name for run in ours.runs]
    width, height = runs[0][0][1].size
    columns = max(map(len, runs))
    figure = Figure((6 * columns, len(runs) * (6 * height / width + 0.3)), 100, layout="constrained")
    axes = figure.subplots(len(runs), columns, squeeze=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, title, run in zip(axes, titles, runs, strict=True):
        for ax, (step, picture) in zip(row, run, strict=False):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(f"{title}, step {step}", fontsize=10)
    return figure


def figures(argv: list[str]) -> int:
    """The command line: draw, then write."""
    parser = main.Parser("tools/figures.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="rows | curves | grids")
    abouts = {rows: "images, truths and predictions", curves: "mIoU and losses by epoch"}
    abouts[grids] = "what the networks make of four validation images, as training goes on"
    for draw, about in abouts.items():
        command = commands.add_parser(draw.__name__, help=about, description=about, allow_abbrev=False)
        command.set_defaults(draw=draw)
        flag = command.add_argument
        flag("runs", nargs="+", metavar="RUN", help="a run's folder, or a checkpoint")
        flag("--out", required=True, type=Path, metavar="FILE", help="a .png, .pdf or .svg to write")
        flag("--titles", nargs="+", metavar="TITLE", help="of the runs, in their order")
        if draw is rows:
            flag("--ids", nargs="+", metavar="ID", help="validation images to show")
            for name in "--data-root", "--cache", "--device":
                flag(name, help="as main.py's")
        if draw is not curves:
            what = {rows: "images to show without --ids; 4", grids: "evaluations to show; 4"}[draw]
            flag("--n", type=main.number(int, 1, 100), default=4, help=what)
    ours = parser.parse_args(argv)
    if ours.out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {ours.out}: the name must end in .png, .pdf or .svg")
    if ours.titles and len(ours.titles) != len(ours.runs):
        raise InputError(f"--titles: {len(ours.titles)} for {len(ours.runs)} runs; give one a run, in their order")
    utils.make_folder(ours.out.parent, "--out")
    content = io.BytesIO()
    ours.draw(ours).savefig(content, format=ours.out.suffix[1:])
    utils.write_atomically(ours.out, content.getvalue())
    print(f"{ours.out}: {ours.draw.__name__} of {', '.join(ours.runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main.main(command=figures))
