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
from fastdp.runtime.cuda.feed import Feed, Gather
from fastdp.runtime.cuda.kernel_launcher import kernels
from fastdp.runtime.cuda.memory import Arena, PinnedPool
from fastdp.runtime.cuda.outputs import OutputPool
from fastdp.runtime.cuda.peer_access import reaches
from fastdp.runtime.cuda.pinned_home import HostHome
from fastdp.runtime.cuda.streams import FIRST_PAUSE, LAST_PAUSE, CudaStream, current_stream
from fastdp.runtime.queue import QueueDevice, QueueStream
from fastdp.shard import Rows


class CudaDevice(QueueDevice):
    """One GPU.

    Args:
        index: ordinal among the devices that `gpus=` counts.
        ordinal: of the card, as CUDA counts the visible ones.
        virtual: whether this is one of several devices on its card.
        timeout: seconds that a copy asked for by the host thread may take.

    Arrays are cupy.ndarray over plain cudaMalloc memory, which peers and NCCL reach. All streams are non-blocking;
    communication has the highest priority, so that a collective starts as soon as its gradients are there.
    """

    on_gpu = True

    def __init__(self, index: int, ordinal: int, *, virtual: bool = False, timeout: float = 60.0) -> None:
        self.ordinal = ordinal
        self.kind = "virtual gpu" if virtual else "gpu"
        self.space = f"cuda:{ordinal}"
        self.torch_device = cupy_api.torch_device(ordinal)
        self._timeout = timeout
        first = cupy_api.stream_priority_range(ordinal)[1]
        super().__init__(
            index,
            f"virtual:{index}" if virtual else f"gpu:{ordinal}",
            lambda device, name: CudaStream(device, name, first if name == "communication" else 0),
        )
        self.arena = Arena(ordinal)
        self.pinned = PinnedPool()
        self.outputs = OutputPool(self.arena)
        self.kernels = kernels(ordinal)
        self._feed = Feed(self, timeout)
        self._host_stream = cupy_api.stream_create(ordinal)

    def close(self, timeout: float = 60.0) -> None:
        """Let the worker finish, and give streams and pinned memory back. Arrays in use keep their memory."""
        super().close(timeout)
        handle, self._host_stream = self._host_stream, 0
        if not handle:
            return
        self._feed.close()
        self.outputs.close()
        self.arena.trim()
        self.pinned.close()
        cupy_api.stream_destroy(handle)
        for stream in self._streams:
            assert isinstance(stream, CudaStream)
            stream.destroy()

    def _worker_scope(self) -> AbstractContextManager[object]:
        return cupy_api.on(self.ordinal)

    # Memory: an Allocator (fastdp.buffers).

    @property
    def peak_nbytes(self) -> int:
        """The most memory that the engine has had on this card, for all virtual devices that share it."""
        return self.arena.peak_nbytes

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An uninitialized cupy.ndarray on the GPU. cudaMalloc: not in the steady state."""
        return self.arena.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A cupy.ndarray of zeros; they are there on return."""
        array = self.empty(shape, dtype)
        if array.nbytes:
            with cupy_api.on(self.ordinal):
                cupy_api.fill_async(cupy_api.array_pointer(array), 0, array.nbytes, self._host_stream)
                self._wait_for(self._host_stream)
        return array

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of this or another GPU, or of the host, into one of this GPU.

        On a worker, in the order of the stream whose work it is; elsewhere at once: the copy is over on return,
        and what the source holds must be there before.
        """
        if not target.nbytes:
            return
        if not cupy_api.is_array(source):
            self._fill(target, source, self._handle_here())
            return
        with cupy_api.on(self.ordinal):
            self.copy_rows(target, source, self._handle_here())
            if current_stream() is None:
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
        """A host array of the present values; waits for the copy, and for nothing else."""
        return self._fetch(array, self._handle_here()) if array.nbytes else np.empty(array.shape, array.dtype)

    def fetch(self, target: np.ndarray, source: Any) -> None:
        """Copy one of this GPU's arrays into pinned memory, in the order of the stream whose work it is; waits."""
        if target.nbytes:
            self._copy_now(target.ctypes.data, cupy_api.array_pointer(source), target.nbytes, self._handle_here())

    def host_home(self) -> HostHome:
        """Host memory for a model's own weights, which this GPU copies to and from."""
        return HostHome(self)

    def wrap(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype, owner: object) -> Any:
        """A cupy.ndarray over memory of another library's on this GPU, which `owner` keeps alive. C-contiguous."""
        return cupy_api.array(pointer, shape, dtype, self.ordinal, owner)

    # A batch in, outputs out.

    def take_rows(self, batch: Sequence[Any], rows: Rows) -> list[Any]:
        """This GPU's rows of every array of a batch; compute that is enqueued later waits for them.

        Rows of host arrays go through one pinned buffer and one copy on the GPU's own copy stream; those of
        arrays on a GPU are copied over the link. Valid until the step after the next.
        """
        return self._feed.take(batch, rows)

    def gather_rows(
        self, arrays: Sequence[Any], casts: Sequence[tuple[str, float, float] | None], index: np.ndarray
    ) -> list[Any]:
        """Rows, by their numbers, of arrays that lie on this GPU; compute that is enqueued later waits for them.

        Args:
            arrays: C-contiguous; kept alive by who calls until the step is over.
            casts: for each None, or (dtype, scale, offset) of the floats that are made of a uint8 one.
            index: int64 row numbers, all in range.

        Valid as long as what `take_rows` gives.
        """
        sources = [Gather(array, *cast) if cast else Gather(array) for array, cast in zip(arrays, casts, strict=True)]
        return self._feed.gather(sources, index)

    def stage_rows(self, batch: Sequence[Any], rows: Rows) -> bool:
        """Begin to copy the rows that the next `take_rows` of the same arrays asks for; False without room for them."""
        return self._feed.stage(batch, rows)

    def forget_staged(self) -> None:
        """Nobody will take the rows that are staged."""
        self._feed.forget()

    def recover(self) -> None:
        """Forget failures on all streams, and staged rows, which a failure may have kept from coming."""
        super().recover()
        self._feed.recover()

    def merged(self, shape: tuple[int, ...], dtype: np.dtype, *, on_host: bool) -> Any:
        """Room for a merged output, the caller's to keep: pinned host memory, or this GPU's."""
        return (self.pinned if on_host else self.outputs).empty(shape, dtype)

    def prepare_to_merge(self) -> None:
        """Have what `put_rows` to a GPU needs: CUDA may wait for the GPU when a kernel is loaded. Between steps."""
        self.kernels.load("concat_rows")

    def put_rows(self, targets: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Enqueue the copies of a replica's outputs to their rows of the merged arrays. On the worker; all of them stay
        alive until the step is over.

        One launch copies several outputs to a GPU whose memory this one's kernels reach.
        """
        stream = current_stream()
        assert stream is not None
        near: list[tuple[Any, Any]] = []
        far: list[tuple[Any, Any]] = []
        for pair in zip(targets, outputs, strict=True):
            if pair[0].nbytes:
                direct = all(map(cupy_api.is_array, pair)) and reaches(self.ordinal, cupy_api.array_device(pair[0]))
                (near if direct else far).append(pair)
        if len(near) > 1:
            concat_rows(self.kernels, [_piece(*pair) for pair in near], stream=stream.handle)
            near = []
        for target, output in near + far:
            self._put(target, output, stream)

    def _put(self, target: Any, output: Any, stream: CudaStream) -> None:
        """Copy one output."""
        if not cupy_api.is_array(output):  # a function of the user's that works on the host
            if cupy_api.is_array(target):
                self.write(target, output, stream)
            else:
                np.copyto(target, output)
        elif cupy_api.is_array(target):
            self.copy_rows(target, output, stream.handle)
        else:
            cupy_api.copy_async(target.ctypes.data, cupy_api.array_pointer(output), target.nbytes, stream.handle)

    # Copies that somebody waits for.

    def read(self, array: Any, stream: QueueStream) -> np.ndarray:
        """The array's values in the order of a stream of this device, whatever thread asks; waits for them."""
        assert isinstance(stream, CudaStream)
        return self._fetch(array, stream.handle)

    def write(self, array: Any, values: np.ndarray, stream: QueueStream) -> None:
        """Overwrite the array in the order of a stream of this device; waits until it is done."""
        assert isinstance(stream, CudaStream)
        self._fill(array, values, stream.handle)

    def _fetch(self, array: Any, handle: int) -> np.ndarray:
        pinned = self.pinned.empty(array.shape, array.dtype)
        self._copy_now(pinned.ctypes.data, cupy_api.array_pointer(array) if array.nbytes else 0, array.nbytes, handle)
        return np.array(pinned)

    def _fill(self, array: Any, values: Any, handle: int) -> None:
        pinned = self.pinned.empty(array.shape, array.dtype)
        pinned[...] = values
        self._copy_now(cupy_api.array_pointer(array) if array.nbytes else 0, pinned.ctypes.data, array.nbytes, handle)

    def _copy_now(self, target: int, source: int, nbytes: int, handle: int) -> None:
        """Copy in the order of a CUDA stream, and wait for it; of no bytes, wait for what the stream has."""
        with cupy_api.on(self.ordinal):
            if nbytes:
                cupy_api.copy_async(target, source, nbytes, handle)
            self._wait_for(handle)

    def _handle_here(self) -> int:
        """The stream whose work this thread issues: behind it lies what is asked for in the middle of it. Elsewhere
        the host's own stream."""
        stream = current_stream()
        return self._host_stream if stream is None else stream.handle

    def _wait_for(self, handle: int) -> None:
        """Block until all work of a CUDA stream is done, with the device's time limit."""
        event = cupy_api.event_create()
        try:
            cupy_api.event_record(event, handle)
            deadline, pause = time.monotonic() + self._timeout, FIRST_PAUSE
            while not cupy_api.event_done(event):
                if time.monotonic() > deadline:
                    raise DeviceTimeoutError(f"{self.name} did not finish a copy within {self._timeout} seconds.")
                time.sleep(pause)
                pause = min(1.5 * pause, LAST_PAUSE)
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
