"""Errors of libraries are told apart: no memory, a lost device, a context of CUDA that is of no more use."""

from __future__ import annotations

import pytest

from fastdp.errors import DeviceLostError, ReplicaError
from fastdp.runtime.device_faults import is_lost, is_out_of_memory, is_sticky


class OutOfMemoryError(RuntimeError):
    """As torch's."""


class NvmlError(Exception):
    """As pynvml's."""


NvmlError.__module__ = "pynvml"


def because_of(cause):
    """A replica's error with this cause."""
    error = ReplicaError("failed", device="gpu:0", rows=None)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "found"),
    [
        (MemoryError(), "memory"),
        (OutOfMemoryError("Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "memory"),
        (DeviceLostError("gone"), "lost"),
        (NvmlError("GPU is lost"), "lost"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "lost"),
        (RuntimeError("CUDA error: device-side assert triggered"), "sticky"),
        (RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"), "sticky"),
        (RuntimeError("shapes differ"), ""),
        (ValueError("my model is out of memory of the day"), ""),  # the user's own words
    ],
)
def test_each_error_is_of_its_kind_and_of_no_other(cause, found):
    kinds = {"memory": is_out_of_memory, "lost": is_lost, "sticky": is_sticky}
    for error in (cause, because_of(cause)):
        assert [kind for kind, tells in kinds.items() if tells(error)] == ([found] if found else [])
