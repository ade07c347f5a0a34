"""How fast is the all-reduce of virtual devices, beside np.add of the same bytes and gloo?

GB/s are bytes of one device's buffer per second: a buffer of 64 MB reduced in 10 ms is 6.4 GB/s. np.add
adds two arrays of that size into a third on one thread, which is the minimum work of any reduction of two.

Rows marked * are not directly comparable: gloo reduces between processes with separate memory, and so
copies data that threads only read.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np
from report import finish, options, print_table

from fastdp.benchmark.rounds import alternate, spread
from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.comm.host.communicator import HostCommunicator
from fastdp.runtime.host.device import HostDevice

SIZES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)
DEVICES = (2, 4, 8)
GLOO_PROCESSES = (2, 4)

GLOO = """
import json, os, sys, tempfile, time
import torch, torch.distributed as dist, torch.multiprocessing as mp
def work(rank, size, path, sizes, rounds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=size)
    for nbytes in sizes:
        tensor, times = torch.zeros(nbytes // 4), []
        for _ in range(rounds + 1):
            dist.barrier()
            began, count = time.perf_counter(), max(1, (16 << 20) // nbytes)
            for _ in range(count):
                dist.all_reduce(tensor)
            times.append((time.perf_counter() - began) / count)
        if rank == 0:
            print(json.dumps([nbytes, times[1:]]), flush=True)
    dist.barrier()
    dist.destroy_process_group()
if __name__ == "__main__":
    size, sizes, rounds = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, folder + "/store", sizes, rounds), nprocs=size, start_method="fork")
"""


def fastdp_step(nbytes: int, count: int) -> tuple[Callable[[], object], list[HostDevice]]:
    """One synchronous all-reduce of `nbytes` over `count` new virtual devices, and the devices."""
    devices = [HostDevice(index) for index in range(count)]
    buffers = [FlatBuffers([ArraySpec("g", (nbytes // 4,), "float32")], device) for device in devices]
    for buffer in buffers:
        buffer.views[0][...] = 0
    communicator, buckets = HostCommunicator(devices), buffers[0].buckets()

    def step() -> None:
        communicator.all_reduce(buffers, buffers, buckets)
        for event in [device.compute.record() for device in devices]:
            event.synchronize(60)

    return step, devices


def numpy_step(nbytes: int) -> Callable[[], object]:
    """np.add of two arrays of `nbytes` into a third."""
    first, second, out = (np.ones(nbytes // 4, np.float32) for _ in range(3))
    return lambda: np.add(first, second, out=out)


def measure(nbytes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of np.add and of the all-reduce on each number of devices, alternating."""
    made = {f"fastdp {count}": fastdp_step(nbytes, count) for count in DEVICES}
    steps = {"np.add": numpy_step(nbytes), **{name: step for name, (step, _) in made.items()}}
    try:
        return alternate(steps, rounds=rounds, seconds=0.05)
    finally:
        for _, devices in made.values():
            for device in devices:
                device.close()


def measure_gloo(processes: int, rounds: int) -> dict[int, list[float]]:
    """Seconds of gloo's all_reduce by size; empty if torch has no gloo or it does not run."""
    if importlib.util.find_spec("torch") is None:
        return {}
    request = json.dumps([processes, SIZES, rounds])
    done = subprocess.run(
        [sys.executable, "-c", GLOO, request], check=False, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        print(f"gloo with {processes} processes did not run: {done.stderr.strip().splitlines()[-1]}")
        return {}
    return dict(map(json.loads, done.stdout.splitlines()))


def main() -> None:
    """Measure all sizes, print, save."""
    asked = options(__doc__)
    rounds = 2 if asked.quick else 11
    gloo = {count: measure_gloo(count, rounds) for count in GLOO_PROCESSES}
    rows, results = [], {}
    for nbytes in SIZES:
        times = measure(nbytes, rounds)
        times |= {f"gloo {count}*": found[nbytes] for count, found in gloo.items() if nbytes in found}
        rates = {name: [nbytes / 1e9 / value for value in values] for name, values in times.items()}
        results[str(nbytes)] = {name: spread(values, 4) for name, values in rates.items()}
        rows.append([f"{nbytes >> 10} KiB", *(f"{statistics.median(values):.2f}" for values in rates.values())])
    print_table("All-reduce of fp32, GB/s (median)", ["buffer", *rates], rows)
    finish("all_reduce", results, unit="GB/s of one device's buffer", save=asked.save)


if __name__ == "__main__":
    main()
