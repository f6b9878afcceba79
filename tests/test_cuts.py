"""A run interrupted at any moment, by SIGTERM or kill -9, ends as if it had not been."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_tiny, same

import main
from engine import checkpoint

CUTS = 20
FLAGS = "--dataset tiny.toml --size 16 16 --ngf 4 --ndf 4 --n-blocks 2 --device cpu --ratio 0.3"
FLAGS += " --epochs 12 --lr 0.01 --dropout 0.5 --pool-size 7 --workers 1 --save-every 0.002"
FLAGS += " --eval-every 2"


def command(name: str) -> list[str]:
    places = ["--name", name, "--cache", f"cache_{name}"]
    return [sys.executable, main.__file__, "--training", *FLAGS.split(), *places]


def finish(name: str) -> float:
    """Run to the end; return the seconds it took."""
    started = time.monotonic()
    ended = subprocess.run(command(name), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return time.monotonic() - started


def cut(name: str, seconds: float, signum: int) -> str:
    """Start a run and stop it after so many seconds; return what it was doing then."""
    process = subprocess.Popen(
        command(name),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.kill(process.pid, signum)
    out, err = process.communicate(timeout=60)
    last, cache = Path("checkpoints", name, "last.pt"), Path(f"cache_{name}")
    if process.returncode == 0:
        return "already done"
    if signum == signal.SIGTERM:
        assert "Traceback" not in err  # after kill -9, a reading process may miss its parent
        # the second code: before Python itself had started
        assert process.returncode in (128 + signum, -signum)
        assert "SIGTERM" in out or process.returncode == -signum or not out
    if last.is_file():
        epoch = checkpoint.load(last)["progress"]["epoch"]  # whole, whatever happened
        return f"in epoch {epoch + 1}"
    cached = any(cache.glob("tiny*"))
    return "at the start of training" if cached else "before the images were read"


def state(name: str) -> list:
    """Everything that a finished run's checkpoints contain."""
    files = "last.pt", "best.pt"
    return [checkpoint.load(Path("checkpoints", name, file)) for file in files]


@pytest.mark.slow
def test_twenty_cuts_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny(60, 12)
    finish("whole")
    seconds = finish("again")
    assert same(state("whole"), state("again"))
    moments, lost, cuts = random.Random(0), [], 0
    for number in itertools.count():
        if cuts == CUTS:
            break
        name, signum = f"cut{number}", (signal.SIGTERM, signal.SIGKILL)[cuts % 2]
        moment = moments.uniform(0.05, 0.95) * seconds
        doing = cut(name, moment, signum)
        if doing == "already done":  # too late: no cut
            seconds *= 0.9
            continue
        cuts += 1
        finish(name)
        logs = [Path("checkpoints", each, "metrics.jsonl").read_text() for each in ("whole", name)]
        ok = same(state("whole"), state(name)) and logs[0] == logs[1]
        folder = Path("checkpoints", name)
        leftovers = [*folder.glob(".*"), *folder.glob("lock"), *Path(f"cache_{name}").glob(".*")]
        ok = ok and not leftovers
        lost += [] if ok else [name]
        when = f"{signal.Signals(signum).name} after {moment:.1f} of {seconds:.1f} s"
        print(f"\n{when}, {doing}: {'same bits' if ok else 'LOST'}", end="", flush=True)
    print(f"\n{CUTS - len(lost)} of {CUTS} cuts lost nothing")
    assert not lost
