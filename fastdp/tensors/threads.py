"""Sets how many cores torch operations use on each thread, so that the devices' workers share the cores.

Torch's operations run on OpenMP. Each thread that runs one on several cores gets its own pool of helper threads, which
outlives the operation. While all pools together have no more threads than there are cores, helpers stay awake between
operations. When there are more, GNU's OpenMP puts every helper of the process to sleep at once, and each operation has
to wake them: on two cores, with a pool on the host thread and one on a worker, small operations took five times as
long. So pools are ended after use: the host thread has no pool while replicas run, and a worker's pool never has more
threads than its share.

A user's loop makes many short passes, with its loss and its optimizer between them on the host thread. There a new
helper begins on a core that another thread has just left or not left yet, and while the host thread waits for it awake,
it may wait for a whole time slice: GAN's loop lost 40 of 65 ms a step so. So a small model's loop stays on one device's
share of the cores from a forward pass to the optimizer's step (`LoopShare`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_PAUSE_SOFT = 1  # omp_pause_soft, OpenMP 5.0


def openmp(name: str) -> Callable[..., Any] | None:
    """A function of the OpenMP runtime that torch uses; None if there is none. The call keeps Python's lock."""
    folder = Path(torch.__file__).parent / "lib"
    found = [folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (folder / name).exists()]
    # Looked up through torch's own library and its dependencies, since a process may have loaded several OpenMPs.
    return getattr(ctypes.PyDLL(str(found[0])), name, None) if found else None


def _pool_ender() -> Callable[[], object]:
    """OpenMP's call that ends the calling thread's pool."""
    pause = openmp("omp_pause_resource_all")
    return functools.partial(pause, _PAUSE_SOFT) if pause is not None else lambda: None


# Ends the calling thread's pool of helpers, if it has one. The next operation on several cores makes a new pool. Takes
# about one microsecond without a pool, and twenty with one.
end_pool = _pool_ender()


class _Given(threading.local):
    """The number of cores that torch had on this thread before replicas ran; None while none run.

    `of_parts`: the number that parts of rows may use while all other operations use one (`one_core`).
    `shared`: the number that the user has given and the share that is in its place, between the passes of a loop.
    `passes`: the passes that keep it so, by their `id`.
    """

    def __init__(self) -> None:
        self.cores: int | None = None
        self.of_parts: int | None = None
        self.shared: tuple[int, int] | None = None
        self.passes: set[int] = set()


_given = _Given()


def given_cores() -> int:
    """The cores that the user lets torch use on this thread: `torch.set_num_threads`, `OMP_NUM_THREADS` or the default.

    While replicas run, and between the passes of a loop, the number from before.
    """
    if _given.cores is not None:
        return _given.cores
    present, shared = torch.get_num_threads(), _given.shared
    return shared[0] if shared is not None and shared[1] == present else present


def prepare_worker(threads: int, device: Any) -> None:
    """Set a worker's share of the cores, and send torch's work on this thread to the device's compute stream."""
    _prepare_thread(threads, on_gpu=device.on_gpu)
    if device.on_gpu and device.torch_device.startswith("cuda"):
        handle = device.compute.for_torch()
        if torch.cuda.current_stream(device.torch_device).cuda_stream != handle:
            torch.cuda.set_stream(torch.cuda.ExternalStream(handle, device=device.torch_device))


def _prepare_thread(threads: int, *, on_gpu: bool) -> None:
    """What of `prepare_worker` does not depend on which device it is."""
    fewer = threads < torch.get_num_threads()
    torch.set_num_threads(threads)
    if fewer:
        end_pool()
    if on_gpu:
        # By default torch runs the backward passes of all replicas on a card in one thread of its own. Replicas that
        # exchange values there would wait for each other, and the worker's thread-local state would be missing. With
        # multithreading off, backward stays in the worker.
        torch.autograd.set_multithreading_enabled(False)


@contextmanager
def in_place_of_workers(devices: Sequence[Any], threads: int) -> Iterator[None]:
    """Held by a thread that does the work of these devices' workers: prepared as they are, and restored at the end.

    Torch has a current stream for each card. Where devices share a card, `prepare_worker` goes from one to the other.
    """
    on_cuda = [device for device in devices if device.torch_device.startswith("cuda")]
    streams = [torch.cuda.current_stream(name) for name in dict.fromkeys(device.torch_device for device in on_cuda)]
    card = torch.cuda.current_device() if streams else 0
    threaded = torch._C._is_multithreading_enabled()
    try:
        _prepare_thread(threads, on_gpu=True)
        for device in on_cuda:
            torch.cuda.set_stream(torch.cuda.ExternalStream(device.compute.for_torch(), device=device.torch_device))
        yield
    finally:
        torch.autograd.set_multithreading_enabled(threaded)
        for stream in streams:
            torch.cuda.set_stream(stream)
        if streams:
            torch.cuda.set_device(card)


class _ReplicasRun(AbstractContextManager[None]):
    """As `replicas_run`. A class: a generator with torch's contexts inside costs a small step several times as much."""

    __slots__ = ("_before", "_modes", "_present", "_recorded", "_threads")

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._modes: ExitStack | None = None

    def __enter__(self) -> None:
        self._before = _given.cores
        _given.cores = cores = given_cores()
        self._present = torch.get_num_threads()
        self._recorded = _records_gradients()
        try:
            if self._threads < cores:
                end_pool()
            if self._present != self._threads:
                torch.set_num_threads(self._threads)
            if not self._recorded:
                self._modes = ExitStack()
                self._modes.enter_context(torch.inference_mode(False))
                self._modes.enter_context(torch.enable_grad())
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *error: object) -> None:
        try:
            if self._modes is not None:
                self._modes.close()
            elif self._recorded and not torch.is_grad_enabled():  # code of the user's has left it so
                torch._C._set_grad_enabled(True)
            if self._present != self._threads:
                torch.set_num_threads(self._present)
        finally:
            _given.cores = self._before
            if not _given.passes:
                end_share()


def replicas_run(threads: int) -> AbstractContextManager[None]:
    """Held by the host thread while replicas run, with `threads` cores each. With several replicas it has no pool.

    A single replica runs on the host thread itself, with the same torch modes as on a worker. Torch's thread count is
    partly per thread (OpenMP) and partly global (MKL): workers set theirs once, and the host thread sets the global one
    for the duration of a step.
    """
    return _ReplicasRun(threads)


def _records_gradients() -> bool:
    """Whether torch is in the modes that replicas need."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and torch._C._is_fwd_grad_enabled()


class LoopShare:
    """Keeps torch on this thread at a device's share of the cores while a pass of a loop is open.

    It ends when an optimizer has made its step, or all passes are gone. What the user sets meanwhile stays.

    Args:
        threads: the share.
    """

    __slots__ = ("_passes", "_thread", "_threads")

    def __init__(self, threads: int) -> None:
        _follow_optimizers()
        self._threads, self._thread = threads, threading.get_ident()
        self._passes = _given.passes
        self._passes.add(id(self))
        self.keep()

    def keep(self) -> None:
        """Go on in a backward pass that comes behind an optimizer's step."""
        given = given_cores()
        if self._threads < given and self._thread == threading.get_ident():
            _given.shared = (given, self._threads)
            torch.set_num_threads(self._threads)

    def __del__(self) -> None:
        self._passes.discard(id(self))  # also where another thread drops the last of a graph
        if not self._passes and self._thread == threading.get_ident():
            end_share()


def end_share(*_: object) -> None:
    """Give torch the user's number of cores, unless the user has set another, or replicas run."""
    if _given.shared is None or _given.cores is not None:
        return
    (before, threads), _given.shared = _given.shared, None
    if torch.get_num_threads() == threads:
        torch.set_num_threads(before)


@functools.cache
def _follow_optimizers() -> object:
    """Have each optimizer's step end the share of the thread that makes it. Once a process."""
    return register_optimizer_step_post_hook(end_share)


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


@contextmanager
def one_core() -> Iterator[None]:
    """Let each of this thread's operations use one core, and parts of rows that run at once those that torch had."""
    before, _given.of_parts = _given.of_parts, cores_of_parts()
    try:
        with intra_op_threads(1):
            yield
    finally:
        _given.of_parts = before


def cores_of_parts() -> int:
    """The cores that parts of rows may use at once on this thread."""
    return _given.of_parts or torch.get_num_threads()
