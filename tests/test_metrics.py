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


def metric_spec(n_classes: int, **changes) -> DatasetSpec:
    """A dataset of classes a, b, c, ..., all scored by default."""
    table = {"classes": [*"abcdefgh"[:n_classes]], "palette": [[0, 0, 0]] * n_classes}
    return toy_spec(**{**table, "scored": [*range(n_classes)], **changes})


def counted(n_classes: int, truth, prediction) -> torch.Tensor:
    matrix = ConfusionMatrix(n_classes)
    matrix.update(torch.tensor(prediction), torch.tensor(truth))
    return matrix.counts


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


def test_void_predicted_on_a_real_class_is_a_miss_and_pixels_of_void_do_not_count():
    counts = counted(3, truth=[0, 0, 1, 1, 2], prediction=[0, 2, 1, 1, 1])
    found = segmentation_metrics(counts, metric_spec(3, scored=[0, 1], void=2))
    assert found["iou"] == {"a": 1 / 2, "b": 1, "c": None}
    assert found["dice"] == {"a": 2 / 3, "b": 1, "c": None}
    assert (found["miou"], found["pixel_accuracy"], found["miou_official"]) == (3 / 4, 3 / 4, 1)
    assert found["miou_all"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)  # here they do


def test_official_miou_does_not_see_foreground_missed_as_background():
    # background a is not scored; of b's ten pixels one is found, nine are called background
    counts = counted(2, truth=[0] * 10 + [1] * 10, prediction=[0] * 19 + [1])
    found = segmentation_metrics(counts, metric_spec(2, scored=[1]))
    assert found["miou_official"] == 1
    assert found["miou"] == 1 / 10
    assert found["miou_all"] == pytest.approx((10 / 19 + 1 / 10) / 2)


def test_nothing_counted_gives_none_everywhere():
    found = segmentation_metrics(torch.zeros(2, 2, dtype=torch.int64), metric_spec(2))
    assert {found[key] for key in ("miou", "miou_all", "miou_official", "pixel_accuracy")} == {None}
    assert {*found["iou"].values(), *found["dice"].values()} == {None}


def test_means_are_one_line_without_those_that_equal_the_first():
    metrics = {"miou": 0.12345, "miou_all": None, "miou_official": 0.12345, "constant": None}
    assert format_means(metrics) == "mIoU 0.1235, every class 0.0000"
    assert format_means({**metrics, "miou_official": 1}).endswith(", as released 1.0000")


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
    assert last_line == "predicts only a, which scores mIoU 0.167"
    assert format_means(found) == "mIoU 0.1667, predicts only a"
    counts = counted(3, truth=[0, 0, 1, 2], prediction=[0, 0, 0, 1])
    assert segmentation_metrics(counts, metric_spec(3))["constant"] is None


def test_an_absent_class_is_none_and_in_no_mean_and_a_dash_in_the_table_of_percents():
    counts = counted(4, truth=[0, 0, 1, 1], prediction=[0, 0, 1, 2])
    found = segmentation_metrics(counts, metric_spec(4))
    assert found["iou"] == {"a": 1, "b": 1 / 2, "c": 0, "d": None}  # c was predicted: 0, not None
    assert found["dice"] == {"a": 1, "b": 2 / 3, "c": 0, "d": None}
    assert found["miou"] == found["miou_all"] == found["miou_official"] == 1 / 2
    table = format_metrics(found)
    rows = [line.rsplit(None, 2) for line in table.splitlines()]
    assert ["b", "50.00", "66.67"] in rows
    assert ["d", "-", "-"] in rows
    assert table.count("50.00") == 2  # b and the mean, which the other two equal
    assert rows[-1][-1] == "75.00"  # pixel accuracy
