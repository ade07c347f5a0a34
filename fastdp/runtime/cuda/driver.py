"""Calls of the CUDA driver that CuPy lacks, or makes while it holds the interpreter's lock, through ctypes.

The handles are the same as in cupy_api.py: every CUDA runtime of the process (CuPy's, torch's) shares one driver, and
a stream, an event or a graph is the same object to all of them. Source of the calls: the CUDA driver API reference.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

__all__ = ["NOT_READY", "DriverCallError", "call", "event_status"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_HANDLE = ctypes.c_void_p
_CALLS = {
    "cuEventQuery": (_HANDLE,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGraphAddChildGraphNode": (ctypes.POINTER(_HANDLE), _HANDLE, ctypes.POINTER(_HANDLE), ctypes.c_size_t, _HANDLE),
    "cuGraphCreate": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cuGraphDestroy": (_HANDLE,),
}
NOT_READY = 600  # CUDA_ERROR_NOT_READY, and the runtime's cudaErrorNotReady


class DriverCallError(RuntimeError):
    """A call of the driver failed; the message holds the driver's error name."""


@functools.cache
def _function(name: str) -> Any:
    """A function of the driver's library, which lets other threads run while it is called.

    Raises:
        DriverCallError: the library is missing, or lacks the function.
    """
    try:
        function = getattr(ctypes.CDLL(_LIBRARY), name)
    except (OSError, AttributeError) as error:
        raise DriverCallError(f"{name} of {_LIBRARY} is needed ({error}). Install or update NVIDIA's driver.") from None
    function.argtypes, function.restype = _CALLS[name], ctypes.c_int
    return function


def call(name: str, *arguments: object) -> None:
    """Call the driver in the current context.

    Raises:
        DriverCallError: the call failed, or the driver does not have it.
    """
    status = _function(name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _function("cuGetErrorName")(status, ctypes.byref(text))
        raise DriverCallError(f"{name}: {(text.value or b'unknown').decode()} ({status})")


def event_status(event: int) -> int:
    """0 once the work before an event is done, else NOT_READY or the code of a failure.

    A query may block in the driver, for instance while another thread loads a kernel. CuPy's call would hold the
    interpreter's lock meanwhile, and with it the thread that must launch what the event waits for.
    """
    return _function("cuEventQuery")(event)
