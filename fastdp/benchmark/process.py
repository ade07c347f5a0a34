"""A way to train in its own process: started, asked line by line, and ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastdp.benchmark.request import Round
from fastdp.benchmark.serve import PREFIX

LOOK = 1.0  # seconds between two looks whether the process lives
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|RESOURCE_EXHAUSTED|MemoryError|bad_alloc|status -9\b")


def for_want_of_memory(reason: str) -> bool:
    """Whether a way failed because there was no memory: by the words of torch, JAX, NumPy and C++, or killed."""
    return _NO_MEMORY.search(reason) is not None


def module_command(module: str, argument: str) -> list[str]:
    """The command that calls a module's `main()` in a process of its own.

    `python -m` would look for every library in the current folder first, where anybody's `shutil.py` may lie.
    """
    last = "import sys; sys.path[:1] == [''] and sys.path.append(sys.path.pop(0))"
    return [sys.executable, "-c", f"{last}; from {module} import main; main()", argument]


class WayError(Exception):
    """A way to train failed; the message is the reason."""


class Process:
    """A worker process; the constructor returns when its way is ready.

    Args:
        command: the program and its arguments. It must call `fastdp.benchmark.serve.serve`.
        environment: variables that are added to those of this process.
        timeout: seconds until it must be ready.

    Attributes:
        facts: what the process told about the way when it was ready.

    Raises:
        WayError: the process ended or took too long; the message has the end of what it wrote to stderr.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], timeout: float) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",  # what C libraries print need not be text
            start_new_session=True,  # so that its child processes can be ended with it
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="bench-reader", daemon=True)
        self._reader.start()
        try:
            self.facts = self._answer(timeout, "building, compiling and the first step")
        except BaseException:
            self.close(0.0)
            raise

    def round(self, steps: int, timeout: float) -> Round:
        """Train one round of so many steps.

        Raises:
            WayError: the process ended, or the round took too long.
        """
        return Round(**self.ask({"round": steps}, timeout, "a round"))

    def ask(self, question: Mapping[str, Any], timeout: float, what: str) -> dict[str, Any]:
        """Write one line of JSON and return the answer.

        Raises:
            WayError: the process ended, or `what` took longer than `timeout` seconds.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise WayError(self._end()) from None
        return self._answer(timeout, what)

    def close(self, patience: float = 20.0) -> None:
        """Let the process end by itself; after `patience` seconds, kill it and its children."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was gone already
            self._process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        finally:  # an interrupt while waiting must not leave it behind
            with contextlib.suppress(ProcessLookupError):  # the whole process group
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._reader.join(10)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._errors.close()

    def _read(self) -> None:
        """Queue the answers of the process, and an empty line when it has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                self._lines.put(line.removeprefix(PREFIX))
        self._lines.put("")

    def _answer(self, timeout: float, what: str) -> dict[str, Any]:
        """The next answer of the process."""
        line = self._next_line(timeout, what)
        if not line:
            raise WayError(self._end())
        answer = dict(json.loads(line))
        if "error" in answer:
            raise WayError(answer["error"])
        return answer

    def _next_line(self, timeout: float, what: str) -> str:
        """The next line that is an answer; empty if the process has ended, though its children may hold its stdout."""
        end = time.monotonic() + timeout
        while True:
            ended = self._process.poll() is not None
            left = end - time.monotonic()
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=max(0.0, min(left, LOOK)))
            if ended:
                return ""
            if left <= LOOK:
                raise WayError(f"{what} took longer than {timeout:g} seconds")

    def _end(self) -> str:
        """The reason why the process ended: the first line of its last exception, else the last line on stderr."""
        code = self._process.wait()
        self._errors.seek(0)
        # torch.distributed puts the rank before each line of an exception.
        lines = (re.sub(r"^\[rank\d+\]: ?", "", line) for line in self._errors.read().splitlines())
        said = [line for line in lines if line.strip()]
        traces = [place for place, line in enumerate(said) if "Traceback (most recent" in line]  # after a print
        raised = [line for line in said[traces[-1] + 1 :] if not line.startswith(" ")] if traces else said[-1:]
        return f"ended with status {code}: {raised[0].strip()[:500] if raised else 'it said nothing'}"
