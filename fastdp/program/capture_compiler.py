"""Compiling captured steps in the background, in a process of its own.

TorchInductor patches torch for its whole process while it works, so it must not share one with replicas that run.
A worker (`fastdp.program.capture_worker`) compiles one graph and ends; this module starts, watches and ends
workers, one at a time, and loads what they leave behind.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._inductor import CompiledArtifact
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.fx import GraphModule

from fastdp.program.capture_graph import to_bytes
from fastdp.shard import CORES

COMPILERS = ("g++", "clang++", "c++")
Run = Callable[..., Sequence[torch.Tensor]]


class CompileError(Exception):
    """A graph was not compiled. The message says why."""


@dataclass(slots=True, eq=False)
class Job:
    """A graph on its way through a worker.

    `began` and `seconds` are those of the worker; `load_seconds` the time that the caller of `result` lost.
    """

    data: bytes
    constants: list[torch.Tensor]
    threads: int
    process: subprocess.Popen[bytes] | None = None
    folder: Path | None = None
    began: float = 0.0
    seconds: float = 0.0
    load_seconds: float = 0.0


class BackgroundCompiler:
    """Compiles graphs one after another, each in a process of its own.

    Args:
        timeout: seconds after which a worker is given up.

    Nothing here waits but `close()`, for a process that it has killed. A compiler that is forgotten, and the
    interpreter's end, kill the worker and remove its files too.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self._timeout = timeout
        self._waiting: deque[Job] = deque()
        self._started: list[Job] = []
        self._closed = weakref.finalize(self, _end, self._started, self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job is at work or waits for its turn."""
        return bool(self._started or self._waiting)

    def submit(self, module: GraphModule, threads: int) -> Job:
        """Have a graph compiled, whose operations may use `threads` cores."""
        data, constants = to_bytes(module)
        job = Job(data, constants, threads)
        self._waiting.append(job)
        self._start_next()
        _readying()
        return job

    def done(self, job: Job) -> bool:
        """Whether `result` would give one now, or raise."""
        if job.process is None:
            return False
        if job.process.poll() is not None:
            return not _readying().is_alive()
        return time.monotonic() - job.began > self._timeout

    def result(self, job: Job) -> Run:
        """The compiled step of a job that is done. Takes arguments as the graph does; gives a sequence.

        Raises:
            CompileError: the worker failed, was killed or took too long.
        """
        assert job.process is not None
        assert job.folder is not None
        job.seconds = time.monotonic() - job.began
        artifact = job.folder / "artifact"
        status = job.process.poll()
        try:
            if status is None:
                raise CompileError(f"the compiler took longer than {self._timeout} seconds")
            if status != 0 or not artifact.exists():
                raise CompileError(f"the compiler's process ended with status {status}: {_last_line(job.folder)}")
            began = time.perf_counter()
            try:
                run = CompiledArtifact.load(path=str(artifact), format="binary")
            except (AssertionError, RuntimeError, OSError, ImportError) as error:
                raise CompileError(f"the compiled step cannot be loaded: {error or type(error).__name__}") from error
            job.load_seconds = time.perf_counter() - began
            constants = job.constants
            return (lambda *arguments: run(*arguments, *constants)) if constants else run
        finally:
            self._started.remove(job)
            _discard(job)
            self._start_next()

    def close(self) -> None:
        """Kill the worker and forget what waits. Idempotent."""
        _end(self._started, self._waiting)

    def _start_next(self) -> None:
        """Start the worker for the next job, if none is at work."""
        if self._started or not self._waiting:
            return
        job = self._waiting.popleft()
        job.folder = Path(tempfile.mkdtemp(prefix="fastdp-compile-"))
        (job.folder / "graph").write_bytes(job.data)
        command = [sys.executable, "-m", "fastdp.program.capture_worker", str(job.folder / "graph")]
        command += [str(job.folder / "artifact"), str(job.threads), str(max(1, CORES // 2))]
        # The parent may have found fastdp by a path of its own; the worker must find the same.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with (job.folder / "errors").open("wb") as errors:
            job.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        job.began = time.monotonic()
        self._started.append(job)


@functools.cache
def _readying() -> threading.Thread:
    """The thread that does, once, what the first loading would lose seconds with: imports, and a look at the CPU.

    It neither traces nor compiles, so it may run beside the replicas. An interpreter that ends waits for it.
    """

    def ready() -> None:
        importlib.import_module("torch._inductor.compile_fx")
        pick_vec_isa()

    thread = threading.Thread(target=ready, name="fastdp-compile-ready")
    thread.start()
    return thread


def missing_compiler() -> str | None:
    """Why graphs cannot be compiled for the CPU here; None if they can."""
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        return None
    return f"no C++ compiler ({named or ', '.join(COMPILERS)}) was found"


def _last_line(folder: Path) -> str:
    """What the worker said last."""
    lines = (folder / "errors").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _discard(job: Job) -> None:
    """End a job's process and those that it started, and remove its files."""
    process = job.process
    if process is not None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    if job.folder is not None:
        shutil.rmtree(job.folder, ignore_errors=True)


def _end(started: list[Job], waiting: deque[Job]) -> None:
    """Kill what is at work, drop what waits."""
    waiting.clear()
    while started:
        _discard(started.pop())
