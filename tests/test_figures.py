"""tools/figures.py: what the pictures show is what the runs predicted."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from PIL import Image

import data_utils
import main
from datasets.cache import decode
from datasets.layouts import index
from datasets.spec import load_spec
from engine import program
from engine.pictures import shades
from model import METHODS

pytest.importorskip("matplotlib")
from tools import figures

SMALL = "--dataset tiny.toml --ngf 4 --ndf 2 --n-blocks 1 --workers 0 --device cpu".split()
A, B, FULL, LARGE, SEED = (f"checkpoints/{name}" for name in ("a", "b", "full", "large", "seed"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs with the same 6 validation phantoms; `seed` has others, `large` another size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        make_tiny(12, 6)
        partial = ["--method", "supervised", "--epochs", "2"]
        for flags in (
            [
                "--name",
                "a",
                "--ratio",
                "0.5",
                "--epochs",
                "3",
                "--size",
                "16",
                "20",
                "--normalization",
                "half",
            ],
            ["--name", "b", "--ratio", "0.5", "--size", "16", "20", *partial],
            ["--name", "full", "--ratio", "1", "--size", "16", "20", *partial],
            ["--name", "large", "--ratio", "0.5", "--size", "20", "20", *partial],
            ["--name", "seed", "--ratio", "0.5", "--size", "16", "20", "--seed", "1", *partial],
        ):
            assert main.main(["--training", *SMALL, *flags]) == 0
        yield


@pytest.fixture
def drawn(monkeypatch):
    """A list of the figures drawn from here on."""
    seen = []
    draw = figures.draw_rows
    monkeypatch.setattr(figures, "draw_rows", lambda *args: seen.append(draw(*args)) or seen[-1])
    return seen


def run(*words: str) -> int:
    return program.execute(figures.figures, list(words))


def error_of(capsys, *words: str) -> str:
    """The one error line of a command that must end with exit code 2."""
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def validation(run: str) -> list[str]:
    return json.loads(Path(run, "split.json").read_text())["val"]


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


def test_rows_show_images_truths_and_the_masks_that_testing_writes(runs, drawn, capsys):
    ids = [validation(A)[4], validation(A)[1]]
    assert run("rows", A, f"{B}/last.pt", FULL, "--out", "new/rows.png", "--ids", *ids) == 0
    assert f"tiny, from top to bottom: {ids[0]}, {ids[1]}\n" in capsys.readouterr().out
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes[:5]] == [
        "Image",
        "Ground truth",
        "Ours",
        "Partial",
        "Full",
    ]
    shown = panels(figure, "new/rows.png")
    assert len(shown) == 2 * 5

    spec, shapes = load_spec("tiny.toml"), set()
    samples = {sample.id: sample for sample in index(spec, Path("none"))}
    for row, name in enumerate(ids):
        image, truth = decode(samples[name], spec, (16, 20))
        palette = np.array(spec.palette, np.uint8)
        gray = (255 * shades(image)).round().byte().permute(1, 2, 0).numpy()
        expected = [gray, palette[truth.numpy()]]
        for checkpoint in f"{A}/best.pt", f"{B}/last.pt", f"{FULL}/best.pt":
            assert main.main(["--testing", "--checkpoint", checkpoint]) == 0
            mask = np.array(
                Image.open(Path("results") / Path(checkpoint).parent.name / "masks" / f"{name}.png")
            )
            shapes.add(mask.tobytes())
            expected.append(palette[mask])
        for column in range(5):
            assert (shown[5 * row + column] == expected[column]).all(), (row, column)
    assert len(shapes) == 6  # else a wrong column would not show


def test_by_default_images_of_many_classes_are_shown_and_nothing_else_is_predicted(
    runs, drawn, capsys, monkeypatch
):
    segment, predicted = METHODS["supervised"].segment, []
    monkeypatch.setattr(
        METHODS["supervised"],
        "segment",
        lambda s, x: predicted.append(len(x)) or segment(s, x),
    )
    assert run("rows", B, "--out", "rows.png", "--n", "2") == 0
    chosen = re.search("bottom: (.*)\n", capsys.readouterr().out)[1].split(", ")
    assert sum(predicted) == len(chosen) == 2
    assert len(drawn[0].axes) == 2 * 3
    spec = load_spec("tiny.toml")
    samples = {sample.id: sample for sample in index(spec, Path("none"))}
    variety = {
        name: len(decode(samples[name], spec, (16, 20))[1].unique()) for name in validation(B)
    }
    assert min(variety[name] for name in chosen) >= sorted(variety.values())[-2]
    assert run("rows", B, "--out", "rows.png", "--n", "99") == 0
    assert len(drawn[1].axes) == 6 * 3


def test_each_network_sees_the_images_as_it_was_trained(runs, monkeypatch):
    seen, normalize = [], data_utils.normalize
    monkeypatch.setattr(
        data_utils, "normalize", lambda x, kind: seen.append(kind) or normalize(x, kind)
    )
    assert run("rows", B, A, FULL, "--out", "rows.png") == 0
    assert seen == ["range", "half", "range"]


def test_the_legend_has_the_classes_that_are_shown_in_their_colours():
    spec = load_spec("phantom")
    masks = [
        torch.tensor([[[0, 3], [0, 255]]], dtype=torch.uint8),
        torch.tensor([[[0, 2], [0, 0]]]),
    ]
    figure = figures.draw_rows([torch.zeros(1, 2, 2, dtype=torch.uint8)], ["y", "run"], masks, spec)
    (legend,) = figure.legends
    names = [text.get_text().strip() for text in legend.get_texts()]
    assert names == ["background", "myocardium", "left ventricle", "ignored"]
    colours = [
        [round(255 * v) for v in patch.get_facecolor()[:3]] for patch in legend.get_patches()
    ]
    assert colours == [[0, 0, 0], [240, 200, 80], [200, 60, 60], [224, 224, 192]]


def test_deep_images_are_shown_from_their_darkest_to_their_brightest_value():
    image = torch.tensor([[[100.0, 300.0], [200.0, 100.0]]]).repeat(1, 50, 50)
    masks = [torch.zeros(2, 100, 100, dtype=torch.uint8)]
    flat = torch.full((1, 100, 100), 7.0)
    figure = figures.draw_rows([image, flat], ["y"], masks, load_spec("phantom"))
    shown = figure.axes[0].images[0].get_array()[:2, :2, 0]
    assert shown.tolist() == [[0, 255], [128, 0]]
    assert figure.axes[2].images[0].get_array().max() == 0


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
    ("runs_", "titles"),
    [
        (
            ["a supervised 0.2", "b cyclegan 0.2", "c advsemi 0.2", "d supervised 1"],
            "Partial|Ours|Hung et al.|Full",
        ),
        (["a cyclegan 0.2", "b cyclegan 0.125"], "Ours, 20%|Ours, 12.5%"),
        (["a cyclegan 0.2", "b cyclegan 0.2"], "a|b"),
        (["a cyclegan 0.2", "a cyclegan 0.2"], "a/best.pt|a/best.pt"),
    ],
)
def test_titles_are_table_1s_as_far_as_they_tell_the_runs_apart(runs_, titles):
    named = []
    for text in runs_:
        folder, method, ratio = text.split()
        named.append(
            SimpleNamespace(
                path=Path(folder, "best.pt"),
                args=SimpleNamespace(method=method, ratio=float(ratio)),
            )
        )
    assert figures.titles_of(named) == titles.split("|")


def test_only_images_that_every_run_validates_on_are_shown(runs, capsys):
    common = {*validation(A)} & {*validation(SEED)}
    others = [name for name in validation(A) if name not in common]
    assert common
    assert others
    assert run("rows", A, SEED, "--out", "rows.png", "--n", "99") == 0
    assert {*re.search("bottom: (.*)\n", capsys.readouterr().out)[1].split(", ")} == common
    error = error_of(capsys, "rows", A, SEED, "--out", "rows.png", "--ids", others[0])
    assert f"--ids {others[0]}: not among the {len(common)} images" in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            f"rows {A} {LARGE}",
            "large/best.pt (tiny at 20x20) cannot be in one figure: they differ in size",
        ),
        (
            f"rows {A} checkpoints/other.pt",
            "(other at 16x20) cannot be in one figure: they differ in name, palette",
        ),
        (f"rows {A} --ids phantom_9999", "--ids phantom_9999"),
        (f"rows {A} {B} --titles one", "--titles: 1 for 2 runs"),
        (f"rows {A} --n 0", "--n"),
        (f"rows {A} --out x.gif", "--out x.gif"),
        (f"rows {A} --device tpu9", "--device tpu9"),
        ("rows nothere", "checkpoint nothere: no such file"),
        (f"curves {A}", "curves"),
        (f"heatmap {A}", "heatmap"),
    ],
)
def test_a_wrong_command_is_one_error_line(runs, capsys, words, named):
    state = torch.load(f"{A}/best.pt")
    state["dataset"] |= {"name": "other", "palette": [[9, 9, 9]] * 4}
    torch.save(state, "checkpoints/other.pt")
    words = words.split()
    assert named in error_of(capsys, *words, *([] if "--out" in words else ["--out", "x.png"]))
    assert not Path("x.png").exists()
