"""A command as a program: errors as one line, exit codes."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

import utils
from datasets.workers import workers_ended
from engine.signals import stop
from utils import InputError, TrainingError


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
        message, code = utils.failure(error), 1
        if message is None and stop.signum:  # it also ended what the step ran, such as a compiler
            name, code = signal.Signals(stop.signum).name, 128 + stop.signum
            message = f"{name}: stopped within a step; checkpoints are intact"
        if message is None:  # a bug
            traceback.print_exc()
            return code
        # the other processes then only find the connection closed
        prints = prints or not message.startswith("the connection between the processes failed")
    if prints:
        line = "\\n".join(message.splitlines())  # a file's name may have two
        print(f"error: {line}", file=sys.stderr)
    return code
