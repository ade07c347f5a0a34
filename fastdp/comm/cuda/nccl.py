"""NCCL between the ranks of one process: its communicators, its collectives on their streams, and their abort.

Communicators block: a call returns when its kernels are enqueued. NCCL wants communicators that do not block for an
abort at any time, but starts a thread for each group with them, and a thread that is inside NCCL has all ranks at hand
here. So an abort only has to come when no thread is inside NCCL, which is when its kernels are enqueued.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.algorithm import MULTI_RANK_VARIABLE, nccl_connects
from fastdp.comm.cuda.exit_thread import ExitThread
from fastdp.comm.cuda.peer_kernels import address_of, stream_of
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.memory import defer

# Communicators by their identity, from `connect` to `destroy` or `abort`.
_open: dict[int, Any] = {}
# There as long as a communicator is open: what closes those at the end of the process may block.
exit_thread = ExitThread("fastdp-exit")

# Seconds that an abort may take where nobody can go on without it.
ABORT_SECONDS = 30.0


class NcclCollectives:
    """Collectives on some communicators, each issued for all ranks by one thread in one group.

    Args:
        devices: one per rank.
        comms: their communicators; none where NCCL is not used.
    """

    def __init__(self, devices: Sequence[CudaDevice], comms: list[Any]) -> None:
        self._devices, self._comms = list(devices), comms

    def all_reduce(self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Sum buckets in place, on all ranks."""

        def call(rank: int, address: int, bucket: Bucket, stream: int) -> None:
            n = bucket.stop - bucket.start
            cupy_api.all_reduce(self._comms[rank], address, address, n, bucket.dtype, stream)

        self._each(targets, buckets, call)

    def bound(self, targets: Sequence[FlatBuffers], bucket: Bucket) -> Callable[[], None]:
        """The `all_reduce` of a bucket, to be made many times on the same communicators."""
        n, comms = bucket.stop - bucket.start, list(self._comms)
        places = [
            (address_of(target, bucket), stream_of(device))
            for target, device in zip(targets, self._devices, strict=True)
        ]

        def call(rank: int) -> None:
            address, stream = places[rank]
            cupy_api.all_reduce(comms[rank], address, address, n, bucket.dtype, stream)

        return functools.partial(self._grouped, [call])

    def reduce_scatter(self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Sum buckets, each rank's part on that rank. NCCL's parts are equally long, so the short rest of the last part
        is all-reduced."""

        def call(rank: int, address: int, bucket: Bucket, stream: int) -> None:
            comm, ranks = self._comms[rank], len(self._comms)
            n, item, part = _parts(bucket, ranks)
            if part:
                own = address + rank * part * item
                cupy_api.reduce_scatter(comm, address, own, part, bucket.dtype, stream)
            if n > ranks * part:
                rest = address + ranks * part * item
                cupy_api.all_reduce(comm, rest, rest, n - ranks * part, bucket.dtype, stream)

        self._each(targets, buckets, call)

    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Gather buckets as bytes, which works for any dtype."""

        def call(rank: int, address: int, bucket: Bucket, stream: int) -> None:
            comm, ranks = self._comms[rank], len(self._comms)
            n, item, part = _parts(bucket, ranks)
            if part:
                own = address + rank * part * item
                cupy_api.all_gather(comm, own, address, part * item, "uint8", stream)
            if n > ranks * part:
                rest = address + ranks * part * item
                nbytes = (n - ranks * part) * item
                cupy_api.broadcast(comm, rest, rest, nbytes, "uint8", stream, root=ranks - 1)

        self._each(buffers, buckets, call)

    def _each(
        self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket], call: Callable[[int, int, Bucket, int], None]
    ) -> None:
        """Call `call(rank, address, bucket, stream)` for all buckets and ranks, in one NCCL group."""

        def of(bucket: Bucket) -> Callable[[int], None]:
            def on_rank(rank: int) -> None:
                call(rank, address_of(targets[rank], bucket), bucket, stream_of(self._devices[rank]))

            return on_rank

        self._grouped([of(bucket) for bucket in buckets])

    def _grouped(self, calls: Sequence[Callable[[int], None]]) -> None:
        """Make each call for all ranks, in one NCCL group."""
        where = ""
        try:
            with cupy_api.nccl_group(), cupy_api.restored_device(self._devices[0].ordinal):
                for call in calls:
                    for rank, device in enumerate(self._devices):
                        where = device.name
                        cupy_api.switch_to(device.ordinal)
                        call(rank)
                where = _names(self._devices)
        except BaseException as error:
            self._failed()
            if isinstance(error, cupy_api.NcclError):
                raise RuntimeError(f"NCCL failed on {where}: {error}") from error
            raise

    def _failed(self) -> None:
        """A group ended with an error, and may have enqueued its collectives on some ranks only."""


class EagerNccl(NcclCollectives):
    """Collectives outside of graphs, on communicators that can be aborted and made anew.

    Args:
        devices: one per rank.
        connects: False makes no communicators, for devices that run shards: NCCL's sums depend on the number of cards.

    Attributes:
        in_use: whether collectives were issued since the caller set it to False.
        cut_short: how many times the communicators were aborted.
    """

    def __init__(self, devices: Sequence[CudaDevice], *, connects: bool = True) -> None:
        self._cards = [device.ordinal for device in devices]
        super().__init__(devices, connect(self._cards) if connects and len(devices) > 1 else [])
        self.in_use = False
        self.cut_short = 0
        self._aborting: threading.Thread | None = None
        # Destroying frees GPU memory, which must not happen in the garbage collector.
        weakref.finalize(self, defer, functools.partial(destroy, self._comms)).atexit = False

    @property
    def comms(self) -> list[Any]:
        """The communicators, in rank order; empty where NCCL is not used, and after an abort."""
        return list(self._comms)

    def abort(self) -> None:
        """Make the GPUs leave NCCL's kernels, unless nothing was issued. No thread is inside NCCL.

        NCCL waits until all GPUs have left, for good if one of them hangs. So a thread of its own does.
        """
        if self.in_use and self._comms:
            taken = list(self._comms)
            self._comms.clear()
            self.cut_short += 1
            self._aborting = aside(functools.partial(abort, taken))

    def renew(self, seconds: float) -> bool:
        """Connect again after an abort, within a time limit; whether it did. Called when all devices are idle.

        Raises:
            RuntimeError: NCCL has not done with the abort, or does not connect the GPUs again.
        """
        self.in_use = False
        if self._aborting is None:
            return False
        names = _names(self._devices)
        self._aborting.join(seconds)
        if self._aborting.is_alive():
            raise RuntimeError(
                f"NCCL has not aborted a collective of {names} within {seconds:g} seconds, though they are idle. Start "
                "the process again."
            )
        comms = connect(self._cards)
        if not comms:
            raise RuntimeError(
                f"NCCL does not connect {names} again after a collective was aborted. Start the process again."
            )
        self._comms += comms
        self._aborting = None
        return True

    def _grouped(self, calls: Sequence[Callable[[int], None]]) -> None:
        self.in_use = True
        super()._grouped(calls)

    def _failed(self) -> None:
        self.abort()  # the others would wait for good


def _names(devices: Sequence[CudaDevice]) -> str:
    return ", ".join(device.name for device in devices)


def _parts(bucket: Bucket, ranks: int) -> tuple[int, int, int]:
    """The elements of a bucket, the bytes of one element, and the elements of each rank's part except the last."""
    first = bucket.part(0, ranks) if ranks > 1 else bucket
    n = bucket.stop - bucket.start
    return n, bucket.nbytes // max(1, n), first.stop - first.start


def connect(cards: Sequence[int]) -> list[Any]:
    """NCCL's communicators for ranks on these cards. Empty if NCCL is missing or, with a warning, does not connect."""
    version = cupy_api.nccl_version() if cupy_api.nccl_available() else 0
    if not nccl_connects(cards, version, os.environ.get(MULTI_RANK_VARIABLE)):
        return []
    alone = len(set(cards)) == len(cards)
    try:
        comms = cupy_api.nccl_init_all(cards) if alone else cupy_api.nccl_init_ranks(cards, cupy_api.on)
        _open.update((id(comm), comm) for comm in comms)
        exit_thread.start()
        return comms
    except cupy_api.NcclError as error:
        what = "these GPUs" if alone else f"several ranks on one card, though {MULTI_RANK_VARIABLE}=1 asks for it"
        remedy = " With NCCL_DEBUG=WARN NCCL says why." if alone else ""
        warnings.warn(
            f"NCCL {version} does not connect {what} ({error}): their collectives run by fastdp's own kernels over "
            f"peer memory, or in host memory where the GPUs do not reach each other.{remedy}",
            stacklevel=3,
        )
        return []


def destroy(comms: list[Any]) -> None:
    """Destroy NCCL's communicators, and empty the list."""
    taken = list(comms)
    comms.clear()
    for comm in taken:
        cupy_api.nccl_destroy(comm)
        _forget(comm)


def abort(comms: Sequence[Any]) -> None:
    """Abort NCCL's communicators, and the collectives that hang in them. The call for the last one waits for all."""
    for comm in comms:
        _forget(comm)  # nobody else destroys it
    for comm in comms:
        cupy_api.nccl_abort(comm)


def _forget(comm: Any) -> None:
    """A communicator is gone, or somebody's to abort: the end of the process has nothing to do with it."""
    _open.pop(id(comm), None)
    if not _open:
        exit_thread.stop()


def aside(work: Callable[[], object]) -> threading.Thread:
    """Run `work()`, which aborts communicators and may never return, on a thread of its own."""
    thread = threading.Thread(target=work, name="fastdp-abort", daemon=True)
    thread.start()
    return thread


def open_communicators() -> list[Any]:
    """All communicators that are neither destroyed nor aborted."""
    return list(_open.values())
