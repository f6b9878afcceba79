"""What in the method helps, and what makes unlabeled images pay: the variants of scale `study`, and their report.

`tools/experiments.py run|list|report|keep --scale study` calls this. A variant is a name for flags of main.py; the
folder of a run is <dataset>_<variant>_<ratio>_s<seed>, and a name that is not listed here is a variant too.
"""

import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import main
import utils
from data_utils import CONFIG
from tools import report
from tools.report import Run
from utils import InputError

# More labels clearly help here, and seeds differ less: docs/study.md has the numbers.
REGIME = {
    "phantom": "--eval-every 2",
    "acdc": "--size 64 64 --ngf 16 --epochs 4 --lr 1e-3",
    "*": "",  # a TOML of one's own says it all
}
EVERYWHERE = "--precision bf16 --diagnose"
RATIOS = {"phantom": 0.1, "acdc": 0.05, "*": 0.1}  # of labels, if not given
PAPER = "--lambda3 1 --lambda4 1 --lambda5 1"  # config/phantom.toml has others
VARIANTS = {
    "full": "--method supervised --ratio 1",
    "partial": "--method supervised",
    "partial_ema": "--method supervised --ema 0.99",
    "hung": "--method advsemi",
    "paper": PAPER,
    "without_gen_I": f"{PAPER} --lambda1 0",
    "without_cycle_S": f"{PAPER} --lambda2 0",
    "without_cycle_I": f"{PAPER} --lambda3 0",
    "without_disc_S": f"{PAPER} --lambda4 0",
    "without_disc_I": f"{PAPER} --lambda5 0",
    "meanteacher": "--method meanteacher --ramp-up 0.25",
    "meanteacher_sure": "--method meanteacher --ramp-up 0.25 --confidence 0.9",
    "meanteacher_labeled": "--method meanteacher --ramp-up 0.25 --cutmix-on labeled",  # without unlabeled images
    "best": "--config best.toml",
    "labels_cycle": "--config labels_cycle.toml",
    "labels_cycle_sure": "--config labels_cycle.toml --confidence 0.9",
    "labels_cycle_both": "--config labels_cycle.toml --cutmix-on both",
    "labels_cycle_without_ramp": "--config labels_cycle.toml --ramp-up 0",
    "labels_cycle_without_cutmix": "--config labels_cycle.toml --lambda6 0",
    "labels_cycle_trains_both": "--config labels_cycle.toml --cycle-s-trains both",
}
WEIGHTS = {"gen_S": "", "gen_I": "lambda1", "cycle_S": "lambda2", "cycle_I": "lambda3"}
WEIGHTS |= {"disc_S": "lambda4", "disc_I": "lambda5", "cutmix": "lambda6"}
REFERENCES = ("partial", "meanteacher_labeled")  # the second has the same augmentation, and no unlabeled images
NEEDS = {  # settings that are of no effect without a weight
    "confidence": "lambda6",
    "cutmix_on": "lambda6",
    "cycle_s_trains": "lambda2",
    "cycle_input": "lambda3",
}
OF_REGIME = {"size", "epochs", "decay_epoch", "batch_size", "lr", "disc_lr", "disc_betas", "precision"}
OF_REGIME |= {"ngf", "ndf", "n_blocks"}


def select(dataset: str, variants: Iterable[str] | None, ratios: Iterable[float] | None) -> list[tuple[str, float]]:
    """(variant, ratio) in order; Full has one ratio. InputError where a variant is not known."""
    if unknown := sorted({*(variants or ())} - VARIANTS.keys()):
        raise InputError(f"--variants {unknown[0]}: expected some of {', '.join(VARIANTS)}")
    names = [name for name in VARIANTS if not variants or name in variants]
    ratios = ratios or [RATIOS.get(Path(dataset).stem, RATIOS["*"])]
    return list(dict.fromkeys((name, 1.0 if name == "full" else ratio) for ratio in ratios for name in names))


def flags_of(dataset: str, variant: str, ratio: float, seed: int) -> list[str]:
    """main.py's flags of a run; `dataset` is what --dataset takes."""
    name = Path(dataset).stem
    settings = f"{REGIME.get(name, REGIME['*'])} {EVERYWHERE} {VARIANTS[variant]}".split()
    settings = [os.path.relpath(CONFIG / flag) if flag.endswith(".toml") else flag for flag in settings]
    flags = ["--training", "--dataset", dataset, "--ratio", f"{ratio:g}", "--seed", str(seed), *settings]
    return [*flags, "--checkpoints", "checkpoints/study", "--name", f"{name}_{variant}_{ratio:g}_s{seed}"]


# The report


def variant_of(run: Run) -> str:
    """A run's variant, from its folder's name; "" where that is not <dataset>_<variant>_<ratio>_s<seed>."""
    start, end = f"{run.config['dataset']['name']}_", f"_{run.config['ratio']:g}_s{run.config['seed']}"
    return run.name[len(start) : -len(end)] if run.name.startswith(start) and run.name.endswith(end) else ""


def order(variant: str) -> tuple[int, str]:
    """To sort by: VARIANTS as they stand there, then others by name."""
    return [*VARIANTS, variant].index(variant), variant


def settings_of(run: Run) -> dict:
    """What a run's flags say of the result, those that main.py no longer has too."""
    known = vars(main.build_parser().parse_args([]))
    told = {key: value for key, value in run.config.items() if key in main.RESULT or key not in known}
    idle = {key for key, weight in NEEDS.items() if not run.config.get(weight)}
    return {key: value for key, value in told.items() if key not in {"ratio", "seed", "dataset", *idle}}


def read_runs(folder: Path) -> list[Run]:
    """The finished runs of a study; InputError where runs differ that one table would compare as the same."""
    runs = [report.read_run(path.parent) for path in sorted(folder.glob("*/config.toml"))]
    runs = [run for run in runs if variant_of(run) and run.finished]
    if not runs:
        raise InputError(f"{folder}: holds no finished run of a study; `experiments.py run --scale study` makes them")
    shared: dict[tuple, tuple] = {}
    for run in runs:
        name, variant = run.config["dataset"]["name"], variant_of(run)
        for key, value in {**settings_of(run), "dataset": run.config["dataset"]}.items():
            those = (name, key) if key in OF_REGIME | {"dataset"} else (name, variant, key)
            first, expected = shared.setdefault(those, (run.name, value))
            if value != expected:
                raise InputError(f"{folder}: {first} and {run.name} differ in {key} ({expected}, {value})")
    return runs


def rows(runs: list[Run]) -> list[dict]:
    """A row a dataset, ratio and variant: mIoU over seeds, and the differences to REFERENCES paired by seed."""
    done: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        of = run.config["dataset"]["name"], run.config["ratio"], variant_of(run)
        done.setdefault(of, {})[run.config["seed"]] = run
    dropped: dict[str, list] = {}  # flags that main.py no longer has: most runs have their default
    for key, value in (item for run in runs for item in settings_of(run).items() if item[0] not in main.RESULT):
        dropped.setdefault(key, []).append(value)
    common = {key: statistics.mode(values) for key, values in dropped.items()}
    table = []
    for dataset, ratio, variant in sorted(done, key=lambda of: (*of[:2], *order(of[2]))):
        mine = done[dataset, ratio, variant]
        row = {"dataset": dataset, "ratio": ratio, "variant": variant, "n": len(mine)}
        for which in "last", "best":
            row[which], row[f"{which}_sd"] = report.mean_and_sd([getattr(run, which) for run in mine.values()])
        for name in REFERENCES:
            other = done.get((dataset, ratio, name), {}) if variant != name else {}
            gains = [run.last - other[seed].last for seed, run in mine.items() if seed in other]
            row |= {f"{name}_n": len(gains), name: report.mean_and_sd(gains, "-")[0]}
            row[f"{name}_low"], row[f"{name}_high"] = report.interval(gains)
        row["steps"] = report.span(run.lines[-1]["step"] for run in mine.values())
        table.append(row | {"flags": own_flags(next(iter(mine.values())), common)})
    return table


def own_flags(run: Run, common: dict) -> str:
    """A run's settings as flags, without the regime's, main.py's defaults and what dropped flags have in common."""
    usual = report.usual(run.config) | common
    told = {key: value for key, value in settings_of(run).items() if key not in OF_REGIME and value != usual.get(key)}
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in told.items())


def page(runs: list[Run], table: list[dict]) -> str:
    """The report's text, from rows."""
    text = f"""# Results: study

mIoU on the validation set after the last epoch: mean ± sample standard deviation over n seeds, and the differences to \
Partial and to the mean teacher on labeled images alone (`meanteacher_labeled`: the same augmentation, no unlabeled \
image), of the same seeds, with the 95 % interval of Student's t. The last column has a variant's own flags. Written \
by `tools/experiments.py report` from {len(runs)} runs.

"""
    for dataset, ratio in dict.fromkeys((row["dataset"], row["ratio"]) for row in table):
        mine = [row for row in table if row["dataset"] == dataset and row["ratio"] in (ratio, 1)]
        if ratio == 1 and any(row["dataset"] == dataset and row["ratio"] < 1 for row in table):
            continue  # Full stands in the other tables
        mine.sort(key=lambda row: row["ratio"] < 1)
        first = next(run for run in runs if (run.config["dataset"]["name"], run.config["ratio"]) == (dataset, ratio))
        config, images = first.config, ", ".join(f"{n} {role}" for role, n in first.images.items())
        text += f"## {report.TITLES.get(dataset, dataset)}, {100 * ratio:g} % labeled\n\n"
        text += f"Images: {images}. {config['size'][0]}x{config['size'][1]} pixels, `--ngf {config['ngf']} --n-blocks "
        text += f"{config['n_blocks']} --epochs {config['epochs']} --lr {config['lr']:g} --precision "
        text += f"{config['precision']}`.\n\n"
        titles = ["variant", "mIoU", "minus Partial", "minus labeled alone", "n", "steps", "flags"]
        text += report.markdown(
            titles, ([r["variant"], *numbers(r), f"`{r['flags']}`" * bool(r["flags"])] for r in mine)
        )
    return text


def numbers(row: dict) -> list[str]:
    """A row's cells between its name and its flags."""
    gains = [
        report.difference(row, name) + f" (n = {row[f'{name}_n']})" * (row[f"{name}_n"] not in (0, row["n"]))
        for name in REFERENCES
    ]
    return [report.score(row, "last"), *gains, str(row["n"]), row["steps"]]


def draw(runs: list[Run], kind: str, path: Path) -> bool:
    """What --diagnose left of seed 0's runs, by step, a panel a run: "gradients" or "answers"; False where nothing."""
    from matplotlib.figure import Figure  # here, as run and list do without matplotlib
    from matplotlib.lines import Line2D

    runs = [run for run in runs if run.config["seed"] == 0 and len(run.lines[-1].get(kind, {})) > 1]
    if kind == "answers":  # of discriminators that are trained
        runs = [run for run in runs if run.config["lambda4"] or run.config["lambda5"]]
    if not runs:
        return False
    runs = sorted(runs, key=lambda run: (run.config["ratio"], *order(variant_of(run))))
    columns, n_rows = min(4, len(runs)), -(-len(runs) // 4)
    figure = Figure((3.2 * columns + 0.8, 2.7 * n_rows + 0.9), layout="constrained")
    axes = figure.subplots(n_rows, columns, squeeze=False, sharey=True).ravel()
    names = dict.fromkeys(name for run in runs for name, value in run.lines[-1][kind].items() if value)
    colours = {name: f"C{k}" for k, name in enumerate(names)}
    for ax, run in zip(axes, runs, strict=False):
        untrained = tuple(D for D, weight in {"D_S": "lambda4", "D_I": "lambda5"}.items() if not run.config[weight])
        for name in filter(run.lines[-1][kind].__contains__, colours):
            if name.startswith(untrained):
                continue
            weight = run.config[WEIGHTS[name]] if WEIGHTS.get(name) else 1.0
            points = [(line["step"], weight * line[kind][name]) for line in run.lines]
            ax.plot(*zip(*points, strict=True), marker=".", linewidth=1, color=colours[name])
        ax.set_title(f"{variant_of(run)}, {100 * run.config['ratio']:g} %", fontsize="medium")
        if kind == "gradients":
            ax.set(yscale="log", ylim=(0.002, 20))
        ax.grid(alpha=0.3)
    for ax in axes[len(runs) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], color=colour, marker=".", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False)
    figure.supxlabel("steps", fontsize="medium")
    labels = {"gradients": "weight x norm of a term's gradient in G_IS", "answers": "mean answer; 1 is real"}
    figure.supylabel(labels[kind], fontsize="medium")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def write(folder: Path, out: Path) -> None:
    """The report on the runs of a study: study.md, its table as CSV, and a picture a dataset and kind."""
    runs = read_runs(folder)
    table = rows(runs)
    utils.write_atomically(out / "study.csv", report.csv_text(table))
    text = page(runs, table)
    for dataset in dict.fromkeys(row["dataset"] for row in table):
        mine = [run for run in runs if run.config["dataset"]["name"] == dataset]
        for kind in "gradients", "answers":
            picture = f"study_{dataset}_{kind}.png"
            if draw(mine, kind, out / picture):
                text += f"## {report.TITLES.get(dataset, dataset)}: {kind}, seed 0\n\n![{kind}]({picture})\n\n"
    utils.write_atomically(out / "study.md", text)
    print(f"{len(runs)} finished runs in {folder}: {out / 'study.md'}")
