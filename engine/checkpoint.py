"""Checkpoint files: save, load, check; fit weights and optimizer state."""

import io
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import InputError, first_ten, naming, write_atomically

FORMAT = 2
REQUIRED = {
    "settings": dict,
    "dataset": dict,
    "data_root": str,
    "split": str,
    "epoch": int,
    "model": dict,
}


def save(path: Path, state: dict) -> None:
    """Write a checkpoint of tensors and plain values; loading it runs no code from the file."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def data_path(state: dict) -> str:
    """The absolute path of a run's data, without links; older runs have it as it was typed."""
    return os.path.realpath(state.get("data_path") or state["data_root"])


def data_root(state: dict) -> str:
    """The --data-root of a run, or its path if it leads elsewhere today and the path exists."""
    typed, path = state["data_root"], data_path(state)
    return path if os.path.realpath(typed) != path and os.path.exists(path) else typed


def file_of(path: str) -> Path:
    """A checkpoint, or a run folder's best.pt."""
    with naming(Path(path)):
        return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU; InputError if it is damaged or not from this program."""
    if not path.is_file():
        last = path.with_name("last.pt")
        is_new = path.name == "best.pt" and last.is_file()
        advice = f"; the run has not been evaluated yet: give {last}" if is_new else ""
        raise InputError(f"checkpoint {path}: no such file{advice}")
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as records:
            damaged = records.testzip()  # torch writes each record's CRC-32 but does not check it
        content.seek(0)
        state = None if damaged else torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on hostile bytes
        reason = f"not a readable checkpoint ({type(error).__name__})"
        raise InputError(f"checkpoint {path}: {reason}") from error
    if damaged:
        raise InputError(f"checkpoint {path}: damaged (record {damaged})")
    if isinstance(state, dict) and state.get("format") == 1:
        advice = "use the version of this program that wrote it, or train again"
        raise InputError(f"checkpoint {path}: from an earlier version (format 1); {advice}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"checkpoint {path}: not from this program (expected format {FORMAT})")
    if isinstance(state.get("dataset"), dict) and "any_orientation" in state["dataset"]:
        _rename_orientation(state)
    wrong = [key for key, kind in REQUIRED.items() if not isinstance(state.get(key), kind)]
    for key in [] if wrong else ("settings", "dataset", "model"):
        wrong += [key] * any(type(name) is not str for name in state[key])
    if wrong or not all(isinstance(weight, Tensor) for weight in state["model"].values()):
        lacking = first_ten(wrong) or "weights that are tensors"
        raise InputError(f"checkpoint {path}: lacks {lacking}")
    return state


def _rename_orientation(state: dict) -> None:
    """Convert a checkpoint from before --augment to the current keys."""
    turned = state["dataset"].pop("any_orientation") is True
    state["dataset"]["orientation"] = "any" if turned else "fixed"
    if isinstance(settings := state.get("settings"), dict):  # meanteacher turned its own images
        augmented = turned and settings.get("method") == "meanteacher"
        state["settings"] = {"augment": augmented, "reduction": "mean", **settings}


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Load saved weights into a network; InputError lists what does not fit."""
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in weights.items()}
    differences = [
        f"{key} is {theirs.get(key, 'missing')}, expected {ours.get(key, 'none')}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise InputError(f"{source}: does not fit the networks: {first_ten(differences)}")
    network.load_state_dict(weights)


def keep_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory layout of its parameters, as fused kernels require."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)
