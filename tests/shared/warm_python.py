"""A Python process with libraries loaded, of which each program gets a forked copy instead of a start of its own.

`python warm_python.py numpy torch` loads those and reads requests from standard input, one JSON object a line. A copy
gets the arguments, environment, folder and output files that a request names, runs like `python -c`, `python -m` or
`python FILE`, and ends as any interpreter does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

LOAD_SECONDS = 120.0
# With 20 programs on two cores, loading torch took 100 seconds in the place of 7, and a script 15 to 54 instead of 2.
MOST_SHARED = 3.0


class WarmPython:
    """Runs programs in copies of one process.

    Args:
        modules: what that process imports before the first copy. None of it may start threads or devices.
        environment: what these imports and the loader see; a program's own environment replaces it.
        folder: the current folder of all programs.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._start = partial(
            subprocess.Popen[bytes],
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=folder,
        )
        self._process = self._start()
        self._said = b""  # by that process, and not yet read as answers

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], seconds: float, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `["-c", program]`, `["-m", module, ...]` or `[file, ...]`; what comes is as subprocess.run's.

        `folder` is the current one of this program, instead of all programs' one.

        Raises:
            subprocess.TimeoutExpired: it took longer than so many seconds, and was killed. Where other programs use the
                cores it may take longer (`patient`).
        """
        if self._process.poll() is not None:  # it took too long to load
            self._process, self._said = self._start(), b""
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch, "out"), Path(scratch, "err")
            request = {"command": command, "environment": {**environment}, "out": str(out), "err": str(err)}
            if folder is not None:
                request["folder"] = str(folder)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            try:
                child = self._answer(LOAD_SECONDS)
            except subprocess.TimeoutExpired:  # an answer to this request must not count for the next one
                self._process.kill()
                self.close()
                raise
            try:
                status = self._answer(seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    os.kill(child, signal.SIGKILL)
                self._answer(LOAD_SECONDS)
                said, errors = (path.read_bytes() for path in (out, err))
                raise subprocess.TimeoutExpired(command, seconds, said, errors) from None
            said, errors = (path.read_text(encoding="utf-8") for path in (out, err))
        return subprocess.CompletedProcess(command, status, said, errors)

    def _answer(self, seconds: float) -> int:
        """The next number that the process says."""
        stdout = self._process.stdout
        assert stdout is not None
        began = time.monotonic()
        # Two answers may come at once. What a file object has read ahead `select` does not see: no buffer but ours.
        while b"\n" not in self._said:
            left = began + patient(seconds) - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self._process.args, seconds)
            if select.select([stdout], [], [], min(left, 5.0))[0]:
                more = os.read(stdout.fileno(), 4096)
                assert more, f"{self._process.args} has ended with status {self._process.wait(LOAD_SECONDS)}"
                self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return int(line)

    def close(self) -> None:
        """End the process, which has no copies then."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(LOAD_SECONDS)


def patient(seconds: float) -> float:
    """How long to wait for what takes so many seconds on a machine that does nothing else."""
    return seconds * min(MOST_SHARED, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def serve(modules: Sequence[str]) -> dict[str, Any] | None:
    """Answer requests, each by the number of the copy's process and then its exit status.

    Returns the request in a copy, which has to run it; None in the process itself, after the last request.
    """
    answers = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        with warnings.catch_warnings():  # of NumPy's threads, which end and start again by themselves
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            os.close(answers)
            os.dup2(quiet, 0)
            os.close(quiet)
            sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
            return request
        os.write(answers, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def run(request: dict[str, Any]) -> None:
    """Be the process that a request asks for."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request.get("folder", "."))
    how, *arguments = request["command"]
    if how == "-m":
        sys.argv, sys.path[0] = arguments, os.getcwd()
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    if how == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[1:]], ""
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
        return
    sys.argv, sys.path[0] = [how, *arguments], str(Path(how).resolve().parent)
    main.__file__ = how
    exec(compile(Path(how).read_bytes(), how, "exec"), main.__dict__)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C goes to the tests too, which end this process
        asked = serve(sys.argv[1:])
    if asked is not None:
        run(asked)
