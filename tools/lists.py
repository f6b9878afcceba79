"""The lists of other papers' code as a split file: `tools/prepare.py split`.

UniMatch writes `JPEGImages/ID.jpg SegmentationClass/ID.png`, or
`leftImg8bit/train/CITY/ID_leftImg8bit.png gtFine/...`; CPS writes ids; SSL4MIS
`patient001_frame01_slice_3` for slices, `patient001_frame01` for volumes. SSL4MIS counts slices
from 1 and has renumbered the frames: 01 is an exam's first one, 02 its second, which are ED and ES.
"""

import json
import re
import shlex
from collections import defaultdict
from itertools import chain, combinations
from pathlib import Path

import utils
from datasets.layouts import index
from datasets.spec import Sample, load_spec
from datasets.splits import ROLES, check_groups
from engine.flags import Parser
from utils import InputError, counted, first_ten

LISTS = *ROLES, "test"
ENDINGS = r"(_leftImg8bit)?(\.(jpe?g|png|h5|npz|nii(\.gz)?))?$"
ACDC = re.compile(r"(patient\d+)_frame(\d+)(?:_slice_(\d+))?")


def image_of(line: str) -> str:
    """The image that a line names, without folders and extension."""
    pair = re.fullmatch(r"(\S+\.\w+)[\s,]+\S+\.\w+", line)  # an image and its mask
    return re.sub(ENDINGS, "", re.split(r"[/\\]", pair[1] if pair else line)[-1], flags=re.I)


def read_list(path: Path) -> list[str]:
    """The images that a list names, each once; InputError if two lines would name the same."""
    lines: dict[str, str] = {}
    for line in utils.read_lines(path):
        name = image_of(line)
        if not name:
            raise InputError(f"{path}: {line!r} names no image")
        if lines.setdefault(name, line) != line:
            found = f"{lines[name]!r} and {line!r} both name {name!r}"
            raise InputError(f"{path}: {found}: ids have no folders, extensions or blanks")
    return [*lines]


def acdc_ids(lists: dict[str, list[str]], samples: list[Sample]) -> dict[str, list[str]]:
    """The ids of ACDC's slices that lists of frames and slices name.

    Frames are SSL4MIS's if all are 01 or 02, otherwise ACDC's own. Slices count from 1, or from 0
    if the lists contain a slice 0.
    """
    by_name: dict[str, list[Sample]] = defaultdict(list)  # of an exam, a volume, a slice
    frames: dict[str, dict[str, None]] = defaultdict(dict)  # an exam's volumes, in order
    for sample in samples:
        for name in {sample.group, sample.volume, sample.id}:
            by_name[name].append(sample)
        frames[sample.group][sample.volume] = None
    matches = list(filter(None, map(ACDC.fullmatch, chain(*lists.values()))))
    renumbered = {int(match[2]) for match in matches} <= {1, 2}
    first = 0 if any(match[3] and not int(match[3]) for match in matches) else 1

    def ids(name: str) -> list[str]:
        match, z = ACDC.fullmatch(name), None
        if match:
            exam, number = match[1], int(match[2])
            numbered = dict(enumerate(frames.get(exam, ()), 1))
            name = numbered.get(number) if renumbered else f"{exam}_frame{number:02d}"
            z = match[3] and int(match[3]) - first
        return [s.id for s in by_name.get(name, ()) if z in (None, s.image.z)]

    converted = {}
    for role, names in lists.items():
        if unknown := [name for name in names if not ids(name)]:
            raise InputError(f"--{role}: not in the dataset: {first_ten(unknown)}")
        converted[role] = list(dict.fromkeys(chain.from_iterable(map(ids, names))))
    return converted


def whole_exams(ids: list[str], samples: list[Sample]) -> list[str]:
    """The ids, with an exam's name instead of all of its slices."""
    exams: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        exams[sample.group].add(sample.id)
    rest = {*ids}
    whole = {exam for exam, slices in exams.items() if slices <= rest}
    return sorted(rest.difference(*(exams[exam] for exam in whole)) | whole)


def make_split(argv: list[str]) -> int:
    """`prepare.py split`: write lists of labeled, unlabeled, validation and test images as one."""
    parser = Parser("prepare.py split", description=__doc__)
    flag = parser.add_argument
    for role in LISTS:
        optional = "optional: " if role == "test" else ""
        about = f"{optional}the list of {role} images"
        flag(f"--{role}", type=Path, metavar="FILE", required=not optional, help=about)
    flag("--out", type=Path, metavar="FILE.json", required=True, help="the split file to write")
    folder = {"type": Path, "default": Path("data/acdc"), "metavar": "DIR"}
    flag("--root", "--data-root", **folder, help="ACDC, for lists of its frames and slices")
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        raise InputError(f"--out {args.out}: the name must end in .json")
    lists = {}
    for role in LISTS:
        if path := getattr(args, role):
            lists[role] = read_list(path)
            if not lists[role]:
                raise InputError(f"--{role} {path}: lists no image")
    samples = []
    if any(ACDC.fullmatch(name) for names in lists.values() for name in names):
        samples = index(load_spec("acdc"), args.root, "file")
        lists = acdc_ids(lists, samples)
    labeled = {*lists["labeled"]}
    unlabeled = [name for name in lists["unlabeled"] if name not in labeled]
    if count := len(lists["unlabeled"]) - len(unlabeled):
        print(f"{args.unlabeled}: skipped {counted(count, 'image')} also labeled")
    lists["unlabeled"] = unlabeled
    for one, other in combinations(lists, 2):
        if both := sorted({*lists[one]} & {*lists[other]}):
            raise InputError(f"--{one} and --{other} both list {first_ten(both)}")
    if samples:
        by_id = {sample.id: sample for sample in samples}
        check_groups(args.out, {role: map(by_id.get, ids) for role, ids in lists.items()})
        lists = {role: whole_exams(ids, samples) for role, ids in lists.items()}
    utils.check_output(args.out, "--out")
    rows = [f" {json.dumps(role)}: {json.dumps(names)}" for role, names in lists.items()]
    utils.write_atomically(args.out, "{\n" + ",\n".join(rows) + "\n}\n")
    counts = ", ".join(f"{len(names):,} {role}" for role, names in lists.items())
    dataset = f"acdc --data-root {shlex.quote(str(args.root))}" if samples else "DATASET"
    use = f"python main.py --training --dataset {dataset}"
    print(f"{args.out}: {counts}; use it with {use} --split {shlex.quote(str(args.out))}")
    return 0
