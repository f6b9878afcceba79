"""Processes that decode and load images: nothing waits forever, whatever fails; none is left."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from conftest import write_volume
from runs import SIMPLE, SUPERVISED, TINY, Program, last_state, wait_for
from torch.utils.data import DataLoader

import main
from data_utils import Batches, Pairs, Stored
from datasets import workers
from datasets.cache import Decoder
from engine.program import failure
from engine.signals import SIGNALS
from tools.figures import figures

FLAGS = ["--training", *SUPERVISED, "--workers", "2"]


pytestmark = pytest.mark.usefixtures("in_tmp")


def processes(session: int) -> list[str]:
    """The processes of a session that are not zombies."""
    listed = subprocess.run(["ps", "-eo", "sess=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [args for sess, stat, args in rows if sess == str(session) and stat[0] != "Z"]


def test_no_descriptor_is_needed_per_slice():
    for number in range(2):
        mask = np.zeros((12, 10, 300), np.uint8)
        mask[3 + number : 8, 2:6] = 1
        write_volume(Path(f"deep/images/{number}.nii.gz"), mask * np.float32(90))
        write_volume(Path(f"deep/masks/{number}.nii.gz"), mask)
    table = '[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\nchannels = 1\n'
    Path("deep.toml").write_text(table)
    flags = [*FLAGS, "--dataset", "deep.toml", "--data-root", "deep", "--batch-size", "60"]
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    code, out, err = Program(*flags, prepare=limit).ended()
    assert code == 0, err
    assert "after the last epoch" in out


@pytest.mark.parametrize(("size", "expected"), [("256k", 0), ("4k", 1)])
def test_batches_need_no_shared_memory(size, expected):
    """Of /dev/shm only the semaphores of the queues."""

    def mount():
        new_namespace = 0x00020000  # CLONE_NEWNS: what follows is mounted for this process alone
        if ctypes.CDLL(None).unshare(new_namespace):
            os._exit(77)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True
        )

    program = Program(*FLAGS, "--size", "256", "256", prepare=mount)
    code, _, err = program.ended()
    if code == 77:
        pytest.skip("needs the right to mount /dev/shm")
    assert code == expected, err
    assert not processes(program.pid)
    if code:
        reason = "cannot start processes that load images (No space left on device)"
        assert err == f"error: --workers 2: {reason}; try --workers 0\n"


def fail(error: Exception):
    """A function that raises an error."""

    def raising():
        raise error

    return raising


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CASES = {  # the class, its method and what it does first
    "defect in training": (Pairs, "__getitem__", fail(KeyError("a bug"))),
    "defect in evaluation": (Stored, "__getitem__", fail(KeyError("a bug"))),
    "defect in decoding": (Decoder, "__getitem__", fail(KeyError("a bug"))),
    "defect in the program": (Batches, "_on_device", fail(KeyError("a bug"))),
    "memory in training": (Pairs, "__getitem__", fail(MemoryError())),
    "memory in decoding": (Decoder, "__getitem__", fail(MemoryError())),
    "disk in training": (Pairs, "__getitem__", fail(OSError(5, "Input/output error"))),
    "kill in training": (Pairs, "__getitem__", kill),
    "kill in evaluation": (Stored, "__getitem__", kill),
    "kill in decoding": (Decoder, "__getitem__", kill),
    "hang in training": (Pairs, "__getitem__", lambda: time.sleep(200)),
    "hang in decoding": (Decoder, "__getitem__", lambda: time.sleep(200)),
    "cannot be sent": (Pairs, "__getitem__", lambda: setattr(ForkingPickler, "dumps", None)),
}


def do_first(owner: type, name: str, action) -> None:
    """Let a method call `action` before it does what it did."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args: (action(), method(*args))[1])


@pytest.mark.parametrize("case", CASES)
def test_a_failure_in_a_worker_ends_the_program(case):
    def prepare():
        do_first(*CASES[case])
        if case.startswith("hang"):
            workers.LONGEST = 5

    program = Program(*FLAGS, prepare=prepare)
    code, _, err = program.ended()
    assert not processes(program.pid)
    assert code == 1
    if "defect" in case:
        assert err.strip().endswith("KeyError: 'a bug'")
        return
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    kind = case.partition(" in ")[0]
    reasons = {"memory": "out of memory", "disk": "Input/output error"}
    reasons["hang"] = "loading a batch of images timed out after 5 seconds"
    assert reasons.get(kind, "a process that loads images ended") in err


def test_a_worker_that_is_killed_while_others_start_is_named_as_one_that_ended(monkeypatch):
    killed = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
    monkeypatch.setattr(DataLoader, "__iter__", lambda _: fail(killed)())
    with pytest.raises(RuntimeError) as caught:
        next(workers.loaded(workers.image_loader([1], 2)))
    assert "a process that loads images ended: DataLoader worker (pid 5)" in failure(caught.value)


def test_workers_end_when_the_main_process_is_killed():
    program = Program("--training", *TINY, "--workers", "2", "--epochs", "9999")
    wait_for(lambda: "epoch 1/" in program.printed[0])
    assert len(processes(program.pid)) == 5  # also the two of the evaluations
    program.kill()
    program.join()
    wait_for(lambda: not processes(program.pid), limit=4)


RUNS = {  # programs that fill a cache first
    "training": (main.command, [*FLAGS, "--name", "new"]),
    "testing": (main.command, ["--testing", "--workers", "1"]),
    "tool": (figures, ["rows", SIMPLE, "--out", "rows.png"]),
}


@pytest.mark.parametrize(("name", "signum"), [*zip(RUNS, SIGNALS, strict=True)])
def test_a_signal_while_decoding_ends_all_processes_with_one_line(trained, name, signum):
    def prepare():
        do_first(Decoder, "__getitem__", lambda: time.sleep(0.2))

    shutil.rmtree("data/cache")
    tool, flags = RUNS[name]
    program = Program(*flags, tool=tool, prepare=prepare)
    wait_for(lambda: list(Path("data").glob("cache/.*")) or not program.is_alive())
    assert program.is_alive(), program.printed
    time.sleep(0.01 * signum)  # before, while and after the processes start
    os.killpg(program.pid, signum)
    message = f"{signal.Signals(signum).name}: stopped; there was nothing to save\n"
    assert program.ended() == (128 + signum, message, "")
    assert not processes(program.pid)
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
    command = ["sh", "-c", script, "sh", sys.executable, main.__file__, *FLAGS]
    subprocess.run(command, check=True, timeout=120)
    assert last_state(SIMPLE.name)["progress"]["evaluated"] == 1
