"""How many cores a torch operation uses on each thread: the workers of devices share them.

Torch's operations run on OpenMP. Each thread that runs one on several cores gets a pool of helpers of its own, which
outlives the operation. While all pools together have no more threads than there are cores, helpers wait for the next
operation awake; as soon as there are more, GNU's OpenMP puts every helper of the process to sleep at once, and each
operation has to wake them: with a pool on the host thread and one on a worker, of two cores, small operations took five
times as long. So pools do not outlive their use here: the host thread has none while replicas run, and a worker none of
more threads than its share.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdp.runtime.host.resources import CORES

_PAUSE_SOFT = 1  # omp_pause_soft, OpenMP 5.0


def _pool_ender() -> Callable[[], object]:
    """OpenMP's own call that ends the calling thread's pool, from the runtime that torch uses."""
    folder = Path(torch.__file__).parent / "lib"
    found = [folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (folder / name).exists()]
    # Asked of torch's own library, whose dependencies are searched: a process may have loaded several OpenMP runtimes.
    pause = getattr(ctypes.CDLL(str(found[0])), "omp_pause_resource_all", None) if found else None
    return functools.partial(pause, _PAUSE_SOFT) if pause is not None else lambda: None


# Ends the calling thread's pool of helpers, if it has one; the next operation on several cores makes a new one. It
# takes about a microsecond without a pool, and twenty with one.
end_pool = _pool_ender()


def prepare_worker(threads: int, device: Any) -> None:
    """Set a worker's share of the cores, and let torch's work on this thread go to the device's compute stream."""
    fewer = threads < torch.get_num_threads()
    torch.set_num_threads(threads)
    if fewer:
        end_pool()
    if device.on_gpu:
        # Torch runs the backward pass of all replicas on a card in one thread of its own: replicas that meet there
        # would wait for each other, and what is kept for the worker's thread would be missing. Off, backward
        # stays in the worker.
        torch.autograd.set_multithreading_enabled(False)
    if device.on_gpu and device.torch_device.startswith("cuda"):
        handle = device.compute.handle
        if torch.cuda.current_stream(device.torch_device).cuda_stream != handle:
            torch.cuda.set_stream(torch.cuda.ExternalStream(handle, device=device.torch_device))


@contextmanager
def replicas_run(threads: int) -> Iterator[None]:
    """Held by the host thread while replicas run, with `threads` cores each. With more than one it has no pool.

    One replica runs on the host thread itself, in those of torch's modes that a worker has. Torch's setting is partly
    per thread (OpenMP) and partly global (MKL): workers set theirs once, the host thread holds the global one for the
    time of a step.
    """
    if threads < CORES:
        end_pool()
    with intra_op_threads(threads), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def intra_op_threads(threads: int) -> Iterator[None]:
    """Let each of this thread's operations use `threads` cores."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
