"""tools/export.py: the exported network computes what the trained one does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, make_tiny, write_volume
from runs import error_line, load_with, run

from data_utils import normalize
from datasets.spec import load_spec
from tools import export

SMALL = "--size 20 16 --ngf 4 --ndf 2 --n-blocks 1 --epochs 1 --ratio 0.5"
SMALL = [*SMALL.split(), "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Networks trained on phantoms, on RGB images in bfloat16 and on NIfTI volumes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        make_tiny(8, 2)
        Path("rgb.toml").write_text('[dataset]\nlayout = "folder"\nclasses = ["dark", "bright"]\n')
        make_folder(Path("data/rgb"), 8)
        for number in range(8):
            volume = np.random.default_rng(number).integers(0, 2, (20, 24, 2)).astype(np.uint8)
            for folder in "images", "masks":
                write_volume(Path("volumes", folder, f"{number}.nii.gz"), volume)
        half = "--dataset rgb.toml --method supervised --normalization half"
        for flags in (
            "--dataset tiny.toml --name phantom",
            "--dataset tiny.toml --name average --method meanteacher --lr 0.01",
            f"{half} --name rgb --precision bf16",
            f"{half} --name volumes --data-root volumes",
        ):
            assert run("--training", *SMALL, *flags.split()) == 0
        yield


def exported(words: str) -> int:
    return run(*words.split(), tool=export.export)


def segment(name: str, pixels: torch.Tensor) -> torch.Tensor:
    """The trained network's logits in float32."""
    trained = load_with(["--testing", f"--checkpoint=checkpoints/{name}", "--device=cpu"])
    with torch.no_grad():
        network = trained.model.teacher if name == "average" else trained.model.G_IS
        return network(normalize(pixels, trained.args.normalization))


def batches(channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Noise of four sizes, most with sides that 4 does not divide."""
    torch.manual_seed(0)
    sizes = (1, 20, 16), (3, 37, 22), (2, 16, 31), (1, 18, 40)
    return [torch.randint(20, 200, (b, channels, h, w)).to(dtype) for b, h, w in sizes]


@pytest.mark.parametrize(
    ("name", "flags", "channels", "dtype", "dataset"),
    [
        ("average", "--input float32", 1, "float32", "tiny.toml"),
        ("rgb", "", 3, "uint8", "rgb.toml"),
        ("volumes", "", 3, "float32", "rgb.toml"),
    ],
)
def test_a_pt2_computes_what_the_trained_network_computes(
    runs, capsys, recwarn, name, flags, channels, dtype, dataset
):
    assert exported(f"checkpoints/{name} {name}.pt2 {flags}") == 0
    assert not list(recwarn)
    out, spec = capsys.readouterr().out, load_spec(dataset)
    assert f"{dtype:7}  (batch, {channels}, height, width)" in out
    assert f"float32  (batch, {len(spec.classes)}, height, width)" in out
    about = dict.fromkeys(["classes", "palette", "size"], "")
    network = torch.export.load(f"{name}.pt2", extra_files=about).module()
    for pixels in batches(channels, getattr(torch, dtype)):
        logits = network(pixels)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, segment(name, pixels), atol=1e-5, rtol=0)
    assert ", ".join(f"{k} {label}" for k, label in enumerate(spec.classes)) in out
    assert "resized to 20x16" in out
    assert ("volume[:, :, z].T" in out) == (dtype == "float32")
    expected = {"classes": spec.classes, "palette": spec.palette, "size": [20, 16]}
    assert about == {key: json.dumps(value) for key, value in expected.items()}


def test_an_onnx_model_computes_what_the_trained_network_computes(runs):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert exported("checkpoints/phantom/last.pt new/phantom.onnx") == 0
    session = onnxruntime.InferenceSession("new/phantom.onnx", providers=["CPUExecutionProvider"])
    ends = [(end.name, end.type, end.shape) for end in session.get_inputs() + session.get_outputs()]
    assert ends == [
        ("pixels", "tensor(uint8)", ["batch", 1, "height", "width"]),
        ("logits", "tensor(float)", ["batch", 4, "height", "width"]),
    ]
    for pixels in batches(1, torch.uint8):
        logits = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        torch.testing.assert_close(logits, segment("phantom", pixels), atol=1e-4, rtol=0)
    about, spec = session.get_modelmeta().custom_metadata_map, load_spec("phantom")
    assert json.loads(about["classes"]) == [*spec.classes]
    assert json.loads(about["palette"]) == [*map(list, spec.palette)]


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_file_that_computes_something_else_is_deleted(runs, capsys, monkeypatch, error):
    monkeypatch.setattr(export, "serialize", lambda *_: b"a program")
    monkeypatch.setattr(
        export, "load_exported", lambda _: lambda pixels: segment("phantom", pixels) + error
    )
    line = error_line(capsys, "checkpoints/phantom", "wrong.pt2", code=1, tool=export.export)
    reason = "deleted, its logits differ from those of checkpoints/phantom/best.pt by "
    assert line.startswith(f"error: wrong.pt2: {reason}")
    assert not Path("wrong.pt2").exists()


def test_a_file_that_cannot_be_read_again_is_deleted(runs, capsys, monkeypatch):
    def unreadable(_path):
        raise RuntimeError("opset 99 is unknown")

    monkeypatch.setattr(export, "serialize", lambda *_: b"a program")
    monkeypatch.setattr(export, "load_exported", unreadable)
    line = error_line(capsys, "checkpoints/phantom", "wrong.pt2", code=1, tool=export.export)
    assert line == "error: wrong.pt2: deleted, not readable (opset 99 is unknown)"
    assert not Path("wrong.pt2").exists()


def test_an_earlier_export_stays_when_a_later_one_fails(runs, capsys, monkeypatch):
    Path("good.pt2").write_bytes(b"checked before")
    monkeypatch.setattr(export, "load_exported", lambda _: lambda pixels: pixels[:, :1] + 0.5)
    error_line(capsys, "checkpoints/phantom", "good.pt2", code=1, tool=export.export)
    assert Path("good.pt2").read_bytes() == b"checked before"


def test_another_network_is_refused_in_one_line(runs, capsys, monkeypatch):
    monkeypatch.setattr(export, "ResNetGenerator", torch.nn.Linear)
    error = error_line(capsys, "checkpoints/phantom", "x.pt2", tool=export.export)
    assert error.endswith("only a ResNetGenerator can be exported")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("checkpoints/phantom x.pth", ".pt2 or .onnx"),
        ("checkpoints/phantom x.onnx", "x.onnx needs onnx, onnxscript, onnxruntime: pip install"),
        # their normalization, half, is another one for another type
        ("checkpoints/volumes x.pt2 --input uint8", "the network was trained on float32 images; "),
    ],
)
def test_a_wrong_command_is_one_error_line_and_writes_nothing(
    runs, capsys, monkeypatch, words, named
):
    monkeypatch.setattr(export, "find_spec", lambda _: None)  # nothing but PyTorch is installed
    assert named in error_line(capsys, *words.split(), tool=export.export)
    assert not list(Path().glob("x.*"))
