"""Injects faults for tests: raises, delays, corrupts or kills in a verb of a step, on one of the devices."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastdp.comm.host.reduction import HostReduction
from fastdp.comm.scatter_merge import Merger
from fastdp.engine.replicas import Replica
from fastdp.errors import DeviceLostError
from fastdp.runtime.host.device import HostDevice

VERBS = ("scatter", "run", "reduce", "update", "merge")
KINDS = ("raise", "exit", "memory", "lose", "delay", "corrupt", "interrupt", "kill")
DELAY = 0.02


class Fault:
    """One fault, which strikes once.

    Args:
        verb: where in the step.
        device: the name of the device; None for whichever comes there first.
        kind: what it does.

    Attributes:
        struck: whether it has.
    """

    def __init__(self, verb: str, device: str | None, kind: str) -> None:
        self.verb, self.device, self.kind = verb, device, kind
        self.struck = False
        self.stepping: str | None = None  # the device whose update runs torch's optimizers
        self._lock = threading.Lock()

    def strikes(self, verb: str, device: str | None) -> bool:
        """Whether it strikes here: the first time that the device comes to the verb."""
        if verb != self.verb or (self.device is not None and device != self.device):
            return False
        with self._lock:
            first, self.struck = not self.struck, True
            return first

    def strike(self, values: Callable[[], Any]) -> None:
        """Do it. `values()` are the arrays that it may corrupt."""
        if self.kind == "raise":
            raise RuntimeError(f"injected in {self.verb}")
        if self.kind == "exit":
            raise SystemExit(3)
        if self.kind == "memory":
            raise MemoryError(f"injected in {self.verb}")
        if self.kind == "lose":
            raise DeviceLostError(f"injected in {self.verb}.")
        if self.kind == "delay":
            time.sleep(DELAY)
        if self.kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(DELAY)  # it comes on the main thread
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if self.kind == "corrupt":
            for array in values():
                if array.dtype.kind == "f" and array.size:
                    array.reshape(-1)[0] = np.nan


@contextmanager
def injected(fault: Fault) -> Iterator[Fault]:
    """Let a fault strike in steps within the block."""
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (HostDevice, "take_rows", _in_scatter),
        (Replica, "train", _in_run),
        (Replica, "call", _in_run),
        (HostReduction, "_sum", _in_reduce),
        (Replica, "update", _in_update),
        (Merger, "write", _in_merge),
    ]
    torchs = sys.modules.get("fastdp.program.torch.update")
    if torchs is not None:
        places.append((torchs, "_step", _in_step))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, make in places:
            setattr(owner, name, make(fault, getattr(owner, name)))
        yield fault
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _in_scatter(fault: Fault, original: Callable[..., Any]) -> Callable[..., Any]:
    def take_rows(device: HostDevice, batch: Any, rows: Any) -> Any:
        taken = original(device, batch, rows)
        if fault.strikes("scatter", device.name):
            if fault.kind == "corrupt":  # rows are views: the caller's arrays stay as they are
                taken = [np.array(array) for array in taken]
            fault.strike(lambda: taken)
        return taken

    return take_rows


def _in_run(fault: Fault, original: Callable[..., Any]) -> Callable[..., Any]:
    def run(replica: Replica, *given: Any, **named: Any) -> Any:
        result = original(replica, *given, **named)
        if fault.strikes("run", replica.device.name):
            # Of the forward pass of a loop only the outputs count: its gradients come later.
            fault.strike(lambda: [*result.outputs, *replica.gradients.views])
        return result

    return run


def _in_reduce(fault: Fault, original: Callable[..., Any]) -> Callable[..., Any]:
    def sum_piece(reduction: HostReduction, dtype: str, span: slice, *further: Any) -> None:
        original(reduction, dtype, span, *further)
        if fault.strikes("reduce", None):
            fault.strike(lambda: [target.buffers[dtype][span] for target in reduction._targets])

    return sum_piece


def _in_update(fault: Fault, original: Callable[..., Any]) -> Callable[..., Any]:
    def update(replica: Replica, totals: Any) -> None:
        name, program = replica.device.name, replica._program
        if replica.update_is_reliable:  # it cannot fail half way, and there is nothing to take back
            if fault.strikes("update", name):
                fault.strike(list)
            original(replica, totals)
        elif hasattr(program, "optimizers"):  # behind the steps of torch's optimizers, within the update
            fault.stepping = name
            original(replica, totals)
        else:
            original(replica, totals)
            if fault.strikes("update", name):
                fault.strike(list)

    return update


def _in_step(fault: Fault, original: Callable[..., Any]) -> Callable[..., Any]:
    def step(*given: Any) -> Any:
        result = original(*given)
        name, fault.stepping = fault.stepping, None
        if name is not None and fault.strikes("update", name):
            fault.strike(list)
        return result

    return step


def _in_merge(fault: Fault, original: Callable[..., Any]) -> Callable[..., Any]:
    def write(merger: Merger, rank: int, outputs: Any) -> None:
        original(merger, rank, outputs)
        if fault.strikes("merge", merger._devices[rank].name):
            fault.strike(list)

    return write
