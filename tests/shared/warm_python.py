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
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOAD_SECONDS = 120.0


class WarmPython:
    """Runs programs in copies of one process.

    Args:
        modules: what that process imports before the first copy. None of it may start threads or devices.
        environment: what these imports and the loader see; a program's own environment replaces it.
        folder: the current folder of all programs.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        command = [sys.executable, __file__, *modules]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=folder, text=True, bufsize=1
        )

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], seconds: float, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `["-c", program]`, `["-m", module, ...]` or `[file, ...]`; what comes is as subprocess.run's.

        `folder` is the current one of this program, instead of all programs' one.

        Raises:
            subprocess.TimeoutExpired: it took longer than so many seconds, and was killed.
        """
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch, "out"), Path(scratch, "err")
            request = {"command": command, "environment": {**environment}, "out": str(out), "err": str(err)}
            if folder is not None:
                request["folder"] = str(folder)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            child = self._answer(LOAD_SECONDS)
            try:
                status = self._answer(seconds)
            except subprocess.TimeoutExpired:
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
        if not select.select([stdout], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired(self._process.args, seconds)
        line = stdout.readline()
        assert line, f"{self._process.args} has ended with status {self._process.wait(LOAD_SECONDS)}"
        return int(line)

    def close(self) -> None:
        """End the process, which has no copies then."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(LOAD_SECONDS)


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
