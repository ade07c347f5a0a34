"""The exit statuses of the commands, and what ends a command: wrong use, a signal, or a pipe that was closed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fastdp.cli.optional import MissingLibraryError

OK, FAILED, WRONG_USE = 0, 1, 2
# As shells number the ends by signals: 128 and SIGINT, SIGPIPE, SIGTERM.
INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143

TEXT = """Exit status:
  0    it worked
  1    the work failed; the last line of the error stream says why
  2    wrong arguments, a wrong environment variable, a library that is missing, or no such device: nothing was done
  130  interrupted (Ctrl-C), 143 terminated, 141 the reader of the output went away
  `fastdp run` ends with the status of the script."""


class WrongUseError(Exception):
    """A command was called with something that it cannot work with; the message names it and the remedy."""


def ended(command: str, work: Callable[[], int]) -> int:
    """Run a command's work and return its exit status. What a user can mend is told in one line, without a traceback.

    Args:
        command: its name, which begins the line.
        work: returns the status.
    """
    try:
        with _ended_by_sigterm():
            status = work()
            sys.stdout.flush()
            return status
    except (WrongUseError, MissingLibraryError) as error:
        say(command, str(error))
        return WRONG_USE
    except BrokenPipeError:
        drop_stdout()
        return PIPE_CLOSED
    except OSError as error:
        say(command, str(error))
        return FAILED
    except KeyboardInterrupt:
        say(command, "interrupted.")
        return INTERRUPTED


def say(command: str, message: str) -> None:
    """Print a line of a command on the error stream."""
    print(f"fastdp {command}: {message}", file=sys.stderr)


def drop_stdout() -> None:
    """Send the output to nowhere, once its reader has gone: Python flushes it at its end, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the work as an exit does, so that files are closed and other processes are ended."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
