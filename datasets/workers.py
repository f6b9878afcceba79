"""Processes that decode and load images: started, watched and ended so that nothing waits forever.

They block SIGINT, SIGTERM and SIGUSR1: Ctrl-C reaches the whole process group, but only the main
process decides what to do. They hold nothing that would have to be saved.
"""

import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from utils import PATIENCE, TrainingError, reason

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
ENDED = "DataLoader worker (pid"  # PyTorch's message about a killed process begins with it
LONGEST = 1800  # seconds without a batch after which a process or its disk counts as hung


def image_loader(data: Dataset, n_workers: int, **options) -> DataLoader:
    """A DataLoader that never waits forever and leaves training's random numbers alone."""
    return DataLoader(
        data,
        num_workers=n_workers,
        timeout=LONGEST if n_workers else 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
        **options,
    )


def loaded(loader: DataLoader) -> Iterator:
    """The batches of a DataLoader; TrainingError if its processes cannot be started."""
    if not loader.num_workers:
        yield from loader
        return
    try:
        with signals_held():
            batches = iter(loader)
    except (OSError, RuntimeError) as error:  # too many files or processes, a full /dev/shm
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        traceback.clear_frames(error.__traceback__)  # the destructor of half an iterator fails
        sys.unraisablehook = hook
        if str(error).startswith(ENDED):  # it has started, and was killed before the others have
            raise
        found = f"cannot start processes that load images ({reason(error)})"
        message = f"--workers {loader.num_workers}: {found}; try --workers 0"
        raise TrainingError(message, alone=True) from error
    yield from batches


@contextmanager
def signals_held() -> Iterator[None]:
    """Defer signals to the end of the body; processes started in it keep them blocked."""
    heard: list[int] = []
    handlers = {n: signal.signal(n, lambda n, _: heard.append(n)) for n in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in heard:
            signal.raise_signal(signum)


def start_worker(_number: int) -> None:
    """A DataLoader's worker_init_fn: end when the main process ends, or a batch cannot be sent.

    By default such a batch is dropped, and the main process waits for it.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def workers_ended() -> Iterator[None]:
    """Kill the workers that the body started; the traceback of an error keeps loaders alive."""
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        if workers := [w for w in multiprocessing.active_children() if w not in others]:
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's would raise
            for worker in workers:
                worker.kill()
            deadline = time.monotonic() + PATIENCE
            for worker in workers:  # one that waits for a hung disk does not end
                worker.join(max(0, deadline - time.monotonic()))
            signal.signal(signal.SIGCHLD, handler)
