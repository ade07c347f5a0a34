"""How fast are the parts of a step on one card, beside a copy of the same bytes on the card?

Measures each kernel of fastdp over buffers of 64 KiB to 1 GiB, copies between pinned host memory and the card, the
scatter of a host batch, the all-reduce between virtual GPUs of the card, and the host's cost of a launch. GB/s count
bytes read and written. Kernels are captured many times in a CUDA graph and timed by CUDA events around it, so host time
is not included; "wall" marks measurements by the synchronized wall clock. Measurements take turns in every round;
results are medians over the rounds.

Prints a line of JSON for each measurement, and appends it to FASTDP_GPU_LOG if that is set.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.card import GRAPH_SECONDS, ROUNDS, SLOWEST, Card, emit
from bench.gpu.launches import NODES, launches, launches_of_replicas, replays
from fastdp import launch
from fastdp.benchmark.rounds import spread
from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.launch import SIGNALS_NBYTES, PeerGroup, RowPiece, RowSlice, coresident_blocks
from fastdp.launch.args import PACK_NBYTES
from fastdp.shard import split_rows

# Large sizes first, because the goals are about them.
SIZES = (64 << 20, 256 << 20, 1 << 30, 16 << 20, 1 << 20, 64 << 10)
ROW_NBYTES = 3072
REDUCED = (64 << 20, 16 << 20, 1 << 20, 64 << 10)
RANKS = (2, 4, 8)


def kernels(card: Card, nbytes: int) -> None:
    """Measure the kernels that move rows, over buffers of `nbytes`, and a copy."""
    held = [card.device.zeros((size,), np.dtype(np.uint8)) for size in (nbytes, nbytes, 4)]
    a, b, flag = map(card.address, held)
    rows = nbytes // ROW_NBYTES
    order = np.random.default_rng(0).permutation(rows).astype(np.int64)
    shuffle = card.device.empty(order.shape, order.dtype)
    card.device.copy(shuffle, order)
    index = card.address(shuffle)
    one, piece = RowSlice(a, b, rows, ROW_NBYTES, rows), RowPiece(a, b, rows, ROW_NBYTES, 0)
    on = {"stream": card.stream}
    table = card.device.kernels
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * nbytes, lambda: card.runtime.copy_async(b, a, nbytes, card.stream)),
        "slice_rows": (2 * rows * ROW_NBYTES, lambda: launch.slice_rows(table, [one], **on)),
        "slice_rows shuffled": (
            2 * rows * ROW_NBYTES,
            lambda: launch.slice_rows(table, [one], index=index, error=flag, **on),
        ),
        "concat_rows": (2 * rows * ROW_NBYTES, lambda: launch.concat_rows(table, [piece], **on)),
    }
    times = card.measure(works)
    copy = statistics.median(works["copy"][0] / t for t in times["copy"])
    for name, seconds in times.items():
        rates = [works[name][0] / t / 1e9 for t in seconds]
        share = round(statistics.median(rates) * 1e9 / copy, 3)
        emit(what=name, nbytes=nbytes, GBps=spread(rates, 4), of_copy=share, clock=card.clock.how)
    del held


def transfers(card: Card, nbytes: int) -> None:
    """Measure copies from pinned host memory to the card and back, and the scatter of a batch in pageable memory."""
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
    """Seconds per call of the synchronous `work()`, one value per round of `times` calls."""
    values = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        for _ in range(times):
            work()
        values.append((time.perf_counter() - began) / times)
    return values[3:]


def all_reduces(devices: Sequence[Any], nbytes: int, rounds: int) -> None:
    """Measure the engine's all-reduce of one buffer per device, synchronously."""
    comm = importlib.import_module("fastdp.comm.cuda.communicator").CudaCommunicator(devices, 60.0)
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
    # Bus bandwidth per rank as defined by nccl-tests; here all ranks share one card's memory.
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


def bucket_kernels(card: Card, ranks: int, nbytes: int, way: str) -> None:
    """Measure the all-reduce kernel alone, with `ranks` ranks that share the card, compared with a copy of a bucket.

    Bytes are the reads and writes of all ranks. According to the kernels' first lines, each rank moves 3 + R bytes per
    byte of the bucket in one-shot, and 3 in two-shot.
    """
    runtime, table, n = card.runtime, card.device.kernels, nbytes // 4
    staged = nbytes if way == "one-shot" else (-(-nbytes // PACK_NBYTES // ranks) + 2) * PACK_NBYTES
    half = -(-staged // PACK_NBYTES) * PACK_NBYTES
    held = [
        [card.device.zeros((size,), np.dtype(np.uint8)) for size in (nbytes, 2 * half, SIGNALS_NBYTES, 4)]
        for _ in range(ranks)
    ]
    inputs, staging, signals, errors = (tuple(card.address(one[i]) for one in held) for i in range(4))
    blocks = coresident_blocks(table.sm_count, ranks)
    groups = [PeerGroup(rank, staging, 2 * half, signals, errors[rank], blocks) for rank in range(ranks)]
    streams = [runtime.stream_create(card.device.ordinal) for _ in range(ranks)]
    events = [runtime.event_create() for _ in range(ranks + 1)]

    def issue(group: PeerGroup) -> None:
        options: dict[str, Any] = {"y": inputs[group.rank], "n": n, "dtype": "float32", "stream": streams[group.rank]}
        if way == "one-shot":
            launch.all_reduce_one_shot(table, group, x=inputs[group.rank], **options)
        else:
            launch.all_reduce_two_shot(table, group, inputs=inputs, **options)

    def reduce(times: int = 1) -> None:
        runtime.event_record(events[ranks], card.stream)
        for stream in streams:
            runtime.stream_wait_event(stream, events[ranks])
        for _ in range(times):
            for group in groups:
                issue(group)
        for stream, event in zip(streams, events[:ranks], strict=True):
            runtime.event_record(event, stream)
            runtime.stream_wait_event(card.stream, event)

    times = max(1, min(50, int(GRAPH_SECONDS * SLOWEST / nbytes)))
    with card.current():
        # One rank alone first: CUDA may load a kernel at its first launch, and then wait for running kernels.
        alone = PeerGroup(0, staging[:1], 2 * half, signals[:1], errors[0], 1)
        if way == "one-shot":
            launch.all_reduce_one_shot(table, alone, x=inputs[0], y=inputs[0], n=1, dtype="float32", stream=streams[0])
        else:
            launch.all_reduce_two_shot(
                table, alone, inputs=inputs[:1], y=inputs[0], n=1, dtype="float32", stream=streams[0]
            )
        card.device._wait_for(streams[0])
        reduce()
        card.device._wait_for(card.stream)
        seconds = [card.clock.seconds(lambda: reduce(times)) / times for _ in range(card.rounds + 1)][1:]
    given_up = [int(card.device.to_host(one[3]).view(np.uint32)[0]) for one in held]
    for event in events:
        runtime.event_destroy(event)
    for stream in streams:
        runtime.stream_destroy(stream)
    if any(given_up):
        raise RuntimeError(f"ranks {[rank for rank, gave in enumerate(given_up) if gave]} gave up waiting")
    copy = statistics.median(copy_rates(card, nbytes))
    moved = ranks * nbytes * (3 + ranks if way == "one-shot" else 3)
    rates = [moved / t / 1e9 for t in seconds]
    emit(
        what=f"all_reduce {way} of {ranks} ranks",
        nbytes=nbytes,
        GBps=spread(rates, 4),
        microseconds=spread([1e6 * t for t in seconds], 4),
        of_copy=round(statistics.median(rates) / copy, 3),
        clock=card.clock.how,
    )


def copy_rates(card: Card, nbytes: int) -> list[float]:
    """GB/s of a copy on the card, one value per round."""
    a, b = (card.device.zeros((nbytes,), np.dtype(np.uint8)) for _ in range(2))
    there, here = card.address(a), card.address(b)
    times = card.measure({"copy": (2 * nbytes, lambda: card.runtime.copy_async(there, here, nbytes, card.stream))})
    return [2 * nbytes / t / 1e9 for t in times["copy"]]


def jobs(card: Card, devices: Sequence[Any]) -> list[tuple[str, Callable[[], None]]]:
    """All measurements, the most important first."""
    found: list[tuple[str, Callable[[], None]]] = [
        ("launches", lambda: launches(card)),
        ("eight graphs", lambda: launches_of_replicas(card, len(devices))),
        *((f"replays of {nodes} nodes", partial(replays, card, nodes)) for nodes in NODES),
        *((f"kernels at {size}", partial(kernels, card, size)) for size in SIZES),
        *((f"transfers at {size}", partial(transfers, card, size)) for size in SIZES if size <= 256 << 20),
    ]
    for ranks in RANKS:
        found.append((f"all_reduce kernels of {ranks}", partial(bucket_kernels, card, ranks, 64 << 20, "two-shot")))
        found.append((f"all_reduce kernels of {ranks}", partial(bucket_kernels, card, ranks, 256 << 10, "one-shot")))
    found += [
        (f"all_reduce {count} at {size}", partial(all_reduces, devices[:count], size, ROUNDS))
        for size in REDUCED
        for count in RANKS
    ]
    return found


def run(found: Sequence[tuple[str, Callable[[], None]]], ends: float) -> int:
    """Run the measurements in sequence until the time is over; returns how many failed."""
    failed = 0
    for name, job in found:
        if time.monotonic() > ends:
            emit(skipped=name, reason="no time was left for it")
            continue
        try:
            job()
        except (RuntimeError, MemoryError, ValueError) as error:  # the other parts can still be measured
            failed += 1
            emit(skipped=name, reason=f"{type(error).__name__}: {error}"[:600])
    return failed


def main() -> int:
    """Measure all parts on the first card; returns 1 if one could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which nothing more is begun")
    ends = time.monotonic() + parser.parse_args().seconds
    if importlib.util.find_spec("cupy") is None:
        emit(skipped="parts", reason="CuPy is not installed")
        return 0
    fastdp = importlib.import_module("fastdp")
    runtime = importlib.import_module("fastdp.runtime.cuda.cupy_api")
    try:
        runtime.device_count()
    except RuntimeError as error:
        emit(skipped="parts", reason=str(error))
        return 0
    fastdp.set_virtual_devices(max(RANKS), kind="gpu")
    devices = importlib.import_module("fastdp.runtime.select").resolve(max(RANKS))
    card = Card(devices[0])
    failed = run(jobs(card, devices), ends)
    card.close()
    fastdp.set_virtual_devices(0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
