"""Metrics (Section 4.2): the confusion matrix, IoU and Dice, and their tables."""

from collections.abc import Iterable

import torch
from torch import Tensor

from utils import IGNORE


class ConfusionMatrix:
    """Count pixels by (truth, prediction) in an int64 K x K matrix that stays on the device."""

    def __init__(self, n_classes: int, device: torch.device | str = "cpu"):
        # the last entry counts ignored pixels; boolean indexing would wait for the device
        self.flat = torch.zeros(n_classes**2 + 1, dtype=torch.int64, device=device)
        self.counts = self.flat[:-1].view(n_classes, n_classes)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a batch of class indices; pixels whose truth is IGNORE do not count."""
        k = len(self.counts)
        index = torch.where(truth != IGNORE, truth.long() * k + prediction, k * k).flatten()
        self.flat.scatter_add_(0, index, torch.ones_like(index))


OTHER_MEANS = {"miou_all": "every class", "miou_official": "as released"}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _iou(counts: Tensor) -> list[float | None]:
    """TP / (TP + FP + FN) of each class; None for a class in neither truth nor prediction."""
    tp = counts.diag()
    union = counts.sum(0) + counts.sum(1) - tp
    return [t / u if u else None for t, u in zip(tp.tolist(), union.tolist(), strict=True)]


def segmentation_metrics(counts: Tensor, spec) -> dict:
    """All reported metrics, from a K x K confusion matrix (rows truth, columns prediction).

    miou: Section 4.2, the mean of TP / (TP + FP + FN) over `spec.scored`. Pixels whose truth is
        `spec.void` are skipped; a void predicted on a real class is a miss.
    miou_all: the mean over all K classes, void being one like any other.
    miou_official: the released code's. Rows and columns of unscored classes are cut out first, so
        confusions with them cost nothing.
    miou_foreground, dice_foreground: the means over spec.structures(), if background is scored.
    constant: the class that is predicted for every pixel, if there is only one.

    Pixels are pooled over all images, in Dice as well. A class in neither truth nor prediction is
    None and enters no mean.
    """
    counts = counts.cpu()
    judged = counts.clone()
    if spec.void is not None:
        judged[spec.void] = 0
    tp, support = judged.diag(), judged.sum(0) + judged.sum(1)
    iou = _iou(judged)
    dice = [2 * t / s if s else None for t, s in zip(tp.tolist(), support.tolist(), strict=True)]
    if spec.void is not None:
        iou[spec.void] = dice[spec.void] = None
    total = judged.sum().item()
    keep = torch.tensor(spec.scored)
    structures, foreground = spec.structures(), {}
    if len(structures) < len(spec.scored):
        foreground["miou_foreground"] = _mean(iou[k] for k in structures)
        foreground["dice_foreground"] = _mean(dice[k] for k in structures)
    predicted = counts.sum(0).nonzero().flatten().tolist()
    return {
        "miou": _mean(iou[k] for k in spec.scored),
        "miou_all": _mean(_iou(counts)),
        "miou_official": _mean(_iou(counts[keep][:, keep])),
        **foreground,
        "pixel_accuracy": tp.sum().item() / total if total else None,
        "constant": spec.classes[predicted[0]] if len(predicted) == 1 else None,
        "iou": dict(zip(spec.classes, iou, strict=True)),
        "dice": dict(zip(spec.classes, dice, strict=True)),
    }


def format_means(metrics: dict) -> str:
    """The mean IoU on one line, with the others where they differ, and a warning."""
    line = f"mIoU {metrics['miou'] or 0:.4f}"
    for key, title in OTHER_MEANS.items():
        if metrics[key] != metrics["miou"]:
            line += f", {title} {metrics[key] or 0:.4f}"
    if name := metrics["constant"]:
        line += f", predicts only {name}"
    return line


def format_metrics(metrics: dict) -> str:
    """A table of IoU and Dice by class, then the means, in %; a dash for an absent class."""

    def row(title: str, *values: float | None) -> str:
        cells = ("-" if value is None else f"{100 * value:.2f}" for value in values)
        return f"{title:{width}}" + "".join(map(str.rjust, cells, (7, 15)))

    others = {f"mIoU, {title}": metrics[key] for key, title in OTHER_MEANS.items()}
    width = max(map(len, [*metrics["iou"], *others]))
    lines = [f"{'class':{width}}    IoU  Dice (pooled)"]
    lines += [row(name, iou, metrics["dice"][name]) for name, iou in metrics["iou"].items()]
    lines.append(row("mIoU", metrics["miou"]))
    if "dice_foreground" in metrics:
        means = metrics["miou_foreground"], metrics["dice_foreground"]
        lines.append(row("without background", *means))
    lines += [row(title, value) for title, value in others.items() if value != metrics["miou"]]
    lines.append(row("pixel accuracy", metrics["pixel_accuracy"]))
    if name := metrics["constant"]:
        miou = metrics["miou"] or 0
        lines.append(f"predicts only {name}, which scores mIoU {miou:.3f}")
    return "\n".join(lines)
