"""Starts `fastdp run` again as a process of its own when the script fails, as often as `--restarts` says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from fastdp.cli.status import INTERRUPTED, OK, PIPE_CLOSED, TERMINATED, WRONG_USE, say
from fastdp.settings import RESTARTED

_VARIABLE = "_FASTDP_SUPERVISOR"  # the process that supervises this one
_PAUSE = 1.0  # seconds before a start: a card that has failed needs a moment
# Another start would end in the same way, or is not wanted.
_FINAL = (OK, WRONG_USE, INTERRUPTED, PIPE_CLOSED, TERMINATED)
MOST_RESTARTS = 1000


def is_supervised() -> bool:
    """Whether this process was started by `supervise`. Only the first call tells, and children do not inherit it."""
    return os.environ.pop(_VARIABLE, "") == str(os.getppid())


def supervise(name: str, restarts: int) -> int:
    """Run this command line in a process of its own, and again while it fails.

    A fatal error of CUDA leaves a process that cannot use the card any more: only another one can. The script goes on
    from its checkpoint (`fastdp.Checkpoint`), if it has one.

    Args:
        name: of the script, for messages.
        restarts: how often at most.

    Returns:
        The status of the last one; 128 and the number of a signal that has ended it.
    """
    for start in range(restarts + 1):
        status, told = _run(again=start > 0)
        if status in _FINAL or told:
            return status
        if start == restarts:
            break
        say("run", f"{name} ended with status {status}; it is started again ({start + 1} of {restarts}).")
        time.sleep(_PAUSE)
    say("run", f"{name} ended with status {status}, after {restarts} restarts.")
    return status


def _run(*, again: bool) -> tuple[int, bool]:
    """Run the command line once; its status, and whether this process was told to end meanwhile.

    `again`: another one has failed, perhaps for a card that is gone. Then fewer devices will do.
    """
    environment = {**os.environ, _VARIABLE: str(os.getpid()), RESTARTED: str(int(again))}
    process = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)
    told = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        # A terminal sends Ctrl-C to both. A second one would end the script before it has saved.
        if process.poll() is None and not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (status if status >= 0 else 128 - status), told
