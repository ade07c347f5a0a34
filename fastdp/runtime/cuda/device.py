"""A GPU, or one of several virtual ones on a card: its memory, four streams, and copies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from fastdp.errors import DeviceTimeoutError
from fastdp.launch import RowPiece, concat_rows
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.feed import Feed
from fastdp.runtime.cuda.kernel_launcher import kernels
from fastdp.runtime.cuda.memory import Arena, PinnedPool
from fastdp.runtime.cuda.outputs import OutputPool
from fastdp.runtime.cuda.peer_access import reaches
from fastdp.runtime.cuda.pinned_home import HostHome
from fastdp.runtime.cuda.row_gather import Cast, RowGather
from fastdp.runtime.cuda.streams import CudaStream, current_stream
from fastdp.runtime.cuda.timeline import Timeline
from fastdp.runtime.events import pause_after
from fastdp.runtime.queue import QueueDevice, QueueStream
from fastdp.shard import Rows


class CudaDevice(QueueDevice):
    """One GPU.

    Args:
        index: ordinal among the devices that `gpus=` counts.
        ordinal: CUDA's ordinal of the card among the visible ones.
        virtual: whether this is one of several devices on its card.
        name: shown in messages; None: "gpu:" or "virtual:" and the number.
        timeout: seconds that a synchronous copy of the host thread may take.

    Arrays are cupy.ndarray over plain cudaMalloc memory, which peers and NCCL can access. All streams are non-blocking.
    The communication stream has the highest priority, so that a collective starts as soon as its gradients are ready.
    """

    on_gpu = True

    def __init__(
        self, index: int, ordinal: int, *, virtual: bool = False, name: str | None = None, timeout: float = 60.0
    ) -> None:
        self.ordinal = ordinal
        self.kind = "virtual gpu" if virtual else "gpu"
        self.space = f"cuda:{ordinal}"
        self.torch_device = cupy_api.torch_device(ordinal)
        self._timeout = timeout
        first = cupy_api.stream_priority_range(ordinal)[1]
        super().__init__(
            index,
            name or (f"virtual:{index}" if virtual else f"gpu:{ordinal}"),
            lambda device, name: CudaStream(device, name, first if name == "communication" else 0),
        )
        self.arena = Arena(ordinal)
        self.pinned = PinnedPool()
        self.outputs = OutputPool(self.arena)
        self.kernels = kernels(ordinal)
        self.timeline = Timeline(ordinal, self.name)
        self._feed = Feed(self, timeout)
        self._host_stream = cupy_api.stream_create(ordinal)

    def close(self, timeout: float = 60.0) -> None:
        """Let the worker finish, then free streams and pinned memory. Arrays in use keep their memory."""
        super().close(timeout)
        handle, self._host_stream = self._host_stream, 0
        if not handle:
            return
        self._feed.close()
        self.timeline.close()
        self.outputs.close()
        self.arena.trim()
        self.pinned.close()
        cupy_api.stream_destroy(handle)
        for stream in self._streams:
            assert isinstance(stream, CudaStream)
            stream.destroy()

    def part(self, name: str) -> CudaDevice:
        """Another device on this card, for a shard."""
        return CudaDevice(self.index, self.ordinal, virtual=self.kind != "gpu", name=name, timeout=self._timeout)

    def _worker_scope(self) -> AbstractContextManager[object]:
        return cupy_api.on(self.ordinal)

    def lent_scope(self) -> AbstractContextManager[object]:
        """Streams make the card of their work current: the thread gets its own back in the end."""
        return cupy_api.restored_device(self.ordinal)

    # Memory: an Allocator (fastdp.buffers).

    @property
    def peak_nbytes(self) -> int:
        """The engine's peak memory on this card, over all virtual devices that share it."""
        return self.arena.peak_nbytes

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An uninitialized cupy.ndarray on the GPU. Calls cudaMalloc, so not for the steady state."""
        return self.arena.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A cupy.ndarray of zeros, already filled on return."""
        array = self.empty(shape, dtype)
        if array.nbytes:
            with cupy_api.on(self.ordinal):
                cupy_api.fill_async(cupy_api.array_pointer(array), 0, array.nbytes, self._host_stream)
                self._wait_for(self._host_stream)
        return array

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of this or another GPU, or of the host, into one of this GPU, of the same shape and dtype.

        On a worker, the copy runs in the order of the stream whose work calls it. On other threads it is
        synchronous, and the source's values must be ready before the call.
        """
        if not target.nbytes:
            return
        if not cupy_api.is_array(source):
            self._fill(target, source, self._handle_here())
            return
        stream = current_stream()
        if stream is not None and stream.ordinal == self.ordinal:
            self.copy_rows(target, cupy_api.contiguous(source), stream.handle)
            return
        handle = self._handle_here()
        with cupy_api.current_stream(self.ordinal, handle):
            self.copy_rows(target, cupy_api.contiguous(source), handle)
            if stream is None:
                self._wait_for(self._host_stream)

    def copy_rows(self, target: Any, source: Any, stream: int) -> None:
        """Enqueue a copy from one GPU's array to another's on a stream."""
        ends = cupy_api.array_device(target), cupy_api.array_device(source)
        into, out_of = cupy_api.array_pointer(target), cupy_api.array_pointer(source)
        if ends[0] == ends[1]:
            cupy_api.copy_async(into, out_of, target.nbytes, stream)
        else:
            cupy_api.copy_peer_async(into, ends[0], out_of, ends[1], target.nbytes, stream)

    def to_host(self, array: Any) -> np.ndarray:
        """A host array of the current values; waits only for the copy."""
        return self._fetch(array, self._handle_here()) if array.nbytes else np.empty(array.shape, array.dtype)

    def fetch(self, target: np.ndarray, source: Any) -> None:
        """Copy an array of this GPU into pinned memory, in the order of the stream whose work calls it; waits."""
        if target.nbytes:
            self._copy_now(target.ctypes.data, cupy_api.array_pointer(source), target.nbytes, self._handle_here())

    def host_home(self) -> HostHome:
        """An allocator of host memory for a model's own weights; this GPU copies to and from it."""
        return HostHome(self)

    def wrap(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype, owner: object) -> Any:
        """A C-contiguous cupy.ndarray over another library's memory on this GPU, which `owner` keeps alive."""
        return cupy_api.array(pointer, shape, dtype, self.ordinal, owner)

    # A batch in, outputs out.

    def take_rows(self, batch: Sequence[Any], rows: Rows) -> list[Any]:
        """This GPU's rows of every array of a batch; compute work enqueued later waits for them.

        Rows of host arrays go through one pinned buffer and one copy on this GPU's copy stream. Rows of arrays
        on a GPU are copied over the link. Valid until the step after the next.
        """
        return self._feed.take(batch, rows)

    def take_idle_rows(self, batch: Sequence[Any], rows: Rows, shapes: Any) -> list[Any] | None:
        """As `take_rows`, on a thread that has this GPU by `lent` while it does nothing. Without an event or a wait."""
        return self._feed.take_idle(batch, rows, shapes)

    def gather_rows(
        self,
        parts: Sequence[Sequence[Any]],
        counts: Sequence[int],
        casts: Sequence[Cast],
        index: np.ndarray,
        places: np.ndarray | None = None,
        host_rows: int = 0,
    ) -> list[Any]:
        """Gather rows by number from arrays on GPUs or in host memory; compute work enqueued later waits for them.

        Args:
            parts: by owner: its C-contiguous part of every array, in memory that this GPU `reads` or of the host; the
                caller keeps them alive until the step is done.
            counts, index, places, host_rows: as for `RowGather`.
            casts: per array None, or (dtype, scale, offset) of the floats to which a uint8 array is converted.

        Valid as long as the result of `take_rows`.
        """
        return self._feed.gather(RowGather(parts, counts, casts, index, places, host_rows))

    def reads(self, other: QueueDevice) -> bool:
        """Whether this GPU's kernels reach the memory of another one."""
        return isinstance(other, CudaDevice) and reaches(self.ordinal, other.ordinal)

    def stage_rows(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Prefetch the rows for the next `take_rows` of the same arrays; False if there is no room for them."""
        return self._feed.stage(batch, rows)

    def has_staged(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Whether `stage_rows` has been called for these rows of these arrays, and they have not been taken."""
        return self._feed.has_staged(batch, rows)

    def forget_staged(self) -> None:
        """Discard the staged rows."""
        self._feed.forget()

    def recover(self) -> None:
        """Clear failures on all streams, and discard staged rows, which a failure may have left incomplete."""
        super().recover()
        self._feed.recover()

    def merged(self, shape: tuple[int, ...], dtype: np.dtype, *, on_host: bool) -> Any:
        """An uninitialized array for a merged output, owned by the caller: in pinned host memory or on this GPU."""
        return (self.pinned if on_host else self.outputs).empty(shape, dtype)

    def prepare_to_merge(self) -> None:
        """Load the kernel that `put_rows` uses. Call between steps: CUDA may wait for the GPU to load a kernel."""
        self.kernels.load("concat_rows")

    def put_rows(self, targets: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Enqueue copies of a replica's outputs to their rows of the merged arrays.

        Called on the worker. The caller keeps all arrays alive until the step is done. One launch copies several
        outputs to a GPU whose memory this GPU's kernels can access.
        """
        stream = current_stream()
        assert stream is not None
        near: list[tuple[Any, Any]] = []
        far: list[tuple[Any, Any]] = []
        for target, output in zip(targets, outputs, strict=True):
            if not target.nbytes:
                continue
            if cupy_api.is_array(output):
                output = cupy_api.contiguous(output)  # what is copied below is a run of bytes
            pair = target, output
            direct = all(map(cupy_api.is_array, pair)) and reaches(self.ordinal, cupy_api.array_device(target))
            (near if direct else far).append(pair)
        if len(near) > 1:
            concat_rows(self.kernels, [_piece(*pair) for pair in near], stream=stream.handle)
            near = []
        for target, output in near + far:
            self._put(target, output, stream)

    def _put(self, target: Any, output: Any, stream: CudaStream) -> None:
        """Copy one output."""
        if not cupy_api.is_array(output):  # from a user function that computes on the host
            if cupy_api.is_array(target):
                self.write(target, output, stream)
            else:
                np.copyto(target, output)
        elif cupy_api.is_array(target):
            self.copy_rows(target, output, stream.handle)
        else:
            cupy_api.copy_async(target.ctypes.data, cupy_api.array_pointer(output), target.nbytes, stream.handle)

    # Synchronous copies.

    def read(self, array: Any, stream: QueueStream) -> np.ndarray:
        """Read the array's values in the order of a stream of this device, from any thread; waits for them."""
        assert isinstance(stream, CudaStream)
        return self._fetch(array, stream.handle)

    def write(self, array: Any, values: np.ndarray, stream: QueueStream) -> None:
        """Overwrite the array in the order of a stream of this device; waits until it is done."""
        assert isinstance(stream, CudaStream)
        self._fill(array, values, stream.handle)

    def _fetch(self, array: Any, handle: int) -> np.ndarray:
        pinned = self.pinned.empty(array.shape, array.dtype)
        if not array.nbytes:
            self._copy_now(0, 0, 0, handle)
        else:
            with cupy_api.current_stream(self.ordinal, handle):
                straight = cupy_api.contiguous(array)
                self._copy_now(pinned.ctypes.data, cupy_api.array_pointer(straight), array.nbytes, handle)
        return np.array(pinned)

    def _fill(self, array: Any, values: Any, handle: int) -> None:
        pinned = self.pinned.empty(array.shape, array.dtype)
        pinned[...] = values
        self._copy_now(cupy_api.array_pointer(array) if array.nbytes else 0, pinned.ctypes.data, array.nbytes, handle)

    def _copy_now(self, target: int, source: int, nbytes: int, handle: int) -> None:
        """Copy in the order of a CUDA stream and wait for it. With no bytes, wait for the stream's earlier work."""
        with cupy_api.on(self.ordinal):
            if nbytes:
                cupy_api.copy_async(target, source, nbytes, handle)
            self._wait_for(handle)

    def _handle_here(self) -> int:
        """The CUDA stream whose work this thread is issuing, so that calls from inside the work keep its order; on
        other threads, the host's stream."""
        stream = current_stream()
        return self._host_stream if stream is None else stream.handle

    def _wait_for(self, handle: int) -> None:
        """Block until all work of a CUDA stream is done, with the device's time limit."""
        event = cupy_api.event_create()
        try:
            cupy_api.event_record(event, handle)
            began = time.monotonic()
            while not cupy_api.event_done(event):
                waited = time.monotonic() - began
                if waited > self._timeout:
                    raise DeviceTimeoutError(f"{self.name} did not finish a copy within {self._timeout} seconds.")
                time.sleep(pause_after(waited))
        finally:
            cupy_api.event_destroy(event)


def _piece(target: Any, output: Any) -> RowPiece:
    """The copy of one output to its place."""
    rows = output.shape[0]
    return RowPiece(
        source=cupy_api.array_pointer(output),
        destination=cupy_api.array_pointer(target),
        rows=rows,
        row_nbytes=output.nbytes // rows,
        destination_row=0,
    )
