"""Arbitrary flags, TOMLs and files: a result or one error line, never a traceback.

No damaged file is read as other data unnoticed.
"""

import io
import json
import shutil
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import make_acdc, make_cityscapes, make_tiny, make_voc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import TINY

import main
from datasets.cache import open_cache
from datasets.layouts import index
from datasets.spec import CONFIG, DatasetSpec, load_spec, read_toml
from engine.flags import build_parser, parse_args
from utils import InputError

PARSER = build_parser()
ACTIONS = [a for a in PARSER._actions if a.option_strings and a.dest not in ("help", "training")]
IN_TOML = [a for a in ACTIONS if a.dest not in PARSER.keys["mode"]]
SMALL = [*TINY, "--epochs", "1"]
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}

odd_numbers = st.sampled_from([0, 1, 0.5, -1, 1e-3, 1e308, 255, 1000])
numbers = st.integers(-3, 2**70) | st.just(10**310) | st.floats() | odd_numbers
odd_words = ["none.pt", "tiny.toml", "a.json", "..", "/", "a\0b", "nan", "1e400", "0x10", "-1"]
choices = [choice for action in ACTIONS for choice in (action.choices or ())]
words = st.text(max_size=12) | st.sampled_from([*choices, *odd_words, "--", "٣"])
scalars = numbers | words | st.booleans()
anything = scalars | st.lists(scalars, max_size=4) | st.dictionaries(words, scalars, max_size=2)


def plausible(action) -> st.SearchStrategy:
    """Values that a flag may well take."""
    if action.choices:
        return st.sampled_from(list(action.choices))
    if action.nargs == 0:
        return st.booleans()
    if action.type is None:
        return st.sampled_from(["a", "b.c", "Übung 1"])
    kinds = {"int": st.integers(1, 64), "odd": st.sampled_from([1, 3, 5])}
    kinds["split_kind"] = st.sampled_from(["paper", "image"])
    one = kinds.get(action.type.__name__, st.floats(0.01, 0.99))
    return st.lists(one, min_size=2, max_size=2) if action.nargs == 2 else one


def settings_of(actions) -> st.SearchStrategy:
    """Tables of a few settings, most of them plausible, some arbitrary."""

    def setting(action) -> st.SearchStrategy:
        usual = plausible(action)
        return st.tuples(st.just(action.dest), st.one_of(usual, usual, usual, anything))

    return st.lists(st.sampled_from(actions).flatmap(setting), max_size=5).map(dict)


@st.composite
def flags(draw) -> list[str]:
    """A command line with some of the program's flags, rarely with similar ones."""
    found = []
    for dest, value in draw(settings_of(ACTIONS)).items():
        name = draw(st.sampled_from([f"--{dest.replace('_', '-')}"] * 9 + ["--epoch", "-x", "--"]))
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        found += [name, *map(str, values)]
    return found


keys = st.sampled_from([a.dest for a in ACTIONS]) | words
tables = st.builds(
    lambda table, wild: table | wild,
    settings_of(IN_TOML),
    st.one_of(st.just({}), st.just({}), st.dictionaries(keys, anything, max_size=2)),
)


@pytest.fixture(autouse=True)
def eight_phantoms(in_tmp) -> None:
    make_tiny(6, 2)


def toml(table: dict) -> str:
    """A TOML of a nested table; numbers that TOML lacks are left as JSON writes them."""
    flat = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in flat.items()]
    nested = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines += [f"[{json.dumps(key)}]\n{toml(value)}" for key, value in nested.items()]
    return "".join(lines)


def write_toml(table: dict) -> None:
    Path("any.toml").write_text(toml(table), encoding="utf-8", errors="replace")


def outcome(*command: str) -> str:
    """A command's exit code, after a check that it has one error line or none."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main.main([*command])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err.getvalue()
    assert len(errors) == (code != 0), err.getvalue()
    return f"exit code {code}"


def refusal(check, *inputs) -> str | None:
    """The message of a check that refuses its inputs; None if it accepts them."""
    try:
        check(*inputs)
    except InputError as error:
        return str(error) or "nothing"
    return None


def show(counts: Counter) -> None:
    print("\n" + ", ".join(f"{n} x {outcome}" for outcome, n in sorted(counts.items())))


def explore(strategy, message_of, named: str = "") -> None:
    """150 drawn inputs: each is accepted, or refused with a message with `named`."""
    counts: Counter = Counter()

    @settings(max_examples=150, **RELAXED)
    @given(strategy)
    def check(drawn):
        message = message_of(drawn)
        assert message is None or (named in message and message != "nothing")
        counts["refused" if message else "accepted"] += 1

    check()
    show(counts)
    assert counts["refused"] > 25
    assert counts["accepted"]  # so what is drawn is TOML


def test_any_flags_are_accepted_or_refused():
    explore(flags(), lambda found: refusal(parse_args, ["--training", *found]))


def test_any_toml_is_accepted_or_refused_by_its_name():
    def message_of(table):
        write_toml(table)
        flags = ["--training", "--dataset", "phantom", "--config", "any.toml"]
        return refusal(parse_args, flags)

    explore(tables, message_of, "any.toml")


def test_any_dataset_table_is_accepted_or_refused_by_its_name():
    good = read_toml(CONFIG / "phantom.toml")["dataset"]
    parts = st.sampled_from([["train"], ["train", "val"]])
    plain = st.integers(0, 5) | st.lists(st.integers(0, 255), max_size=4) | parts

    def message_of(change):
        write_toml({"dataset": {**good, **change}})
        return refusal(load_spec, "any.toml")

    changes = st.tuples(st.sampled_from(DatasetSpec.__match_args__), anything | plain)
    explore(changes.map(lambda change: dict([change])), message_of, "any.toml")


@pytest.mark.slow
def test_any_settings_train_or_end_in_one_error_line():
    counts: Counter = Counter()
    costly = "size ngf ndf n_blocks workers device epochs compile precision".split()
    free = [action for action in IN_TOML if action.dest not in costly]

    @settings(max_examples=150, **RELAXED)
    @given(settings_of(free))
    def check(table):
        write_toml(table)
        for folder in "checkpoints", "results":
            shutil.rmtree(folder, ignore_errors=True)
        places = "--checkpoints", "checkpoints", "--results", "results"
        counts[outcome("--training", "--config", "any.toml", *SMALL, *places)] += 1

    check()
    show(counts)
    assert counts.keys() <= {"exit code 0", "exit code 1", "exit code 2"}
    assert min(counts["exit code 0"], counts["exit code 2"]) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "sizes"),
    [("voc", make_voc, [3]), ("cityscapes", make_cityscapes, [2, 1]), ("acdc", make_acdc, [2, 2])],
)
def test_a_flipped_byte_in_any_file_is_named_or_changes_nothing(tmp_path, name, make, sizes):
    """Only a JPEG's pixels may change unnoticed: the format has no checksum."""
    root = make(tmp_path / "data", *sizes)
    spec, counts, rng = load_spec(name), Counter(), np.random.default_rng(0)

    def read() -> tuple[list[str], bytes, bytes]:
        samples = index(spec, root)
        cache = open_cache(spec, samples, (8, 8), tmp_path / "cache")
        found = [*cache.rows], cache.images.tobytes(), cache.masks.tobytes()
        shutil.rmtree(tmp_path / "cache")
        return found

    clean, files = read(), sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        content = path.read_bytes()
        for place in rng.integers(0, len(content), 40):
            damaged = bytearray(content)
            damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            found = []
            message = refusal(lambda: found.append(read()))  # noqa: B023
            if message is None:
                other = f"other data from a {path.suffix} file"
                counts["read as before" if found == [clean] else other] += 1
            else:
                assert "\n" not in message
                counts["named" if path.name in message else "refused"] += 1
        path.write_bytes(content)
    show(counts)
    assert counts.keys() <= {"read as before", "named", "refused", "other data from a .jpg file"}
    assert counts["named"] > 50
