"""Several processes, started by torchrun: they train as one does, and start, stop and fail together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_folder, make_tiny, write_indexed

import data_utils
import main
import utils

FLAGS = "--size 32 32 --ngf 4 --ndf 4 --n-blocks 1 --workers 0 --device cpu --batch-size 4 --disc-norm instance".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.stop, "signum", 0)


def command(*flags: str) -> list[str]:
    return [*TORCHRUN, main.__file__, "--training", *FLAGS, *flags]


def make_uneven() -> None:
    """uneven.toml: 16 pictures, 8 of them labeled; the masks ignore no pixel, half of them, or most."""
    root = make_folder(Path("data/uneven"), 16, n_val=3)
    for number in range(16):
        mask = np.random.default_rng(number).integers(0, 2, (20, 24))
        mask[(3, 10, 20)[number % 3] :] = 255
        write_indexed(root / "masks" / f"picture {number}.png", mask)
    Path("uneven.toml").write_text('ratio = 0.5\n[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n')


def losses(name: str) -> list[dict]:
    lines = Path("checkpoints", name, "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line)["losses"], "miou": json.loads(line)["miou"]} for line in lines]


def weights(name: str) -> dict[str, torch.Tensor]:
    """All that has an effect: instance norm takes out the bias before it, whose gradient is a rounding error."""
    state = utils.load_checkpoint(Path("checkpoints", name, "last.pt"))["model"]
    without_effect = re.compile(r"G_(IS|SI)\.layers\.(?!18).*bias|D_[SI]\.layers\.2\.bias")
    return {key: value for key, value in state.items() if not without_effect.fullmatch(key)}


@pytest.mark.parametrize(("method", "more"), [("cyclegan", ["--lambda5", "0"]), ("advsemi", ["--semi-start", "0"])])
def test_two_processes_train_as_one_does(method, more):
    make_uneven()
    flags = ["--dataset", "uneven.toml", "--method", method, "--epochs", "2", *more]
    assert main.main(["--training", *FLAGS, *flags, "--name", "one"]) == 0
    said = subprocess.run(command(*flags, "--name", "two"), env=ALONE, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("after the last epoch") == 1
    assert "2 processes" in said.stdout
    one, two = losses("one"), losses("two")
    assert len(one) == 2
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    start = main.METHODS[method](*spec_and_settings(method, *more)).state_dict()
    one, two = weights("one"), weights("two")
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-4
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=0)


def spec_and_settings(method: str, *more: str):
    args = main.parse_args(["--training", *FLAGS, "--dataset", "uneven.toml", "--method", method, *more])
    utils.seed_everything(args.seed)
    return data_utils.load_spec("uneven.toml"), args


def test_a_signal_stops_all_and_one_process_may_go_on():
    make_tiny(20, 4)
    flags = ["--dataset", "tiny.toml", "--epochs", "400", "--eval-every", "400", "--save-every", "0"]
    last = Path("checkpoints/tiny_cyclegan_0.2_s0/last.pt")
    process = subprocess.Popen(command(*flags), env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not last.is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.count("SIGTERM: saved") == 1
    state = utils.load_checkpoint(last)
    done = state["progress"]["step"] + 4 * state["epoch"]
    assert len(state["processes"]) == 2
    assert not torch.equal(state["processes"][0]["rng"], state["processes"][1]["rng"])
    steps = []

    def stop_at_once(self, losses, bar):
        steps.append(self.global_step)
        main.stop.signum = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.Run, "log", stop_at_once)
        assert main.main(["--training", *FLAGS, *flags, "--log-every", "1"]) == 128 + signal.SIGTERM
    assert steps == [done + 1]


def test_every_image_of_a_batch_goes_to_one_process(monkeypatch):
    seen = []
    numbers = torch.utils.data.TensorDataset(torch.arange(12), torch.arange(12))
    monkeypatch.setattr(data_utils, "batches", lambda data, size, *_: [[data[i][0].item() for i in range(len(data))]])
    run = SimpleNamespace(args=main.parse_args(["--training", *FLAGS]), device=torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        seen.append(main.Run.batches(run, numbers)[0])
    for first in 0, 4, 8:
        batch = [n for mine in seen for n in mine[first // 2 : first // 2 + 2]]
        assert sorted(batch) == list(range(first, first + 4))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--training", *FLAGS, "--batch-size", "5"], "--batch-size 5 cannot be divided among 2 processes"),
        (["--testing"], "--testing and --predict run in one process"),
    ],
)
def test_what_cannot_be_divided_is_refused(monkeypatch, capsys, flags, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(flags) == 2
    assert said in capsys.readouterr().err


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    heard = main.Stop()
    heard.can_wait = True
    exits = []
    monkeypatch.setattr(main.os, "_exit", exits.append)
    heard(signal.SIGINT, None)
    heard(signal.SIGINT, None)
    assert (heard.signum, exits) == (signal.SIGINT, [])
    heard.heard_at -= 2
    heard(signal.SIGINT, None)
    assert exits == [130]
