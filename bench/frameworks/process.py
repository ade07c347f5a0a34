"""A peer's process: started, asked for rounds line by line, and ended with all that it started."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.frameworks.protocol import PREFIX


class PeerError(Exception):
    """A peer failed; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    """One way to train: a script, its first argument, and environment variables."""

    title: str
    script: Path
    how: str
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""

    def command(self, model: str, steps: int) -> list[str]:
        """The command that trains `model`."""
        return [sys.executable, str(self.script), self.how, model, str(steps)]


class Running:
    """A peer's process; the constructor returns when the peer is ready.

    Raises:
        PeerError: a library is missing, or the process ended or timed out; the message has the end of its stderr.
    """

    def __init__(self, peer: Peer, model: str, steps: int, timeout: float) -> None:
        if peer.needs and importlib.util.find_spec(peer.needs) is None:
            raise PeerError(f"{peer.needs} is not installed here")
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            peer.command(model, steps),
            env={**os.environ, **peer.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that its child processes can be ended with it
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="peer-reader", daemon=True)
        self._reader.start()
        try:
            self.facts = self._answer(timeout, "building, compiling and warming up")
        except BaseException:
            self.close(0.0)
            raise

    def round(self, timeout: float) -> float:
        """Train one round; returns its seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._end()) from None
        return float(self._answer(timeout, "a round")["seconds"])

    def close(self, patience: float = 20.0) -> None:
        """Let the process end by itself; after `patience` seconds, kill it and its children."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was gone already
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
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
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise PeerError(f"{what} took longer than {timeout:g} seconds") from None
        if not line:
            raise PeerError(self._end())
        return dict(json.loads(line))

    def _end(self) -> str:
        """The reason why the process ended: the first line of its last exception, else the last line on stderr."""
        code = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        traces = [place for place, line in enumerate(said) if line.startswith("Traceback (")]
        raised = [line for line in said[traces[-1] + 1 :] if not line.startswith(" ")] if traces else said[-1:]
        return f"ended with status {code}: {raised[0].strip()[:500] if raised else 'it said nothing'}"
