"""Events that tell the GPU's time, and whether a stream is captured, as plain functions like those of cupy_api.py."""

from __future__ import annotations

from cupy.cuda import runtime as cudart

from fastdp.runtime.cuda.cupy_api import CudaError

__all__ = ["event_elapsed", "is_capturing", "timed_event_create"]

_EVENT_DEFAULT = 0  # cudaEventDefault


def timed_event_create() -> int:
    """An event of the current device for `event_elapsed`. CUDA takes longer to record it than one without timing."""
    return int(cudart.eventCreateWithFlags(_EVENT_DEFAULT))


def event_elapsed(start: int, end: int) -> float:
    """Milliseconds of the GPU's time between two timed events of one device, both done; a 32-bit float."""
    return float(cudart.eventElapsedTime(start, end))


def is_capturing(stream: int) -> bool:
    """Whether work enqueued on the stream is recorded instead of run, also if that recording has become invalid."""
    try:
        return bool(cudart.streamIsCapturing(stream))
    except RuntimeError as error:
        if isinstance(error, CudaError):
            raise
        return True
