"""NCCL's calls through CuPy: the communicators of one process.

A thread that drives several communicators puts each collective, one call per communicator, into one
`nccl_group()`, which enqueues the calls when it ends. Collectives are enqueued on streams of the
communicators' devices, which need not be current. Errors are `NcclError`, a RuntimeError.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

with warnings.catch_warnings():
    # CuPy warns where there is no libnccl. One GPU needs none, and with several `fastdp devices` says what to install.
    warnings.simplefilter("ignore", UserWarning)
    from cupy.cuda import nccl

__all__ = [
    "NCCL_DTYPES",
    "NcclError",
    "all_gather",
    "all_reduce",
    "broadcast",
    "nccl_abort",
    "nccl_async_error",
    "nccl_available",
    "nccl_destroy",
    "nccl_group",
    "nccl_init_all",
    "nccl_init_ranks",
    "nccl_version",
    "reduce_scatter",
]

# Without libnccl, CuPy's module has only `available`; fastdp then makes no NCCL call.
NcclError: type[RuntimeError] = nccl.NcclError if nccl.available else RuntimeError

# NCCL's codes of element types (ncclDataType_t), by NumPy's dtype names; CuPy uses other names.
NCCL_DTYPES = {
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "uint32": 3,
    "int64": 4,
    "uint64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}
_SUM = 0

# Codes that NCCL has and CuPy 14 has no name for: its NcclError then ends in a KeyError.
_IN_PROGRESS = 7
_UNNAMED = {_IN_PROGRESS: "NCCL_ERROR_IN_PROGRESS", 8: "NCCL_ERROR_TIMEOUT"}


class _UnnamedError(NcclError):  # type: ignore[misc, valid-type]
    """An NCCL error of a code that CuPy cannot name."""

    def __init__(self, status: int) -> None:
        self.status = status
        RuntimeError.__init__(self, f"{_UNNAMED.get(status, 'NCCL_ERROR')}: code {status} of NCCL")


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Raise NcclError for every code."""
    try:
        yield
    except KeyError as error:
        if len(error.args) != 1 or not isinstance(error.args[0], int):
            raise
        raise _UnnamedError(error.args[0]) from None


def nccl_available() -> bool:
    """Whether CuPy found libnccl."""
    return bool(nccl.available)


def nccl_version() -> int:
    """The version of the loaded library, such as 22907 for 2.29.7."""
    return int(nccl.get_version())


def nccl_init_all(devices: Sequence[int]) -> list[Any]:
    """One communicator per device, in rank order. Allocates memory, and waits for all devices.

    Raises:
        ValueError: a device comes twice; NCCL requires one rank per GPU.
        NcclError: NCCL cannot connect the devices.
    """
    if len(set(devices)) != len(devices):
        raise ValueError(f"devices={list(devices)}: expected each GPU once, since NCCL takes one rank per GPU")
    with _named():
        return list(nccl.NcclCommunicator.initAll(list(devices)))


def nccl_init_ranks(devices: Sequence[int], current: Callable[[int], AbstractContextManager[object]]) -> list[Any]:
    """As nccl_init_all, but one by one in a group, so that several ranks may share a device if NCCL allows it.

    Args:
        devices: the device of each rank.
        current: context manager that makes a device current in the thread.
    """
    comms = []
    with _named():
        clique = nccl.get_unique_id()
    with nccl_group(), _named():
        for rank, device in enumerate(devices):
            with current(device):
                comms.append(nccl.NcclCommunicator(len(devices), clique, rank))
    return comms


@contextlib.contextmanager
def nccl_group() -> Iterator[None]:
    """Collect the collectives of several communicators and enqueue them together at the end.

    An exception inside also ends the group, which may enqueue a collective on some ranks only. Abort the
    communicators then, and validate arguments before entering the group.
    """
    nccl.groupStart()
    try:
        with _named():
            yield
    except BaseException:
        # The first failure is more informative than its effect on the group.
        with contextlib.suppress(NcclError), _named():
            nccl.groupEnd()
        raise
    with _named():
        nccl.groupEnd()


def _dtype(name: str) -> int:
    """NCCL's code of an element type."""
    if name not in NCCL_DTYPES:
        raise ValueError(f"dtype_name={name!r}: expected one of {', '.join(NCCL_DTYPES)}")
    return NCCL_DTYPES[name]


def all_reduce(comm: Any, send: int, recv: int, count: int, dtype_name: str, stream: int) -> None:
    """recv = the sum of all ranks' send, `count` elements each; recv may be send."""
    comm.allReduce(send, recv, count, _dtype(dtype_name), _SUM, stream)


def reduce_scatter(comm: Any, send: int, recv: int, count: int, dtype_name: str, stream: int) -> None:
    """recv = this rank's `count` elements of the sum of all ranks' send; send has `count` elements per rank.

    In place if recv is this rank's part of send.
    """
    comm.reduceScatter(send, recv, count, _dtype(dtype_name), _SUM, stream)


def all_gather(comm: Any, send: int, recv: int, count: int, dtype_name: str, stream: int) -> None:
    """recv = all ranks' send, concatenated, `count` elements each. In place if send is its part of recv."""
    comm.allGather(send, recv, count, _dtype(dtype_name), stream)


def broadcast(comm: Any, send: int, recv: int, count: int, dtype_name: str, stream: int, root: int = 0) -> None:
    """recv = the root rank's send, `count` elements; recv may be send."""
    comm.broadcast(send, recv, count, _dtype(dtype_name), root, stream)


def nccl_async_error(comm: Any) -> RuntimeError | None:
    """The error of a collective that was already enqueued, if any; one in progress is none."""
    try:
        comm.check_async_error()
    except (NcclError, KeyError):
        try:
            with _named():
                raise
        except NcclError as error:
            return None if getattr(error, "status", None) == _IN_PROGRESS else error
    return None


def nccl_abort(comm: Any) -> None:
    """Abort a communicator and the collectives that hang in it.

    CuPy creates blocking communicators: aborting one while another thread is inside one of its calls is not safe.
    """
    comm.abort()


def nccl_destroy(comm: Any) -> None:
    """Destroy a communicator whose collectives are done. One thread destroys several inside a group."""
    comm.destroy()
