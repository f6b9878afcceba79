"""Write G_IS alone for deployment: a torch.export program (.pt2) or an ONNX model (.onnx), normalization inside.

    python tools/export.py checkpoints/voc_cyclegan_0.2_s0 voc.onnx
    python tools/export.py checkpoints/mine/last.pt mine.pt2 --input float32

Input `pixels` (B, C, H, W), output `logits` (B, K, H, W) in float32, for any batch and any H, W of 16 or more; the
network was trained at its run's --size, to which a picture is resized before. Pixels are values as decoded: uint8 for
8-bit pictures, float32 for NIfTI volumes and deeper pictures. Their type is fixed in the file, since --normalization
half treats the two differently; the default is float32 for ACDC's volumes, else uint8. Classes and palette go into
the file as JSON: extra files of the .pt2, metadata of the ONNX model.
"""

import io
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

import main
import utils
from arch.generators import MIN_SIZE, ResNetGenerator
from data_utils import normalize
from model import in_use
from utils import InputError, TrainingError

TOLERANCE = 1e-3  # of the largest logit; another order of float sums makes about 1e-6


class Deployed(nn.Module):
    """Pixels to logits: what ResNetGenerator.forward does, without the branches on the sides that a trace would fix."""

    def __init__(self, G_IS: ResNetGenerator, normalization: str):
        super().__init__()
        self.layers, self.normalization = G_IS.layers, normalization

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        below, right = -height % 4, -width % 4
        x = F.pad(normalize(pixels, self.normalization), (0, right, 0, below), mode="reflect")
        return F.pad(self.layers(x), (0, -right, 0, -below))  # crops; a slice would demand sides that 4 divides


def random_pixels(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Noise in the range of 8-bit pictures, or of magnetic resonance images."""
    return torch.randint(256 if dtype == torch.uint8 else 4096, (batch, channels, height, width)).to(dtype)


def trace(network: nn.Module, channels: int, dtype: torch.dtype) -> ExportedProgram:
    """The network as a program whose batch, height and width are free."""
    side = {name: Dim(name, min=MIN_SIZE, max=16384) for name in ("height", "width")}
    free = {0: Dim("batch", max=65536), 2: side["height"], 3: side["width"]}
    pixels = random_pixels(2, channels, 24, 28, dtype)
    return torch.export.export(network.eval(), (pixels,), dynamic_shapes=(free,), strict=False)


def as_bytes(program: ExportedProgram, ending: str, about: dict[str, str]) -> bytes:
    """The program in the file format that the ending means, with texts about it."""
    if ending == ".pt2":
        content = io.BytesIO()
        torch.export.save(program, content, extra_files=about)
        return content.getvalue()
    import onnx

    names = {"input_names": ["pixels"], "output_names": ["logits"]}
    model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    for value in model.graph.input[0], model.graph.output[0]:  # where torch writes its symbols and the padding's sums
        for axis, name in (0, "batch"), (2, "height"), (3, "width"):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.helper.set_model_props(model, about)
    return model.SerializeToString()


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """A written file as a function from pixels to logits."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


@torch.no_grad()
def export(argv: list[str]) -> int:
    """The command: write, load again, compare with the trained network on noise of two sizes."""
    parser = main.Parser("tools/export.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pt file, or a run's folder (its best.pt)")
    parser.add_argument("file", metavar="FILE", type=Path, help="what to write, a .pt2 or an .onnx file")
    parser.add_argument("--input", choices=["uint8", "float32"], help="type of the pixels; uint8 but for ACDC")
    ours = parser.parse_args(argv)
    if ours.file.suffix not in (".pt2", ".onnx"):
        raise InputError(f"{ours.file}: the name must end in .pt2 or .onnx")
    needs = ("onnx", "onnxscript", "onnxruntime") if ours.file.suffix == ".onnx" else ()
    if missing := [name for name in needs if not find_spec(name)]:
        raise InputError(f"{ours.file} needs {', '.join(missing)}: pip install -r tools/requirements.txt")
    trained = main.load_trained(main.parse_args(["--testing", f"--checkpoint={ours.checkpoint}", "--device=cpu"]))
    utils.make_folder(ours.file.parent, "FILE")
    model, spec, how = trained.model, trained.spec, trained.args.normalization
    model.bf16 = False  # the file computes in float32, whatever --precision was
    dtype = getattr(torch, ours.input or ("float32" if spec.layout == "acdc" else "uint8"))

    program = trace(Deployed(in_use(model).requires_grad_(False), how), spec.channels, dtype)
    about = {"classes": json.dumps(spec.classes), "palette": json.dumps(spec.palette)}
    utils.write_atomically(ours.file, as_bytes(program, ours.file.suffix, about))

    written, (height, width), worst = load(ours.file), trained.args.size, 0.0
    for shape in (1, height, width), (3, 37, 50):
        pixels = random_pixels(shape[0], spec.channels, *shape[1:], dtype)
        expected = model.segment(normalize(pixels, how))
        difference = (written(pixels) - expected).abs().max().item()
        if not difference <= TOLERANCE * expected.abs().max().item():  # NaN too
            ours.file.unlink()
            raise TrainingError(f"{ours.file}: deleted, it differs from {trained.path} by {difference:g}")
        worst = max(worst, difference)

    sizes = f"trained at {height}x{width}, sides of {MIN_SIZE} or more"
    print(f"{ours.file}: G_IS of {trained.path} after epoch {trained.state['epoch']} on {spec.name}")
    print(f"input   pixels  {str(dtype)[6:]:7}  (batch, {spec.channels}, height, width)  {sizes}; values as decoded")
    print(f"output  logits  float32  (batch, {len(spec.classes)}, height, width)  the largest is the class:")
    print(" " * 16 + ", ".join(f"{k} {name}" for k, name in enumerate(spec.classes)))
    print(f"loaded again: at most {worst:.2g} from the trained network (1 image of {height}x{width}, 3 of 37x50)")
    return 0


if __name__ == "__main__":
    sys.exit(main.main(command=export))
