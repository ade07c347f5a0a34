"""Runs training scripts in processes that are killed at a chosen moment; they begin with the libraries loaded."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

# Forked from a process that has only imported these: a start costs no seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "keras", "numpy", "fastdp.torch", "fastdp.callbacks"])


class Moment(NamedTuple):
    """So many seconds after a line was printed, a signal."""

    line: int
    seconds: float = 0.0
    number: int = signal.SIGKILL


def run(script: Path, *arguments: object, moment: Moment | None = None, status: int = 0) -> str:
    """What a script prints until it ends with a status; minus the number of a signal if that has ended it."""
    printed = Path(str(arguments[-1])).with_suffix(".txt")
    process = _context.Process(target=_work, args=(str(script), list(map(str, arguments)), str(printed), moment))
    process.start()
    try:
        process.join(90)
        assert process.exitcode is not None, f"the run hangs after: {printed.read_text()}"
        assert process.exitcode == status, printed.read_text()
    finally:
        process.kill()
        process.join(10)
        process.close()
    return printed.read_text()


class _Printed:
    """Writes lines at once, and lets a signal come after one of them."""

    def __init__(self, path: str, moment: Moment | None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._moment, self._lines = moment, 0
        self.isatty = lambda: False
        self.flush = lambda: None

    def write(self, text: str) -> int:
        os.write(self._file, text.encode())
        self._lines += text.count("\n")
        moment = self._moment
        if moment is not None and self._lines >= moment.line:
            self._moment = None
            timer = threading.Timer(moment.seconds, os.kill, (os.getpid(), moment.number))
            timer.daemon = True
            timer.start()
        return len(text)


def _work(script: str, arguments: list[str], printed: str, moment: Moment | None) -> None:
    sys.argv = [script, *arguments]
    sys.stdout = sys.stderr = _Printed(printed, moment)
    runpy.run_path(script, run_name="__main__")
