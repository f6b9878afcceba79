"""The paper's experiments and their variants: list their commands, run them, report the results.

    python tools/experiments.py list --table 1 --dataset acdc
    python tools/experiments.py run --scale reduced --dataset acdc --names partial ours --jobs 2
    python tools/experiments.py report --scale reduced
    python tools/experiments.py keep --scale reduced --out docs/results
    python tools/experiments.py report --from docs/results/reduced.jsonl

tools/experiments.toml lists scales and experiments. Flags of main.py after -- are added to every
run. The same command again resumes interrupted runs. A run's folder is
checkpoints/<scale>/<dataset>_<name>_<ratio>_s<seed>; its output is in the .log file beside it. Its
last checkpoint is then tested; the scores are in results/<scale>/.
`keep` adds finished runs to <scale>.jsonl, one line per run. `report` and `keep` write to the
folder of the runs, or of the kept log, unless --out is given.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, to handle signals during them
    from engine import signals

    signals.install()

import torch

import utils
from datasets.splits import ByFile
from engine import program
from engine.flags import Flags, Parser, bounded, flag_of, parse_args
from engine.signals import SIGNALS
from tools import report, runs
from tools.plan import EXPERIMENTS, SCALES, command_flags, paper_cells, paper_scores, short_name
from tools.runs import as_flags
from utils import InputError

# Flags of main.py that this program sets itself: an error after --
FIXED = set("dataset data_root method ratio labeled seed checkpoints results name".split())
MAIN = Path(__file__).resolve().parents[1] / "main.py"


def select(args: argparse.Namespace, scale: str) -> list[tuple[str, str, float]]:
    """(--dataset, experiment, ratio) as the flags say; InputError if there is none.

    Ratios are the experiment's own (Full), else those of --ratios, --table, the scale or the paper,
    whichever comes first; otherwise 0.2 where --names are given or the paper lacks the dataset.
    """
    if unknown := [name for name in args.names or () if name not in EXPERIMENTS]:
        raise InputError(f"--names {unknown[0]}: expected some of {', '.join(EXPERIMENTS)}")
    cells, selected = paper_cells(args.table), []
    in_paper = {dataset for dataset, _, _ in paper_cells(None)}
    names = [name for name in EXPERIMENTS if args.names is None or name in args.names]
    if args.table:
        in_table = {name for _, _, name in cells}
        names = [name for name in names if name in in_table]
    for dataset in [args.dataset] if args.dataset else dict.fromkeys(cell[0] for cell in cells):
        short = short_name(dataset)
        table = SCALES[scale].get("ratios", {})
        usual = table.get(short, table.get("*", []))
        fallback = [] if short in in_paper and not args.names else [0.2]
        for name in names:
            paper = [cell[1] for cell in cells if cell[::2] == (short, name)]
            ratios = args.ratios or (args.table and paper) or usual or paper or fallback
            ratios = EXPERIMENTS[name].get("ratios", ratios) if ratios else []
            selected += [(dataset, name, ratio) for ratio in ratios]
    if not selected:
        raise InputError("the paper has no experiment with these flags; give --names and --ratios")
    return selected


def testing_flags(scale: str, args: Flags) -> list[str]:
    """main.py's flags that test a run's last checkpoint, on the machine that trains it."""
    last, results = f"checkpoints/{scale}/{args.name}/last.pt", f"results/{scale}"
    flags = ["--testing", "--checkpoint", last, "--results", results]
    machine = {key: getattr(args, key) for key in [*runs.PARSER.keys["machine"], "cache"]}
    machine = {key: value for key, value in machine.items() if value != runs.DEFAULTS[key]}
    root = {"data_root": args.given["data_root"]} if "data_root" in args.given else {}
    return flags + as_flags(machine | root)


def command(flags: list[str]) -> str:
    """Format as a shell command."""
    return shlex.join(["python", os.path.relpath(MAIN), *flags])


# Running


@dataclass(frozen=True)
class Job:
    """A process of main.py that trains a run, or tests it."""

    name: str
    testing: bool
    slot: int  # of --jobs
    process: subprocess.Popen
    before: int  # log_time() at its start
    started: float

    def result(self, folder: Path) -> str:
        """What the process has done, in words."""
        duration = timedelta(seconds=round(time.monotonic() - self.started))
        if code := self.process.returncode:
            log = folder / f"{self.name}.log"
            text = log.read_text(errors="replace") if log.is_file() else ""
            message = text.strip().rpartition("\n")[2]
            what = "test: " if self.testing else ""
            return f"{what}exit code {code} after {duration}: {message} (see {log})"
        if self.testing:
            return f"tested in {duration}"
        try:
            run = runs.read_folder(folder / self.name)
        except InputError as error:  # of a finished run of an earlier version
            return f"finished, but the report cannot read it: {error}"
        trained = log_time(folder / self.name) != self.before
        result = f"finished in {duration}" if trained else "was finished"
        return result + (f", mIoU {run.last:.4f}, best {run.best:.4f}" if run.epoch else "")


def log_time(folder: Path) -> int:
    """When a run's metrics.jsonl was last written, in ns; 0 without one."""
    log = folder / "metrics.jsonl"
    return log.stat().st_mtime_ns if log.is_file() else 0


def is_tested(folder: Path) -> bool:
    """Whether a run's last checkpoint was tested after it was written."""
    last, metrics = folder / "last.pt", runs.results_of(folder) / "metrics.json"
    try:
        of_last = re.search(r'"checkpoint": ".*/last\.pt"', utils.read_text(metrics))
        return bool(of_last) and metrics.stat().st_mtime > last.stat().st_mtime
    except (OSError, InputError):  # a missing or damaged file, which the test itself names
        return False


def visible_gpus() -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, or all of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(gpu) for gpu in range(torch.cuda.device_count())]
    return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]


def environment(slot: int, n_jobs: int, gpus: list[str]) -> dict[str, str]:
    """The environment of a job: its share of the cores, and its GPU if there is any."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_jobs))}
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    return {**threads, **os.environ, **gpu}


def start(name: str, flags: list[str], folder: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start main.py with its output in folder/NAME.log.

    It gets its own process group: Ctrl-C would otherwise reach it twice, and the second signal
    ends it without a checkpoint.
    """
    print(f"start {name}: {command(flags)}", flush=True)
    with (folder / f"{name}.log").open("ab") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        line = [sys.executable, str(MAIN), *flags]
        return subprocess.Popen(line, process_group=0, env=env, **streams)


def run_all(
    commands: dict[str, list[list[str]]], folder: Path, n_jobs: int, gpus: list[str]
) -> int:
    """Train and test with main.py's flags of each name; 0, 1 if any failed, 128 + n after signal n.

    Signals are passed on: main.py saves a checkpoint and exits. A run is tested once it is
    finished, unless it was before; a test that fails leaves the run and the others as they are.
    """
    waiting, running, signals, n_passed_on = list(commands), [], [], 0
    failed, interrupted, handlers = {}, {}, {}
    for signum in (*SIGNALS, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            handlers[signum] = signal.signal(signum, lambda signum, _: signals.append(signum))

    def begin(name: str, testing: bool, slot: int) -> None:
        before, started = log_time(folder / name), time.monotonic()
        flags = commands[name][1 if testing else 0]
        process = start(name, flags, folder, environment(slot, n_jobs, gpus))
        running.append(Job(name, testing, slot, process, before, started))

    try:
        while running or (waiting and not signals):
            while waiting and len(running) < n_jobs and not signals:
                begin(waiting.pop(0), False, min({*range(n_jobs)} - {job.slot for job in running}))
            for signum in signals[n_passed_on:]:
                n_passed_on += 1
                for job in running:  # SIGHUP would end main.py without a checkpoint
                    job.process.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                result, code = job.result(folder), job.process.returncode
                print(f"end   {job.name}: {result}", flush=True)
                if code:
                    by_signal = signals and (code > 128 or -code in signals)
                    ended = interrupted if by_signal else failed
                    ended[job.name] = result
                elif not (job.testing or signals or is_tested(folder / job.name)):
                    begin(job.name, True, job.slot)
            time.sleep(0.1)
    finally:
        for job in running:
            job.process.terminate()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    for name, result in failed.items():
        print(f"failed: {name}: {result}")
    if signals:
        counts = f"{len(interrupted)} runs interrupted, {len(waiting)} not started"
        overwrite = any("--overwrite" in flags for flags, *_ in commands.values())
        again = "the same command" + (" without --overwrite" if overwrite else "")
        print(f"{signal.Signals(signals[0]).name}: {counts}; {again} resumes them")
        return 128 + signals[0]
    return 1 if failed else 0


# The command line


def show(args: argparse.Namespace, scale: str) -> int:
    """list: one line per dataset, experiment and ratio."""
    lines = ["dataset     experiment             labeled   paper  command"]
    for cell in select(args, scale):
        short, name, ratio = short_name(cell[0]), *cell[1:]
        paper = report.number(paper_scores().get((short, ratio, name)))
        row = f"{short:11} {name:22} {f'{100 * ratio:g}%':>7}  {paper:>6}"
        lines.append(f"{row}  {command(command_flags(cell, scale, 0, []))}")
    print(*lines, sep="\n")
    return 0


def run(args: argparse.Namespace, scale: str, extra: list[str]) -> int:
    """run: train and test, seed by seed."""
    asked = parse_args(["--training", *extra])
    by_file = isinstance(asked.rule, ByFile)
    if fixed := {key for key in asked.given if key in FIXED or (key == "split" and by_file)}:
        advice = "it follows from the flags before --; to set it, run main.py directly"
        raise InputError(f"{flag_of(min(fixed))} after --: {advice}")
    cells, commands = select(args, scale), {}
    if args.data_root:
        if len({dataset for dataset, _, _ in cells}) > 1:
            raise InputError("--data-root: is for one dataset; give --dataset")
        extra = ["--data-root", args.data_root, *extra]
    for seed in args.seeds:
        for cell in cells:
            flags = command_flags(cell, scale, seed, extra)
            parsed = parse_args(flags)
            commands[parsed.name] = [flags, testing_flags(scale, parsed)]
    if args.dry_run:
        for train, test in commands.values():
            print(f"{command(train)} && {command(test)}")
        return 0
    folder = Path("checkpoints") / scale
    utils.make_folder(folder, "the folder")
    gpus = [] if parsed.device else visible_gpus()
    return run_all(commands, folder, args.jobs, gpus)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("experiments.py", description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|run|report|keep")
    helps = {
        "list": "print the paper's number and the command of each experiment",
        "run": "train and test; put flags of main.py after --",
        "report": "write tables and figures from run folders or a kept log",
        "keep": "add finished runs to a kept log, one line per run",
    }
    for action, text in helps.items():
        flag = actions.add_parser(action, help=text, description=text).add_argument
        runs_exist = action in ("report", "keep")
        scale = "default: the name of --from, or paper" if runs_exist else "default: paper"
        flag("--scale", choices=list(SCALES), help=scale)
        if not runs_exist:
            share = bounded(float, 0, 1, above=True)
            flag("--dataset", help="a name in config/ or a .toml file; default: the paper's three")
            flag("--names", nargs="+", metavar="NAME", help="experiments; default: all")
            flag("--ratios", nargs="+", type=share, metavar="R", help="shares of labeled images")
            flag("--table", type=int, choices=[1, 2, 3, 4], help="table of the paper")
        else:
            source = "a folder of runs or a kept .jsonl; default: checkpoints/SCALE"
            flag("--from", dest="source", metavar="PATH", type=Path, help=source)
            flag("--out", metavar="DIR", type=Path, help="output folder; default: that of the runs")
        if action == "run":
            seed, count = bounded(int, 0, 2**32), bounded(int, 1, 1000)
            flag("--seeds", nargs="+", type=seed, default=[0], metavar="S", help="random seeds")
            flag(
                "--jobs",
                type=count,
                default=1,
                metavar="N",
                help="parallel runs, each with its own GPU if there are several",
            )
            flag("--data-root", metavar="DIR", help="folder with the dataset's files")
            flag("--dry-run", action="store_true", help="print the commands only")
    return parser


def experiments(argv: list[str]) -> int:
    """0 done, 1 a run failed, 128 + n after signal n; InputError for wrong flags or files."""
    split = argv.index("--") if "--" in argv else len(argv)
    args, extra = build_parser().parse_args(argv[:split]), argv[split + 1 :]
    if extra and args.action != "run":
        raise InputError(f"flags after -- belong to run, not to {args.action}")
    if args.action == "list":
        return show(args, args.scale or "paper")
    if args.action == "run":
        return run(args, args.scale or "paper", extra)
    name = Path(os.path.abspath(args.source)).stem if args.source else "paper"  # of a link, its own
    scale = args.scale or name
    source = args.source or Path("checkpoints") / scale
    out = args.out or (source.parent if source.is_file() else source)
    write = report.write if args.action == "report" else runs.keep
    write(source, scale, out)
    return 0


if __name__ == "__main__":
    sys.exit(program.execute(experiments))
