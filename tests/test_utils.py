"""Metrics against hand counts and torchmetrics; schedule, devices, checkpoints and files."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import error_of, toy_spec
from torch import nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_jaccard_index,
)

import utils
from datasets.spec import DatasetSpec
from utils import (
    IGNORE,
    ConfusionMatrix,
    InputError,
    TrainingError,
    linear_decay,
    segmentation_metrics,
)

PARTS = {
    "settings": {},
    "dataset": {},
    "data_root": "data",
    "split": "0",
    "epoch": 3,
    "model": {"w": torch.ones(2)},
}


def metric_spec(n_classes: int, scored=None, **changes) -> DatasetSpec:
    """A dataset of classes a, b, c, ..."""
    table = {"classes": [*"abcdefgh"[:n_classes]], "palette": [[0, 0, 0]] * n_classes, **changes}
    return toy_spec(scored=[*(scored or range(n_classes))], **table)


# Metrics


def counted(n_classes: int, truth, prediction) -> torch.Tensor:
    matrix = ConfusionMatrix(n_classes)
    matrix.update(torch.tensor(prediction), torch.tensor(truth))
    return matrix.counts


def test_confusion_matrix_has_truth_in_rows_and_leaves_ignored_pixels_out():
    counts = counted(
        3, truth=[[[0, 0, 1], [2, IGNORE, IGNORE]]], prediction=[[[0, 1, 1], [0, 0, 2]]]
    )
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_confusion_matrix_accumulates():
    rng, matrix = torch.Generator().manual_seed(0), ConfusionMatrix(4)
    truth, prediction = (torch.randint(4, (6, 5, 7), generator=rng) for _ in range(2))
    for part in slice(0, 1), slice(1, 4), slice(4, 6):
        matrix.update(prediction[part], truth[part])
    assert matrix.counts.sum() == truth.numel()
    assert torch.equal(matrix.counts, counted(4, truth.tolist(), prediction.tolist()))


def test_metrics_agree_with_torchmetrics_on_masks_with_ignored_pixels():
    rng = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(5, (3, 20, 30), generator=rng) for _ in range(2))
    truth[torch.rand(truth.shape, generator=rng) < 0.3] = IGNORE
    found = segmentation_metrics(counted(5, truth.tolist(), prediction.tolist()), metric_spec(5))
    of_classes = {"num_classes": 5, "average": "none", "ignore_index": IGNORE}
    expected_iou = multiclass_jaccard_index(prediction, truth, **of_classes)
    torch.testing.assert_close(torch.tensor([*found["iou"].values()]), expected_iou)
    torch.testing.assert_close(
        torch.tensor([*found["dice"].values()]),
        multiclass_f1_score(prediction, truth, **of_classes),
    )
    accuracy = multiclass_accuracy(
        prediction, truth, num_classes=5, average="micro", ignore_index=IGNORE
    )
    assert found["pixel_accuracy"] == pytest.approx(accuracy.item())
    assert (
        found["miou"]
        == found["miou_all"]
        == found["miou_official"]
        == pytest.approx(expected_iou.mean().item())
    )


def test_metrics_by_hand_where_truth_is_void_or_ignored():
    # judged: a as a, b as a; the pixels whose truth is void (c) or ignored are predicted b
    counts = counted(3, truth=[[0, 1], [2, IGNORE]], prediction=[[0, 0], [1, 1]])
    found = segmentation_metrics(counts, metric_spec(3, scored=[0, 1], void=2))
    assert found["iou"] == {"a": 1 / 2, "b": 0, "c": None}
    assert found["dice"] == {"a": 2 / 3, "b": 0, "c": None}
    assert (found["miou"], found["pixel_accuracy"]) == (1 / 4, 1 / 2)
    assert found["miou_all"] == pytest.approx(
        1 / 6
    )  # the void pixel counts: b and c are 0 / 2 and 0 / 1


def test_void_predicted_on_a_real_class_is_a_miss():
    counts = counted(3, truth=[[0, 0], [1, 1]], prediction=[[0, 2], [1, 1]])
    found = segmentation_metrics(counts, metric_spec(3, scored=[0, 1], void=2))
    assert found["iou"] == {"a": 1 / 2, "b": 1, "c": None}
    assert found["dice"]["a"] == 2 / 3
    assert (found["miou"], found["pixel_accuracy"], found["miou_official"]) == (3 / 4, 3 / 4, 1)


def test_metrics_do_not_change_the_counts():
    counts = counted(3, truth=[0, 1, 2, 2], prediction=[0, 1, 2, 1])
    before = counts.clone()
    segmentation_metrics(counts, metric_spec(3, scored=[0, 1], void=2))
    assert torch.equal(counts, before)


def test_official_miou_does_not_see_foreground_missed_as_background():
    # background a is not scored; of b's ten pixels one is found, nine are called background
    counts = counted(2, truth=[0] * 10 + [1] * 10, prediction=[0] * 19 + [1])
    found = segmentation_metrics(counts, metric_spec(2, scored=[1]))
    assert found["miou_official"] == 1
    assert found["miou"] == 1 / 10
    assert found["miou_all"] == pytest.approx((10 / 19 + 1 / 10) / 2)


def test_miou_is_the_mean_of_the_scored_classes_alone():
    counts = torch.diag(torch.tensor([5, 5, 5]))
    counts[0, 1] = 5  # a: 5 / 10, b: 5 / 10, c: 1
    assert segmentation_metrics(counts, metric_spec(3, scored=[1, 2]))["miou"] == 3 / 4


def test_absent_class_is_none_and_out_of_every_mean():
    counts = counted(4, truth=[0, 0, 1, 1], prediction=[0, 0, 1, 2])
    found = segmentation_metrics(counts, metric_spec(4))
    assert found["iou"] == {"a": 1, "b": 1 / 2, "c": 0, "d": None}  # c was predicted: 0, not None
    assert found["dice"] == {"a": 1, "b": 2 / 3, "c": 0, "d": None}
    assert found["miou"] == found["miou_all"] == found["miou_official"] == 1 / 2


def test_nothing_counted_gives_none_everywhere():
    found = segmentation_metrics(torch.zeros(2, 2, dtype=torch.int64), metric_spec(2))
    assert {found[key] for key in ("miou", "miou_all", "miou_official", "pixel_accuracy")} == {None}
    assert {*found["iou"].values(), *found["dice"].values()} == {None}


def test_means_are_one_line_and_0_where_nothing_was_counted():
    metrics = {"miou": 0.12345, "miou_all": None, "miou_official": 1, "constant": None}
    expected = "mIoU 0.1235, every class 0.0000, as released 1.0000"
    assert utils.format_means(metrics) == expected


def test_means_equal_to_the_first_are_not_repeated():
    metrics = {"miou": 0.25, "miou_all": 0.25, "miou_official": 0.5, "constant": None}
    assert utils.format_means(metrics) == "mIoU 0.2500, as released 0.5000"
    assert utils.format_means({**metrics, "miou_official": 0.25}) == "mIoU 0.2500"


def test_foreground_means_leave_out_a_scored_background_alone():
    classes = {"classes": ["background", "b", "c"]}
    counts = counted(3, truth=[0, 0, 1, 1, 2, 2], prediction=[0, 0, 1, 0, 2, 2])
    found = segmentation_metrics(counts, metric_spec(3, **classes))
    assert found["miou_foreground"] == (1 / 2 + 1) / 2
    assert found["dice_foreground"] == pytest.approx((2 / 3 + 1) / 2)
    assert ["without", "background", "75.00", "83.33"] in [
        line.split() for line in utils.format_metrics(found).splitlines()
    ]
    for spec in metric_spec(3), metric_spec(3, scored=[1, 2], **classes):
        assert "miou_foreground" not in segmentation_metrics(counts, spec)


def test_a_single_predicted_class_is_said_to_be_what_that_scores():
    counts = counted(3, truth=[0, 0, 1, 2], prediction=[0, 0, 0, 0])
    found = segmentation_metrics(counts, metric_spec(3))
    assert found["constant"] == "a"
    expected = "predicts a alone: mIoU 0.167 is what that scores"
    assert utils.format_metrics(found).splitlines()[-1] == expected
    assert utils.format_means(found) == "mIoU 0.1667, predicts a alone"
    counts = counted(3, truth=[0, 0, 1, 2], prediction=[0, 0, 0, 1])
    assert segmentation_metrics(counts, metric_spec(3))["constant"] is None


def test_printed_table_is_in_percent_with_a_dash_for_none():
    found = segmentation_metrics(
        counted(4, truth=[0, 0, 1, 1], prediction=[0, 0, 1, 2]), metric_spec(4)
    )
    table = utils.format_metrics(found)
    rows = [line.rsplit(None, 2) for line in table.splitlines()]
    assert ["b", "50.00", "66.67"] in rows
    assert ["d", "-", "-"] in rows
    assert table.count("50.00") == 2  # b and the mean, which the other two equal
    assert "Dice (pooled)" in table.splitlines()[0]
    assert rows[-1][-1] == "75.00"  # pixel accuracy


# Training


@pytest.mark.parametrize(
    ("epochs", "decay_epoch", "epoch", "factor"),
    [
        (400, 100, 0, 1),
        (400, 100, 100, 1),
        (400, 100, 101, 299 / 300),
        (400, 100, 250, 1 / 2),
        (400, 100, 399, 1 / 300),
        (400, 100, 400, 0),
        (4, 0, 0, 1),
        (4, 0, 1, 3 / 4),
        (4, 4, 3, 1),
        (4, 4, 4, 0),
        (4, 4, 5, 0),
    ],
)
def test_learning_rate_is_constant_then_falls_linearly_to_zero(epochs, decay_epoch, epoch, factor):
    assert linear_decay(epochs, decay_epoch)(epoch) == pytest.approx(factor)


def test_linear_decay_stays_within_an_epoch():
    factor = linear_decay(4, 1)
    assert [factor(step / 4) for step in range(16)] == [1] * 8 + [2 / 3] * 4 + [1 / 3] * 4


def test_same_seed_gives_the_same_numbers():
    drawn = []
    for seed in 1, 1, 2:
        utils.seed_everything(seed)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_deterministic_kernels_are_a_choice():
    try:
        for deterministic in True, False:
            utils.seed_everything(0, deterministic)
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_wrong_device_is_named():
    for name in "nonsense", "cuda:99":
        with pytest.raises(InputError, match=f"--device {name}"):
            utils.pick_device(name, "fp32")


def test_default_device_is_the_gpu_where_there_is_one():
    assert utils.pick_device(None, "fp32").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert utils.pick_device("cpu", "fp32").type == "cpu"


def test_cuda_is_the_gpu_of_the_process(monkeypatch):
    set_device, chosen = torch.cuda.set_device, []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch, "empty", lambda _size, device: None)
    utils.pick_device("cuda", "fp32")
    monkeypatch.setenv("LOCAL_RANK", "3")
    utils.pick_device("cuda", "fp32")
    assert chosen == ["cuda:0", "cuda:3"]
    with pytest.raises(ValueError, match="index"):  # so a number is needed
        set_device(torch.device("cuda"))


def test_tf32_is_a_choice():
    for precision, expected in ("tf32", ("high", True)), ("fp32", ("highest", False)):
        utils.pick_device("cpu", precision)
        found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert found == expected


def test_a_share_is_the_count_over_the_processes_and_of_at_least_one(monkeypatch):
    assert utils.share(torch.tensor(6)) == 6
    assert utils.share(torch.tensor(0)) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert utils.share(torch.tensor(6)) == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; in training, half the --batch-size"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate"),
            "out of memory; in training, half the",
        ),
        (RuntimeError("[enforce fail] not enough memory"), "out of memory; in training, half the"),
        (
            torch.distributed.DistNetworkError("reset"),
            "the connection between the processes failed (reset)",
        ),
        (
            RuntimeError("[../gloo/transport] Connection closed\nat line 5"),
            "the connection between the processes failed ([../gloo/transport] Connection closed)",
        ),
    ],
)
def test_failures_of_the_machine_have_a_message_of_their_own(error, message):
    assert utils.failure(error).startswith(message)


def test_a_defect_of_the_program_has_none():
    for error in ValueError("shapes differ"), RuntimeError("/data/gloomy: shapes differ"):
        assert utils.failure(error) is None


# Files


def test_write_creates_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    for content, expected in ("Süd", "Süd".encode()), (b"\0\n", b"\0\n"), ("", b""):
        utils.write_atomically(path, content)
        assert path.read_bytes() == expected
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    utils.save_checkpoint(path, {"epoch": 1})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(TrainingError, match="last.pt: .*No space.* MiB are needed"):
        utils.save_checkpoint(path, {"epoch": 2})
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    for name in "fsync", "replace":
        step = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, step=step: (steps.append(name), step(*args))
        )
    utils.write_atomically(tmp_path / "a", b"x")
    assert steps == ["fsync", "replace"]


def test_checkpoint_gives_back_tensors_and_plain_values(tmp_path):
    optimizer = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    state = {
        **PARTS,
        "miou": 0.5,
        "nothing": None,
        "args": {"size": [8, 8], "name": "é", "compile": False},
        "optimizer": optimizer.state_dict(),
        "weights": {
            "half": torch.rand(2).half(),
            "long": torch.tensor(2**40),
            "float": torch.rand(3, 4),
        },
    }
    utils.save_checkpoint(tmp_path / "a.pt", state)
    loaded = utils.load_checkpoint(tmp_path / "a.pt")
    assert {key: loaded[key] for key in ("epoch", "miou", "nothing", "args")} == {
        key: state[key] for key in ("epoch", "miou", "nothing", "args")
    }
    for key, value in state["weights"].items():
        assert loaded["weights"][key].dtype == value.dtype
        assert torch.equal(loaded["weights"][key], value)
    assert torch.equal(
        loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrong", [None, [1]])
def test_checkpoint_that_lacks_a_part_is_an_error_that_names_it(tmp_path, part, wrong):
    utils.save_checkpoint(tmp_path / "a.pt", {**PARTS, part: wrong})
    with pytest.raises(InputError, match=f"a.pt: lacks {part}"):
        utils.load_checkpoint(tmp_path / "a.pt")


def test_weights_that_are_no_tensors_are_an_error(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pt", {**PARTS, "model": {"G_IS.layers.1.weight": 3}})
    with pytest.raises(InputError, match="a.pt: lacks weights"):
        utils.load_checkpoint(tmp_path / "a.pt")


def test_a_flipped_bit_in_a_checkpoints_tensor_is_found(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.arange(1000.0)
    utils.save_checkpoint(path, {**PARTS, "model": {"w": weights}})
    content = bytearray(path.read_bytes())
    place = content.index(weights.numpy().tobytes()) + 2001
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.pt: damaged"):
        utils.load_checkpoint(path)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["SEG_TEST_MARK"],)


@pytest.mark.parametrize(
    "kind",
    ["gone", "folder", "empty", "text", "bytes", "cut", "other dict", "list", "code", "pickle"],
)
def test_file_that_is_no_checkpoint_is_named_and_never_run(tmp_path, monkeypatch, kind):
    path, mark = tmp_path / "best.pt", tmp_path / "mark"
    monkeypatch.setenv("SEG_TEST_MARK", str(mark))
    write = {
        "gone": lambda: None,
        "folder": path.mkdir,
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text("epoch = 3\n"),
        "bytes": lambda: path.write_bytes(bytes(range(256)) * 40),
        "cut": lambda: (
            torch.save(torch.rand(99), path),
            path.write_bytes(path.read_bytes()[:700]),
        ),
        "other dict": lambda: torch.save({"state_dict": {}}, path),
        "list": lambda: torch.save([torch.rand(2)], path),
        "code": lambda: torch.save({"format": utils.CHECKPOINT_FORMAT, "x": Code()}, path),
        "pickle": lambda: path.write_bytes(
            pickle.dumps({"format": utils.CHECKPOINT_FORMAT, "x": Code()})
        ),
    }
    write[kind]()
    assert error_of(utils.load_checkpoint, path).startswith(f"checkpoint {path}: ")
    assert not mark.exists()


def test_a_checkpoint_of_the_earlier_format_is_told_apart(tmp_path):
    torch.save({**PARTS, "format": 1}, tmp_path / "a.pt")
    message = error_of(utils.load_checkpoint, tmp_path / "a.pt")
    assert message.startswith(f"checkpoint {tmp_path / 'a.pt'}: from an earlier version (format 1)")


def test_weights_are_loaded_where_they_fit():
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    utils.load_weights(target, source.state_dict(), "a.pt")
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = network[0].weight.clone()
    weights = nn.Sequential(
        nn.Linear(2, 3), nn.Linear(4, 1, bias=False), nn.Linear(1, 1)
    ).state_dict()
    with pytest.raises(InputError) as caught:
        utils.load_weights(network, weights, Path("runs/a.pt"))
    message = str(caught.value)
    assert message.startswith("runs/a.pt: ")
    assert all(
        key in message for key in ("1.weight", "(1, 4)", "(1, 3)", "1.bias", "2.weight", "2.bias")
    )
    assert "0.weight" not in message
    assert torch.equal(network[0].weight, before)


@pytest.mark.parametrize("change", ["more", "fewer", "wider"])
def test_each_difference_in_the_weights_is_an_error(change):
    weights = nn.Linear(2, 3).state_dict()
    if change == "more":
        weights["scale"] = torch.ones(1)
    elif change == "fewer":
        del weights["bias"]
    else:
        weights["weight"] = torch.ones(3, 3)
    named = {"more": "scale", "fewer": "bias", "wider": "weight"}[change]
    with pytest.raises(InputError, match=f"a.pt: .*{named}"):
        utils.load_weights(nn.Linear(2, 3), weights, "a.pt")


def test_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    utils.make_folder(tmp_path / "a" / "b", "--results")
    assert [*(tmp_path / "a" / "b").iterdir()] == []


def test_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path):
    (tmp_path / "a").write_text("in the way")
    for path in tmp_path / "a", tmp_path / "a" / "b":
        with pytest.raises(InputError, match="--results") as caught:
            utils.make_folder(path, "--results")
        assert str(path) in str(caught.value)


def test_first_ten_names_ten_and_counts_the_rest():
    names = [f"f{i:02d}" for i in range(12)]
    assert utils.first_ten(names[:1]) == "f00"
    assert utils.first_ten(names[:10]) == "f00; f01; f02; f03; f04; f05; f06; f07; f08; f09"
    assert utils.first_ten(names[:11]) == "; ".join(names[:10]) + "; and 1 more"
    assert utils.first_ten(iter(names)).endswith("f09; and 2 more")
