"""How fast are the parts of a step on one card, beside a copy of the same bytes on the card?

Each kernel of fastdp's over buffers of 64 KiB to 1 GiB, copies between pinned host memory and the card, the scatter
of a host batch, the all-reduce between virtual GPUs of the card, and what a launch costs the host. GB/s count bytes
read and written. Kernels are captured many times over in a CUDA graph and timed by CUDA events around it, so the
host's share is not in them; "wall" marks what is timed by the synchronized wall clock instead. In every round each
takes its turn; medians over the rounds.

Writes a line of JSON for each measurement, to FASTDP_GPU_LOG where it is set.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from report import spread

from fastdp import launch
from fastdp.buckets import ArraySpec, FlatBuffers
from fastdp.launch import RowPiece, RowSlice
from fastdp.shard import split_rows

SIZES = (64 << 10, 1 << 20, 16 << 20, 256 << 20, 1 << 30)
ROW_NBYTES = 3072
ROUNDS = 7
GRAPH_SECONDS = 2e-3  # of work in one graph
SLOWEST = 1e11  # bytes per second, to choose how often a graph repeats a launch
REDUCED = (64 << 10, 1 << 20, 16 << 20, 64 << 20)
LAUNCHES = 2000


def emit(**line: Any) -> None:
    """One measurement, or one thing left out (`skipped`): printed, and kept where the stage looks for it."""
    text = json.dumps(line)
    print(text, flush=True)
    path = os.environ.get("FASTDP_GPU_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


class EventClock:
    """Seconds between two points of a stream, by CUDA events."""

    how = "CUDA events"

    def __init__(self, device: Any, stream: int) -> None:
        self._cuda = importlib.import_module("cupy").cuda.runtime
        self._stream = stream
        self._ends = self._cuda.eventCreate(), self._cuda.eventCreate()

    def seconds(self, work: Callable[[], object]) -> float:
        """Enqueue `work()` and wait for it."""
        self._cuda.eventRecord(self._ends[0], self._stream)
        work()
        self._cuda.eventRecord(self._ends[1], self._stream)
        self._cuda.eventSynchronize(self._ends[1])
        return float(self._cuda.eventElapsedTime(*self._ends)) / 1e3

    def close(self) -> None:
        """Give the events back."""
        for event in self._ends:
            self._cuda.eventDestroy(event)


class WallClock:
    """The same by the host's clock, waiting for the stream before and after."""

    how = "wall"

    def __init__(self, device: Any, stream: int) -> None:
        self._device, self._stream = device, stream

    def seconds(self, work: Callable[[], object]) -> float:
        """Run `work()` and wait for it."""
        self._device._wait_for(self._stream)
        began = time.perf_counter()
        work()
        self._device._wait_for(self._stream)
        return time.perf_counter() - began

    def close(self) -> None:
        """Nothing to give back."""


class Card:
    """A device with a stream and a clock for measuring.

    Args:
        device: a CudaDevice.
        clock: EventClock or WallClock.
        rounds: how many values each median is of.
    """

    def __init__(self, device: Any, clock: type[Any] = EventClock, rounds: int = ROUNDS) -> None:
        self.device, self.rounds = device, rounds
        self.runtime = importlib.import_module("fastdp.backend.cuda.runtime")
        self.stream = self.runtime.stream_create(device.ordinal)
        with self.current():
            self.clock = clock(device, self.stream)

    def current(self) -> AbstractContextManager[None]:
        """Make the card the thread's."""
        return self.runtime.on(self.device.ordinal)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give stream and events back."""
        self.clock.close()
        self.runtime.stream_destroy(self.stream)

    def address(self, array: Any) -> int:
        """Where an array lies on the card."""
        return int(self.runtime.array_pointer(array))

    def measure(self, works: Mapping[str, tuple[int, Callable[[], object]]]) -> dict[str, list[float]]:
        """Seconds of a launch of each work, a value a round. `works` gives bytes moved, and what enqueues one."""
        graphs: dict[str, tuple[int, int]] = {}
        with self.current():
            for name, (nbytes, enqueue) in works.items():
                enqueue()  # loads the kernel
                self.device._wait_for(self.stream)
                times = max(1, min(200, int(GRAPH_SECONDS * SLOWEST / max(1, nbytes))))
                self.runtime.capture_begin(self.stream)
                for _ in range(times):
                    enqueue()
                graph = self.runtime.capture_end(self.stream)
                graphs[name] = self.runtime.graph_instantiate(graph), times
                self.runtime.graph_destroy(graph)
            found: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(self.rounds + 1):
                for name, (graph, times) in graphs.items():
                    replay = lambda graph=graph: self.runtime.graph_launch(graph, self.stream)  # noqa: E731
                    found[name].append(self.clock.seconds(replay) / times)
            for graph, _ in graphs.values():
                self.runtime.graph_exec_destroy(graph)
        return {name: values[1:] for name, values in found.items()}


def kernels(card: Card, nbytes: int) -> None:
    """Every kernel over buffers of `nbytes`, and the copy."""
    buffers = [card.device.zeros((nbytes,), np.dtype(np.uint8)) for _ in range(4)]
    a, b, c, d = (card.address(buffer) for buffer in buffers)
    n, rows = nbytes // 4, nbytes // ROW_NBYTES
    small = card.device.zeros((64,), np.dtype(np.uint8))
    lr, iterations, flag, norm = (card.address(small) + 16 * i for i in range(4))
    blocks = launch.l2_norm_blocks(n, 4)
    partials = card.address(held := card.device.zeros((8 * blocks,), np.dtype(np.uint8)))
    order = np.random.default_rng(0).permutation(rows).astype(np.int64)
    shuffle = card.device.empty(order.shape, order.dtype)
    card.device.copy(shuffle, order)
    index = card.address(shuffle)
    one, piece = RowSlice(a, b, rows, ROW_NBYTES, rows), RowPiece(a, b, rows, ROW_NBYTES, 0)
    on = {"stream": card.stream}
    table = card.device.kernels
    state = {"weights": a, "gradients": b, "momentums": c, "learning_rate": lr, "n": n, "dtype": "float32", **on}
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * nbytes, lambda: card.runtime.copy_async(b, a, nbytes, card.stream)),
        "slice_rows": (2 * rows * ROW_NBYTES, lambda: launch.slice_rows(table, [one], **on)),
        "slice_rows shuffled": (
            2 * rows * ROW_NBYTES,
            lambda: launch.slice_rows(table, [one], index=index, error=flag, **on),
        ),
        "concat_rows": (2 * rows * ROW_NBYTES, lambda: launch.concat_rows(table, [piece], **on)),
        "scale_cast fp32 to bf16": (
            6 * n,
            lambda: launch.scale_cast(table, x=a, y=b, n=n, x_dtype="float32", y_dtype="bfloat16", **on),
        ),
        "l2_norm": (
            4 * n,
            lambda: launch.l2_norm(table, [(a, n, "float32")], partials=partials, norm=norm, scale=norm + 4, **on),
        ),
        "check_finite": (4 * n, lambda: launch.check_finite(table, x=a, n=n, dtype="float32", found=flag, **on)),
        "fused_sgd momentum": (20 * n, lambda: launch.fused_sgd(table, momentum=0.9, **state)),
        "fused_adam": (28 * n, lambda: launch.fused_adam(table, velocities=d, iterations=iterations, **state)),
    }
    times = card.measure(works)
    copy = statistics.median(works["copy"][0] / t for t in times["copy"])
    for name, seconds in times.items():
        rates = [works[name][0] / t / 1e9 for t in seconds]
        share = round(statistics.median(rates) * 1e9 / copy, 3)
        emit(what=name, nbytes=nbytes, GBps=spread(rates, 4), of_copy=share, clock=card.clock.how)
    del held


def transfers(card: Card, nbytes: int) -> None:
    """Pinned host memory to the card and back, and the engine's scatter of a batch in ordinary memory."""
    buffer = card.device.zeros((nbytes,), np.dtype(np.uint8))
    pinned = card.device.pinned.empty((nbytes,), np.dtype(np.uint8))
    pinned[:] = 1
    there, here = card.address(buffer), pinned.ctypes.data
    times = card.measure(
        {
            "pinned to card": (nbytes, lambda: card.runtime.copy_async(there, here, nbytes, card.stream)),
            "card to pinned": (nbytes, lambda: card.runtime.copy_async(here, there, nbytes, card.stream)),
        }
    )
    batch = [np.ones((max(1, nbytes // ROW_NBYTES), ROW_NBYTES), np.uint8)]
    (rows,) = split_rows(len(batch[0]), 1)

    def scatter() -> None:
        card.device.take_rows(batch, rows)
        card.device.compute.record().synchronize(60)

    times["take_rows (wall)"] = wall(scatter, card.rounds)
    for name, seconds in times.items():
        how = "wall" if "wall" in name else card.clock.how
        emit(what=name, nbytes=nbytes, GBps=spread([nbytes / t / 1e9 for t in seconds], 4), clock=how)


def wall(work: Callable[[], object], rounds: int, times: int = 1) -> list[float]:
    """Seconds of a call of `work()`, which waits by itself; a value a round, of `times` calls each."""
    values = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        for _ in range(times):
            work()
        values.append((time.perf_counter() - began) / times)
    return values[3:]


def all_reduces(devices: Sequence[Any], nbytes: int, rounds: int) -> None:
    """The engine's all-reduce of one bucket per device, waited for."""
    comm = importlib.import_module("fastdp.comm.cuda").CudaCommunicator(devices, 60.0)
    flats = [FlatBuffers([ArraySpec("g", (nbytes // 4,), "float32")], device) for device in devices]
    for device, flat in zip(devices, flats, strict=True):
        device.copy(flat.views[0], np.zeros(flat.views[0].shape, np.float32))
    buckets = flats[0].buckets()

    def step() -> None:
        comm.all_reduce(flats, flats, buckets)
        for device in devices:
            device.compute.record().finish(60)

    seconds = wall(step, rounds, 10)
    comm.check()
    # Each card's bus bandwidth as nccl-tests define it; here all ranks share one card's memory.
    ranks = len(devices)
    bus = [2 * (ranks - 1) / ranks * nbytes / t / 1e9 for t in seconds]
    way = sorted({comm.how(bucket) for bucket in buckets})
    emit(
        what=f"all_reduce of {ranks} virtual GPUs",
        nbytes=nbytes,
        way=way,
        microseconds=spread([1e6 * t for t in seconds], 4),
        bus_GBps=spread(bus, 4),
        clock="wall",
    )


def launches(card: Card, count: int = LAUNCHES) -> None:
    """What one launch costs the host, when nothing waits: a kernel of ours, a graph, an operation of torch's."""
    table, at = card.device.kernels, card.address(held := card.device.zeros((64,), np.dtype(np.uint8)))

    def ours() -> None:
        launch.scale_cast(table, x=at, y=at, n=1, x_dtype="float32", y_dtype="float32", stream=card.stream)

    works: dict[str, Callable[[], object]] = {"a kernel of fastdp": ours}
    with card.current():
        ours()
        card.device._wait_for(card.stream)
        card.runtime.capture_begin(card.stream)
        for _ in range(100):
            ours()
        graph = card.runtime.capture_end(card.stream)
        replay = card.runtime.graph_instantiate(graph)
        card.runtime.graph_destroy(graph)
        works["a graph of 100 kernels"] = lambda: card.runtime.graph_launch(replay, card.stream)
        torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
        if torch is not None and torch.cuda.is_available():
            x = torch.zeros(1, device="cuda")
            works["an operation of torch"] = lambda: x.mul_(1.0)
        for name, work in works.items():
            values = []
            for _ in range(card.rounds + 1):
                began = time.perf_counter()
                for _ in range(count // 20):
                    work()
                values.append((time.perf_counter() - began) / (count // 20))
                card.device._wait_for(card.stream)
            emit(
                what=f"host time: {name}", microseconds=spread([1e6 * v for v in values[1:]], 4), clock="wall, unwaited"
            )
        card.runtime.graph_exec_destroy(replay)
    del held


def main() -> int:
    """All parts on the first card; the status is 1 if one could not be measured."""
    if importlib.util.find_spec("cupy") is None:
        emit(skipped="parts", reason="CuPy is not installed")
        return 0
    fastdp = importlib.import_module("fastdp")
    device = importlib.import_module("fastdp.device")
    runtime = importlib.import_module("fastdp.backend.cuda.runtime")
    try:
        runtime.device_count()
    except RuntimeError as error:
        emit(skipped="parts", reason=str(error))
        return 0
    fastdp.set_virtual_devices(8, kind="gpu")
    devices = device.resolve(8)
    card = Card(devices[0])
    jobs: list[tuple[str, Callable[[], None]]] = [("launches", lambda: launches(card))]
    jobs += [(f"kernels at {size}", lambda size=size: kernels(card, size)) for size in SIZES]  # type: ignore[misc]
    jobs += [(f"transfers at {size}", lambda size=size: transfers(card, size)) for size in SIZES[:4]]  # type: ignore[misc]
    jobs += [
        (f"all_reduce {count} at {size}", lambda c=count, s=size: all_reduces(devices[:c], s, ROUNDS))  # type: ignore[misc]
        for count in (2, 4, 8)
        for size in REDUCED
    ]
    failed = 0
    for name, job in jobs:
        try:
            job()
        except (RuntimeError, MemoryError, ValueError) as error:  # the other parts can still be measured
            failed += 1
            emit(skipped=name, reason=f"{type(error).__name__}: {error}")
    card.close()
    fastdp.set_virtual_devices(0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
