"""Tells from an exception whether a device has no memory left, is lost, or is of no more use to this process."""

from __future__ import annotations

from collections.abc import Iterator

from fastdp.errors import DeviceLostError

# The words of libraries whose exceptions have no class of their own for it.
_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")
# Words of CUDA and NVML when the card itself has failed: Xid 48, 64, 74, 79, 94, 95, 119 and their like.
_GONE = (
    "GPU is lost",
    "fallen off the bus",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "cudaErrorECCUncorrectable",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorDevicesUnavailable",
    "CUDA-capable device(s) is/are busy or unavailable",
    "GPU requires reset",
)
# Words of errors that stay with the process's context until it ends, while the card is fine.
_STICKY = (
    "an illegal memory access was encountered",
    "unspecified launch failure",
    "device-side assert triggered",
    "an illegal instruction was encountered",
    "misaligned address",
    "the launch timed out and was terminated",
    "hardware stack error",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchFailure",
    "cudaErrorAssert",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorHardwareStackError",
    "cudaErrorInvalidPc",
    "cudaErrorInvalidAddressSpace",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, says that there is no memory left on a device."""
    for one in _causes(error):
        if isinstance(one, MemoryError):  # also CuPy's OutOfMemoryError
            return True
        if any(cls.__name__ == "OutOfMemoryError" for cls in type(one).__mro__):  # torch's
            return True
        if _says(one, _MEMORY):
            return True
    return False


def is_lost(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, says that a device is lost."""
    return any(isinstance(one, DeviceLostError) or _says(one, _GONE) for one in _causes(error))


def is_sticky(error: BaseException) -> bool:
    """Whether CUDA can do nothing more in this process after such an exception, though the card may be fine."""
    return any(_says(one, _STICKY) for one in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it was raised from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    """Whether an exception of a library's own kind says one of these. Texts of a user's exceptions are not read."""
    if not isinstance(error, RuntimeError) and type(error).__module__.split(".")[0] not in _LIBRARIES:
        return False
    return any(word in str(argument) for argument in error.args for word in words)


_LIBRARIES = ("torch", "cupy", "cupy_backends", "pynvml")
