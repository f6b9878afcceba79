"""Descriptions of datasets: the committed ones, the keys of a [dataset] table, and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TABLE, error_of, toy_spec

from datasets.spec import dataset_toml, load_spec, make_spec, voc_palette
from utils import IGNORE

OFFICIAL_CITYSCAPES = {  # cityscapesscripts.helpers.labels: the evaluated ids, by their trainId
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip


def write_table(path: Path, table: dict) -> str:
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in table.items()]
    path.write_text("[dataset]\n" + "".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("name", "k", "scored", "void", "channels", "counts", "standard_counts"),
    [
        ("voc", 21, range(1, 21), None, 3, (8994, 1588), (10582, 1449)),
        ("cityscapes", 20, range(19), 19, 3, (2953, 522), (2975, 500)),
        ("acdc", 4, range(4), None, 1, (75, 25), (100, 50)),
        ("phantom", 4, range(4), None, 1, (160, 40), None),
    ],
)
def test_committed_description(name, k, scored, void, channels, counts, standard_counts):
    spec = load_spec(name)
    assert (spec.name, spec.layout, len(spec.classes), len(spec.palette)) == (name, name, k, k)
    assert (spec.scored, spec.void, spec.ignore) == (tuple(scored), void, IGNORE)
    assert (spec.channels, spec.counts, spec.standard_counts) == (channels, counts, standard_counts)


def test_voc_palette_is_the_official_one():
    official = {  # VOCcode/VOClabelcolormap.m
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128),
        8: (64, 0, 0), 13: (192, 0, 128), 16: (0, 64, 0), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    assert {k: voc_palette(256)[k] for k in official} == official
    assert load_spec("voc").palette == voc_palette(21)


def test_toml_file_is_a_dataset_named_by_its_table_or_its_stem(tmp_path):
    spec = load_spec(write_table(tmp_path / "mine.TOML", TABLE))
    assert (spec.name, spec.classes) == ("mine", ("sky", "tree", "cat"))
    assert (spec.palette[1], spec.counts) == ((0, 128, 0), None)
    assert load_spec(write_table(tmp_path / "mine.toml", {**TABLE, "name": "sky"})).name == "sky"


def test_unknown_dataset_is_an_error_that_lists_the_known():
    message = error_of(load_spec, "nope")
    assert all(name in message for name in ("nope", "voc", "cityscapes", "acdc", "phantom"))
    assert "official" not in message  # a preset without a [dataset] table
    assert "gone.toml" in error_of(dataset_toml, "gone.toml")


@pytest.mark.parametrize("content", ["layout = ", "size = [1, 2]\n", "dataset = 3\n"])
def test_file_without_a_dataset_table_is_named(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    assert error_of(load_spec, str(path)).startswith(f"{path}: ")


def test_unknown_key_is_named_with_its_file(tmp_path):
    path = write_table(tmp_path / "a.toml", {**TABLE, "colors": 3})
    assert error_of(load_spec, path).startswith(f"{path}: [dataset] unknown key 'colors'")


def test_missing_key_is_named():
    assert error_of(make_spec, {"layout": "voc"}, "a.toml") == "a.toml: [dataset] lacks 'classes'"


WRONG = {
    "orientation": ["up", {"a": 1}],
    "name": ["a/b", 3, "", ".a", "a\nb"],
    "layout": ["nope"],
    "classes": [["one"], ["sky", "tree", "tree"], ["a", "b\nc", "d"], [1, 2, 3], "abc"],
    "palette": [7, [[0] * 3] * 2, [[0] * 2] * 3, [[0, 0, 256]] * 3],
    "scored": [[], [3], [-1], ["tree"], 1, [1, 1]],
    "channels": [2, "3", True],
    "void": [3],
    "group": ["(", "a", 3],
    "pool": [[], "train", ["trian"]],
    "counts": [[1], [0, 5], 100],
    "standard": [["train"], ["val", "val"], ["train", "dev"], ["train", "val", "val"], "train"],
    "standard_counts": [[1]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_wrong_value_is_named_with_its_key(key, value):
    table = {"name": "a", **TABLE, "layout": "folder", key: value}
    message = error_of(make_spec, table, "a.toml")
    assert message.startswith(f"a.toml: [dataset] {key} is {value!r}; expected ")


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"ignore": 0}, 0),
        ({"void": 2, "scored": [1], "void_ids": [0]}, 0),
        ({"void": 2, "scored": [1], "void_ids": [255]}, 255),
    ],
)
def test_a_value_with_two_meanings_is_an_error_that_names_it(changes, value):
    message = error_of(make_spec, {"name": "a", **TABLE, **changes}, "a.toml")
    assert message.startswith(f"a.toml: [dataset] mask value {value} has two meanings: label_ids,")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("group", "(a)", "a regular expression with a (group), for the layout 'folder'"),
        ("label_ids", 5, "a list of integers"),
        ("label_ids", [0, True, 2], "a list of integers"),
        ("label_ids", [0, 1], "3 values, one per class without void_ids"),
        ("label_ids", [0, 7, 7], "different values; 7 is repeated"),
        ("label_ids", [0, 500, 2**15], "values from -32768 to 32767; 32768 is not"),
        ("label_ids", [0, -(2**15) - 1, 1], "values from -32768 to 32767; -32769 is not"),
        ("void_ids", ["5"], "a list of integers"),
        ("void_ids", [5], "void = 2, the last class, beside it"),
        ("ignore", True, "an integer"),
        ("ignore", 2**15, "values from -32768 to 32767; 32768 is not"),
    ],
)
def test_each_fault_of_mask_values_has_its_own_message(key, value, expected):
    message = error_of(make_spec, {"name": "a", **TABLE, key: value}, "a.toml")
    assert message == f"a.toml: [dataset] {key} is {value!r}; expected {expected}"


def test_void_is_not_scored_by_default_and_never_may_be():
    table = {"name": "a", "layout": "folder", "classes": TABLE["classes"], "void": 2}
    assert make_spec(table, "a.toml").scored == (0, 1)
    assert make_spec({**table, "void_ids": [9]}, "a.toml").mask_values() == (0, 1, 9)
    message = error_of(make_spec, {**table, "scored": [1, 2]}, "a.toml")
    assert message == "a.toml: [dataset] scored contains the void class 2"


def test_lookup_gives_the_class_of_each_value_of_a_mask_file():
    void = {"void": 2, "scored": [0], "void_ids": [0, 200]}
    table = toy_spec(ignore=-1, label_ids=[7, -500], **void).lookup()
    expected = np.full(2**16, -1)
    expected[[7, -500, 0, 200, -1]] = 0, 1, 2, 2, IGNORE
    assert table.tolist() == expected.tolist()


def test_official_cityscapes_ids_become_classes_and_the_rest_void():
    spec = load_spec("cityscapes")
    table = spec.lookup()
    assert table[[*OFFICIAL_CITYSCAPES]].tolist() == list(range(19))
    assert spec.classes[:19] == tuple(OFFICIAL_CITYSCAPES.values())
    assert {table[value] for value in range(34) if value not in OFFICIAL_CITYSCAPES} == {19}
    assert np.flatnonzero(table >= 0).tolist() == [*range(34), 255]
