"""tools/benchmark.py: its plain step is the same mathematics, and what it prints is what it measured."""

import json

import pytest
import torch

import main
from data_utils import load_spec
from tools import benchmark
from utils import InputError

CPU = torch.device("cpu")
SMALL = "--dataset acdc --size 16 16 --ngf 4 --ndf 4 --n-blocks 1 --workers 0 --device cpu --disc-norm instance"


@pytest.fixture
def settings():
    return main.parse_args(["--training", *SMALL.split()])


@pytest.mark.parametrize("six_calls", [False, True])
def test_the_plain_step_has_the_same_terms(settings, six_calls):
    spec, losses = load_spec("acdc"), []
    batch = benchmark.random_batch(settings, spec, CPU)
    for method in main.METHODS["cyclegan"], benchmark.PlainCycleGAN:
        model = benchmark.build(method, settings, spec, CPU)
        model.six_calls = six_calls
        losses.append({name: value.item() for name, value in model.step(*batch).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_flops_are_two_a_multiplication_forward_and_backward(settings):
    """Partial alone: a 7x7, two 3x3 of stride 2, a block, two transposed 3x3, a 7x7; 5 images of 16x16, ngf 4."""
    settings.method = "supervised"
    by_layer = [
        16 * 16 * 4 * 1 * 49,  # the image needs no gradient: only its weight's, so twice the forward pass, not thrice
        8 * 8 * 8 * 4 * 9,
        4 * 4 * 16 * 8 * 9,
        2 * 4 * 4 * 16 * 16 * 9,
        4 * 4 * 16 * 8 * 9,  # transposed: a product for each pixel that comes in
        8 * 8 * 8 * 4 * 9,
        16 * 16 * 4 * 4 * 49,
    ]
    expected = 2 * 5 * (3 * sum(by_layer) - by_layer[0])
    assert benchmark.count_flops(settings, load_spec("acdc"), CPU) == expected


def test_options_are_precision_and_switches(settings):
    found = benchmark.with_option(settings, "bf16+channels-last")
    assert (found.precision, found.compile, found.channels_last) == ("bf16", False, True)
    assert not settings.channels_last
    for wrong in "fp16", "bf16+faster":
        with pytest.raises(InputError, match=wrong.replace("+", r"\+")):
            benchmark.with_option(settings, wrong)


def test_a_benchmark_of_all_parts_writes_what_it_prints(capsys, tmp_path):
    file = tmp_path / "b.json"
    options = ["--options", "fp32", "bf16", "--rounds", "2", "--warmup", "1", "--json", str(file)]
    assert main.main([*SMALL.split(), *options], benchmark.benchmark) == 0
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    assert [row["option"] for row in found["steps"]] == ["fp32", "bf16"]
    for row in found["steps"]:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["images_per_s"] == pytest.approx(5 / row["seconds"])
        assert row["tflop_per_s"] == pytest.approx(found["tflop"] / row["seconds"])
        assert row["peak_gib"] > 0.05
        assert f"{row['ratio']:.2f} ({row['ratio_min']:.2f}" in out
    assert found["loader"]["images_per_s"] > 0
    assert found["evaluation"]["images_per_s"] > 0
