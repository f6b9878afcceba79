"""The folder of a run's results: whose it is, and what may be replaced there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import utils
from datasets import writers
from datasets.files import is_volume
from engine.inputs import RESULTS_NOTE
from engine.volumes import PredictedVolumes
from utils import InputError


def run_of(checkpoint: Path) -> Path:
    """The folder of a run, or a checkpoint that is neither best.pt nor last.pt."""
    path = checkpoint.resolve()
    return path.parent if path.name in ("best.pt", "last.pt") else path


def results_folder(results: str, checkpoint: Path) -> Path:
    """Create the folder of a run's results, and note there whose they are (checkpoint.txt).

    InputError if it has the results of another run of the same name, or files of another origin.
    """
    run = run_of(checkpoint)
    folder = Path(results) / (run.name if run.is_dir() else run.name.removesuffix(".pt"))
    advice = "give another folder as --results"
    utils.make_folder(folder, "--results")
    note = folder / RESULTS_NOTE
    if note.is_file():
        before = Path(utils.read_text(note).strip())
        if before.exists() and run_of(before) != run:
            raise InputError(f"{folder}: contains the results of {before}; {advice}")
    elif any(path.name[0] != "." for path in folder.iterdir()):  # another command may be starting
        raise InputError(f"{folder}: contains files but no checkpoint.txt; {advice}")
    utils.write_atomically(note, f"{checkpoint.resolve()}\n")
    return folder


@contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """InputError if another command is writing scores into this folder."""
    with utils.exclusive(folder) as held:
        if held is False:
            advice = "wait for it, or give another --results"
            raise InputError(f"{folder}: another command is testing there; {advice}")
        yield


def remove_scores(folder: Path) -> None:
    """Remove an earlier test's files, and create the folders of the new one's."""
    for name in ("metrics.json", "volumes.csv"):  # first: they describe the others
        (folder / name).unlink(missing_ok=True)
    for sub in ("masks", "panels"):
        utils.make_folder(folder / sub, "--results")
        for old in (folder / sub).glob("*.png"):
            old.unlink()


def check_data_root(metrics: Path, data_root: Path) -> None:
    """InputError if a metrics.json has the scores of another folder that still exists."""
    with utils.naming(metrics):
        before = json.loads(utils.read_text(metrics)) if metrics.is_file() else {}
        scored = Path(before.get("data_root", data_root))
    if scored != data_root and scored.exists():
        found, advice = f"contains the scores of images in {scored}", "give another --results"
        raise InputError(f"{metrics.parent}: {found}; {advice}")


def note_sources(folder: Path, found: Mapping[Path, Path]) -> None:
    """Note in files.json whose masks the folder contains; `found` has their output paths.

    InputError if the mask of another file would be replaced, or that of a file which another
    command may be predicting.
    """
    note, clashes = folder / "files.json", []
    with utils.exclusive(folder, utils.PATIENCE):  # other commands may predict at the same time
        with utils.naming(note):
            before = dict(json.loads(utils.read_text(note))) if note.is_file() else {}
            others = {mask: Path(source) for mask, source in before.items()}
        sources = {**before}
        for file, place in found.items():
            mask, source = str(writers.prediction_file(place, file)), str(file.resolve())
            other = others.get(mask, Path(source))
            if str(other) != source and (other.exists() or (folder / "masks" / mask).exists()):
                clashes.append(f"{mask} is the mask of {before[mask]}")
            sources[mask] = source
        if clashes:
            advice = "give another folder as --results"
            raise InputError(f"--predict: {folder / 'masks'}: {utils.first_ten(clashes)}; {advice}")
        if sources != before:
            utils.write_atomically(note, json.dumps(sources, indent=1))


def count_older(folder: Path, found: Mapping[Path, Path], checkpoint: Path) -> int:
    """The number of masks in a folder that are older than a checkpoint, except those of `found`."""
    made = checkpoint.stat().st_mtime_ns
    renewed = {folder / writers.prediction_file(place, file) for file, place in found.items()}
    n = 0
    for path in folder.rglob("[!.]*"):
        with suppress(FileNotFoundError):  # another command replaces it
            n += path not in renewed and path.is_file() and path.stat().st_mtime_ns < made
    return n


def merged(table: Path, contents: PredictedVolumes) -> str:
    """The lines of a volumes.csv and those of the contents; InputError if it cannot be read."""
    earlier = utils.read_text(table) if table.is_file() else ""
    with utils.naming(table):
        return contents.csv(earlier)


def add_volumes(folder: Path, contents: PredictedVolumes) -> None:
    """Write volumes.csv; the lines of other files stay."""
    table = folder / "volumes.csv"
    with utils.exclusive(folder, utils.PATIENCE):
        utils.write_atomically(table, merged(table, contents))


def prepare_predictions(
    folder: Path, found: Mapping[Path, Path], checkpoint: Path, contents: PredictedVolumes
) -> None:
    """Prepare a folder for the masks of `found`, which has their output paths.

    InputError if masks of other files would be replaced, or volumes.csv cannot be read. Prints how
    many masks of other files are older than the checkpoint.
    """
    utils.make_folder(folder / "masks", "--results")
    if any(map(is_volume, found)):
        merged(folder / "volumes.csv", contents)  # an unreadable table is an error now
    note_sources(folder, found)
    if n_older := count_older(folder / "masks", found, checkpoint):
        masks, cause = utils.counted(n_older, "mask"), "earlier weights may have made them"
        print(f"{folder}: has {masks} of other files, older than {checkpoint}: {cause}")
    remove_overlays(folder / "overlays", found)


def remove_overlays(folder: Path, found: Mapping[Path, Path]) -> None:
    """Remove earlier overlays of the files that are predicted; `found` has their output paths."""
    for file, place in found.items():
        utils.remove(folder / writers.prediction_file(place, file))
