"""Put a downloaded dataset into the layout that main.py reads, and open every image and mask of it.

    python tools/prepare.py voc --download
    python tools/prepare.py voc --from VOCtrainval_11-May-2012.tar benchmark.tgz
    python tools/prepare.py cityscapes --from leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
    python tools/prepare.py acdc --root data/acdc --from ACDC.zip
    python tools/prepare.py acdc --root data/acdc --verify

What lies under --root, archives too, is looked at as well. The same command again writes only what is not there yet.
"""

import argparse
import http.client
import io
import os
import re
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import SBDataset, VOCSegmentation
from tqdm import tqdm

import data_utils
import main
import utils
from data_utils import DatasetSpec, Sample, naming
from main import Parser, number
from utils import InputError, TrainingError, first_ten

ENDINGS = ".zip", ".tar", ".tgz", ".tar.gz"
CITYSCAPES = "https://www.cityscapes-dataset.com/downloads"
# What the layouts read: the pattern of the files, whose group is the path in the layout, by folder and archive.
TAKEN = {
    "voc": {
        ("JPEGImages", "VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012)"): (
            r"VOC2012/(JPEGImages/\w+\.jpg|SegmentationClass/\w+\.png|ImageSets/Segmentation/(?:train|val|trainval)\.txt)"
        )
    },
    "cityscapes": {
        ("leftImg8bit", f"leftImg8bit_trainvaltest.zip ({CITYSCAPES})"): (
            r"(leftImg8bit/(?:train|val)/\w+/\w+_leftImg8bit\.png)"
        ),
        ("gtFine", f"gtFine_trainvaltest.zip ({CITYSCAPES})"): r"(gtFine/(?:train|val)/\w+/\w+_gtFine_labelIds\.png)",
    },
    "acdc": {
        ("training", "the ACDC archive (https://www.creatis.insa-lyon.fr/Challenge/acdc)"): (
            # the only single frames that it holds are ED and ES
            r"((?:training|testing)/(patient\d+)/(?:Info\.cfg|\2_frame\d+(?:_gt)?\.nii\.gz|MANDATORY_CITATION\.md))"
        )
    },
}


# Reading archives


def members(source: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Path, size and reader of each file in a folder, zip or tar, in the order in which it is read best."""
    if source.is_dir():
        files = (Path(home, name) for home, _, names in os.walk(source.absolute(), followlinks=True) for name in names)
        for file in sorted(file for file in files if file.is_file()):
            yield str(file), file.stat().st_size, file.read_bytes
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                yield member.filename, member.file_size, partial(archive.read, member)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                yield member.name, member.size, archive.extractfile(member).read
    else:
        raise InputError(f"{source}: neither a folder nor a zip nor a tar, or cut short")


def contents(source: Path) -> Iterator[tuple[Path, int, Callable[[], bytes]]]:
    """The members with SOURCE/MEMBER as their path; InputError where one would leave the folder it is unpacked to."""
    with naming(source):
        for name, size, read in tqdm(members(source), desc=f"reading {source.name}", unit=" files", disable=None):
            if not source.is_dir() and (name.startswith("/") or ".." in name.split("/")):
                raise InputError(f"{source}: refused: its member {name!r} would leave the folder it is unpacked to")
            yield source / name, size, read


def put(place: Path, origin: Path, read: Callable[[], bytes], size: int | None = None) -> bool:
    """Write a file unless it is there, of `size` bytes where that is given; True where it was written."""
    if place.is_file() and size in (None, place.stat().st_size):
        return False
    with naming(origin):
        content = read()
    place.parent.mkdir(parents=True, exist_ok=True)
    utils.write_atomically(place, content)
    return True


def take(dataset: str, home: Path, sources: list[Path]) -> None:
    """Put what the layout reads from the sources under home; InputError that names the archive that is missing.

    Where several sources hold a file the first counts; a file of another size than there is replaced.
    """
    settled, written = set(), 0
    for origin, size, read in (file for source in sources for file in contents(source)):
        matches = (re.search(rf"/{pattern}$", origin.as_posix()) for pattern in TAKEN[dataset].values())
        for place in {home / match[1] for match in matches if match} - settled:
            settled.add(place)
            written += put(place, origin, read, size)
    print(f"{written} files written to {home}")
    for folder, archive in TAKEN[dataset]:
        if not (home / folder).is_dir():
            how = "give --download, or get" if dataset == "voc" else "get"
            raise InputError(f"{home}: holds no {folder}: {how} {archive} and give it with --from")


# VOC and SBD


def train_aug(voc_train: set[str], voc_val: set[str], sbd: set[str]) -> list[str]:
    """The ids of the augmented set: SBD's train and val without VOC's val, and VOC's train; officially 10,582."""
    return sorted((sbd - voc_val) | voc_train)


def read_ids(path: Path) -> set[str]:
    """The ids that a list holds, one a line."""
    with naming(path):
        return {*path.read_text(encoding="utf-8-sig").split()}


def sbd_mask(read: Callable[[], bytes]) -> bytes:
    """SBD's .mat file as an indexed PNG with VOC's palette; its values are VOC's class indices already."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError("SBD's .mat files need scipy: pip install -r tools/requirements.txt") from error
    mask = Image.fromarray(loadmat(io.BytesIO(read()))["GTcls"][0]["Segmentation"][0])
    mask.putpalette(utils.flat_palette(utils.voc_palette(255)))
    png = io.BytesIO()
    mask.save(png, "PNG")
    return png.getvalue()


def convert_sbd(masks: Path, sources: list[Path]) -> set[str]:
    """Write SBD's masks that are not there yet as PNG; the ids of SBD's train and val, none where SBD is not found.

    SBD is a folder, anywhere in a source, with cls/ID.mat, train.txt and val.txt.
    """
    homes, lists, written = set(), {}, 0
    for origin, _, read in (file for source in sources for file in contents(source)):
        if origin.name in ("train.txt", "val.txt"):
            with naming(origin):
                lists[origin] = read().decode(errors="replace").split()
        elif origin.suffix == ".mat" and origin.parent.name == "cls":
            homes.add(origin.parents[1])
            written += put(masks / f"{origin.stem}.png", origin, partial(sbd_mask, read))
    if homes:
        print(f"{written} masks of SBD written to {masks}")
    both = ([home / "train.txt", home / "val.txt"] for home in sorted(homes))
    pair = next((pair for pair in both if all(path in lists for path in pair)), [])
    return {i for path in pair for i in lists[path]}


def fetch(dataset: type, root: Path, image_set: str, **more) -> None:
    """Download with a class of torchvision's; TrainingError says how to go on where that fails."""
    try:
        dataset(root, image_set=image_set, download=True, **more)
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError) as error:
        raise TrainingError(f"--download: {error}; try again, or get the archive by hand and give --from") from error


def prepare_voc(root: Path, sources: list[Path], download: bool) -> None:
    """VOC2012, SegmentationClassAug (VOC's own masks, with contours of 255; SBD's for the others) and train_aug.txt."""
    homes = root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"  # as in data_utils.index_voc
    home = next((h for h in homes if (h / "ImageSets" / "Segmentation").is_dir()), homes[-1])
    if download and not (home / "SegmentationClass").is_dir():
        fetch(VOCSegmentation, root, "train", year="2012")
    take("voc", home, sources)
    masks, lists = home / "SegmentationClassAug", home / "ImageSets" / "Segmentation"
    for mask in sorted((home / "SegmentationClass").glob("*.png")):
        put(masks / mask.name, mask, mask.read_bytes, mask.stat().st_size)
    sbd = convert_sbd(masks, sources)
    if download and not sbd:
        fetch(SBDataset, root / "sbd", "train", mode="segmentation")
        sbd = convert_sbd(masks, [root / "sbd"])
    known = lists / "train_aug.txt"
    if sbd:
        ids = train_aug(read_ids(lists / "train.txt"), read_ids(lists / "val.txt"), sbd)
        if not known.is_file() or read_ids(known) != {*ids}:
            utils.write_atomically(known, "".join(f"{i}\n" for i in ids))
    elif not known.is_file():
        raise InputError(
            f"{root}: holds neither train_aug.txt nor SBD (a folder with cls/ID.mat, train.txt and val.txt) to "
            f"make it from: give --download, or get {SBDataset.url} and give it with --from"
        )


# Verifying


def look(spec: DatasetSpec, sample: Sample) -> tuple[np.ndarray | None, str | None]:
    """The pixels of each class, at IGNORE those that do not count; or None and what main.py would say is wrong."""
    try:
        return np.bincount(data_utils.read_sample(sample, spec)[1].ravel(), minlength=256), None
    except InputError as error:
        return None, str(error)


def verify(spec: DatasetSpec, root: Path, workers: int) -> None:
    """Open every image and mask of the layout; print how many there are, and each class's share of the pixels.

    Writes nothing. InputError that names the files that cannot be used (the first ten, then the count).
    """
    data_utils.index(spec, root)  # what every run needs
    samples = data_utils.index(spec, root, "standard")  # and the parts that --split standard alone reads
    opened = DataLoader(
        samples,
        batch_size=None,
        num_workers=workers,
        collate_fn=partial(look, spec),
        worker_init_fn=data_utils._let_parent_decide,
    )
    pixels, problems = {part: np.zeros(256, np.int64) for part in spec.standard}, {}
    bar = tqdm(opened, desc=f"opening {spec.name}", unit=" images", disable=None)
    for sample, (counts, problem) in zip(samples, bar, strict=True):
        if problem:
            problems[problem] = sample
        else:
            pixels[sample.part] += counts

    print(f"{spec.name} in {root}")
    other = []
    for part, official in zip(spec.standard, spec.standard_counts, strict=True):
        groups = [sample.group for sample in samples if sample.part == part]
        found, unit = len({*groups}), "exams" if spec.layout == "acdc" else "images"
        other += [part] * (found != official)
        slices = f", {len(groups):,} slices" if len(groups) > found else ""
        note = "" if part in spec.pool else "   (read with --split standard alone)"
        print(f"{part:6}{found:6,} of {official:,} {unit}{slices}{note}")
    print_shares(spec, {part: counts for part, counts in pixels.items() if counts.any()})
    if problems:
        raise InputError(f"bad files, to be replaced ({len(problems)}): {first_ten(problems)}")
    complete = f"not of the official size: {', '.join(other)}" if other else "complete"
    print(f"every image and mask can be used; {complete}")
    print(f"next: python main.py --training --dataset {spec.name} --data-root {root}")


def print_shares(spec: DatasetSpec, pixels: dict[str, np.ndarray]) -> None:
    """A table: by part, each class's per cent of the pixels that count, and the others' of all; a dash for none."""

    def row(title: str, shares: list[float]) -> None:
        print(f"{title:26}" + "".join(f"{100 * share:8.2f}" if share else f"{'-':>8}" for share in shares))

    counted = [k for k in range(len(spec.classes)) if k != spec.void]
    print(f"\n{'% of the pixels that count':26}" + "".join(f"{part:>8}" for part in pixels))
    for k in counted:
        row(spec.classes[k], [counts[k] / max(1, counts[counted].sum()) for counts in pixels.values()])
    row("void, % of all pixels", [1 - counts[counted].sum() / counts.sum() for counts in pixels.values()])
    print()


# The command


def run(argv: list[str]) -> int:
    """Prepare and verify."""
    about = argparse.RawDescriptionHelpFormatter
    parser = Parser("prepare.py", description=__doc__, allow_abbrev=False, formatter_class=about)
    flag = parser.add_argument
    flag("dataset", choices=list(TAKEN))
    flag("--root", "--data-root", type=Path, metavar="DIR", help="data/<dataset> if not given")
    flag("--verify", action="store_true", help="open what is there, write nothing")
    flag("--download", action="store_true", help="voc: get what is missing of VOC2012 and SBD")
    flag("--from", dest="sources", nargs="+", type=Path, default=[], metavar="PATH", help="archives or folders")
    flag("--workers", type=number(int, 0, 1000), default=2, metavar="N", help="processes that open images")
    args = parser.parse_args(argv)
    root = args.root or Path("data", args.dataset)
    if args.verify and (args.download or args.sources):
        raise InputError("--verify writes nothing: give it without --download and --from")
    if args.download and args.dataset != "voc":
        archives = " and ".join(archive for _, archive in TAKEN[args.dataset])
        raise InputError(f"--download: {args.dataset} asks for registration: get {archives} and give --from")
    if not args.verify:
        utils.make_folder(root, "--root")
        inside = {s: sorted(p for p in s.glob("*") if p.name.lower().endswith(ENDINGS)) for s in (*args.sources, root)}
        sources = [path for source, archives in inside.items() for path in (*archives, source)]
        if args.dataset == "voc":
            prepare_voc(root, sources, args.download)
        else:
            take(args.dataset, root, sources)
    verify(data_utils.load_spec(args.dataset), root, args.workers)
    return 0


def prepare(argv: list[str]) -> int:
    """Exit code: 0 usable, 1 failed while running, 2 wrong flags or data, 130 interrupted."""
    try:
        return main.main(argv, run)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(prepare(sys.argv[1:]))
