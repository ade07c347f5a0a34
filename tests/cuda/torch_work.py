"""Torch's work on the simulated CUDA: which GPU each tensor is on, and what orders the accesses to it.

All tensors are in host memory here, so neither torch nor the simulation would mind a tensor of another GPU, or one that
is not there yet. While `watched` lasts every operation that a worker runs is work of the stream that the worker
issues: its tensors must be on that stream's GPU, and the accesses before must be ordered before it.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from clocks import Clock, join, tick
from simulated_memory import RaceError, SimulationError
from simulation import Simulation
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastdp.comm import context as contexts


class DeviceError(SimulationError):
    """An operation on tensors of another GPU: on real ones torch refuses it."""


@dataclass
class _Held:
    """Torch's own memory: where it is, who wrote it last, and who has read it since. `alive` keeps its number."""

    ordinal: int
    alive: StorageWeakRef
    written: tuple[int, int] = (0, 0)
    read: dict[int, int] = field(default_factory=dict)


class TorchWork:
    """Watches the operations of all workers.

    Args:
        sim: whose streams have the clocks.

    Attributes:
        copies: how many tensors were copied from GPU to GPU.
    """

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._held: dict[int, _Held] = {}
        self.copies = 0

    def arrived(self, value: torch.Tensor, device: Any) -> torch.Tensor:
        """Stands in for `torch_peers.arrived`: a copy by the stream of the worker that takes it."""
        stream = _current()
        if stream is None or stream is not device.compute:
            self._sim.fail(SimulationError(f"a tensor is brought to {device.name} from the work of {stream}"))
        if self._ordinal(value, stream) == device.ordinal:
            return value
        with self._sim.lock:
            self.copies += 1
            self._touch(value, write=False, stream=stream, name="peer copy", anywhere=True)
        with _disable_current_modes():
            copied = value.detach().clone()
        self.after([copied])
        return copied

    def exchange(self, context: Any, value: Any, place: object) -> list[Any]:
        """Stands in for `Context.exchange`: through the host, which waits for the worker's stream."""
        stream = _current()

        def out(tensor: torch.Tensor) -> torch.Tensor:
            self.before("exchange", [(tensor, False)])
            with _disable_current_modes():
                return tensor.clone()

        def back(tensor: torch.Tensor) -> torch.Tensor:
            with _disable_current_modes():
                tensor = tensor.clone()
            self.after([tensor])
            return tensor

        given = contexts._moved(value, out)
        self._sim.synchronize(stream.handle)
        return [contexts._moved(one, back) for one in context.rendezvous.exchange(context.rank, given, place)]

    def before(self, func: Any, tensors: list[tuple[torch.Tensor, bool]]) -> None:
        """An operation reads, and perhaps writes, these tensors."""
        with self._sim.lock:
            for tensor, write in tensors:
                self._touch(tensor, write=write, stream=_current(), name=str(func), anywhere=False)

    def after(self, made: list[torch.Tensor]) -> None:
        """An operation has made these tensors: memory that is not known yet is its stream's."""
        stream = _current()
        with self._sim.lock:
            clock = self._clock(stream)
            for tensor in made:
                if not self._engine(tensor) and self._key(tensor) not in self._held:
                    held = self._hold(tensor, stream)
                    held.written = (stream.handle, clock[stream.handle])

    def _touch(self, tensor: torch.Tensor, *, write: bool, stream: Any, name: str, anywhere: bool) -> None:
        if not tensor.numel():
            return
        clock = self._clock(stream)
        there = self._ordinal(tensor, stream)
        if there != stream.ordinal and not anywhere:
            self._sim.fail(DeviceError(f"{name} on GPU {stream.ordinal} takes a tensor of GPU {there}"))
        piece = (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        if self._engine(tensor):
            try:
                self._sim.memory.touch(piece, write, stream.handle, clock, name)
            except SimulationError as error:
                self._sim.fail(error)
            return
        held = self._hold(tensor, stream)
        before = {held.written[0]: held.written[1]}
        if write:
            join(before, held.read)
        for actor, time in before.items():
            if actor and clock.get(actor, 0) < time:
                self._sim.fail(RaceError(f"{name} on {stream.handle:#x}: nothing orders it after stream {actor:#x}"))
        if write:
            held.written, held.read = (stream.handle, clock[stream.handle]), {}
        else:
            held.read[stream.handle] = clock[stream.handle]

    def _clock(self, stream: Any) -> Clock:
        """The stream's, one step on: it knows what its worker knows."""
        clock = self._sim.streams[stream.handle].clock
        join(clock, self._sim.hosts.own())
        tick(clock, stream.handle)
        return clock

    def _ordinal(self, tensor: torch.Tensor, stream: Any) -> int:
        """The GPU that a tensor is on. What a worker made outside of torch is on its own."""
        found = self._engine(tensor)
        return found.device if found else self._hold(tensor, stream).ordinal

    def _engine(self, tensor: torch.Tensor) -> Any:
        """The engine's allocation that a tensor lies in, if any."""
        found = self._sim.memory._find(tensor.data_ptr()) if tensor.numel() else None
        return found if found is not None and found.device is not None else None

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _hold(self, tensor: torch.Tensor, stream: Any) -> _Held:
        key = self._key(tensor)
        if key not in self._held:
            self._held[key] = _Held(stream.ordinal, StorageWeakRef(tensor.untyped_storage()))
        return self._held[key]


class Watching(TorchDispatchMode):
    """Tells TorchWork of each operation of this thread."""

    def __init__(self, work: TorchWork) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = []
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *self._named(func, kwargs)]:
            write = argument.alias_info is not None and argument.alias_info.is_write
            taken += [(tensor, write) for tensor in _tensors(value)]
        self._work.before(func, taken)
        made = func(*args, **kwargs)
        self._work.after(_tensors(made))
        return made

    @staticmethod
    def _named(func, kwargs):
        return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def _current() -> Any:
    return importlib.import_module("fastdp.runtime.cuda.streams").current_stream()


@contextlib.contextmanager
def watched(sim: Simulation) -> Iterator[TorchWork]:
    """While it lasts all workers' operations are watched, and copies between GPUs are noted."""
    work = TorchWork(sim)
    streams = importlib.import_module("fastdp.runtime.cuda.streams")
    perform, modes = streams.CudaStream._perform, threading.local()

    def watch(stream: Any, item: Any) -> None:
        def run() -> None:
            if getattr(modes, "on", False):
                item()
                return
            modes.on = True
            try:
                with Watching(work):
                    item()
            finally:
                modes.on = False

        perform(stream, run)

    def arrived(value: torch.Tensor, device: Any) -> torch.Tensor:
        return work.arrived(value, device)

    exchange = contexts.Context.exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            contexts.Context, "exchange", lambda c, *given: (work.exchange if c.size > 1 else exchange)(c, *given)
        )
        patch.setattr(streams.CudaStream, "_perform", watch)
        for module in ("values", "graph"):
            patch.setattr(importlib.import_module(f"fastdp.program.keras.placement.{module}"), "arrived", arrived)
        yield work
