"""Collectives between GPUs: NCCL, our kernels over peer memory for small buckets, and the host where neither can.

A collective is issued by one thread for all ranks: NCCL wants the calls of several communicators in one group, and
kernels that wait for each other must all be launched before anything waits for them. At the end of a step's
backward that is the first device's worker: its communication queue goes first, and the others' follow when it has
issued. Buckets that are complete earlier are issued by the worker that completes them (`cuda_reduction`).
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdp.backend.cuda import runtime
from fastdp.backend.cuda.device import CudaDevice
from fastdp.backend.cuda.peers import PeerAccess
from fastdp.backend.cuda.streams import CudaStream
from fastdp.backend.queue import joined
from fastdp.buckets import Bucket, FlatBuffers, storage_dtype
from fastdp.comm.cuda_reduction import CudaReduction
from fastdp.comm.host import sum_in_order
from fastdp.launch import SIGNALS_NBYTES, PeerGroup, all_reduce_one_shot, all_reduce_two_shot, coresident_blocks
from fastdp.launch.args import MAX_RANKS, PACK_NBYTES

# From published figures for eight GPUs on NVLink (docs/log.md), not measured here: one-shot reads every rank's
# whole bucket, two-shot twice its own part; NCCL wins from a few MiB on.
ONE_SHOT_NBYTES = 256 << 10
TWO_SHOT_NBYTES = 2 << 20
KERNEL_DTYPES = ("float32", "float16", "bfloat16")
_unused: deque[Any] = deque()  # appended to by the garbage collector, in any thread
NCCL_DTYPES = (*KERNEL_DTYPES, "float64", "int8", "uint8", "int32", "int64", "uint32", "uint64")


@dataclass(slots=True)
class _PeerRank:
    """One rank's memory for the kernels over peer memory; the error flag is copied to `seen` after each use."""

    staging: Any
    signals: Any
    error: Any
    seen: np.ndarray


class CudaCommunicator:
    """Collectives over the given GPUs, in their order.

    Args:
        devices: one per rank; several may share a card.
        timeout: seconds that making peer access ready may take.

    Work goes to the devices' communication streams, is ordered after their compute streams, and compute that is
    enqueued later waits for it. Memory that the kernels need is allocated when larger buckets than before come.

    Raises:
        RuntimeError: settings under which several GPUs cannot work together (CUDA_LAUNCH_BLOCKING=1).
    """

    def __init__(self, devices: Sequence[CudaDevice], timeout: float = 60.0) -> None:
        self._devices = list(devices)
        self._cards = [device.ordinal for device in devices]
        destroy_unused()
        runtime.check_environment(self._cards)
        several = len(devices) > 1
        self._peers = PeerAccess(sorted(set(self._cards)), timeout) if several else None
        self._nccl: list[Any] = []
        if several and len(set(self._cards)) == len(devices) and runtime.nccl_available():
            self._nccl = runtime.nccl_init_all(self._cards)
            weakref.finalize(self, _unused.extend, list(self._nccl)).atexit = False
        self._has_kernels = several and len(devices) <= MAX_RANKS and self._peers is not None and self._peers.complete
        self._ranks: list[_PeerRank] = []
        self._groups: list[PeerGroup] = []
        self._told = False

    def how(self, bucket: Bucket) -> str:
        """How a bucket is reduced: "one-shot", "two-shot", "nccl", or "host" where nothing else can."""
        nbytes = _nbytes(bucket)
        kernels = self._has_kernels and bucket.dtype in KERNEL_DTYPES
        nccl = bool(self._nccl) and bucket.dtype in NCCL_DTYPES
        if kernels and nbytes <= ONE_SHOT_NBYTES:
            return "one-shot"
        if kernels and (nbytes <= TWO_SHOT_NBYTES or not nccl):
            return "two-shot"
        return "nccl" if nccl else "host"

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Have the memory that these buckets need. Between steps: it allocates, and waits for the GPUs."""
        if len(self._devices) > 1:
            self._prepare(buckets, [self.how(bucket) for bucket in buckets])

    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
    ) -> CudaReduction:
        """A reduction whose buckets may be announced one by one, and that `finish` ends. Arguments and errors as of
        `all_reduce`.

        Args:
            warm: the step allocates nothing any more. Until it does not, nothing begins early: cudaMalloc on one worker
                waits for GPUs, and must not come between the launches of a collective by another.
        """
        for dtype in {bucket.dtype for bucket in buckets}:
            if dtype != "bfloat16" and storage_dtype(dtype).name != dtype:
                raise TypeError(f"Gradients of dtype {dtype} cannot be all-reduced. Use float32, bfloat16 or float16.")
        if any(source is not target for source, target in zip(sources, targets, strict=False)):
            raise ValueError("GPUs all-reduce in place: `sources` must be the first of `targets`.")
        how = [self.how(bucket) for bucket in buckets]
        several = len(self._devices) > 1
        if several:
            self._prepare(buckets, how)

        def issue(numbers: Sequence[int]) -> None:
            chosen = [(buckets[number], how[number]) for number in numbers]
            for bucket, _ in chosen:
                self._zero(targets, bucket, range(len(sources), len(targets)))
            for bucket, way in chosen:
                if way not in ("nccl", "host"):
                    self._by_kernels(targets, bucket, way)
            self._by_nccl(targets, [bucket for bucket, way in chosen if way == "nccl"])
            for bucket, way in chosen:
                if way == "host":
                    self._by_host(targets, bucket)

        # The way through the host waits for the GPUs: not in the middle of a replica's work.
        early = [number for number, way in enumerate(how) if way != "host"] if warm and several else []
        return CudaReduction(self._devices, len(sources), len(buckets), early, issue)

    def finish(
        self, reduction: CudaReduction, once: Callable[[], object] | None = None, readers: int | None = None
    ) -> None:
        """Reduce the rest when all replicas are done; `once` as of `all_reduce`. The compute of all devices waits,
        whoever the `readers` are: the collectives run on all of them."""
        if len(self._devices) == 1:
            if once is not None:
                self.once(once)
            return

        def issue() -> None:
            if once is not None:
                once()
            reduction.issue(reduction.rest())

        self._issue(issue)

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into each of `targets` (one per device); same bits on all.

        Sums are taken in place: `sources` are the first of `targets`, and the others count as zeros.

        Args:
            sources: what to add up; one per device, or fewer where some have nothing to add.
            targets: where the sums go; those beyond `sources` are overwritten.
            buckets: which parts of them.
            once: run on the first device's worker before the collectives are issued.

        Raises:
            TypeError: a dtype that is stored but cannot be added (float8).
        """
        self.finish(self.begin(sources, targets, buckets), once)

    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Copy the first device's buffers to all others; each pulls its own over its link, when all have computed."""
        before = joined([device.compute.record() for device in self._devices])
        after = []
        for device, flat in zip(self._devices[1:], buffers[1:], strict=True):
            device.communication.wait(before)
            device.communication.enqueue(lambda flat=flat: flat.copy_from(buffers[0]))  # type: ignore[misc]
            after.append(device.communication.record())
        done = joined(after)
        for device in self._devices:
            device.compute.wait(done)

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device's worker, after all that was enqueued and before all that comes."""
        self._issue(work)

    def check(self) -> None:
        """Look for collectives that failed. When the step is over.

        Raises:
            RuntimeError: NCCL reports a failure, or a rank gave up waiting for the others.
        """
        destroy_unused()
        for rank, memory in enumerate(self._ranks):
            if memory.seen[0]:
                raise RuntimeError(
                    f"The all-reduce on {self._devices[rank].name} gave up waiting for the other GPUs: the gradients "
                    "of this step are wrong. Run `fastdp devices` to look at the links, and see docs/hardware.md."
                )
        for rank, comm in enumerate(self._nccl):
            error = runtime.nccl_async_error(comm)
            if error is not None:
                raise RuntimeError(f"NCCL failed on {self._devices[rank].name}: {error}") from error

    # Order.

    def _issue(self, work: Callable[[], object]) -> None:
        """Run `work()`, which issues to all communication streams, on the first device's worker."""
        before = joined([device.compute.record() for device in self._devices])
        ready = []
        for device in self._devices:
            device.communication.wait(before)
            ready.append(device.communication.record())
        first = self._devices[0].communication
        first.wait(joined(ready))
        first.enqueue(work)
        issued = first.record()
        after = [issued]
        for device in self._devices[1:]:
            device.communication.wait(issued)
            after.append(device.communication.record())
        done = joined(after)
        for device in self._devices:
            device.compute.wait(done)

    def _stream(self, rank: int) -> int:
        """The CUDA stream of a rank's communication."""
        stream = self._devices[rank].communication
        assert isinstance(stream, CudaStream)
        return stream.handle

    # Ways to reduce.

    def _zero(self, targets: Sequence[FlatBuffers], bucket: Bucket, ranks: Sequence[int]) -> None:
        """Those who had no rows add nothing."""
        nbytes = _nbytes(bucket)
        for rank in ranks if nbytes else ():
            with runtime.on(self._cards[rank]):
                runtime.fill_async(_address(targets[rank], bucket), 0, nbytes, self._stream(rank))

    def _by_kernels(self, targets: Sequence[FlatBuffers], bucket: Bucket, way: str) -> None:
        """One launch per rank; then the error flags, for `check`."""
        addresses, n = [_address(target, bucket) for target in targets], bucket.stop - bucket.start
        for rank, (device, group) in enumerate(zip(self._devices, self._groups, strict=True)):
            y, stream = addresses[rank], self._stream(rank)
            if way == "one-shot":
                all_reduce_one_shot(device.kernels, group, x=y, y=y, n=n, dtype=bucket.dtype, stream=stream)
            else:
                all_reduce_two_shot(
                    device.kernels, group, inputs=addresses, y=y, n=n, dtype=bucket.dtype, stream=stream
                )
        for rank, memory in enumerate(self._ranks):
            flag = runtime.array_pointer(memory.error)
            runtime.copy_async(memory.seen.ctypes.data, flag, memory.seen.nbytes, self._stream(rank))

    def _by_nccl(self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """All buckets on all ranks in one group."""
        if not buckets:
            return
        with runtime.nccl_group():
            for bucket in buckets:
                for rank, target in enumerate(targets):
                    address, n = _address(target, bucket), bucket.stop - bucket.start
                    with runtime.on(self._cards[rank]):
                        runtime.all_reduce(self._nccl[rank], address, address, n, bucket.dtype, self._stream(rank))

    def _by_host(self, targets: Sequence[FlatBuffers], bucket: Bucket) -> None:
        """Through host memory, waiting for each copy: right, and slow. Said once."""
        if not self._told:
            self._told = True
            warnings.warn(
                f"{bucket.dtype} gradients of these GPUs are added up in host memory, which is slow: they have no "
                "common NCCL and no direct access to each other's memory for that dtype. Install NCCL "
                "(pip install nvidia-nccl-cu12 or -cu13), or use float32.",
                stacklevel=2,
            )
        span = slice(bucket.start, bucket.stop)
        ends = [target.buffers[bucket.dtype][span] for target in targets]
        values = []
        for device, end in zip(self._devices, ends, strict=True):
            # On the rank's own stream, behind what that rank's communication waits for.
            values.append(device.read(end, device.communication))
        total = sum_in_order(values, bucket.dtype)
        for device, end in zip(self._devices, ends, strict=True):
            device.write(end, total, device.communication)

    # Memory.

    def _prepare(self, buckets: Sequence[Bucket], how: Sequence[str]) -> None:
        """See that the kernels' staging holds the largest bucket. On the host thread, between steps."""
        ranks = len(self._devices)
        needed = 0
        for bucket, way in zip(buckets, how, strict=True):
            nbytes = _nbytes(bucket)
            if way == "one-shot":
                needed = max(needed, nbytes)
            elif way == "two-shot":
                needed = max(needed, -(-nbytes // ranks) + PACK_NBYTES)
        half = -(-needed // PACK_NBYTES) * PACK_NBYTES
        if not needed or (self._groups and self._groups[0].half_nbytes >= half):
            return
        for device in self._devices:
            _load_all_reduces(device)
        self._ranks = [
            _PeerRank(
                device.zeros((2 * half,), np.dtype(np.uint8)),
                device.zeros((SIGNALS_NBYTES,), np.dtype(np.uint8)),
                device.zeros((1,), np.dtype(np.uint32)),
                device.pinned.empty((1,), np.dtype(np.uint32)),
            )
            for device in self._devices
        ]
        for memory in self._ranks:
            memory.seen[0] = 0
        shared = max(self._cards.count(card) for card in self._cards)
        blocks = min(coresident_blocks(device.kernels.sm_count, shared) for device in self._devices)
        self._groups = [
            PeerGroup(
                rank=rank,
                staging=tuple(runtime.array_pointer(one.staging) for one in self._ranks),
                staging_nbytes=2 * half,
                signals=tuple(runtime.array_pointer(one.signals) for one in self._ranks),
                error=runtime.array_pointer(self._ranks[rank].error),
                max_blocks=blocks,
            )
            for rank in range(ranks)
        ]


def _load_all_reduces(device: CudaDevice) -> None:
    """Launch each all-reduce once for a rank by itself: CUDA may load a kernel at its first launch, and that may
    wait for a kernel that is running, which would be the one that waits for this launch."""
    memory = [device.zeros((nbytes,), np.dtype(np.uint8)) for nbytes in (2 * PACK_NBYTES, SIGNALS_NBYTES, 4, 4)]
    staging, signals, error, x = map(runtime.array_pointer, memory)
    stream = device.communication
    assert isinstance(stream, CudaStream)
    group = PeerGroup(0, (staging,), 2 * PACK_NBYTES, (signals,), error, 1)
    for dtype in KERNEL_DTYPES:
        all_reduce_one_shot(device.kernels, group, x=x, y=x, n=1, dtype=dtype, stream=stream.handle)
        all_reduce_two_shot(device.kernels, group, inputs=[x], y=x, n=1, dtype=dtype, stream=stream.handle)
    device.read(memory[-1], stream)  # waits


def _nbytes(bucket: Bucket) -> int:
    """Bytes of a bucket on one device."""
    return (bucket.stop - bucket.start) * storage_dtype(bucket.dtype).itemsize


def _address(flat: FlatBuffers, bucket: Bucket) -> int:
    """Where a bucket begins in device memory."""
    return runtime.array_pointer(flat.buffers[bucket.dtype]) + bucket.start * storage_dtype(bucket.dtype).itemsize


def destroy_unused() -> None:
    """Give back NCCL's communicators whose engines are gone. Between steps: it waits for the GPUs.

    Not by the garbage collector: it may run while kernels of another engine wait for others that are not launched yet.
    """
    while _unused:
        runtime.nccl_destroy(_unused.popleft())
