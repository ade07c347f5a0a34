"""NCCL between the ranks of one process: its communicators, and its collectives on their streams."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.algorithm import MULTI_RANK_VARIABLE, nccl_connects
from fastdp.comm.cuda.peer_kernels import address_of, stream_of
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice

# Communicators by their identity, from `connect` to `destroy` or `abort`.
_open: dict[int, Any] = {}


class NcclCollectives:
    """Collectives on some communicators, each issued for all ranks by one thread in one group.

    Args:
        devices: one per rank.
        comms: their communicators; none where NCCL is not used.
    """

    def __init__(self, devices: Sequence[CudaDevice], comms: Sequence[Any]) -> None:
        self._devices, self._comms = list(devices), list(comms)

    def all_reduce(self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Sum buckets in place, on all ranks."""

        def call(rank: int, address: int, bucket: Bucket, stream: int) -> None:
            n = bucket.stop - bucket.start
            cupy_api.all_reduce(self._comms[rank], address, address, n, bucket.dtype, stream)

        self._each(targets, buckets, call)

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
        with cupy_api.nccl_group():
            for bucket in buckets:
                for rank, (device, target) in enumerate(zip(self._devices, targets, strict=True)):
                    with cupy_api.on(device.ordinal):
                        call(rank, address_of(target, bucket), bucket, stream_of(device))


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


def destroy(comms: Sequence[Any]) -> None:
    """Destroy NCCL's communicators."""
    for comm in comms:
        cupy_api.nccl_destroy(comm)
        _open.pop(id(comm), None)


def abort(comms: Sequence[Any]) -> None:
    """Abort NCCL's communicators, and the collectives that hang in them."""
    for comm in comms:
        cupy_api.nccl_abort(comm)
        _open.pop(id(comm), None)


def open_communicators() -> list[Any]:
    """All communicators that are neither destroyed nor aborted."""
    return list(_open.values())
