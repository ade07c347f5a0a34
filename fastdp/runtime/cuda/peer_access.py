"""Finds out which GPUs reach each other's memory: asks CUDA, enables it once, tries a real copy."""

from __future__ import annotations

import contextlib
import ctypes
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.cuda import cupy_api

__all__ = ["PeerAccess", "reaches"]

PATTERN_NBYTES = 1 << 16
_POLL_SECONDS = 0.0005


# Ordered pairs of devices whose access any PeerAccess of this process has enabled and tested.
_reached_by_kernels: set[tuple[int, int]] = set()


def reaches(device: int, other: int) -> bool:
    """Whether kernels of `device` are known to reach the memory of `other`."""
    return device == other or (device, other) in _reached_by_kernels


class PeerAccess:
    """Direct access between GPUs.

    Args:
        devices: CUDA ordinals; only these get a context. Duplicates count once.
        timeout: seconds for one trial copy.

    For each ordered pair, the constructor queries CUDA (`cudaDeviceCanAccessPeer`), enables access, and copies a
    pattern both ways: under some IOMMU and virtual-machine settings CUDA reports access and the bytes do not
    arrive. Pairs without access copy through host memory; one UserWarning lists them. Without NVSwitch a GPU has at
    most 8 peers; CUDA refuses to enable more, and those pairs go through host memory too.

    Raises:
        DeviceTimeoutError: a trial copy did not finish in time; its memory is not freed.
    """

    def __init__(self, devices: Sequence[int], timeout: float = 60.0) -> None:
        self.devices = tuple(dict.fromkeys(devices))
        reasons = {
            (device, peer): _enabled(device, peer) for device in self.devices for peer in self.devices if device != peer
        }
        enabled = [pair for pair, reason in reasons.items() if not reason]
        if enabled:
            with contextlib.ExitStack() as stack:
                trials = {device: stack.enter_context(_trial(device)) for device in self.devices}
                host = stack.enter_context(_pinned(2 * PATTERN_NBYTES))
                for device, peer in enabled:
                    if not _copies_arrive(trials[device], trials[peer], host, timeout):
                        reasons[device, peer] = "CUDA reports access, but a copied pattern did not arrive"
        self._reached = frozenset(pair for pair, reason in reasons.items() if not reason)
        _reached_by_kernels.update(self._reached)
        self._warn({pair: reason for pair, reason in reasons.items() if reason})

    def direct(self, src: int, dst: int) -> bool:
        """Whether copies, enqueued on either device, and kernels of either device reach the other's memory."""
        return src == dst or ((src, dst) in self._reached and (dst, src) in self._reached)

    @property
    def complete(self) -> bool:
        """Whether every pair is direct."""
        return all(self.direct(src, dst) for src in self.devices for dst in self.devices)

    def _warn(self, reasons: dict[tuple[int, int], str]) -> None:
        if not reasons:
            return
        pairs: dict[tuple[int, int], str] = {}
        for (device, peer), reason in reasons.items():
            pairs.setdefault((min(device, peer), max(device, peer)), reason)
        said = "; ".join(f"GPU {a} and GPU {b}: {reason}" for (a, b), reason in pairs.items())
        warnings.warn(
            f"No direct access between {said}. Copies between them go through host memory, in two steps over PCIe, "
            "and are slower. `nvidia-smi topo -p2p rw` shows what the driver supports; IOMMU or ACS settings of the "
            "machine, or of its virtualization, often are the cause.",
            UserWarning,
            stacklevel=3,
        )


def _enabled(device: int, peer: int) -> str:
    """Enable access of `device` to `peer`; returns the reason for a failure, or an empty string."""
    if not cupy_api.can_access_peer(device, peer):
        return "CUDA reports no peer access"
    try:
        cupy_api.enable_peer_access(device, peer)
    except cupy_api.CudaError as error:
        return f"CUDA does not enable it ({error})"
    return ""


@dataclass(frozen=True)
class _Trial:
    """The resources of one device for trial copies: two buffers, a stream and an event."""

    device: int
    pattern: int
    result: int
    stream: int
    event: int


@contextlib.contextmanager
def _trial(device: int) -> Iterator[_Trial]:
    with contextlib.ExitStack() as stack, cupy_api.on(device):
        pattern = cupy_api.malloc(device, PATTERN_NBYTES)
        stack.callback(cupy_api.free, pattern)
        result = cupy_api.malloc(device, PATTERN_NBYTES)
        stack.callback(cupy_api.free, result)
        stream = cupy_api.stream_create(device)
        stack.callback(cupy_api.stream_destroy, stream)
        event = cupy_api.event_create()
        stack.callback(cupy_api.event_destroy, event)
        try:
            yield _Trial(device, pattern, result, stream, event)
        except DeviceTimeoutError:
            stack.pop_all()  # freeing the memory would wait for the copy that hangs
            raise


@contextlib.contextmanager
def _pinned(nbytes: int) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        ptr = cupy_api.host_alloc(nbytes)
        stack.callback(cupy_api.host_free, ptr)
        try:
            yield ptr
        except DeviceTimeoutError:
            stack.pop_all()  # as above
            raise


def _copies_arrive(own: _Trial, peer: _Trial, host: int, timeout: float) -> bool:
    """Whether `own`'s stream reads from and writes to the peer's memory."""
    n, back = PATTERN_NBYTES, host + PATTERN_NBYTES
    sent = np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(host))
    got = np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(back))
    for seed, write in ((1, False), (2, True)):
        sent[:] = np.random.default_rng(seed).integers(0, 256, n, np.uint8)
        got[:] = 0
        source, target = (own, peer) if write else (peer, own)
        # Clear the target first, so that a match proves that the copy arrived.
        with cupy_api.on(target.device):
            cupy_api.fill_async(target.result, 0, n, target.stream)
        _finish(target, timeout)
        cupy_api.copy_async(source.pattern, host, n, source.stream)
        _finish(source, timeout)
        cupy_api.copy_peer_async(target.result, target.device, source.pattern, source.device, n, own.stream)
        _finish(own, timeout)
        cupy_api.copy_async(back, target.result, n, target.stream)
        _finish(target, timeout)
        if not np.array_equal(sent, got):
            return False
    return True


def _finish(trial: _Trial, timeout: float) -> None:
    """Wait until the trial's stream is idle."""
    with cupy_api.on(trial.device):
        cupy_api.event_record(trial.event, trial.stream)
    deadline = time.monotonic() + timeout
    while not cupy_api.event_done(trial.event):
        if time.monotonic() > deadline:
            raise DeviceTimeoutError(
                f"A trial copy on GPU {trial.device} was not over within timeout={timeout} seconds."
            )
        time.sleep(_POLL_SECONDS)
