"""A run's logs: progress bar, metrics.jsonl, manifest.json, TensorBoard events."""

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from torch import Tensor
from tqdm import tqdm

import utils
from utils import InputError, naming, writing

OTHER_REPOSITORY = "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR"  # of git hooks
EVENTS = "events.out.tfevents"  # beginning of the names of TensorBoard's files
SECONDS_BETWEEN_LINES = 60  # when standard error is not a terminal


class Logs:
    """The logs of one run; only the first process writes.

    Where standard error is not a terminal, lines on standard output take the place of the progress
    bar. first_step: TensorBoard hides what an earlier process logged from this step on.
    n_images, n_done: number of images in the whole run, and so far.
    """

    def __init__(self, folder: Path, first_step: int, n_images: int, n_done: int):
        first = utils.rank() == 0
        self.n_left, self.n_own = n_images - n_done, 0  # images left; images since this start
        self.started = time.monotonic()
        self.last_line = self.started, 0  # time and n_own of the last line
        self.log = folder / "metrics.jsonl"
        self.events = EventLog(folder, first_step) if first else None
        self.bar = tqdm(
            total=n_images,
            initial=n_done,
            unit=" images",
            disable=None if first else True,
            dynamic_ncols=True,
        )

    def step(self, place: str, losses: dict[str, Tensor], n_images: int) -> None:
        """Count a step's images on the progress bar; without one, print a line every minute.

        The line has the first process's losses; reading them waits for the device. The time left
        assumes the mean speed since this start, evaluations included.
        """
        self.n_left, self.n_own = self.n_left - n_images, self.n_own + n_images
        self.bar.update(n_images)
        now, (before, n_before) = time.monotonic(), self.last_line
        if self.events is None or not self.bar.disable or now - before < SECONDS_BETWEEN_LINES:
            return
        speed = (self.n_own - n_before) / (now - before)
        left = tqdm.format_interval(self.n_left * (now - self.started) / self.n_own)
        terms = with_values({name: value.item() for name, value in losses.items()})
        print(f"{place}: {terms}, {speed:.1f} images/s, {left} left", flush=True)
        self.last_line = now, self.n_own

    def losses(self, losses: dict[str, Tensor], step: int, lr: float) -> None:
        """Log a step's losses on the progress bar and in TensorBoard. Waits for the device."""
        means = utils.total(torch.stack(list(losses.values()))) / utils.n_connected()
        if self.events is None:
            return
        values = dict(zip(losses, means.tolist(), strict=True))
        curves = {f"loss/{name}": value for name, value in values.items()} | {"lr": lr}
        self.events.add(step, *itertools.starmap(summary.scalar, curves.items()))
        postfix = {name: f"{value:.3f}" for name, value in values.items()}
        self.bar.set_postfix(postfix, refresh=False)

    def evaluation(self, record: dict, grid: Tensor) -> None:
        """Log an evaluation: a line in metrics.jsonl, curves, a picture."""
        before = utils.read_text(self.log) if self.log.is_file() else ""
        utils.write_atomically(self.log, f"{before}{json.dumps(record)}\n")
        means = "miou", "miou_all", "miou_official", "pixel_accuracy"
        curves = {f"val/{key}": record[key] for key in means}
        for kind in "iou", "dice":
            curves |= {f"{kind}/{name}": value for name, value in record[kind].items()}
        known = {tag: value for tag, value in curves.items() if value is not None}
        scalars = itertools.starmap(summary.scalar, known.items())
        picture = summary.image("validation", grid.numpy())
        self.events.add(record["step"], *scalars, picture)

    def say(self, title: str, losses: dict[str, float]) -> None:
        """Print an evaluation and the mean losses before it, above the progress bar."""
        with tqdm.external_write_mode():
            print(f"{title}, {with_values(losses)}", flush=True)

    def close(self) -> None:
        """Close the progress bar and the event file."""
        self.bar.close()
        if self.events:
            self.events.close()


def with_values(losses: dict[str, float]) -> str:
    """The losses as text."""
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items())


def forget_after(folder: Path, epoch: int) -> None:
    """Drop a run's evaluations after an epoch; a resumed run repeats them.

    InputError if the evaluation of that epoch, 0 for none, is missing.
    """
    log = folder / "metrics.jsonl"
    advice = "restore the file, or give --overwrite to start over"
    lines = utils.read_lines(log) if log.is_file() else []
    try:
        with naming(log):
            epochs = [json.loads(line)["epoch"] for line in lines]
            kept = [line for line, of in zip(lines, epochs, strict=True) if of <= epoch]
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    if epoch and epoch not in epochs:
        raise InputError(f"{log}: lacks the evaluation of epoch {epoch}; {advice}")
    utils.write_atomically(log, "".join(f"{line}\n" for line in kept))


class EventLog:
    """A run's TensorBoard events, written to disk as they are logged.

    tensorboardX's SummaryWriter writes in a thread, which dies on a full disk and leaves the run
    waiting forever; here the caller gets a TrainingError. TensorBoard hides what an earlier process
    logged from `first_step` on.
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / EVENTS
        with writing(self.path, 0):
            self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if first_step:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=first_step, session_log=start))

    def add(self, step: int, *summaries: Summary) -> None:
        """Log scalars, texts, images or settings of a step."""
        for each in summaries:
            self._write(Event(step=step, summary=each))

    def close(self) -> None:
        """Close the file."""
        with writing(self.path, 0):
            self.writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self.path, event.ByteSize()):
            self.writer.write_event(event)
            self.writer.flush()


def settings_summaries(table: dict, metric: str) -> list[Summary]:
    """Settings as text and for the hparams table, which compares runs by `metric`."""
    values = {key: value for key, value in table.items() if value is not None}
    rows = ["| setting | value |", "| --- | --- |"]
    rows += [f"| {key} | {value} |" for key, value in values.items()]
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = " ".join(map(str, value))
    experiment, session, _end = summary.hparams(values, {metric: None})
    return [summary.text("settings", "\n".join(rows)), experiment, session]


def commit_of(home: Path) -> str | None:
    """The commit of a checkout, "-dirty" if files differ from it; None if it is none."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty", "--abbrev=40"]
    env = {key: value for key, value in os.environ.items() if key not in OTHER_REPOSITORY}
    env["GIT_CEILING_DIRECTORIES"] = str(home.parent)  # not a repository around it
    options = {"capture_output": True, "text": True, "check": True, "timeout": utils.PATIENCE}
    try:
        return subprocess.run(describe, cwd=home, env=env, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git


def write_manifest(folder: Path, device: torch.device, **more) -> None:
    """Add to manifest.json: the command, versions, device, commit, and `more`."""
    path, before = folder / "manifest.json", {}
    try:
        with naming(path):
            before = dict(json.loads(utils.read_text(path))) if path.is_file() else {}
    except InputError as error:  # no run needs what it held
        print(f"{error}; rewriting it")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    now = {"command": shlex.join(sys.argv), "device": str(device), "gpu": gpu}
    now["commit"] = commit_of(Path(__file__).resolve().parents[1])
    now |= {name: version(name) for name in ("torch", "numpy")}
    now |= {"python": platform.python_version(), "platform": platform.platform()}
    utils.write_atomically(path, json.dumps({**before, **now, **more}, indent=1))
