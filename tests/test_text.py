"""Text files as any editor saves them: the same text, or one error line that names the file."""

import codecs
import json
from pathlib import Path

import pytest
from conftest import error_of, make_acdc

from datasets.layouts import index, read_ids
from datasets.spec import load_spec, read_toml
from datasets.splits import read_lists
from engine.logs import forget_after

LISTS = {"labeled": ["ä 1"], "unlabeled": ["b"], "val": ["c"]}


def read_info(path: Path) -> list[str]:
    """The ids of an exam whose Info.cfg is this file."""
    root = make_acdc(path.parent / "acdc", 1, 1)
    path.replace(root / "training" / "patient001" / "Info.cfg")
    return [sample.id for sample in index(load_spec("acdc"), root)]


def read_log(path: Path) -> str:
    """What a resumed run keeps of its metrics.jsonl."""
    forget_after(path.parent, 1)
    return path.read_text()


READERS = {  # by file name: the reader and a text
    "own.toml": (read_toml, 'a = "ä"\nb = 2\n\n[dataset]\nclasses = ["a", "b"]\n'),
    "split.json": (read_lists, json.dumps(LISTS, ensure_ascii=False, indent=1) + "\n"),
    "train_aug.txt": (read_ids, "2007_000001\nä 2\n\n"),
    "Info.cfg": (read_info, "ED: 1\nES: 12\nGroup: ä\n"),
    "metrics.jsonl": (read_log, '{"epoch": 1, "miou": 0.5}\n{"epoch": 2, "miou": 0.6}\n'),
}


@pytest.mark.parametrize("name", READERS)
def test_a_mark_another_line_end_and_trailing_blanks_are_accepted_in_every_text_file(
    tmp_path, name
):
    read, text = READERS[name]
    variants = [
        text.encode(),
        codecs.BOM_UTF8 + text.encode(),
        text.replace("\n", "\r").encode(),
        codecs.BOM_UTF8 + text.replace("\n", " \t\r\n").encode() + b"  ",
    ]
    contents = []
    for number, content in enumerate(variants):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        contents.append(read(path))
    assert contents[0]
    assert all(content == contents[0] for content in contents)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("utf-16", "UTF-16 or not text; save it as UTF-8"),
        ("utf-16-le", "UTF-16 or not text; save it as UTF-8"),
        ("latin-1", "line 2 has the byte 0xe4, which is not UTF-8; save it as UTF-8"),
    ],
)
def test_another_encoding_is_one_line_that_names_file_and_remedy(tmp_path, name, encoding, reason):
    path = tmp_path / name
    path.write_bytes("\nä\n".encode(encoding))
    assert error_of(READERS[name][0], path).endswith(f"{name}: {reason}")
