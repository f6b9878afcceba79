"""The paper's experiments, Tables 1 to 4: list their commands, run them, and report what came out beside the paper.

    python tools/experiments.py list --table 1 --dataset acdc
    python tools/experiments.py run --table 1 --dataset acdc --scale small --seeds 0 1 2 --jobs 2 -- --workers 0
    python tools/experiments.py report --scale small --out docs/results
    python tools/experiments.py keep --scale small --out docs/results      (a small copy of what report reads)
    python tools/experiments.py report --checkpoints docs/results/small --out docs/results

What stands after -- are flags of main.py for every run. The same command again goes on with what was cut. A run's
folder is checkpoints/<scale>/<dataset>_<method>_<ratio>_s<seed>, with _without_<term> for Table 2; its output beside.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
import utils
from data_utils import load_spec
from tools import report, study
from tools.report import ABLATIONS, Cell, paper_cells
from utils import InputError

# What a scale adds to main.py's flags, by dataset; "*" stands for those that are not named.
SCALES = {
    "paper": {"*": ""},
    "small": {  # for two CPU cores
        "voc": "--split standard --size 64 64 --ngf 16 --epochs 30 --lr 1e-3",
        "cityscapes": "--size 64 128 --ngf 16 --epochs 30 --lr 1e-3",
        "acdc": "--size 64 64 --ngf 16 --epochs 4 --lr 1e-3",
        "phantom": "--lambda3 1 --lambda4 1 --lambda5 1",  # config/phantom.toml with the paper's weights
        "*": "",  # a TOML of one's own says it all
    },
    "study": study.REGIME,  # variants in place of cells: tools/study.py
    "smoke": {"*": "--size 32 32 --ngf 4 --n-blocks 1 --epochs 1"},  # a minute a run: does every part work?
}
RATIOS = [1.0, 0.5, 0.3, 0.2, 0.1]
FIXED = {"dataset", "data_root", "method", "ratio", "seed", "checkpoints", "name"}  # not after --
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
MAIN = Path(main.__file__)


def select(table=None, dataset=None, methods=None, ratios=None, ablations=None) -> list[Cell]:
    """The cells that the flags mean; InputError where there is none. Data beyond the paper's have any ratio."""
    cells = [cell for cell in paper_cells() if table in (None, cell.table) and dataset in (None, cell.dataset)]
    if not cells and table == 2:
        cells = [Cell(2, dataset, "cyclegan", ratio, term) for ratio in ratios or [0.2] for term in ("", *ABLATIONS)]
    elif not cells and table in (None, 1):
        pairs = [(method, ratio) for ratio in ratios or RATIOS for method in main.METHODS]
        cells = [Cell(1, dataset, method, ratio) for method, ratio in pairs if ratio < 1 or method == "supervised"]
    asked = {"method": methods, "ratio": ratios, "without": ablations}
    kept = [cell for cell in cells if all(asked[key] is None or getattr(cell, key) in asked[key] for key in asked)]
    if not kept:
        raise InputError("no cell has these --table, --dataset, --methods, --ratios and --ablations; list shows them")
    return sorted(kept, key=lambda cell: (cell.table, cell.key.place))


def flags_of(cell: Cell, scale: str, seed: int = 0, data_root: str | None = None, extra: Iterable[str] = ()) -> list:
    """main.py's flags for a cell."""
    flags = ["--training", "--dataset", cell.dataset, "--method", cell.method, "--ratio", f"{cell.ratio:g}"]
    flags += ["--seed", str(seed), *SCALES[scale].get(cell.key.dataset, SCALES[scale]["*"]).split()]
    flags += [*(["--data-root", data_root] if data_root else []), *extra]
    flags += [f"--{ABLATIONS[cell.without]}", "0"] if cell.without else []
    return [*flags, "--checkpoints", f"checkpoints/{scale}", "--name", cell.key.run(seed)]


def command(flags: list[str]) -> str:
    """A line for a shell."""
    return shlex.join(["python", os.path.relpath(MAIN), *flags])


def evaluated(folder: Path) -> int:
    """Changes with each evaluation of a run; 0 before the first one."""
    log = folder / "metrics.jsonl"
    return log.stat().st_mtime_ns if log.is_file() else 0


def run_all(commands: dict[str, list[str]], folder: Path, at_once: int) -> int:
    """Run main.py with the flags of each name, and its output in folder/NAME.log; 0, 1 if one failed, 128 + signal.

    Signals are passed on: main.py saves and ends. The children have process groups of their own, as Ctrl-C would else
    reach them twice, and the second time they do not save.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
    waiting, running, failed, signals, passed_on = list(commands), {}, {}, [], 0
    handlers = {signum: signal.signal(signum, lambda signum, _: signals.append(signum)) for signum in SIGNALS}
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < at_once and not signals:
                name = waiting.pop(0)
                log, before, started = folder / f"{name}.log", evaluated(folder / name), time.monotonic()
                print(f"start {name}: {command(commands[name])}", flush=True)
                with log.open("ab") as out:
                    how = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT, "process_group": 0}
                    line = [sys.executable, str(MAIN), *commands[name]]
                    running[subprocess.Popen(line, **how, env={**threads, **os.environ})] = name, log, before, started
            for signum in signals[passed_on:]:
                passed_on += 1
                for child in running:
                    child.send_signal(signum)
            for child in [child for child in running if child.poll() is not None]:
                name, log, before, started = running.pop(child)
                took = timedelta(seconds=round(time.monotonic() - started))
                if child.returncode == 0:
                    run = report.read_run(folder / name)
                    how = "was finished" if evaluated(folder / name) == before else f"finished in {took}"
                    said = f"{how}, mIoU {run.last:.4f}, best {run.best:.4f}"
                else:
                    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
                    said = failed[name] = f"exit code {child.returncode} after {took}: {last} (see {log})"
                print(f"end   {name}: {said}", flush=True)
            time.sleep(0.1)
    finally:
        for child in running:
            child.terminate()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if signals:
        name = signal.Signals(signals[0]).name
        print(f"{name}: {len(failed)} runs cut, {len(waiting)} not begun; the same command goes on")
        return 128 + signals[0]
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    return 1 if failed else 0


def commands_of(args: argparse.Namespace, scale: str, seeds: Iterable[int], extra: list[str]) -> dict[str, list[str]]:
    """main.py's flags by the name of the run, seed by seed; tables share runs."""
    if scale == "study":
        if args.table or args.methods or args.ablations:
            raise InputError("--scale study: has --variants in place of --table, --methods and --ablations")
        if not args.dataset:
            raise InputError("--scale study: give --dataset")
        load_spec(args.dataset)
        own = [*(["--data-root", args.data_root] if args.data_root else []), *extra]
        names = study.select(args.dataset, args.variants, args.ratios)
        every = [study.flags_of(args.dataset, *of, seed) for seed in seeds for of in names]
        return {flags[-1]: [*flags[:-4], *own, *flags[-4:]] for flags in every}
    if args.variants:
        raise InputError("--variants: are of --scale study")
    cells = select(args.table, args.dataset, args.methods, args.ratios, args.ablations)
    if args.data_root and len({cell.dataset for cell in cells}) > 1:
        raise InputError("--data-root: is one dataset's; give --dataset")
    commands = {}
    for seed in seeds:
        commands |= {cell.key.run(seed): flags_of(cell, scale, seed, args.data_root, extra) for cell in cells}
    return commands


def show(args: argparse.Namespace, scale: str) -> int:
    """list: a line a cell."""
    args.data_root = None
    if scale == "study":
        print(*(f"{name:32} {command(flags)}" for name, flags in commands_of(args, scale, [0], []).items()), sep="\n")
        return 0
    lines = ["table  dataset     method       labeled  without   paper  command"]
    for cell in select(args.table, args.dataset, args.methods, args.ratios, args.ablations):
        key, labeled = cell.key, f"{100 * cell.ratio:g} %"
        row = f"{cell.table:5}  {key.dataset:11} {key.title:12} {labeled:>7}  {key.without:7} "
        lines.append(f"{row} {report.number(cell.paper):>6}  {command(flags_of(cell, scale))}")
    print(*lines, sep="\n")
    return 0


def run(args: argparse.Namespace, scale: str, extra: list[str]) -> int:
    """run: train the cells, seed by seed."""
    if own := main.parse_args(["--training", *extra]).given.keys() & FIXED:
        raise InputError(f"--{min(own).replace('_', '-')} after --: say it before, or run main.py by hand")
    commands = commands_of(args, scale, args.seeds, extra)
    for flags in commands.values():
        main.parse_args(flags)
    if args.dry_run:
        print(*map(command, commands.values()), sep="\n")
        return 0
    folder = Path("checkpoints") / scale
    utils.make_folder(folder, "the folder")
    return run_all(commands, folder, args.jobs)


def build_parser() -> argparse.ArgumentParser:
    parser = main.Parser("experiments.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|run|report|keep")
    about = {
        "list": "the cells, with the paper's number and the command",
        "run": "train them; flags of main.py stand after --",
        "report": "write tables and pictures of what was run",
        "keep": "copy the small files of finished runs, for report",
    }
    for action, what in about.items():
        flag = actions.add_parser(action, help=what, description=what, allow_abbrev=False).add_argument
        flag("--scale", choices=list(SCALES), help="the setting; paper if not given")
        if action in ("list", "run"):
            share = main.number(float, 0, 1, above=True)
            flag("--table", type=int, choices=[1, 2, 3, 4], help="of the paper; all if not given")
            flag("--dataset", help="a name in config/ or a .toml file; all of the paper if not given")
            flag("--methods", nargs="+", choices=list(main.METHODS), help="all if not given")
            flag("--ratios", nargs="+", type=share, metavar="R", help="shares of labeled images; all if not given")
            flag("--ablations", nargs="+", choices=list(ABLATIONS), help="terms that Table 2 leaves out")
            flag("--variants", nargs="+", metavar="V", help="of --scale study; all if not given")
        else:
            flag("--checkpoints", metavar="DIR", help="the runs, a folder named as their scale; checkpoints/SCALE")
            flag("--out", default="docs/results", metavar="DIR", help="where to write; docs/results if not given")
        if action == "run":
            flag("--seeds", nargs="+", type=main.number(int, 0, 2**32), default=[0], metavar="S", help="0 if not given")
            flag("--jobs", type=main.number(int, 1, 1000), default=1, metavar="N", help="runs at once; 1 if not given")
            flag("--data-root", metavar="DIR", help="where the dataset's files lie")
            flag("--dry-run", action="store_true", help="print the commands only")
    return parser


def experiments(argv: list[str]) -> int:
    """Exit code: 0 done, 1 a run failed, 128 + n after signal n; InputError where flags or files are wrong."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = build_parser().parse_args(argv[:split])
    scale = args.scale or "paper"
    if args.action == "list":
        return show(args, scale)
    if args.action == "run":
        return run(args, scale, argv[split + 1 :])
    folder, out = Path(args.checkpoints or f"checkpoints/{scale}"), Path(args.out)
    if args.scale not in (None, folder.resolve().name):
        raise InputError(f"--checkpoints {folder}: expected a folder named {scale}, as --scale says")
    utils.make_folder(out, "--out")
    try:
        of_study = folder.resolve().name == "study"
        if args.action == "report":
            (study if of_study else report).write(folder, out)
        else:
            runs = study.read_runs(folder) if of_study else report.read_runs(folder)[0]
            report.keep([run for run in runs if run.finished], folder, out)
    except ImportError as error:
        raise InputError(f"{error}: pip install -r tools/requirements.txt") from error
    return 0


if __name__ == "__main__":
    sys.exit(main.main(command=experiments))
