"""Trained networks: score() scores the validation set, predict() segments pictures and volumes."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import utils
from data_utils import Data, normalize, validation_batches, volumes_of
from datasets import files, writers
from datasets.cache import resize
from datasets.labels import absent_classes, check_ignored
from datasets.spec import DatasetSpec, Slice
from engine.inputs import find_pictures, read_planes
from engine.metrics import ConfusionMatrix, format_means, format_metrics, segmentation_metrics
from engine.pictures import picture_grid, save_overlay, save_picture
from engine.results import (
    add_volumes,
    check_data_root,
    prepare_predictions,
    remove_scores,
    results_folder,
    writing_alone,
)
from engine.train import evaluate
from engine.trained import Trained
from engine.volumes import PredictedVolumes, SliceStacker, VolumeScores
from utils import InputError, TrainingError


def mask_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Argmax (H, W), uint8, of logits (K, h, w) resized to `size`: bilinear, in float32.

    Resized class by class, since K maps of a large picture may not fit into memory.
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    mask = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for k, low in enumerate(logits.float()):
        high = torch.nn.functional.interpolate(low[None, None], size, mode="bilinear")[0, 0]
        mask[high > best] = k
        best = torch.maximum(best, high)
    return mask


def score(trained: Trained) -> int:
    """--testing: write metrics.json, masks/ and panels/ of a checkpoint's validation images.

    Also volumes.csv where images are slices. Those of --part go to a folder of that name.
    """
    args, spec, data = trained.args, trained.spec, trained.data()
    dtype = trained.image_dtype
    if args.normalization == "half" and dtype != data.val.image_dtype:
        found = f"images are {data.val.image_dtype}, those of the training were {dtype}"
        raise InputError(f"--normalization half: {found}; it scales the two differently")
    check_ignored(data.masks(), spec, data.unlabeled.samples)
    if absent := absent_classes(data.val.cached_masks(), spec):
        found = f"no mask to score contains {utils.first_ten(absent)}"
        print(f"{found}: its IoU is 0 where it is predicted, otherwise it is left out of the means")
    trained.check_colors(data)
    for message in trained.other_axes(sorted(volumes_of(data.split.val))):
        print(message)
    folder = results_folder(args.results, trained.path) / (args.part or "")
    utils.make_folder(folder, "--results")
    with writing_alone(folder):
        check_data_root(folder / "metrics.json", Path(args.data_root).resolve())
        write_scores(trained, data, folder)
    return 0


def write_scores(trained: Trained, data: Data, folder: Path) -> None:
    """Write the files of score() in place of an earlier test's."""
    state, args, spec, model = trained.state, trained.args, trained.spec, trained.model
    samples = data.split.val
    waiting, native = iter(samples), ConfusionMatrix(len(spec.classes))
    scores = VolumeScores(spec)
    bar = tqdm(total=len(samples), desc=f"testing {folder.name}", unit=" images", disable=None)

    def write(x: Tensor, y: Tensor, logits: Tensor) -> None:
        columns = {"y": y, **model.pictures(y, logits)}
        columns = {title: column.cpu() for title, column in columns.items()}
        x, prediction = x.cpu(), logits.argmax(1).cpu()
        for i, sample in enumerate(itertools.islice(waiting, len(x))):
            if sample is samples[0]:  # its outputs are finite
                remove_scores(folder)
            in_volume = isinstance(sample.image, Slice)
            if args.native_size or in_volume:
                truth = torch.from_numpy(files.read_labels(sample, spec))
                mask = mask_at(logits[i], truth.shape).cpu()
                native.update(mask, truth)
                if in_volume:
                    scores.add(sample, truth, mask)
            writers.save_mask(folder / "masks" / f"{sample.id}.png", prediction[i], spec)
            row = {title: column[i : i + 1] for title, column in columns.items()}
            panel = picture_grid(x[i : i + 1], row, spec)
            save_picture(folder / "panels" / f"{sample.id}.png", panel)
        bar.update(len(x))

    batches = validation_batches(data, args, trained.device, args.workers)
    counts = evaluate(model, batches, write)
    bar.close()
    about = {
        "n_images": len(samples),
        "split": state["split"],
        "epoch": state["epoch"],
        "checkpoint": str(trained.path),
        "dataset": spec.name,
        "data_root": str(Path(args.data_root).resolve()),
        "method": args.method,
        "ratio": args.ratio,
        "labeled": args.labeled,
        "seed": args.seed,
    }
    if args.part:
        about["part"] = args.part
    if args.native_size:
        about["native_size"] = segmentation_metrics(native.counts, spec)
    if any(isinstance(sample.image, Slice) for sample in samples):
        about["volumes"] = scores.summary()
        utils.write_atomically(folder / "volumes.csv", scores.csv())
    result = segmentation_metrics(counts, spec) | about
    utils.write_atomically(folder / "metrics.json", json.dumps(result, indent=1))
    print_scores(trained, result, scores, folder)


def print_scores(trained: Trained, result: dict, scores: VolumeScores, folder: Path) -> None:
    """Print what metrics.json (`result`) and volumes.csv contain."""
    args, spec = trained.args, trained.spec
    part = args.part or "validation"
    images = f"{result['n_images']} {part} images of {spec.name} ({args.data_root})"
    print(f"{trained.path} after epoch {result['epoch']}, on {images}, in %:")
    print(format_metrics(result))
    if "native_size" in result:
        print(f"at the masks' original size: {format_means(result['native_size'])}")
    written = ["metrics.json", "masks/"]
    if "volumes" in result:
        print(f"{scores.title()}:\n{scores.table()}")
        written.insert(1, "volumes.csv")
    print(f"{', '.join(written)} and panels/ (image, truth, predictions) are in {folder}")
    print_values(spec)


def print_values(spec: DatasetSpec) -> None:
    """Print the value that PNG masks cannot hold, if there is one: they hold class indices then."""
    if value := spec.beyond_png():
        print(f"PNG masks hold class indices: {value} needs more than 8 bits")


def plane_name(i: int, n_planes: int, depth: int) -> str:
    """The file name of plane i's overlay: its frame, if there are several, and its slice."""
    frame = f"t{i // depth:02d}_" if n_planes > depth else ""
    return f"{frame}s{i % depth:02d}.png"


def read_inputs(
    paths: Iterable[Path], trained: Trained, unreadable: list[str]
) -> Iterator[tuple[Path, int, int, Tensor]]:
    """Yield each plane (C, H, W) with its file, its index there and the file's number of planes.

    Messages about files that cannot be read are added to `unreadable`.
    """
    half = trained.args.normalization == "half"
    for path in tqdm(paths, desc="predicting", unit=" files", disable=None):
        try:
            planes = read_planes(path, trained.spec.channels)
            if half and trained.image_dtype == "uint8" and planes[0].dtype != torch.uint8:
                reason = "more than 8 bits, unlike the training images"
                effect = "--normalization half scales it differently"
                raise InputError(f"{path}: {reason}; {effect}")
        except InputError as error:
            unreadable.append(str(error))
            continue
        for i, plane in enumerate(planes):
            yield path, i, len(planes), plane


def network_input(planes: list[Tensor], trained: Trained) -> Tensor:
    """Planes (C, H, W) of any size, resized and normalized as in training: (B, C, h, w)."""
    x = []
    for plane in planes:
        pixels = resize(plane, trained.args.size)[None].to(trained.device)
        if trained.image_dtype == "float32":  # each by its own range
            pixels = pixels.float()
        x.append(normalize(pixels, trained.args.normalization))
    return torch.cat(x)


@torch.inference_mode()
def predict(trained: Trained) -> int:
    """--predict: write the masks of pictures and NIfTI volumes at their original size.

    volumes.csv has the volume of each class. Masks and lines of earlier calls stay. Files that are
    not images are listed and skipped. TrainingError, at the end, if a file cannot be read.
    """
    args, spec = trained.args, trained.spec
    unreadable: list[str] = []
    found, other = find_pictures([Path(path) for path in args.predict])
    if not found:
        skipped = f"; skipped {utils.first_ten(other)}" if other else ""
        raise InputError(f"--predict: found no images or NIfTI volumes{skipped}")
    folder = results_folder(args.results, trained.path) / "predict"
    contents = PredictedVolumes(spec)
    prepare_predictions(folder, found, trained.path, contents)

    planes, predicted, stacker = read_inputs(found, trained, unreadable), [], SliceStacker()
    try:
        while batch := list(itertools.islice(planes, args.batch_size)):
            logits = trained.model.segment(network_input([plane for *_, plane in batch], trained))
            finite = logits.flatten(1).isfinite().all(1).tolist()
            items = zip(batch, logits, finite, strict=True)
            for (path, i, n_planes, plane), own, is_finite in items:
                if not is_finite:
                    problem = f"{path}: the network's outputs are not finite"
                    if problem not in unreadable:  # of another slice
                        unreadable.append(problem)
                    continue
                mask, place = mask_at(own, plane.shape[-2:]).cpu(), found[path]
                if args.overlay:
                    file = folder / "overlays" / writers.prediction_file(place, path)
                    if files.is_volume(path):
                        file /= plane_name(i, n_planes, files.depth_of(path))
                    save_overlay(file, plane, mask, spec)
                masks = stacker.add(path, i, n_planes, mask)
                if masks is not None:
                    writers.save_prediction(folder / "masks" / place, path, masks, spec)
                    predicted.append(path)
                    if files.is_volume(path):
                        contents.add(path, masks)
    finally:  # an interrupted call has written masks, too
        if contents.rows:
            add_volumes(folder, contents)
    for problem in other + unreadable:
        print(f"skipped {problem}")
    for message in trained.other_axes(filter(files.is_volume, predicted)):
        print(message)
    if contents.rows:
        print(contents.lines())
    epoch = trained.state["epoch"]
    masks = utils.counted(len(predicted), "mask")
    print(f"{masks} by {trained.path} (epoch {epoch}): {folder / 'masks'}")
    print_values(spec)
    if unreadable:
        raise TrainingError(f"unreadable files: {utils.first_ten(unreadable)}")
    return 0
