"""SIGINT, SIGTERM and SIGUSR1: finish the step, save, exit. Imports nothing slow."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Stop:
    """The handler: remember the signal, or exit at once if no training step would be lost."""

    signum = 0
    heard_at = 0.0
    training = False  # whether a run has steps to lose

    def __call__(self, signum: int, _frame) -> None:
        if signum == self.signum and time.monotonic() < self.heard_at + 1:  # torchrun passes it on
            return
        if self.signum:  # the second one does not wait; files on disk are complete
            os._exit(128 + signum)
        self.signum, self.heard_at = signum, time.monotonic()
        if not self.training:
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(signum).name
                with suppress(OSError):  # the reader has hung up
                    os.write(1, f"{name}: stopped; there was nothing to save\n".encode())
            raise SystemExit(128 + signum)


stop = Stop()


def install() -> None:
    """Install the handler, and standard streams in place of closed ones.

    The next file opened would otherwise get their descriptor, and the messages.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for signum in SIGNALS:
        signal.signal(signum, stop)


@contextmanager
def unhandled() -> Iterator[None]:
    """Let signals end the process at once: a wait within C code would call no handler."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
