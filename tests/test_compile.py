"""Compiled steps on a CPU equal eager ones, also with a mask of one class (minutes, so slow)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils
from datasets.spec import load_spec
from engine.flags import parse_args
from model import METHODS

SPEC = load_spec("phantom")
TINY = "--training --dataset voc --size 16 16 --ngf 4 --ndf 4 --n-blocks 0 --device cpu".split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
]


def batch():
    random = torch.Generator().manual_seed(1)
    x, x_u = 2 * torch.rand(2, 2, 1, 16, 16, generator=random) - 1
    y = torch.randint(4, (2, 16, 16), generator=random)
    y[0] = 2  # one class: every plane of G_SI is constant
    return x, y, x_u


def losses_and_weights(flags, compiled):
    torch.manual_seed(0)
    args = parse_args([*TINY, *flags])
    model = METHODS[args.method].from_args(SPEC, args).train()
    if compiled:
        utils.compile_networks(model)
    model.progress = 1.0
    losses = [model.step(*batch()) for _ in range(2)]
    return losses, model.state_dict()


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize(
    "method",
    ["supervised", "cyclegan --disc-norm instance", "advsemi", "meanteacher"],
)
def test_a_compiled_step_is_finite_and_equals_an_eager_one_to_rounding(method, precision, rounding):
    flags = ["--precision", precision, "--method", *method.split()]
    eager, _ = losses_and_weights(flags, compiled=False)
    compiled, weights = losses_and_weights(flags, compiled=True)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.isfinite()
            torch.testing.assert_close(value, theirs[name], rtol=rounding, atol=rounding)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_missing_compiler_is_one_line(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    flags = [*TINY, "--compile", "--method", "supervised", "--dataset", "phantom"]
    program = [sys.executable, Path(utils.__file__).with_name("main.py"), *flags]
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    ended = subprocess.run(program, cwd=tmp_path, env=environment, **pipes)
    expected = "error: --compile: found no C++ compiler; install g++, or train without --compile\n"
    assert (ended.returncode, ended.stderr) == (1, expected)
