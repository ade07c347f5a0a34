"""Builds CUDA graphs from child graphs through the driver API, which CuPy does not expose.

The handles are those of cupy_api.py: a graph is the same object to every CUDA runtime of the process (CuPy's, torch's)
and to the one driver below them, which alone is asked here, through ctypes. Source of the calls: the CUDA driver API
reference, "Graph Management".
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
    """The driver cannot put a graph together; the message holds its own name for why."""


@functools.cache
def _library() -> Any:
    """The driver's library.

    Raises:
        GraphError: there is none, or one without these calls.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, arguments in _CALLS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise GraphError(
            f"{_LIBRARY}, the CUDA driver's library, is needed to put CUDA graphs together ({error}). Install NVIDIA's "
            'driver, or use graph="bucket".'
        ) from None
    return library


def _call(name: str, *arguments: object) -> None:
    """Call the driver, in the context that is current.

    Raises:
        GraphError: it refuses.
    """
    library = _library()
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        raise GraphError(f"{name}: {(text.value or b'unknown').decode()} ({status})")


def chained(segments: Sequence[int], branches: Sequence[tuple[int, int]]) -> int:
    """A graph that runs segments one after the other, and branches beside them, one after the other too.

    Args:
        segments: graphs, which are copied.
        branches: pairs (number of a segment, graph): the branch begins when that segment and the branches before it are
            over. Copied too.

    Returns:
        The graph, which the caller destroys (`runtime.graph_destroy`). What is enqueued behind its launch comes after
        all of its segments and branches.

    The device that the graphs were recorded on must be current.

    Raises:
        GraphError: there is no driver, or it refuses: graphs that allocate memory, for one, cannot be copied.
    """
    graph = _HANDLE()
    _call("cuGraphCreate", ctypes.byref(graph), 0)
    try:
        ends: list[int] = []
        waiting, last = list(branches), 0
        for number, segment in enumerate(segments):
            ends.append(_add(graph, ends[-1:], segment))
            # In their order: one that could begin waits behind one that cannot yet.
            while waiting and waiting[0][0] <= number:
                after, branch = waiting.pop(0)
                last = _add(graph, [ends[after], *([last] if last else [])], branch)
        if waiting:
            raise ValueError(f"branches={branches}: expected numbers below {len(segments)}, the number of segments")
    except BaseException:
        with contextlib.suppress(GraphError):  # the first failure tells more
            _call("cuGraphDestroy", graph)
        raise
    return int(graph.value or 0)


def _add(graph: ctypes.c_void_p, after: Sequence[int], child: int) -> int:
    """Add a copy of a graph as a node that comes after these nodes; the node."""
    node, before = _HANDLE(), (_HANDLE * len(after))(*after)
    _call("cuGraphAddChildGraphNode", ctypes.byref(node), graph, before, len(after), child)
    return int(node.value or 0)
