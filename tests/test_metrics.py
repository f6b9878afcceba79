"""Metrics against hand counts and torchmetrics (Section 4.2)."""

import pytest
import torch
from conftest import toy_spec
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_jaccard_index,
)

from datasets.spec import DatasetSpec
from engine.metrics import ConfusionMatrix, format_means, format_metrics, segmentation_metrics
from utils import IGNORE


def metric_spec(n_classes: int, scored=None, **changes) -> DatasetSpec:
    """A dataset of classes a, b, c, ..."""
    table = {"classes": [*"abcdefgh"[:n_classes]], "palette": [[0, 0, 0]] * n_classes, **changes}
    return toy_spec(scored=[*(scored or range(n_classes))], **table)


def counted(n_classes: int, truth, prediction) -> torch.Tensor:
    matrix = ConfusionMatrix(n_classes)
    matrix.update(torch.tensor(prediction), torch.tensor(truth))
    return matrix.counts


def test_confusion_matrix_adds_up_with_truth_in_rows_and_without_ignored_pixels():
    matrix = ConfusionMatrix(3)
    for prediction in [0, 1, 1, 2, 0], [0, 0, 1, 2, 0]:
        matrix.update(torch.tensor(prediction), torch.tensor([0, 0, 1, IGNORE, 2]))
    assert matrix.counts.dtype == torch.int64
    assert matrix.counts.tolist() == [[3, 1, 0], [0, 2, 0], [2, 0, 0]]


def test_metrics_agree_with_torchmetrics_on_masks_with_ignored_pixels():
    rng = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(5, (3, 20, 30), generator=rng) for _ in range(2))
    truth[torch.rand(truth.shape, generator=rng) < 0.3] = IGNORE
    found = segmentation_metrics(counted(5, truth.tolist(), prediction.tolist()), metric_spec(5))

    def expected(metric, average: str = "none") -> torch.Tensor:
        return metric(prediction, truth, num_classes=5, average=average, ignore_index=IGNORE)

    iou, dice = expected(multiclass_jaccard_index), expected(multiclass_f1_score)
    torch.testing.assert_close(torch.tensor([*found["iou"].values()]), iou)
    torch.testing.assert_close(torch.tensor([*found["dice"].values()]), dice)
    accuracy = expected(multiclass_accuracy, "micro")
    assert found["pixel_accuracy"] == pytest.approx(accuracy.item())
    means = [found[key] for key in ("miou", "miou_all", "miou_official")]
    assert means == [pytest.approx(iou.mean().item())] * 3


def test_metrics_by_hand_where_truth_is_void_or_ignored():
    # judged: a as a, b as a; the pixels whose truth is void (c) or ignored are predicted b
    counts = counted(3, truth=[[0, 1], [2, IGNORE]], prediction=[[0, 0], [1, 1]])
    found = segmentation_metrics(counts, metric_spec(3, scored=[0, 1], void=2))
    assert found["iou"] == {"a": 1 / 2, "b": 0, "c": None}
    assert found["dice"] == {"a": 2 / 3, "b": 0, "c": None}
    assert (found["miou"], found["pixel_accuracy"]) == (1 / 4, 1 / 2)
    # the void pixel counts: b and c are 0 / 2 and 0 / 1
    assert found["miou_all"] == pytest.approx(1 / 6)


def test_void_predicted_on_a_real_class_is_a_miss():
    counts = counted(3, truth=[0, 0, 1, 1, 2], prediction=[0, 2, 1, 1, 1])
    before = counts.clone()
    found = segmentation_metrics(counts, metric_spec(3, scored=[0, 1], void=2))
    assert torch.equal(counts, before)  # the void pixel is still there
    assert found["iou"] == {"a": 1 / 2, "b": 1, "c": None}
    assert found["dice"]["a"] == 2 / 3
    assert (found["miou"], found["pixel_accuracy"], found["miou_official"]) == (3 / 4, 3 / 4, 1)


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


@pytest.mark.parametrize(
    ("means", "line"),
    [
        ((0.12345, None, 1), "mIoU 0.1235, every class 0.0000, as released 1.0000"),
        ((0.25, 0.25, 0.5), "mIoU 0.2500, as released 0.5000"),
        ((0.25, 0.25, 0.25), "mIoU 0.2500"),
    ],
)
def test_means_are_one_line_without_those_that_equal_the_first(means, line):
    metrics = dict(zip(("miou", "miou_all", "miou_official"), means, strict=True))
    assert format_means({**metrics, "constant": None}) == line


def test_foreground_means_leave_out_a_scored_background_alone():
    classes = {"classes": ["background", "b", "c"]}
    counts = counted(3, truth=[0, 0, 1, 1, 2, 2], prediction=[0, 0, 1, 0, 2, 2])
    found = segmentation_metrics(counts, metric_spec(3, **classes))
    assert found["miou_foreground"] == (1 / 2 + 1) / 2
    assert found["dice_foreground"] == pytest.approx((2 / 3 + 1) / 2)
    rows = [line.split() for line in format_metrics(found).splitlines()]
    assert ["without", "background", "75.00", "83.33"] in rows
    for spec in metric_spec(3), metric_spec(3, scored=[1, 2], **classes):
        assert "miou_foreground" not in segmentation_metrics(counts, spec)


def test_a_single_predicted_class_is_said_to_be_what_that_scores():
    counts = counted(3, truth=[0, 0, 1, 2], prediction=[0, 0, 0, 0])
    found = segmentation_metrics(counts, metric_spec(3))
    assert found["constant"] == "a"
    last_line = format_metrics(found).splitlines()[-1]
    assert last_line == "predicts a alone: mIoU 0.167 is what that scores"
    assert format_means(found) == "mIoU 0.1667, predicts a alone"
    counts = counted(3, truth=[0, 0, 1, 2], prediction=[0, 0, 0, 1])
    assert segmentation_metrics(counts, metric_spec(3))["constant"] is None


def test_printed_table_is_in_percent_with_a_dash_for_none():
    counts = counted(4, truth=[0, 0, 1, 1], prediction=[0, 0, 1, 2])
    table = format_metrics(segmentation_metrics(counts, metric_spec(4)))
    rows = [line.rsplit(None, 2) for line in table.splitlines()]
    assert ["b", "50.00", "66.67"] in rows
    assert ["d", "-", "-"] in rows
    assert table.count("50.00") == 2  # b and the mean, which the other two equal
    assert "Dice (pooled)" in table.splitlines()[0]
    assert rows[-1][-1] == "75.00"  # pixel accuracy
