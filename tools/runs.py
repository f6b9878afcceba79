"""Runs of experiments: read from folders or a kept log, checked, and added to a kept log."""

import json
import os
import re
from argparse import Namespace
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import utils
from datasets.spec import read_toml
from datasets.splits import ROLES
from engine.flags import Flags, Parser, all_names, build_parser, flag_of, setting_names
from engine.trained import Trained, load
from tools.plan import DATASETS, EXPERIMENTS, SCALES, planned
from utils import InputError

VERSIONS = "torch torchvision numpy python device gpu commit started finished".split()
EVALUATION = "epoch step miou miou_all miou_official pixel_accuracy iou dice losses".split()
PARSER = build_parser()
NO_SETTING = {*all_names()} - {*setting_names()}  # flags that change no result
DEFAULTS = vars(PARSER.parse_args([]))
PAPER = {key: DEFAULTS[key] for key in setting_names()}
# Keys of [dataset] that change a result
DATASET_KEYS = "classes scored channels ignore void label_ids void_ids orientation".split()

MACHINE = "data_root", "cache", "device"  # flags of main.py that tools have, too

# What wrong fields raise
MALFORMED = AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError


def run_flags(parser: Parser) -> None:
    """Add what `load_runs` reads: RUN ... and main.py's flags of the machine."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a checkpoint")
    for name in MACHINE:
        parser.add_argument(flag_of(name), help="as in main.py")


def load_runs(args: Namespace) -> list[Trained]:
    """Load the runs that a tool's command line names."""
    given = {key: value for key in MACHINE if (value := getattr(args, key))}
    return [load(Flags({"checkpoint": run, **given})) for run in args.runs]


def as_flags(settings: dict) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for key, value in settings.items():
        flag = flag_of(key)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


@dataclass(frozen=True)
class RunRecord:
    """A run, as one line of a kept log."""

    name: str  # of the experiment
    run: str  # of the folder
    settings: dict  # flags that change the result
    dataset: dict  # the [dataset] table
    evaluations: list[dict]
    versions: dict
    split: dict  # number of images that are labeled, unlabeled, val; hash
    volumes: dict = field(default_factory=dict)  # scores of whole volumes by --testing

    @property
    def cell(self) -> tuple[str, float, str]:
        """Dataset, share of labeled images, experiment: what runs of different seeds share."""
        return self.dataset["name"], self.settings["ratio"], self.name

    @property
    def place(self) -> tuple:
        """Sort key: the paper's order of datasets, fewer labels first, then experiments.toml's."""
        dataset, ratio, name = self.cell
        position = [*DATASETS, dataset].index(dataset), dataset, ratio
        return *position, [*EXPERIMENTS].index(name), self.settings["seed"]

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

    @property
    def n_exams(self) -> int | None:
        """The number of labeled exams; None where single images are labeled."""
        counts = self.dataset.get("counts")
        by_exam = self.settings["label_unit"] == "exam" and counts
        return round(self.settings["ratio"] * counts[0]) if by_exam else None

    @property
    def labels(self) -> str:
        """What is labeled: '10%', or '8 exams'."""
        if self.n_exams and self.settings["ratio"] < 1:
            return utils.counted(self.n_exams, "exam")
        return f"{100 * self.settings['ratio']:g}%"


def read_folder(folder: Path) -> RunRecord:
    """A run from its folder, or InputError that names the file with an error.

    Its `name` is "" if the folder is not named <dataset>_<experiment>_<ratio>_s<seed>.
    """
    path = folder / "config.toml"
    try:
        config = read_toml(path)
        dataset = config.pop("dataset")
        settings = {key: value for key, value in config.items() if key not in NO_SETTING}
        ratio = f"{settings['ratio']:g}" if "ratio" in settings else ""  # none with a split file
        pattern = rf"{re.escape(dataset['name'])}_(.+)_{ratio}_s{settings['seed']}"
        match = re.fullmatch(pattern, folder.name) if ratio else None
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
        path = results_of(folder) / "metrics.json"
        test = json.loads(utils.read_text(path)) if path.is_file() else {}
        is_last = False
        if lines and test.get("epoch") == lines[-1]["epoch"]:
            difference = (test["miou"] or 0) - (lines[-1]["miou"] or 0)
            is_last = abs(difference) < 1e-3  # rounding; another network of this name differs more
        path, name = folder, match[1] if match and match[1] in EXPERIMENTS else ""
        volumes = test.get("volumes", {}) if is_last else {}
        run = RunRecord(name, folder.name, settings, dataset, lines, versions, split, volumes)
        return checked(run) if name else run
    except (OSError, *MALFORMED) as error:
        raise InputError(f"{path}: not as main.py writes it ({error!r})") from error


def results_of(folder: Path) -> Path:
    """Where `experiments.py run` has a run tested: results/<scale> beside checkpoints/<scale>."""
    scale = Path(os.path.abspath(folder)).parent  # a link in the path stays
    return scale.parent.parent / "results" / scale.name / folder.name


def checked(run: RunRecord) -> RunRecord:
    """Return the run with the defaults of newer flags; check every field that a report needs.

    InputError if the run has flags that no longer exist.
    """
    if dropped := sorted(run.settings.keys() - PAPER.keys()):
        flags, commit = as_flags(dict.fromkeys(dropped, True)), run.versions.get("commit")
        what = f"{' '.join(flags)} no longer exist"
        raise InputError(f"{run.run}: {what}; read it with commit {commit or 'of its time'}")
    if not utils.is_folder_name(run.dataset["name"]):
        raise ValueError(f"{run.dataset['name']!r} is not the name of a dataset")
    run = replace(run, settings=PAPER | run.settings)
    _ = run.place, run.finished, run.labels, run.split["hash"]
    _ = (run.versions.get("commit") or "").encode()
    counts = [run.split[role] for role in ROLES]
    counts += [run.settings[key] for key in ("seed", "epochs", "ratio")]
    shares, distances = [], []
    scored = [run.dataset["classes"][k] for k in run.dataset["scored"]]
    for line in run.evaluations:
        counts += [line["epoch"], line["step"]]
        shares += [line["miou"], *(line["iou"][name] for name in scored)]
    if "all" in run.volumes:
        scores = run.volumes["all"]
        shares.append(scores["mean"]["dice"])
        distances += [scores["mean"][key] for key in ("hd95_mm", "assd_mm")]
        for each in scores["classes"].values():
            counts += [each["n"], each["missed"], each.get("invented", 0)]
    for values, most in (counts, 1e12), (distances, 1e12), (shares, 1):
        for value in values:
            if value is None and values is not counts:  # where no scored class occurs
                continue
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise ValueError(f"{value!r} is not a number from 0 to {most:g}")
    return run


def read_log(path: Path) -> list[RunRecord]:
    """The runs of a kept log, or InputError with the number of the line with an error."""
    runs: dict[tuple, RunRecord] = {}
    for number, line in enumerate(utils.read_lines(path), 1):
        try:
            run = checked(RunRecord(**json.loads(line)))
        except InputError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
        except MALFORMED as error:
            raise InputError(f"{path}: line {number} is not a kept run ({error!r})") from error
        if run.place in runs:
            raise InputError(f"{path}: line {number} repeats {run.run}")
        runs[run.place] = run
    return [*runs.values()]


def read_runs(source: Path, scale: str) -> tuple[list[RunRecord], list[str]]:
    """The sorted runs of a folder or kept log, and the folders without an experiment's name."""
    found = read_log(source) if source.is_file() else []
    found += [read_folder(path.parent) for path in sorted(source.glob("*/config.toml"))]
    runs = sorted((run for run in found if run.name), key=lambda run: run.place)
    if not runs:
        raise InputError(f"{source}: no run of an experiment; `experiments.py run` makes them")
    check_settings(runs, scale, source)
    return runs, [run.run for run in found if not run.name]


def check_settings(runs: list[RunRecord], scale: str, source: Path) -> None:
    """InputError if runs are not those of their scale, or differ in what they must share."""
    if scale not in SCALES:
        advice = f"give --scale, one of {', '.join(SCALES)}"
        raise InputError(f"{source}: unknown scale {scale!r}; {advice}")
    wrong, differ = [], []
    first: dict[tuple, tuple] = {}
    for run in runs:
        dataset, ratio, name = run.cell
        settings = planned(dataset, name, scale)
        for key, expected in settings.items():
            if run.settings[key] != expected:
                found = f"{flag_of(key)} is {run.settings[key]}"
                wrong.append(f"{run.run}: {found}, expected {expected}")
        others = [key for key in PAPER if key not in {*settings, "seed", "ratio"}]
        shared = {(key,): run.settings[key] for key in others}
        shared |= {(f"[dataset] {key}",): run.dataset.get(key) for key in DATASET_KEYS}
        shared["split.json's hash", ratio, run.settings["seed"]] = run.split["hash"]
        shared["ratio", run.labels] = ratio  # two may give the same number of exams
        for key, value in shared.items():
            other, expected = first.setdefault((dataset, *key), (run.run, value))
            if value != expected:
                differ.append(f"{other} and {run.run} differ in {key[0]} ({expected}, {value})")
    if wrong:
        raise InputError(f"{source}: not runs of scale {scale}: {utils.first_ten(wrong)}")
    if differ:
        advice = "move one of them to another folder"
        raise InputError(f"{source}: {utils.first_ten(differ)}; {advice}")


def keep(source: Path, scale: str, out: Path) -> None:
    """Add the finished runs of `source` to out/SCALE.jsonl, and replace those that it has.

    A run whose test is not at hand keeps the scores of volumes that the log has.
    """
    path, (found, _) = out / f"{scale}.jsonl", read_runs(source, scale)
    utils.make_folder(out, "--out")
    finished = {run.place: run for run in found if run.finished}
    with utils.exclusive(out, utils.PATIENCE):  # another command may be adding its runs
        kept = {run.place: run for run in read_log(path)} if path.is_file() else {}
        for place, run in finished.items():
            before = kept.get(place)
            if before and not run.volumes and before.evaluations == run.evaluations:
                run = replace(run, volumes=before.volumes)
            kept[place] = run
        runs = [kept[place] for place in sorted(kept)]
        check_settings(runs, scale, path)
        utils.write_atomically(path, "".join(f"{json.dumps(asdict(run))}\n" for run in runs))
    print(f"{len(finished)} finished runs of {source} are in {path}, which has {len(runs)}")
