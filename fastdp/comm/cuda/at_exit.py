"""Closes what NCCL waits for when the process ends: graphs first, then communicators, and the devices after them.

A communicator that nobody has destroyed CuPy destroys, late in the interpreter's end. NCCL then waits for the graphs
that hold its collectives, and for collectives that other GPUs never join: for ever.
"""

from __future__ import annotations

import sys

from fastdp.comm.cuda import nccl
from fastdp.comm.cuda.step_graph import graph
from fastdp.runtime.cuda.memory import run_deferred

__all__ = ["close"]


def close(seconds: float) -> None:
    """Destroy all graphs, then all communicators, within a time limit. Called by `runtime.select` at the end.

    What is not done by then is left to the driver, which frees everything when the process is gone.
    """
    if not nccl.open_communicators() and not graph.alive:
        return
    if not nccl.exit_thread.run(_close, seconds):
        # The thread holds the communicators, so that nobody else waits for them.
        sys.stderr.write(
            f"fastdp: NCCL did not close its communicators within {seconds:g} seconds, and is left as it is.\n"
        )


def _close() -> None:
    run_deferred()
    for held in list(graph.alive):
        held.drop()
    nccl.destroy(nccl.open_communicators())
