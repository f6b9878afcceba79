"""Several processes, started by torchrun, train as one does; they start, stop and fail together."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import chdir
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DistributedDataParallel imports it, which takes seconds
from conftest import error_of, make_folder, make_tiny, same, write_indexed
from runs import Program, curve, error_line, evaluations, interrupt, last_state, wait_for
from torch import distributed as dist
from torch.testing import assert_close

import data_utils
import main
import model
import utils
from arch.discriminators import PixelDiscriminator
from datasets.spec import load_spec
from engine import checkpoint
from engine.flags import parse_args
from engine.logs import Logs
from engine.signals import stop
from model import METHODS
from tools import benchmark, diagnose
from utils import InputError

FLAGS = "--size 32 32 --ngf 4 --ndf 4 --n-blocks 1 --workers 0 --device cpu --batch-size 4"
FLAGS = FLAGS.split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.usefixtures("in_tmp")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_two(*argv, prepare=lambda rank: None, **options) -> tuple[int, str, str]:
    """A command in two processes, as torchrun starts them: exit code and what both print."""
    port = free_port()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def prepare_rank(rank: int) -> None:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        prepare(rank)

    both = [Program(*argv, prepare=partial(prepare_rank, rank), **options) for rank in range(2)]
    codes, out, err = zip(*[program.ended() for program in both], strict=True)
    return max(codes, key=abs), "".join(out), "".join(err)


def train_in_two(*flags: str, **options) -> tuple[int, str, str]:
    return in_two("--training", *FLAGS, *flags, **options)


def make_uneven() -> None:
    """uneven.toml: 16 pictures, 8 of them labeled.

    The masks ignore no pixel, half of them, or most.
    """
    root = make_folder(Path("data/uneven"), 16, n_val=3)
    for number in range(16):
        mask = np.random.default_rng(number).integers(0, 2, (20, 24))
        mask[(3, 10, 20)[number % 3] :] = 255
        write_indexed(root / "masks" / f"picture {number}.png", mask)
    write_indexed(root / "val" / "masks" / "picture 17.png", np.ones((20, 24)))
    table = '[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n'
    Path("uneven.toml").write_text(f"ratio = 0.5\n{table}")


def losses(name: str) -> list[dict]:
    return [line["losses"] | {"miou": line["miou"]} for line in evaluations(name)]


def weights(name: str) -> dict[str, torch.Tensor]:
    """All but the discriminators' first biases.

    Batch norm cancels one whose channel never changes its sign: its gradient is a rounding error.
    """
    state = checkpoint.load(Path("checkpoints", name, "last.pt"))["model"]
    return {key: value for key, value in state.items() if not key.endswith(".layers.0.bias")}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("cyclegan", []),  # with the paper's batch norm
        ("cyclegan", ["--disc-norm", "instance"]),
        *(("cyclegan", [f"--lambda{k}", "0"]) for k in (4, 5)),  # without a discriminator
        ("cyclegan", ["--lambda4", "0", "--lambda5", "0"]),
        ("advsemi", []),  # the mean teacher draws other boxes on each process
    ],
)
def test_two_processes_train_as_one_does(method, more):
    make_uneven()
    flags = ["--dataset", "uneven.toml", "--method", method, "--epochs", "2", *more]
    flags += ["--log-every", "1"]
    assert main.main(["--training", *FLAGS, *flags, "--name", "one"]) == 0
    code, out, err = train_in_two(*flags, "--name", "two")
    assert code == 0, err
    assert out.count("after the last epoch") == 1
    assert "2 processes" in out
    assert "strides" not in err  # DDP warns where it has to copy gradients
    one, two = losses("one"), losses("two")
    assert len(one) == 2
    for left, right in zip(one, two, strict=True):
        # a pixel whose classes are nearly equal may change sides
        assert left.pop("miou") == pytest.approx(right.pop("miou"), abs=2e-3)
        assert left == pytest.approx(right, abs=3e-5)
    assert_close(curve("checkpoints/two"), curve("checkpoints/one"), rtol=0, atol=1e-4)
    start = METHODS[method].from_args(*spec_and_settings(method, *more)).state_dict()
    one, two = (torch.cat([w.flatten() for w in weights(name).values()]) for name in ("one", "two"))
    start = torch.cat([start[key].flatten() for key in weights("one")])
    # Adam enlarges the rounding errors of gradients near 0, so not weight by weight
    assert (one - two).norm() < 0.03 * (one - start).norm()


def gradients(x: torch.Tensor):
    torch.manual_seed(0)
    D = PixelDiscriminator(2, 4).double()
    (D(x) - 1).square().mean().backward()
    return D, [p.grad for p in D.parameters()]


def compare_with_one_process(_argv) -> int:
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone, expected = gradients(x)
    rank = utils.rank()
    dist.init_process_group("gloo")
    values = torch.tensor([1.0, rank])
    assert utils.total(values).tolist() == [2, 1]
    assert values.tolist() == [1, rank]
    assert utils.count_per_process(torch.tensor(2 + 2 * rank)) == 3
    assert utils.max_over_processes(rank, 1 - rank) == [1, 1]
    assert utils.from_first(rank) == 0
    assert utils.from_each(rank) == [0, 1]
    with utils.first_process_first():
        if rank == 0:
            time.sleep(0.5)
            Path("first").touch()
        assert Path("first").exists()
    D, found = gradients(x[rank::2])
    for gradient in found:
        dist.all_reduce(gradient)
    assert_close([gradient / 2 for gradient in found], expected, rtol=1e-9, atol=1e-12)
    assert_close(dict(D.named_buffers()), dict(alone.named_buffers()))
    return 0


def test_two_processes_have_the_values_and_batch_norm_of_one():
    assert in_two(tool=compare_with_one_process) == (0, "", "")


def spec_and_settings(method: str, *more: str):
    flags = ["--training", *FLAGS, "--dataset", "uneven.toml", "--method", method, *more]
    args = parse_args(flags)
    utils.seed_everything(args.seed)
    return load_spec("uneven.toml"), args


def test_a_signal_stops_all_and_one_process_may_go_on():
    flags = "--dataset tiny.toml --epochs 400 --eval-every 400 --save-every 0".split()
    last = Path("checkpoints/tiny_cyclegan_0.2_s0/last.pt")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    command = [*TORCHRUN, main.__file__, "--training", *FLAGS, *flags]
    process = subprocess.Popen(command, **streams)
    while not last.is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert printed.count("SIGTERM: saved") == 1
    state = checkpoint.load(last)
    done = state["progress"]["step"] + 4 * state["epoch"]
    assert len(state["processes"]) == 2
    assert not torch.equal(state["processes"][0]["rng"], state["processes"][1]["rng"])
    steps = []

    def stop_at_once(self, losses, step, lr):
        steps.append(step)
        stop.signum = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logs, "losses", stop_at_once)
        assert main.main(["--training", *FLAGS, *flags, "--log-every", "1"]) == 128 + signal.SIGTERM
    assert steps == [done + 1]


def test_two_processes_resume_with_the_random_numbers_and_pools_of_each():
    flags = "--dataset tiny.toml --epochs 3 --log-every 7 --dropout 0.5 --pool-size 3".split()

    def interrupt(_rank):
        Logs.losses = lambda *_: setattr(stop, "signum", signal.SIGTERM)

    runs = [
        train_in_two(*flags, "--name", "whole"),
        train_in_two(*flags, "--name", "resumed", prepare=interrupt),
        train_in_two(*flags, "--name", "resumed"),
    ]
    assert [code for code, _, _ in runs] == [0, 128 + signal.SIGTERM, 0]
    assert same(last_state("whole"), last_state("resumed"))


def test_a_run_is_not_resumed_or_started_anew_on_another_machine():
    for machine in "ab":
        Path(machine).mkdir()
        with chdir(machine):
            make_tiny(20, 4)
    flags = "--dataset", "tiny.toml", "--method", "supervised", "--epochs", "1", "--name", "one"

    def train(first: str, second: str, expected: int) -> str:
        def prepare(rank: int) -> None:
            os.environ["LOCAL_RANK"] = "0"
            os.chdir((first, second)[rank])

        code, _, err = train_in_two(*flags, prepare=prepare)
        assert code == expected, err
        errors = {line for line in err.splitlines() if line.startswith("error: ")}
        assert len(errors) == (code > 0)
        return "".join(errors)

    train("a", "b", 0)
    host, last = socket.gethostname(), "checkpoints/one/last.pt"
    error = train("b", "a", 2)
    assert f"{host} has the run's {last}, but {host}, where process 0 is, has none; give " in error
    assert list(Path("b/checkpoints").iterdir()) == []
    Path("b", last).parent.mkdir()
    Path("b", last).write_bytes(b"older")
    assert f"{last} differs between {host}, where process 0 is, and {host}" in train("a", "b", 2)
    toml = Path("b/tiny.toml")
    before = toml.read_text()
    toml.write_text(f"eval_every = 2\n{before}")
    assert f"flags or [dataset] differ between {host} and {host}: eval_every" in train("a", "b", 2)
    toml.write_text(before)
    toml.write_text(toml.read_text().replace("[20, 4]", "[19, 4]"))
    assert f"flags or [dataset] differ between {host} and {host}: counts" in train("a", "b", 2)


def test_images_that_differ_between_machines_are_an_error(monkeypatch):
    make_uneven()
    spec, args = spec_and_settings("supervised")
    other = {"val": []}
    monkeypatch.setattr(utils, "from_each", lambda own: [("a", own[1]), ("b", own[1] | other)])
    message = error_of(data_utils.load_data, args, spec)
    assert message == "the split's images differ between a and b: val"


def test_values_that_only_one_process_has_differ(monkeypatch):
    for one, other in ({"x": 1}, {"x": 1, "y": 2}), ({"x": 1, "y": 2}, {"x": 1}):
        monkeypatch.setattr(
            utils, "from_each", lambda _, one=one, other=other: [("a", one), ("b", other)]
        )
        with pytest.raises(InputError, match="flags differ between a and b: y"):
            utils.check_same({}, "flags")


def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_one_line():
    def infinite(rank: int) -> None:
        if rank == 1:
            model.gen_I = lambda fake_x, x: fake_x.sum() * float("inf")

    code, _, err = train_in_two("--dataset", "tiny.toml", prepare=infinite)
    assert code == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "epoch 1, step 1: a loss is not finite (gen_S " in errors[0]
    assert "gen_I " in errors[0]


def test_a_process_that_joins_a_resumed_run_draws_other_numbers():
    flags = ["--dataset", "tiny.toml", "--method", "supervised", "--dropout", "0.5"]
    flags += ["--epochs", "2", "--name", "one"]
    interrupt(1, *FLAGS, *flags)
    code, _, err = train_in_two(*flags)
    assert code == 0, err
    first, second = (process["rng"] for process in last_state("one")["processes"])
    assert not torch.equal(first, second)


def test_an_environment_that_connects_no_processes_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = "--training", "--dataset", "tiny.toml", "--batch-size", "4"
    error = error_line(capsys, *flags)
    assert "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set; unset it, or" in error
    for size in "0", "two":
        monkeypatch.setenv("WORLD_SIZE", size)
        assert f"WORLD_SIZE is {size!r}; unset it" in error_line(capsys, *flags)
    numbers = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "9"}
    for name in numbers:
        for key, value in (numbers | {"MASTER_ADDR": "127.0.0.1", name: "one"}).items():
            monkeypatch.setenv(key, value)
        assert f"{name} is 'one'; unset it, or start with torchrun" in error_line(capsys, *flags)


def test_a_signal_ends_a_process_that_waits_for_others():
    port = free_port()
    waits = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    make_tiny(20, 4)
    flags = "--training", "--dataset", "tiny.toml", *FLAGS
    program = Program(*flags, prepare=partial(os.environ.update, waits))

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(port))) == 0

    wait_for(listens)
    os.kill(program.pid, signal.SIGTERM)
    assert program.ended()[0] == -signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--training --dataset tiny.toml --batch-size 5", "5 cannot be divided among 2 processes"),
        ("--testing", "WORLD_SIZE is 2: this runs in one process; only --training can"),
        ("--predict one.png", "WORLD_SIZE is 2: this runs in one process"),
    ],
)
def test_what_cannot_be_divided_is_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert message in error_line(capsys, *flags.split())


def test_tools_that_compute_refuse_an_environment_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = ["--dataset", "tiny.toml", "--batch-size", "4"]
    for tool in lambda: diagnose.norms(train), lambda: benchmark.benchmark(train):
        with pytest.raises(InputError, match="WORLD_SIZE is 2: this runs in one process"):
            tool()


def test_an_environment_of_several_processes_that_are_not_connected_changes_no_loss(monkeypatch):
    logits, y = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    alone = model.gen_S(logits, y)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torch.equal(model.gen_S(logits, y), alone)
