"""tools/export.py: the exported network computes what the trained one does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_acdc, make_folder, make_tiny, write_volume
from PIL import Image
from runs import load_with

import main
from data_utils import normalize
from datasets.cache import resize
from datasets.spec import load_spec
from engine import program
from tools import export

SMALL = "--size 20 16 --ngf 4 --ndf 2 --n-blocks 1 --epochs 1 --ratio 0.5"
SMALL = [*SMALL.split(), "--workers", "0", "--device", "cpu"]


def train(*flags: str) -> None:
    assert main.main(["--training", *SMALL, *map(str, flags)]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Networks trained on phantoms, on RGB images in bfloat16 and on NIfTI volumes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        make_tiny(8, 2)
        train("--dataset", "tiny.toml", "--name", "phantom")
        train(
            "--dataset", "tiny.toml", "--name", "average", "--method", "meanteacher", "--lr", "0.01"
        )
        half = "--method", "supervised", "--normalization", "half"
        Path("rgb.toml").write_text('[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n')
        rgb = "--data-root", make_folder(Path("rgb"), 8), "--precision", "bf16"
        train("--dataset", "rgb.toml", "--name", "rgb", *rgb, *half)
        train(
            "--dataset",
            "acdc",
            "--name",
            "nifti",
            "--data-root",
            make_acdc(Path("acdc"), 2, 2),
            *half,
        )
        yield


def run(*words: str) -> int:
    return program.execute(export.export, list(map(str, words)))


def segment(name: str, pixels: torch.Tensor) -> torch.Tensor:
    """The trained network's logits in float32."""
    trained = load_with(["--testing", f"--checkpoint=checkpoints/{name}", "--device=cpu"])
    with torch.no_grad():
        network = trained.model.teacher if name == "average" else trained.model.G_IS
        return network(normalize(pixels, trained.args.normalization))


def batches(channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Noise of four sizes, most with sides that 4 does not divide."""
    torch.manual_seed(0)
    shapes = (
        (1, channels, 20, 16),
        (3, channels, 37, 22),
        (2, channels, 16, 31),
        (1, channels, 18, 40),
    )
    return [torch.randint(20, 200, shape).to(dtype) for shape in shapes]


RUNS = {  # channels, type, classes
    "phantom": (1, "uint8", 4),
    "average": (1, "uint8", 4),
    "rgb": (3, "uint8", 2),
    "nifti": (1, "float32", 4),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_pt2_computes_what_the_trained_network_computes(runs, capsys, name):
    channels, dtype, n_classes = RUNS[name]
    assert run(f"checkpoints/{name}", f"{name}.pt2") == 0
    out = capsys.readouterr().out
    assert f"{dtype:7}  (batch, {channels}, height, width)" in out
    assert f"float32  (batch, {n_classes}, height, width)" in out
    about = {"classes": "", "palette": "", "size": ""}
    network = torch.export.load(f"{name}.pt2", extra_files=about).module()
    for pixels in batches(channels, getattr(torch, dtype)):
        logits = network(pixels)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, segment(name, pixels), atol=1e-5, rtol=0)
    classes = json.loads(about["classes"])
    assert ", ".join(f"{k} {label}" for k, label in enumerate(classes)) in out
    assert tuple(classes) == load_spec("rgb.toml" if name == "rgb" else "acdc").classes
    assert json.loads(about["size"]) == [20, 16]
    assert "resized to 20x16" in out
    assert "logits to the image's size, bilinear, then argmax" in out
    assert json.loads(about["palette"])[:2] == [
        [0, 0, 0],
        [128, 0, 0] if name == "rgb" else [70, 130, 180],
    ]


def test_an_exported_network_makes_the_masks_of_predict_as_the_tool_says(runs):
    assert run("checkpoints/phantom", "masks.pt2") == 0
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 40, 28), np.uint8))
    Image.fromarray(pixels[0].numpy()).save("one.png")
    predict = ["--predict", "one.png", "--checkpoint", "checkpoints/phantom", "--device", "cpu"]
    assert main.main(predict) == 0
    logits = torch.export.load("masks.pt2").module()(resize(pixels, (20, 16))[None])
    mask = torch.nn.functional.interpolate(logits, (40, 28), mode="bilinear").argmax(1)[0]
    assert len(mask.unique()) > 1
    predicted = np.array(Image.open("results/phantom/predict/masks/one.png"))
    assert (predicted == mask.numpy()).mean() > 0.999  # but for rounding


def test_an_onnx_model_computes_what_the_trained_network_computes(runs):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert run("checkpoints/phantom/last.pt", "new/phantom.onnx") == 0
    session = onnxruntime.InferenceSession("new/phantom.onnx", providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == (
        "pixels",
        "tensor(uint8)",
        ["batch", 1, "height", "width"],
    )
    assert (found.name, found.type, found.shape) == (
        "logits",
        "tensor(float)",
        ["batch", 4, "height", "width"],
    )
    for pixels in batches(1, torch.uint8):
        (logits,) = session.run(None, {"pixels": pixels.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), segment("phantom", pixels), atol=1e-4, rtol=0
        )
    about = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["classes"])) == load_spec("phantom").classes
    assert tuple(map(tuple, json.loads(about["palette"]))) == load_spec("phantom").palette


@pytest.fixture
def written_as(monkeypatch):
    """Export a stub that computes what the trained network `name` does, off by `error`."""

    def stub(name: str, error: float) -> None:
        monkeypatch.setattr(export, "serialize", lambda *_: b"a program")
        monkeypatch.setattr(
            export, "load_exported", lambda path: lambda pixels: segment(name, pixels) + error
        )

    return stub


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_file_that_computes_something_else_is_deleted(runs, capsys, written_as, error):
    written_as("phantom", error)
    assert run("checkpoints/phantom", "wrong.pt2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: wrong.pt2: deleted, its logits differ from those of checkpoints/phantom/best.pt by "
    )
    assert not Path("wrong.pt2").exists()


def test_the_type_of_the_pixels_may_be_asked_for(runs, capsys, written_as):
    written_as("phantom", 0)
    assert run("checkpoints/phantom", "float.pt2", "--input", "float32") == 0
    assert "pixels  float32  (batch, 1, height, width)" in capsys.readouterr().out
    assert Path("float.pt2").read_bytes() == b"a program"


def test_the_pixels_of_a_folder_of_volumes_are_floats(runs, capsys, written_as):
    for number in range(8):
        volume = np.random.default_rng(number).integers(0, 2, (20, 24, 2)).astype(np.uint8)
        for folder in "images", "masks":
            write_volume(Path("volumes", folder, f"{number}.nii.gz"), volume)
    train("--dataset", "rgb.toml", "--data-root", "volumes", "--name", "volumes")
    written_as("volumes", 0)
    assert run("checkpoints/volumes", "volumes.pt2") == 0
    assert "pixels  float32  (batch, 3, height, width)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "usual", "other"), [("rgb", "uint8", "float32"), ("nifti", "float32", "uint8")]
)
def test_half_normalization_is_exported_for_the_type_of_training_only(
    runs, capsys, name, usual, other
):
    assert run(f"checkpoints/{name}", "half.pt2", "--input", other) == 2
    expected = f"--input {other}: the network was trained on {usual} images; with --normalization"
    assert expected in capsys.readouterr().err
    assert not Path("half.pt2").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("checkpoints/phantom x.pth", ".pt2 or .onnx"),
        ("checkpoints/none x.pt2", "checkpoints/none: no such file"),
        ("checkpoints x.pt2", "checkpoints/best.pt: no such file"),
        ("tiny.toml x.pt2", "tiny.toml: not a readable checkpoint"),
        ("checkpoints/phantom tiny.toml/x.pt2", "FILE tiny.toml: cannot be written"),
        ("checkpoints/phantom x.pt2 --input int8", "--input"),
        ("checkpoints/phantom x.onnx", "x.onnx needs onnx, onnxscript, onnxruntime: pip install"),
        ("checkpoints/phantom", "FILE"),
    ],
)
def test_a_wrong_command_is_one_error_line_and_writes_nothing(
    runs, capsys, monkeypatch, words, named
):
    monkeypatch.setattr(
        export, "find_spec", lambda name: None
    )  # as if nothing but PyTorch were installed
    assert run(*words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert not list(Path().glob("x.*"))
