"""What the tests of whole runs share: flags of tiny networks, and helpers around main.main."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from engine import checkpoint, program, signals
from engine.flags import parse_args
from engine.run import Run
from engine.signals import stop
from engine.trained import Trained, load
from model import METHODS

TINY = "--dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 1 --workers 0 --device cpu"
TINY = TINY.split()
SUPERVISED = [*TINY, "--method", "supervised", "--epochs", "1"]
SIMPLE = Path("checkpoints/tiny_supervised_0.2_s0")  # the folder of a run with these flags


def tiny_on(dataset: str | Path) -> list[str]:
    """The flags of TINY with another dataset."""
    return ["--dataset", str(dataset), *TINY[2:]]


def run(*flags, tool=main.command) -> int:
    """The exit code of a command line of main.py, or of a tool."""
    return program.execute(tool, list(map(str, flags)))


def load_with(flags: list[str]) -> Trained:
    """The checkpoint that a command line of --testing or --predict uses."""
    return load(parse_args(flags))


class Program(multiprocessing.get_context("fork").Process):
    """A command line in a process and a session of its own, and what it prints.

    It is forked, since importing torch takes seconds. `prepare` is called in it first.
    """

    def __init__(self, *argv, tool=main.command, prepare=lambda: None):
        super().__init__()
        self.argv, self.tool, self.prepare = argv, tool, prepare
        self.files = [tempfile.TemporaryFile("a+") for _ in range(2)]  # noqa: SIM115
        self.start()

    def run(self) -> None:
        os.setsid()
        for descriptor, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        self.prepare()
        signals.install()
        sys.exit(run(*self.argv, tool=self.tool))

    @property
    def printed(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        for file in self.files:
            file.seek(0)
        return tuple(file.read() for file in self.files)

    def ended(self) -> tuple[int, str, str]:
        """The exit code and what was printed, once it has ended."""
        self.join(120)
        if self.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(*self.printed)
        return self.exitcode, *self.printed


def wait_for(condition, limit: float = 120) -> None:
    """Wait until condition() is true; an error after `limit` seconds."""
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def error_line(capsys, *flags, code: int = 2, tool=main.command) -> str:
    """The error line, the only one, of a command that must end with this exit code."""
    capsys.readouterr()
    assert run(*flags, tool=tool) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def last_state(name: str) -> dict:
    """Everything that a run's last.pt contains, except where the data are."""
    state = checkpoint.load(Path("checkpoints", name, "last.pt"))
    del state["data_root"]
    return state


def evaluations(name: str) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    lines = Path("checkpoints", name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(folder: str | Path, tag: str = "loss/gen_S") -> list[tuple[int, float]]:
    """The steps and values of a curve, as TensorBoard shows it."""
    scalars = EventAccumulator(str(folder)).Reload().Scalars(tag)
    return [(scalar.step, scalar.value) for scalar in scalars]


def split_ids(name: str) -> dict:
    """A run's split.json."""
    return json.loads(Path("checkpoints", name, "split.json").read_text())


def edit_checkpoint(path: Path, change) -> None:
    """Let `change` alter the dict that a checkpoint holds."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def record_steps(monkeypatch, method: str, observe) -> list:
    """A list of what `observe(model, x, y)` returns at the start of each later training step."""
    seen, step = [], METHODS[method].step

    def recorded_step(self, x, y, *x_u):
        seen.append(observe(self, x, y))
        return step(self, x, y, *x_u)

    monkeypatch.setattr(METHODS[method], "step", recorded_step)
    return seen


def interrupt(steps: int, *flags) -> None:
    """Start a training that SIGTERM ends after so many steps."""
    before_step, counter = Run.before_step, itertools.count(1)

    def counted(self):
        if next(counter) == steps:
            stop.signum = signal.SIGTERM
        before_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "before_step", counted)
        assert run("--training", *flags) == 128 + signal.SIGTERM
    stop.signum = 0
