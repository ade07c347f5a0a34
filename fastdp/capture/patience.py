"""Says when `compile="auto"` traces and compiles a step: once it has trained for about as long as that will take.

Steps that an earlier run has decided about are not waited for (`fastdp.capture.decisions`).
"""

from __future__ import annotations

import statistics
from typing import Any

from fastdp.capture.shapes import Shape

# Seconds that tracing and compiling are expected to take. A trace takes about ten eager steps, since it runs the same
# Python code under a tracer, after it has loaded parts of torch. Compile time grows with the number of operations.
TRACE_SECONDS, TRACE_STEPS = 0.5, 10
COMPILE_SECONDS, COMPILE_SECONDS_PER_OPERATION = 10.0, 0.02
# Compiling runs beside the training: it begins once training has taken this fraction of the expected time.
COMPILE_PATIENCE = 0.25


def trace_is_due(shape: Shape[Any]) -> bool:
    """Whether it is time to trace; `shape.why` says why not."""
    if shape.remembered is not None:
        shape.why = shape.remembered.why
        return not shape.stays_eager
    # The first step of a shape includes warm-up: the latest steps show how long a step takes.
    shape.why = "not trained for long enough yet"
    expected = TRACE_SECONDS + TRACE_STEPS * statistics.median(shape.recent)
    return shape.steps > 1 and shape.seconds > expected


def compile_is_due(shape: Shape[Any]) -> bool:
    """Whether it is time to compile a traced step; `shape.why` says why not."""
    assert shape.captured is not None
    if shape.remembered is not None:
        shape.why = shape.remembered.why
        return shape.remembered.form == "compiled"
    shape.why = "not trained for long enough yet to be compiled"
    expected = COMPILE_SECONDS + COMPILE_SECONDS_PER_OPERATION * shape.captured.operations
    return shape.seconds > COMPILE_PATIENCE * expected
