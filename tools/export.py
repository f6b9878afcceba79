"""Export the trained segmentation network with its normalization, as .pt2 (torch.export) or .onnx.

    python tools/export.py checkpoints/voc_cyclegan_0.2_s0 voc.onnx
    python tools/export.py checkpoints/mine/last.pt mine.pt2 --input float32

Input `pixels` (B, C, H, W) as decoded, uint8 or float32; output `logits` (B, K, H, W) in float32;
any B, and any H, W of 16 or more. Resize images to the training size first, as --predict does:
bilinear, antialiased; of a volume, `volume[:, :, z].T`. Resize the logits to the image's size,
bilinear, before the argmax, as --predict does. Classes, palette and size are stored as
JSON: extra files of a .pt2, metadata of an ONNX model.
"""

import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, to handle signals during them
    from engine import signals

    signals.install()

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import utils
from arch.generators import MIN_SIZE, ResNetGenerator
from data_utils import normalize
from engine import program
from engine.flags import Flags, Parser
from engine.trained import load

REQUIRED = {".pt2": [], ".onnx": ["onnx", "onnxscript", "onnxruntime"]}


class Deployed(nn.Module):
    """Pixels to logits: a ResNetGenerator without branches on the size, which tracing would fix."""

    def __init__(self, network: nn.Module, normalization: str):
        super().__init__()
        self.layers, self.normalization = network.layers, normalization

    def forward(self, pixels: Tensor) -> Tensor:
        below, right = (-side % 4 for side in pixels.shape[-2:])
        x = F.pad(normalize(pixels, self.normalization), (0, right, 0, below), mode="reflect")
        return F.pad(self.layers(x), (0, -right, 0, -below))


def serialize(network: nn.Module, pixels: Tensor, suffix: str, metadata: dict[str, str]) -> bytes:
    """The content of a .pt2 or .onnx file, traced with `pixels` but for any batch and size."""
    height, width = (Dim(name, min=MIN_SIZE, max=16384) for name in ("height", "width"))
    shapes = {0: Dim("batch", max=65536), 2: height, 3: width}
    traced = torch.export.export(network, (pixels,), dynamic_shapes=(shapes,), strict=False)
    if suffix == ".pt2":
        content = io.BytesIO()
        with warnings.catch_warnings():  # about the storage of weights on other devices
            warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
            torch.export.save(traced, content, extra_files=metadata)
        return content.getvalue()
    names = {"input_names": ["pixels"], "output_names": ["logits"]}
    model = torch.onnx.export(traced, dynamo=True, verbose=False, **names).model_proto
    for value in model.graph.input[0], model.graph.output[0]:
        for axis, name in (0, "batch"), (2, "height"), (3, "width"):  # torch's names are formulas
            value.type.tensor_type.shape.dim[axis].dim_param = name
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    return model.SerializeToString()


def load_exported(path: Path) -> Callable[[Tensor], Tensor]:
    """An exported file as a function from pixels to logits."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


@torch.no_grad()
def export(argv: list[str]) -> int:
    """Export, load the file, and compare it with the trained network on noise of two sizes."""
    parser = Parser("export.py", description=(__doc__ or "").partition("\n")[0])
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="a .pt file, or a run's folder (its best.pt)")
    flag("file", metavar="FILE", type=Path, help="the .pt2 or .onnx file to write")
    kinds = "type of the input's pixels; default: that of the training images"
    flag("--input", choices=["uint8", "float32"], help=kinds)
    args = parser.parse_args(argv)
    file = args.file
    if file.suffix not in REQUIRED:
        raise utils.InputError(f"{file}: the name must end in .pt2 or .onnx")
    if missing := ", ".join(name for name in REQUIRED[file.suffix] if not find_spec(name)):
        raise utils.InputError(f"{file} needs {missing}: pip install -r tools/requirements.txt")
    trained = load(Flags({"checkpoint": args.checkpoint, "device": "cpu"}))
    utils.check_output(file, "FILE")
    model, spec, normalization = trained.model, trained.spec, trained.args.normalization
    model.bf16 = False  # the exported network computes in float32
    network = model.evaluated
    if not isinstance(network, ResNetGenerator):
        found = f"its network is a {type(network).__name__}"
        raise utils.InputError(f"{trained.path}: {found}; only a ResNetGenerator can be exported")
    trained_on = trained.image_dtype
    dtype = args.input or trained_on
    if dtype != trained_on and normalization == "half":
        reason = "with --normalization half, floats are scaled to their own range, bytes are not"
        found = f"the network was trained on {trained_on} images"
        raise utils.InputError(f"--input {dtype}: {found}; {reason}")

    def noise(*shape: int) -> Tensor:
        return torch.randint(256, shape).to(getattr(torch, dtype))

    about = {"classes": spec.classes, "palette": spec.palette, "size": trained.args.size}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    sizes = (1, spec.channels, *trained.args.size), (3, spec.channels, 37, 50)
    samples = [noise(*size) for size in sizes]
    expected = [model.segment(normalize(pixels, normalization)) for pixels in samples]
    if not all(logits.isfinite().all() for logits in expected):
        found = "the network's outputs are not finite: its training has diverged"
        raise utils.TrainingError(f"{trained.path}: {found}")
    deployed = Deployed(network.requires_grad_(False), normalization).eval()
    content = serialize(deployed, noise(2, spec.channels, 24, 28), file.suffix, metadata)
    with tempfile.TemporaryDirectory() as folder:  # an earlier FILE stays until this one is checked
        trial = Path(folder, f"trial{file.suffix}")
        utils.write_atomically(trial, content)
        try:
            exported = load_exported(trial)
        except Exception as error:  # such as a version that the installed onnxruntime lacks
            found = f"deleted, not readable ({utils.reason(error)})"
            raise utils.TrainingError(f"{file}: {found}") from error
        for pixels, logits in zip(samples, expected, strict=True):
            difference = ((exported(pixels) - logits).abs().max() / logits.abs().max()).item()
            if not difference < 1e-3:  # also for NaN; another order of summation makes about 1e-6
                message = f"its logits differ from those of {trained.path} by {difference:.2%}"
                raise utils.TrainingError(f"{file}: deleted, {message}")
    utils.write_atomically(file, content)
    print(f"{file}: {trained.path}, epoch {trained.state['epoch']}, {spec.name}")
    print(f"input   pixels  {dtype:7}  (batch, {spec.channels}, height, width), as decoded")
    if dtype == "float32":
        print("        of a volume, the slice volume[:, :, z].T")
    height, width = trained.args.size
    print(f"        resized to {height}x{width}, bilinear and antialiased, as --predict does")
    if dtype == "float32" and normalization == "half":
        print("        scaled to their own range, as 16-bit images and volumes were in training")
    print(f"output  logits  float32  (batch, {len(spec.classes)}, height, width)")
    print("then    resize the logits to the image's size, bilinear; then argmax, as --predict does")
    print("        (argmax first and nearest resizing would differ along the edges)")
    print("classes " + ", ".join(f"{k} {name}" for k, name in enumerate(spec.classes)))
    if (values := spec.mask_values()) != tuple(range(len(values))):
        print(f"values  {', '.join(map(str, values))}: what --predict writes for these classes")
    return 0


if __name__ == "__main__":
    sys.exit(program.execute(export))
