"""The paper's experiments and their variants: list their commands, run them, report the results.

    python tools/experiments.py list --table 1 --dataset acdc
    python tools/experiments.py run --scale reduced --dataset acdc --names partial ours --jobs 2
    python tools/experiments.py report --scale reduced
    python tools/experiments.py keep --scale reduced --out docs/results
    python tools/experiments.py report --from docs/results/reduced.jsonl

tools/experiments.toml lists scales and experiments. Flags of main.py after -- are added to every
run. The same command again resumes interrupted runs. A run's folder is
checkpoints/<scale>/<dataset>_<name>_<ratio>_s<seed>; its output is in the .log file beside it.
`keep` adds finished runs to <scale>.jsonl, one line per run. `report` and `keep` write to the
folder of the runs, or of the kept log, unless --out is given.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from engine import program
from engine.flags import Parser, number, parse_args
from engine.signals import SIGNALS
from tools import report, runs
from tools.plan import EXPERIMENTS, SCALES, dataset_name, paper_cells, paper_scores, run_flags
from utils import InputError

FIXED = {"dataset", "data_root", "method", "ratio", "seed", "checkpoints", "name"}  # not after --
MAIN = Path(__file__).resolve().parents[1] / "main.py"


def select(args: argparse.Namespace, scale: str) -> list[tuple[str, str, float]]:
    """(--dataset, experiment, ratio) as the flags say; InputError if there is none.

    Ratios come from --ratios, else from --table, else from the scale, else from the paper. If none
    of them has any, the ratio is 0.2 where --names are given or the paper lacks the dataset.
    """
    if unknown := [name for name in args.names or () if name not in EXPERIMENTS]:
        raise InputError(f"--names {unknown[0]}: expected some of {', '.join(EXPERIMENTS)}")
    cells, selected = paper_cells(args.table), []
    in_paper = dict.fromkeys(dataset for dataset, _, _ in paper_cells(None))
    names = [name for name in EXPERIMENTS if args.names is None or name in args.names]
    if args.table:
        names = [name for name in names if name in {name for _, _, name in cells}]
    for dataset in [args.dataset] if args.dataset else in_paper:
        short = dataset_name(dataset)
        table = SCALES[scale].get("ratios", {})
        usual = table.get(short, table.get("*", []))
        fallback = [] if short in in_paper and not args.names else [0.2]
        for name in names:
            paper = [ratio for other, ratio, of in cells if (other, of) == (short, name)]
            ratios = args.ratios or (args.table and paper) or usual or paper or fallback
            ratios = EXPERIMENTS[name].get("ratios", ratios) if ratios else []
            selected += [(dataset, name, ratio) for ratio in ratios]
    if not selected:
        raise InputError("the paper has no experiment with these flags; give --names and --ratios")
    return selected


def command(flags: list[str]) -> str:
    """A line for a shell."""
    return shlex.join(["python", os.path.relpath(MAIN), *flags])


def evaluated(folder: Path) -> int:
    """A number that changes with each evaluation of a run; 0 before the first one."""
    log = folder / "metrics.jsonl"
    return log.stat().st_mtime_ns if log.is_file() else 0


def start(name: str, flags: list[str], folder: Path, n_jobs: int) -> subprocess.Popen:
    """Start a run with its share of the cores and its output in folder/NAME.log.

    It gets its own process group: Ctrl-C would otherwise reach it twice, and the second signal
    ends it without a checkpoint.
    """
    print(f"start {name}: {command(flags)}", flush=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_jobs))}
    with (folder / f"{name}.log").open("ab") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        line = [sys.executable, str(MAIN), *flags]
        return subprocess.Popen(line, process_group=0, env={**threads, **os.environ}, **streams)


def run_all(commands: dict[str, list[str]], folder: Path, n_jobs: int) -> int:
    """Run main.py with the flags of each name; 0, 1 if a run failed, 128 + n after signal n.

    Signals are passed on: main.py saves a checkpoint and exits.
    """
    waiting, running, signals, n_passed_on = list(commands), {}, [], 0
    failed, interrupted, handlers = {}, {}, {}
    for signum in SIGNALS:
        handlers[signum] = signal.signal(signum, lambda signum, _: signals.append(signum))
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < n_jobs and not signals:
                name = waiting.pop(0)
                begin = evaluated(folder / name), time.monotonic()
                running[start(name, commands[name], folder, n_jobs)] = name, *begin
            for signum in signals[n_passed_on:]:
                n_passed_on += 1
                for child in running:
                    child.send_signal(signum)
            for child in [child for child in running if child.poll() is not None]:
                name, before, started = running.pop(child)
                duration = timedelta(seconds=round(time.monotonic() - started))
                if child.returncode == 0:
                    run = runs.read_folder(folder / name)
                    trained = evaluated(folder / name) != before
                    result = f"finished in {duration}" if trained else "was finished"
                    result += f", mIoU {run.last:.4f}, best {run.best:.4f}" if run.epoch else ""
                else:
                    log = folder / f"{name}.log"
                    message = log.read_text(errors="replace").strip().rpartition("\n")[2]
                    result = f"exit code {child.returncode} after {duration}: {message} (see {log})"
                    by_signal = child.returncode > 128 or -child.returncode in signals
                    (interrupted if by_signal else failed)[name] = result
                print(f"end   {name}: {result}", flush=True)
            time.sleep(0.1)
    finally:
        for child in running:
            child.terminate()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    for name, result in failed.items():
        print(f"failed: {name}: {result}")
    if signals:
        counts = f"{len(interrupted)} runs interrupted, {len(waiting)} not started"
        print(f"{signal.Signals(signals[0]).name}: {counts}; the same command resumes them")
        return 128 + signals[0]
    return 1 if failed or interrupted else 0


def show(args: argparse.Namespace, scale: str) -> int:
    """list: one line per dataset, experiment and ratio."""
    lines = ["dataset     experiment             labeled   paper  command"]
    for cell in select(args, scale):
        short, name, ratio = dataset_name(cell[0]), *cell[1:]
        paper = report.number(paper_scores().get((short, ratio, name)))
        row = f"{short:11} {name:22} {f'{100 * ratio:g}%':>7}  {paper:>6}"
        lines.append(f"{row}  {command(run_flags(cell, scale, 0, []))}")
    print(*lines, sep="\n")
    return 0


def run(args: argparse.Namespace, scale: str, extra: list[str]) -> int:
    """run: train, seed by seed."""
    if fixed := parse_args(["--training", *extra]).given.keys() & FIXED:
        flag = min(fixed).replace("_", "-")
        raise InputError(f"--{flag} after --: give it before --, or run main.py directly")
    cells, commands = select(args, scale), {}
    if args.data_root:
        if len({dataset for dataset, _, _ in cells}) > 1:
            raise InputError("--data-root: is for one dataset; give --dataset")
        extra = ["--data-root", args.data_root, *extra]
    for seed in args.seeds:
        for cell in cells:
            flags = run_flags(cell, scale, seed, extra)
            commands[parse_args(flags).name] = flags
    if args.dry_run:
        print(*map(command, commands.values()), sep="\n")
        return 0
    folder = Path("checkpoints") / scale
    utils.make_folder(folder, "the folder")
    return run_all(commands, folder, args.jobs)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("experiments.py", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|run|report|keep")
    helps = {
        "list": "print the paper's number and the command of each experiment",
        "run": "train; put flags of main.py after --",
        "report": "write tables and figures from run folders or a kept log",
        "keep": "add finished runs to a kept log, one line per run",
    }
    for action, text in helps.items():
        flag = actions.add_parser(action, help=text, description=text).add_argument
        flag("--scale", choices=list(SCALES), help="default: paper, or the name of --from")
        if action in ("list", "run"):
            share = number(float, 0, 1, above=True)
            flag("--dataset", help="a name in config/ or a .toml file; default: the paper's three")
            flag("--names", nargs="+", metavar="NAME", help="experiments; default: all")
            flag("--ratios", nargs="+", type=share, metavar="R", help="shares of labeled images")
            flag("--table", type=int, choices=[1, 2, 3, 4], help="table of the paper")
        else:
            source = "a folder of runs or a kept .jsonl; default: checkpoints/SCALE"
            flag("--from", dest="source", metavar="PATH", type=Path, help=source)
            flag("--out", metavar="DIR", type=Path, help="output folder; default: that of the runs")
        if action == "run":
            seed, count = number(int, 0, 2**32), number(int, 1, 1000)
            flag("--seeds", nargs="+", type=seed, default=[0], metavar="S", help="random seeds")
            flag("--jobs", type=count, default=1, metavar="N", help="parallel runs")
            flag("--data-root", metavar="DIR", help="folder with the dataset's files")
            flag("--dry-run", action="store_true", help="print the commands only")
    return parser


def experiments(argv: list[str]) -> int:
    """0 done, 1 a run failed, 128 + n after signal n; InputError for wrong flags or files."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = build_parser().parse_args(argv[:split])
    if args.action == "list":
        return show(args, args.scale or "paper")
    if args.action == "run":
        return run(args, args.scale or "paper", argv[split + 1 :])
    scale = args.scale or (args.source.resolve().stem if args.source else "paper")
    source = args.source or Path("checkpoints") / scale
    out = args.out or (source.parent if source.is_file() else source)
    try:
        (report.write if args.action == "report" else runs.keep)(source, scale, out)
    except ImportError as error:
        raise InputError(f"{error}: pip install -r tools/requirements.txt") from error
    return 0


if __name__ == "__main__":
    sys.exit(program.run(experiments))
