"""Starts the process that compiles a captured step, loads what it made, and ends it.

TorchInductor patches torch for its whole process while it works, so it must not share a process with running replicas.
A worker (`fastdp.capture.compile.worker`) compiles one graph and exits. This module starts, watches and kills
workers, one at a time, and loads the artifacts that they write.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fastdp.capture.compile import isolation, kept_code, niceness
from fastdp.capture.faults import Attempt, in_words
from fastdp.capture.graph.serialize import to_bytes
from fastdp.runtime.host.resources import CORES

COMPILERS = ("g++", "clang++", "c++")
Run = Callable[..., Sequence[torch.Tensor]]


class CompileError(Exception):
    """Raised when a graph was not compiled. The message says why."""


@dataclass(slots=True, eq=False)
class Job:
    """A graph to compile, and the worker that compiles it.

    `began` and `seconds` time the worker; `load_seconds` is the time that the caller spent loading. `name` is that of
    the code in the cache folder, and `kept` what was found there. `run` is the loaded code.
    `niceness` is that of the worker's session.
    """

    data: bytes
    constants: list[torch.Tensor]
    threads: int
    process: subprocess.Popen[bytes] | None = None
    folder: Path | None = None
    began: float = 0.0
    seconds: float = 0.0
    load_seconds: float = 0.0
    parent: int = field(default_factory=os.getpid)
    failure: str = ""
    name: str = ""
    kept: bytes | None = None
    run: Run | None = None
    niceness: int = 0


class BackgroundCompiler:
    """Compiles graphs one after another, each in its own process.

    Args:
        timeout: seconds after which a worker is killed.

    Only `close()` blocks, until the killed process has ended. Garbage collection of the compiler and interpreter exit
    also kill the worker and remove its files; a process forked meanwhile touches neither.
    Every failure (no disk space, no temporary folder, no process, a failing compiler, a broken artifact) makes `result`
    raise `CompileError`.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self._timeout = timeout
        self._waiting: deque[Job] = deque()
        self._started: list[Job] = []
        self._kept: list[Job] = []  # in the cache folder, and not loaded yet
        self._closed = weakref.finalize(self, _end, self._started, self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job is running, queued, or to be loaded."""
        return bool(self._started or self._waiting or self._kept)

    @staticmethod
    def prepare() -> None:
        """Let a thread import what loading needs, so that the first `done` does not wait for it."""
        isolation.use_cache()  # before the thread, which compiles and loads a test of the CPU
        _readying()

    def submit(self, module: GraphModule, threads: int) -> Job:
        """Queue a graph for compilation. Its operations may use `threads` cores."""
        with Attempt() as attempt:
            data, constants = to_bytes(module)
        if attempt.error is not None:
            return Job(b"", [], threads, failure=f"the graph cannot be handed to the compiler: {attempt.why}")
        job = Job(data, constants, threads, name=kept_code.name_of(data, threads))
        job.kept = kept_code.find(job.name)
        if job.kept is not None:
            self._kept.append(job)
            self.prepare()
        else:
            self._waiting.append(job)
            self._start_next()
        return job

    def done(self, job: Job) -> bool:
        """Whether `result` may be called: the job has succeeded, failed or timed out.

        Code from the cache folder that cannot be loaded is removed, and the job starts anew.
        """
        if job.failure or job.run is not None:
            return True
        if job.kept is not None:
            return _readying().over and self._loads(job, job.kept)
        if job.process is None:
            return False
        if job.process.poll() is not None:
            return _readying().over
        worked = time.monotonic() - job.began
        if worked > niceness.YIELDING_SECONDS:
            self.set_niceness(niceness.SHARING)
        return worked > self._timeout

    def result(self, job: Job) -> Run:
        """Return the compiled step of a finished job. It takes the graph's arguments and returns a sequence.

        Raises:
            CompileError: the worker could not be started, failed, was killed or took too long; or its artifact
                cannot be loaded.
        """
        if job.failure:
            raise CompileError(job.failure)
        if job.run is not None:
            return job.run
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
            with Attempt() as attempt:
                _load(job, artifact)
            if attempt.error is not None:
                raise CompileError(f"the compiled step cannot be loaded: {attempt.why}") from attempt.error
            kept_code.keep(job.name, artifact.read_bytes())
            assert job.run is not None
            return job.run
        finally:
            if job in self._started:
                self._started.remove(job)
            _discard(job)
            self._start_next()

    def set_niceness(self, value: int) -> None:
        """Let the worker go behind the training (`niceness.YIELDING`), or beside it (`SHARING`). Cheap to repeat."""
        for job in self._started:
            if job.process is not None and job.niceness != value and niceness.set_group(job.process.pid, value):
                job.niceness = value

    def close(self) -> None:
        """Kill the worker and drop queued jobs. Idempotent."""
        self._kept.clear()
        _end(self._started, self._waiting)

    def _loads(self, job: Job, code: bytes) -> bool:
        """Load a job's code from the cache folder. If that fails, compile it."""
        self._kept.remove(job)
        with Attempt() as attempt:
            job.folder = isolation.temporary_folder("fastdp-compile-")
            (job.folder / "artifact").write_bytes(code)
            _load(job, job.folder / "artifact")
        _discard(job)
        job.folder, job.kept = None, None
        if attempt.error is not None:
            kept_code.drop(job.name)
            self._waiting.append(job)
            self._start_next()
        return job.run is not None

    def _start_next(self) -> None:
        """Start the worker for the next job if none is running. If the worker cannot be started, the job fails."""
        while self._waiting and not self._started:
            job = self._waiting.popleft()
            with Attempt() as attempt:
                self.prepare()
                _start(job)
                self._started.append(job)
                self.set_niceness(niceness.YIELDING)
            if attempt.error is not None:
                _discard(job)
                job.failure = f"the compiler's process cannot be started: {attempt.why}"


def _start(job: Job) -> None:
    """Write a job's graph to a file and start its worker."""
    if not sys.executable:
        raise FileNotFoundError("sys.executable does not say where Python is")
    job.folder = isolation.temporary_folder("fastdp-compile-")
    (job.folder / "graph").write_bytes(job.data)
    files = str(job.folder / "graph"), str(job.folder / "artifact")
    with (job.folder / "errors").open("wb") as errors:
        job.process = subprocess.Popen(
            isolation.command(
                *files, str(job.threads), str(max(1, CORES // 2)), instruction_sets=_readying().instruction_sets
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=isolation.environment(job.folder),
            cwd=job.folder,
            start_new_session=True,
        )
    job.began = time.monotonic()


def _load(job: Job, artifact: Path) -> None:
    """Load what a worker has made for a job."""
    began = time.perf_counter()
    isolation.keep_headers(str(isolation.cache()))  # loading links the parts of a step anew
    run, constants = _artifact_class().load(path=str(artifact), format="binary"), job.constants
    job.run = (lambda *arguments: run(*arguments, *constants)) if constants else run
    job.load_seconds = time.perf_counter() - began


class _Ready(threading.Thread):
    """Imports TorchInductor and detects the CPU's features once, which would delay the first load by seconds.

    It neither traces nor compiles, so it may run beside the replicas. The interpreter waits for it at exit. Its errors
    are dropped: loading an artifact meets them again and reports them.
    """

    def __init__(self) -> None:
        super().__init__(name="fastdp-compile-ready")
        self.over = False
        self.instruction_sets: list[str] | None = None  # not known yet

    def run(self) -> None:
        """Run on the thread."""
        with Attempt():
            importlib.import_module("torch._inductor.compile_fx")
            self.instruction_sets = isolation.instruction_sets()
        self.over = True


@functools.cache
def _readying() -> _Ready:
    """Start the thread at the first call, and return it."""
    thread = _Ready()
    thread.start()
    return thread


def _artifact_class() -> Any:
    """The class of TorchInductor that loads a compiled graph. Imported on demand; it may be missing."""
    return importlib.import_module("torch._inductor").CompiledArtifact


def missing_compiler() -> str | None:
    """The reason why graphs cannot be compiled for this CPU; None if they can."""
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        return None
    return f"no C++ compiler ({named or ', '.join(COMPILERS)}) was found"


def _last_line(folder: Path) -> str:
    """The last line of the worker's stderr."""
    try:
        lines = (folder / "errors").read_text(errors="replace").strip().splitlines()
    except OSError as error:  # the temporary folder has been removed
        return in_words(error)
    said = "".join(c if c.isprintable() else " " for c in lines[-1]) if lines else ""
    return said[:300] or "it said nothing"


def _discard(job: Job) -> None:
    """Kill a job's process with its children and remove its files. Does nothing in a forked process."""
    if job.parent != os.getpid():
        return
    process = job.process
    if process is not None:
        with suppress(OSError):  # it has ended meanwhile
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    if job.folder is not None:
        shutil.rmtree(job.folder, ignore_errors=True)


def _end(started: list[Job], waiting: deque[Job]) -> None:
    """Kill running workers and drop queued jobs."""
    waiting.clear()
    while started:
        _discard(started.pop())
