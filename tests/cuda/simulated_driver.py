"""The CUDA driver's library on the simulated CUDA, as ctypes loads it: events, and graphs put together of others.

The functions but one are C functions of ctypes', so what `fastdp.runtime.cuda.driver` hands over goes the way of a real
call.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Sequence

import pytest
from simulation import Simulation

NAMES = ("libcuda.so.1", "nvcuda.dll")
OK, INVALID_VALUE, INVALID_HANDLE = 0, 1, 400
ERRORS = {INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE", INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE"}
_HANDLE, _OUT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)


class _EventQuery:
    """No C function: ctypes would swallow the errors of work that the simulation does while it is asked."""

    argtypes: Sequence[object] = ()
    restype: object = None

    def __call__(self, event) -> int:
        return int(sys.modules["cupy"].cuda.runtime.eventQuery(event))


class Driver:
    """What `ctypes.CDLL` gives."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        # By the handle of a child node: its graph, and which of that graph's nodes nothing of the child comes after.
        self._ends: dict[int, tuple[int, frozenset[int]]] = {}
        self._functions = {
            "cuEventQuery": _EventQuery(),
            "cuGraphCreate": ctypes.CFUNCTYPE(ctypes.c_int, _OUT, ctypes.c_uint)(self._create),
            "cuGraphAddChildGraphNode": ctypes.CFUNCTYPE(
                ctypes.c_int, _OUT, _HANDLE, ctypes.POINTER(_HANDLE), ctypes.c_size_t, _HANDLE
            )(self._add_child),
            "cuGraphDestroy": ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE)(self._destroy),
            "cuGetErrorName": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))(
                self._error_name
            ),
        }

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(f"{NAMES[0]}: undefined symbol: {name}")
        return self._functions[name]

    def _create(self, graph, flags) -> int:
        sim = self._sim
        with sim.lock:
            if flags or not sim.thread.context:
                return INVALID_VALUE
            graph[0] = sim.handle()
            sim.graphs[graph[0]] = []
        return OK

    def _add_child(self, node, graph, dependencies, count, child) -> int:
        sim = self._sim
        with sim.lock:
            if graph not in sim.graphs or child not in sim.graphs:
                return INVALID_HANDLE
            before: frozenset[int] = frozenset()
            for i in range(count):
                there, ends = self._ends.get(dependencies[i], (None, frozenset()))
                if there != graph:
                    return INVALID_HANDLE
                before |= ends
            nodes, inside = sim.graphs[graph], sim.graphs[child]
            at = len(nodes)
            nodes += [(op, frozenset(at + i for i in after) or before) for op, after in inside]
            node[0] = sim.handle()
            self._ends[node[0]] = graph, _leaves(inside, at) or before
        return OK

    def _destroy(self, graph) -> int:
        with self._sim.lock:
            return INVALID_HANDLE if self._sim.graphs.pop(graph, None) is None else OK

    @staticmethod
    def _error_name(status, text) -> int:
        text[0] = ERRORS[status]
        return OK


def _leaves(nodes: Sequence[tuple[object, frozenset[int]]], at: int) -> frozenset[int]:
    """Those nodes of a graph that no other comes after, numbered from `at`."""
    inner = {i for _, after in nodes for i in after}
    return frozenset(at + i for i in range(len(nodes)) if i not in inner)


@contextlib.contextmanager
def loaded(sim: Simulation) -> Iterator[None]:
    """While it lasts ctypes finds the driver."""
    load, sim.driver = ctypes.CDLL, Driver(sim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name, *args: sim.driver if name in NAMES else load(name, *args))
        yield
