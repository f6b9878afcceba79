"""Processes that decode and load images: nothing waits forever, whatever fails; none is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny, write_volume
from runs import SIMPLE, SUPERVISED, TINY, last_state

import main
from datasets import workers
from engine.signals import SIGNALS

ROOT = Path(main.__file__).parent
FLAGS = ["--training", *SUPERVISED, "--workers", "2"]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LIMIT = 120  # seconds, on a busy machine


pytestmark = pytest.mark.usefixtures("in_tmp")


def start(*command) -> subprocess.Popen:
    """A program in its own session."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, env=ENV, **streams)


def processes(session: int) -> list[str]:
    """The processes of a session that are not zombies."""
    listed = subprocess.run(["ps", "-eo", "sess=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [args for sess, stat, args in rows if sess == str(session) and stat[0] != "Z"]


def wait_for(condition, limit: float = LIMIT) -> None:
    """Wait until condition() is true; an error after the limit."""
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_no_descriptor_is_needed_per_slice():
    for number in range(2):
        mask = np.zeros((12, 10, 300), np.uint8)
        mask[3 + number : 8, 2:6] = 1
        write_volume(Path(f"deep/images/{number}.nii.gz"), mask * np.float32(90))
        write_volume(Path(f"deep/masks/{number}.nii.gz"), mask)
    table = '[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\nchannels = 1\n'
    Path("deep.toml").write_text(table)
    flags = [*FLAGS, "--dataset", "deep.toml", "--data-root", "deep", "--batch-size", "60"]
    script = 'ulimit -n 64; exec "$@"'
    program = start("sh", "-c", script, "sh", sys.executable, ROOT / "main.py", *flags)
    out, err = program.communicate(timeout=LIMIT)
    assert program.returncode == 0, err
    assert "after the last epoch" in out


@pytest.mark.parametrize(("size", "code"), [("256k", 0), ("4k", 1)])
def test_batches_need_no_shared_memory(size, code):
    """Of /dev/shm only the semaphores of the queues."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount /dev/shm")
    command = [sys.executable, ROOT / "main.py", *FLAGS, "--size", "256", "256"]
    script = f'{mount}; exec "$@"'
    program = start("unshare", "-m", "sh", "-c", script, "sh", *command)
    _, err = program.communicate(timeout=LIMIT)
    assert program.returncode == code, err
    assert not processes(program.pid)
    if code:
        expected = "--workers 2: cannot start processes that load images (No space left on device)"
        assert err == f"error: {expected}; try --workers 0\n"


# Each case in a fork of one process, to import torch once. {case: (class, method, what it does)}
CASES = {
    "defect in training": ("Pairs", "__getitem__", "{}['a bug']"),
    "defect in evaluation": ("Stored", "__getitem__", "{}['a bug']"),
    "defect in decoding": ("Decoder", "__getitem__", "{}['a bug']"),
    "defect in the program": ("Batches", "_on_device", "{}['a bug']"),
    "memory in training": ("Pairs", "__getitem__", "raise_(MemoryError())"),
    "memory in decoding": ("Decoder", "__getitem__", "raise_(MemoryError())"),
    "disk in training": ("Pairs", "__getitem__", "raise_(OSError(5, 'Input/output error'))"),
    "kill in training": ("Pairs", "__getitem__", "os.kill(os.getpid(), 9)"),
    "kill in evaluation": ("Stored", "__getitem__", "os.kill(os.getpid(), 9)"),
    "kill in decoding": ("Decoder", "__getitem__", "os.kill(os.getpid(), 9)"),
    "hang in training": ("Pairs", "__getitem__", "time.sleep(200)"),
    "hang in decoding": ("Decoder", "__getitem__", "time.sleep(200)"),
    "cannot be sent": ("Pairs", "__getitem__", "setattr(Reduce, 'dumps', None)"),
}
SCRIPT = """
import json, os, subprocess, sys, time
import data_utils, datasets.cache, datasets.workers, main
from multiprocessing.reduction import ForkingPickler as Reduce

datasets.workers.LONGEST = 20

def raise_(error):
    raise error

def run(case, owner, name, action):
    os.setsid()
    os.mkdir(case)
    for stream, number in ("out", 1), ("err", 2):
        os.dup2(os.open(os.path.join(case, stream), os.O_WRONLY | os.O_CREAT), number)
    owner = getattr(datasets.cache if owner == "Decoder" else data_utils, owner)
    method = getattr(owner, name)
    setattr(owner, name, lambda *args: (eval(action), method(*args))[1])
    sys.exit(main.main([*sys.argv[2:], "--checkpoints", case, "--cache", f"{case}/cache"]))

children = {}
for case, about in json.loads(sys.argv[1]).items():
    if (pid := os.fork()) == 0:
        run(case, *about)
    children[pid] = case
started = time.monotonic()
while children and time.monotonic() < started + 100:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        print(json.dumps([children.pop(pid), pid, os.waitstatus_to_exitcode(status)]), flush=True)
    time.sleep(0.05)
for pid in children:
    os.killpg(pid, 9)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The exit code of each case and what it wrote to stderr."""
    home = tmp_path_factory.mktemp("cases")
    with chdir(home):
        make_tiny(20, 4)
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES), *FLAGS]
    done = subprocess.run(command, cwd=home, env=ENV, capture_output=True, text=True)
    results = {}
    for case, pid, code in map(json.loads, done.stdout.splitlines()):
        assert not processes(pid), case
        results[case] = code, (home / case / "err").read_text()
    return results


@pytest.mark.parametrize("case", CASES)
def test_a_failure_in_a_worker_ends_the_program(ended, case):
    assert case in ended, "it hangs"
    code, err = ended[case]
    assert code == 1
    if "defect" in case:
        assert err.strip().endswith("KeyError: 'a bug'")
        return
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    kind = case.partition(" in ")[0]
    reasons = {"memory": "out of memory", "disk": "Input/output error"}
    reasons["hang"] = "loading a batch of images timed out after 20 seconds"
    assert reasons.get(kind, "a process that loads images ended") in err


def test_workers_end_when_the_main_process_is_killed():
    flags = ["--training", *TINY, "--workers", "2", "--epochs", "9999"]
    program = start(sys.executable, ROOT / "main.py", *flags)
    for line in program.stdout:
        if line.startswith("epoch 1/"):
            break
    assert len(processes(program.pid)) == 5  # also the two of the evaluations
    program.kill()
    wait_for(lambda: not processes(program.pid), limit=4)
    program.communicate()


SLOW = """
import sys, time
from datasets.cache import Decoder
item = Decoder.__getitem__
Decoder.__getitem__ = lambda *args: (time.sleep(0.2), item(*args))[1]
{run}
"""
RUNS = {  # of programs that fill a cache first
    "training": ("import main; sys.exit(main.main())", [*FLAGS, "--name", "new"]),
    "testing": ("import main; sys.exit(main.main())", ["--testing", "--workers", "1"]),
    "tool": (
        "from tools.figures import figures; from engine import program; "
        "sys.exit(program.execute(figures))",
        ["rows", SIMPLE, "--out", "rows.png"],
    ),
}


@pytest.mark.parametrize(("program", "signum"), [*zip(RUNS, SIGNALS, strict=True)])
def test_a_signal_while_decoding_ends_all_processes_with_one_line(trained, program, signum):
    line, flags = RUNS[program]
    script = SLOW.format(run=f"from engine import signals; signals.install(); {line}")
    shutil.rmtree("data/cache")
    process = start(sys.executable, "-c", script, *flags)
    wait_for(lambda: list(Path("data").glob("cache/.*")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    time.sleep(0.01 * signum)  # before, while and after the processes start
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (128 + signum, "")
    assert out == f"{signal.Signals(signum).name}: stopped; there was nothing to save\n"
    assert not processes(process.pid)
    assert list(Path("data/cache").iterdir()) == []


def test_no_signal_ends_the_start_of_workers_halfway():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda n, _: heard.append(n))
    thread, end = threading.Thread(target=lambda: end.wait(60)), threading.Event()
    thread.start()
    try:
        with workers.signals_held():
            signal.pthread_kill(thread.ident, signal.SIGTERM)  # any thread of the process gets it
            child = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
            blocked = subprocess.check_output([sys.executable, "-c", child], text=True)
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        end.set()
        signal.signal(signal.SIGTERM, before)
    assert all(signal.Signals(n).name in blocked for n in SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_closed_standard_streams_do_no_harm():
    script = 'exec "$@" 0<&- 1>&- 2>&-'
    program = start("sh", "-c", script, "sh", sys.executable, ROOT / "main.py", *FLAGS)
    assert program.communicate(timeout=LIMIT) == ("", "")
    assert program.returncode == 0
    assert last_state(SIMPLE.name)["progress"]["evaluated"] == 1
