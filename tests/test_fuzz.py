"""Whatever flags, TOMLs and files say: a result or one error line, never a traceback, never other data unnoticed."""

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

import data_utils
import main
from utils import InputError, to_toml

ACTIONS = [a for a in main.build_parser()._actions if a.option_strings and a.dest not in ("help", "training")]
SMALL = "--training --dataset tiny.toml --size 16 16 --ngf 2 --ndf 2 --n-blocks 1 --workers 0 --device cpu --epochs 1"
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}

numbers = st.integers(-3, 2**70) | st.floats() | st.sampled_from([0, 1, 0.5, -1, 1e-3, 1e308, 255, 1000])
words = st.text(max_size=12) | st.sampled_from(
    [c for a in ACTIONS for c in (a.choices or ())]
    + ["none.pt", "tiny.toml", "..", "/", "a\0b", "nan", "1e400", "0x10", "-1", "--", "٣"]
)
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
    one = st.integers(1, 64) if action.type.__name__ == "int" else st.floats(0.01, 0.99)
    return st.lists(one, min_size=2, max_size=2) if action.nargs == 2 else one


def settings_of(actions) -> st.SearchStrategy:
    """Tables of a few settings: most of them plausible, some anything."""
    one = st.sampled_from(actions).flatmap(
        lambda a: st.tuples(st.just(a.dest), st.one_of(plausible(a), plausible(a), plausible(a), anything))
    )
    return st.lists(one, max_size=5).map(dict)


@st.composite
def flags(draw) -> list[str]:
    """A command line of some of the program's flags, seldom of something like them."""
    found = []
    for dest, value in draw(settings_of(ACTIONS)).items():
        name = draw(st.sampled_from([f"--{dest.replace('_', '-')}"] * 9 + ["--epoch", "-x", "--"]))
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        found += [name, *map(str, values)]
    return found


keys = st.sampled_from([a.dest for a in ACTIONS]) | words
tables = st.builds(
    lambda table, methods, wild: table | methods | wild,
    settings_of([a for a in ACTIONS if a.dest not in main.NOT_IN_TOML]),
    st.dictionaries(st.sampled_from(list(main.METHODS)), settings_of(ACTIONS), max_size=1),
    st.one_of(st.just({}), st.just({}), st.dictionaries(keys, anything, max_size=2)),
)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """A folder of its own, with tiny.toml: 8 phantoms."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.stop, "signum", 0)
    make_tiny(6, 2)


def toml(table: dict) -> str:
    """A TOML of a nested table; numbers that TOML cannot say are left as they come."""
    flat = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in flat.items()]
    nested = {key: value for key, value in table.items() if isinstance(value, dict)}
    return "".join(lines) + "".join(f"[{json.dumps(key)}]\n{toml(value)}" for key, value in nested.items())


def outcome(*command: str) -> str:
    """How a command ends: its exit code, which has one error line or none."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main.main([*command])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err.getvalue()
    assert len(errors) == (code != 0), err.getvalue()
    return f"exit code {code}"


def refusal(check, *inputs) -> str | None:
    """What a check of input says that refuses it; None where it does not."""
    try:
        check(*inputs)
    except InputError as error:
        return str(error) or "nothing"
    return None


def counted(counts: Counter) -> None:
    print("\n" + ", ".join(f"{n} x {what}" for what, n in sorted(counts.items())))


def explore(strategy, said_of, named: str = "") -> None:
    """Three hundred drawn inputs: each is understood, or refused in words that hold `named`."""
    counts: Counter = Counter()

    @settings(max_examples=300, **RELAXED)
    @given(strategy)
    def check(drawn):
        said = said_of(drawn)
        assert said is None or (named in said and said != "nothing")
        counts["refused" if said else "understood"] += 1

    check()
    counted(counts)
    assert counts["refused"] > 50


def test_any_flags_are_understood_or_refused():
    explore(flags(), lambda found: refusal(main.parse_args, ["--training", *found]))


def test_any_toml_is_understood_or_refused_by_its_name():
    def said_of(table):
        Path("any.toml").write_text(toml(table), encoding="utf-8", errors="replace")
        return refusal(main.parse_args, ["--training", "--dataset", "phantom", "--config", "any.toml"])

    explore(tables, said_of, "any.toml")


def test_any_dataset_table_is_understood_or_refused_by_its_name():
    good = data_utils.read_toml(data_utils.CONFIG / "phantom.toml")["dataset"]
    parts = st.sampled_from([["train"], ["train", "val"]])
    plain = st.integers(0, 5) | st.lists(st.integers(0, 255), max_size=4) | parts

    def said_of(change):
        Path("any.toml").write_text(toml({"dataset": {**good, **change}}), encoding="utf-8", errors="replace")
        return refusal(data_utils.load_spec, "any.toml")

    changes = st.tuples(st.sampled_from(data_utils.DatasetSpec.__match_args__), anything | plain)
    explore(changes.map(lambda change: dict([change])), said_of, "any.toml")


@pytest.mark.slow
def test_any_settings_train_or_end_in_one_error_line():
    counts: Counter = Counter()
    costly = "overwrite testing size ngf ndf n_blocks workers device epochs compile precision".split()
    free = [a for a in ACTIONS if a.dest not in costly and a.dest not in main.NOT_IN_TOML]

    @settings(max_examples=150, **RELAXED)
    @given(settings_of(free))
    def check(table):
        Path("any.toml").write_text(toml(table), encoding="utf-8", errors="replace")
        for folder in "checkpoints", "results":
            shutil.rmtree(folder, ignore_errors=True)
        places = "--checkpoints", "checkpoints", "--results", "results"
        counts[outcome("--config", "any.toml", *SMALL.split(), *places)] += 1

    check()
    counted(counts)
    assert counts.keys() <= {"exit code 0", "exit code 1", "exit code 2"}
    assert min(counts["exit code 0"], counts["exit code 2"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc", "cityscapes", "acdc"])
def test_a_flipped_byte_in_any_file_is_named_or_changes_nothing(tmp_path, name):
    """Only a JPEG's pixels may change unnoticed: the format has no checksum."""
    root = {
        "voc": lambda: make_voc(tmp_path / "data", 3),
        "cityscapes": lambda: make_cityscapes(tmp_path / "data", 2, 1),
        "acdc": lambda: make_acdc(tmp_path / "data", 2, 2),
    }[name]()
    spec, counts, rng = data_utils.load_spec(name), Counter(), np.random.default_rng(0)

    def read() -> tuple[list[str], bytes, bytes]:
        samples = data_utils.index(spec, root)
        cache = data_utils.open_cache(spec, samples, (8, 8), tmp_path / "cache")
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
            said = refusal(lambda: found.append(read()))  # noqa: B023
            if said is None:
                counts["read as before" if found == [clean] else f"other data from a {path.suffix} file"] += 1
            else:
                assert "\n" not in said
                counts["named" if path.name in said else "refused"] += 1
        path.write_bytes(content)
    counted(counts)
    assert counts.keys() <= {"read as before", "named", "refused", "other data from a .jpg file"}
    assert counts["named"] > 50


def test_the_tables_that_are_drawn_are_toml():
    assert toml({"a": 1, "b": {"c": [0.5, "x"]}}) == to_toml({"a": 1}).replace("a", '"a"') + '["b"]\n"c" = [0.5, "x"]\n'
