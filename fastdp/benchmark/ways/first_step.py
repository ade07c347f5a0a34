"""What ways share besides training: the compiler's part of the first step, and the peak of host memory."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


def compile_seconds(first: float, step_seconds: Sequence[float]) -> float:
    """The part of the first step that later steps do not take, in seconds: tracing and compiling, and warm-up.

    Libraries that compile in the first step do not tell how long it took.

    Args:
        first: seconds of the first step.
        step_seconds: seconds per step of the rounds so far, of which the first is that step.
    """
    return max(0.0, first - statistics.median(step_seconds[1:] or step_seconds))


def host_peak_nbytes() -> int | None:
    """The peak host memory of this process; None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # bytes on macOS, KiB elsewhere
