"""Builds CUDA graphs from child graphs through the driver API, which CuPy does not expose.

The handles are the same as in cupy_api.py: every CUDA runtime of the process (CuPy's, torch's) shares one driver, and
a graph is the same object to all of them. This module calls only the driver, through ctypes. Source of the calls: the
CUDA driver API reference, "Graph Management".
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["GraphError", "chained"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_HANDLE = ctypes.c_void_p
_CALLS = {
    "cuGraphCreate": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cuGraphAddChildGraphNode": (ctypes.POINTER(_HANDLE), _HANDLE, ctypes.POINTER(_HANDLE), ctypes.c_size_t, _HANDLE),
    "cuGraphDestroy": (_HANDLE,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class GraphError(RuntimeError):
    """The driver cannot build a graph; the message holds the driver's error name."""


@functools.cache
def _library() -> Any:
    """The driver's library.

    Raises:
        GraphError: the library is missing, or lacks these calls.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, arguments in _CALLS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise GraphError(
            f"{_LIBRARY}, the CUDA driver's library, is needed to build CUDA graphs ({error}). Install NVIDIA's "
            'driver, or use graph="auto".'
        ) from None
    return library


def _call(name: str, *arguments: object) -> None:
    """Call the driver in the current context.

    Raises:
        GraphError: the call failed.
    """
    library = _library()
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        raise GraphError(f"{name}: {(text.value or b'unknown').decode()} ({status})")


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
        GraphError: there is no driver, or a call failed; for example, graphs that allocate memory cannot be copied.
    """
    graph = _HANDLE()
    _call("cuGraphCreate", ctypes.byref(graph), 0)
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
        with contextlib.suppress(GraphError):  # the first failure is more informative
            _call("cuGraphDestroy", graph)
        raise
    return int(graph.value or 0)


def _add(graph: ctypes.c_void_p, after: Sequence[int], child: int) -> int:
    """Add a copy of a graph as a child node that depends on the nodes `after`; returns the node."""
    node, before = _HANDLE(), (_HANDLE * len(after))(*after)
    _call("cuGraphAddChildGraphNode", ctypes.byref(node), graph, before, len(after), child)
    return int(node.value or 0)
