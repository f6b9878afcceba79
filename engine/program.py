"""A command as a program: errors as one line, exit codes."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch.distributed as dist

import utils
from datasets.workers import ENDED, workers_ended
from engine.signals import stop
from utils import InputError, TrainingError

CONNECTION_FAILED = "the connection between the processes failed"


def failure(error: Exception) -> str | None:
    """A message for a failure of the machine; None for a bug in the program."""
    signs = "out of memory", "not enough memory", "allocate memory", "size calculation overflow"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        return (
            "out of memory; in training, halving --batch-size or the area of --size halves it, "
            "--ngf 32 instead of 64 cuts it to two thirds, --precision bf16 to three quarters"
        )
    if str(error).startswith(ENDED):
        advice = "if it ran out of memory, give fewer --workers; checkpoints are intact"
        return f"a process that loads images ended: {str(error).partition('. ')[0]}; {advice}"
    if str(error).startswith("DataLoader timed out"):
        found = str(error).replace("DataLoader timed out", "loading a batch of images timed out")
        return f"{found}; unless the process was suspended, check the disk; checkpoints are intact"
    if "InvalidCxxCompiler" in str(error) or "Failed to find C compiler" in str(error):
        return "--compile: found no C++ compiler; install g++, or train without --compile"
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        found = (str(error) or type(error).__name__).splitlines()[0]
        return f"{CONNECTION_FAILED} ({found}); checkpoints are intact"
    return None


def execute(command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run a command with `argv`, by default the program's, and print errors as one line.

    Exit code: 0 done, 1 failed while running, 2 invalid flags, configuration or data, 128 + n
    after signal n.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any file name can be printed
    prints = True
    try:
        prints = utils.local_rank() == 0
        if utils.rank():  # of several processes, the first one prints
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with workers_ended():
            return command(sys.argv[1:] if argv is None else argv)
    except (InputError, TrainingError) as error:
        message, code = str(error), 2 if isinstance(error, InputError) else 1
        prints = prints or error.alone
    except OSError as error:
        other = "standard output" if isinstance(error, BrokenPipeError) else "a file"
        message, code, prints = f"{error.filename or other}: {utils.reason(error)}", 1, True
    except KeyboardInterrupt:  # of a caller that handles no signals
        message, code = "interrupted", 130
    except Exception as error:
        message, code = failure(error), 1
        if message is None and stop.signum:  # it also ended what the step ran, such as a compiler
            name, code = signal.Signals(stop.signum).name, 128 + stop.signum
            message = f"{name}: stopped within a step; checkpoints are intact"
        if message is None:  # a bug
            traceback.print_exc()
            return code
        # the other processes then only find the connection closed
        prints = prints or not message.startswith(CONNECTION_FAILED)
    if prints:
        line = "\\n".join(message.splitlines())  # a file's name may have two
        print(f"error: {line}", file=sys.stderr)
    return code
