"""Arrange a downloaded dataset as main.py expects it, then check every image and mask.

    python tools/prepare.py voc --download
    python tools/prepare.py voc --from VOCtrainval_11-May-2012.tar benchmark.tgz
    python tools/prepare.py cityscapes --from leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
    python tools/prepare.py acdc --root data/acdc --from ACDC.zip
    python tools/prepare.py acdc --root data/acdc --verify
    python tools/prepare.py split --labeled F --unlabeled F --val F --out FILE.json  (lists.py)

Archives and folders under --root are used as well. A repeated command writes missing and truncated
files; others are kept, and those that differ in size from the archive's are named.
"""

import gzip
import http.client
import io
import lzma
import re
import shlex
import shutil
import socket
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before the slow imports, to handle signals during them
    from engine import signals

    signals.install()

import numpy as np
from PIL import Image
from scipy.io import loadmat
from torchvision.datasets import SBDataset, VOCSegmentation
from tqdm import tqdm

import utils
from datasets.files import read_sample
from datasets.layouts import index, voc_homes
from datasets.spec import DatasetSpec, Sample, load_spec, voc_palette
from datasets.writers import flat_palette
from engine import program
from engine.flags import Parser, bounded
from engine.inputs import visible_files
from tools.lists import make_split
from utils import InputError, TrainingError, check_regular, counted, first_ten, naming

ARCHIVE_SUFFIXES = ".zip", ".tar", ".tgz", ".tar.gz"
ARCHIVES = {  # by the folder that they contain
    "voc": {
        "JPEGImages": "VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012)"
    },
    "cityscapes": {
        kind: f"{kind}_trainvaltest.zip (https://www.cityscapes-dataset.com/downloads)"
        for kind in ("leftImg8bit", "gtFine")
    },
    "acdc": {"training": "the ACDC archive (https://www.creatis.insa-lyon.fr/Challenge/acdc)"},
}
FILES = {  # that main.py reads; group 1 is the path in the layout
    "voc": r"/VOC2012/(JPEGImages/\w+\.jpg|SegmentationClass/\w+\.png"
    r"|ImageSets/Segmentation/(?:train|val|trainval)\.txt)$",
    "cityscapes": r"/((?:leftImg8bit|gtFine)/(?:train|val)/\w+/\w+"
    r"_(?:leftImg8bit|gtFine_labelIds)\.png)$",
    "acdc": r"/((?:training|testing)/(patient\d+)/"  # the only single frames are ED and ES
    r"(?:Info\.cfg|\2_frame\d+(?:_gt)?\.nii\.gz|MANDATORY_CITATION\.md))$",
}
TRUNCATED = EOFError, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError, zlib.error
WORDS = (  # of these paths, for archives that spell them otherwise, such as TRAINING/PATIENT001
    *("SegmentationClass", "ImageSets", "JPEGImages", "Segmentation", "leftImg8bit", "gtFine"),
    *("labelIds", "MANDATORY_CITATION", "Info", "training", "testing", "trainval", "train", "val"),
    *("patient", "frame", "_gt.nii.gz", ".nii.gz", ".cfg", ".jpg", ".md", ".png", ".txt"),
)


def members(source: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield path, size and reader of each file in a folder, zip or tar, in the order of storage."""
    if source.is_dir():
        for path in visible_files(source):
            yield path.relative_to(source).as_posix(), path.stat().st_size, path.read_bytes
        return
    check_regular(source)
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    yield member.filename, member.file_size, partial(archive.read, member)
    elif tarfile.is_tarfile(source) or source.name.lower().endswith(ARCHIVE_SUFFIXES):
        try:
            with tarfile.open(source) as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    yield member.name, member.size, archive.extractfile(member).read
        except TRUNCATED as error:
            found = "neither a zip nor a tar file, or truncated"
            advice = "delete it and download it again"
            raise InputError(f"{source}: {found}; {advice}") from error
    else:
        raise InputError(f"{source}: neither a folder nor a zip or tar file")


def read_sources(sources: list[Path]) -> Iterator[tuple[Path, int, Callable[[], bytes]]]:
    """Yield the files of all sources; InputError for a path that would leave its folder.

    Paths may be Windows', with backslashes.
    """
    for source in sources:
        with naming(source):
            files = members(source)
            for stored, *file in tqdm(files, f"reading {source.name}", unit=" files", disable=None):
                name = stored.replace("\\", "/")
                if re.match(r"/|[A-Za-z]:", name) or ".." in name.split("/"):
                    advice = "unpack it into a folder and pass that to --from"
                    raise InputError(f"{source}: unsafe path {stored!r}; {advice}")
                yield source.absolute() / name, *file


def write_missing(target: Path, source: Path, read: Callable[[], bytes], size: int = -1) -> str:
    """Write a file that is missing or truncated; return "written", "present" or "changed".

    size: of the source in bytes; a file of another size was changed if it is text, or if it is not
    the source's beginning. -1: every file is as it should be.
    """
    if target.is_file() and size in (-1, target.stat().st_size):
        return "present"
    with naming(source):
        content = read()
    is_text = target.suffix in (".cfg", ".md", ".txt")
    if target.is_file() and (is_text or not content.startswith(target.read_bytes())):
        return "changed"
    target.parent.mkdir(parents=True, exist_ok=True)
    utils.write_atomically(target, content)
    return "written"


def place_of(path: str, dataset: str) -> str | None:
    """A file's path in the layout, whatever the case of an archive's names; None if not read."""
    if match := re.search(FILES[dataset], path):
        return match[1]
    if match := re.search(FILES[dataset], path, re.IGNORECASE):
        spelling = {word.lower(): word for word in WORDS}
        words = "|".join(map(re.escape, WORDS))
        return re.sub(words, lambda word: spelling[word[0].lower()], match[1], flags=re.IGNORECASE)
    return None


def write_layout(dataset: str, home: Path, sources: list[Path]) -> dict[Path, list[Path]]:
    """Write a layout's files, each from the first source that has it; return the others found."""
    found, other = set(), {}
    places: dict[str, list[str]] = {"written": [], "present": [], "changed": []}
    for source in sources:
        for path, size, read in read_sources([source]):
            place = place_of(path.as_posix(), dataset)
            if place is None:
                other.setdefault(source, []).append(path.relative_to(source.absolute()))
            elif place not in found:
                found.add(place)
                places[write_missing(home / place, path, read, size)].append(place)
    print(f"{len(places['written'])} files written to {home}")
    if changed := places["changed"]:
        kept = f"kept {counted(len(changed), 'file')} that differ from the source"
        print(f"{kept}, delete them to write them again: {first_ten(changed)}")
    return other


def check_layout(dataset: str, home: Path, other: dict[Path, list[Path]]) -> None:
    """InputError names the archive that is missing, and what `write_layout` found instead."""
    for folder, archive in ARCHIVES[dataset].items():
        if not (home / folder).is_dir():
            download = "use --download, or " if dataset == "voc" else ""
            problem = f"{home}: no {folder}: {download}get {archive} and pass it to --from"
            for source, names in other.items():
                problem += f"; {source} contains {len(names)} other files, such as {names[0]}"
            raise InputError(problem)


def sbd_mask(read: Callable[[], bytes]) -> bytes:
    """Convert SBD's .mat file, which has VOC's class indices, to a PNG with VOC's palette."""
    mask = Image.fromarray(loadmat(io.BytesIO(read()))["GTcls"][0]["Segmentation"][0])
    mask.putpalette(flat_palette(voc_palette(255)))
    png = io.BytesIO()
    mask.save(png, "PNG")
    return png.getvalue()


def convert_sbd(masks: Path, sources: list[Path]) -> set[str]:
    """Write the missing masks of SBD, cls/ID.mat at any depth of a source; return all IDs."""
    ids, n_written = set(), 0
    for path, _, read in read_sources(sources):
        if path.match("cls/*.mat"):
            ids.add(path.stem)
            target = masks / f"{path.stem}.png"
            n_written += write_missing(target, path, partial(sbd_mask, read)) == "written"
    print(f"{n_written} masks of SBD written to {masks}")
    return ids


def download(dataset: type, root: Path, **options) -> None:
    """Download with a dataset class of torchvision."""
    socket.setdefaulttimeout(60)  # seconds without an answer; torchvision sets none
    try:
        dataset(root, image_set="train", download=True, **options)
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError) as error:
        remedy = "retry, or get the archive by hand and pass it to --from"
        raise TrainingError(f"--download: {error}; {remedy}") from error


def download_sbd(root: Path) -> Path:
    """Download SBD to root/sbd, which does not exist before it is complete."""
    folder, unfinished = root / "sbd", root / ".sbd"  # hidden: no source for a later command
    for unpacked in filter(Path.is_dir, unfinished.glob("*")):
        shutil.rmtree(unpacked)  # in part, by an interrupted command
    download(SBDataset, unfinished, mode="segmentation")
    if folder.exists():
        return unfinished
    return unfinished.rename(folder)


def train_aug(voc_train: set[str], voc_val: set[str], sbd: set[str]) -> list[str]:
    """The augmented training set: VOC's train and all of SBD but VOC's val; officially 10,582."""
    return sorted((sbd - voc_val) | voc_train)


def prepare_voc(root: Path, sources: list[Path], may_download: bool) -> None:
    """Complete VOC2012 with SegmentationClassAug and train_aug.txt.

    VOC's own masks, with contours of 255, take precedence over SBD's.
    """
    homes = voc_homes(root)
    home = next((home for home in homes if (home / "ImageSets/Segmentation").is_dir()), homes[-1])
    masks, lists = home / "SegmentationClassAug", home / "ImageSets/Segmentation"
    other = write_layout("voc", home, sources)
    if may_download and not (home / "SegmentationClass").is_dir():
        download(VOCSegmentation, root, year="2012")
        other = write_layout("voc", home, sources)
    check_layout("voc", home, other)
    for mask in sorted((home / "SegmentationClass").glob("*.png")):
        target, content = masks / mask.name, mask.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            masks.mkdir(exist_ok=True)
            utils.write_atomically(target, content)
    sbd = convert_sbd(masks, sources)
    if may_download and not sbd:
        sbd = convert_sbd(masks, [download_sbd(root)])

    ids = {}
    for path in lists.glob("*.txt"):
        ids[path.stem] = {*utils.read_text(path).split()}
    if sbd:
        for name in "train", "val":
            if name not in ids:
                raise InputError(f"{lists / name}.txt: no such file; VOC2012's archive has it")
        augmented, path = train_aug(ids["train"], ids["val"], sbd), lists / "train_aug.txt"
        before = ids.get("train_aug", set())
        if before > {*augmented} and not before & ids["val"]:
            n_more = counted(len(before) - len(augmented), "image")
            print(f"kept {path}: {n_more} more than SBD's masks here, which may be incomplete")
        elif before != {*augmented}:
            if before:
                n_others = len(before.symmetric_difference(augmented))
                print(f"{path}: replaced, it differed in {counted(n_others, 'image')}")
                utils.write_atomically(earlier := path.with_suffix(".earlier"), path.read_bytes())
                print(f"the earlier list is kept as {earlier}")
            utils.write_atomically(path, "\n".join([*augmented, ""]))
    elif "train_aug" not in ids:
        remedy = f"use --download, or get {SBDataset.url} and pass it to --from"
        raise InputError(f"{root}: neither train_aug.txt nor SBD's masks (cls/ID.mat): {remedy}")


def count_pixels(sample: Sample, spec: DatasetSpec) -> np.ndarray | str:
    """Pixels by value of the mask (256,), or the error that a training would report."""
    try:
        return np.bincount(read_sample(sample, spec)[1].ravel(), minlength=256)
    except InputError as error:
        return str(error)


def verify(spec: DatasetSpec, root: Path, workers: int) -> None:
    """Read every image and mask; print counts and class shares. InputError names unusable files."""
    index(spec, root)  # what the paper's split needs
    samples = index(spec, root, "standard")
    pixels, errors = {part: np.zeros(256, np.int64) for part in spec.standard}, {}
    with ThreadPool(max(1, workers)) as pool:
        results = pool.imap(partial(count_pixels, spec=spec), samples, chunksize=16)
        bar = tqdm(results, f"reading {spec.name}", len(samples), unit=" images", disable=None)
        for sample, result in zip(samples, bar, strict=True):
            if isinstance(result, str):
                errors[result] = None  # once for all slices of a volume
            else:
                pixels[sample.part] += result

    print(f"{spec.name} in {root}")
    incomplete, unit = [], "exams" if spec.layout == "acdc" else "images"
    for part, official in zip(spec.standard, spec.standard_counts, strict=True):
        groups = [sample.group for sample in samples if sample.part == part]
        found = len({*groups})
        incomplete += [part] if found != official else []
        slices = f", {len(groups):,} slices" if len(groups) > found else ""
        note = "" if part in spec.pool else "   (used by --split standard only)"
        print(f"{part:6}{found:6,} of {official:,} {unit}{slices}{note}")
    print_shares(spec, {part: counts for part, counts in pixels.items() if counts.any()})
    if errors:
        raise InputError(f"unusable files ({len(errors)}): {first_ten(errors)}")
    complete = f"incomplete: {', '.join(incomplete)}" if incomplete else "complete"
    print(f"all images and masks are usable; {complete}")
    folder = shlex.quote(str(root))
    print(f"next: python main.py --training --dataset {spec.name} --data-root {folder}")


def print_shares(spec: DatasetSpec, pixels: dict[str, np.ndarray]) -> None:
    """Print each class's percentage of the non-void pixels by part, and void's of all pixels."""
    classes = [k for k in range(len(spec.classes)) if k != spec.void]
    rows = {spec.classes[k]: "" for k in classes} | {"void, % of all pixels": ""}
    for counts in pixels.values():
        valid = counts[classes]
        shares = [*valid / max(1, valid.sum()), 1 - valid.sum() / counts.sum()]
        for title, share in zip(rows, shares, strict=True):
            rows[title] += f"{100 * share:8.2f}" if share else f"{'-':>8}"
    print(f"\n{'% of non-void pixels':26}" + "".join(f"{part:>8}" for part in pixels))
    print("".join(f"{title:26}{cells}\n" for title, cells in rows.items()))


def prepare(argv: list[str]) -> int:
    """Prepare a dataset (unless --verify is given) and verify it, or convert lists."""
    if argv[:1] == ["split"]:
        return make_split(argv[1:])
    usage = "prepare.py voc | cityscapes | acdc [--from PATH...] [flags]"
    parser = Parser("prepare.py", usage=usage, description=__doc__)
    flag, count = parser.add_argument, bounded(int, 0, 1000)
    flag("dataset", choices=list(ARCHIVES), help="dataset, or split: prepare.py split --help")
    flag("--root", "--data-root", type=Path, metavar="DIR", help="default: data/<dataset>")
    flag("--verify", action="store_true", help="only check existing files, write nothing")
    flag("--download", action="store_true", help="voc: download missing VOC2012 and SBD archives")
    flag("--from", dest="sources", nargs="+", type=Path, default=[], help="archives or folders")
    flag("--workers", type=count, default=2, metavar="N", help="threads for reading images")
    args = parser.parse_args(argv)
    root = args.root or Path("data", args.dataset)
    if args.verify and (args.download or args.sources):
        raise InputError("--verify writes nothing: omit --download and --from")
    if args.download and args.dataset != "voc":
        archives = " and ".join(ARCHIVES[args.dataset].values())
        raise InputError(f"--download is for voc only: get {archives} and pass it to --from")
    if not args.verify:
        utils.make_folder(root, "--root")
        sources = []
        for source in (*args.sources, root):
            archives = [p for p in source.glob("*") if p.name.lower().endswith(ARCHIVE_SUFFIXES)]
            sources += [*sorted(archives), source]
        if args.dataset == "voc":
            prepare_voc(root, sources, args.download)
        else:
            check_layout(args.dataset, root, write_layout(args.dataset, root, sources))
    verify(load_spec(args.dataset), root, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(program.execute(prepare))
