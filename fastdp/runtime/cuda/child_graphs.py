"""Builds CUDA graphs from child graphs through the driver API, which CuPy does not expose.

Source of the calls: the CUDA driver API reference, "Graph Management".
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

from fastdp.runtime.cuda.driver import DriverCallError, call

__all__ = ["chained"]

_HANDLE = ctypes.c_void_p


def chained(segments: Sequence[int], branches: Sequence[tuple[int, int]]) -> int:
    """Build a graph that runs the segments in sequence and, in parallel to them, the branches in sequence.

    Args:
        segments: graphs; they are copied.
        branches: pairs (index of a segment, graph); they are copied. A branch starts when its segment and the branches
            before it are done.

    Returns:
        The graph, which the caller destroys (`cupy_api.graph_destroy`). Work enqueued after its launch runs after all
        segments and branches.

    The device on which the graphs were recorded must be current.

    Raises:
        DriverCallError: there is no driver, or a call failed: graphs that allocate memory, for one, cannot be copied.
    """
    graph = _HANDLE()
    call("cuGraphCreate", ctypes.byref(graph), 0)
    try:
        ends: list[int] = []
        waiting, last = list(branches), 0
        for number, segment in enumerate(segments):
            ends.append(_add(graph, ends[-1:], segment))
            # Branches keep their order: one that could start waits behind one that cannot yet.
            while waiting and waiting[0][0] <= number:
                after, branch = waiting.pop(0)
                last = _add(graph, [ends[after], *([last] if last else [])], branch)
        if waiting:
            raise ValueError(f"branches={branches}: expected numbers below {len(segments)}, the number of segments")
    except BaseException:
        with contextlib.suppress(DriverCallError):  # the first failure is more informative
            call("cuGraphDestroy", graph)
        raise
    return int(graph.value or 0)


def _add(graph: ctypes.c_void_p, after: Sequence[int], child: int) -> int:
    """Add a copy of a graph as a child node that depends on the nodes `after`; returns the node."""
    node, before = _HANDLE(), (_HANDLE * len(after))(*after)
    call("cuGraphAddChildGraphNode", ctypes.byref(node), graph, before, len(after), child)
    return int(node.value or 0)
