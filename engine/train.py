"""One epoch of training, and evaluation."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import utils
from engine.metrics import ConfusionMatrix
from engine.run import Run
from engine.signals import stop
from model import Method
from utils import NonFiniteLoss, TrainingError


def train_one_epoch(model: Method, batches: Iterable, run: Run) -> None:
    """Train on batches (x, y, x_u) until their end or a signal; TrainingError if they diverge."""
    model.train()
    for x, y, *x_u in batches:
        run.before_step()
        try:
            losses = model.step(x, y, *x_u)
        except NonFiniteLoss as error:
            raise run.diverged(error) from error
        run.after_step(losses)
        if run.signum:
            return
    run.after_epoch()


@torch.inference_mode()
def evaluate(model: Method, batches: Iterable, visit: Callable | None = None) -> Tensor:
    """Confusion matrix (K, K) over batches (x, y), or those until a signal.

    Calls `visit(x, y, logits)` for each batch of finite logits. TrainingError if any are not: the
    argmax of NaN is class 0.
    """
    model.eval()
    device = next(model.parameters()).device
    matrix, diverged = ConfusionMatrix(model.n_classes, device), torch.tensor(False, device=device)
    for x, y in batches:
        logits = model.segment(x)
        diverged |= ~logits.isfinite().all()
        if visit and diverged:
            break
        matrix.update(logits.argmax(1), y)
        if visit:
            visit(x, y, logits)
        if stop.signum:  # Run.record() discards the matrix
            break
    if any(utils.max_over_processes(int(diverged))):
        found = "the segmentation network's outputs are not finite: its training has diverged"
        raise TrainingError(f"{found}; train with a lower --lr, under another --name")
    return matrix.counts
