"""tools/benchmark.py: its plain step is the same mathematics, and its numbers are what they say."""

import argparse
import gc
import json
import time

import pytest
import torch
from runs import error_line

from engine.flags import parse_args
from model import CycleGAN
from tools import benchmark

SMALL = "--dataset acdc --size 16 16 --ngf 4 --ndf 4 --n-blocks 1 --disc-norm instance"
SMALL = [*SMALL.split(), "--workers", "0", "--device", "cpu"]


def parsed(flags: list[str]):
    return parse_args(["--training", *flags])


def test_the_plain_step_has_the_same_terms():
    losses = []
    for plain in False, True:
        step = benchmark.Step(parsed(SMALL), "fp32", plain)
        step.model.step(*step.batch)
        losses.append({k: v.item() for k, v in step.model.step(*step.batch).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_plain_step_calls_a_generator_for_each_set_of_images():
    step, sizes = benchmark.Step(parsed(SMALL), "fp32", plain=True), []
    for network in step.model.G_IS, step.model.G_SI:
        network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    step.seconds()
    assert sizes == [5] * 6


def test_kernels_are_chosen_as_in_training(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    benchmark.Step(parsed(SMALL), "fp32")
    assert torch.backends.cudnn.benchmark


def test_convolutions_round_to_tf32_in_its_own_steps_only(monkeypatch):
    steps, allowed = [benchmark.Step(parsed(SMALL), option) for option in ("tf32", "fp32")], []
    for step in steps:
        record = lambda *_: allowed.append(torch.backends.cudnn.allow_tf32)  # noqa: E731
        monkeypatch.setattr(step.model, "step", record)
        step.seconds()
    assert allowed == [True, False]


def test_views_and_allocations_do_not_count_and_bytes_are_inputs_and_outputs():
    x = torch.zeros(4)
    with benchmark.OperationCounter() as counter:
        y = torch.empty(2, 2) * 0 + x.view(2, 2)  # a product of 16 to 16, a sum of 32 to 16 bytes
        y.t().relu_()  # 16 to 16 bytes
    assert counter.operations == 3
    assert counter.bytes == 32 + 48 + 32


def test_flops_are_two_per_multiplication_forward_and_backward():
    """Partial: a 7x7, two 3x3 of stride 2, a block, two transposed 3x3, a 7x7; ngf 4."""
    by_layer = [
        16 * 16 * 4 * 1 * 49,  # images need no gradient: twice the forward pass, not three times
        8 * 8 * 8 * 4 * 9,
        4 * 4 * 16 * 8 * 9,
        2 * 4 * 4 * 16 * 16 * 9,
        4 * 4 * 16 * 8 * 9,  # transposed: a product for each input pixel
        8 * 8 * 8 * 4 * 9,
        16 * 16 * 4 * 4 * 49,
    ]
    expected = 2 * 5 * (3 * sum(by_layer) - by_layer[0])
    count = benchmark.Step(parsed([*SMALL, "--method", "supervised"]), "fp32").count()
    assert count["TFLOP"] * 1e12 == pytest.approx(expected)


def test_an_option_is_a_precision_and_compile():
    args = benchmark.Step(parsed(SMALL), "bf16+compile").args
    assert (args.precision, args.compile) == ("bf16", True)


def test_seconds_are_of_one_step(monkeypatch):
    step, calls = benchmark.Step(parsed(SMALL), "fp32"), []
    monkeypatch.setattr(step.model, "step", lambda *_: calls.append(1))
    monkeypatch.setattr(time, "perf_counter", lambda: 7 + 0.02 * len(calls))
    assert step.seconds(5) == pytest.approx(0.02)
    assert len(calls) == 5


def test_steps_take_turns_and_ratios_are_of_medians():
    class Fake:
        def __init__(self, *times: float):
            self.times = list(times)

        def seconds(self, steps: int) -> float:
            order.append(self)
            assert steps == 3
            return self.times.pop(0)

    order, one, two = [], Fake(9, 1, 2, 4), Fake(9, 3, 2, 8)
    ours = argparse.Namespace(warmup=1, rounds=3, steps=3)
    own, other = benchmark.take_turns(ours, one, two)
    assert order == [one, two] * 4
    assert own == {"ms": 2000, "ratio": 1, "low": 1, "high": 1}
    assert other == {"ms": 3000, "ratio": 1.5, "low": 1, "high": 3}


def test_a_table_of_times_is_printed_and_written(capsys, tmp_path):
    flags = "--rounds", "2", "--warmup", "1", "--json", str(tmp_path / "b.json")
    assert benchmark.benchmark([*SMALL, *flags]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    output = capsys.readouterr().out
    assert [row["option"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        plain = row["speedup over plain fp32"]
        assert plain["ms"] == pytest.approx(row["ms"] * plain["ratio"])
        assert row["images/s"] == pytest.approx(5000 / row["ms"])
        assert row["peak GiB"] > 0.05
        cells = f"{row['peak GiB']:.4g} | {row['ms']:.4g} | {row['images/s']:.4g}"
        ratio = f"{plain['ratio']:.2f} ({plain['low']:.2f} to {plain['high']:.2f})"
        assert f"| {row['option']} | {cells} | {ratio} | n/a |\n" in output


def test_each_options_memory_is_without_the_models_of_the_options_before(monkeypatch, capsys):
    alive = []

    def peak(_step) -> float:
        alive.append(sum(isinstance(each, CycleGAN) for each in gc.get_objects()))
        return 0.0

    monkeypatch.setattr(benchmark.Step, "peak", peak)
    gc.collect()
    before = sum(isinstance(each, CycleGAN) for each in gc.get_objects())
    flags = ["--rounds", "0", "--options", *["fp32"] * 3]
    assert benchmark.benchmark([*SMALL, *flags]) == 0
    assert alive == [before + 1] * 3
    assert "\n| option | peak GiB |\n" in capsys.readouterr().out  # without rounds, memory only


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--options fp32 fp16", "--options fp16: expected fp32, tf32 or bf16[+compile]"),
        ("--device tpu9", "--device tpu9: "),
        ("--options bf16+faster", "--options bf16+faster"),
        ("--count --options bf16+compile", "--count"),
    ],
)
def test_wrong_flags_are_an_error_line(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(benchmark, "Step", None)  # before any step
    assert words in error_line(capsys, *SMALL, *flags.split(), tool=benchmark.benchmark)
