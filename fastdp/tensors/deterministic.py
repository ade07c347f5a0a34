"""Switches torch's deterministic algorithms on while a step runs.

No decision depends on timing then (`fastdp.capture.steps`). The rest of a step repeats in any case: sums are taken in
the order of the replicas, random draws are indexed by row, and each operation uses the same number of cores in every
step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch

from fastdp.runtime.queue import QueueDevice

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
_REFUSED = "does not have a deterministic implementation"


class _Counted:
    """Counts the running steps that need deterministic algorithms. The last one restores the settings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = 0
        self._before: tuple[bool, bool, bool, bool] = (False, False, False, False)

    def begin(self) -> None:
        """Add a step."""
        with self._lock:
            self._steps += 1
            if self._steps == 1:
                warns = torch.is_deterministic_algorithms_warn_only_enabled()
                cudnn = torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()
                self._before = torch.are_deterministic_algorithms_enabled(), warns, *cudnn
                _use(True, False, False, True)

    def end(self) -> None:
        """Remove a step."""
        with self._lock:
            self._steps -= 1
            if self._steps == 0:
                _use(*self._before)


_counted = _Counted()


def _use(deterministic: bool, warn_only: bool, benchmark: bool, cudnn_deterministic: bool) -> None:
    """Change torch's settings, which are process-wide. `torch.use_deterministic_algorithms` would load the compiler."""
    torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch._C._set_cudnn_benchmark(benchmark)
    torch._C._set_cudnn_deterministic(cudnn_deterministic)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Use torch's deterministic algorithms, without cuDNN's benchmark mode, during a step.

    Raises:
        RuntimeError: an operation has no deterministic form. This is torch's error (or a ReplicaError from it), with a
            note that names the layer and says what to do.
    """
    _counted.begin()
    try:
        yield
    except RuntimeError as error:
        if _REFUSED in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on, which Keras 3.15 needs anyway
            error.add_note(
                f"fastdp: {_place(error)}Replace the operation, or wrap the model without deterministic=True."
            )
        raise
    finally:
        _counted.end()


def check_deterministic(devices: Sequence[QueueDevice]) -> None:
    """On GPUs, make cuBLAS use a separate workspace per stream, without which its results vary.

    Raises:
        RuntimeError: CUDA has already started without this setting.
    """
    if not any(device.on_gpu for device in devices) or os.environ.get(_WORKSPACE) in _WORKSPACES:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"`deterministic=True` needs {_WORKSPACE}={_WORKSPACES[0]} in the environment before torch first uses a "
            f"GPU, which it has done already. Received: {_WORKSPACE}={os.environ.get(_WORKSPACE)!r}. "
            "Set it before Python starts."
        )
    os.environ[_WORKSPACE] = _WORKSPACES[0]


def _place(error: BaseException) -> str:
    """A sentence that names the innermost module in the traceback of an error or of one of its causes."""
    seen: BaseException | None = error
    while seen is not None:
        found = _innermost(seen.__traceback__)
        if found is not None:
            name = getattr(found, "name", None)
            return f"It is used by {type(found).__name__}{f' ({name!r})' if isinstance(name, str) else ''}. "
        seen = seen.__cause__ or seen.__context__
    return ""


def _innermost(trace: TracebackType | None) -> torch.nn.Module | None:
    """The innermost module in a traceback, except containers."""
    found = None
    while trace is not None:
        one = trace.tb_frame.f_locals.get("self")
        if isinstance(one, torch.nn.Module) and not hasattr(one, "layers"):
            found = one
        trace = trace.tb_next
    return found
