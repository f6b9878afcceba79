"""tools/figures.py: what the pictures show is what the runs predicted."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from PIL import Image
from runs import error_line, run

from datasets.cache import decode
from datasets.layouts import index
from datasets.spec import DatasetSpec, load_spec
from engine.pictures import shades
from model import METHODS

pytest.importorskip("matplotlib")
from tools import figures

SMALL = "--dataset tiny.toml --ngf 4 --ndf 2 --n-blocks 1 --workers 0 --device cpu".split()
SMALL += "--size 16 20 --ratio 0.5".split()
A, B, FULL, SEED = (f"checkpoints/{name}" for name in ("a", "b", "full", "seed"))
RUNS = "a", "b", "full"


@pytest.fixture(scope="module")
def four_runs(tmp_path_factory):
    """Runs with the same 6 validation phantoms; `seed` has others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        make_tiny(12, 6)
        for flags in (
            "--name a --epochs 3 --normalization half",
            "--name b --method supervised --epochs 2",
            "--name full --method supervised --epochs 2 --ratio 1",
            "--name seed --method supervised --epochs 2 --seed 1",
        ):
            assert run("--training", *SMALL, *flags.split()) == 0
        yield


@pytest.fixture
def drawn(monkeypatch):
    """A list of the figures drawn from here on."""
    seen = []
    draw = figures.draw_rows
    monkeypatch.setattr(figures, "draw_rows", lambda *args: seen.append(draw(*args)) or seen[-1])
    return seen


def rows(*words: str) -> int:
    return run("rows", *words, tool=figures.figures)


def validation(run: str) -> list[str]:
    return json.loads(Path(run, "split.json").read_text())["val"]


def decoded() -> tuple[DatasetSpec, dict[str, tuple]]:
    """tiny.toml, and its images and masks by id at the networks' size."""
    spec = load_spec("tiny.toml")
    samples = index(spec, Path("none"))
    return spec, {sample.id: decode(sample, spec, (16, 20)) for sample in samples}


def shown_ids(capsys) -> list[str]:
    """The ids that the tool has printed."""
    return re.search("bottom: (.*)\n", capsys.readouterr().out)[1].split(", ")


def panels(figure, path: str) -> list[np.ndarray]:
    """Each panel of a written figure at the networks' size: the middle of each square of pixels."""
    picture, found = np.array(Image.open(path).convert("RGB")), []
    for axes in figure.axes:
        box = axes.get_window_extent()
        bottom, top, left, right = (round(v) for v in (box.y0, box.y1, box.x0, box.x1))
        large = picture[len(picture) - top : len(picture) - bottom, left:right]
        assert large.shape == (256, 320, 3)
        found.append(large[8::16, 8::16])
    return found


def test_rows_show_images_truths_and_the_masks_that_testing_writes(four_runs, drawn, capsys):
    ids = [validation(A)[4], validation(A)[1]]
    assert rows(A, f"{B}/last.pt", FULL, "--out", "new/rows.png", "--ids", *ids) == 0
    assert f"tiny, from top to bottom: {ids[0]}, {ids[1]}\n" in capsys.readouterr().out
    titles = [axes.get_title() for axes in drawn[0].axes[:5]]
    assert titles == ["Image", "Ground truth", "Ours", "Partial", "Full"]
    spec, samples = decoded()
    palette, expected = np.array(spec.palette, np.uint8), []
    for checkpoint in f"{A}/best.pt", f"{B}/last.pt", f"{FULL}/best.pt":
        assert run("--testing", "--checkpoint", checkpoint) == 0
    for name in ids:
        image, truth = samples[name]
        masks = [np.array(Image.open(f"results/{folder}/masks/{name}.png")) for folder in RUNS]
        expected.append((255 * shades(image)).round().byte().permute(1, 2, 0).numpy())
        expected += [palette[mask] for mask in (truth.numpy(), *masks)]
    assert np.array_equal(panels(drawn[0], "new/rows.png"), expected)
    assert len({picture.tobytes() for picture in expected}) == 10  # else a wrong one may not show


def test_by_default_images_of_many_classes_are_shown_and_nothing_else_is_predicted(
    four_runs, drawn, capsys, monkeypatch
):
    segment, predicted = METHODS["supervised"].segment, []

    def recorded(model, x):
        predicted.extend(x)
        return segment(model, x)

    monkeypatch.setattr(METHODS["supervised"], "segment", recorded)
    assert rows(B, "--out", "rows.png", "--n", "2") == 0
    chosen = shown_ids(capsys)
    assert len(predicted) == len(chosen) == 2
    assert len(drawn[0].axes) == 2 * 3
    _, samples = decoded()
    variety = {name: len(samples[name][1].unique()) for name in validation(B)}
    assert min(variety[name] for name in chosen) >= sorted(variety.values())[-2]


def test_the_legend_has_the_classes_that_are_shown_in_their_colors():
    truth = torch.tensor([[[0, 3], [0, 255]]], dtype=torch.uint8)
    masks, image = [truth, torch.tensor([[[0, 2], [0, 0]]])], torch.zeros(1, 2, 2)
    figure = figures.draw_rows([image], ["y", "run"], masks, load_spec("phantom"))
    (legend,) = figure.legends
    names = [text.get_text().strip() for text in legend.get_texts()]
    assert names == ["background", "myocardium", "left ventricle", "ignored"]
    colors = [(255 * np.array(patch.get_facecolor()[:3])).round() for patch in legend.get_patches()]
    expected = [[0, 0, 0], [240, 200, 80], [200, 60, 60], [224, 224, 192]]
    assert np.array_equal(colors, expected)


def test_a_dollar_in_a_name_is_no_formula():
    spec = replace(load_spec("phantom"), classes=(r"$\foo$", "b", "c", "d"))
    mask = torch.zeros(1, 2, 2, dtype=torch.uint8)
    figures.draw_rows([torch.zeros(1, 2, 2)], [r"$\bar$"], [mask], spec).canvas.draw()


@pytest.mark.parametrize("dataset", ["voc", "cityscapes"])
def test_text_overlaps_nothing(dataset):
    spec = load_spec(dataset)
    mask = torch.arange(len(spec.classes)).repeat(8, 4)[None]
    image = torch.zeros(3, 8, mask.shape[-1], dtype=torch.uint8)
    titles = ["Ground truth", "a name of many words for a run", "a_name_without_words_for_a_run"]
    figure = figures.draw_rows([image, image], titles, [torch.cat([mask, mask])] * 3, spec)
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(axes.get_window_extent() for axes in figure.axes)]
    boxes += [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(boxes) == 1 + 8 + 4
    for i, box in enumerate(boxes):
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= 0
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize(
    ("runs", "titles"),
    [
        ("a supervised 0.2|b cyclegan 0.2|c advsemi 0.2|d supervised 1",
         "Partial|Ours|Hung et al.|Full"),
        ("a cyclegan 0.2|b cyclegan 0.125", "Ours, 20%|Ours, 12.5%"),
        ("a supervised 8exams|b supervised 0.2", "Partial, 8exams|Partial, 20%"),
        ("a labeled 0.2|b meanteacher 0.2", "Control|Mean teacher"),
        ("a cyclegan 0.2|b cyclegan 0.2", "a|b"),
        ("a cyclegan 0.2|a cyclegan 0.2", "a/best.pt|a/best.pt"),
    ],
)  # fmt: skip
def test_titles_are_table_1s_as_far_as_they_tell_the_runs_apart(runs, titles):
    named = []
    for text in runs.split("|"):
        folder, method, ratio = text.split()
        control = {"method": "meanteacher", "cutmix_on": "labeled"}
        about = control if method == "labeled" else {"method": method, "cutmix_on": "both"}
        number = None if ratio == "8exams" else float(ratio)
        args = SimpleNamespace(**about, ratio=number, rule=SimpleNamespace(label=ratio))
        named.append(SimpleNamespace(path=Path(folder, "best.pt"), args=args))
    assert figures.titles_of(named) == titles.split("|")


def test_only_images_that_every_run_validates_on_are_shown(four_runs, capsys):
    common = {*validation(A)} & {*validation(SEED)}
    others = [name for name in validation(A) if name not in common]
    assert common
    assert others
    assert rows(A, SEED, "--out", "rows.png", "--n", "99") == 0
    assert {*shown_ids(capsys)} == common
    words = ["rows", A, SEED, "--out", "rows.png", "--ids", others[0]]
    error = error_line(capsys, *words, tool=figures.figures)
    assert f"--ids {others[0]}: not among the {len(common)} images" in error


def test_a_network_whose_outputs_are_not_finite_is_not_drawn(four_runs, capsys):
    state = torch.load(f"{A}/best.pt")
    state["model"] = {key: value.float() * torch.nan for key, value in state["model"].items()}
    torch.save(state, "checkpoints/nan.pt")
    words = ["rows", "checkpoints/nan.pt", "--out", "nan.png"]
    error = error_line(capsys, *words, tool=figures.figures, code=1)
    assert "checkpoints/nan.pt: the network's outputs are not finite" in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("checkpoints/other.pt", "(other at 20x20) cannot be in one figure: they differ in name, "
         "palette, size"),
        ("checkpoints/moved.pt", "cannot be in one figure: they differ in --data-root"),
        (f"{B} --titles one", "--titles: 1 for 2 runs"),
        ("--out x.gif", "--out x.gif"),
        ("--device tpu9", "--device tpu9"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_error_line(four_runs, capsys, words, named):
    state = torch.load(f"{A}/best.pt")
    torch.save(state | {"data_root": "elsewhere"}, "checkpoints/moved.pt")
    state["dataset"] |= {"name": "other", "palette": [[9, 9, 9]] * 4}
    state["settings"]["size"] = [20, 20]
    torch.save(state, "checkpoints/other.pt")
    words = ["rows", "--out", "x.png", A, *words.split()]
    assert named in error_line(capsys, *words, tool=figures.figures)
    assert not Path("x.png").exists()
