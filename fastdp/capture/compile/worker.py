"""The process that compiles one captured step by TorchInductor.

`main(GRAPH, ARTIFACT, THREADS, CORES)` reads a graph, compiles it for `THREADS` cores while using `CORES` cores itself,
and saves an artifact that the training process can load. It ends with its parent, which closes its standard input. The
parent starts it isolated (`fastdp.capture.compile.isolation`), and the graph lies in a private folder of the parent:
one that another user wrote, or could write, is not read.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch._inductor import CompiledArtifact, standalone_compile
from torch._inductor.exc import InductorError

from fastdp import private_files
from fastdp.capture.compile.niceness import YIELDING
from fastdp.capture.graph import products, recurrent
from fastdp.capture.graph.serialize import from_bytes, is_deterministic
from fastdp.tensors import recurrent_ops

# Importing the modules registers operations that graphs may contain.
OWN_OPERATIONS = (products, recurrent, recurrent_ops)


def main(graph: str, artifact: str, threads: str, cores: str) -> None:
    """Compile the graph in one file into the artifact in another."""
    threading.Thread(target=_end_with_parent, args=(Path(graph).parent,), daemon=True).start()
    os.nice(YIELDING)
    settings = {"cpp.threads": int(threads), "compile_threads": int(cores)}
    # A C++ wrapper releases the interpreter's lock for the whole step. The Python wrapper calls kernels with the lock
    # held, so that only one replica could compute at a time.
    try:
        compiled = _compiled(graph, settings | {"cpp_wrapper": True})
    except InductorError:  # an operation that only the Python wrapper can call
        compiled = _compiled(graph, settings)
    unfinished = f"{artifact}.unfinished"
    compiled.save(path=unfinished, format="binary")
    Path(unfinished).rename(artifact)


def _compiled(graph: str, settings: dict[str, Any]) -> CompiledArtifact:
    """Compile the graph in a file with these settings of TorchInductor."""
    path = Path(graph)
    with private_files.opened_folder(path.parent, make=False) as folder:
        data = private_files.read(folder, path.name, sys.maxsize - 1)
    if data is None:
        raise PermissionError(f"{graph} must be a file of this user's own, which nobody else can write to")
    torch.use_deterministic_algorithms(is_deterministic(data))
    module, inputs, mode = from_bytes(data)
    # The tracing context passes on the inputs' fake mode: torch 2.11 has no argument for it.
    context = torch._guards.tracing(torch._guards.TracingContext(mode))
    with torch.no_grad(), torch._inductor.config.patch(settings), context:
        return standalone_compile(module, inputs, dynamic_shapes="from_tracing_context")


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of standard input, remove the files that a killed parent has left, and kill this process and
    the compilers that it started."""
    os.read(0, 1)  # not sys.stdin: holding its lock here would abort the interpreter at exit
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
